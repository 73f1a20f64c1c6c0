"""Win rates, means and intervals against numbers derived by hand, and the interval's promise on simulated data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtri

from diffalign import evaluate
from diffalign.evaluate import effect_size, mean_with_interval, paired_difference, win_rate

NAN = float("nan")


def test_win_rate_counts_a_tie_as_half_a_win():
    """b - a = (+1, +1, 0, -1): two wins, a tie, a loss, so (2 + 1/2) / 4 = 0.625. Sign test on 2 of 3: p = 1."""
    won = win_rate([0, 0, 0, 1], [1, 1, 0, 0])
    assert (won.wins, won.ties, won.losses) == (2, 1, 1)
    assert won.rate == 0.625
    assert won.p_value == 1.0
    assert won.low < 0.625 < won.high


def test_sign_test_is_two_sided_and_exact():
    """Nine wins and one loss: 2 * (C(10,0) + C(10,1)) / 2**10 = 22 / 1024. Ties change nothing."""
    a, b = np.zeros(14), np.array([1.0] * 9 + [-1.0] + [0.0] * 4)
    assert win_rate(a, b).p_value == pytest.approx(22 / 1024, rel=1e-12)
    assert win_rate(a[:10], b[:10]).p_value == pytest.approx(22 / 1024, rel=1e-12)


def test_sign_test_counts_a_prompt_once_however_many_pictures_it_has():
    """Six prompts with four pictures each; five prompts mostly won, one mostly lost: 2 * (1 + 6) / 2**6 = 14 / 64."""
    b = np.concatenate([np.tile([1, 1, 1, -1], 5), [-1, -1, 1, -1]]).astype(float)
    won = win_rate(np.zeros(24), b, groups=np.repeat(np.arange(6), 4))
    assert (won.wins, won.losses, won.groups) == (16, 8, 6)
    assert won.p_value == pytest.approx(14 / 64, rel=1e-12)


def test_tie_tolerance_makes_small_differences_ties():
    won = win_rate([0.0, 0.0, 0.0], [0.05, 0.2, -0.1], tie_tolerance=0.1)
    assert (won.wins, won.ties, won.losses) == (1, 2, 0)
    with pytest.raises(ValueError, match="tie_tolerance"):
        win_rate([0.0], [1.0], tie_tolerance=-1.0)


def test_swapping_the_systems_mirrors_everything():
    rng = np.random.default_rng(5)
    a, groups = rng.normal(size=90).round(1), np.repeat(np.arange(30), 3)
    b = (a + rng.normal(0.3, 1.0, 90)).round(1)
    there, back = win_rate(a, b, groups=groups), win_rate(b, a, groups=groups)
    assert there.rate == pytest.approx(1 - back.rate, abs=1e-12)
    assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low), abs=1e-12)
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)
    assert there.p_value == back.p_value
    forth, back = paired_difference(a, b, groups=groups), paired_difference(b, a, groups=groups)
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-12)


def test_unanimous_outcome_still_has_an_interval():
    """20 of 20: resampling would say 100 % to 100 %. Wilson: low = n / (n + z**2) = 20 / 23.8415 = 0.83887."""
    won = win_rate(np.zeros(20), np.ones(20))
    assert (won.rate, won.high) == (1.0, 1.0)
    assert won.low == pytest.approx(20 / (20 + ndtri(0.975) ** 2), rel=1e-12)
    lost = win_rate(np.ones(20), np.zeros(20))
    assert (lost.low, lost.high) == pytest.approx((0.0, 1 - won.low), abs=1e-12)
    assert win_rate(np.zeros(60), np.ones(60)).high == 1.0


def test_scores_that_are_not_numbers_are_left_out_and_counted():
    won = win_rate([0.0, NAN, 0.0, 0.0], [1.0, 1.0, NAN, -1.0])
    assert (won.wins, won.losses, won.excluded, won.groups) == (1, 1, 2, 2)
    mean = mean_with_interval([1.0, NAN, 3.0])
    assert (mean.mean, mean.n, mean.excluded) == (2.0, 2, 1)
    difference = paired_difference([1.0, NAN, 3.0], [2.0, 2.0, NAN])
    assert (difference.mean, difference.n, difference.excluded) == (1.0, 1, 2)
    nothing = win_rate([NAN], [1.0])
    assert math.isnan(nothing.rate) and nothing.excluded == 1 and nothing.p_value == 1.0
    assert math.isnan(mean_with_interval([NAN, NAN]).mean)


def test_equal_infinities_are_a_tie():
    won = win_rate([math.inf, -math.inf, 0.0], [math.inf, math.inf, math.inf])
    assert (won.wins, won.ties, won.losses, won.excluded) == (2, 1, 0, 0)


def test_interval_of_the_mean_agrees_with_the_normal_one_where_that_holds():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = mean_with_interval(x)
    half = ndtri(0.975) * x.std() / math.sqrt(400)
    assert found.mean == pytest.approx(x.mean(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)
    wider = mean_with_interval(x, level=0.99)
    assert wider.low < found.low and wider.high > found.high


def test_pictures_of_one_prompt_are_one_observation():
    """Four identical pictures per prompt say no more than one: the interval is as wide as without them."""
    rng = np.random.default_rng(1)
    b = rng.normal(0.3, 1.0, size=60)
    once = paired_difference(np.zeros(60), b)
    groups = np.repeat(np.arange(60), 4)
    clustered = paired_difference(np.zeros(240), np.repeat(b, 4), groups=groups)
    naive = paired_difference(np.zeros(240), np.repeat(b, 4))
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert (naive.high - naive.low) == pytest.approx(0.5 * (once.high - once.low), rel=0.1)


def test_groups_may_be_any_labels_in_any_order():
    rng = np.random.default_rng(2)
    b, order = rng.normal(size=40), rng.permutation(40)
    labels = [f"prompt {i % 10}" for i in range(40)]
    straight = win_rate(np.zeros(40), b, groups=labels)
    mixed = win_rate(np.zeros(40), b[order], groups=[labels[i] for i in order])
    assert straight.groups == mixed.groups == 10
    assert (straight.rate, straight.p_value) == (mixed.rate, mixed.p_value)


def test_one_prompt_has_no_interval_and_its_win_rate_has_wilsons():
    for found in (mean_with_interval([1.0, 2.0, 4.0], groups=["x"] * 3), paired_difference([1.0, NAN], [3.0, 4.0])):
        assert found.groups == 1 and not math.isnan(found.mean) and math.isnan(found.low) and math.isnan(found.high)
    won = win_rate([0.0, 0.0], [1.0, 1.0], groups=["x", "x"])
    assert won.rate == 1.0 and won.low == pytest.approx(0.2065, abs=1e-4) and won.high == 1.0


def test_equal_seeds_give_equal_intervals_whatever_the_chunks(monkeypatch):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=70), rng.normal(size=70)
    first, again, other = (paired_difference(a, b, seed=seed) for seed in (4, 4, 5))
    assert first == again
    assert first != other
    monkeypatch.setattr(evaluate, "_DRAWS_AT_ONCE", 70 * 333)
    assert paired_difference(a, b, seed=4) == first


def test_effect_size_is_mean_over_spread_of_the_prompts():
    """Prompt means of b - a are 1 and 3: mean 2, sample standard deviation sqrt(2), d_z = sqrt(2)."""
    found = effect_size([0, 0, 0, 0], [0, 2, 2, 4], groups=["x", "x", "y", "y"])
    assert found == pytest.approx(math.sqrt(2), rel=1e-12)
    assert math.isnan(effect_size([0.0, 0.0], [1.0, 1.0]))


@pytest.mark.parametrize(
    ("a", "b", "groups", "message"),
    [
        ([1.0, 2.0], [1.0], None, "paired by position"),
        ([], [], None, "one score per picture"),
        ([[1.0]], [[1.0]], None, "one score per picture"),
        ([1.0, 2.0], [1.0, 2.0], ["x"], "one group per picture"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(a, b, groups, message):
    with pytest.raises(ValueError, match=message):
        win_rate(a, b, groups=groups)


def test_interval_covers_the_truth_as_often_as_it_says():
    """Four pictures each of 60 prompts, correlated within a prompt, true win rate 60 %, 200 repetitions.

    A right 95 % interval holds the truth in 190 of 200, give or take 3.1; one that takes pictures for independent, in
    about 170.
    """
    rng, truth, groups = np.random.default_rng(7), 0.6, np.repeat(np.arange(60), 4)
    covered, naive = 0, 0
    for seed in range(200):
        shared, own = rng.normal(size=(60, 1)), rng.normal(size=(60, 4))
        b = (ndtri(truth) * math.sqrt(2) + shared + own).ravel()
        won = win_rate(np.zeros(240), b, groups=groups, n_boot=800, seed=seed)
        wrong = win_rate(np.zeros(240), b, n_boot=800, seed=seed)
        covered += won.low <= truth <= won.high
        naive += wrong.low <= truth <= wrong.high
    assert 180 <= covered <= 199
    assert naive < covered - 8
