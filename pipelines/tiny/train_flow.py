"""How the shipped miniature of Stable Diffusion 3 was made: ``diffalign world train-flow --output DIR``.

Transformer and second text encoder together, on the scenes and with the autoencoder of the miniature SD: conditional
flow matching (Lipman et al. 2022, arXiv 2210.02747) on straight paths x_s = (1 - s) x_0 + s eps, velocity eps - x_0 predicted,
s from a logit-normal (Esser et al. 2024, arXiv 2403.03206), 15 % of the captions dropped for classifier-free guidance, an
exponential moving average of the weights kept.

The velocity eps - x_0 of one draw is mostly noise: most of its error cannot be learnt. The miniature SD knows its mean, so
that is what the transformer learns (knowledge distillation): at a ratio of signal to noise that SD's table has, SD is asked for
eps, from which x_0 and the velocity follow. Where there is more noise than ``TAUGHT_BELOW`` the draw itself is learnt from. What
the UNet knows on its way is learnt as well, as in BK-SDM (Kim et al. 2023, arXiv 2305.15798): a linear layer per stage reads the
stage's states off the tokens of a block. It helps most with what words mean.

The matrices in the blocks follow Muon (Jordan et al. 2024; torch.optim.Muon, rates as AdamW's by matched RMS), all else AdamW.
After 700 steps AdamW alone is where the two are after 500. Networks compute in bfloat16, attention in float32: half the time
where the CPU has matrix units for it.

The 256 zeros that SD3 without its T5 puts behind a caption are shown as two (``families._joint_attention``): a third of the time.

B = batch, latents are [B, 4, 16, 16], captions are [B, 28] token ids.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.families._joint_attention import KEPT, JointAttention
from pipelines.tiny import flow_model, model, scenes, shipped
from pipelines.tiny.settings import FlowTraining, WorldTraining
from pipelines.tiny.train import (
    NetworkTraining,
    Say,
    draw_training_set,
    encode,
    keep_state,
    save_half,
    train_network,
)

ZEROS = 256
"""In T5's place, as ``StableDiffusion3Pipeline`` has them."""
TAUGHT_BELOW = 0.9
"""Noise level s. SD's table ends at 0.936, and an error of eps is one of 1 / (1 - s) in the velocity."""


class TransformerTraining(NetworkTraining):
    """Transformer and second text encoder; the first one stays as it is."""

    def __init__(self, config: FlowTraining, vae: nn.Module, pictures: np.ndarray, captions: list[str]) -> None:
        torch.manual_seed(config.seed + 2)
        self.config, self.tokenizer = config, flow_model.build_tokenizer()
        self.text_encoders = flow_model.build_text_encoders(self.tokenizer)
        self.text_encoders[1].train()
        self.transformer = flow_model.build_transformer().train()
        self.transformer.set_attn_processor(JointAttention(float32=True))
        self._mean, self._std = (vae.config.scaling_factor * moment for moment in encode(vae, pictures))
        self._teacher = Teacher()
        self._ids = self.tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
        self._stages = Stages(self.transformer, self._teacher.widths)
        if config.compile_blocks:
            for block in (*self.transformer.transformer_blocks, *self.text_encoders):
                block.compile()
        super().__init__(self._build_optimizers(), config.flow_steps, config.ema_decay)

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        blocks = dict(self.transformer.transformer_blocks.named_parameters())
        matrices = [p for name, p in blocks.items() if p.ndim == 2 and "norm1" not in name]  # not what makes scales of the time
        muon = torch.optim.Muon(matrices, lr=self.config.muon_learning_rate, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
        taken = {id(p) for p in matrices}
        rest = nn.ModuleList([self.transformer, self.text_encoders[1], self._stages])
        rest = [p for p in rest.parameters() if id(p) not in taken]
        return [muon, torch.optim.AdamW(rest, lr=self.config.flow_learning_rate, weight_decay=1e-2)]

    @torch.autocast("cpu", torch.bfloat16)
    def losses(self) -> tuple[Tensor, Tensor]:
        """Errors of the predicted velocity, and of the UNet's stages."""
        empty, batch = len(self._ids) - 1, self.config.flow_batch
        index = torch.randint(empty, (batch,))
        x_0 = self._mean[index] + self._std[index] * torch.randn_like(self._mean[index])
        s, noise = torch.randn(batch).sigmoid(), torch.randn_like(x_0)
        s, t = self._teacher.nearest(s)
        index[torch.rand(batch) < self.config.caption_dropout] = empty
        text, pooled = encode_captions(self.text_encoders, self._ids[index])
        x_s = torch.lerp(x_0, noise, s.view(-1, 1, 1, 1))
        taught = self._teacher.velocity(x_s, s, t, self.text_encoders[0](self._ids[index]).last_hidden_state)
        velocity = torch.where(s.view(-1, 1, 1, 1) < TAUGHT_BELOW, taught, noise - x_0)
        told = {"encoder_hidden_states": text, "pooled_projections": pooled, "joint_attention_kwargs": {"alike": ZEROS}}
        said = self.transformer(x_s, timestep=1000 * s, **told).sample
        error = (said.float() - velocity).square().mean(dim=(1, 2, 3))
        return error.mean() + self.config.stages_weight * self._stages.error(self._teacher.stages), error


class Teacher:
    """What the miniature Stable Diffusion says of a straight path's velocity."""

    def __init__(self) -> None:
        self._unet = UNet2DConditionModel.from_pretrained(shipped.CHECKPOINT, subfolder="unet", torch_dtype=torch.float32).eval()
        alpha_bar = model.build_scheduler().alphas_cumprod
        self._levels = (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())  # s at the same ratio [1000]
        self.stages: list[Tensor] = []  # states [B, 64, D] of the latest answer, one token a patch
        down, up = self._unet.down_blocks[1], self._unet.up_blocks
        seen = (down.attentions[-1], self._unet.mid_block, up[1].attentions[-1], up[2])
        for module in seen:
            module.register_forward_hook(lambda _, __, out: self.stages.append(_as_tokens(out)))
        width = self._unet.config.block_out_channels
        self.widths = (width[1], width[2], width[1], flow_model.PATCH**2 * width[0])

    def nearest(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Levels [B] of its table, and their places t, nearest to ``s`` [B]; above the table's last ``s`` itself, and that t."""
        t = (self._levels[None] - s[:, None]).abs().argmin(dim=1)
        return torch.where(s > self._levels[-1], s, self._levels[t]), t

    @torch.no_grad()
    def velocity(self, x_s: Tensor, s: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """eps - x_0 by its eps for ``x_s`` [B, C, h, w] at levels of its table, given its own text states [B, L, D]."""
        s, self.stages = s.view(-1, 1, 1, 1), []
        eps = self._unet(x_s / ((1 - s) ** 2 + s**2).sqrt(), t, words).sample
        return eps.float() - (x_s - s * eps.float()) / (1 - s)


def _as_tokens(out: Any) -> Tensor:
    """States [B, D, h, w] of a part of the UNet as [B, 64, D'], standardised over the batch."""
    x = getattr(out, "sample", out)
    x = (x[0] if isinstance(x, tuple) else x).float()
    side = scenes.SIZE // 4 // flow_model.PATCH
    x = F.pixel_unshuffle(x, x.shape[3] // side) if x.shape[3] > side else F.interpolate(x, size=side)
    x = x.flatten(2).transpose(1, 2)
    return (x - x.mean(dim=(0, 1))) / (x.std(dim=(0, 1)) + 1e-6)


class Stages(nn.Module):
    """Linear readers of the UNet's stages, one for each block of the transformer but the first and the last."""

    def __init__(self, transformer: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        width = flow_model.HEADS * flow_model.HEAD_WIDTH
        self.readers = nn.ModuleList(nn.Linear(width, to) for to in widths)
        self._states: dict[int, Tensor] = {}
        for i, block in enumerate(transformer.transformer_blocks[1 : len(widths) + 1]):
            block.register_forward_hook(lambda _, __, out, i=i: self._states.update({i: out[1]}))

    def error(self, stages: Sequence[Tensor]) -> Tensor:
        """Sum of the mean squared errors of ``stages`` [B, 64, D] as read off the latest states."""
        pairs = zip(self.readers, stages, strict=True)
        said = (
            (reader(F.layer_norm(self._states[i], self._states[i].shape[-1:])), seen) for i, (reader, seen) in enumerate(pairs)
        )
        return sum((a.float() - b).square().mean() for a, b in said)


def encode_captions(text_encoders: list[nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [B, 28 + 2, D] with ``KEPT`` zeros in T5's place, and pooled embeddings [B, P], as SD3 puts them together."""
    said = [net(ids, output_hidden_states=True) for net in text_encoders]
    words = torch.cat([one.hidden_states[-2] for one in said], dim=2)
    return F.pad(words, (0, 0, 0, KEPT)), torch.cat([one.text_embeds for one in said], dim=1)


def train(output: Path, config: FlowTraining, say: Say = print) -> None:
    """Write ``output`` as a Diffusers folder with half-precision weights and ``training.json``.

    Called again after a kill, it goes on from ``output`` + ``.work``, which is removed at the end.
    """
    work = output.with_name(output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    pictures, captions = draw_training_set(WorldTraining(seed=config.seed, scenes=config.scenes))
    say(f"{len(captions)} scenes drawn")
    vae = AutoencoderKL.from_pretrained(shipped.CHECKPOINT, subfolder="vae", torch_dtype=torch.float32).eval()
    training = TransformerTraining(config, vae, pictures, captions)
    if (work / "flow.pt").is_file():
        training.load_state_dict(torch.load(work / "flow.pt", weights_only=True))

    def save() -> None:
        with training.average.applied():
            save_half(output, flow_model.assemble(training.tokenizer, training.text_encoders, vae, training.transformer))
        training.text_encoders[1].train(), training.transformer.train()
        (output / "training.json").write_text(json.dumps(_record(config, training), indent=2) + "\n")
        (output / "sampling.json").write_text(json.dumps({"guidance_scale": config.guidance_scale}) + "\n")
        keep_state(training, work / "flow.pt")

    train_network("flow", training, say, save)
    say(f"saved {output}")
    shutil.rmtree(work)


def _record(config: FlowTraining, training: TransformerTraining) -> dict[str, Any]:
    return {
        "command": "diffalign world train-flow --output DIR" + (" --compile-blocks" if config.compile_blocks else ""),
        "config": asdict(config),
        "flow_steps_done": training.done,
        "seconds_flow": round(training.seconds),
        "autoencoder": "the miniature Stable Diffusion's",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} CPU",
        "torch": torch.__version__.split("+")[0],
    }
