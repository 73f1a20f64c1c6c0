"""Is the tuned model better than the base, and how sure can one be? Statistics over paired scores.

Both models answer the same prompts from the same noise, so scores come in pairs. Several pictures of one prompt resemble
each other and count as one observation: everything here resamples whole prompts ("groups"), never single pictures.
Taking pictures for independent makes a nominal 95 % interval cover about 87 % at four pictures per prompt.

Shapes: N = pictures, G = groups (prompts), R = bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Groups = Sequence[Hashable] | NDArray
    """One label per picture; pictures with equal labels belong to one prompt."""

REPLICATES = 10_000
_DRAWS_AT_ONCE = 2_000_000  # 16 MB of indices


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, which is NaN where one group is all there is: how much groups differ is not known.

    ``n`` counts what entered, ``excluded`` the scores that were not a number.
    """

    mean: float
    low: float
    high: float
    n: int
    groups: int
    excluded: int


@dataclass(frozen=True)
class WinRate:
    """How often the tuned picture beats the base picture of the same prompt and noise.

    ``rate`` = P(win) + P(tie) / 2. ``wins``, ``ties`` and ``losses`` count pictures. ``p_value`` is that of the two-sided
    exact sign test over groups. ``excluded`` counts the pairs in which a score was not a number.
    """

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    p_value: float
    groups: int
    excluded: int


def win_rate(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: Groups | None = None,
    tie_tolerance: float = 0.0,
    n_boot: int = REPLICATES,
    seed: int = 0,
    level: float = 0.95,
) -> WinRate:
    """Win rate of ``b`` (tuned) over ``a`` (base), both [N], larger is better; paired by position.

    A pair is a tie when its scores differ by at most ``tie_tolerance``. The interval is a BCa bootstrap over groups
    (Efron 1987). Where every replicate is the same (all won, all lost, one group), resampling has nothing to say, and the
    interval is Wilson's with one observation per group.

    Raises:
        ValueError: the lengths differ, or there is nothing to compare.
    """
    if tie_tolerance < 0:
        raise ValueError(f"tie_tolerance must not be negative; got {tie_tolerance}")
    difference, codes, excluded = _paired(a, b, groups)
    if len(difference) == 0:
        return WinRate(np.nan, np.nan, np.nan, 0, 0, 0, 1.0, 0, excluded)
    outcome = np.where(np.abs(difference) <= tie_tolerance, 0.0, np.sign(difference))  # [N] of -1, 0, 1
    sums, counts = _per_group(0.5 * (1.0 + outcome), codes)
    rate, low, high = _bca(sums, counts, n_boot, seed, level)
    if not low < high:
        low, high = _wilson(rate, len(counts), level)
    return WinRate(
        rate=rate,
        low=low,
        high=high,
        wins=int((outcome > 0).sum()),
        ties=int((outcome == 0).sum()),
        losses=int((outcome < 0).sum()),
        p_value=_sign_test(sums - 0.5 * counts),
        groups=len(counts),
        excluded=excluded,
    )


def mean_with_interval(
    x: ArrayLike, *, groups: Groups | None = None, n_boot: int = REPLICATES, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of ``x`` [N] with a BCa bootstrap interval over groups; scores that are NaN are left out and counted.

    Raises:
        ValueError: ``x`` is empty or not one-dimensional.
    """
    values = _vector(x, "x")
    codes = _codes(groups, len(values))
    keep = ~np.isnan(values)
    excluded = int((~keep).sum())
    if excluded == len(values):
        return Interval(np.nan, np.nan, np.nan, 0, 0, excluded)
    sums, counts = _per_group(values[keep], codes[keep])
    mean, low, high = _bca(sums, counts, n_boot, seed, level)
    return Interval(mean, low, high, int(keep.sum()), len(counts), excluded)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: Groups | None = None,
    n_boot: int = REPLICATES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of ``b - a``, both [N], with a bootstrap interval over groups: what the tuned model adds.

    Raises:
        ValueError: the lengths differ, or there is nothing to compare.
    """
    first, second = _same_length(a, b)
    return mean_with_interval(second - first, groups=groups, n_boot=n_boot, seed=seed, level=level)


def effect_size(a: ArrayLike, b: ArrayLike, *, groups: Groups | None = None) -> float:
    """d_z: the mean difference of the groups divided by its standard deviation over groups; NaN where that is zero."""
    difference, codes, _ = _paired(a, b, groups)
    if len(difference) == 0:
        return float("nan")
    sums, counts = _per_group(difference, codes)
    per_group = sums / counts
    spread = per_group.std(ddof=1) if len(per_group) > 1 else 0.0
    return float(per_group.mean() / spread) if spread > 0 else float("nan")


# -------------------------------------------------------------------------------------------------------------- input


def _vector(x: ArrayLike, name: str) -> np.ndarray:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must hold one score per picture, shape [N] with N > 0; got shape {values.shape}")
    return values


def _same_length(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = _vector(a, "a"), _vector(b, "b")
    if len(first) != len(second):
        raise ValueError(f"scores are paired by position, so both sides need as many; got {len(first)} and {len(second)}")
    return first, second


def _codes(groups: Groups | None, n: int) -> np.ndarray:
    """A number in [0, G) for every picture, in order of first appearance."""
    if groups is None:
        return np.arange(n)
    labels = list(groups)
    if len(labels) != n:
        raise ValueError(f"groups must name one group per picture; got {len(labels)} labels for {n} pictures")
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels])


def _paired(a: ArrayLike, b: ArrayLike, groups: Groups | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Differences b - a and group codes of the pairs in which both scores are numbers, and how many are not."""
    first, second = _same_length(a, b)
    codes = _codes(groups, len(first))
    keep = ~(np.isnan(first) | np.isnan(second))
    # equal infinities are a tie, and inf - inf is not a number
    difference = np.where(first == second, 0.0, second - np.where(first == second, 0.0, first))
    return difference[keep], codes[keep], int((~keep).sum())


def _per_group(values: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of each group that has any values, [G] each."""
    _, dense = np.unique(codes, return_inverse=True)
    return np.bincount(dense, weights=values), np.bincount(dense).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------- intervals


def _bca(sums: np.ndarray, counts: np.ndarray, n_boot: int, seed: int, level: float) -> tuple[float, float, float]:
    """Mean and its bias-corrected and accelerated interval, resampling groups with their sums and counts, [G] each.

    The interval of a single group is NaN: drawing it again and again would say that the mean is known exactly.
    With z0 the bias and a the acceleration, the ends are the quantiles Phi(z0 + (z0 + z) / (1 - a (z0 + z))) of the
    replicates (Efron 1987, equation 2.3); z = -1.96 and 1.96 at 95 %.
    """
    from scipy.special import ndtr, ndtri

    mean = float(sums.sum() / counts.sum())
    if len(counts) == 1:
        return mean, np.nan, np.nan
    replicates = _replicates(sums, counts, n_boot, seed)  # [R]
    slack = 1e-12 * max(1.0, float(np.abs(replicates).max()))
    if np.ptp(replicates) <= slack:
        return mean, mean, mean
    below = np.mean(replicates < mean - slack) + 0.5 * np.mean(np.abs(replicates - mean) <= slack)
    z0 = ndtri(np.clip(below, 0.5 / n_boot, 1 - 0.5 / n_boot))
    influence = sums - mean * counts  # [G] first-order change of the mean with the weight of each group
    spread = np.sum(influence**2) ** 1.5
    acceleration = np.sum(influence**3) / (6.0 * spread) if spread > 0 else 0.0
    tail = ndtri(0.5 + 0.5 * level)
    shifted = z0 + np.array([-tail, tail])
    low, high = np.quantile(replicates, ndtr(z0 + shifted / (1.0 - acceleration * shifted)))
    return mean, float(low), float(high)


def _replicates(sums: np.ndarray, counts: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Means [R] of data sets made by drawing G groups with replacement; equal seeds draw equal groups."""
    rng, size = np.random.default_rng(seed), len(counts)
    at_once = max(1, _DRAWS_AT_ONCE // size)
    out = np.empty(n_boot)
    for start in range(0, n_boot, at_once):
        stop = min(start + at_once, n_boot)
        drawn = rng.integers(size, size=(stop - start, size))
        out[start:stop] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return out


def _wilson(rate: float, n: int, level: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion seen in ``n`` independent trials."""
    from scipy.special import ndtri

    z2 = ndtri(0.5 + 0.5 * level) ** 2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    # at the ends of the range rounding would leave 0.9999999999999998
    return 0.0 if rate == 0 else float(centre - half), 1.0 if rate == 1 else float(centre + half)


def _sign_test(balance: np.ndarray) -> float:
    """Two-sided exact sign test on the balance of each group [G]; balanced groups are dropped."""
    from scipy import stats

    up, down = int((balance > 0).sum()), int((balance < 0).sum())
    return float(stats.binomtest(up, up + down, 0.5).pvalue) if up + down else 1.0
