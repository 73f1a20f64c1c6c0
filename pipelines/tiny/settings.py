"""Settings of the four trainings that made the tiny world's models.

They are the options of ``diffalign world train``, ``train-flow``, ``train-judge`` and ``train-writer``; the defaults made the
shipped models. Imports the standard library only, so that ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.settings import check_options, option


@dataclass(frozen=True)
class WorldTraining:
    """Everything that decides the weights of the miniature Stable Diffusion. Raises ValueError outside the bounds."""

    seed: int = option(0, "seed of scenes, weights and noise", ge=0)
    scenes: int = option(60_000, "different scenes drawn before training", ge=1)
    vae_crop_steps: int = option(2_600, "steps of the autoencoder on crops", ge=1)
    vae_crop_batch: int = option(64, "crops per step", ge=1)
    vae_steps: int = option(700, "steps of the autoencoder on whole pictures", ge=1)
    vae_batch: int = option(24, "whole pictures per step of the autoencoder", ge=1)
    vae_learning_rate: float = option(2e-3, "peak learning rate of the autoencoder", ge=0)
    kl_weight: float = option(1e-4, "weight of the KL term", ge=0)
    unet_steps: int = option(8_000, "steps of UNet and text encoder", ge=1)
    unet_batch: int = option(32, "pictures per step of UNet and text encoder", ge=1)
    unet_learning_rate: float = option(1e-3, "peak learning rate of UNet and text encoder", ge=0)
    caption_dropout: float = option(0.1, "share of captions dropped for classifier-free guidance", ge=0, le=1)
    ema_decay: float = option(0.999, "decay of the averaged weights", ge=0, le=1)
    guidance_scale: float = option(4.0, "guidance that the checkpoint recommends, written to sampling.json", ge=0)

    __post_init__ = check_options


@dataclass(frozen=True)
class FlowTraining:
    """Everything that decides the weights of the miniature Stable Diffusion 3. Raises ValueError outside the bounds."""

    seed: int = option(0, "seed of scenes, weights and noise", ge=0)
    scenes: int = option(30_000, "different scenes drawn before training", ge=1)
    flow_steps: int = option(7_000, "steps of transformer and text encoders", ge=1)
    flow_batch: int = option(32, "pictures per step", ge=1)
    flow_learning_rate: float = option(1e-3, "peak learning rate of AdamW", ge=0)
    muon_learning_rate: float = option(2e-3, "peak learning rate of Muon, for the matrices in the blocks", ge=0)
    stages_weight: float = option(0.3, "weight of the loss on the UNet's hidden states", ge=0)
    caption_dropout: float = option(0.15, "share of captions dropped for classifier-free guidance", ge=0, le=1)
    ema_decay: float = option(0.999, "decay of the averaged weights", ge=0, le=1)
    guidance_scale: float = option(4.0, "guidance that the checkpoint recommends, written to sampling.json", ge=0)
    compile_blocks: bool = option(False, "compile the networks (torch.compile): 1.7 times as fast, needs a C compiler")

    __post_init__ = check_options


@dataclass(frozen=True)
class JudgeTraining:
    """Everything that decides the weights of the miniature PickScore. Raises ValueError outside the bounds."""

    seed: int = option(0, "seed of scenes, weights, pictures and votes", ge=0)
    scenes: int = option(20_000, "different scenes with captions drawn for the first step", ge=1)
    contrast_steps: int = option(1_500, "steps on captions", ge=1)
    contrast_batch: int = option(48, "pictures per step on captions", ge=1)
    contrast_learning_rate: float = option(2e-3, "peak learning rate on captions", ge=0)
    styled: float = option(0.5, "share of captions with style words in the first step", ge=0, le=1)
    near_misses: int = option(3, "captions wrong in one word, for each picture", ge=1)
    rendered: int = option(4_000, "captions of which people are shown drawings", ge=1)
    sampled: int = option(1_200, "captions of which people are shown pictures of the tiny checkpoint", ge=0)
    candidates: int = option(4, "pictures of each caption; people compare every pair of them", ge=2)
    broken: float = option(0.3, "share of the drawings that break a claim of their caption", ge=0, le=1)
    choice_steps: int = option(1_000, "steps on people's choices", ge=1)
    choice_batch: int = option(16, "captions per step on people's choices", ge=1)
    choice_learning_rate: float = option(1e-3, "peak learning rate on people's choices", ge=0)
    captions_kept: float = option(0.5, "weight of the loss on captions during the steps on people's choices", ge=0)

    __post_init__ = check_options


@dataclass(frozen=True)
class WriterTraining:
    """Everything that decides the weights of the miniature writer. Raises ValueError outside the bounds."""

    seed: int = option(0, "seed of captions and weights", ge=0)
    steps: int = option(3_000, "optimizer steps", ge=1)
    batch: int = option(8, "rows of 128 tokens per step", ge=1)
    learning_rate: float = option(2e-3, "peak learning rate", ge=0)
    captions: int = option(3, "captions of one subject on a page, at most", ge=1)
    styled: float = option(0.5, "share of captions with style words", ge=0, le=1)
    lists: float = option(0.3, "share of pages that list words in any order instead, more than once", ge=0, le=1)

    __post_init__ = check_options
