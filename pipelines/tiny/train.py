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
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.optimisation import Ema
from diffalign.written_aside import folder_aside
from pipelines.tiny import model, scenes
from pipelines.tiny.settings import WorldTraining

Say = Callable[[str], None]


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
    """Up for a twentieth of the steps, then down along a cosine; AdamW's momentum goes the other way."""
    rates, cycled = [group["lr"] for group in optimizer.param_groups], isinstance(optimizer, torch.optim.AdamW)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, max(steps, 40), pct_start=0.05, cycle_momentum=cycled)


def _edges(x: Tensor) -> Tensor:
    return torch.cat([(x[..., 1:, :-1] - x[..., :-1, :-1]), (x[..., :-1, 1:] - x[..., :-1, :-1])], dim=1)


def train_vae(config: WorldTraining, pictures: np.ndarray, say: Say) -> nn.Module:
    """The autoencoder, first on crops of half the side (four times cheaper), then on whole pictures.

    Its latents are standardised, so ``scaling_factor`` is 1.
    """
    torch.manual_seed(config.seed)
    vae, rng = model.build_vae().train(), np.random.default_rng(config.seed + 1)
    half = scenes.SIZE // 2
    _vae_stage(
        vae,
        config,
        config.vae_crop_steps,
        config.vae_learning_rate,
        say,
        lambda: _crops(pictures, rng, config.vae_crop_batch, half),
    )
    _vae_stage(
        vae,
        config,
        config.vae_steps,
        config.vae_learning_rate / 2,
        say,
        lambda: _crops(pictures, rng, config.vae_batch, scenes.SIZE),
    )
    vae.eval()
    standardise_latents(vae, pictures[:2048])
    return vae


@torch.no_grad()
def standardise_latents(vae: nn.Module, pictures: np.ndarray) -> None:
    """Give every latent channel mean 0 and deviation 1 over ``pictures``, without changing what the autoencoder does.

    The affine map goes into the 1 x 1 convolutions on either side of the latent. One scaling factor for all channels, as SD
    has it, would leave some channels drowned in noise long before others.
    """
    means, _ = encode(vae, pictures)
    centre, spread = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))  # [4]
    before, after, n = vae.quant_conv, vae.post_quant_conv, len(centre)  # before: mean and log variance, [8, 8, 1, 1]
    before.weight[:n] /= spread.view(-1, 1, 1, 1)
    before.bias[:n] = (before.bias[:n] - centre) / spread
    before.bias[n:] -= 2 * spread.log()
    after.bias += (after.weight[:, :, 0, 0] * centre).sum(dim=1)
    after.weight *= spread.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def _crops(pictures: np.ndarray, rng: np.random.Generator, batch: int, side: int) -> Tensor:
    """Random pictures, cut at random places to ``side`` pixels."""
    chosen = rng.integers(len(pictures), size=batch)
    corners = rng.integers(scenes.SIZE - side + 1, size=(batch, 2))
    return to_pixels(np.stack([pictures[i, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners, strict=True)]))


def _vae_stage(
    vae: nn.Module, config: WorldTraining, steps: int, rate: float, say: Say, next_batch: Callable[[], Tensor]
) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule, start = _schedule(optimizer, steps), time.time()
    for step in range(1, steps + 1):
        x = next_batch()
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(y, x) + config.kl_weight * _kl(posterior)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            mse, seconds = F.mse_loss(y, x).item(), time.time() - start
            numbers = f"loss {loss.item():.4f} mse {mse:.5f} kl {_kl(posterior).item():.2f}"
            say(f"vae {x.shape[-1]} px {step}/{steps} {numbers} {seconds:.0f} s")


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1, squares, edges, and L1 of 4 x 4 averages: the last keeps the colour of a region from being traded for its edges."""
    regions = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
    return F.l1_loss(y, x) + F.mse_loss(y, x) + F.l1_loss(_edges(y), _edges(x)) + 2.0 * regions


def _kl(posterior: Any) -> Tensor:
    """KL divergence to the standard normal, mean over the latent's dimensions, in nats."""
    return 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()


@torch.no_grad()
def encode(vae: nn.Module, pictures: np.ndarray, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, ``[N, 4, 16, 16]`` each, not scaled."""
    means, stds = [], []
    for i in range(0, len(pictures), batch):
        posterior = vae.encode(to_pixels(pictures[i : i + batch])).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


def adamw(learning_rate: float, *networks: nn.Module) -> torch.optim.AdamW:
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-2)


class NetworkTraining(ABC):
    """Networks with everything that changes while they are trained, so that a killed training can go on."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], steps: int, ema_decay: float) -> None:
        self.steps, self.done, self.seconds = steps, 0, 0.0
        self._optimizers, self._schedules = optimizers, [_schedule(optimizer, steps) for optimizer in optimizers]
        self._parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self.average = Ema(self._parameters, ema_decay)

    @abstractmethod
    def losses(self) -> tuple[Tensor, Tensor]:
        """Of a batch that is drawn now: what is minimised, and the error [B] to be told."""

    def step(self) -> float:
        """One optimizer step; returns the mean squared error of the prediction."""
        start = time.perf_counter()
        loss, error = self.losses()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.average.update()
        self.done += 1
        self.seconds += time.perf_counter() - start
        return error.mean().item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": [p.detach() for p in self._parameters],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "schedules": [schedule.state_dict() for schedule in self._schedules],
            "average": self.average.state_dict(),
            "random": torch.get_rng_state(),
            "done": self.done,
            "seconds": self.seconds,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for parameter, value in zip(self._parameters, state["weights"], strict=True):
            parameter.copy_(value)
        for name, things in (("optimizers", self._optimizers), ("schedules", self._schedules)):
            for thing, value in zip(things, state[name], strict=True):
                thing.load_state_dict(value)
        self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])
        self.done, self.seconds = state["done"], state["seconds"]


class UNetTraining(NetworkTraining):
    """UNet and text encoder."""

    def __init__(self, config: WorldTraining, vae: nn.Module, pictures: np.ndarray, captions: list[str]) -> None:
        torch.manual_seed(config.seed + 2)
        self.config = config
        self.tokenizer = model.build_tokenizer()
        self.text_encoder, self.unet = model.build_text_encoder(self.tokenizer).train(), model.build_unet().train()
        self._mean, self._std = (vae.config.scaling_factor * moment for moment in encode(vae, pictures))
        self._ids = self.tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
        self._noise = model.build_scheduler()
        super().__init__([adamw(config.unet_learning_rate, self.unet, self.text_encoder)], config.unet_steps, config.ema_decay)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Errors of the predicted noise."""
        empty = len(self._ids) - 1
        index = torch.randint(empty, (self.config.unet_batch,))
        x_0 = self._mean[index] + self._std[index] * torch.randn_like(self._mean[index])
        t, noise = torch.randint(1000, (len(index),)), torch.randn_like(x_0)
        index[torch.rand(len(index)) < self.config.caption_dropout] = empty
        text = self.text_encoder(self._ids[index]).last_hidden_state
        prediction = self.unet(self._noise.add_noise(x_0, noise, t), t, text).sample
        error = (prediction - noise).square().mean(dim=(1, 2, 3))  # [B]
        snr = compute_snr(self._noise, t)
        return (error * snr.clamp(max=5.0) / snr).mean(), error


def train_network(name: str, training: NetworkTraining, say: Say, save: Callable[[], None]) -> None:
    """Step to the end; ``save`` is called now and then."""
    smooth = None
    while training.done < training.steps:
        error = training.step()
        smooth = error if smooth is None else 0.99 * smooth + 0.01 * error
        if training.done % 100 == 0:
            say(f"{name} {training.done}/{training.steps} error {smooth:.4f} {training.seconds:.0f} s")
        if training.done % 500 == 0 or training.done == training.steps:
            save()


def keep_state(training: NetworkTraining, file: Path) -> None:
    """Write what a killed training goes on from; there is never half a file."""
    torch.save(training.state_dict(), file.with_name(f"{file.name}.new"))
    file.with_name(f"{file.name}.new").replace(file)


def save_half(output: Path, pipe: Any) -> None:
    """Write a pipeline in half precision that loads as float32 (Transformers goes by the dtype in the configuration)."""
    with folder_aside(output) as folder:
        copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder)
        for part in [folder / name for name, net in pipe.components.items() if isinstance(net, nn.Module)]:
            config = json.loads((part / "config.json").read_text("utf-8"))
            config.pop("_name_or_path", None)  # where it was trained is nobody's business
            if "dtype" in config:
                config["dtype"] = "float32"
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def train(output: Path, config: WorldTraining, say: Say = print) -> None:
    """Train both stages and write ``output`` as a Diffusers folder with half-precision weights and ``training.json``.

    Called again after a kill, it goes on from ``output`` + ``.work``, which is removed at the end.
    """
    work = output.with_name(output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    pictures, captions = draw_training_set(config)
    say(f"{len(captions)} scenes drawn")
    vae, seconds_vae = _vae_of(work, config, pictures, say)
    training = UNetTraining(config, vae, pictures, captions)
    if (work / "unet.pt").is_file():
        training.load_state_dict(torch.load(work / "unet.pt", weights_only=True))

    def save() -> None:
        with training.average.applied():
            save_half(output, model.assemble(training.tokenizer, training.text_encoder, vae, training.unet))
        training.text_encoder.train(), training.unet.train()
        (output / "training.json").write_text(json.dumps(_record(config, training, seconds_vae), indent=2) + "\n")
        (output / "sampling.json").write_text(json.dumps({"guidance_scale": config.guidance_scale}) + "\n")
        keep_state(training, work / "unet.pt")

    train_network("unet", training, say, save)
    say(f"saved {output}")
    shutil.rmtree(work)


def _vae_of(work: Path, config: WorldTraining, pictures: np.ndarray, say: Say) -> tuple[nn.Module, float]:
    """The autoencoder, trained now or by an earlier call, and the seconds it took."""
    if not (work / "vae.json").is_file():
        start = time.perf_counter()
        train_vae(config, pictures, say).save_pretrained(work / "vae")
        (work / "vae.json").write_text(json.dumps({"seconds": time.perf_counter() - start}))
    return AutoencoderKL.from_pretrained(work / "vae").eval(), json.loads((work / "vae.json").read_text("utf-8"))["seconds"]


def _record(config: WorldTraining, training: UNetTraining, seconds_vae: float) -> dict[str, Any]:
    return {
        "command": "diffalign world train --output DIR",
        "config": asdict(config),
        "unet_steps_done": training.done,
        "seconds_vae": round(seconds_vae),
        "seconds_unet": round(training.seconds),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} CPU",
        "torch": torch.__version__.split("+")[0],
    }
