"""How the shipped miniature of Stable Diffusion 3 was made: ``diffalign world train-flow --output DIR``.

Transformer and second text encoder together, on the scenes and with the autoencoder of the miniature SD: conditional
flow matching (Lipman et al. 2022, arXiv 2210.02747) on straight paths x_s = (1 - s) x_0 + s eps, velocity eps - x_0 predicted,
s from a logit-normal (Esser et al. 2024, arXiv 2403.03206), 10 % of the captions dropped for classifier-free guidance, an
exponential moving average of the weights kept.

The velocity eps - x_0 of one draw is mostly noise: most of its error cannot be learnt. The miniature SD knows its mean, so
that is what the transformer learns (knowledge distillation): at a ratio of signal to noise that SD's table has, SD is asked for
eps, from which x_0 and the velocity follow. Where there is more noise than ``TAUGHT_BELOW`` the draw itself is learnt from.

SD3 without its T5 puts 256 zeros behind a caption. They have no places of their own, so they are alike in every layer, and 256
keys that are alike are one key whose logit is larger by log 256: training asks for one, sampling sees 256, and the answer is the
same. It takes a third of the time.

B = batch, latents are [B, 4, 16, 16], captions are [B, 40] token ids.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.tiny import flow_model, model, shipped
from pipelines.tiny.train import (
    NetworkTraining,
    Say,
    WorldTraining,
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


@dataclass(frozen=True)
class FlowTraining:
    """Everything that decides the weights."""

    seed: int = 0
    scenes: int = 30_000
    flow_steps: int = 5_000
    flow_batch: int = 32
    flow_learning_rate: float = 1e-3
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    guidance_scale: float = 4.0
    compile_blocks: bool = False


class TransformerTraining(NetworkTraining):
    """Transformer and second text encoder; the first one stays as it is."""

    def __init__(self, config: FlowTraining, vae: nn.Module, pictures: np.ndarray, captions: list[str]) -> None:
        torch.manual_seed(config.seed + 2)
        self.config, self.tokenizer = config, model.build_tokenizer()
        self.text_encoders = flow_model.build_text_encoders(self.tokenizer)
        self.text_encoders[1].train()
        self.transformer = flow_model.build_transformer().train()
        self._mean, self._std = (vae.config.scaling_factor * moment for moment in encode(vae, pictures))
        self._teacher = Teacher()
        self._ids = self.tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
        networks = [self.transformer, self.text_encoders[1]]
        if config.compile_blocks:
            for block in (*self.transformer.transformer_blocks, *self.text_encoders):
                block.compile()
        super().__init__(networks, config.flow_steps, config.flow_learning_rate, config.ema_decay)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Errors of the predicted velocity."""
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
        with alike_once(self.transformer, ZEROS):
            said = self.transformer(x_s, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * s).sample
        error = (said - velocity).square().mean(dim=(1, 2, 3))
        return error.mean(), error


class Teacher:
    """What the miniature Stable Diffusion says of a straight path's velocity."""

    def __init__(self) -> None:
        self._unet = UNet2DConditionModel.from_pretrained(shipped.CHECKPOINT, subfolder="unet", torch_dtype=torch.float32).eval()
        alpha_bar = model.build_scheduler().alphas_cumprod
        self._levels = (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())  # s at the same ratio [1000]

    def nearest(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Levels [B] of its table, and their places t, nearest to ``s`` [B]; above the table's last ``s`` itself, and that t."""
        t = (self._levels[None] - s[:, None]).abs().argmin(dim=1)
        return torch.where(s > self._levels[-1], s, self._levels[t]), t

    @torch.no_grad()
    def velocity(self, x_s: Tensor, s: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """eps - x_0 by its eps for ``x_s`` [B, C, h, w] at levels of its table, given its own text states [B, L, D]."""
        s = s.view(-1, 1, 1, 1)
        eps = self._unet(x_s / ((1 - s) ** 2 + s**2).sqrt(), t, words).sample
        return eps - (x_s - s * eps) / (1 - s)


def encode_captions(text_encoders: list[nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [B, 40 + 1, D] with one zero in T5's place, and pooled embeddings [B, P], as SD3 puts them together."""
    said = [net(ids, output_hidden_states=True) for net in text_encoders]
    words = torch.cat([one.hidden_states[-2] for one in said], dim=2)
    return F.pad(words, (0, 0, 0, 1)), torch.cat([one.text_embeds for one in said], dim=1)


class alike_once:
    """Within: the last token behind a caption counts as often as ``times`` tokens like it."""

    def __init__(self, transformer: nn.Module, times: int) -> None:
        self._transformer, self._times = transformer, times

    def __enter__(self) -> None:
        self._before = self._transformer.attn_processors
        self._transformer.set_attn_processor(_Weighted(math.log(self._times)))

    def __exit__(self, *_: object) -> None:
        self._transformer.set_attn_processor(self._before)


class _Weighted:
    """SD3's joint attention, in which the last key has a larger logit."""

    def __init__(self, more: float) -> None:
        self._more = more

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        x, c = hidden_states, encoder_hidden_states
        q = torch.cat([heads(attn.to_q(x), attn.norm_q), heads(attn.add_q_proj(c), attn.norm_added_q)], dim=2)
        k = torch.cat([heads(attn.to_k(x), attn.norm_k), heads(attn.add_k_proj(c), attn.norm_added_k)], dim=2)
        v = torch.cat([heads(attn.to_v(x)), heads(attn.add_v_proj(c))], dim=2)
        bias = torch.zeros(k.shape[2])
        bias[-1] = self._more
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[2], -1)).transpose(1, 2).flatten(2)
        of_x, of_c = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return attn.to_out[1](attn.to_out[0](of_x)), of_c if attn.context_pre_only else attn.to_add_out(of_c)


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
        "command": "diffalign world train-flow --output DIR",
        "config": asdict(config),
        "flow_steps_done": training.done,
        "seconds_flow": round(training.seconds),
        "autoencoder": "the miniature Stable Diffusion's",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} CPU",
        "torch": torch.__version__.split("+")[0],
    }
