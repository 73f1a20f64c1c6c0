"""What tests give to an objective beside the network: scored pairs, single pictures, prompts, a judge that looks at latents.

And what they hold against it: gradients, a logistic loss and log-ratios by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from worlds import PairsInMemory, given, small_denoiser

from diffalign.data.cached_errors import with_known
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.learner import Kind, Learner, RunContext
from diffalign.likelihood import denoising, log_ratio, pair_errors
from diffalign.objectives._denoising import errors_beforehand
from diffalign.objectives.d3po import D3PO
from diffalign.objectives.ddpo import DDPO
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.diffusion_dro import DiffusionDRO
from diffalign.objectives.ipo import IPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.mapo import MaPO
from diffalign.objectives.seppo import SePPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.smpo import SmPO
from diffalign.optimisation import OptimizerSettings
from diffalign.processes import ManyProcesses
from diffalign.references import AdapterOff, Cached, Frozen
from diffalign.sources.dataset import noised
from diffalign.train import LoopSettings, Trainer
from diffalign.types import LogRatio, PairBatch
from pipelines import devices
from pipelines.families import _lora
from pipelines.families.stable_diffusion import UNetDenoiser

SEED = 5
LN2 = math.log(2.0)
OFF = 2e-3  # how far from the start a policy is, per weight


# ---------------------------------------------------------------------------------------------------------------- data


class ScoredPairs(PairsInMemory):
    """Pairs with a judge's scores, the last without. Their extremes are 0 and 1."""

    def __init__(self, n: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(n, seed, dtype)
        self.scores = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed + 1))
        self.scores[0] = torch.tensor([1.0, 0.0])
        self.scores[-1] = float("nan")


class PicturesInMemory(PairsInMemory):
    """Lone pictures, each on both sides of its pair; every third is a bad one."""

    def __init__(self, n: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(n, seed, dtype)
        self._means["loser"] = self._means["winner"]
        self.labels = [float(i % 3 != 0) for i in range(n)]


class PromptsInMemory:
    """Encoded prompts without pictures."""

    def __init__(self, n: int = 5, dtype: torch.dtype = torch.float32) -> None:
        self.prompts = [f"prompt {i}" for i in range(n)]
        self._text = torch.randn((n + 1, 7, 32), generator=torch.Generator().manual_seed(8)).to(dtype)

    def __len__(self) -> int:
        return len(self.prompts)

    def conditioning(self, index: int | None) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self._text[-1 if index is None else index]}


def brightness(latents: Tensor, prompts: Sequence[int]) -> Tensor:
    """A judge: the mean of the first channel, a little more for later prompts."""
    return (latents[:, 0].double().mean(dim=(1, 2)) + 0.1 * torch.as_tensor(prompts, dtype=torch.float64))[:, None]


def brightness_and_contrast(latents: Tensor, prompts: Sequence[int]) -> Tensor:
    """[N, 2]: two judges, of which the second speaks in thousands."""
    return torch.cat([brightness(latents, prompts), 1000.0 * latents.double().flatten(1).std(dim=1, keepdim=True)], dim=1)


PAIRS_OF: dict[str, Callable[..., PairsInMemory]] = {"pairs": ScoredPairs, "pictures": PicturesInMemory}


# ------------------------------------------------------------------------------------------------- objectives, made small


@dataclass(frozen=True)
class Case:
    """An objective, and what it learns from."""

    objective: Any
    batch: int = 2
    accumulation: int = 1
    kind: Kind = "pairs"
    judge: Callable[[Tensor, Sequence[int]], Tensor] = brightness


ROLLED = {"rollout_steps": 3, "guidance": 2.0}
"""Three transitions, of which the first two have a density."""
CASES = {
    "diffusion-dpo": Case(DiffusionDPO(beta=500)),
    "sft": Case(SFT()),
    "ipo": Case(IPO(beta=500)),
    "mapo": Case(MaPO()),
    "kto": Case(KTO(beta=200)),
    "kto of pictures": Case(KTO(beta=200), kind="pictures"),
    "smpo": Case(SmPO(beta=500, inversion_steps=3)),
    "smpo as ddim-inpo": Case(SmPO(beta=500, smoothing="label", gamma=1, inversion_steps=3, renoise=0, inversion_eta=0.1)),
    "seppo": Case(SePPO(beta=500, round_steps=3, **ROLLED)),
    "diffusion-dro": Case(DiffusionDRO(margin=0.05, refresh=3, buffer=5, rollout_steps=3)),
    "d3po": Case(D3PO(round_pairs=3, round_epochs=1, **ROLLED), accumulation=1),
    "ddpo": Case(DDPO(clip=0.1, round_pairs=3, least=2, **ROLLED), accumulation=1),
}


def seppo(**options) -> SePPO:
    return SePPO(**{"beta": 500, "rollout_steps": 2, "guidance": 1.0, **options})


def dro(**options) -> DiffusionDRO:
    return DiffusionDRO(**{"margin": 1.0, "rollout_steps": 3, **options})


def d3po(**options) -> D3PO:
    return D3PO(**{"round_pairs": 2, **ROLLED, **options})


def ddpo(**options) -> DDPO:
    return DDPO(**{"round_pairs": 2, "baseline": "round", "clip": 0.1, **ROLLED, **options})


def moved(network: torch.nn.Module, by: float = OFF, seed: int = 7) -> None:
    """Push what is trained a little way off, the same way for the same seed."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p))


def things_given(
    policy: UNetDenoiser,
    start: Any,
    case: Case,
    dtype: torch.dtype = torch.float64,
    rows: int = 10,
    device: Any = "cpu",
    **more: Any,
) -> RunContext:
    """All that a run can give, in memory."""
    pairs, prompts = PAIRS_OF[case.kind](12, dtype=dtype), PromptsInMemory(dtype=dtype)
    processes = more.get("processes")
    settings = LoaderSettings(case.batch, case.accumulation, seed=SEED, levels=policy.schedule.levels())
    where = (processes.rank, processes.world) if processes else (0, 1)
    scored = isinstance(pairs, ScoredPairs)
    defaults = {
        "kind": case.kind,
        "prompts": prompts,
        "unconditional": {name: value[None].to(device) for name, value in prompts.conditioning(None).items()},
        "judge": case.judge,
        "score_range": (0.0, 1.0) if scored else None,
        "batch_size": case.batch,
        "accumulation": case.accumulation,
        "sampling_batch": 5,
        "seed": SEED,
        "device": device,
    }
    return given(policy, start, PairLoader(pairs, range(rows), settings, *where), **{**defaults, **more})


def at_work(
    objective: Any,
    *,
    dtype: torch.dtype = torch.float64,
    by: float = 0.0,
    batch: int = 4,
    accumulation: int = 1,
    kind: Kind = "pairs",
    make: Callable[[torch.dtype], UNetDenoiser] = small_denoiser,
    **more: Any,
) -> tuple[Learner, RunContext]:
    """An objective at work on a policy that is ``by`` away from its start, fully trained."""
    policy, start = make(dtype), Frozen(make(dtype))
    moved(policy.network, by)
    all_given = things_given(policy, start, Case(objective, batch, accumulation, kind), dtype, **more)
    return objective.learner(all_given), all_given


def first_batch(learner: Learner, step: int = 0) -> Any:
    """The first micro-batch of a step."""
    return next(iter(learner.source.steps(step, step + 1)))[0]


def rows_of(thing: Any, rows: Sequence[int]) -> Any:
    """The rows of a batch, whatever it is made of."""
    if isinstance(thing, Tensor):
        return thing[list(rows)]
    if isinstance(thing, Mapping):
        return {name: rows_of(value, rows) for name, value in thing.items()}
    if is_dataclass(thing):
        return replace(thing, **{f.name: rows_of(getattr(thing, f.name), rows) for f in fields(thing)})
    return thing


def gradients(loss: Tensor, network: torch.nn.Module) -> Tensor:
    """All of them in one vector; zero where a parameter has no part in the loss."""
    trained = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(trained, found, strict=True)])


# -------------------------------------------------------------------------------------------------------------- by hand


def ratio_on(batch: PairBatch, policy: Any, reference: Any) -> LogRatio:
    """By hand: log-ratios of plainly noised pairs."""
    pair = noised(batch, policy.schedule)
    with torch.no_grad():
        return log_ratio(denoising(*pair_errors(policy, pair)), denoising(*pair_errors(reference, pair)))


def exchanged(batch: PairBatch) -> PairBatch:
    return replace(batch, winner=batch.loser, loser=batch.winner)


def logistic(h: Tensor) -> Tensor:
    return -F.logsigmoid(h)


# ----------------------------------------------------------------------------------------------------------- whole runs


def signs_are_of_rounding(row: Mapping[str, Any], zero: float = 1e-9) -> bool:
    """Whether the accuracy in a row of metrics counts signs of margins that are zero, as those of transitions are before a
    round's first update: one processor gives zero, another 1e-17 (1e-8 in float32: `zero`) of either sign, whatever the number
    of processes."""
    return abs(row.get("margin", 1.0)) < zero


def make_trainer(
    output: Path,
    case: Case,
    *,
    lora: bool,
    steps: int = 4,
    dtype: torch.dtype = torch.float32,
    learning_rate: float = 1e-3,
    accelerator: Accelerator | None = None,
    dropout: float = 0.0,
    make: Callable[[torch.dtype], UNetDenoiser] = small_denoiser,
    report: Callable[[int, Mapping[str, float]], None] = lambda step, numbers: None,
    loop: Mapping[str, Any] | None = None,
    draws: int = 2,
    beforehand: bool = False,
) -> Trainer:
    """A run on a small UNet; everything about it is a function of the arguments. ``beforehand``: validation alone looks at the
    reference, which was asked before the run."""
    accelerator = accelerator or Accelerator(cpu=True)
    torch.manual_seed(3)
    denoiser = make(dtype)
    if lora:
        _lora.attach(denoiser.network, rank=4, alpha=8, targets=("to_q", "to_v"), dropout=dropout, seed=1)
        denoiser.network.to(dtype)
    denoiser = denoiser.with_network(devices.wrapped(denoiser.network.train(), accelerator))
    if devices.is_sharding(accelerator):
        devices.shard(denoiser.network, accelerator)
    start = AdapterOff(denoiser) if lora else Frozen(make(dtype))
    visits = LoaderSettings(case.batch, seed=SEED, levels=denoiser.schedule.levels())
    held_out = validation_batches(PAIRS_OF["pairs"](12, dtype=dtype), [10, 11], visits, draws)
    if beforehand:
        ask = partial(errors_beforehand, start=start, schedule=denoiser.schedule, kind=case.kind)
        held_out, start = with_known(held_out, ask, ManyProcesses(accelerator)), Cached()
    all_given = things_given(denoiser, start, case, dtype, processes=ManyProcesses(accelerator), device=accelerator.device)
    output.mkdir(parents=True, exist_ok=True)
    return Trainer(
        learner=case.objective.learner(all_given),
        policy=denoiser,
        validation=held_out,
        accelerator=accelerator,
        output=output,
        loop=LoopSettings(**{"steps": steps, "checkpoint_every": 2, "validate_every": 2, **(loop or {})}),
        optimizer=OptimizerSettings(learning_rate=learning_rate),
        identity={},
        report=report,
        weights=all_given.weights,
        zero=devices.zero(accelerator),
    )
