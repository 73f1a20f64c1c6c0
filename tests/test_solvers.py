"""Solvers against Diffusers, by their order of convergence, and with a grid for each sample; guidance by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from worlds import sd_alpha_bar, small_denoiser

from diffalign.grids import perturbed_grid, timestep_grid
from diffalign.schedule import NoiseSchedule
from diffalign.solvers import DDIM, DPMSolver, Guided

VARIANCE = 0.3


def schedule(kind: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule(sd_alpha_bar(torch.float64), kind)


class Gaussian:
    """The exact predictor of data N(0, VARIANCE): the best guess of the noise is linear in x_t, and the flow is known."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self._schedule = schedule

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: dict) -> torch.Tensor:
        a, s = self._schedule.coefficients(t, x_t)
        return s * x_t / (a.square() * VARIANCE + s.square())

    def flow(self, x: torch.Tensor, t_from: torch.Tensor, t_to: torch.Tensor) -> torch.Tensor:
        """Where the probability flow carries x: it keeps the number of standard deviations."""
        (a, s), (b, r) = self._schedule.coefficients(t_from, x), self._schedule.coefficients(t_to, x)
        return x * ((b.square() * VARIANCE + r.square()) / (a.square() * VARIANCE + s.square())).sqrt()


def walked(solver, predictor, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    for i in range(grid.shape[1]):
        x = solver.step(i, x, predictor(x, grid[:, i], {}))
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [2, 8, 20])
def test_dpm_solver_is_that_of_diffusers(steps: int, kind: str) -> None:
    theirs = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)
    theirs.set_timesteps(steps)
    grid = theirs.timesteps.expand(2, -1)
    said = torch.randn(steps, 2, 4, 3, dtype=torch.float64)
    x = expected = torch.randn(2, 4, 3, dtype=torch.float64)
    solver = DPMSolver(schedule(kind), grid)
    for i, t in enumerate(theirs.timesteps):
        x = solver.step(i, x, said[i])
        expected = theirs.step(said[i], t, expected).prev_sample  # moves in float32
        torch.testing.assert_close(x, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_each_sample_walks_its_own_grid_whatever_stands_beside_it() -> None:
    grid = perturbed_grid(1000, 8, torch.tensor([0, 124, 60]))
    x, predictor = torch.randn(3, 4, 2, dtype=torch.float64), Gaussian(schedule())
    together = walked(DPMSolver(schedule(), grid), predictor, x, grid)
    turned = walked(DPMSolver(schedule(), grid.flip(0)), predictor, x.flip(0), grid.flip(0)).flip(0)
    alone = torch.cat([walked(DPMSolver(schedule(), grid[[i]]), predictor, x[[i]], grid[[i]]) for i in range(3)])
    assert torch.equal(together, turned)
    assert torch.equal(together, alone)
    released = walked(DPMSolver(schedule(), grid, released=True), predictor, x, grid)
    assert torch.equal(released[0], together[0])
    assert not torch.allclose(released[1:], together[1:], atol=1e-2)


def test_dpm_solver_is_of_second_order_and_ddim_of_first() -> None:
    """From t = 999 down to t = 200, where the exact flow is known; the last, first-order step is left out."""
    start, end = torch.tensor([999]), 200
    x, predictor = torch.ones(1, 1, dtype=torch.float64), Gaussian(schedule())
    exact = predictor.flow(x, start, torch.tensor([end]))
    errors = {}
    for kind in (DDIM, DPMSolver):
        for steps in (25, 50, 100):
            levels = torch.linspace(999, end, steps + 1).round().long()[None]
            solver, y = kind(schedule(), levels), x
            for i in range(steps):
                y = solver.step(i, y, predictor(y, levels[:, i], {}))
            errors[kind, steps] = (y - exact).abs().item()
    for fine, coarse in ((50, 25), (100, 50)):
        assert 1.7 < errors[DDIM, coarse] / errors[DDIM, fine] < 2.4
        assert errors[DPMSolver, coarse] / errors[DPMSolver, fine] > 3.2
    assert errors[DPMSolver, 25] < 0.2 * errors[DDIM, 25]


def test_a_multistep_solver_takes_its_steps_in_turn_and_no_noise() -> None:
    grid, x = timestep_grid(1000, 4)[None], torch.zeros(1, 2)
    solver = DPMSolver(schedule(), grid)
    solver.step(0, x, x)
    with pytest.raises(ValueError, match="step 1 is due, not 2"):
        solver.step(2, x, x)
    with pytest.raises(ValueError, match="takes no noise"):
        solver.step(1, x, x, x)


# ------------------------------------------------------------------------------------------------------------- Guidance


class Counted:
    def __init__(self, predictor) -> None:
        self._predictor = predictor
        self.rows: list[int] = []

    def __call__(self, x_t, t, conditioning):
        self.rows.append(len(x_t))
        return self._predictor(x_t, t, conditioning)


def test_guidance_is_one_call_of_both_halves() -> None:
    network = small_denoiser(torch.float64)
    counted, empty = Counted(network), {"encoder_hidden_states": torch.randn(1, 7, 32)}
    x, t, text = torch.randn(3, 4, 8, 8).double(), torch.tensor([5, 500, 999]), {"encoder_hidden_states": torch.randn(3, 7, 32)}
    with torch.no_grad():
        guided = Guided(counted, empty, 5.0)(x, t, text)
        without = network(x, t, {"encoder_hidden_states": empty["encoder_hidden_states"].expand(3, -1, -1)})
        given = network(x, t, text)
    assert counted.rows == [6]
    torch.testing.assert_close(guided, 5.0 * given - 4.0 * without, rtol=0, atol=1e-9)


def test_without_guidance_the_empty_prompt_costs_nothing() -> None:
    counted = Counted(small_denoiser())
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), {"encoder_hidden_states": torch.randn(2, 7, 32)}
    with torch.no_grad():
        Guided(counted, {}, 1.0)(x, t, text)
    assert counted.rows == [2]
    with pytest.raises(ValueError, match="unconditional counterpart of encoder_hidden_states"):
        Guided(counted, {}, 2.0)(x, t, text)
