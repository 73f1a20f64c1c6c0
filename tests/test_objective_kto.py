"""KTO: pairs as two pictures each, lone pictures, baselines, utilities and weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from judged import OFF, at_work, first_batch, gradients, logistic, moved, ratio_on, rows_of

from diffalign.errors import UserError
from diffalign.likelihood import denoising_error
from diffalign.objectives.kto import KTO
from diffalign.types import PairBatch


def as_pictures(batch: PairBatch) -> PairBatch:
    """Winners as good pictures, losers as bad ones."""
    both = rows_of(batch, [*range(len(batch)), *range(len(batch))])
    pictures = torch.cat([batch.winner, batch.loser])
    label = torch.cat([torch.ones(len(batch)), torch.zeros(len(batch))])
    return replace(both, winner=pictures, loser=pictures, label=label)


@pytest.mark.parametrize("baseline", ["batch", "mismatched", "none"])
def test_pairs_are_two_pictures_each(baseline: str) -> None:
    """A pair's loss is that of its two pictures, against the same baseline."""
    paired, given = at_work(KTO(beta=200, baseline=baseline), by=OFF)
    lone, _ = at_work(KTO(beta=200, baseline=baseline), kind="pictures", by=OFF)
    batch = first_batch(paired)
    whole = paired.losses(batch)
    pictures = as_pictures(batch)
    if baseline == "mismatched":  # each side's prompts are rolled among themselves there, here among all
        order = [0, 4, 1, 5, 2, 6, 3, 7]
        pictures = rows_of(pictures, order)
    apart = lone.losses(pictures)
    if baseline != "mismatched":
        torch.testing.assert_close(apart.loss[:4] + apart.loss[4:], whole.loss, rtol=1e-12, atol=0)
        assert paired.stateful["baseline"].state_dict() == pytest.approx(lone.stateful["baseline"].state_dict(), rel=1e-12)
    z = {"batch": sides_mean, "mismatched": rolled_mean, "none": lambda *_: 0.0}[baseline]
    ratio = ratio_on(batch, given.policy, given.start)
    x = [200 * (side - z(batch, given)) for side in (ratio.winner, ratio.loser)]
    expected = (1 - torch.sigmoid(x[0])) + (1 - torch.sigmoid(-x[1]))
    torch.testing.assert_close(whole.loss.detach(), expected, rtol=1e-10, atol=0)


def sides_mean(batch: PairBatch, given: Any) -> float:
    ratio = ratio_on(batch, given.policy, given.start)
    return max(0.0, float(torch.cat([ratio.winner, ratio.loser]).mean()))


def rolled_mean(batch: PairBatch, given: Any) -> float:
    return sides_mean(replace(batch, conditioning={k: v.roll(1, dims=0) for k, v in batch.conditioning.items()}), given)


def test_pictures_with_each_others_prompts() -> None:
    learner, given = at_work(KTO(beta=200, baseline="mismatched"), kind="pictures", by=OFF)
    batch = as_pictures(first_batch(at_work(KTO(), by=OFF)[0]))
    learner.losses(batch)
    rolled = {k: v.roll(1, dims=0) for k, v in batch.conditioning.items()}
    expected = max(0.0, float(ratio_on(replace(batch, conditioning=rolled), given.policy, given.start).winner.mean()))
    assert learner.stateful["baseline"].value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", [7, 8])
def test_a_baseline_is_never_below_zero(seed: int) -> None:
    """One push makes the policy better on average, one worse; both are seen over the two seeds and their opposites."""
    values = []
    for sign in (1, -1):
        learner, given = at_work(KTO(beta=200))
        moved(given.policy.network, sign * OFF, seed=seed)
        batch = first_batch(learner)
        learner.losses(batch)
        ratio = ratio_on(batch, given.policy, given.start)
        mean = float(torch.cat([ratio.winner, ratio.loser]).mean())
        values.append(learner.stateful["baseline"].value.item())
        assert values[-1] == pytest.approx(max(0.0, mean), abs=1e-14)
    assert min(values) == 0.0


@pytest.mark.parametrize("good", [True, False])
def test_good_pictures_are_learnt_and_bad_ones_unlearnt(good: bool) -> None:
    learner, given = at_work(KTO(beta=200), kind="pictures")
    batch = replace(first_batch(learner), label=torch.full((4,), float(good)))
    loss = learner.losses(batch).loss.sum()
    found = gradients(loss, given.policy.network)
    x_t = given.policy.schedule.add_noise(batch.winner, batch.noise, batch.t)
    error = denoising_error(given.policy(x_t, batch.t, batch.conditioning), batch.noise.double()).sum()
    expected = gradients(error, given.policy.network) * (1 if good else -1) * 200 / 4  # sigma'(0) = 1/4
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_weights_and_utilities_arrive() -> None:
    learner, given = at_work(
        KTO(beta=200, baseline="none", utility="loss-averse", desirable_weight=2.0, undesirable_weight=0.5), by=OFF
    )
    batch = first_batch(learner)
    ratio = ratio_on(batch, given.policy, given.start)
    expected = 2.0 * (1 + logistic(200 * ratio.winner)) + 0.5 * (1 + logistic(-200 * ratio.loser))
    torch.testing.assert_close(learner.losses(batch).loss.detach(), expected, rtol=1e-12, atol=0)


def test_kto_names_its_choices() -> None:
    with pytest.raises(ValueError, match="baseline is one of batch, mismatched, none; got 'mean'"):
        KTO(baseline="mean")
    with pytest.raises(ValueError, match="utility is one of kahneman-tversky, .*; got 'log'"):
        KTO(utility="log")


@pytest.mark.parametrize("kind", ["pairs", "pictures"])
def test_mismatched_prompts_need_two(kind: str) -> None:
    with pytest.raises(UserError, match="mismatched prompts needs a batch_size of at least 2"):
        at_work(KTO(baseline="mismatched"), kind=kind, batch=1)
