"""Trajectories that a model makes itself, with everything a learner may ask about them afterwards.

The stochastic chain of D3PO (arXiv 2311.13231) and DDPO (arXiv 2305.13301): DDIM with eta = 1, guidance inside, and the
log-density of every transition under the model that made it. Or a deterministic one (eta = 0, DPM-Solver++) as Diffusion-DRO
(arXiv 2510.18353) keeps in its buffer, on a grid shifted for each sample.

A trajectory depends on its conditioning and its seeds and on nothing else: every sample draws from generators of its own, on
the CPU and in float32, so batch size, order and device change no draw. x_T has a seed separate from the steps', because D3PO
compares two trajectories that start from the same x_T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from diffalign.data.draws import derived_seed
from diffalign.grids import Spacing, steps_down
from diffalign.protocols import Predictor
from diffalign.schedule import Schedule
from diffalign.settings import check_options, option
from diffalign.solvers import DDIM, DPMSolver, Guided, Solver
from diffalign.types import Conditioning, placed, widest

SolverName = Literal["ddim", "dpm-solver++"]
_STREAMS = {"start": 1, "steps": 2, "shift": 3}


@dataclass(frozen=True)
class Sampling:
    """How trajectories are made. The defaults are D3PO's; ``DRO`` is Diffusion-DRO's."""

    steps: int = option(20, "number of sampling steps, each a transition of a trajectory", ge=1)
    solver: SolverName = option("ddim", "ddim (stochastic with eta) or dpm-solver++ (second order, deterministic)")
    eta: float = option(1.0, "noise of each DDIM step: 0 is none, 1 that of DDPM; dpm-solver++ ignores it", ge=0, le=1)
    guidance: float = option(5.0, "scale of classifier-free guidance; 1 switches it off and halves the cost", ge=0)
    spacing: Spacing = option("leading", "spacing of a table's levels: leading, trailing or linspace; flow models have their own")
    offset: int = option(1, "shift of a leading grid; 1 for SD1.5", ge=0)
    perturbed: bool = option(False, "shift the grid of each trajectory by a draw of up to a stride, instead of by offset")
    released: bool = option(False, "as the released DRO code, move all samples of a batch by the first one's noise levels")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def stochastic(self) -> bool:
        return self.solver == "ddim" and self.eta > 0


DRO = Sampling(solver="dpm-solver++", guidance=1.0, offset=0, perturbed=True)


@dataclass(frozen=True)
class Trajectory:
    """A batch of trajectories. B = trajectories, S = transitions; transition j leads from x[:, j] to x[:, j + 1]."""

    x: Tensor  # [B, S + 1, C, H, W], from x_T to the final latent
    t: Tensor  # [B, S] int64 (float32 of a flow), falling: the level of x[:, j]
    t_previous: Tensor  # [B, S] likewise: the level of x[:, j + 1]; -1 is the clean end
    prediction: Tensor  # [B, S, C, H, W], what the (guided) network said at (x[:, j], t[:, j])
    log_density: Tensor  # [B, S] float64, of x[:, j + 1] under the model that made it, mean over dimensions; 0 without noise
    has_noise: Tensor  # [B, S] bool: whether the transition is stochastic; only then it has a density
    index: Tensor  # [B] int64, which prompt (row of the conditioning) it was made for
    start_seed: Tensor  # [B] int64, of x_T
    seed: Tensor  # [B] int64, of everything after x_T

    def __len__(self) -> int:
        return len(self.t)

    @property
    def final(self) -> Tensor:
        """[B, C, H, W] the latents to decode."""
        return self.x[:, -1]

    def rows(self, which: Sequence[int] | Tensor | slice) -> Trajectory:
        """The trajectories ``which``, in that order."""
        return Trajectory(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    def labelled(self, index: Tensor) -> Trajectory:
        """The same with another ``index`` [B]: what their prompts are called elsewhere."""
        return replace(self, index=index)

    def to(self, device: torch.device | str) -> Trajectory:
        return placed(self, device)

    @staticmethod
    def join(parts: Sequence[Trajectory]) -> Trajectory:
        """All of ``parts`` in a row; they must have the same number of transitions and shape of latents."""
        return Trajectory(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Trajectory)})


@torch.no_grad()
def rollout(
    predictor: Predictor,
    schedule: Schedule,
    conditioning: Conditioning,
    sampling: Sampling,
    *,
    shape: tuple[int, ...],
    seeds: Sequence[int],
    start_seeds: Sequence[int] | None = None,
    index: Sequence[int] | None = None,
    unconditional: Mapping[str, Tensor] | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Trajectory:
    """One trajectory per seed, without gradient, ``batch_size`` at a time; the result is on the CPU.

    Args:
        conditioning: the prompts' tensors, each [P, ...].
        shape: of one latent, [C, H, W].
        seeds: of the steps' noise and of the grid's shift, one per trajectory, 0 or more.
        start_seeds: of x_T; default: ``seeds``. Give two trajectories the same one to let them start from the same x_T.
        index: which prompt each trajectory is for, each in [0, P); default: trajectory i is for prompt i.
        unconditional: the empty prompt's tensors, each [1, ...]; needed unless ``sampling.guidance`` is 1.

    Raises:
        ValueError: the lengths do not fit, or there is guidance without an empty prompt.
    """
    starts = list(seeds) if start_seeds is None else list(start_seeds)
    prompts = list(range(len(seeds))) if index is None else list(index)
    if not len(seeds) == len(starts) == len(prompts):
        raise ValueError(f"one seed, start seed and prompt per trajectory; got {len(seeds)}, {len(starts)} and {len(prompts)}")
    if sampling.guidance != 1.0:
        if unconditional is None:
            raise ValueError(f"guidance = {sampling.guidance} compares with the empty prompt: give its tensors as unconditional")
        predictor = Guided(predictor, unconditional, sampling.guidance)
    parts = []
    for low in range(0, len(seeds), batch_size):
        part = slice(low, low + batch_size)
        rows = torch.tensor(prompts[part])
        here = placed({name: value[placed(rows, value.device)] for name, value in conditioning.items()}, device)
        x_start = _normal(starts[part], "start", shape, device)
        draw = _Steps(seeds[part], shape, device) if sampling.stochastic else None
        grid = placed(_grid(schedule, sampling, shape, seeds[part]), device)
        made = chain(predictor, schedule, x_start, here, grid, sampling, draw)
        parts.append(_labelled(made, rows, starts[part], seeds[part]).to("cpu"))
    return Trajectory.join(parts)


@torch.no_grad()
def chain(
    predictor: Predictor,
    schedule: Schedule,
    x_start: Tensor,
    conditioning: Conditioning,
    grid: Tensor,
    sampling: Sampling,
    noise: Callable[[int], Tensor] | None = None,
) -> Trajectory:
    """The trajectories from given x_T [B, ...] along a given ``grid`` [B, S]; ``noise(j)`` [B, ...] is that of transition j.

    Of ``sampling``, only solver, eta and ``released`` are read. Seeds and prompts are left as -1.
    """
    solver: Solver = (
        DDIM(schedule, grid, sampling.eta) if sampling.solver == "ddim" else DPMSolver(schedule, grid, released=sampling.released)
    )
    down, eta = steps_down(grid), sampling.eta if sampling.stochastic else 0.0
    x, predictions, densities = [x_start], [], []
    for j in range(grid.shape[1]):
        said = predictor(x[j], grid[:, j], conditioning)
        x.append(solver.step(j, x[j], said, noise(j) if sampling.stochastic else None).to(x_start.dtype))
        predictions.append(said.to(x_start.dtype))
        densities.append(_density(schedule, x[j + 1], x[j], said, grid[:, j], down[:, j], eta))
    nobody = torch.full((len(grid),), -1, device=grid.device)
    return Trajectory(
        x=torch.stack(x, dim=1),
        t=grid,
        t_previous=down,
        prediction=torch.stack(predictions, dim=1),
        log_density=torch.stack(densities, dim=1),
        has_noise=schedule.has_noise(grid, down, eta),
        index=nobody,
        start_seed=nobody,
        seed=nobody,
    )


def _density(
    schedule: Schedule, x_previous: Tensor, x_t: Tensor, said: Tensor, t: Tensor, t_previous: Tensor, eta: float
) -> Tensor:
    if not eta:
        return x_t.new_zeros(len(t), dtype=widest(x_t))
    return schedule.log_density(x_previous, x_t, said, t, t_previous, eta).nan_to_num(nan=0.0)


def _grid(schedule: Schedule, sampling: Sampling, shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """[B, S]: one grid for all, or each shifted by its own draw."""
    if sampling.perturbed:
        return schedule.perturbed(sampling.steps, shape, [_generator(seed, "shift") for seed in seeds])
    return schedule.grid(sampling.steps, shape, sampling.spacing, sampling.offset).expand(len(seeds), -1).contiguous()


def _generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator of its own for one purpose of one trajectory."""
    return torch.Generator().manual_seed(derived_seed(seed, _STREAMS[stream]))


def _normal(seeds: Sequence[int], stream: str, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    return placed(torch.stack([torch.randn(shape, generator=_generator(seed, stream)) for seed in seeds]), device)


class _Steps:
    """The noise of the transitions, one after the other."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str) -> None:
        self._generators = [_generator(seed, "steps") for seed in seeds]
        self._shape, self._device = shape, device

    def __call__(self, j: int) -> Tensor:
        return placed(torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]), self._device)


def _labelled(made: Trajectory, rows: Tensor, starts: Sequence[int], seeds: Sequence[int]) -> Trajectory:
    given = {"index": rows, "start_seed": torch.tensor(starts), "seed": torch.tensor(seeds)}
    return Trajectory(**{f.name: given.get(f.name, getattr(made, f.name)) for f in fields(Trajectory)})
