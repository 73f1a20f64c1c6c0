"""Which transitions of a trajectory have the gradient: by the schedule alone, and as autograd finds it."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign import objectives
from diffalign.grids import FlowGrid, steps_down
from diffalign.schedule import FlowSchedule, NoiseSchedule, Schedule
from diffalign.sources.rollout import Sampling
from diffalign.sources.rounds import ruling_transition
from pipelines import config, families, ingredients

SHAPE = (4, 8, 8)


def table(prediction: str = "epsilon") -> NoiseSchedule:
    """Stable Diffusion's."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return NoiseSchedule((1 - betas).cumprod(0), prediction)


SCHEDULES = {"epsilon": table(), "v": table("v_prediction"), "flow": FlowSchedule(sigmas=FlowGrid(shift=3.0))}


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_shares_are_those_of_autograd(name: str, eta: float) -> None:
    schedule, generator = SCHEDULES[name], torch.Generator().manual_seed(0)
    grid = schedule.grid(6, SHAPE, "leading", 1)
    after, energy = steps_down(grid), []
    for t, t_after in zip(grid, after, strict=True):
        at = (t.expand(400), t_after.expand(400))
        x = torch.randn(400, 8, generator=generator, dtype=torch.float64)
        said = torch.randn(400, 8, generator=generator, dtype=torch.float64).requires_grad_()
        noise = torch.randn(400, 8, generator=generator, dtype=torch.float64)
        if not schedule.has_noise(*(value[:1] for value in at), eta).item():
            energy.append(0.0)
            continue
        drawn = schedule.ddim_step(x, said.detach(), *at, eta, noise)
        (gradient,) = torch.autograd.grad(schedule.log_density(drawn, x, said, *at, eta).sum(), said)
        energy.append(gradient.square().sum().item())
    found = torch.tensor(energy, dtype=torch.float64)
    torch.testing.assert_close(schedule.gradient_shares(grid, after, eta), found / found.sum(), rtol=0.1, atol=1e-6)


def test_the_last_steps_of_a_short_grid_rule_and_it_is_said_what_leaves_them_out() -> None:
    def told(schedule: Schedule, steps: int, share: float) -> tuple[float, float] | None:
        return ruling_transition(schedule, Sampling(steps), SHAPE, share)

    part, calmer = told(SCHEDULES["epsilon"], 20, 1.0)
    assert 0.6 < part < 0.9 and calmer == 0.9  # the transition to t = 1 is the last but one, and the last is the clean end's
    assert told(SCHEDULES["epsilon"], 20, 0.9) is None
    part, calmer = told(SCHEDULES["flow"], 20, 1.0)
    assert part > 0.98 and told(SCHEDULES["flow"], 20, calmer) is None and calmer < 0.9
    for steps in (5, 8, 10):  # where each one but the first rules those before it
        part, calmer = told(SCHEDULES["flow"], steps, 1.0)
        assert part > 0.99 and 2 / steps <= calmer < (steps - 1) / steps
        assert (told(SCHEDULES["flow"], steps, calmer) or (0.0, 0.0))[0] < 0.85
    part, calmer = told(SCHEDULES["flow"], 10, 0.2)
    assert part > 0.5 and math.isnan(calmer)
    assert told(SCHEDULES["flow"], 2, 0.5) is None  # one transition alone is all there is


@pytest.mark.parametrize("fraction", [1.0, 0.7])
def test_a_run_says_so(fraction: float) -> None:
    objective = objectives.load("d3po").Objective
    given = {"model": "tiny", "train_prompts": "tiny", "reward": ["tiny-pickscore"], "output": "never", "rollout_steps": 10}
    settings = config.resolve(config.placed({**given, "timestep_fraction": fraction}, objective), objective)
    line = ingredients._ruled_by_one(settings, families.load_family("tiny"))
    assert line == "" if fraction < 1 else "one transition near the clean end has 86.38% of the gradient's energy" in line
    assert fraction < 1 or "--timestep-fraction 0.8" in line
