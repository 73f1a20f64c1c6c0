"""Which noise levels are visited: distributions by their formulas, on tables and on flows, from the draw to the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from worlds import PairsInMemory, sd_alpha_bar

from diffalign.data.draws import draw, fixed_draws
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.errors import UserError
from diffalign.health import by_timestep
from diffalign.levels import LevelDistribution, Levels, shifted
from diffalign.schedule import FlowSchedule, NoiseSchedule
from pipelines.image_settings import DataSettings
from pipelines.ingredients import training_levels

N = 4000
SHAPES = {
    "uniform": LevelDistribution(),
    "logit-normal": LevelDistribution("logit-normal"),
    "SD3": LevelDistribution("logit-normal", mean=0.0, std=1.0, shift=3.0),
    "narrow": LevelDistribution("logit-normal", mean=-0.8, std=0.5),
    "mode": LevelDistribution("mode"),
    "ends": LevelDistribution("mode", scale=-1.0, shift=2.0),
}


def sigmas(levels: Levels, n: int = N) -> torch.Tensor:
    t = [draw(3, p, (1, 1, 1), levels, 0.0, False).t for p in range(n)]
    return torch.tensor(t, dtype=torch.float64) / levels.steps


# ------------------------------------------------------------------------------------------------------- Distributions


@pytest.mark.parametrize("distribution", SHAPES.values(), ids=SHAPES.keys())
def test_quantiles_rise_from_clean_to_noise(distribution: LevelDistribution) -> None:
    found = distribution.quantile(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert found[0].item() == pytest.approx(0.0, abs=1e-12) and found[-1].item() == pytest.approx(1.0, abs=1e-12)
    assert (found[1:] > found[:-1]).all()


@pytest.mark.parametrize("continuous", [False, True], ids=["table", "flow"])
def test_logit_normal_has_the_mean_and_deviation_that_were_asked_for(continuous: bool) -> None:
    levels = Levels(1000, continuous, LevelDistribution("logit-normal", mean=-0.8, std=0.5))
    found = sigmas(levels) + (0.0 if continuous else 0.0005)  # a step of a table stands for the levels up to the next one
    assert found.logit().mean().item() == pytest.approx(-0.8, abs=0.03)  # standard error 0.008
    assert found.logit().std().item() == pytest.approx(0.5, abs=0.03)


def test_a_shift_multiplies_the_odds() -> None:
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    plain, bent = (LevelDistribution("logit-normal", 0.3, 0.7, shift=shift).quantile(u) for shift in (1, 3))
    torch.testing.assert_close(bent / (1 - bent), 3.0 * plain / (1 - plain))
    assert shifted(torch.tensor(0.5), 3.0).item() == 0.75


def test_mode_is_the_papers_with_its_draw_turned_round() -> None:
    """SD3, eq. 20: f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), which falls with u."""
    u, s = torch.linspace(0, 1, 11, dtype=torch.float64), 0.81
    expected = 1 - u - s * ((math.pi / 2 * u).cos().square() - 1 + u)
    torch.testing.assert_close(LevelDistribution("mode", scale=s).quantile(1 - u), expected)


@pytest.mark.parametrize("name", ["uniform", "SD3", "mode"])
def test_draws_follow_the_quantiles(name: str) -> None:
    found = sigmas(Levels(1000, True, SHAPES[name]))
    inner = SHAPES[name].quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    shares = torch.bucketize(found, inner).bincount(minlength=10) / N
    assert (shares - 0.1).abs().max() < 0.02  # standard error 0.005
    assert found.min() > 0.0 and found.max() < 1.0


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="shape is one of uniform, logit-normal, mode"):
        LevelDistribution("normal")
    with pytest.raises(ValueError, match="std should be greater than 0"):
        LevelDistribution("logit-normal", std=0.0)
    with pytest.raises(ValueError, match="scale should be at most"):
        LevelDistribution("mode", scale=2.0)


# --------------------------------------------------------------------------------------------------- Draws and batches


def test_levels_of_a_table_are_its_steps_and_those_of_a_flow_are_any_numbers() -> None:
    table, flow = NoiseSchedule(sd_alpha_bar()).levels(), FlowSchedule().levels()
    assert table == Levels(1000, False, LevelDistribution()) and flow.distribution.shape == "logit-normal"
    assert all(isinstance(draw(0, p, (1, 1, 1), table, 0.0, False).t, int) for p in range(5))
    for distribution in SHAPES.values():
        t = [Levels(7, False, distribution).at(u) for u in (0.0, 0.5, 1.0)]
        assert t[0] == 0 and t[2] == 6 and all(isinstance(x, int) for x in t)
        t = [Levels(7, True, distribution).at(u) for u in (0.0, 0.5, 1.0)]
        assert 0.0 < t[0] < t[1] < t[2] < 7.0


def loaded(levels: Levels, rank: int = 0, world: int = 1, batch: int = 4) -> torch.Tensor:
    loader = PairLoader(PairsInMemory(12), range(12), LoaderSettings(batch, seed=5, levels=levels), rank, world)
    return torch.stack([step[0].t for step in loader.steps(0, 4)])


@pytest.mark.parametrize("levels", [Levels(), Levels(1000, False, SHAPES["SD3"]), Levels(1000, True, SHAPES["SD3"])])
def test_the_same_levels_on_any_number_of_processes(levels: Levels) -> None:
    whole = loaded(levels)
    assert whole.dtype == (torch.float32 if levels.continuous else torch.int64)
    assert torch.equal(torch.cat([loaded(levels, rank, 2, 2) for rank in (0, 1)], dim=1), whole)
    assert len(whole.unique()) > 10


def test_batches_keep_their_levels_when_everything_else_is_halved() -> None:
    settings = LoaderSettings(4, seed=5, levels=Levels(1000, True, SHAPES["SD3"]))
    (batch,) = next(iter(PairLoader(PairsInMemory(12), range(12), settings).steps(0, 1)))
    half = batch.to("cpu", torch.bfloat16)
    assert half.winner.dtype == torch.bfloat16 and torch.equal(half.t, batch.t)
    assert torch.equal(half.slice(1, 3).t, batch.t[1:3])


@pytest.mark.parametrize("name", SHAPES)
def test_validation_takes_one_level_of_each_equally_likely_part(name: str) -> None:
    levels = Levels(1000, True, SHAPES[name])
    edges = SHAPES[name].quantile(torch.linspace(0, 1, 6, dtype=torch.float64)[1:-1]) * 1000
    for row in range(20):
        t = torch.tensor([d.t for d in fixed_draws(5, row, (1, 2, 2), levels, 5)], dtype=torch.float64)
        assert torch.bucketize(t, edges).tolist() == [0, 1, 2, 3, 4]
    settings = LoaderSettings(4, seed=5, levels=levels)
    one, two = (validation_batches(PairsInMemory(12), [3, 7], settings, 5) for _ in range(2))
    assert all(torch.equal(a.t, b.t) and a.t.dtype == torch.float32 for a, b in zip(one, two, strict=True))


def test_bins_of_time_take_whole_numbers_and_others_and_the_very_end() -> None:
    metrics = {"margin": torch.tensor([1.0, 2.0, 3.0, 5.0])}
    bins = by_timestep(torch.tensor([0.01, 99.99, 100.0, 1000.0]), metrics, 1000)
    assert [(b["t_from"], b["count"], b["margin"]) for b in bins] == [(0, 2, 1.5), (100, 1, 3.0), (900, 1, 5.0)]
    bins = by_timestep(torch.tensor([0, 99, 100, 999]), metrics, 1000)
    assert [(b["t_from"], b["count"], b["margin"]) for b in bins] == [(0, 2, 1.5), (100, 1, 3.0), (900, 1, 5.0)]


# ------------------------------------------------------------------------------------------------------------- Settings


def test_auto_is_as_the_family_was_trained_and_any_constant_can_be_set() -> None:
    flow = FlowSchedule(trained_levels=LevelDistribution("logit-normal", shift=3.0))
    assert training_levels(DataSettings(), flow) == Levels(1000, True, flow.trained_levels)
    assert training_levels(DataSettings(level_shift=1.0), flow).distribution == LevelDistribution("logit-normal")
    other = training_levels(DataSettings(level_distribution="logit-normal", level_mean=0.5, level_std=0.8), flow).distribution
    assert other == LevelDistribution("logit-normal", mean=0.5, std=0.8)
    table = NoiseSchedule(sd_alpha_bar())
    assert training_levels(DataSettings(), table) == Levels()
    assert training_levels(DataSettings(level_distribution="mode", level_scale=0.5), table) == Levels(
        1000, False, LevelDistribution("mode", scale=0.5)
    )
    assert str(replace(flow.trained_levels, mean=-0.5)) == "logit-normal, mean -0.5, std 1, shift 3"


def test_a_constant_that_would_do_nothing_is_refused() -> None:
    table = NoiseSchedule(sd_alpha_bar())
    with pytest.raises(UserError, match=r"data\.level_mean would do nothing: noise levels are uniform, as the model was trained"):
        training_levels(DataSettings(level_mean=0.5), table)
    with pytest.raises(UserError, match=r"data\.level_std and data\.level_scale would do nothing: noise levels are uniform\."):
        training_levels(DataSettings(level_distribution="uniform", level_std=0.5, level_scale=1.0), FlowSchedule())
