"""Text encoders in half the bytes: the same prompts, nearly the same states, another cache, announced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_runs import on_disk, write_pairs
from miniatures import MINIATURES, PIXELS
from test_estimate import settings

from pipelines import memory_presets
from pipelines.estimate import PICTURES, estimate
from pipelines.families import load_family
from pipelines.families._encoder import VAE
from pipelines.training import align

PROMPTS = ["a red circle", "a small blue star on a white background"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.mark.parametrize("name", MINIATURES)
def test_states_are_nearly_those_of_float32(name: str, folders: Path) -> None:
    folder = on_disk(name, folders).folder
    whole, half = (load_family(folder, text_dtype=dtype) for dtype in ("float32", "bfloat16"))
    for component, network in zip(half.encoder.components, half.encoder.networks(), strict=True):
        wanted = torch.float32 if component == VAE else torch.bfloat16
        assert next(network.parameters()).dtype == wanted, component
    expected, told = whole.encoder.encode_prompts(PROMPTS), half.encoder.encode_prompts(PROMPTS)
    assert expected.keys() == told.keys()
    floats = [key for key, value in expected.items() if value.is_floating_point() and value.abs().sum() > 0]
    differences = {key: float((told[key] - expected[key]).norm() / expected[key].norm()) for key in floats}
    assert all(difference < 0.05 for difference in differences.values()) and any(differences.values()), differences
    for component, network in zip(whole.encoder.components, whole.encoder.networks(), strict=True):
        if component != VAE:
            network.to(torch.bfloat16).float()  # weights that bfloat16 holds without loss, as in most files
    assert whole.encoder.fingerprint() != half.encoder.fingerprint()  # one does not find the other's cache


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_a_run_takes_it(name: str, folders: Path, tmp_path: Path) -> None:
    where = {"model": str(on_disk(name, folders).folder), "pairs": str(write_pairs(tmp_path / "pairs")), "resolution": PIXELS}
    pace = {"steps": 1, "checkpoint_every": 0, "validate_every": 0, "progress": False}
    prints = [
        align("sft", **where, **pace, text_precision=precision, output=tmp_path / precision)["fingerprint"]["data"]
        for precision in ("float32", "bfloat16")
    ]
    assert prints[0] != prints[1]


def test_it_is_announced_and_a_preset_knows_it() -> None:
    whole, half = (estimate(settings(text_precision=p)).encoding for p in ("float32", "bfloat16"))
    assert half["text_encoder"] * 2 == whole["text_encoder"]
    assert all(half[name] == whole[name] for name in (VAE, PICTURES))
    assert memory_presets._small_text(settings()).data.text_precision == "bfloat16"
