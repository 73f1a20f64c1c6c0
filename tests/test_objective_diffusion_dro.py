"""Diffusion-DRO: experts against the policy's own steps, the margin, and the gradient that is there or not by the refresh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judged import OFF, at_work, dro, first_batch, gradients, logistic, moved
from torch import Tensor

from diffalign.errors import UserError
from diffalign.likelihood import pair_errors
from diffalign.objectives.diffusion_dro import DiffusionDRO, side_by_side
from diffalign.objectives.sft import SFT
from diffalign.types import PairBatch


def expert_error(batch: Any, policy: Any) -> Tensor:
    """SFT on the experts of a batch, at their steps' t. [B]"""
    r = batch.replayed
    return SFT()(
        PairBatch(r.x_0, r.x_0, r.conditioning, r.t, batch.noise, torch.ones(len(batch)), batch.weight, r.index), policy
    ).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_the_very_first_loss_is_the_margin(dtype: torch.dtype) -> None:
    learner, _ = at_work(DiffusionDRO(rollout_steps=3), dtype=dtype)
    outcome = learner.losses(first_batch(learner))
    assert outcome.loss.tolist() == [0.001] * 4
    assert outcome.metrics["active"].tolist() == [1.0] * 4


def after_two_steps(refresh: int) -> tuple[Any, Any, Any]:
    """DRO's second batch; the policy was pushed after the first. The margin is so large that every expert is active."""
    learner, given = at_work(dro(refresh=refresh))
    steps = learner.source.steps(0, 2)
    next(steps)
    moved(given.policy.network, OFF)
    (batch,) = next(steps)
    return learner.losses(batch), batch, given.policy


def test_with_a_refresh_at_every_step_the_policy_term_has_no_gradient() -> None:
    """It is SFT on the experts, no more and no less."""
    outcome, batch, policy = after_two_steps(refresh=1)
    assert outcome.metrics["policy_gap"].max() < 1e-12
    assert outcome.metrics["loser_drift"].abs().min() > 1e-6  # the term is there; its gradient is not
    found = gradients(outcome.loss.sum(), policy.network)
    expected = gradients(expert_error(batch, policy).sum(), policy.network)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_with_a_refresh_at_every_second_step_it_has_one() -> None:
    outcome, batch, policy = after_two_steps(refresh=2)
    assert outcome.metrics["policy_gap"].min() > 1e-7
    found = gradients(outcome.loss.sum(), policy.network)
    expert = gradients(expert_error(batch, policy).sum(), policy.network)
    pair = side_by_side(batch, policy.schedule)
    steps = gradients(pair_errors(policy, pair)[1].sum(), policy.network)
    assert steps.abs().max() > 1e-3 * expert.abs().max()
    torch.testing.assert_close(found, expert - steps, rtol=1e-7, atol=1e-10)


def test_where_the_margin_is_met_nothing_is_learnt() -> None:
    learner, given = at_work(dro(margin=0.0), batch=8)
    batch = first_batch(learner)
    moved(given.policy.network, OFF)
    outcome = learner.losses(batch)
    margin = outcome.metrics["margin"]  # E - Q, the other way round
    met = margin > 0
    assert 0 < met.sum() < 8
    assert outcome.loss[met].tolist() == [0.0] * int(met.sum())
    assert not gradients(outcome.loss[met].sum(), given.policy.network).any()
    torch.testing.assert_close(outcome.loss.detach()[~met], -margin[~met], rtol=1e-12, atol=0)
    assert outcome.metrics["active"].tolist() == (~met).double().tolist()
    wider = dro(margin=0.01)(batch, given.policy, given.start)
    torch.testing.assert_close(wider.loss.detach(), (0.01 - margin).clamp(min=0.0), rtol=1e-9, atol=1e-15)


def test_an_expert_is_noised_to_the_level_of_its_step() -> None:
    learner, given = at_work(dro())
    batch = first_batch(learner)
    pairs = next(iter(given.pairs.steps(0, 1)))[0]
    assert torch.equal(batch.replayed.x_0, pairs.winner)
    assert torch.equal(batch.noise, pairs.noise)
    pair = side_by_side(batch, given.policy.schedule)
    assert torch.equal(pair.winner, given.policy.schedule.add_noise(pairs.winner, pairs.noise, batch.replayed.t))
    assert torch.equal(pair.winner_target, pairs.noise.double())
    with torch.no_grad():  # the step is one of the policy's own, for the same prompt
        said = given.policy(pair.loser, pair.t, pairs.conditioning)
    torch.testing.assert_close(pair.loser_target.double(), said, rtol=0, atol=1e-6)


def test_dro_takes_other_losses_and_refuses_small_buffers() -> None:
    learner, given = at_work(dro(loss="dpo", beta=500))
    batch = first_batch(learner)
    moved(given.policy.network, OFF)
    outcome = learner.losses(batch)
    torch.testing.assert_close(outcome.loss.detach(), logistic(250 * outcome.metrics["margin"]), rtol=1e-12, atol=0)
    with pytest.raises(UserError, match="A buffer of 3 trajectories is less than a micro-batch of 4; 0 means as many"):
        at_work(dro(buffer=3))
    with pytest.raises(ValueError, match="no loss is called 'margins'"):
        DiffusionDRO(loss="margins")
