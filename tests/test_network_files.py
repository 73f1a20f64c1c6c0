"""A file with the transformer alone, plain or quantised, and the rest of the pipeline from a Diffusers folder: Z-Image's original
layout, which Diffusers reads for transformers of any size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from family_runs import PROMPTS, Saved, on_disk, write_pairs
from miniatures import PIXELS
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import UserError
from pipelines import cli, families
from pipelines.export import Export, export
from pipelines.families._denoiser import working_dtype
from pipelines.training import align

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture
def saved(folders: Path) -> Saved:
    return on_disk("z_image", folders)


def original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Z-Image's own names: one matrix for queries, keys and values, and a few words that differ."""
    words = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", "norm_q": "q_norm", "norm_k": "k_norm"}
    words |= {"attention.to_out.0.": "attention.out."}
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        for theirs, own in words.items():
            name = name.replace(theirs, own)
        made[name] = value
    for name in [name for name in made if ".attention.to_q." in name]:
        parts = [made.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        made[name.replace("to_q", "qkv")] = torch.cat(parts)
    return made


@pytest.fixture
def plain(saved: Saved) -> Path:
    (found,) = (saved.folder / "transformer").glob("*.safetensors")
    path = saved.folder.parent / "network.safetensors"
    save_file(original(load_file(found)), path)
    return path


@pytest.fixture
def quantised(saved: Saved) -> Path:
    """Eight bits for what has two dimensions and rows that are multiples of 32."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    (found,) = (saved.folder / "transformer").glob("*.safetensors")
    path = saved.folder.parent / "network.gguf"
    writer = GGUFWriter(path, "z_image")
    for name, value in original(load_file(found)).items():
        array = value.float().numpy()
        small = array.ndim == 2 and array.shape[1] % 32 == 0 and "pad_token" not in name
        kind = GGMLQuantizationType.Q8_0 if small else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(array, kind) if small else np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_network_alone_is_completed_from_a_folder(plain: Path, saved: Saved) -> None:
    assert families.detect(plain, config=saved.folder) == "z_image"
    family, whole = families.load_family(plain, config=saved.folder), families.load_family(saved.folder)
    assert family.encoder.fingerprint() == whole.encoder.fingerprint()
    mine, theirs = family.network.state_dict(), whole.network.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert family.base_model == str(plain)


def test_a_run_on_a_network_alone_is_that_on_the_whole(plain: Path, saved: Saved, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "data")
    how = {"resolution": PIXELS, "steps": 1, "batch_size": 2, "validation_pairs": 1, "tracker": "none", "progress": False}
    align("sft", model=str(plain), single_file_config=str(saved.folder), pairs=str(pairs), output=tmp_path / "a", **how)
    align("sft", model=str(saved.folder), pairs=str(pairs), output=tmp_path / "b", **how)
    one, other = (families.read_adapter(tmp_path / name) for name in "ab")
    assert one.digest == other.digest
    tuned = families.load_pipeline(tmp_path / "a", device="cpu")
    expected = families.load_pipeline(tmp_path / "b", device="cpu")
    torch.testing.assert_close(saved.latents(tuned), saved.latents(expected), rtol=1e-5, atol=1e-5)
    export(Export(str(tmp_path / "a"), tmp_path / "exported", "diffusers"))
    again = families.load_pipeline(tmp_path / "exported", device="cpu")
    torch.testing.assert_close(saved.latents(again), saved.latents(expected), rtol=1e-5, atol=1e-5)


def test_commands_sample_a_network_alone(plain: Path, saved: Saved, tmp_path: Path) -> None:
    sampled = ["--steps", "2", "--height", str(PIXELS), "--width", str(PIXELS), "--device", "cpu", "--prompt", "a red circle"]
    where = ["--model", str(plain), "--single-file-config", str(saved.folder)]
    assert cli.main(["generate", *where, "--out", str(tmp_path / "a"), *sampled]) == 0
    assert cli.main(["generate", "--model", str(saved.folder), "--out", str(tmp_path / "b"), *sampled]) == 0
    assert (tmp_path / "a" / "00000.png").read_bytes() == (tmp_path / "b" / "00000.png").read_bytes()


def test_a_network_of_another_family_than_its_folder_is_refused(plain: Path, folders: Path) -> None:
    with pytest.raises(UserError, match=r"network.safetensors is of the family z_image, but .*flux is of flux"):
        families.load_family(plain, config=on_disk("flux", folders).folder)


@needs_gguf
def test_a_quantised_network_is_trained_by_a_lora(quantised: Path, saved: Saved, tmp_path: Path) -> None:
    family, whole = families.load_family(quantised, config=saved.folder), families.load_family(saved.folder)
    x, t = torch.randn(2, *family.latent_shape(PIXELS)), torch.tensor([700.0, 20.0])
    said = family.encoder.encode_prompts(PROMPTS)
    with torch.no_grad():
        found, expected = family.denoiser(x, t, said), whole.denoiser(x, t, said)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.std()))
    with pytest.raises(UserError, match="quantised weights, which cannot be trained: train a LoRA"):
        family.train_fully()
    how = {"resolution": PIXELS, "steps": 2, "batch_size": 2, "learning_rate": 1e-2, "validation_pairs": 1, "tracker": "none"}
    where = {"model": str(quantised), "single_file_config": str(saved.folder), "pairs": str(write_pairs(tmp_path / "data"))}
    align("diffusion-dpo", **where, **how, output=tmp_path / "run", progress=False)
    base = families.load_pipeline(quantised, config=saved.folder, device="cpu")
    tuned = families.load_pipeline(tmp_path / "run", device="cpu")
    made, before = saved.latents(tuned), saved.latents(base)
    assert made.isfinite().all() and not torch.allclose(made, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="quantised weights, which cannot be trained"):
        align("sft", **where, **how, output=tmp_path / "full", adapter="full", progress=False)


def test_quantised_weights_do_not_decide_what_a_network_computes_in() -> None:
    network = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    network.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)  # as GGUF keeps it
    assert working_dtype(network) == torch.bfloat16


def test_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "network.gguf").write_bytes(b"GGUF")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else there(name))
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'diffalign\[gguf\]'"):
        families.detect(tmp_path / "network.gguf")


@needs_gguf
def test_a_broken_gguf_is_told(tmp_path: Path) -> None:
    (tmp_path / "network.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="cannot be read as a GGUF file"):
        families.detect(tmp_path / "network.gguf")
