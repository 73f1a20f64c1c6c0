"""SePPO: whom the flipper asks, what becomes of a sample that is not worse, and the checkpoint that sampled it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from judged import LN2, OFF, at_work, first_batch, gradients, logistic, moved, ratio_on, seppo
from worlds import small_denoiser

from diffalign.likelihood import denoising, log_ratio, pair_errors
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.seppo import SePPO, flipped_side
from diffalign.sources.dataset import noised
from diffalign.types import LogRatio, PairBatch


def anchored(objective: SePPO, n: int = 8) -> tuple[PairBatch, Any, Any, LogRatio]:
    """Pairs, a policy and a reference of which each is better on some anchors."""
    policy, reference = small_denoiser(torch.float64), small_denoiser(torch.float64)
    moved(policy.network, OFF, seed=1)
    moved(reference.network, OFF, seed=2)
    learner, _ = at_work(objective, batch=n)
    batch = first_batch(learner)
    ratio = ratio_on(batch, policy, reference)
    assert 0 < (ratio.winner > 0).sum() < n
    return batch, policy, reference, ratio


def test_the_flipper_asks_the_anchor() -> None:
    """Better on the anchor: +1. Worse: -1. Exactly equal: +1."""
    assert flipped_side(torch.tensor([0.2, -0.2, 0.0, -0.0]), "sign").tolist() == [1.0, -1.0, 1.0, 1.0]
    assert flipped_side(torch.tensor([0.2, -0.2, 0.0, -0.0]), "indicator").tolist() == [1.0, 0.0, 1.0, 1.0]
    assert flipped_side(torch.tensor([0.2, -0.2, 0.0, -0.0]), "none").tolist() == [1.0] * 4
    for flip in ("sign", "indicator", "none"):
        assert not flipped_side(torch.tensor([0.2, -0.2], requires_grad=True), flip).requires_grad


@pytest.mark.parametrize("flip, other", [("sign", -1.0), ("indicator", 0.0), ("none", 1.0)])
def test_seppo_by_hand_and_no_gradient_through_the_sign(flip: str, other: float) -> None:
    batch, policy, reference, ratio = anchored(seppo(flipper=flip))
    sign = torch.where(ratio.winner >= 0, 1.0, other)
    outcome = seppo(flipper=flip)(batch, policy, reference)
    assert outcome.metrics["flipped"].tolist() == ((1 - sign) / 2).tolist()
    pair = noised(batch, policy.schedule)
    with torch.no_grad():
        before = pair_errors(reference, pair)
    now = log_ratio(denoising(*pair_errors(policy, pair)), denoising(*before))
    by_hand = logistic(250 * (now.winner - sign * now.loser))
    torch.testing.assert_close(outcome.loss, by_hand, rtol=1e-12, atol=0)
    found, expected = (gradients(loss.sum(), policy.network) for loss in (outcome.loss, by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_exchanging_the_models_turns_every_sign() -> None:
    batch, policy, reference, _ = anchored(seppo())
    here, there = (seppo()(batch, a, b).metrics["flipped"] for a, b in ((policy, reference), (reference, policy)))
    assert (here + there).tolist() == [1.0] * 8


def test_the_indicator_drops_the_sample() -> None:
    """Where the reference is better on the anchor, it does not matter what the sample is."""
    batch, policy, reference, ratio = anchored(seppo(flipper="indicator"))
    objective = seppo(flipper="indicator")
    here, there = (objective(b, policy, reference).loss for b in (batch, replace(batch, loser=batch.loser.flip(-1))))
    assert ((here == there) == (ratio.winner < 0)).all()


def test_without_a_flipper_it_is_dpo() -> None:
    batch, policy, reference, _ = anchored(seppo(flipper="none"))
    batch = replace(batch, label=torch.ones_like(batch.label))
    assert torch.equal(
        seppo(flipper="none")(batch, policy, reference).loss, DiffusionDPO(beta=500)(batch, policy, reference).loss
    )


def test_at_the_start_of_a_round_the_sample_is_a_loser() -> None:
    """The reference is the policy itself: the first gradient is DPO's, no sample is dropped or learnt."""
    learner, given = at_work(seppo())
    batch = first_batch(learner)
    outcome = learner.losses(batch)
    assert outcome.metrics["flipped"].tolist() == [0.0] * 4
    found = gradients(outcome.loss.sum(), given.policy.network)
    expected = gradients(DiffusionDPO(beta=500)(batch, given.policy, given.start).loss.sum(), given.policy.network)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 1e-4


@pytest.mark.parametrize("checkpoint", ["last", "first"])
def test_the_reference_is_the_checkpoint_that_sampled(checkpoint: str) -> None:
    """In the second round, the policy as it is, or theta_0."""
    learner, given = at_work(seppo(round_steps=1, checkpoint=checkpoint))
    steps = learner.source.steps(0, 2)
    next(steps)
    moved(given.policy.network, OFF)
    (batch,) = next(steps)
    outcome, ratio = learner.losses(batch), ratio_on(batch, given.policy, given.start)
    if checkpoint == "last":
        assert outcome.loss.tolist() == pytest.approx([LN2] * 4, abs=1e-15)
        assert not outcome.metrics["winner_drift"].any()
    else:
        torch.testing.assert_close(outcome.metrics["winner_drift"], -ratio.winner, rtol=0, atol=1e-14)
        assert outcome.metrics["winner_drift"].abs().min() > 1e-7


def test_seppo_names_its_choices() -> None:
    with pytest.raises(ValueError, match="flipper is one of sign, indicator, none; got 'signs'"):
        SePPO(flipper="signs")
    with pytest.raises(ValueError, match="checkpoint is one of uniform, first, last; got 'newest'"):
        SePPO(checkpoint="newest")
    with pytest.raises(ValueError, match="solver is one of"):
        SePPO(solver="euler")
