"""The nouns: frozen dataclasses with a shape on every field.

Shape legend, used in the whole package: B = pairs in a batch, C, H, W = channels, height and width of the latents,
L = text tokens, D = width of the text embedding; of a language model's sequences, N = sequences, S = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Conditioning = Mapping[str, Tensor]
"""What a network is conditioned on, by argument name; every tensor is [B, ...]. SD: ``encoder_hidden_states`` [B, L, D]."""


WITHOUT_FLOAT64 = {"mps"}
"""Types of device that have no float64, and refuse tensors of it."""

WAITED_FOR = {"mps"}
"""Types of device that have to be waited for when something is sent: MPS may read what it is sent after the memory was freed, and
takes whatever lies there by then for the numbers (github.com/pytorch/pytorch/issues/189690)."""


def widest(where: Tensor | torch.device | str) -> torch.dtype:
    """float64, or float32 on MPS, which has no other; of a device, or of the one where a tensor is."""
    device = where.device if isinstance(where, Tensor) else torch.device(where)
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def placed(thing: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """A tensor on a device, or all tensors of a mapping, a tuple or a dataclass; floats in ``dtype`` if that is given.

    Copies to a GPU are asynchronous: one from pageable memory would wait until the device has finished its work, and the host
    with it, so memory is pinned before. From a device to the CPU a copy is complete when this returns. ``LENGTHS`` stay.
    Copies to MPS are synchronous (``WAITED_FOR``), and float64 becomes float32.
    """
    if isinstance(thing, Tensor):
        kind = torch.device(device).type
        if thing.dtype == torch.float64:
            thing = thing.to(widest(device))
        outwards = thing.device.type == "cpu" and kind != "cpu"
        if outwards and kind == "cuda":
            thing = thing.pin_memory()  # nothing if it is (``data.loader`` does it in the background)
        # Cast there: on the way it would be here, and not pinned.
        there = thing.to(device=device, non_blocking=outwards and kind not in WAITED_FOR)
        return there.to(dtype) if dtype and thing.is_floating_point() else there
    if isinstance(thing, Mapping):
        return {name: value if name == LENGTHS else placed(value, device, dtype) for name, value in thing.items()}
    if isinstance(thing, tuple):
        return tuple(placed(value, device, dtype) for value in thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{f.name: placed(getattr(thing, f.name), device, dtype) for f in fields(thing) if f.init})
    return thing


def pinned(thing: Any) -> Any:
    """A tensor in memory that a GPU can read without anybody's help, or all tensors of a mapping or a dataclass so."""
    if isinstance(thing, Tensor):
        return thing.pin_memory()
    if isinstance(thing, Mapping):
        return {name: value if name == LENGTHS else pinned(value) for name, value in thing.items()}
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{f.name: pinned(getattr(thing, f.name)) for f in fields(thing) if f.init})
    return thing


LENGTHS = "lengths"
"""Name in a conditioning of how many tokens each prompt has: [B] int64, on the CPU wherever the rest is. Networks that take rows
of different lengths (Z-Image) read it; from a mask on the device the host could only learn it by waiting."""

FRAMING = "framing"
"""Name in a conditioning of how the pictures came to be: [B, 6] float32, height and width of the original, top and left of the
crop after resizing, height and width of what is left. Rows of NaN are of pictures that a model sampled. It belongs to the
picture, not to the prompt; networks that were trained with such numbers (SDXL) read it, all others leave it alone."""

GUIDANCE = "guidance"
"""Name in a conditioning of the guidance scale [B], an input of networks that were distilled from guided predictions (FLUX). It
is the training's own unless ``diffalign.solvers.Guided`` sets another; other networks' conditionings lack it."""


def framed(conditioning: Conditioning, framing: Tensor | None) -> Conditioning:
    """The conditioning of prompts together with the framing [B, 6] of pictures, where that is known."""
    return conditioning if framing is None else {**conditioning, FRAMING: framing}


def on_both_sides(conditioning: Conditioning, framing: Tensor | None = None) -> Conditioning:
    """The conditioning [2 B, ...] of a stacked pair, winners first: the prompt's twice, and each picture's own ``framing``
    [B, 2, 6]."""
    twice = {name: torch.cat([value, value]) for name, value in conditioning.items()}
    return framed(twice, None if framing is None else torch.cat([framing[:, 0], framing[:, 1]]))


def against_sampled(framing: Tensor | None) -> Tensor | None:
    """The framing [B, 6] of winners as that of pairs [B, 2, 6] whose losers a model sampled."""
    return None if framing is None else torch.stack([framing, torch.full_like(framing, torch.nan)], dim=1)


@dataclass(frozen=True)
class PairBatch:
    """Pairs from a data set, encoded, with the random draws that belong to them.

    ``t`` and ``noise`` are drawn once per pair: winner and loser share them (Diffusion-DPO, arXiv 2311.12908, section 4).
    """

    winner: Tensor  # [B, C, H, W] clean latents x_0, scaled
    loser: Tensor  # [B, C, H, W] clean latents x_0, scaled
    conditioning: Conditioning
    t: Tensor  # [B] int64 in [0, T); of a flow float32 in (0, T]
    noise: Tensor  # [B, C, H, W]
    label: Tensor  # [B] probability that the winner is preferred; 1/2 is a tie
    weight: Tensor  # [B] factor on the pair's loss
    index: Tensor  # [B] int64, row of the data set
    scores: Tensor | None = None  # [B, 2] float32, a judge's score of winner and loser; NaN where a pair has none
    framing: Tensor | None = None  # [B, 2, 6] float32, of winner and loser, see ``FRAMING``
    known: Tensor | None = None  # [B, 2] float32, the frozen start's errors at this draw, where they are kept
    t_here: Tensor | None = None  # [B] the same t on the CPU, of a batch that is elsewhere
    noise_here: Tensor | None = None  # [B, C, H, W] the same noise on the CPU, as it was drawn

    def __len__(self) -> int:
        return len(self.t)

    @property
    def host_t(self) -> Tensor:
        """t on the CPU, for decisions that should not wait for the device (how often a network is called)."""
        return self.t.cpu() if self.t_here is None else self.t_here

    @property
    def host_noise(self) -> Tensor:
        """The noise on the CPU, for seeds that are made of it."""
        return self.noise.cpu() if self.noise_here is None else self.noise_here

    @property
    def winner_conditioning(self) -> Conditioning:
        """The conditioning [B, ...] of the winners alone: prompt and framing."""
        return framed(self.conditioning, None if self.framing is None else self.framing[:, 0])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PairBatch:
        """Move to a device; ``dtype`` applies to latents, noise and conditioning, never to labels, weights, scores or framing."""
        cast, plain = ("winner", "loser", "conditioning", "noise"), ("t", "label", "weight", "scores", "framing", "known")
        moved = {name: placed(getattr(self, name), device, dtype) for name in cast}
        moved |= {name: placed(getattr(self, name), device) for name in plain}
        return replace(self, **moved, t_here=self.host_t, noise_here=self.host_noise)

    def slice(self, start: int, stop: int) -> PairBatch:
        """Pairs ``start`` to ``stop`` of the batch."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        cut = {name: value[start:stop] for name, value in tensors.items()}
        return replace(self, conditioning={k: v[start:stop] for k, v in self.conditioning.items()}, **cut)


@dataclass(frozen=True)
class NoisyPair:
    """A pair at one noise level: what the network sees and what it should say."""

    winner: Tensor  # [B, C, H, W] x_t of the preferred sample
    loser: Tensor  # [B, C, H, W] x_t of the other one
    winner_target: Tensor  # [B, C, H, W] in the network's own parametrisation
    loser_target: Tensor  # [B, C, H, W]
    t: Tensor  # [B]
    conditioning: Conditioning
    framing: Tensor | None = None  # [B, 2, 6] float32, of winner and loser, see ``FRAMING``
    error_weight: Tensor | None = None  # [B] factor on both sides' errors (``Schedule.error_weight``); None is 1
    known: Tensor | None = None  # [B, 2] float32, the frozen start's errors of just this, where they are kept


@dataclass(frozen=True)
class Noisy:
    """Single samples at one noise level, as ``NoisyPair`` has two."""

    x_t: Tensor  # [B, C, H, W]
    target: Tensor  # [B, C, H, W] in the network's own parametrisation
    t: Tensor  # [B]
    conditioning: Conditioning
    error_weight: Tensor | None = None  # [B]
    known: Tensor | None = None  # [B] float32


@dataclass(frozen=True)
class TransitionPair:
    """The same step of two trajectories for one prompt: where each was, and where it went."""

    winner: Tensor  # [B, C, H, W] x_t on the preferred trajectory
    loser: Tensor  # [B, C, H, W] x_t on the other one
    winner_next: Tensor  # [B, C, H, W] stored x at t_previous
    loser_next: Tensor  # [B, C, H, W]
    t: Tensor  # [B]
    t_previous: Tensor  # [B]; -1 is the clean end
    conditioning: Conditioning


@dataclass(frozen=True)
class Texts:
    """Prompts, each followed by a completion, as a language model reads them; padded at the right to the longest."""

    tokens: Tensor  # [N, S] int64
    mask: Tensor  # [N, S] bool, a token and not padding
    completion: Tensor  # [N, S] bool, a token of the completion, its end mark included; never one of the prompt
    begins: int  # the position at which the first of the completions begins

    @staticmethod
    def of(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int = 0) -> Texts:
        """Texts from token ids. ``pad`` may be any token: it is masked everywhere.

        Raises:
            ValueError: a prompt or a completion has no token.
        """
        if not all(prompts) or not all(completions):
            raise ValueError("every prompt and every completion needs at least one token")
        longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        tokens = torch.full((len(prompts), longest), pad)
        mask, completion = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
        for n, (before, after) in enumerate(zip(prompts, completions, strict=True)):
            end = len(before) + len(after)
            tokens[n, :end] = torch.tensor([*before, *after])
            mask[n, :end], completion[n, len(before) : end] = True, True
        return Texts(tokens, mask, completion, min(map(len, prompts)))

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Texts:
        return placed(self, device)

    @property
    def lengths(self) -> Tensor:
        """[N] int64, tokens of the completions."""
        return self.completion.sum(dim=1)

    @staticmethod
    def stacked(*parts: Texts) -> Texts:
        """One after the other, to go through a model in one call; all padded to the same S."""
        columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "mask", "completion"))
        return Texts(*columns, min(part.begins for part in parts))

    def padded(self, length: int) -> Texts:
        """The same texts, padded to S = ``length``."""
        more = length - self.tokens.shape[1]
        return Texts(*(F.pad(x, (0, more)) for x in (self.tokens, self.mask, self.completion)), self.begins)


@dataclass(frozen=True)
class TextBatch:
    """Prompts with a preferred and a rejected completion each, B of them; all sequences are padded to the same S."""

    winner: Texts
    loser: Texts
    label: Tensor  # [B] probability that the winner is preferred; 1/2 is a tie
    weight: Tensor  # [B] factor on the pair's loss
    index: Tensor  # [B] int64, row of the data set
    distance: Tensor | None = None  # [B] of the winner from its prompt in an embedding of meaning, in [0, 2]
    scores: Tensor | None = None  # [B, 2] float32, a judge's score of winner and loser; NaN where a pair has none
    gold: Texts | None = None  # a reference completion of the same prompts
    token_rewards: tuple[Tensor, Tensor] | None = None  # [B, S] each: another model's reward of every token of winner and loser
    mismatched: Texts | None = None  # each prompt with the winner of the next one of the batch

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device | str) -> TextBatch:
        return replace(self, **{f.name: placed(getattr(self, f.name), device) for f in fields(self) if f.name != "index"})


@dataclass(frozen=True)
class LogLikelihood:
    """How likely one model finds the two sides of each pair, up to a constant; larger is likelier. float32 at least."""

    winner: Tensor  # [B]
    loser: Tensor  # [B]


@dataclass(frozen=True)
class LogRatio:
    """log-likelihood under the policy minus log-likelihood under the reference, for both sides. float32 at least."""

    winner: Tensor  # [B]
    loser: Tensor  # [B]

    @property
    def margin(self) -> Tensor:
        """[B] winner minus loser: positive where the policy has moved towards the preferred side."""
        return self.winner - self.loser


@dataclass(frozen=True)
class Outcome:
    """What an objective says about a batch: one loss per pair, and the numbers worth watching, one per pair."""

    loss: Tensor  # [B], before the pair's weight
    t: Tensor | None  # [B], where a pair stands on a schedule; None where there is none
    metrics: Mapping[str, Tensor]  # each [B], detached
