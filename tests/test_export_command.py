"""``diffalign export`` on a trained LoRA: every layout does what the network with the LoRA does; mistakes are told."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from family_runs import loaded_plainly, on_disk
from miniature import make_adapter_matter, sample, save_untrained
from safetensors import safe_open
from safetensors.torch import load_file

from pipelines import families
from pipelines.cli import main
from pipelines.commands import export as command
from pipelines.export import LAYOUTS
from pipelines.families._names import LORA_FILE, NOTE_FILE
from pipelines.families._quiet import quietly

EVERY_LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def result(base: Path) -> Path:
    """A LoRA of rank 3 and alpha 9 that matters."""
    family = families.load_family(base)
    family.attach_lora(rank=3, alpha=9, targets=EVERY_LINEAR)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():  # about as large as the weights: larger, and float32 itself would not agree to 1e-5
        for p in family.denoiser.trainable_parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    family.save_adapter(base.parent / "result")
    return base.parent / "result"


def plain(base: Path) -> StableDiffusionPipeline:
    with quietly():
        return StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


def run(*words: str | Path) -> int:
    return main(["export", *map(str, words)])


@pytest.fixture(scope="module")
def wanted(base: Path, result: Path) -> dict[float, torch.Tensor]:
    """The picture of the network with the LoRA attached, by PEFT, at two strengths."""
    pipe = plain(base)
    with quietly():
        pipe.load_lora_weights(str(result), weight_name=LORA_FILE, adapter_name="it")
    out = {}
    for scale in (1.0, 0.5):
        pipe.set_adapters(["it"], [scale])
        out[scale] = sample(pipe)
    assert (out[1.0] - sample(plain(base))).abs().max() > 0.05 and (out[1.0] - out[0.5]).abs().max() > 0.02
    return out


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_reads_the_lora(base: Path, result: Path, wanted: dict, tmp_path: Path, layout: str, scale: float) -> None:
    out = tmp_path / ("lora" if layout == "diffusers" else "lora.safetensors")
    assert run(result, "--to", layout, "--out", out, "--scale", scale) == 0
    pipe = plain(base)
    with quietly():
        pipe.load_lora_weights(str(out if out.is_dir() else tmp_path), weight_name=LORA_FILE if out.is_dir() else out.name)
    same(sample(pipe), wanted[scale])
    (adapter,) = pipe.unet.peft_config.values()
    assert adapter.r == 3
    assert {m.scaling["default_0"] for m in pipe.unet.modules() if hasattr(m, "scaling")} == {3.0 * scale}


@pytest.mark.parametrize("below", [False, True], ids=["", "on top of another"])
def test_peft_reads_the_lora_where_the_pipeline_has_no_loader(below: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """PixArt's: as saved by training, and joined with another of other rank and alpha."""
    saved = on_disk("pixart", tmp_path)

    def trained(path: Path, **how: Any) -> Path:
        family = families.load_family(saved.folder, base_lora=how.pop("base_lora", None))
        family.attach_lora(**how)
        make_adapter_matter(family)
        family.save_adapter(path)
        return path

    first = trained(tmp_path / "first", rank=2, alpha=3, targets=("to_q", "proj_out")) if below else None
    result = trained(tmp_path / "result", rank=3, alpha=9, targets=("to_q", "to_k"), base_lora=first)
    capsys.readouterr()
    assert run(result, "--out", tmp_path / "lora") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f'pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, "{tmp_path}/lora")' in said
    wanted = saved.latents(families.load_pipeline(result, device="cpu"))
    torch.testing.assert_close(saved.latents(loaded_plainly(saved, tmp_path / "lora", "lora")), wanted, atol=1e-3, rtol=1e-4)
    assert (wanted - saved.latents(saved.pipeline())).abs().max() > 0.01


def test_comfyuis_layout_is_merged_by_our_own_reader(base: Path, result: Path, wanted: dict, tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    assert run(result, "--to", "comfyui", "--out", out) == 0
    assert all(name.startswith("diffusion_model.") for name in load_file(out))
    same(sample(families.load_pipeline(base, base_lora=out, device="cpu")), wanted[1.0])


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_merged_models_do_what_the_lora_does(base: Path, result: Path, wanted: dict, tmp_path: Path, scale: float) -> None:
    (base / "sampling.json").write_text('{"guidance_scale": 3.0}')
    assert run(result, "--merge", "--out", tmp_path / "whole", "--scale", scale) == 0
    assert (tmp_path / "whole" / "sampling.json").is_file()  # how the base wants to be sampled
    with quietly():
        same(sample(DiffusionPipeline.from_pretrained(tmp_path / "whole")), wanted[scale])
    out = tmp_path / "one.safetensors"
    assert run(result, "--to", "single-file", "--out", out, "--scale", scale) == 0
    with quietly():
        pipe = StableDiffusionPipeline.from_single_file(str(out), config=str(base), local_files_only=True, safety_checker=None)
    same(sample(pipe), wanted[scale])


def test_dtype_and_header(result: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    assert run(result, "--to", "kohya", "--out", out, "--dtype", "fp16", "--title", "Mine") == 0
    dtypes = {name.partition(".")[2]: value.dtype for name, value in load_file(out).items()}
    assert dtypes == {"lora_down.weight": torch.float16, "lora_up.weight": torch.float16, "alpha": torch.float32}
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == "3" and header["ss_network_alpha"] == "9" and header["ss_base_model_version"] == "sd_v1"
    assert header["modelspec.title"] == header["ss_output_name"] == "Mine" and header["modelspec.resolution"] == "64x64"
    first = out.read_bytes()
    assert run(result, "--to", "kohya", "--out", out, "--dtype", "fp16", "--title", "Mine", "--overwrite") == 0
    assert out.read_bytes() == first


def test_the_same_result_under_the_same_title_is_the_same_file_wherever_it_is(result: Path, tmp_path: Path) -> None:
    copy, outs = tmp_path / "copy", [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    shutil.copytree(result, copy)
    for of, out in zip((result, copy), outs, strict=True):
        assert run(of, "--to", "kohya", "--out", out, "--title", "Mine") == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert run(copy, "--to", "kohya", "--out", outs[1], "--overwrite") == 0
    with safe_open(outs[1], "pt") as file:
        assert file.metadata()["modelspec.title"] == "copy"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
@pytest.mark.parametrize("words", [("--to", "kohya"), ("--to", "diffusers"), ("--merge",)], ids=lambda w: w[-1])
def test_files_have_the_mode_that_the_umask_leaves(result: Path, tmp_path: Path, words: tuple, umask: int, mode: int) -> None:
    out, before = tmp_path / ("it.safetensors" if "kohya" in words else "it"), os.umask(umask)
    try:
        assert run(result, *words, "--out", out) == 0
    finally:
        os.umask(before)
    written = [path for path in (out, *out.rglob("*")) if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in written)
    assert {path.name: path.stat().st_mode & 0o777 for path in written} == {path.name: mode for path in written}


def test_an_exported_diffusers_lora_is_a_result_again(base: Path, result: Path, wanted: dict, tmp_path: Path) -> None:
    assert run(result, "--out", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / NOTE_FILE).read_text())["base_model"] == str(base)
    saved, first = families.read_adapter(tmp_path / "again"), families.read_adapter(result)
    assert (saved.rank, saved.alpha, saved.digest) == (3, 9.0, first.digest)
    family = families.load_family(base)
    family.attach_lora(rank=3, alpha=9, targets=saved.targets)  # ends of names that match the same layers
    family.load_adapter(saved)
    same(sample(families.load_pipeline(tmp_path / "again", device="cpu")), wanted[1.0])


def test_mistakes_are_told(base: Path, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    (tmp_path / "there.safetensors").write_text("")
    for words, message in (
        ((result, "--to", "kohya", "--out", tmp_path / "x"), "is one file, whose name ends in .safetensors; got"),
        (
            (result, "--to", "kohya", "--out", tmp_path / "there.safetensors"),
            "is there already. Name another",
        ),
        ((result, "--out", tmp_path / "full"), "is not empty. Name another"),
        ((result, "--out", tmp_path / "there.safetensors"), "is a file; Diffusers' layout is a folder"),
        (
            (result, "--to", "diffusers", "--out", tmp_path / "new.safetensors"),
            f"is a folder, and {tmp_path}/new.safetensors is the name of a file: give --out {tmp_path}/new, or --to kohya",
        ),
        ((result, "--merge", "--out", tmp_path / "new.safetensors"), f"give --out {tmp_path}/new, or --to single-file."),
        ((result, "--out", result, "--overwrite"), "is the result itself"),
        ((result, "--to", "kohya", "--merge", "--out", tmp_path / "x.safetensors"), "no LoRA to write in kohya's layout"),
        ((result, "--out", tmp_path / "x", "--scale", "0"), "a number other than 0; got 0.0"),
        ((result, "--out", tmp_path / "x", "--scale", "nan"), "a number other than 0; got nan"),
        ((result, "--out", tmp_path / "x", "--alone"), "was not trained on top of another LoRA"),
        ((base, "--to", "kohya", "--out", tmp_path / "x.safetensors"), "is a whole StableDiffusionPipeline and no LoRA"),
        ((base, "--to", "single-file", "--out", tmp_path / "x.safetensors", "--scale", "2"), "a scale is for LoRAs"),
        ((tmp_path, "--out", tmp_path / "x"), "is not a model"),
    ):
        assert run(*words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "there.safetensors"]


def test_the_command_and_the_work_know_the_same_layouts() -> None:
    assert command.LAYOUTS == LAYOUTS
