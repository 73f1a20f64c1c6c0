"""More than one system, category or test: statistics beside those of two systems (``diffalign.evaluate``).

Rankings of several systems, averages over several categories, p values of several tests, and a second test of the same
differences. Here, too, prompts ("groups") are what is counted and drawn anew, never single pictures.

Shapes: N = pictures, C = categories, S = systems, G = groups (prompts), R = bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMOOTHING = 1.0
"""Ties added between every two systems in the Bradley-Terry model: without them one that won all would be infinitely strong."""
_DRAWS_AT_ONCE = 2_000_000


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p value corrected for the number of tests (Holm 1979): from the smallest on, times how many are left, never falling.

    NaN is no test.
    """
    out = [math.nan] * len(p_values)
    order = sorted((k for k, p in enumerate(p_values) if not math.isnan(p)), key=lambda k: p_values[k])
    largest = 0.0
    for place, k in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[k]))
        out[k] = largest
    return out


def signed_rank_test(difference: np.ndarray, groups: np.ndarray) -> float:
    """Two-sided p value of Wilcoxon's signed ranks over the groups' mean differences; NaN if there are none.

    ``difference`` and ``groups`` are [N]; differences that are NaN are left out.
    """
    from scipy import stats

    keep = ~np.isnan(difference)
    if not keep.any():
        return np.nan
    _, codes = np.unique(groups[keep], return_inverse=True)
    per_group = np.bincount(codes, weights=difference[keep]) / np.bincount(codes)
    return float(stats.wilcoxon(per_group).pvalue) if per_group.any() else 1.0


def macro_average(rate: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[float, float, float]:
    """The mean of rates [C] that share no groups, and its interval, from the intervals ``low`` to ``high`` [C] of each.

    They are independent, so the squared distances from each rate to the ends of its interval add up (Zou and Donner 2008, the
    method of variance estimates recovery).
    """
    mean, n = float(rate.mean()), len(rate)
    low_end = mean - float(np.sqrt(np.sum((rate - low) ** 2))) / n
    high_end = mean + float(np.sqrt(np.sum((high - rate) ** 2))) / n
    return mean, low_end, high_end


@dataclass(frozen=True, eq=False)
class Ranking:
    """Bradley-Terry strengths of S systems with their intervals, and ranks, [S] each; equal strengths share the better rank."""

    strength: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rank: np.ndarray
    rank_low: np.ndarray
    rank_high: np.ndarray
    first: np.ndarray
    """Share of the replicates in which a system ranks first, alone or not."""


def rank_systems(wins: np.ndarray, *, n_boot: int, seed: int = 0, level: float = 0.95) -> Ranking:
    """Strengths and ranks, with intervals from groups drawn anew.

    ``wins`` [G, S, S]: how often system i beat system j in each group, a tie counting half for both. One group does not tell
    how much groups differ: intervals of strengths are NaN then, as is ``first``, and any rank is possible.
    """
    strength = bradley_terry(wins.sum(axis=0))
    if len(wins) == 1:
        unknown, lowest = np.full(len(strength), np.nan), np.ones(len(strength))
        return Ranking(strength, unknown, unknown, _ranks(strength), lowest, len(strength) * lowest, unknown)
    drawn = bradley_terry(_redrawn(wins, n_boot, seed))  # [R, S]
    ranks = _ranks(drawn)
    ends = [0.5 - 0.5 * level, 0.5 + 0.5 * level]
    low, high = np.quantile(drawn, ends, axis=0)
    rank_low, rank_high = np.quantile(ranks, ends, axis=0, method="inverted_cdf")
    return Ranking(strength, low, high, _ranks(strength), rank_low, rank_high, (ranks == 1).mean(axis=0))


def _ranks(strength: np.ndarray) -> np.ndarray:
    """Ranks of strengths [..., S], 1 for the strongest; those that differ by rounding only share the better rank."""
    return 1 + (strength[..., None, :] > strength[..., :, None] + 1e-9).sum(axis=-1)


def _redrawn(wins: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Sums [R, S, S] over G groups drawn with replacement."""
    rng, size = np.random.default_rng(seed), len(wins)
    flat, out = wins.reshape(size, -1), np.empty((n_boot, *wins.shape[1:]))
    at_once = max(1, _DRAWS_AT_ONCE // size)
    for start in range(0, n_boot, at_once):
        many = min(at_once, n_boot - start)
        drawn = rng.integers(size, size=(many, size)) + size * np.arange(many)[:, None]
        times = np.bincount(drawn.ravel(), minlength=many * size).reshape(many, size).astype(np.float64)
        out[start : start + many] = (times @ flat).reshape(many, *wins.shape[1:])
    return out


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Strengths [..., S] with mean zero that make the outcomes ``wins`` [..., S, S] likeliest, i over j.

    P(i beats j) = sigmoid(s_i - s_j) (Bradley and Terry 1952), with ``SMOOTHING`` ties added between every two; Newton's
    method, its steps kept below one.
    """
    from scipy.special import expit

    systems = wins.shape[-1]
    wins = wins + 0.5 * SMOOTHING * (1.0 - np.eye(systems))
    games = wins + np.swapaxes(wins, -1, -2)
    strength = np.zeros(wins.shape[:-1])
    for _ in range(200):
        chance = expit(strength[..., :, None] - strength[..., None, :])
        gradient = (wins - games * chance).sum(axis=-1)
        weight = games * chance * (1.0 - chance)
        # the likelihood does not change when all strengths grow alike; the constant fixes their mean
        curvature = weight.sum(axis=-1)[..., None] * np.eye(systems) - weight + 1.0 / systems
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        strength = strength + step / np.maximum(1.0, np.abs(step).max(axis=-1, keepdims=True))
        if np.abs(step).max() < 1e-9:
            break
    return strength - strength.mean(axis=-1, keepdims=True)
