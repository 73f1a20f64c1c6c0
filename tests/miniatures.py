"""Miniature pipelines of every family: genuine Diffusers and Transformers classes, random weights, tokenizers made here.

A new family adds one builder. A builder makes the pipeline; ``said`` gives what the pipeline's own ``encode_prompt`` says of
prompts, and of the empty one for guidance, by the names of our conditioning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from pipelines.tiny import model as tiny

Said = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Conditioning of prompts, and of the empty one, each [B, ...]."""
PIXELS = 32
"""On a side of the pictures that the miniatures are for."""


@dataclass(frozen=True)
class Miniature:
    """A model to test a family with."""

    family: str
    build: Callable[[], Any]
    said: Callable[[Any, Sequence[str]], Said]
    call: dict[str, Any] = field(default_factory=dict)  # what its own pipeline must be told in a call
    as_encoded: dict[str, Any] = field(default_factory=dict)  # and to say of prompts just what our encoder says
    guided: bool = True  # whether its own pipeline has guidance
    lacks: tuple[str, ...] = ()  # parts that plain Diffusers must be told of as missing
    pack: Callable[[Tensor], Tensor] = lambda x: x  # from our latents [B, C, h, w] to its pipeline's
    unpack: Callable[[Tensor], Tensor] = lambda x: x
    guidance: Callable[[float], float] = lambda scale: scale  # from ours, where 1 is none, to what its pipeline is told

    def save(self, folder: Path) -> Path:
        """Build it, the same each time, and save it."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.build().save_pretrained(folder)
        return folder


MINIATURES: dict[str, Miniature] = {}


def miniature(
    name: str,
    said: Callable[[Any, Sequence[str]], Said],
    family: str | None = None,
    call: dict[str, Any] | None = None,
    **more: Any,
) -> Callable:
    """Enter a builder into ``MINIATURES``. ``family`` is ``name`` if not given."""

    def enter(build: Callable[[], Any]) -> Callable[[], Any]:
        MINIATURES[name] = Miniature(family or name, build, said, call or {}, **more)
        return build

    return enter


# --------------------------------------------------------------------------------------------------------------- parts


@cache
def clip_tokenizer() -> CLIPTokenizer:
    return tiny.build_tokenizer()


def clip_text(width: int, projected: bool = False, layers: int = 2) -> Any:
    """A CLIP text encoder, with the projection that SDXL's second has or without."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    """A token for each printable character; deterministic, which a trained one is not."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters], extra_ids=0)


def t5_text(width: int = 16) -> T5EncoderModel:
    size = len(t5_tokenizer())
    config = T5Config(
        vocab_size=size, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def kl_vae(latent_channels: int = 4, **settings: Any) -> AutoencoderKL:
    """32 x 32 pixels to 8 x 8 latents."""
    blocks = 3
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=PIXELS,
        **settings,
    ).eval()


def unet(text_width: int, **more: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": PIXELS // 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": text_width,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **more}).eval()


def sd_schedule(kind: type = DDIMScheduler, **more: Any) -> Any:
    """Stable Diffusion's betas."""
    shared = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    own = {"clip_sample": False, "set_alpha_to_one": False} if kind is DDIMScheduler else {"timestep_spacing": "leading"}
    return kind(**shared, **own, **more)


# ------------------------------------------------------------------------------------------------------------ families


def _sd_said(pipe: Any, prompts: Sequence[str]) -> Said:
    states, empty = pipe.encode_prompt(list(prompts), "cpu", 1, True)
    return {"encoder_hidden_states": states}, {"encoder_hidden_states": empty}


@miniature("stable_diffusion", _sd_said)
def stable_diffusion() -> StableDiffusionPipeline:
    return tiny.assemble(clip_tokenizer(), clip_text(16), kl_vae(), unet(16))


def _sdxl_said(pipe: Any, prompts: Sequence[str]) -> Said:
    states, empty, pooled, empty_pooled = pipe.encode_prompt(list(prompts), device="cpu")
    return (
        {"encoder_hidden_states": states, "text_embeds": pooled},
        {"encoder_hidden_states": empty, "text_embeds": empty_pooled},
    )


@miniature("sdxl", _sdxl_said)
def sdxl() -> StableDiffusionXLPipeline:
    return _sdxl(sd_schedule(EulerDiscreteScheduler), force_zeros=True)


@miniature("sdxl, v-prediction and encoded empty prompts", _sdxl_said, "sdxl")
def sdxl_v() -> StableDiffusionXLPipeline:
    return _sdxl(sd_schedule(prediction_type="v_prediction"), force_zeros=False)


def _sdxl(scheduler: Any, force_zeros: bool) -> StableDiffusionXLPipeline:
    widths, added = (16, 24), 4
    network = unet(
        sum(widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=added,
        projection_class_embeddings_input_dim=widths[1] + 6 * added,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=kl_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_text(widths[0], layers=3),
        text_encoder_2=clip_text(widths[1], projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def _pixart_said(pipe: Any, prompts: Sequence[str]) -> Said:
    states, mask, empty, empty_mask = pipe.encode_prompt(list(prompts), device="cpu")
    return (
        {"encoder_hidden_states": states, "encoder_attention_mask": mask},
        {"encoder_hidden_states": empty, "encoder_attention_mask": empty_mask},
    )


PIXART_CALL = {"clean_caption": False, "use_resolution_binning": False, "height": PIXELS, "width": PIXELS}


@miniature("pixart", _pixart_said, call=PIXART_CALL)
def pixart_sigma() -> PixArtSigmaPipeline:
    return _pixart(PixArtSigmaPipeline, sample_size=PIXELS // 4)


@miniature("pixart alpha of 1024 pixels", _pixart_said, "pixart", call=PIXART_CALL)
def pixart_alpha() -> PixArtAlphaPipeline:
    """The sample size is what makes the pipeline tell the transformer of sizes; the weights do not depend on it."""
    return _pixart(PixArtAlphaPipeline, sample_size=128, use_additional_conditions=True)


def _pixart(kind: type, **more: Any) -> Any:
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=16,
        **more,
    ).eval()
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(16),
        vae=kl_vae(scaling_factor=0.13025),
        transformer=network,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


SIZE = {"height": PIXELS, "width": PIXELS}


def flow_vae() -> AutoencoderKL:
    """As SD3 and what came after it have: more channels, a shift beside the scale, no convolutions around the posterior."""
    return kl_vae(8, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)


def _sd3_said(pipe: Any, prompts: Sequence[str]) -> Said:
    states, empty, pooled, empty_pooled = pipe.encode_prompt(list(prompts), None, None, device="cpu")
    return (
        {"encoder_hidden_states": states, "pooled_projections": pooled},
        {"encoder_hidden_states": empty, "pooled_projections": empty_pooled},
    )


@miniature("sd3", _sd3_said)
def sd3() -> StableDiffusion3Pipeline:
    return _sd3(t5=True)


@miniature("sd3, of 3.5 and without T5", _sd3_said, "sd3", lacks=("text_encoder_3", "tokenizer_3"))
def sd35() -> StableDiffusion3Pipeline:
    return _sd3(t5=False, dual_attention_layers=(0,), qk_norm="rms_norm")


def _sd3(t5: bool, **more: Any) -> StableDiffusion3Pipeline:
    widths, joint = (16, 24), 48
    network = SD3Transformer2DModel(
        sample_size=PIXELS // 4,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=joint,
        caption_projection_dim=16,
        pooled_projection_dim=sum(widths),
        pos_embed_max_size=8,
        **more,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(),
        text_encoder=clip_text(widths[0], projected=True, layers=3),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(widths[1], projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(joint) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def _flux_said(pipe: Any, prompts: Sequence[str]) -> Said:
    said, empty = (pipe.encode_prompt(texts, device="cpu")[:2] for texts in (list(prompts), [""] * len(prompts)))
    told = {"guidance": torch.ones(len(prompts))} if pipe.transformer.config.guidance_embeds else {}
    return tuple({"encoder_hidden_states": states, "pooled_projections": pooled, **told} for states, pooled in (said, empty))


def _flux_pack(latents: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def _flux_unpack(tokens: Tensor) -> Tensor:
    return FluxPipeline._unpack_latents(tokens, PIXELS, PIXELS, 4)


FLUX = {"call": SIZE, "pack": _flux_pack, "unpack": _flux_unpack}


@miniature("flux", _flux_said, **FLUX)
def flux_dev() -> FluxPipeline:
    return _flux(True, FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))


@miniature("flux schnell", _flux_said, "flux", guided=False, **FLUX)
def flux_schnell() -> FluxPipeline:
    return _flux(False, FlowMatchEulerDiscreteScheduler())


def _flux(guidance: bool, scheduler: Any) -> FluxPipeline:
    vae, heads = flow_vae(), 2
    network = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip_text(16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(32),
        tokenizer_2=t5_tokenizer(),
        transformer=network,
    )


SANA_INSTRUCTION = {
    "complex_human_instruction": inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
}


def _sana_said(pipe: Any, prompts: Sequence[str]) -> Said:
    states, mask, empty, empty_mask = pipe.encode_prompt(list(prompts), device="cpu", **SANA_INSTRUCTION)
    return (
        {"encoder_hidden_states": states, "encoder_attention_mask": mask},
        {"encoder_hidden_states": empty, "encoder_attention_mask": empty_mask},
    )


SANA_CALL = {**SIZE, "clean_caption": False, "use_resolution_binning": False, "complex_human_instruction": None}
"""Without the instruction, which makes each prompt a thousand tokens here."""


@miniature("sana", _sana_said, call=SANA_CALL, as_encoded=SANA_INSTRUCTION)
def sana() -> SanaPipeline:
    """With the scheduler that was released with it: DPM-Solver++."""
    return _sana(
        DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction", beta_schedule="linear", solver_order=2
        )
    )


@miniature("sana with Euler's steps and a scaled time", _sana_said, "sana", call=SANA_CALL, as_encoded=SANA_INSTRUCTION)
def sana_euler() -> SanaPipeline:
    return _sana(FlowMatchEulerDiscreteScheduler(shift=3.0), timestep_scale=0.5, qk_norm="rms_norm_across_heads")


def gemma_tokenizer() -> GemmaTokenizer:
    """A token for each printable character."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", "\n", *map(chr, range(33, 127))]
    return GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, add_bos_token=True)


def gemma_text(width: int = 16) -> Gemma2Model:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
    size = {"vocab_size": len(gemma_tokenizer()), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    return Gemma2Model(Gemma2Config(**size, **heads)).eval()


def dc_vae() -> AutoencoderDC:
    """32 x 32 pixels to 8 x 8 latents."""
    blocks, channels = ("ResBlock", "ResBlock", "EfficientViTBlock"), (8, 8, 8)
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    ).eval()


def _sana(scheduler: Any, **more: Any) -> SanaPipeline:
    network = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=PIXELS // 4,
        **more,
    ).eval()
    return SanaPipeline(gemma_tokenizer(), gemma_text(16), dc_vae(), network, scheduler)


def _z_image_said(pipe: Any, prompts: Sequence[str]) -> Said:
    return tuple(_with_lengths(rows) for rows in pipe.encode_prompt(list(prompts), device="cpu"))


def _with_lengths(rows: Sequence[Tensor], length: int = 512) -> dict[str, Tensor]:
    """Rows of any length, padded at the end."""
    states = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    return {"encoder_hidden_states": states, "lengths": torch.tensor([len(row) for row in rows])}


@miniature("z_image", _z_image_said, call=SIZE, guidance=lambda scale: scale - 1)
def z_image() -> ZImagePipeline:
    network = ZImageTransformer2DModel(
        in_channels=8,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 16, 16],
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, flow_vae(), qwen_text(16), qwen_tokenizer(), network)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A token for each byte, and a chat as Qwen3 writes it."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {word: number for number, word in enumerate([*marks, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"])
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    answer = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + answer
    return tokenizer


def qwen_text(width: int = 16) -> Qwen3Model:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    size = {"vocab_size": len(qwen_tokenizer()), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3}
    return Qwen3Model(Qwen3Config(**size, **heads)).eval()
