"""SmPO: labels smoothed by scores, pairs on inverted trajectories, DDIM-InPO as a setting, and DPO where nothing is smoothed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from judged import LN2, OFF, ScoredPairs, at_work, first_batch, gradients, logistic

from diffalign.errors import UserError
from diffalign.likelihood import denoising, log_ratio, pair_errors
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.smpo import SmPO
from diffalign.sources.inversion import DDIM_INPO, inverted
from diffalign.types import PairBatch


def scored(batch: PairBatch, scores: list[list[float]]) -> PairBatch:
    return replace(batch, scores=torch.tensor(scores))


def test_smpo_learns_nothing_from_pictures_that_score_alike() -> None:
    learner, given = at_work(SmPO(beta=500, inversion_steps=3), by=OFF)
    outcome = learner.losses(scored(first_batch(learner), [[0.4, 0.4]] * 4))
    assert outcome.loss.tolist() == pytest.approx([LN2] * 4, abs=1e-15)
    assert not outcome.metrics["margin"].any() and (outcome.metrics["accuracy"] == 0.5).all()  # of ties, as health has it
    assert outcome.metrics["winner_drift"].abs().min() > 0  # though the policy is elsewhere than the reference
    assert not gradients(outcome.loss.sum(), given.policy.network).any()


def test_smpo_without_inversion_is_dpo_to_the_last_digit() -> None:
    """gamma (2P - 1) = 1, once by a clean label, once by P = 3/4."""
    plain, given = at_work(DiffusionDPO(beta=500), by=OFF)
    batch = first_batch(plain)
    expected = plain.losses(batch)
    for gamma, label in ((1.0, 1.0), (2.0, 0.75)):
        smpo = DiffusionDPO(beta=500, loss="smpo", loss_options={"gamma": gamma})
        outcome = smpo(replace(batch, label=torch.full_like(batch.label, label)), given.policy, given.start)
        assert torch.equal(outcome.loss, expected.loss)
        one, other = (gradients(o.loss.sum(), given.policy.network) for o in (outcome, plain.losses(batch)))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_p_is_each_pairs_own_by_the_extremes_of_the_data() -> None:
    learner, given = at_work(SmPO(beta=500, inversion_steps=3), by=OFF, score_range=(0.2, 0.7))
    scores = [[0.7, 0.2], [0.3, 0.6], [0.5, 0.4], [float("nan"), 0.4]]
    batch = scored(first_batch(learner), scores)
    by_hand = [1 / (1 + math.exp(-(one - other) / 0.5)) for one, other in scores[:3]]
    smoothed = SmPO().smoothed(batch, 0.2, 0.7)
    assert smoothed[:3].tolist() == pytest.approx(by_hand, abs=1e-7)  # scores are float32
    assert smoothed[3].item() == pytest.approx(0.55) and batch.label[3] == 1.0  # 10 (2 P - 1) is 1, as in DPO
    outcome = learner.losses(batch)
    expected = logistic(10 * (2 * smoothed - 1) * outcome.metrics["margin"])
    torch.testing.assert_close(outcome.loss.detach(), expected, rtol=1e-10, atol=0)
    assert torch.equal(SmPO(beta=500, inversion_steps=3)(batch, given.policy, given.start, 0.2, 0.7).loss, outcome.loss)


def test_extremes_can_be_given_and_held_out_pairs_are_smoothed_alike() -> None:
    learner, _ = at_work(SmPO(beta=500, inversion_steps=3, score_low=0.0, score_high=2.0), by=OFF, score_range=None)
    batch = scored(first_batch(learner), [[1.0, 0.0]] * 4)
    p = 1 / (1 + math.exp(-0.5))
    for outcome in (learner.losses(batch), learner.validate(batch)):
        expected = logistic(10 * (2 * p - 1) * outcome.metrics["margin"])
        torch.testing.assert_close(outcome.loss.detach(), expected, rtol=1e-6, atol=0)


def test_pairs_of_data_with_scores_may_lack_theirs() -> None:
    learner, _ = at_work(SmPO(beta=500, inversion_steps=3), by=OFF)
    outcome = learner.losses(replace(first_batch(learner), scores=None))
    torch.testing.assert_close(outcome.loss.detach(), logistic(outcome.metrics["margin"]), rtol=1e-10, atol=0)


def test_smpo_without_scores_says_what_can_be_done() -> None:
    with pytest.raises(UserError, match=r"smooths labels by a judge's scores, which these data do not have.*--reward.*relabel"):
        at_work(SmPO(), score_range=None)
    with pytest.raises(UserError, match="--smoothing label --gamma 1"):
        at_work(SmPO(score_low=0.1), score_range=None)
    at_work(SmPO(smoothing="label"), score_range=None)
    with pytest.raises(ValueError, match="smoothing is one of scores, label; got 'labels'"):
        SmPO(smoothing="labels")


def test_ddim_inpo_is_a_setting() -> None:
    inpo = SmPO(beta=500, smoothing="label", gamma=1, inversion_steps=10, renoise=0, inversion_eta=0.1)
    assert inpo.inversion == DDIM_INPO
    learner, given = at_work(inpo, by=OFF, batch=2, score_range=None)
    batch = first_batch(learner)
    pair = inverted(batch, given.policy, given.policy.schedule, DDIM_INPO)
    with torch.no_grad():
        now, before = pair_errors(given.policy, pair), pair_errors(given.start, pair)
    outcome = learner.losses(batch)
    expected = logistic(250 * log_ratio(denoising(*now), denoising(*before)).margin)
    torch.testing.assert_close(outcome.loss.detach(), expected, rtol=1e-12, atol=0)
    assert (outcome.loss.detach() - DiffusionDPO(beta=500)(batch, given.policy, given.start).loss.detach()).abs().min() > 1e-6


def test_another_loss_sees_p_as_its_label() -> None:
    learner, _ = at_work(SmPO(beta=500, inversion_steps=3, loss="dpo"), by=OFF)
    batch = scored(first_batch(learner), [[0.9, 0.2]] * 4)
    outcome, p = learner.losses(batch), 1 / (1 + math.exp(-0.7))
    h = outcome.metrics["margin"]
    torch.testing.assert_close(outcome.loss.detach(), p * logistic(h) + (1 - p) * logistic(-h), rtol=1e-6, atol=0)


def test_the_way_up_is_without_gradient() -> None:
    """The policy finds x_t and the target, but is taught only through its prediction there."""
    learner, given = at_work(SmPO(beta=500, inversion_steps=3), by=OFF)
    batch = first_batch(learner)
    pair = inverted(batch, given.policy, given.policy.schedule, SmPO(inversion_steps=3).inversion)
    with torch.no_grad():
        before = pair_errors(given.start, pair)
    now = pair_errors(given.policy, pair)
    p = SmPO().smoothed(batch, 0.0, 1.0)
    by_hand = logistic(10 * (2 * p - 1) * 250 * log_ratio(denoising(*now), denoising(*before)).margin).sum()
    expected = gradients(by_hand, given.policy.network)
    found = gradients(learner.losses(batch).loss.sum(), given.policy.network)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_scores_of_the_test_data_span_the_given_range() -> None:
    known = ScoredPairs().scores
    assert known[~known.isnan()].aminmax() == (0.0, 1.0)
