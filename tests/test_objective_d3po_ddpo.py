"""D3PO and DDPO, which learn from rounds: ratios that start at one, clips, who wins among candidates, ties, advantages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from judged import LN2, OFF, at_work, brightness, d3po, ddpo, first_batch, gradients, logistic, moved
from torch import Tensor

from diffalign.data.draws import Order
from diffalign.likelihood import transition
from diffalign.objectives.d3po import D3PO
from diffalign.objectives.ddpo import DDPO, PromptRewards
from diffalign.processes import OneProcess
from diffalign.schedule import NoiseSchedule
from diffalign.solvers import Guided
from diffalign.sources.rounds import Rewards, TransitionBatch, extremes, on_one_scale

# ------------------------------------------------------------------------------------------------------------------ Both


def densities_of(batch: TransitionBatch, predictor: Any, schedule: NoiseSchedule, given: Any) -> Any:
    with torch.no_grad():
        return transition(Guided(predictor, given.unconditional, 2.0), schedule, batch.pair)


def pushed(objective: Any, by: float = OFF, **more: Any) -> tuple[TransitionBatch, Any, Any]:
    """A round's transitions, learnt from by a policy that has moved since."""
    learner, given = at_work(objective, accumulation=2, **more)
    batch = first_batch(learner)
    moved(given.policy.network, by)
    return batch, given.policy, given


def alike(latents: Tensor, prompts: Any) -> Tensor:
    return torch.zeros(len(latents), 1, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------------ D3PO


@pytest.mark.parametrize("reference", ["round", "start"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=["f32", "f64"])
def test_the_first_ratios_are_one(reference: str, dtype: torch.dtype, tolerance: float) -> None:
    """Also those against the frozen start, whose densities are computed for themselves: the policy has not moved yet."""
    learner, given = at_work(d3po(reference=reference), dtype=dtype)
    batch = first_batch(learner)
    now = densities_of(batch, given.policy, given.policy.schedule, given)
    for side in ("winner", "loser"):
        known = getattr(batch.reference, side)
        torch.testing.assert_close(getattr(now, side), known, rtol=0, atol=tolerance)
        torch.testing.assert_close(getattr(batch.made_by, side), known, rtol=0, atol=tolerance)


def test_the_frozen_start_is_another_reference_than_the_round() -> None:
    learner, given = at_work(d3po(reference="start"), by=OFF)
    batch = first_batch(learner)
    before = densities_of(batch, given.start, given.policy.schedule, given)
    torch.testing.assert_close(batch.reference.winner, before.winner, rtol=0, atol=1e-9)
    torch.testing.assert_close(batch.reference.loser, before.loser, rtol=0, atol=1e-9)
    now = densities_of(batch, given.policy, given.policy.schedule, given)
    torch.testing.assert_close(batch.made_by.winner, now.winner, rtol=0, atol=1e-6)
    assert (now.winner - before.winner).abs().min() > 1e-5


def test_d3po_by_hand() -> None:
    batch, policy, given = pushed(d3po())
    outcome = d3po()(batch, policy, given.unconditional)
    now = densities_of(batch, policy, policy.schedule, given)
    rho = [(now.winner - batch.reference.winner), (now.loser - batch.reference.loser)]
    low, high = math.log(0.9), math.log(1.1)
    sign = 2 * batch.label - 1
    h = 0.1 * (rho[0].clamp(low, high) - rho[1].clamp(low, high))
    torch.testing.assert_close(outcome.loss.detach(), logistic(sign * h), rtol=1e-12, atol=0)
    torch.testing.assert_close(outcome.metrics["margin"], sign * 0.1 * (rho[0] - rho[1]), rtol=1e-9, atol=1e-12)


def test_outside_the_clip_there_is_no_gradient() -> None:
    batch, policy, given = pushed(d3po())
    now = densities_of(batch, policy, policy.schedule, given)
    away = torch.stack([now.winner - batch.reference.winner, now.loser - batch.reference.loser]).abs()
    clip = math.expm1(away.median().item())  # between: some sides are inside, some outside
    outcome = d3po(clip=clip)(batch, policy, given.unconditional)
    nowhere = d3po(clip=0.5 * away.min().item())(batch, policy, given.unconditional)
    assert nowhere.metrics["clipped"].tolist() == [1.0] * 4
    assert not gradients(nowhere.loss.sum(), policy.network).any()
    assert 0 < outcome.metrics["clipped"].mean() < 1
    free = d3po(clip=math.inf)(batch, policy, given.unconditional)
    assert free.metrics["clipped"].tolist() == [0.0] * 4
    assert gradients(free.loss.sum(), policy.network).abs().max() > 1e-6


def test_one_side_may_be_clipped_and_the_other_not() -> None:
    batch, policy, given = pushed(d3po(), by=OFF / 10)
    now = transition(Guided(policy, given.unconditional, 2.0), policy.schedule, batch.pair)
    far = replace(batch, reference=replace(batch.reference, winner=batch.reference.winner - 10.0))
    outcome = d3po()(far, policy, given.unconditional)
    assert outcome.metrics["clipped"].tolist() == [0.5] * 4
    sign = 2 * batch.label - 1
    rho = now.loser - batch.reference.loser
    factor = (1 - outcome.loss.detach().neg().exp()) * sign * 0.1  # of a loss -log s, 1 - s
    expected = gradients((factor * rho).sum(), policy.network)
    found = gradients(outcome.loss.sum(), policy.network)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def test_a_tie_teaches_nothing() -> None:
    batch, policy, given = pushed(d3po(), judge=alike)
    assert batch.label.tolist() == [0.5] * 4
    outcome = d3po()(batch, policy, given.unconditional)
    assert outcome.metrics["tie"].tolist() == [1.0] * 4
    assert outcome.loss.tolist() == pytest.approx([LN2] * 4, abs=1e-15)
    assert not gradients(outcome.loss.sum(), policy.network).any()


def test_who_wins_is_who_dominates() -> None:
    """Two judges who always disagree make ties; two who agree make verdicts."""

    def disagreeing(latents: Tensor, prompts: Any) -> Tensor:
        bright = brightness(latents, prompts)
        return torch.cat([bright, -bright], dim=1)

    def agreeing(latents: Tensor, prompts: Any) -> Tensor:
        return brightness(latents, prompts).repeat(1, 2)

    assert first_batch(at_work(d3po(), judge=disagreeing)[0]).label.tolist() == [0.5] * 2
    learner, _ = at_work(d3po(round_pairs=6), judge=agreeing)
    batch = first_batch(learner)
    judged = learner.source._judged
    better = brightness(judged.first.final, [0] * 6) > brightness(judged.second.final, [0] * 6)
    assert set(judged.label.tolist()) == {0.0, 1.0}
    assert judged.label.tolist() == better[:, 0].double().tolist()
    rewards = [brightness(side.final, side.index)[:, 0] for side in (judged.first, judged.second)]
    assert torch.equal(torch.stack(rewards, dim=1), judged.rewards)
    assert batch.rewards[0].tolist() in judged.rewards.tolist()


def test_of_more_candidates_the_best_and_the_worst_are_the_pair() -> None:
    """The first two of four are the two of a pair, so nothing else changes with their number."""
    seen = []

    def judge(latents: Tensor, prompts: Any) -> Tensor:
        seen.append(brightness(latents, prompts))
        return seen[-1]

    two, _ = at_work(d3po(round_pairs=6), judge=judge)
    four, _ = at_work(d3po(round_pairs=6, candidates=4), judge=judge)
    first_batch(two), first_batch(four)
    few, many = (rewards.view(-1, 6) for rewards in seen)
    torch.testing.assert_close(many[:2], few, rtol=1e-5, atol=1e-6)
    judged = four.source._judged
    torch.testing.assert_close(judged.rewards, torch.stack([many.amax(dim=0), many.amin(dim=0)], dim=1))
    assert judged.label.tolist() == [1.0] * 6
    again = torch.stack([brightness(side.final, side.index)[:, 0] for side in (judged.first, judged.second)], dim=1)
    torch.testing.assert_close(again, judged.rewards, rtol=1e-5, atol=1e-6)
    assert torch.equal(judged.reference[0], judged.first.log_density)


def test_equal_candidates_make_a_tie_of_two_trajectories() -> None:
    assert extremes(torch.zeros(5, 3)).tolist() == [[0] * 3, [4] * 3]
    assert extremes(torch.tensor([[1.0], [3.0], [0.0], [3.0], [0.0]])).tolist() == [[1], [4]]
    assert extremes(torch.tensor([[1.0], [3.0]])).tolist() == [[0], [1]]


def test_a_judge_with_large_numbers_does_not_decide_alone() -> None:
    """One gives 0.18 to 0.24 as PickScore's cosines, the other 4 to 6 as aesthetic scores; both count the same."""
    small = torch.tensor([[0.24, 0.18], [0.18, 0.20], [0.20, 0.24]], dtype=torch.float64)
    large = torch.tensor([[4.0, 6.0], [4.1, 5.0], [6.0, 4.0]], dtype=torch.float64)
    both = torch.stack([small, large], dim=2)  # [K, N, R]
    total = on_one_scale(both, OneProcess())
    torch.testing.assert_close(total, on_one_scale(both * torch.tensor([100.0, 0.1]) + 7.0, OneProcess()), rtol=1e-3, atol=1e-3)
    assert extremes(total).tolist() == [[2, 2], [1, 1]]
    assert extremes(both.mean(dim=2)).tolist() == [[2, 0], [0, 2]]
    assert torch.equal(on_one_scale(small[..., None], OneProcess()), small)


def test_what_the_policy_earns_is_the_mean_of_all_candidates() -> None:
    seen = []

    def judge(latents: Tensor, prompts: Any) -> Tensor:
        seen.append(brightness(latents, prompts))
        return seen[-1]

    learner, _ = at_work(d3po(round_pairs=6, candidates=5), judge=judge)
    batch = first_batch(learner)
    earned = seen[0].view(5, 6).mean(dim=0)
    torch.testing.assert_close(learner.source._judged.mean_reward, earned)
    assert set(batch.mean_reward.tolist()) <= set(earned.tolist())


def test_turning_the_label_negates_the_margin() -> None:
    batch, policy, given = pushed(d3po(clip=math.inf))
    turned = replace(batch, label=1 - batch.label)
    here, there = (d3po(clip=math.inf)(b, policy, given.unconditional).metrics["margin"] for b in (batch, turned))
    assert here.abs().min() > 1e-7
    assert torch.equal(here, -there)


def test_other_losses_look_at_the_clipped_ratios() -> None:
    batch, policy, given = pushed(d3po())
    batch = replace(batch, label=torch.ones_like(batch.label))
    one, other = (d3po(loss=name)(batch, policy, given.unconditional).loss for name in ("clipped", "dpo"))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    h = d3po()(batch, policy, given.unconditional)
    squared = d3po(loss="ipo", clip=math.inf)(batch, policy, given.unconditional)
    torch.testing.assert_close(squared.loss.detach(), (h.metrics["margin"] - 0.5).square(), rtol=1e-9, atol=0)


def test_d3po_names_its_choices() -> None:
    with pytest.raises(ValueError, match="reference is one of round, start; got 'last'"):
        D3PO(reference="last")
    with pytest.raises(ValueError, match="no loss is called 'clip'"):
        D3PO(loss="clip")
    with pytest.raises(ValueError, match="eta should be greater than 0"):
        D3PO(eta=0.0)


# ------------------------------------------------------------------------------------------------------------------ DDPO


def test_advantages_have_mean_0_and_deviation_1_over_a_round() -> None:
    learner, _ = at_work(ddpo(round_pairs=6))
    first_batch(learner)
    judged = learner.source._judged
    assert judged.advantage.shape == (6, 2)
    assert judged.advantage.mean().item() == pytest.approx(0, abs=1e-12)
    assert judged.advantage.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    order = judged.rewards.flatten().argsort()
    assert (judged.advantage.flatten()[order].diff() >= 0).all()


def verdict(tracker: PromptRewards, values: list[list[float]], prompts: list[int], round_: int) -> Tensor:
    rewards = torch.tensor(values, dtype=torch.float64)[..., None]
    positions = [round_ * len(prompts) + i for i in range(len(prompts))]
    return tracker(Rewards(rewards, rewards[..., 0], prompts, positions, round_), OneProcess())[1]


def test_advantages_per_prompt_by_hand() -> None:
    """Prompt 0 has its four rewards, prompt 1 only two, fewer than the least: that one is measured against the round."""
    tracker = PromptRewards(tracked=4, least=3)
    found = verdict(tracker, [[1.0, 3.0], [5.0, 7.0], [10.0, 20.0]], [0, 0, 1], 0)
    deviation = math.sqrt(5)
    assert found[:2].flatten().tolist() == pytest.approx([(r - 4) / deviation for r in (1, 3, 5, 7)], abs=1e-5)
    everyone = torch.tensor([1.0, 3, 5, 7, 10, 20])
    expected = (torch.tensor([10.0, 20.0]) - everyone.mean()) / everyone.std(correction=0)
    assert found[2].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    again = verdict(tracker, [[9.0, 9.0], [10.0, 20.0], [0.0, 0.0]], [0, 1, 1], 1)  # prompt 0 now remembers 5, 7, 9, 9
    assert again[0].tolist() == pytest.approx([1.5 / math.sqrt(2.75)] * 2, abs=1e-5)
    assert tracker.state_dict()["held"] == {0: [5.0, 7.0, 9.0, 9.0], 1: [10.0, 20.0, 0.0, 0.0]}  # of prompt 1 the newest four


def test_a_round_that_is_judged_twice_counts_once() -> None:
    once, twice = PromptRewards(tracked=8, least=2), PromptRewards(tracked=8, least=2)
    for tracker in (once, twice):
        verdict(tracker, [[1.0, 2.0]], [0], 0)
        verdict(tracker, [[3.0, 5.0]], [0], 1)
    resumed = PromptRewards(tracked=8, least=2)
    resumed.load_state_dict(twice.state_dict())
    for tracker in (twice, resumed):
        assert torch.equal(verdict(tracker, [[3.0, 5.0]], [0], 1), verdict(once, [[3.0, 5.0]], [0], 1))
        assert tracker.state_dict() == once.state_dict()
    assert once.state_dict()["held"] == {0: [1.0, 2.0, 3.0, 5.0]}


def test_rewards_alike_have_no_advantage() -> None:
    batch, policy, given = pushed(ddpo(), judge=alike)
    assert not batch.advantage.any()
    assert not gradients(ddpo()(batch, policy, given.unconditional).loss.sum(), policy.network).any()


def test_ddpo_starts_at_minus_the_advantage_and_goes_up_the_reward() -> None:
    learner, given = at_work(ddpo(), accumulation=2)
    batch = first_batch(learner)
    outcome = learner.losses(batch)
    torch.testing.assert_close(outcome.loss.detach(), -batch.advantage.mean(dim=1), rtol=1e-5, atol=1e-6)
    assert outcome.metrics["clipped"].tolist() == [0.0] * 4
    assert torch.equal(outcome.metrics["advantage"], batch.advantage.abs().mean(dim=1))
    now = transition(Guided(given.policy, given.unconditional, 2.0), given.policy.schedule, batch.pair)
    by_hand = -(batch.advantage[:, 0] * now.winner + batch.advantage[:, 1] * now.loser) / 2  # REINFORCE: the ratio is 1
    found, expected = (gradients(loss.sum(), given.policy.network) for loss in (outcome.loss, by_hand))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_ddpo_is_clipped_only_where_it_would_go_on() -> None:
    batch, policy, given = pushed(ddpo())
    now = densities_of(batch, policy, policy.schedule, given)
    r = torch.stack([now.winner - batch.made_by.winner, now.loser - batch.made_by.loser], dim=1).exp()
    clip = (r - 1).abs().median().item()
    a = batch.advantage
    expected = torch.maximum(-a * r, -a * r.clamp(1 - clip, 1 + clip)).mean(dim=1)
    outcome = ddpo(clip=clip)(batch, policy, given.unconditional)
    torch.testing.assert_close(outcome.loss.detach(), expected, rtol=1e-10, atol=1e-12)
    assert 0 < outcome.metrics["clipped"].mean() < 1


@pytest.mark.parametrize(("prompts", "round_pairs", "least"), [(7, 3, 5), (4, 8, 4), (5, 5, 2), (3, 2, 6)])
def test_when_the_first_prompt_has_a_baseline_of_its_own(prompts: int, round_pairs: int, least: int) -> None:
    """As the tracker finds it, visit by visit."""
    tracker, order = PromptRewards(tracked=32, least=least), Order(prompts, 0)
    for round_ in range(100):
        visited = [order.row(round_ * round_pairs + i) for i in range(round_pairs)]
        verdict(tracker, [[0.0, 1.0]] * round_pairs, visited, round_)
        if max(map(len, tracker.state_dict()["held"].values())) >= least:
            break
    assert DDPO(round_pairs=round_pairs, least=least).first_own(prompts) == round_ + 1
    assert DDPO(baseline="round").first_own(prompts) == 1


def test_ddpo_names_its_choices() -> None:
    with pytest.raises(ValueError, match="baseline is one of prompt, round; got 'prompts'"):
        DDPO(baseline="prompts")
