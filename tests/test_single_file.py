"""Whole models in one file: Diffusers reads them back as they were, and the real configurations have the published names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from layout_networks import SD_DOWN, SD_UP, flux, real, sd1, sdxl, text_config
from miniature import original_names, save_untrained, write_pairs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign.errors import UserError
from pipelines import families, single_file
from pipelines.cli import main
from pipelines.export import Export, export
from pipelines.families._quiet import quietly
from pipelines.tiny import model as tiny
from pipelines.training import align


def miniature(name: str, layers: int = 2):
    """A pipeline whose blocks are those of the real one; SD 2.x with the width that tells it from 1.x.

    SDXL is known by the tenth of the second text encoder's ``layers``.
    """
    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "max_position_embeddings": tiny.MAX_TOKENS, "eos_token_id": tokenizer.eos_token_id}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=128,
    )
    parts = {"vae": vae.eval(), "tokenizer": tokenizer, "scheduler": DDIMScheduler.from_config(tiny.build_scheduler().config)}
    if name == "sdxl":
        first = CLIPTextModel(text_config(32, 2, **tokens))
        second = CLIPTextModelWithProjection(text_config(48, layers, hidden_act="gelu", projection_dim=32, **tokens))
        unet = sdxl()
        wide = type(unet)(**{**unet.config, "cross_attention_dim": 80})
        return StableDiffusionXLPipeline(
            unet=wide.eval(), text_encoder=first.eval(), text_encoder_2=second.eval(), tokenizer_2=tokenizer, **parts
        )
    width, changes = (1024, {"use_linear_projection": True}) if name == "sd2" else (32, {})
    text = CLIPTextModel(text_config(width, 2, hidden_act="gelu" if name == "sd2" else "quick_gelu", **tokens))
    unet = sd1(cross_attention_dim=width, **changes)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with quietly():
        return StableDiffusionPipeline(unet=unet.eval(), text_encoder=text.eval(), **parts, **none)


def picture(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    return pipe("a red circle", num_inference_steps=2, generator=rng, output_type="pt", height=128, width=128).images


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    miniature(request.param).save_pretrained(folder)
    return folder


def original(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{n}.{k}": v for n, part in pipe.components.items() if isinstance(part, nn.Module) for k, v in part.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_diffusers_reads_the_file_as_it_was(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    with quietly():
        pipe = DiffusionPipeline.from_pretrained(saved)
    tensors = {name: value.to(dtype).contiguous() for name, value in single_file.tensors(pipe).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    how = {"config": str(saved), "local_files_only": True, "dtype": torch.float32}
    with quietly() as notes:
        read = type(pipe).from_single_file(str(tmp_path / "model.safetensors"), **how)
    assert not [note for note in notes if "newly initialized" in note or "not used" in note]
    before, after = original(pipe), original(read)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value.to(dtype).to(value.dtype)), name
    if dtype == torch.float32:
        torch.testing.assert_close(picture(read), picture(pipe), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ends_in_noise", [False, True])
def test_an_sdxl_that_predicts_v_says_so_as_comfyui_reads_it(ends_in_noise: bool) -> None:
    pipe = miniature("sdxl")
    assert not {"v_pred", "ztsnr"} & single_file.tensors(pipe).keys()
    pipe.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=ends_in_noise)
    marks = {"v_pred", "ztsnr"} & single_file.tensors(pipe).keys()
    assert marks == ({"v_pred", "ztsnr"} if ends_in_noise else {"v_pred"})


@pytest.mark.parametrize("name, kind", [("sd15", "v1"), ("sd21", "v2"), ("sdxl", "xl_base")])
def test_the_real_configurations_have_the_published_names(name: str, kind: str) -> None:
    """On the meta device: Diffusers' converters know the file's type, and give back every name and shape of the networks."""
    parts = real(name)
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    file = single_file.tensors(SimpleNamespace(**parts, vae=vae, scheduler=tiny.build_scheduler()))
    assert infer_diffusers_model_type(file) == kind

    def like(found: dict, network: nn.Module) -> None:
        assert {k: tuple(v.shape) for k, v in found.items()} == {k: tuple(v.shape) for k, v in network.state_dict().items()}

    like(convert_ldm_unet_checkpoint(dict(file), parts["unet"].config), parts["unet"])
    like(convert_ldm_vae_checkpoint(dict(file), vae.config), vae)
    if kind == "v2":
        found = convert_open_clip_checkpoint(parts["text_encoder"], file, prefix="cond_stage_model.model.")
    else:
        found = convert_ldm_clip_checkpoint(file)
    like({key.removeprefix("text_model."): value for key, value in found.items()}, parts["text_encoder"])
    if kind == "xl_base":
        found = convert_open_clip_checkpoint(parts["text_encoder_2"], file, prefix="conditioner.embedders.1.model.")
        like(found, parts["text_encoder_2"])
    wanted = {"sd15": 686 + 248 + 196, "sd21": 686 + 248 + 23 * 12 + 4, "sdxl": 1680 + 248 + 196 + 32 * 12 + 5}[name]
    assert len(file) == wanted
    # Diffusers takes an upsampler at either place; the original, which other programs load strictly, has it behind the attention
    ups = {key.removeprefix(single_file.UNET) for key in file if key.endswith(".conv.weight") and "output_blocks" in key}
    first = "output_blocks.2.2.conv.weight" if name == "sdxl" else "output_blocks.2.1.conv.weight"
    assert ups == {first, "output_blocks.5.2.conv.weight"} | ({"output_blocks.8.2.conv.weight"} if name != "sdxl" else set())


def test_names_agree_with_those_written_for_the_reading_tests() -> None:
    """``miniature.original_names`` was written for another test, before this module, for one attention-free level."""
    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer()
    pipe = tiny.assemble(tokenizer, tiny.build_text_encoder(tokenizer), tiny.build_vae(), tiny.build_unet())
    ours, theirs = single_file.tensors(pipe), original_names(pipe)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_whole_result_is_exported_as_one_file(tmp_path: Path) -> None:
    base = save_untrained(tmp_path / "base")
    out = tmp_path / "one.safetensors"
    export(Export(str(base), out, "single-file", dtype="fp16", title="A title"))
    assert {value.dtype for value in load_file(out).values()} == {torch.float16}
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-v1" and header["modelspec.title"] == "A title"
    assert header["modelspec.resolution"] == "64x64" and header["modelspec.prediction_type"] == "epsilon"
    again = tmp_path / "two.safetensors"
    export(Export(str(base), again, "single-file", dtype="fp16", title="A title"))
    assert out.read_bytes() == again.read_bytes()


def test_other_families_are_refused() -> None:
    with pytest.raises(UserError, match=r"written for Stable Diffusion 1.x, 2.x and XL; this is a SimpleNamespace. Export"):
        single_file.tensors(SimpleNamespace(transformer=flux()))
    uneven = sd1(layers_per_block=(1, 2, 2, 2), down_block_types=SD_DOWN, up_block_types=SD_UP)
    with pytest.raises(UserError, match=r"equally many resnets in each level; this UNet has \(1, 2, 2, 2\)"):
        single_file.tensors(SimpleNamespace(unet=uneven))


# --------------------------------------------------------------------------------------- what a file says of itself


@pytest.fixture(scope="module")
def epsilon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration as most people have it: that of a model that predicts noise, sampled from below its last level."""
    folder = tmp_path_factory.mktemp("epsilon") / "model"
    pipe = miniature("sdxl", layers=10)
    pipe.scheduler.register_to_config(timestep_spacing="leading")
    pipe.save_pretrained(folder)
    return folder


def one_file(path: Path, *, marks: tuple[str, ...] = (), **header: str) -> Path:
    tensors = single_file.tensors(miniature("sdxl", layers=10)) | {name: torch.tensor([]) for name in marks}
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, path, {f"modelspec.{k}": v for k, v in header.items()}
    )
    return path


@pytest.mark.parametrize(
    ("told", "prediction", "ends_in_noise"),
    [
        ({"marks": ("v_pred", "ztsnr")}, "v_prediction", True),
        ({"marks": ("v_pred",), "prediction_type": "epsilon"}, "v_prediction", False),  # tools copy headers along
        ({"prediction_type": "v"}, "v_prediction", False),
    ],
    ids=lambda told: str(told) if isinstance(told, dict) else "",
)
def test_a_files_own_words_go_before_its_configuration(
    told: dict, prediction: str, ends_in_noise: bool, epsilon: Path, tmp_path: Path
) -> None:
    """In training, in sampling and without weights, as estimates look at it."""
    file = one_file(tmp_path / "model.safetensors", **told)
    family = families.load_family(file, config=epsilon)
    assert family.denoiser.schedule.prediction_type == prediction
    assert (family.denoiser.schedule.alpha_bar[-1] == 0) == ends_in_noise
    assert families.sketch(file, config=epsilon).denoiser.schedule.prediction_type == prediction
    found = families.load_pipeline(file, config=epsilon, device="cpu").scheduler.config
    assert (found.prediction_type, found.rescale_betas_zero_snr) == (prediction, ends_in_noise)
    assert found.timestep_spacing == ("trailing" if ends_in_noise else "leading")
    with pytest.raises(UserError, match=f"'epsilon' was asked for, but {file} says 'v_prediction'"):
        families.load_family(file, config=epsilon, prediction_type="epsilon")


@pytest.mark.parametrize("told", [{"prediction_type": ""}, {"prediction_type": "epsilon", "marks": ("ztsnr",)}], ids=str)
def test_a_file_that_says_nothing_is_what_its_configuration_says(told: dict, epsilon: Path, tmp_path: Path) -> None:
    file = one_file(tmp_path / "model.safetensors", **told)
    assert families.load_family(file, config=epsilon).origin.own_words == ""
    with pytest.raises(UserError, match=r"scheduler_config.json says 'epsilon'.* name a folder whose scheduler fits"):
        families.load_family(file, config=epsilon, prediction_type="v_prediction")


def test_runs_exports_and_pictures_of_a_file_that_predicts_v_say_so(
    epsilon: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = one_file(tmp_path / "model.safetensors", marks=("v_pred", "ztsnr"))
    how = {"model": str(file), "single_file_config": str(epsilon), "pairs": str(write_pairs(tmp_path / "pairs", 2))}
    pace = {"steps": 1, "rank": 1, "resolution": 32, "validation_pairs": 0, "tracker": "none", "progress": False}
    align("diffusion-dpo", output=tmp_path / "run", **how, **pace)
    said = f"{file} says itself that it is of v_prediction prediction, on a schedule that ends in pure noise"
    assert said in capsys.readouterr().out
    out = tmp_path / "lora.safetensors"
    assert said in export(Export(str(tmp_path / "run"), out, "kohya")).text
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "v"
    export(Export(str(tmp_path / "run"), tmp_path / "whole.safetensors", "single-file"))
    with safe_open(tmp_path / "whole.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "v" and {"v_pred", "ztsnr"} <= set(opened.keys())
    small = ["--height", "64", "--width", "64", "--steps", "2", "--single-file-config", str(epsilon)]
    assert main(["generate", "--model", str(file), "--prompt", "a dog", "--out", str(tmp_path / "pictures"), *small]) == 0
    assert said in capsys.readouterr().out


def test_a_file_that_is_not_of_its_configurations_family_is_refused(epsilon: Path, tmp_path: Path) -> None:
    """Diffusers takes what it does not recognise for SD 1.x: here SDXL whose second text encoder has few layers."""
    tensors = single_file.tensors(miniature("sdxl", layers=2))
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is of the family stable_diffusion, but .*model is of sdxl. Files are known by"):
        families.detect(tmp_path / "model.safetensors", config=epsilon)
