"""The comparison after a training takes no more memory than it must, is announced, and cannot spoil what was trained."""

from __future__ import annotations

import json
import shlex
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_runs import write_pairs
from test_estimate import settings

from diffalign.errors import UserError
from pipelines import cli, families, memory_presets, training
from pipelines.estimate import estimate
from pipelines.families._quantised import is_quantised
from pipelines.sampling import sample
from pipelines.tiny.model import checkpoint_path
from pipelines.training import align

SHORT = {"steps": 1, "checkpoint_every": 0, "validate_every": 0, "progress": False}
COMPARED = {"prompts": "tiny", "prompt_count": 2, "judges": ("oracle",), "sampling_steps": 2}
PROMPTS = ["a red circle", "a small blue star on a white background"]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return str(write_pairs(tmp_path / "pairs"))


def test_networks_are_gone_before_the_comparison_begins(monkeypatch: pytest.MonkeyPatch, pairs: str, tmp_path: Path) -> None:
    held: list[weakref.ref] = []
    export, evaluate = training.write_result, training.evaluate

    def exported(given: Any, family: Any, *more: Any) -> None:
        held.extend(weakref.ref(p) for p in (*family.network.parameters(), *family.denoiser.trainable_parameters()))
        export(given, family, *more)

    def compared(*args: Any, **options: Any) -> Any:
        assert held and not any(ref() is not None for ref in held)
        return evaluate(*args, **options)

    monkeypatch.setattr(training, "write_result", exported)
    monkeypatch.setattr(training, "evaluate", compared)
    summary = align(
        "diffusion-dpo", model="tiny", pairs=pairs, output=tmp_path / "run", adapter="full", ema_decay=0.9, **SHORT, **COMPARED
    )
    assert summary["judges"]["oracle"] and summary["compared_in"] == {"dtype": "float32", "quantise": "none"}


def test_a_full_device_costs_the_comparison_and_nothing_else(monkeypatch: pytest.MonkeyPatch, pairs: str, tmp_path: Path) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(training, "evaluate", full)
    with pytest.raises(
        UserError, match=r"saved in .*run.*Tried to allocate 2.00 GiB.*diffalign evaluate --base tiny --tuned .*run"
    ) as told:
        align("diffusion-dpo", model="tiny", pairs=pairs, output=tmp_path / "run", **SHORT, **COMPARED)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1 and "judges" not in summary
    assert (tmp_path / "run" / "README.md").is_file()
    command = shlex.split(str(told.value).partition("on the device: ")[2])
    monkeypatch.undo()
    assert cli.main(command[1:]) == 0
    later = json.loads((tmp_path / "run" / "evaluation-later" / "summary.json").read_text())
    assert later["judges"]["oracle"] and later["tuned"].endswith("run")
    assert families.load_pipeline(tmp_path / "run").unet.peft_config


def test_the_comparison_samples_as_the_run_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(families, "load_pipeline", lambda name, **how: asked.append(how))
    training._load(settings(mixed_precision="bf16", quantise="int8"), "tiny")
    assert asked[0]["dtype"] == "bfloat16" and asked[0]["quantise"] == "int8" and asked[0]["offload"]


def test_one_picture_decoded_at_a_time_is_the_same_picture() -> None:
    plain, careful = families.load_pipeline("tiny"), families.load_pipeline("tiny", offload=True)
    assert careful.vae.use_slicing and not plain.vae.use_slicing
    how = {"seeds": [1, 2], "steps": 3}
    for a, b in zip(sample(plain, PROMPTS, **how), sample(careful, PROMPTS, **how), strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_lora_is_sampled_on_a_quantised_base(kind: str, pairs: str, tmp_path: Path) -> None:
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[kind])
    align("diffusion-dpo", model="tiny", pairs=pairs, output=tmp_path / "run", learning_rate=1e-3, **{**SHORT, "steps": 3})
    whole, less = families.load_pipeline(tmp_path / "run"), families.load_pipeline(tmp_path / "run", quantise=kind)
    assert is_quantised(less.unet) and not is_quantised(whole.unet)
    asked = torch.randn(2, 4, 16, 16), torch.tensor(500), torch.randn(2, 8, whole.unet.config.cross_attention_dim)
    with torch.no_grad():
        told, nearly = (pipe.unet(*asked).sample for pipe in (whole, less))
        less.disable_lora()
        without = less.unet(*asked).sample
    assert 0 < (told - nearly).norm() / told.norm() < {"int8": 0.02, "nf4": 0.2}[kind]
    assert not torch.equal(without, nearly)  # the LoRA is on


# -------------------------------------------------------------------------------------------------------------- announced


def test_the_comparison_is_counted_in_the_precision_of_the_run() -> None:
    assert estimate(settings()).comparing is None
    compared = {"prompts": "tiny", "judges": ["oracle"], "prompt_count": 2}
    whole, half = (estimate(settings(mixed_precision=p, **compared)).comparing for p in ("no", "bf16"))
    pipe = families.load_pipeline(checkpoint_path())
    sizes = {name: 4 * sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("unet", "vae", "text_encoder")}
    assert whole.network == sizes["unet"] == 2 * half.network
    assert whole.decoder == sizes["vae"] == 2 * half.decoder
    assert whole.encoders["text_encoder"] == pytest.approx(sizes["text_encoder"], rel=0.01)
    assert 1.5 < whole.asked / half.asked < 2.5
    assert whole.on_device < whole.on_host
    assert "compared with its base" in estimate(settings(**compared)).to_text()


def test_a_comparison_of_more_pictures_at_a_time_takes_more() -> None:
    compared = {"prompts": "tiny", "judges": ["oracle"]}
    one, eight = (estimate(settings(**compared, sampling_batch=n)).comparing for n in (1, 8))
    assert eight.asked == pytest.approx(8 * one.asked, rel=0.1) and eight.decoded == one.decoded


def test_pictures_that_an_objective_samples_are_counted() -> None:
    common = {"pairs": None, "train_prompts": "tiny", "reward": ["tiny-pickscore"]}
    assert estimate(settings()).sampling == 0
    four, sixteen = (estimate(settings("d3po", **common, rollout_batch=n)) for n in (4, 16))
    sliced = estimate(settings("d3po", **common, rollout_batch=16, vae_slicing=True))
    assert four.sampling < sixteen.sampling and sliced.sampling < sixteen.sampling
    assert four.bytes["autoencoder"] > 0 and estimate(settings()).bytes["autoencoder"] == 0


def test_a_preset_samples_one_picture_at_a_time_where_pictures_are_sampled() -> None:
    own = settings("d3po", pairs=None, train_prompts="tiny", reward=["tiny-pickscore"])
    assert memory_presets._small_sampling(own).reward.rollout_batch == 1
    compared = settings(prompts="tiny", judges=["oracle"])
    assert memory_presets._small_sampling(compared).evaluation.sampling_batch == 1
    assert memory_presets._small_sampling(settings()) == settings()


def test_a_device_must_hold_the_largest_phase() -> None:
    guess = estimate(settings(prompts="tiny", judges=["oracle"]))
    larger = replace(guess.comparing, asked=int(50e9))
    assert replace(guess, comparing=larger).peak > 50e9 and replace(guess, sampling=int(60e9)).peak == int(60e9)
