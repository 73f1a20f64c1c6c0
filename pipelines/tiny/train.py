"""How the shipped miniature checkpoint was made: ``diffalign world train --output DIR``.

Two stages on freshly drawn scenes, both seeded: the autoencoder (L1 + edges + a small KL), then UNet and text encoder
together on the encoded scenes (epsilon prediction, min-SNR-5 weights of Hang et al. 2023, arXiv 2303.09556, 10 % of the
captions dropped for classifier-free guidance, an exponential moving average of the weights kept).

B = batch, latents are [B, 4, 16, 16], captions are [B, 40] token ids.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.checkpoint import written_aside
from pipelines.tiny import model, scenes

Say = Callable[[str], None]


@dataclass(frozen=True)
class WorldTraining:
    """Everything that decides the weights."""

    seed: int = 0
    scenes: int = 60_000
    vae_steps: int = 1_300
    vae_batch: int = 24
    vae_learning_rate: float = 2e-3
    kl_weight: float = 2e-4
    unet_steps: int = 5_500
    unet_batch: int = 64
    unet_learning_rate: float = 1e-3
    caption_dropout: float = 0.1
    ema_decay: float = 0.9985


def draw_training_set(config: WorldTraining) -> tuple[np.ndarray, list[str]]:
    """``[N, 64, 64, 3]`` uint8 pictures and their captions, from the train split."""
    stream = scenes.stream(config.seed, split="train")
    pictures = np.empty((config.scenes, scenes.SIZE, scenes.SIZE, 3), dtype=np.uint8)
    captions = []
    for i in range(config.scenes):
        scene, caption = next(stream)
        pictures[i] = np.asarray(scenes.render(scene))
        captions.append(caption)
    return pictures, captions


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 ``[B, H, W, 3]`` to float ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Up for a twentieth of the steps, then down along a cosine."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, max(steps, 40), pct_start=0.05)


def _edges(x: Tensor) -> Tensor:
    return torch.cat([(x[..., 1:, :-1] - x[..., :-1, :-1]), (x[..., :-1, 1:] - x[..., :-1, :-1])], dim=1)


def train_vae(config: WorldTraining, pictures: np.ndarray, say: Say) -> nn.Module:
    """The autoencoder; sets ``scaling_factor`` to one over the latents' standard deviation, as SD does."""
    torch.manual_seed(config.seed)
    vae = model.build_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_learning_rate, weight_decay=1e-3)
    schedule, rng, start = _schedule(optimizer, config.vae_steps), np.random.default_rng(config.seed + 1), time.time()
    for step in range(1, config.vae_steps + 1):
        x = to_pixels(pictures[rng.integers(len(pictures), size=config.vae_batch)])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + F.l1_loss(_edges(y), _edges(x)) + config.kl_weight * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            say(
                f"vae {step}/{config.vae_steps} loss {loss.item():.4f} mse {F.mse_loss(y, x).item():.5f} kl {kl.item():.2f} {time.time() - start:.0f} s"
            )
    vae.eval()
    mean, _ = encode(vae, pictures[:512])
    vae.register_to_config(scaling_factor=round(1.0 / mean.std().item(), 4))
    return vae


@torch.no_grad()
def encode(vae: nn.Module, pictures: np.ndarray, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, ``[N, 4, 16, 16]`` each, not scaled."""
    means, stds = [], []
    for i in range(0, len(pictures), batch):
        posterior = vae.encode(to_pixels(pictures[i : i + batch])).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


def train_unet(
    config: WorldTraining, vae: nn.Module, pictures: np.ndarray, captions: list[str], say: Say, save: Callable
) -> None:
    """UNet and text encoder together; ``save(step, tokenizer, text_encoder, unet)`` receives the averaged weights."""
    torch.manual_seed(config.seed + 2)
    tokenizer = model.build_tokenizer()
    text_encoder, unet = model.build_text_encoder(tokenizer).train(), model.build_unet().train()
    nets = nn.ModuleList([unet, text_encoder])
    mean, std = encode(vae, pictures)
    scale = vae.config.scaling_factor
    ids = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    scheduler, empty = model.build_scheduler(), len(captions)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=config.unet_learning_rate, weight_decay=1e-2)
    schedule, start, smooth = _schedule(optimizer, config.unet_steps), time.time(), None
    average = EMAModel(nets.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    for step in range(1, config.unet_steps + 1):
        index = torch.randint(empty, (config.unet_batch,))
        z = scale * (mean[index] + std[index] * torch.randn_like(mean[index]))
        t, noise = torch.randint(1000, (len(index),)), torch.randn_like(z)
        index[torch.rand(len(index)) < config.caption_dropout] = empty
        prediction = unet(scheduler.add_noise(z, noise, t), t, text_encoder(ids[index]).last_hidden_state).sample
        error = (prediction - noise).square().mean(dim=(1, 2, 3))  # [B]
        snr = compute_snr(scheduler, t)
        loss = (error * snr.clamp(max=5.0) / snr).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(nets.parameters())
        smooth = error.mean().item() if smooth is None else 0.99 * smooth + 0.01 * error.mean().item()
        if step % 100 == 0:
            say(f"unet {step}/{config.unet_steps} error {smooth:.4f} {time.time() - start:.0f} s")
        if step % 1500 == 0 or step == config.unet_steps:
            average.store(nets.parameters())
            average.copy_to(nets.parameters())
            save(step, tokenizer, text_encoder, unet)
            average.restore(nets.parameters())


def save_half(output: Path, tokenizer, text_encoder: nn.Module, vae: nn.Module, unet: nn.Module) -> None:
    """Write half-precision weights that load as float32 (Transformers goes by the dtype in the configuration)."""
    halves = [copy.deepcopy(net).half() for net in (text_encoder, vae, unet)]
    with written_aside(output) as folder:
        model.assemble(tokenizer, *halves).save_pretrained(folder)
        config_file = folder / "text_encoder" / "config.json"
        config = json.loads(config_file.read_text())
        config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def train(output: Path, config: WorldTraining, say: Say = print) -> None:
    """Train both stages and write ``output`` as a Diffusers folder with half-precision weights and ``training.json``."""
    start = time.time()
    pictures, captions = draw_training_set(config)
    say(f"{len(captions)} scenes drawn in {time.time() - start:.0f} s")
    vae = train_vae(config, pictures, say)
    seconds_vae = time.time() - start

    def save(step: int, tokenizer, text_encoder: nn.Module, unet: nn.Module) -> None:
        save_half(output, tokenizer, text_encoder, vae, unet)
        record = {
            "command": "diffalign world train",
            "config": asdict(config),
            "unet_steps_done": step,
            "seconds_vae": round(seconds_vae),
            "seconds_total": round(time.time() - start),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()} CPU",
            "torch": torch.__version__.split("+")[0],
        }
        (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        say(f"saved {output} at step {step}")

    train_unet(config, vae, pictures, captions, say, save)
