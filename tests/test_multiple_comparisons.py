"""Statistics of several systems, categories and tests, by themselves; ``test_comparison`` has them in their place."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from diffalign.multiple_comparisons import macro_average, rank_systems, signed_rank_test


def test_signed_ranks_count_a_prompt_once_however_many_pictures_it_has() -> None:
    difference = np.array([1.0, 3.0, 5.0, -1.0, math.nan, 0.5, -7.0])
    prompts = np.array([7, 7, 7, 2, 2, 4, 9])
    assert signed_rank_test(difference, prompts) == pytest.approx(stats.wilcoxon([-1.0, 0.5, 3.0, -7.0]).pvalue, rel=1e-12)
    assert signed_rank_test(np.zeros(3), np.arange(3)) == 1.0
    assert math.isnan(signed_rank_test(np.full(2, math.nan), np.arange(2)))


def test_distances_of_independent_rates_to_their_ends_add_up_as_squares() -> None:
    """Down 0.3 and 0.4, up 0.05 and 0.12: roots of the sums of squares 0.5 and 0.13, over two categories 0.25 and 0.065."""
    found = macro_average(np.array([0.5, 0.7]), np.array([0.2, 0.3]), np.array([0.55, 0.82]))
    assert found == pytest.approx((0.6, 0.35, 0.665), rel=1e-12)


def test_equal_systems_share_the_better_rank() -> None:
    """On each of ten prompts the first two beat the third and tie with each other."""
    wins = np.tile([[0, 0.5, 1.0], [0.5, 0, 1.0], [0, 0, 0]], (10, 1, 1))
    found = rank_systems(wins, n_boot=50)
    assert found.rank.tolist() == found.rank_low.tolist() == found.rank_high.tolist() == [1, 1, 3]
    assert found.first.tolist() == [1.0, 1.0, 0.0]
    assert found.strength[0] == pytest.approx(found.strength[1]) and found.low == pytest.approx(found.strength)
