"""LoRAs in kohya's and ComfyUI's layouts: the documented names, and the same function after other readers have read them."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    FluxPipeline,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from layout_networks import answer, attached, flux, random_layers, real, sd1, sd3, sdxl, text_config
from miniatures import z_image
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign.errors import UserError
from pipelines import lora_layouts, low_rank, model_spec
from pipelines.families._quiet import quietly
from pipelines.lora_layouts import ALPHA, DOWN, UP
from pipelines.original_names import places

KEYS = json.loads((Path(__file__).parent / "keys" / "lora_layouts.json").read_text())


def documented(layout: str, name: str) -> set[str]:
    """The names of the fixture, written out."""
    return {full for pattern in KEYS[layout][name]["names"] for full in expanded(pattern)}


def expanded(pattern: str) -> list[str]:
    pieces = re.split(r"\{(.*?)\}", pattern)
    choices = [[p] if i % 2 == 0 else _choices(p) for i, p in enumerate(pieces)]
    return ["".join(words) for words in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    if ".." in text:
        low, high = map(int, text.split(".."))
        return [str(i) for i in range(low, high + 1)]
    return text.split("|")


def names_of(parts: dict, layout: str, keep) -> set[str]:
    """The names that an export of a LoRA on the layers that ``keep`` accepts would have."""
    found = lora_layouts.slots(parts, layout)
    return {name for name, slots in found.items() if all(keep(slot.component, slot.layer) for slot in slots)}


def bare(cls: type, **parts: nn.Module):
    asked = list(inspect.signature(cls.__init__).parameters.values())[1:]
    with quietly():
        return cls(**{p.name: parts.get(p.name) for p in asked if p.name in parts or p.default is inspect.Parameter.empty})


# ----------------------------------------------------------------------------------------------------------------- names


TRAINED = {  # what sd-scripts trains by default
    "sd15": lambda component, layer: component == "unet" and ".attentions." in layer,
    "sdxl": lambda component, layer: component == "unet" and ".attentions." in layer,
    "sd15_text": lambda component, layer: component == "text_encoder",
    "sdxl_text": lambda component, layer: component != "unet" and layer != "text_projection",
    "sd3": lambda component, layer: layer.startswith("transformer_blocks."),
    "flux": lambda component, layer: "transformer_blocks." in layer,
    "z_image": lambda component, layer: ".attention." in layer or ".feed_forward." in layer,
}


@pytest.mark.parametrize("layout, name", [(layout, name) for layout in ("kohya", "comfyui") for name in KEYS[layout]])
def test_the_real_networks_have_the_documented_names(layout: str, name: str) -> None:
    wanted = documented(layout, name)
    assert len(wanted) == KEYS[layout][name]["count"]
    assert names_of(real(name.removesuffix("_text")), layout, TRAINED[name]) == wanted


def test_no_two_layers_share_a_place() -> None:
    for name in ("sd15", "sd21", "sdxl", "sd3", "flux"):
        (network,) = (part for part in real(name).values() if not hasattr(part.config, "vocab_size"))
        found = places(network)
        layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        assert found.keys() == layers.keys()
        for _, group in itertools.groupby(sorted(found.values(), key=lambda p: (p.name, p.part)), key=lambda p: p.name):
            rows = [p.rows for p in group]
            assert rows == [None] or [r[0] for r in rows] == [0, *(r[1] for r in rows[:-1])]  # one behind the other, no gaps


def test_networks_without_an_established_layout_are_refused() -> None:
    with torch.device("meta"):
        small = [PixArtTransformer2DModel(num_layers=1, sample_size=8), SanaTransformer2DModel(num_layers=1)]
    for network in small:
        with pytest.raises(UserError, match=rf"no established layout .* {type(network).__name__} .*--to diffusers --merge"):
            lora_layouts.written({}, {"transformer": network}, "kohya")


# ------------------------------------------------------------------------------------------------- read by Diffusers again


UNETS = {
    "sd1": (sd1, StableDiffusionPipeline),
    "sd2": (lambda: sd1(cross_attention_dim=1024, use_linear_projection=True), StableDiffusionPipeline),
    "sdxl": (sdxl, StableDiffusionXLPipeline),
}


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_reads_kohyas_layout_of_unets(name: str) -> None:
    """Every layer of the UNet, convolutions and embeddings too; alpha 7 for rank 3."""
    build, cls = UNETS[name]
    torch.manual_seed(0)
    network = build().eval()
    # Diffusers takes a resampler in a level without attention for an attention: not trained by default anywhere
    layers = random_layers(network, lambda n: "samplers" not in n)
    tensors = lora_layouts.written({"unet": layers}, {"unet": network}, "kohya")
    assert all(float(value) == 7 for key, value in tensors.items() if key.endswith(ALPHA))
    pipe = bare(cls, unet=copy.deepcopy(network))
    with quietly() as notes:
        pipe.load_lora_weights(tensors)
    assert not [note for note in notes if "unexpected keys" in note]
    before, wanted = answer(network), answer(attached(network, layers))
    torch.testing.assert_close(answer(pipe.unet), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 0.1


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_diffusers_reads_the_names_of_text_encoders(cls: type) -> None:
    torch.manual_seed(0)
    parts = {"unet": sd1(), "text_encoder": CLIPTextModel(text_config(32, 2))}
    if cls is StableDiffusionXLPipeline:
        parts = {**parts, "unet": sdxl(), "text_encoder_2": CLIPTextModelWithProjection(text_config(48, 2))}
    texts = [name for name in parts if name.startswith("text")]
    lora = {name: random_layers(parts[name], lambda n: "text_projection" not in n) for name in texts}
    tensors = lora_layouts.written(lora, parts, "kohya")
    prefixes = {key.partition("_text_model")[0] for key in tensors}
    assert prefixes == ({"lora_te"} if len(texts) == 1 else {"lora_te1", "lora_te2"})
    pipe = bare(cls, **{name: copy.deepcopy(part) for name, part in parts.items()})
    with quietly():
        pipe.load_lora_weights(tensors)
    for name in texts:
        plain = parts[name](torch.tensor([[1, 5, 7]])).last_hidden_state
        low_rank.merge(lora[name], parts[name], "it")
        merged, loaded = (part(torch.tensor([[1, 5, 7]])).last_hidden_state for part in (parts[name], getattr(pipe, name)))
        torch.testing.assert_close(loaded, merged, atol=1e-5, rtol=1e-5)
        assert (merged - plain).abs().max() > 0.05


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_diffusers_reads_fluxs_two_streams(layout: str) -> None:
    """Its reader splits q, k, v in thirds at any width; of the single stream it knows the real width only (see below)."""
    torch.manual_seed(0)
    network = flux().eval()
    layers = random_layers(network, lambda n: n.startswith("transformer_blocks."))
    pipe = bare(FluxPipeline, transformer=copy.deepcopy(network))
    with quietly():
        pipe.load_lora_weights(lora_layouts.written({"transformer": layers}, {"transformer": network}, layout))
    before, wanted = answer(network), answer(attached(network, layers))
    torch.testing.assert_close(answer(pipe.transformer), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 0.01


@pytest.mark.parametrize(
    "keep", [("to_q", "to_k", "to_v"), ("to_q", "to_k", "to_v", "proj_mlp", "proj_out", "norm.linear"), ("to_k",)]
)
def test_diffusers_reads_fluxs_single_stream_at_its_real_width(keep: tuple[str, ...]) -> None:
    """Block 37 of the real configuration: what its reader makes of the file changes an input as the LoRA does."""
    network = real("flux")["transformer"]
    layers = random_layers(network, lambda n: n.startswith("single_transformer_blocks.37.") and n.endswith(keep), rank=2)
    found = FluxPipeline.lora_state_dict(lora_layouts.written({"transformer": layers}, {"transformer": network}, "kohya"))
    for name, layer in layers.items():
        x = torch.randn(layer.down.shape[1], generator=torch.Generator().manual_seed(1))
        down, up = (found[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(up @ (down @ x), layer.scale * layer.up @ (layer.down @ x), atol=1e-4, rtol=1e-4)
    changed = {key.removeprefix("transformer.").partition(".lora_")[0] for key, v in found.items() if v.abs().max() > 0}
    assert set(layers) <= changed


def test_diffusers_reads_comfyuis_layout_of_z_image() -> None:
    torch.manual_seed(0)
    network = z_image().transformer

    @torch.no_grad()
    def answer(network: nn.Module) -> torch.Tensor:
        rng = torch.Generator().manual_seed(5)
        said, latent = torch.randn(5, 16, generator=rng), torch.randn(8, 1, 8, 8, generator=rng)
        return network([latent], torch.tensor([0.3]), [said], return_dict=False)[0][0]

    layers = random_layers(network, lambda n: ".attention." in n or ".feed_forward." in n)
    tensors = lora_layouts.written({"transformer": layers}, {"transformer": network}, "comfyui")
    assert {float(value) for key, value in tensors.items() if key.endswith(ALPHA)} == {7.0}
    pipe = bare(ZImagePipeline, transformer=copy.deepcopy(network))
    with quietly() as notes:
        pipe.load_lora_weights(dict(tensors))
    assert not [note for note in notes if "unexpected keys" in note]
    found = lora_layouts.parsed(tensors, {"transformer": network})["transformer"]
    assert found.keys() == layers.keys()
    torch.testing.assert_close(found[next(iter(layers))].delta(), layers[next(iter(layers))].delta())
    before, wanted = answer(network), answer(attached(network, layers))
    torch.testing.assert_close(answer(pipe.transformer), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 0.01
    with pytest.raises(UserError, match="no layout of kohya's; take --to comfyui"):
        lora_layouts.written({"transformer": layers}, {"transformer": network}, "kohya")


@pytest.mark.parametrize("dual", [(), (0, 1)], ids=["3-medium", "3.5-medium"])
def test_the_original_layout_of_sd3_changes_as_the_lora_does(dual: tuple[int, ...]) -> None:
    """Diffusers cannot read LoRAs by SD3's original names, but it converts original checkpoints: so change one of those."""
    torch.manual_seed(0)
    network = sd3(dual_attention_layers=dual, qk_norm="rms_norm" if dual else None).eval()
    layers = random_layers(network, lambda n: n != "pos_embed.proj")
    tensors = lora_layouts.written({"transformer": layers}, {"transformer": network}, "kohya")
    original = original_checkpoint(network)
    by_name = {key.removesuffix(".weight").replace(".", "_"): key for key in original if key.endswith(".weight")}
    for stem in {key.removesuffix(DOWN) for key in tensors if key.endswith(DOWN)}:
        down, up, alpha = (tensors[stem + end] for end in (DOWN, UP, ALPHA))
        original[by_name[stem.removeprefix("lora_unet_")]] += float(alpha) / down.shape[0] * up @ down
    changed = copy.deepcopy(network)
    changed.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(original))
    before, wanted = answer(network), answer(attached(network, layers))
    torch.testing.assert_close(answer(changed), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 0.1


def original_checkpoint(network: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint by SD3's original names: the inverse of Diffusers' converter, found by following each element through it."""
    state = network.state_dict()
    shapes = original_shapes(network)
    total = sum(torch.Size(s).numel() for s in shapes.values())
    numbers = torch.arange(total, dtype=torch.float64).split([torch.Size(s).numel() for s in shapes.values()])
    numbered = {name: n.reshape(s) for (name, s), n in zip(shapes.items(), numbers, strict=True)}
    followed = convert_sd3_transformer_checkpoint_to_diffusers(dict(numbered))
    flat = torch.empty(total)
    for name, origin in followed.items():
        flat[origin.long().flatten()] = state[name].flatten()
    assert followed.keys() == state.keys()
    parts = flat.split([torch.Size(s).numel() for s in shapes.values()])
    return {name: part.reshape(s).clone() for (name, s), part in zip(shapes.items(), parts, strict=True)}


def original_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of SD3's original tensors (Stability-AI/sd3-ref, ``mmditx.py``), for a miniature."""
    c, n = network.config, network.inner_dim
    linear = {
        "t_embedder.mlp.0": (n, 256),
        "t_embedder.mlp.2": (n, n),
        "y_embedder.mlp.0": (n, c.pooled_projection_dim),
        "y_embedder.mlp.2": (n, n),
        "context_embedder": (n, c.joint_attention_dim),
        "final_layer.linear": (c.patch_size**2 * c.out_channels, n),
        "final_layer.adaLN_modulation.1": (2 * n, n),
    }
    scales = {}
    for i in range(c.num_layers):
        dual, last = i in c.dual_attention_layers, i == c.num_layers - 1
        for side, short in (("x_block", False), ("context_block", last)):
            at = f"joint_blocks.{i}.{side}"
            chunks = 2 if short else 9 if dual and side == "x_block" else 6
            linear |= {f"{at}.attn.qkv": (3 * n, n), f"{at}.adaLN_modulation.1": (chunks * n, n)}
            if not short:
                linear |= {f"{at}.attn.proj": (n, n), f"{at}.mlp.fc1": (4 * n, n), f"{at}.mlp.fc2": (n, 4 * n)}
            attentions = ["attn"] + ["attn2"] * (dual and side == "x_block")
            if "attn2" in attentions:
                linear |= {f"{at}.attn2.qkv": (3 * n, n), f"{at}.attn2.proj": (n, n)}
            if c.qk_norm:
                scales |= {f"{at}.{a}.ln_{x}.weight": (c.attention_head_dim,) for a in attentions for x in "qk"}
    patch = (n, c.in_channels, c.patch_size, c.patch_size)
    shapes = {"pos_embed": (1, c.pos_embed_max_size**2, n), "x_embedder.proj.weight": patch, "x_embedder.proj.bias": (n,)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {**shapes, **scales}


# ------------------------------------------------------------------------------------------------------- read by ourselves


@pytest.mark.parametrize("layout", lora_layouts.LAYOUTS)
@pytest.mark.parametrize("build", [sd1, sdxl, sd3, flux], ids=lambda f: f.__name__)
def test_what_is_written_is_read(layout: str, build) -> None:
    network = build().eval()
    component = "unet" if hasattr(network.config, "cross_attention_dim") else "transformer"
    layers = random_layers(network)
    tensors = lora_layouts.written({component: layers}, {component: network}, layout)
    found = lora_layouts.parsed(tensors, {component: network})
    assert found.keys() == {component} and found[component].keys() == layers.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(found[component][name].delta(), layer.delta(), atol=1e-6, rtol=1e-5)
    one = next(key for key in tensors if key.endswith(UP))
    assert lora_layouts.parsed({**tensors, "lora_unet_something.lora_down.weight": tensors[one]}, {component: network}) is None
    assert lora_layouts.parsed({k: v for k, v in tensors.items() if k != one}, {component: network}) is None


def test_layers_with_scales_of_their_own_are_fused_by_their_products() -> None:
    network = flux().eval()
    layers = random_layers(network, lambda n: n in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"))
    first, second = layers
    layers[second] = low_rank.LowRank(layers[second].down, layers[second].up, 0.3)
    found = lora_layouts.parsed(
        lora_layouts.written({"transformer": layers}, {"transformer": network}, "kohya"), {"transformer": network}
    )["transformer"]
    for name in (first, second):
        torch.testing.assert_close(found[name].delta(), layers[name].delta())
    assert found["transformer_blocks.0.attn.to_k"].delta().abs().max() == 0


# --------------------------------------------------------------------------------------------------------------- joining


def test_joined_loras_do_what_both_do() -> None:
    network = sd1()
    one = {"unet": random_layers(network, lambda n: n.endswith(("to_q", "to_k")), seed=1)}
    two = {"unet": random_layers(network, lambda n: n.endswith(("to_q", "to_v")), rank=5, alpha=1.0, seed=2)}
    both = low_rank.joined(one, low_rank.scaled(two, 0.5))["unet"]
    assert both.keys() == one["unet"].keys() | two["unet"].keys()
    for name, layer in both.items():
        wanted = one["unet"][name].delta() if name in one["unet"] else 0
        wanted = wanted + (0.5 * two["unet"][name].delta() if name in two["unet"] else 0)
        torch.testing.assert_close(layer.delta(), wanted)
        assert layer.rank == 3 * (name in one["unet"]) + 5 * (name in two["unet"])
    assert low_rank.digest(one) != low_rank.digest(low_rank.scaled(one, 2)) != low_rank.digest(two)


def test_a_lora_of_another_model_is_not_merged() -> None:
    layers = random_layers(sd1(), lambda n: n.endswith("attn2.to_k"))
    with pytest.raises(UserError, match="my.safetensors is of another model: its change of .*attn2.to_k has the shape"):
        low_rank.merge(layers, sd1(cross_attention_dim=48), "my.safetensors")
    with pytest.raises(UserError, match="changes the layer .* of the FluxTransformer2DModel, but no such layer"):
        low_rank.merge(layers, flux(), "my.safetensors")


# --------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    "name, prediction, version, v2, architecture",
    [
        ("sd15", "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd21", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
        ("sd3", "", "sd3-medium", "False", "stable-diffusion-3-medium/lora"),
        ("flux", "", "flux1", "False", "flux-1-dev/lora"),
    ],
)
def test_headers_say_what_the_model_is(name: str, prediction: str, version: str, v2: str, architecture: str) -> None:
    header = model_spec.of_lora(real(name), prediction, title="mine", resolution=512, rank=8, alpha=4.0)
    assert header["ss_base_model_version"] == version and header["ss_v2"] == v2
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("8", "4")
    assert header["modelspec.architecture"] == architecture and header["modelspec.title"] == "mine"
    assert header["modelspec.sai_model_spec"] == "1.0.1" and header["modelspec.resolution"] == "512x512"
    assert header.get("modelspec.prediction_type") == {"epsilon": "epsilon", "v_prediction": "v", "": None}[prediction]
    assert header["modelspec.implementation"] and "modelspec.date" not in header
    assert all(isinstance(value, str) for value in header.values())
