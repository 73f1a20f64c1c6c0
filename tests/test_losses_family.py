"""The family of losses: what holds for all of them, what each promises about ties and constants, and how they are chosen."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from worlds import PairsInMemory, small_denoiser

import diffalign
from diffalign import losses
from diffalign.data.draws import draw
from diffalign.data.loader import collate
from diffalign.errors import UserError
from diffalign.levels import Levels
from diffalign.likelihood import denoising, log_ratio, pair_errors
from diffalign.losses import Evidence, Extras, absolute, batchwise, pairwise, registry, rewarded, sides, unpaired
from diffalign.losses.absolute import log_odds
from diffalign.losses.rewarded import adpo_group
from diffalign.objectives._family import ScaledLoss
from diffalign.settings import option
from diffalign.sources.dataset import noised
from diffalign.types import LogLikelihood, LogRatio

LN2 = math.log(2.0)
NAMES = losses.names()
BETA = 700.0
HELD = {"beta-dpo": {"sensitivity": 0.0}}  # its beta follows the batch without gradient: a difference quotient would see it move
DIVERGENCES = ("forward-kl", "js", "alpha")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def clean(n: int) -> Tensor:
    """Labels without doubt."""
    return torch.ones(n, dtype=torch.float64)


def some_evidence(n: int = 6, label: float | None = 1.0, seed: int = 0, apart: float = 3e-3) -> Evidence:
    """Errors such as a denoiser makes: 0.1 to 0.6, policy and reference about 1e-3 apart, so that beta w is of order one."""
    g = torch.Generator().manual_seed(seed)
    reference = 0.1 + 0.5 * torch.rand(2, n, generator=g, dtype=torch.float64)
    policy = reference * torch.exp(apart * torch.randn(2, n, generator=g, dtype=torch.float64))
    drawn = torch.rand(n, generator=g, dtype=torch.float64)
    return Evidence(
        label=drawn if label is None else torch.full((n,), label, dtype=torch.float64),
        ratio=LogRatio(reference[0] - policy[0], reference[1] - policy[1]),
        policy=LogLikelihood(-policy[0], -policy[1]),
        reference=LogLikelihood(-reference[0], -reference[1]),
        rewards=torch.randn(n, 2, generator=g, dtype=torch.float64),
        baseline=f64(2e-4)[0],
    )


def changed(e: Evidence, f: Callable[[Tensor], Tensor]) -> Evidence:
    """The evidence with ``f`` applied to every [B] (or [B, 2]) of it."""

    def pair(x):
        return None if x is None else type(x)(f(x.winner), f(x.loser))

    return dataclasses.replace(
        e, label=f(e.label), ratio=pair(e.ratio), policy=pair(e.policy), reference=pair(e.reference), rewards=f(e.rewards)
    )


def swapped(e: Evidence) -> Evidence:
    """Winner and loser exchanged, the label turned with them."""

    def pair(x):
        return type(x)(x.loser, x.winner)

    return dataclasses.replace(
        e,
        label=1.0 - e.label,
        ratio=pair(e.ratio),
        policy=pair(e.policy),
        reference=pair(e.reference),
        rewards=e.rewards.flip(1),
    )


def scaled(e: Evidence, k: float) -> Evidence:
    """The same errors in other units: all log-likelihoods times k."""
    labels, rewards = e.label, e.rewards
    return dataclasses.replace(changed(e, lambda x: k * x), label=labels, rewards=rewards, baseline=k * e.baseline)


def of_sides(e: Evidence, winner: Tensor, loser: Tensor) -> Evidence:
    """The evidence when the policy's likelihoods of the two sides move by ``winner`` and ``loser`` [B]."""
    return dataclasses.replace(
        e,
        ratio=LogRatio(e.ratio.winner + winner, e.ratio.loser + loser),
        policy=LogLikelihood(e.policy.winner + winner, e.policy.loser + loser),
    )


def slopes(name: str, e: Evidence, beta: float = BETA, extras: Extras | None = None, **settings) -> tuple[Tensor, Tensor]:
    """d loss / d log-likelihood of winner and loser, [B] each."""
    moves = [torch.zeros_like(e.label, requires_grad=True) for _ in range(2)]
    value = losses.load(name, extras, **settings)(of_sides(e, *moves), beta)
    return torch.autograd.grad(value.sum(), moves)


def at_the_start(error: float = 0.3, label: float = 1.0) -> Evidence:
    """Policy equal to reference, both sides at the same error, the judge preferring the winner by 0.8."""
    likelihood = LogLikelihood(f64(-error), f64(-error))
    return Evidence(
        label=f64(label),
        ratio=LogRatio(f64(0.0), f64(0.0)),
        policy=likelihood,
        reference=likelihood,
        rewards=f64(1.0, 0.2)[None],
        baseline=0.0,
    )


# ---------------------------------------------------------------------------------------------- what holds for all of them


def madpo_weight(gap: float, c_max: float = 2.0, c_min: float = 0.5, tau: float = 2.0, sharpness: float = 1.0) -> float:
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(sharpness * (abs(gap) - tau)))
    return (1 + math.exp(-gap)) / (1 + math.exp(-c * gap)) if gap > -tau else 1.0


START = {
    "adpo": LN2,
    "aot": LN2,
    "aot-unpaired": LN2,
    "apo-down": 1.0,
    "apo-zero": 1.0,
    "asft": 1.1 * 0.3 - 0.1 * math.log(1 - math.exp(-0.3)),
    "bco": 2 * LN2,
    "beta-dpo": LN2,
    "cal-dpo": LN2 + 0.5,
    "cdpo": LN2,
    "discopop": (LN2 + 1) / 2,
    "dpo": LN2,
    "exo": -LN2 - 0.5 * math.log(1e-3 * (1 - 1e-3)),
    "hinge": 1.0,
    "hypo": LN2,
    "ipo": 0.25,
    "kto": 1.0,
    "madpo": madpo_weight(0.8) * LN2,
    "mapo": 0.3 + 0.1 * LN2,
    "nca": 2 * LN2,
    "orpo": 0.3 + 0.1 * LN2,
    "rdpo": LN2,
    "sft": 0.3,
    "simpo": math.log1p(math.exp(0.5)),
    "smpo": LN2,
    "sppo": 0.5,
}


def test_every_loss_has_a_known_value_at_the_start() -> None:
    assert sorted(START) == NAMES
    found = {name: losses.load(name)(at_the_start(), BETA).item() for name in NAMES}
    assert found == pytest.approx(START, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_number_per_pair_whatever_their_order(name: str) -> None:
    e, order = some_evidence(label=None), torch.tensor([3, 0, 5, 1, 4, 2])
    value = losses.load(name)(e, BETA)
    assert value.shape == (6,)
    torch.testing.assert_close(losses.load(name)(changed(e, lambda x: x[order]), BETA), value[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_only_those_that_say_so_mix_the_batch(name: str) -> None:
    e, loss = some_evidence(label=0.9, apart=1.0), losses.load(name)
    alone = torch.cat([loss(changed(e, lambda x, i=i: x[i : i + 1]), BETA) for i in range(6)])
    assert torch.allclose(alone, loss(e, BETA), rtol=1e-12) != loss.mixes_batch


TRANSFORMABLE = [name for name in NAMES if "ratio" in losses.load(name).needs and not losses.load(name).baseline]


@pytest.mark.parametrize(
    "name, divergence", [(n, "reverse-kl") for n in NAMES] + [(n, d) for n in TRANSFORMABLE for d in DIVERGENCES]
)
def test_constants_stand_beside_beta_never_beside_raw_ratios(name: str, divergence: str) -> None:
    """Errors in other units with beta to match: the same loss, unless it says that it is absolute, and then not."""
    loss, e = losses.load(name, Extras(divergence=divergence)), some_evidence(label=None)
    here, there = loss(e, BETA), loss(scaled(e, 50.0), BETA / 50.0)
    assert torch.allclose(here, there, rtol=1e-10) == (loss.scale == "beta-scaled")


def test_a_raw_constant_would_not_be_felt() -> None:
    """What the warning is about: the hinge at beta = 1 is a straight line on such errors, at beta = 700 it has its bend."""
    e = some_evidence(64)
    assert (losses.hinge(e.ratio, e.label, 1.0) > 0.99).all()
    assert (losses.hinge(e.ratio, e.label, BETA) == 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_swapping_the_sides_is_turning_the_label(name: str) -> None:
    e = some_evidence(label=None)
    torch.testing.assert_close(losses.load(name)(swapped(e), BETA), losses.load(name)(e, BETA), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    e, loss = some_evidence(4, label=0.8, seed=3), losses.load(name, **HELD.get(name, {}))
    inputs = tuple(torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda u, v: loss(of_sides(e, u / BETA, v / BETA), BETA), inputs, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"discopop"}))
def test_no_loss_pushes_the_wrong_way(name: str) -> None:
    """At the start, with a clean label, a small step raises the winner's likelihood against the loser's."""
    winner, loser = slopes(name, at_the_start())
    assert (winner - loser).item() < 0


def test_discopop_starts_the_wrong_way_unless_its_blend_is_wide() -> None:
    e = at_the_start()
    assert slopes("discopop", e)[0].item() > 0 > slopes("discopop", e, tau=0.11)[0].item()
    resting, crest = (of_sides(e, f64(h / BETA), f64(0.0)) for h in (-0.1186, 0.072))
    assert slopes("discopop", resting)[0].item() == pytest.approx(0, abs=1e-3 * BETA)
    assert slopes("discopop", crest)[0].item() == pytest.approx(0, abs=1e-3 * BETA)


@pytest.mark.parametrize("name", NAMES)
def test_labels_and_rewards_get_no_say_in_the_dtype(name: str) -> None:
    """float32 labels on float64 ratios, as in a batch: the loss stays float64."""
    e = some_evidence(label=0.75)
    narrow = dataclasses.replace(e, label=e.label.float(), rewards=e.rewards.float(), baseline=e.baseline.float())
    value = losses.load(name)(narrow, BETA)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, losses.load(name)(e, BETA), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_far_from_the_start_losses_and_gradients_stay_finite(name: str) -> None:
    e = some_evidence(2)
    far = of_sides(e, f64(5.0, -5.0), f64(-5.0, 5.0))  # h = +-7000; likelihoods clamped to those of possible errors
    clamp = LogLikelihood(far.policy.winner.clamp(max=-1e-6), far.policy.loser.clamp(max=-1e-6))
    for here in (far, dataclasses.replace(far, policy=clamp)):
        if losses.load(name).scale == "absolute" and here is far:
            continue
        assert losses.load(name)(here, BETA).isfinite().all()
        assert all(s.isfinite().all() for s in slopes(name, here))


@pytest.mark.parametrize("name", NAMES)
def test_a_small_step_of_a_real_network_lowers_the_loss(name: str) -> None:
    """Down the gradient by as little as the loss's slope says: the evidence of a denoiser goes in, its gradient comes out."""
    policy, reference = small_denoiser(torch.float64), small_denoiser(torch.float64)
    for p in policy.network.parameters():
        p.data.add_(1e-3 * torch.randn_like(p))
    pairs = PairsInMemory(3, seed=1)
    drawn = [draw(1, i, pairs.latent_shape, Levels(), 0.0, False) for i in range(3)]
    pair = noised(collate(pairs, range(3), drawn, latent_mode=False).to("cpu", torch.float64), policy.schedule)
    with torch.no_grad():
        at_reference = denoising(*pair_errors(reference, pair))
    loss = losses.load(name, **HELD.get(name, {}))

    def mean_loss() -> Tensor:
        here = denoising(*pair_errors(policy, pair))
        rewards = torch.tensor([[1.0, 0.0]] * 3)
        evidence = Evidence(clean(3), log_ratio(here, at_reference), here, at_reference, rewards, baseline=0.0)
        return loss(evidence, 200.0).mean()

    before = mean_loss()
    before.backward()
    slope = sum(p.grad.square().sum() for p in policy.network.parameters()).item()
    for p in policy.network.parameters():
        p.data.sub_(1e-6 / slope * p.grad)
    assert before.item() - mean_loss().item() == pytest.approx(1e-6, rel=0.05)


# -------------------------------------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"adpo", "aot", "aot-unpaired"}))
def test_a_tie_does_not_know_which_side_is_which(name: str) -> None:
    e = some_evidence(label=0.5)
    torch.testing.assert_close(losses.load(name)(e, BETA), losses.load(name)(swapped(e), BETA))
    undecided = dataclasses.replace(at_the_start(label=0.5), rewards=f64(1.0, 1.0)[None])
    winner, loser = slopes(name, undecided)
    torch.testing.assert_close(winner, loser, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "rdpo", "ipo", "exo", "nca", "sppo", "cal-dpo", "bco", "simpo", "hypo"])
def test_a_tie_pulls_the_margin_to_zero(name: str) -> None:
    e = at_the_start(label=0.5)
    for move in (2e-3, -2e-3):
        winner, loser = slopes(name, of_sides(e, f64(move), f64(-move)))
        assert (winner - loser).item() * move > 0
        assert (winner + loser).item() == pytest.approx(0, abs=1e-9)


def test_a_tie_teaches_apo_zero_and_kto_nothing() -> None:
    e = some_evidence(label=0.5)
    torch.testing.assert_close(losses.apo_zero(e.ratio, e.label, BETA), torch.ones_like(e.label))
    for name in ("apo-zero", "kto"):
        assert all(s.abs().max() < 1e-12 for s in slopes(name, e))


def test_a_tie_is_flat_for_the_hinge_within_its_band() -> None:
    e = at_the_start(label=0.5)
    inside, outside = (of_sides(e, f64(move / BETA), f64(0.0)) for move in (0.9, 1.1))
    assert [s.item() for s in slopes("hinge", inside)] == [0.0, 0.0]
    assert slopes("hinge", outside)[0].item() == pytest.approx(BETA / 2)


def test_a_tie_of_apo_down_pushes_both_sides_down() -> None:
    winner, loser = slopes("apo-down", at_the_start(label=0.5))
    assert winner.item() == loser.item() == pytest.approx(BETA / 8)


def test_a_tie_of_discopop_is_a_hump() -> None:
    h, tie = f64(-0.05, 0.0, 0.05), torch.full((3,), 0.5)
    left, middle, right = losses.discopop(LogRatio(h, torch.zeros_like(h)), tie, 1.0, 0.05).tolist()
    assert left == pytest.approx(right)
    assert left < middle


# -------------------------------------------------------------------------------------------------------- one by one


def margins(*h: float) -> LogRatio:
    """Pairs whose margin is h, spread unevenly over the sides."""
    h = f64(*h)
    return LogRatio(0.3 * h + 0.1, 0.1 - 0.7 * h)


def test_cdpo_stops_at_the_log_odds_of_its_noise() -> None:
    e = of_sides(at_the_start(), f64(math.log(9.0) / BETA), f64(0.0))
    assert slopes("cdpo", e, noise=0.1)[0].item() == pytest.approx(0, abs=1e-9)
    assert slopes("cdpo", e, noise=0.05)[0].item() < 0


def test_rdpo_is_unbiased_and_not_bounded_below() -> None:
    ratio = margins(-2.0, 0.3, 4.0)
    kept, flipped = (losses.rdpo(ratio, label, 1.3, 0.2) for label in (clean(3), 1.0 - clean(3)))
    torch.testing.assert_close(0.8 * kept + 0.2 * flipped, losses.dpo(ratio, clean(3), 1.3))
    far = losses.rdpo(margins(1000.0), clean(1), 1.0, 0.2).item()
    assert far == pytest.approx(-0.2 * 1000.0 / 0.6)


def test_ipo_and_sppo_and_cal_dpo_reach_their_targets() -> None:
    """Half for the margin of a clean label, P - 1/2 else; +-1/2 for the sides."""
    assert losses.ipo(margins(0.25), f64(1.0), 2.0).item() == pytest.approx(0)
    assert losses.ipo(margins(0.25), f64(0.75), 1.0).item() == pytest.approx(0)
    assert losses.sppo(LogRatio(f64(0.25), f64(-0.25)), f64(1.0), 2.0).item() == pytest.approx(0)
    assert losses.sppo(LogRatio(f64(0.2), f64(-0.2)), f64(0.7), 1.0).item() == pytest.approx(0)
    calibrated = losses.cal_dpo(LogRatio(f64(0.25), f64(-0.25)), f64(1.0), 2.0, 0.5)
    assert calibrated.item() == pytest.approx(math.log1p(math.exp(-1.0)))


def test_exo_is_a_divergence_and_bounded() -> None:
    noise = 0.1
    reached = losses.exo(margins(math.log(9.0)), f64(1.0), 1.0, noise)
    assert reached.item() == pytest.approx(0, abs=1e-12)
    h = torch.linspace(-60.0, 60.0, 101, dtype=torch.float64)
    value = losses.exo(LogRatio(h, torch.zeros_like(h)), torch.ones_like(h), 1.0, noise)
    assert value.min() > -1e-12
    assert value.max().item() == pytest.approx(math.log(1 / noise))


def test_exo_keeps_the_digits_of_a_small_noise_in_float32() -> None:
    h = torch.linspace(-6.0, 2.0, 50, dtype=torch.float64)
    wide = losses.exo(LogRatio(h, torch.zeros_like(h)), torch.ones_like(h), 1.0, 1e-3)
    narrow = losses.exo(LogRatio(h.float(), torch.zeros(50)), torch.ones(50), 1.0, 1e-3)
    assert (narrow - wide).abs().max() < 3e-6


def test_nca_keeps_the_winner_at_log_two() -> None:
    e = of_sides(at_the_start(), f64(LN2 / BETA), f64(-1.0 / BETA))
    winner, loser = slopes("nca", e)
    assert winner.item() == pytest.approx(0, abs=1e-9)
    assert loser.item() > 0


def test_discopop_is_finite_where_exp_overflows() -> None:
    """TRL's product of exp(-h) and sigma(h / tau) is inf times 0 there."""
    ratio = LogRatio(f64(-1e4, 1e4).requires_grad_(), f64(0.0, 0.0))
    value = losses.discopop(ratio, clean(2), 1.0, 0.05)
    value.sum().backward()
    assert value.tolist() == pytest.approx([1e4, 0.0])
    assert ratio.winner.grad.tolist() == pytest.approx([-1.0, 0.0])


def test_kto_without_a_baseline_is_apo_zero_and_bco_a_classifier() -> None:
    e = some_evidence(label=None)
    torch.testing.assert_close(
        losses.kto(e.ratio, e.label, BETA, 0.0, "kahneman-tversky", 1.0, 1.0), losses.apo_zero(e.ratio, e.label, BETA)
    )
    both = torch.cat([e.ratio.winner, e.ratio.loser])
    label = torch.cat([e.label, 1.0 - e.label])
    wanted = F.binary_cross_entropy_with_logits(BETA * (both - 1e-4), label, reduction="none")
    torch.testing.assert_close(losses.bco_unpaired(both, label, BETA, 1e-4), wanted)
    torch.testing.assert_close(losses.bco(e.ratio, e.label, BETA, 1e-4), sum(wanted.chunk(2)))


def test_kto_weighs_good_and_bad_apart_and_utilities_differ() -> None:
    rho, good = f64(0.0, 0.0), f64(1.0, 0.0)
    weighted = losses.kto_unpaired(rho, good, 1.0, 0.0, "kahneman-tversky", 2.0, 3.0)
    assert weighted.tolist() == [1.0, 1.5]
    at_zero = {"kahneman-tversky": 0.5, "loss-averse": 1 + LN2, "risk-seeking": 1 - LN2}
    found = {u: losses.kto_unpaired(rho[:1], good[:1], 1.0, 0.0, u).item() for u in at_zero}
    assert found == pytest.approx(at_zero)
    bad = {"loss-averse": 1 + math.log1p(math.e), "risk-seeking-signed": 1 + math.log1p(math.e)}
    bad["risk-seeking-exponential"] = 2 + math.exp(0.01)
    found = {u: losses.kto_unpaired(f64(1.0), f64(0.0), 1.0, 0.0, u).item() for u in bad}
    assert found == pytest.approx(bad)
    with pytest.raises(ValueError, match="utility is one of kahneman-tversky, loss-averse, .*; got 'brave'"):
        losses.kto_unpaired(rho, good, 1.0, 0.0, "brave")


def test_simpo_asks_for_its_margin_and_needs_no_reference() -> None:
    value = losses.simpo(LogLikelihood(f64(-0.1), f64(-0.6)), f64(1.0), 2.0, 1.0)
    assert value.item() == pytest.approx(LN2)
    assert losses.load("simpo").needs == {"policy", "label"}


def test_mapo_orpo_and_asft_by_hand() -> None:
    policy = LogLikelihood(f64(-0.2), f64(-0.5))
    q = [0.5 * x / (math.exp(0.5 * x) - 1) for x in (0.2, 0.5)]
    wanted = 0.2 + 0.1 * math.log1p(math.exp(-1000 * (q[0] - q[1])))
    assert losses.mapo(policy, f64(1.0), 1000.0, 0.1, 0.5).item() == pytest.approx(wanted)
    p = [math.exp(-0.4), math.exp(-1.0)]  # rate 2
    odds = [math.log(x / (1 - x)) for x in p]
    assert log_odds(f64(-0.4, -1.0)).tolist() == pytest.approx(odds)
    wanted = 0.4 + 0.3 * math.log1p(math.exp(-(odds[0] - odds[1])))
    assert losses.orpo(policy, f64(1.0), 1.0, 0.3, 2.0).item() == pytest.approx(wanted)
    wanted = 0.4 + 0.3 * (math.log1p(math.exp(-odds[0])) + math.log1p(math.exp(odds[1])))
    assert losses.asft(policy, f64(1.0), 0.3, 2.0).item() == pytest.approx(wanted)


def test_mapo_stands_an_error_of_zero() -> None:
    value = losses.mapo(LogLikelihood(f64(0.0), f64(-0.5)), f64(1.0), 1000.0, 0.1, 0.5)
    assert value.item() == pytest.approx(0.0, abs=1e-12)  # q(0) = 1, far above q(1/2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapo_has_a_gradient_at_every_error(dtype: torch.dtype) -> None:
    """exp of a large error has no room in the type, and a small one is lost in 1 - exp."""
    errors = torch.tensor([1e-30, 1e-9, 1e-4, 0.0499, 0.0501, 0.3, 50.0, 200.0, 3000.0], dtype=dtype)
    winner, loser = (-errors).requires_grad_(), torch.full_like(errors, -0.4)
    losses.mapo(LogLikelihood(winner, loser), torch.ones_like(errors), 2.0, 0.1, 1.0).sum().backward()
    exact = errors.double()
    q = torch.where(exact < 1e-6, 1 - exact / 2, exact / torch.expm1(exact.clamp(min=1e-6)))
    slope = torch.where(exact < 1e-3, -0.5 + exact / 6, (q - q.square()) / exact.clamp(min=1e-3) - q)
    slope = torch.where(exact > 500, 0.0, slope)  # dq/de
    rest = 0.4 / math.expm1(0.4)
    wanted = -1.0 + 0.1 * 2.0 * slope * torch.sigmoid(-2.0 * (q - rest))
    torch.testing.assert_close(winner.grad.double(), wanted, rtol=2e-5 if dtype == torch.float32 else 1e-8, atol=0)


def test_a_group_of_one_has_nobody_to_be_compared_with() -> None:
    with pytest.raises(ValueError, match="these groups have 1"):
        adpo_group(f64(0.3).view(1, 1), f64(0.5).view(1, 1), 1.0)


def test_hypo_is_dpo_where_the_reference_is_right_and_stricter_where_it_is_wrong() -> None:
    policy = LogLikelihood(f64(-0.3, -0.3), f64(-0.3, -0.3))  # D = 0
    reference = LogLikelihood(f64(-0.2, -0.4), f64(-0.4, -0.2))  # D_ref = 0.2, -0.2
    value = losses.hypo(policy, reference, clean(2), 5.0, 0.0, 0.0)
    ratio = LogRatio(policy.winner - reference.winner, policy.loser - reference.loser)
    plain = losses.dpo(ratio, clean(2), 5.0)
    assert value[0].item() == pytest.approx(plain[0].item())
    assert value[1].item() == pytest.approx(LN2)  # DPO thinks the pair well learnt: 0.31
    assert value[1] > plain[1] + 0.3
    soft = losses.hypo(policy, reference, clean(2), 5.0, 0.0, 1e-3)
    torch.testing.assert_close(soft, value, rtol=1e-3, atol=0)
    assert losses.hypo(policy, reference, clean(2), 5.0, 0.0, 1.0)[1].item() > value[1].item()
    assert losses.hypo(policy, reference, clean(2), 5.0, 1.0, 0.0)[1].item() == pytest.approx(math.log1p(math.e))


def test_a_tie_of_hypo_settles_between_zero_and_the_reference() -> None:
    reference = LogLikelihood(f64(-0.2), f64(-0.4))
    margin = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    losses.hypo(LogLikelihood(margin, f64(0.0)), reference, f64(0.5), 5.0, 0.0, 0.0).sum().backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-12)


def test_aot_compares_ranks_and_gives_each_place_to_its_pair() -> None:
    policy = LogLikelihood(f64(3.0, 1.0, 2.0), f64(0.0, 0.0, 0.0))  # margins 3, 1, 2
    reference = LogLikelihood(f64(0.0, 5.0, 1.0), f64(0.0, 0.0, 0.0))  # sorted 0, 1, 5
    wanted = -F.logsigmoid(f64(3.0 - 5.0, 1.0 - 0.0, 2.0 - 1.0))
    torch.testing.assert_close(losses.aot(policy, reference, clean(3), 1.0), wanted)
    unpaired_ratio = LogRatio(f64(3.0, 1.0, 2.0), f64(0.0, 5.0, 1.0))
    torch.testing.assert_close(losses.aot_unpaired(unpaired_ratio, clean(3), 1.0), wanted)


def test_aot_of_one_pair_is_dpo_and_ties_count_half() -> None:
    e = some_evidence(1, label=0.8)
    torch.testing.assert_close(losses.load("aot")(e, BETA), losses.dpo(e.ratio, e.label, BETA))
    torch.testing.assert_close(losses.load("aot-unpaired")(e, BETA), losses.dpo(e.ratio, e.label, BETA))
    ratio = LogRatio(f64(2.0, 0.0), f64(0.0, 0.0))
    mixed = losses.aot_unpaired(ratio, f64(1.0, 0.5), 1.0)  # mean label 3/4 at every place
    assert mixed[0].item() == pytest.approx(0.75 * math.log1p(math.exp(-2)) + 0.25 * math.log1p(math.exp(2)))


def test_beta_dpo_follows_the_batch_without_gradient_and_has_a_floor() -> None:
    ratio, label = margins(0.5, 1.5), clean(2)
    wanted = losses.dpo(ratio, label, 2.0 * (1 + 0.6 * (2.0 * 1.0 - 2.0 * 0.2)))
    torch.testing.assert_close(losses.beta_dpo(ratio, label, 2.0, 0.2, 0.6, 0.01), wanted)
    floor = losses.beta_dpo(ratio, label, 2.0, 100.0, 0.6, 0.01)
    torch.testing.assert_close(floor, losses.dpo(ratio, label, 0.02))
    turned = losses.beta_dpo(LogRatio(ratio.loser, ratio.winner), 1.0 - label, 2.0, 0.2, 0.6, 0.01)
    torch.testing.assert_close(turned, wanted)
    e = dataclasses.replace(some_evidence(3), baseline=0.0)
    factor = 1 + 0.6 * BETA * e.ratio.margin.mean().item()
    assert factor > 0.02
    for one, other in zip(slopes("beta-dpo", e), slopes("dpo", e, beta=BETA * factor), strict=True):
        torch.testing.assert_close(one, other)


def test_beta_dpo_measures_margins_and_their_average_alike() -> None:
    """Margins that never change leave beta what it is, however sure the labels are."""
    for sure in (1.0, 0.7, 0.5):
        at_work = ScaledLoss(losses.load("beta-dpo"), 2.0, losses.MovingMargin())
        ratio, label = margins(0.8, 0.8), f64(sure, sure)
        for _ in range(3):
            at_work.update_baseline(label, ratio, mismatched=None)
        policy = LogLikelihood(f64(0.0, 0.0), f64(0.0, 0.0))
        torch.testing.assert_close(at_work(label, policy, policy, ratio), losses.dpo(ratio, label, 2.0))


def test_madpo_weights_by_the_judges_margin() -> None:
    gaps = [-3.0, -1.0, 0.0, 0.7, 2.0, 6.0]
    rewards = torch.stack([f64(*gaps), f64(*[0.0] * 6)], dim=1)
    ratio, settings = margins(*[0.4] * 6), (2.0, 0.5, 2.0, 1.0)
    weight = losses.madpo(ratio, rewards, clean(6), 1.0, *settings) / losses.dpo(ratio, clean(6), 1.0)
    assert weight.tolist() == pytest.approx([madpo_weight(g) for g in gaps])
    assert weight[[0, 2, 4]].tolist() == pytest.approx([1.0, 1.0, 1.0])  # beyond -tau, no margin, at tau
    assert weight[3] > 1 > weight[5] and weight[1] < 1
    at_rest = margins(math.log(madpo_weight(0.7) / madpo_weight(-0.7)))
    at_rest = LogRatio(at_rest.winner.requires_grad_(), at_rest.loser)
    losses.madpo(at_rest, f64(0.7, 0.0)[None], f64(0.5), 1.0, *settings).sum().backward()
    assert at_rest.winner.grad.item() == pytest.approx(0, abs=1e-12)
    turned = losses.madpo(LogRatio(ratio.loser, ratio.winner), rewards.flip(1), 1.0 - clean(6), 1.0, *settings)
    torch.testing.assert_close(turned, losses.madpo(ratio, rewards, clean(6), 1.0, *settings))


def test_adpo_on_pairs_is_soft_label_dpo_and_listwise_is_least_at_the_judges_shares() -> None:
    e = some_evidence(5)
    better = (e.rewards[:, 0] > e.rewards[:, 1]).double()
    certain = torch.sigmoid(f64(math.sqrt(2.0) / 0.5))
    label = better * certain + (1 - better) * (1 - certain)
    torch.testing.assert_close(losses.adpo(e.ratio, e.rewards, BETA, 0.5), losses.dpo(e.ratio, label, BETA))
    equal = losses.adpo(e.ratio, torch.ones(5, 2), BETA, 0.5)
    torch.testing.assert_close(equal, losses.dpo(e.ratio, torch.full((5,), 0.5), BETA))
    rewards = torch.randn(3, 8, dtype=torch.float64)
    z = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    ratios = ((z / 0.5 + 4.0) / BETA).requires_grad_()  # a shift of the whole group changes nothing
    value = losses.adpo_group(ratios, rewards, BETA, 0.5)
    value.sum().backward()
    assert ratios.grad.abs().max() < 1e-5  # against slopes of up to BETA
    q = torch.softmax(z / 0.5, dim=1)
    torch.testing.assert_close(value.detach(), -(q * q.log()).sum(1))
    assert (losses.adpo_group(torch.zeros(3, 8, dtype=torch.float64), rewards, BETA, 0.5) > value).all()


# --------------------------------------------------------------------------------------------------------- divergences


@pytest.mark.parametrize("divergence, slope", [("reverse-kl", 1.0), ("forward-kl", 1.0), ("js", 0.5), ("alpha", 1.0)])
def test_divergences_rise_with_a_known_slope_at_zero(divergence: str, slope: float) -> None:
    rho = f64(0.0).requires_grad_()
    losses.transformed(LogRatio(rho, rho), divergence, 0.5, temper=300.0).winner.sum().backward()
    assert rho.grad.item() == pytest.approx(slope)
    line = torch.linspace(-0.01, 0.01, 50, dtype=torch.float64)
    assert (losses.transformed(LogRatio(line, line), divergence, 0.5, temper=300.0).winner.diff() > 0).all()


def test_untempered_divergences_are_straight_lines_on_mean_errors() -> None:
    e = some_evidence(64)
    plain = losses.dpo(e.ratio, e.label, BETA)
    for divergence in ("forward-kl", "alpha"):
        raw = losses.dpo(losses.transformed(e.ratio, divergence, 0.5, temper=1.0), e.label, BETA)
        assert (raw - plain).abs().max() < 0.01
        tempered = losses.load("dpo", Extras(divergence=divergence))(e, BETA)
        assert (tempered - plain).abs().max() > 0.1


def test_alpha_of_one_is_reverse_kl_and_large_exponents_are_held() -> None:
    ratio = margins(-2.0, 3.0)
    same = losses.transformed(ratio, "alpha", 1.0)
    assert torch.equal(same.winner, ratio.winner)
    near = losses.transformed(ratio, "alpha", 1.0 + 1e-4)
    torch.testing.assert_close(near.margin, ratio.margin, rtol=1e-3, atol=0)
    huge = losses.transformed(LogRatio(torch.tensor([1e4]), torch.tensor([0.0])), "alpha", 2.0)
    assert huge.winner.item() == pytest.approx(math.exp(80.0), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ baselines


def reloaded(baseline: losses.Baseline) -> losses.Baseline:
    """The same baseline after a checkpoint."""
    fresh = type(baseline)()
    fresh.load_state_dict(json.loads(json.dumps(baseline.state_dict())))
    return fresh


def test_the_running_mean_is_that_of_everything_seen() -> None:
    values, baseline = torch.randn(40, dtype=torch.float64), losses.RunningMean()
    assert baseline.value.item() == 0.0
    for part in values.split([7, 1, 20, 12]):
        baseline.update(part)
        baseline = reloaded(baseline)
    assert baseline.value.item() == pytest.approx(values.mean().item(), abs=1e-14)


def test_the_mismatched_mean_is_of_the_latest_batch_and_never_negative() -> None:
    baseline = losses.MismatchedMean()
    baseline.update(f64(1.0, 2.0).requires_grad_())
    assert reloaded(baseline).value.item() == 1.5
    assert not baseline.value.requires_grad
    baseline.update(f64(1.0, -2.0))
    assert baseline.value.item() == 0.0


def test_the_moving_margin_forgets_by_a_tenth() -> None:
    baseline = losses.MovingMargin()
    baseline.update(f64(1.0, 3.0))
    assert (baseline.value.item(), baseline.deviation.item()) == pytest.approx((2.0, math.sqrt(2.0)))
    baseline.update(f64(4.0))  # one margin has no deviation: the old one stays
    assert (baseline.value.item(), baseline.deviation.item()) == pytest.approx((2.2, math.sqrt(2.0)))
    again = reloaded(baseline)
    again.update(f64(0.0, 1.0))
    baseline.update(f64(0.0, 1.0))
    assert again.state_dict() == baseline.state_dict()


def test_the_filter_drops_outliers_first_and_repeats() -> None:
    baseline = losses.MovingMargin()
    baseline.update(torch.randn(4000, dtype=torch.float64))
    margins = torch.cat([torch.zeros(8, dtype=torch.float64), f64(6.0, -6.0)])

    def kept(seed: int, drop: float = 0.2) -> Tensor:
        return baseline.keep(margins, drop, torch.Generator().manual_seed(seed))

    share = torch.stack([kept(seed) for seed in range(200)]).double().mean(dim=0)
    assert share[:8].min() > 0.99 and share[8:].max() < 0.01
    assert torch.equal(kept(3), kept(3))
    assert kept(0, drop=0.99).sum() == 1
    even = torch.stack([kept(seed, drop=0.5)[:8] for seed in range(400)]).double().mean(dim=0)
    assert even.min() > 0.5 and even.max() < 0.75  # 5 of the 8 that are alike


@pytest.mark.parametrize("name, watched", [("kto", "mismatched"), ("bco", "sides"), ("beta-dpo", "margins")])
def test_losses_with_a_baseline_say_what_keeps_it(name: str, watched: str) -> None:
    loss = losses.load(name)
    assert loss.baseline.watches == watched
    e = dataclasses.replace(some_evidence(), baseline=loss.baseline().value)
    assert loss(e, BETA).isfinite().all()
    assert [n for n in NAMES if losses.load(n).baseline] == ["bco", "beta-dpo", "kto"]
    assert all((losses.load(n).baseline is not None) == ("baseline" in losses.load(n).needs) for n in NAMES)


# ------------------------------------------------------------------------------------------------------------- choosing


def test_every_function_of_the_family_can_be_chosen_and_names_its_paper() -> None:
    modules = (absolute, batchwise, pairwise, rewarded, sides, unpaired)
    helpers = {"log_odds", "kto_unpaired", "bco_unpaired", "adpo_group"}
    own = {
        name.replace("_", "-")
        for module in modules
        for name, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and not name.startswith("_") and name not in helpers
    }
    assert own == set(NAMES)
    for name in NAMES:
        loss = losses.load(name)
        assert getattr(losses, name.replace("-", "_")) is loss.function
        text = inspect.getdoc(loss.function)
        assert loss.paper in text or name in ("sft", "cdpo", "kto", "bco"), name
        assert "tie" in text or name == "adpo", f"{name} does not say what a tie does"
        assert loss.summary.endswith((".", "?")) and len(loss.summary) < 130


def test_settings_are_checked_and_known() -> None:
    assert losses.load("rdpo").settings.noise == 0.1
    assert losses.load("rdpo", noise=0.3).settings.noise == 0.3
    with pytest.raises(ValueError, match="noise should be less than 0.5; got 0.5"):
        losses.load("rdpo", noise=0.5)
    with pytest.raises(TypeError, match="smoothing"):
        losses.load("rdpo", smoothing=0.1)
    fields = dataclasses.fields(losses.load("madpo").Settings)
    assert [f.name for f in fields] == ["c_max", "c_min", "tau", "sharpness"]
    assert all(f.metadata["help"] for name in NAMES for f in dataclasses.fields(losses.load(name).Settings))


def test_an_unknown_loss_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no loss is called 'dpoo'; there are: adpo, aot, .*, sppo"):
        losses.load("dpoo")


def test_a_loss_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))

    def mine(ratio: LogRatio, beta: float, power: float) -> Tensor:
        return (1.0 - beta * ratio.margin).abs() ** power

    losses.loss("own", settings={"power": option(2.0, "exponent", gt=0)})(mine)
    found = losses.load("mine", power=3.0)(some_evidence(), BETA)
    assert found.shape == (6,) and losses.load("mine").summary == ""
    losses.loss("own", settings={"power": option(2.0, "exponent", gt=0)})(mine)  # a cell that is run again
    with pytest.raises(UserError, match=r'above mine: @diffalign\.losses\.loss\("own"\)'):
        losses.loss(mine)
    with pytest.raises(UserError, match="no counterpart: other, power"):
        losses.loss("own", settings={"other": option(2.0, "exponent")})(mine)
    mine.__name__ = "dpo"
    with pytest.raises(UserError, match="There is a loss 'dpo' already"):
        losses.loss("own", settings={"power": option(2.0, "exponent")})(mine)


def test_the_documented_loss_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    page = (Path(__file__).parent.parent / "docs" / "objectives.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in page.split("```python\n")[1:] if "@diffalign.losses.loss" in block]
    exec(code, {"diffalign": diffalign, "option": option})
    evidence = some_evidence()
    found = losses.load("shortfall", power=3.0)(evidence, BETA)
    torch.testing.assert_close(found, (1 - (2 * evidence.label - 1) * BETA * evidence.ratio.margin).clamp(min=0) ** 3)


def test_missing_evidence_is_named() -> None:
    bare = Evidence(label=clean(2), ratio=margins(0.1, 0.2))
    with pytest.raises(ValueError, match="the loss 'hypo' needs policy and reference, which this objective does not give"):
        losses.load("hypo")(bare, BETA)
    with pytest.raises(ValueError, match="the loss 'madpo' needs rewards"):
        losses.load("madpo")(bare, BETA)
    with pytest.raises(ValueError, match="the loss 'dpo' needs policy"):
        losses.load("dpo", Extras(sft_weight=0.1))(bare, BETA)


def test_a_divergence_goes_only_where_there_are_ratios_to_transform() -> None:
    """Told where the loss is chosen, before anything is loaded, not where it first meets a batch."""
    with pytest.raises(ValueError, match="'simpo' does not see log-ratios: a divergence cannot change it"):
        losses.load("simpo", Extras(divergence="js"))
    with pytest.raises(ValueError, match="'bco' has a baseline in log-ratios: it goes with reverse-kl only"):
        losses.load("bco", Extras(divergence="js"))
    with pytest.raises(ValueError, match="divergence is one of reverse-kl, forward-kl, js, alpha; got 'chi'"):
        Extras(divergence="chi")


def test_an_sft_term_is_added_in_units_of_beta() -> None:
    e = some_evidence(label=0.8)
    with_term = losses.load("dpo", Extras(sft_weight=0.3))(e, BETA)
    wanted = losses.dpo(e.ratio, e.label, BETA) + 0.3 * BETA * losses.sft(e.policy, e.label)
    torch.testing.assert_close(with_term, wanted)
