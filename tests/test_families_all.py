"""What every family must do, on miniatures of each: encode, sample and noise as Diffusers does, train under every objective,
resume, save, and be loaded by plain Diffusers.

A new family is tested here as soon as ``miniatures`` builds one of it. ``benchmarks/families.py`` makes the table
of docs/families.md from the runs below.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)
from family_runs import PROMPTS, Saved, assert_equal, loaded_plainly, on_disk, run, weights, write_pairs
from miniatures import MINIATURES, PIXELS
from safetensors import safe_open

from diffalign import objectives
from diffalign.protocols import Denoiser, Encoder
from diffalign.schedule import FlowSchedule, NoiseSchedule
from diffalign.solvers import Guided
from diffalign.sources.rollout import Sampling, chain
from pipelines import families
from pipelines.families._names import LORA_FILE, METADATA

LONG = "a red circle " * 120


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=list(MINIATURES))
def saved(request: pytest.FixtureRequest, folders: Path) -> Saved:
    return on_disk(request.param, folders)


def test_every_family_has_a_miniature() -> None:
    assert {m.family for m in MINIATURES.values()} == set(families.names())


# ------------------------------------------------------------------------------------------------------------ contracts


def test_it_is_recognised_and_keeps_the_cores_contracts(saved: Saved) -> None:
    family = families.load_family(saved.folder)
    assert family.name == saved.miniature.family == families.detect(saved.folder)
    assert isinstance(family.denoiser, Denoiser) and isinstance(family.encoder, Encoder)
    assert not any(p.requires_grad for p in family.network.parameters())
    family.release_encoders()
    pipe = saved.pipeline()
    assert family.latent_shape(PIXELS) == (pipe.vae.config.latent_channels, 8, 8)  # also without encoders
    assert type(family.pipeline()) is type(pipe) and family.pipeline().vae is not None  # which come back where they are needed


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(saved: Saved) -> None:
    encoder, pipe = families.load_family(saved.folder).encoder, saved.pipeline()
    said, empty = saved.miniature.said(pipe, PROMPTS)
    for expected, found in ((said, encoder.encode_prompts(PROMPTS)), (empty, encoder.encode_prompts(["", ""]))):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    for name, value in saved.miniature.said(pipe, [LONG])[0].items():  # what does not fit is cut off in the same place
        torch.testing.assert_close(encoder.encode_prompts([LONG])[name], value, rtol=0, atol=1e-5)
    report = encoder.truncated([*PROMPTS, LONG])
    assert {one.prompt for one in report} == {LONG} and report[0].lost in LONG and len(report[0].lost) > 100


@torch.no_grad()
def test_pictures_are_encoded_and_decoded_as_the_autoencoder_does_it(saved: Saved) -> None:
    encoder, pipe = families.load_family(saved.folder).encoder, saved.pipeline()
    pixels = torch.rand(2, 3, PIXELS, PIXELS) * 2 - 1
    encoded, config = pipe.vae.encode(pixels), pipe.vae.config
    if isinstance(pipe.vae, AutoencoderDC):
        mean, std = encoded.latent, torch.zeros_like(encoded.latent)
    else:
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    found = encoder.encode_images(pixels)
    expected = (mean - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    torch.testing.assert_close(found["mean"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["std"], std * config.scaling_factor, rtol=0, atol=1e-5)
    latents = saved.latents(pipe)
    shown = saved.latents(pipe, output_type="pt")
    torch.testing.assert_close(encoder.decode(latents), torch.as_tensor(shown), rtol=0, atol=1e-5)


def test_what_decides_an_encoding_is_in_its_fingerprint(saved: Saved) -> None:
    one, other = (families.load_family(saved.folder, dtype=dtype).encoder for dtype in ("float32", "bf16"))
    assert one.fingerprint() == other.fingerprint()  # the encoders are float32 either way
    first = json.dumps(one.fingerprint())
    for name in other.components:
        changed = families.load_family(saved.folder).encoder
        network = changed._networks[name]
        with torch.no_grad():
            next((network.encoder if name == "vae" else network).parameters()).add_(1e-3)
        assert json.dumps(changed.fingerprint()) != first, name


def test_encoding_needs_no_network(saved: Saved) -> None:
    whole, bare = families.load_family(saved.folder), families.load_family(saved.folder, network=False)
    assert all(weight.is_meta for weight in bare.network.parameters())
    assert bare.encoder.fingerprint() == whole.encoder.fingerprint()
    encoders = [one.work_on(torch.device("cpu")) or one for one in (whole.encoder, bare.encoder)]
    pixels = torch.linspace(-1, 1, 3 * PIXELS**2).view(1, 3, PIXELS, PIXELS)
    for first, second in (
        [encoder.encode_images(pixels) for encoder in encoders],
        [encoder.encode_prompts(PROMPTS) for encoder in encoders],
    ):
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert bare.latent_shape(PIXELS) == whole.latent_shape(PIXELS)


# ------------------------------------------------------------------------------------------------- sampling and schedule


def test_an_adapter_is_the_same_file_every_time_and_for_all_to_read(saved: Saved, tmp_path: Path) -> None:
    """PEFT keeps targets as a set, whose order is another in every process, and safetensors shuffles the header's fields."""
    family, before = families.load_family(saved.folder), os.umask(0o022)
    family.attach_lora(rank=2)
    try:
        for attempt in range(8):
            family.save_adapter(tmp_path / str(attempt))
    finally:
        os.umask(before)
    first, *others = [
        {path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in sorted(tmp_path.iterdir())
    ]
    assert others == [first] * 7
    with safe_open(tmp_path / "0" / LORA_FILE, "pt") as file:
        kept = {key.partition(".")[2]: value for key, value in json.loads(file.metadata()[METADATA]).items()}
    assert len(kept["target_modules"]) > 2 and kept["target_modules"] == sorted(kept["target_modules"])
    if (tmp_path / "0" / "adapter_config.json").exists():
        targets = json.loads((tmp_path / "0" / "adapter_config.json").read_text())["target_modules"]
        assert targets == sorted(targets)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o644}


@torch.no_grad()
def test_our_chain_follows_the_familys_own_pipeline(saved: Saved) -> None:
    """Deterministic sampling with guidance, from the same x_T, step for step on the scheduler's own grid."""
    family, pipe = families.load_family(saved.folder), saved.pipeline()
    schedule, shape, solver = family.denoiser.schedule, family.latent_shape(PIXELS), "ddim"
    if isinstance(schedule, NoiseSchedule):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="leading")
    elif isinstance(pipe.scheduler, DPMSolverMultistepScheduler):
        solver = "dpm-solver++"
    x = torch.randn(2, *shape)
    scale = 3.0 if saved.miniature.guided else 1.0
    guided = {"guidance_scale": saved.miniature.guidance(scale), **saved.miniature.as_encoded}
    expected = saved.latents(pipe, steps=5, latents=x, **guided)
    encode = family.encoder.encode_prompts
    denoiser = Guided(family.denoiser, encode([""]), scale)
    grid = schedule.grid(5, shape, "leading", pipe.scheduler.config.get("steps_offset", 0))
    made = chain(denoiser, schedule, x, encode(PROMPTS), grid.expand(2, -1), Sampling(5, solver, eta=0.0))
    torch.testing.assert_close(made.final, expected, rtol=1e-5, atol=1e-5)


def test_noise_and_targets_are_the_schedulers_own(saved: Saved) -> None:
    schedule, pipe = families.load_family(saved.folder).denoiser.schedule, saved.pipeline()
    if isinstance(schedule, FlowSchedule):
        _assert_straight(schedule, pipe.scheduler)
        return
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    x_0, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(schedule.add_noise(x_0, noise, t), scheduler.add_noise(x_0, noise, t), rtol=0, atol=1e-6)
    velocity = scheduler.config.prediction_type == "v_prediction"
    expected = scheduler.get_velocity(x_0, noise, t) if velocity else noise
    torch.testing.assert_close(schedule.target(x_0, noise, t), expected, rtol=0, atol=1e-6)


def _assert_straight(schedule: FlowSchedule, scheduler: Any) -> None:
    """Noise as a flow's scheduler adds it; and its step from a perfect answer to the clean end gives the picture back."""
    dynamic = {"mu": 0.6} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(4, **dynamic)
    x_0, noise, t = torch.randn(4, 8, 8, 8), torch.randn(4, 8, 8, 8), 1000 * scheduler.sigmas[:-1]
    x_t, target = schedule.add_noise(x_0, noise, t), schedule.target(x_0, noise, t)
    add = getattr(scheduler, "scale_noise", None)
    expected = add(x_0, scheduler.timesteps, noise) if add else scheduler.add_noise(x_0, noise, scheduler.timesteps)
    scheduler.set_begin_index(3)
    back = scheduler.step(target[-1], scheduler.timesteps[-1], x_t[-1]).prev_sample
    torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(back, x_0[-1], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def pairs(folders: Path) -> Path:
    return write_pairs(folders / "data")


BASES: dict[Path, torch.Tensor] = {}


def base_of(saved: Saved) -> torch.Tensor:
    """What the miniature samples before training, sampled once."""
    if saved.folder not in BASES:
        BASES[saved.folder] = saved.latents(saved.pipeline())
    return BASES[saved.folder]


def every_run() -> list[Any]:
    """Family, objective, adapter. Each family meets each objective here with one adapter, and slowly with the other."""
    found = []
    for row, family in enumerate(families.names()):
        for column, objective in enumerate(objectives.names(of_prompts=False)):
            first = (row + column) % 2
            for k, adapter in enumerate(("lora", "full")):
                found.append(pytest.param(family, objective, adapter, marks=() if k == first else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("family", "objective", "adapter"), every_run())
def test_a_run(family: str, objective: str, adapter: str, folders: Path, pairs: Path, tmp_path: Path) -> None:
    """Trained, resumed to the bit, loaded by plain Diffusers, and sampled from."""
    saved, whole, cut = on_disk(family, folders), tmp_path / "whole", tmp_path / "cut"
    run(saved, pairs, objective, whole, adapter=adapter)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-00000002")
    for file in cut.rglob("*.safetensors"):
        file.unlink() if "checkpoints" not in file.parts else None
    run(saved, pairs, objective, cut, adapter=adapter, resume=True)
    assert_equal(weights(whole), weights(cut))

    base = base_of(saved)
    plain = loaded_plainly(saved, whole, adapter)
    tuned = saved.latents(plain)
    assert torch.isfinite(tuned).all() and not torch.allclose(tuned, base, rtol=1e-5, atol=1e-5)
    assert f"import {type(plain).__name__}" in (whole / "README.md").read_text()
    if objective in READ_BY_US:
        assert_read_by_us(saved, whole, tuned, base, adapter)


READ_BY_US = objectives.names(of_prompts=False)[:2]
"""Neighbours, so every family meets one with a LoRA and one without; what is read does not depend on what trained it."""


def assert_read_by_us(saved: Saved, output: Path, tuned: torch.Tensor, base: torch.Tensor, adapter: str) -> None:
    """A result in a pipeline of ours, and its LoRA put on to be trained, switched off and taken off again."""
    torch.testing.assert_close(saved.latents(families.load_pipeline(output, device="cpu")), tuned, rtol=1e-5, atol=1e-5)
    if adapter == "lora":
        again = families.load_family(saved.folder)
        found = families.read_adapter(output)
        again.attach_lora(rank=found.rank, alpha=found.alpha, targets=found.targets)
        again.load_adapter(found)
        torch.testing.assert_close(saved.latents(again.pipeline()), tuned, rtol=1e-5, atol=1e-5)
        with again.denoiser.adapter_off():
            assert torch.equal(saved.latents(again.pipeline()), base)
        again.detach_lora()
        assert torch.equal(saved.latents(again.pipeline()), base)
