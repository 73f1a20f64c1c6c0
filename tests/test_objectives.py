"""What each objective promises, as identities on a real network: starts, signs, labels, where a gradient is and where none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from judged import CASES, ScoredPairs, at_work, brightness, first_batch, gradients, moved, rows_of
from torch import Tensor
from torch.nn import functional as F
from worlds import given as given_nothing
from worlds import small_denoiser

from diffalign import losses, objectives
from diffalign.errors import UserError
from diffalign.learner import Alone
from diffalign.likelihood import denoising, denoising_error, log_ratio, pair_errors, transition
from diffalign.objectives._family import remarks
from diffalign.objectives.d3po import D3PO
from diffalign.objectives.ddpo import DDPO, PromptRewards
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.diffusion_dro import DiffusionDRO, side_by_side
from diffalign.objectives.ipo import IPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.mapo import MaPO
from diffalign.objectives.seppo import SePPO, flipped_side
from diffalign.objectives.sft import SFT
from diffalign.objectives.smpo import SmPO
from diffalign.schedule import NoiseSchedule
from diffalign.solvers import Guided
from diffalign.sources.dataset import noised
from diffalign.sources.inversion import DDIM_INPO, inverted
from diffalign.sources.rounds import Rewards, TransitionBatch, extremes, on_one_scale
from diffalign.types import LogRatio, PairBatch

LN2 = math.log(2.0)
OFF = 2e-3  # how far from the start a policy is, per weight
ROLLED = {"rollout_steps": 3, "guidance": 2.0}


def seppo(**options) -> SePPO:
    return SePPO(**{"beta": 500, "rollout_steps": 2, "guidance": 1.0, **options})


def dro(**options) -> DiffusionDRO:
    return DiffusionDRO(**{"margin": 1.0, "rollout_steps": 3, **options})


def d3po(**options) -> D3PO:
    return D3PO(**{"round_pairs": 2, **ROLLED, **options})


def ddpo(**options) -> DDPO:
    return DDPO(**{"round_pairs": 2, "baseline": "round", "clip": 0.1, **ROLLED, **options})


def ratio_on(batch: PairBatch, policy: Any, reference: Any) -> LogRatio:
    """By hand: log-ratios of plainly noised pairs."""
    pair = noised(batch, policy.schedule)
    with torch.no_grad():
        return log_ratio(denoising(*pair_errors(policy, pair)), denoising(*pair_errors(reference, pair)))


def exchanged(batch: PairBatch) -> PairBatch:
    return replace(batch, winner=batch.loser, loser=batch.winner)


def logistic(h: Tensor) -> Tensor:
    return -F.logsigmoid(h)


# ------------------------------------------------------------------------------------------------------ what many promise

STARTING_AT_LN2 = {
    "diffusion-dpo": DiffusionDPO(beta=5000),
    "smpo": SmPO(beta=5000, inversion_steps=3),
    "seppo": seppo(beta=5000),
    "d3po": d3po(),
}


@pytest.mark.parametrize("name", STARTING_AT_LN2)
def test_a_policy_that_is_its_reference_has_loss_ln_2(name: str) -> None:
    learner, _ = at_work(STARTING_AT_LN2[name], accumulation=2)  # D3PO: two transitions each of two pairs
    outcome = learner.losses(first_batch(learner))
    assert outcome.loss.tolist() == pytest.approx([LN2] * 4, abs=1e-12 if name != "d3po" else 1e-8)  # float32 trajectories
    assert outcome.metrics["margin"].abs().max() < 1e-7
    assert outcome.loss.requires_grad


@pytest.mark.parametrize("name", ["diffusion-dpo", "smpo", "ipo", "seppo"])
def test_swapping_the_sides_negates_the_margin(name: str) -> None:
    learner, _ = at_work(CASES[name].objective, by=OFF)
    if name == "seppo":
        learner.source.reference.become({k: v + OFF for k, v in learner.source._given.weights.copy().items()})
        learner.source._round = 0
    batch = first_batch(learner)
    here, there = (learner.losses(b).metrics["margin"] for b in (batch, exchanged(batch)))
    assert here.abs().min() > 1e-4
    torch.testing.assert_close(there, -here, rtol=1e-9, atol=1e-12)


# Those that look at a batch as a whole (batch baselines, rewards normalised over a round) do so before the losses or not at all.
EACH_ALONE = {
    **{name: case for name, case in CASES.items() if case.kind == "pairs"},
    "kto": replace(CASES["kto"], objective=KTO(beta=200, baseline="none")),
    "kto of pictures": replace(CASES["kto of pictures"], objective=KTO(beta=200, baseline="none")),
    "ddpo": replace(CASES["ddpo"], objective=ddpo(round_pairs=4)),
    "d3po": replace(CASES["d3po"], objective=d3po(round_pairs=4)),
}


@pytest.mark.parametrize("name", EACH_ALONE)
def test_order_and_size_of_a_batch_change_nothing(name: str) -> None:
    case = EACH_ALONE[name]
    learner, given = at_work(case.objective, kind=case.kind, accumulation=2 if name in ("d3po", "ddpo") else 1)
    batch = first_batch(learner)
    moved(given.policy.network, OFF)  # after the trajectories: otherwise every ratio is 1
    whole, order = learner.losses(batch), [2, 0, 3, 1]
    mixed = learner.losses(rows_of(batch, order))
    alone = [learner.losses(rows_of(batch, [i])) for i in range(4)]
    assert whole.loss.shape == (4,)
    assert whole.loss.unique().numel() > 1
    torch.testing.assert_close(mixed.loss, whole.loss[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([one.loss for one in alone]), whole.loss, rtol=1e-10, atol=1e-12)
    for key, value in whole.metrics.items():
        assert value.shape == (4,)
        assert not value.requires_grad
        torch.testing.assert_close(mixed.metrics[key], value[order], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(torch.cat([one.metrics[key] for one in alone]), value, rtol=1e-8, atol=1e-10)
    one_by_one = sum(gradients(one.loss.sum(), given.policy.network) for one in alone)
    torch.testing.assert_close(one_by_one, gradients(whole.loss.sum(), given.policy.network), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in objectives.names(of_prompts=False) if n not in ("d3po", "ddpo")])
def test_held_out_pairs_are_told_without_gradient_and_against_the_start(name: str) -> None:
    """Whatever the source, validation means the same: plain noise, the frozen start, its drift and accuracy."""
    learner, given = at_work(CASES[name].objective, by=OFF)
    batch = next(iter(given.pairs.steps(0, 1)))[0]
    outcome = learner.validate(batch)
    assert not outcome.loss.requires_grad
    assert torch.equal(outcome.t, batch.t)
    ratio = ratio_on(batch, given.policy, given.start)
    torch.testing.assert_close(outcome.metrics["winner_drift"], -ratio.winner, rtol=0, atol=1e-12)
    torch.testing.assert_close(outcome.metrics["loser_drift"], -ratio.loser, rtol=0, atol=1e-12)
    assert torch.equal(outcome.metrics["accuracy"], (ratio.margin > 0).double())


@pytest.mark.parametrize("name", ["d3po", "ddpo"])
def test_what_learns_from_rounds_has_no_held_out_pairs(name: str) -> None:
    assert at_work(CASES[name].objective)[0].validate is None


@pytest.mark.parametrize("name", ["seppo", "kto", "diffusion-dro"])
def test_lone_pictures_have_no_held_out_pairs(name: str) -> None:
    learner, _ = at_work(CASES[name].objective, kind="pictures")
    assert learner.validate is None
    assert learner.losses(first_batch(learner)).loss.isfinite().all()


@pytest.mark.parametrize("name", objectives.names(of_prompts=False))
def test_an_objective_says_what_it_needs(name: str) -> None:
    policy = small_denoiser()
    needed = "prompts to sample for; and a judge" if name in ("d3po", "ddpo") else "(preference pairs|pictures)"
    with pytest.raises(UserError, match=rf"^This objective needs {needed}.*\.$"):
        CASES[name].objective.learner(given_nothing(policy, policy))


# ---------------------------------------------------------------------------------------------- Diffusion-DPO and --loss


def test_dpo_by_hand() -> None:
    learner, given = at_work(DiffusionDPO(beta=500), by=OFF)
    batch = first_batch(learner)
    ratio = ratio_on(batch, given.policy, given.start)
    torch.testing.assert_close(learner.losses(batch).loss, logistic(250 * (ratio.winner - ratio.loser)), rtol=1e-12, atol=0)
    direct = DiffusionDPO(beta=500)(batch, given.policy, given.start)
    assert torch.equal(direct.loss, learner.losses(batch).loss)


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_can_be_named(name: str) -> None:
    learner, given = at_work(DiffusionDPO(beta=500, loss=name), by=OFF)
    outcome = learner.losses(first_batch(learner))
    assert outcome.loss.shape == (4,)
    assert outcome.loss.isfinite().all()
    assert gradients(outcome.loss.mean(), given.policy.network).abs().max() > 1e-8
    told = learner.validate(first_batch(learner, 1))
    assert told.loss.isfinite().all()
    assert {"winner_drift", "loser_drift", "reference_winner_error"} <= told.metrics.keys()


@pytest.mark.parametrize("name", losses.names())
def test_the_reference_is_asked_only_by_losses_that_look_at_it(name: str) -> None:
    learner, given = at_work(DiffusionDPO(beta=500, loss=name), by=OFF)
    calls = []
    given.start._model = counted(given.start._model, calls)
    learner.losses(first_batch(learner))
    needs = losses.load(name).needs
    once = 2 if name == "kto" else 1  # KTO's baseline asks again, about mismatched prompts
    assert len(calls) == (0 if needs <= {"policy", "label", "rewards"} else once)


def counted(predictor: Any, calls: list) -> Any:
    def call(x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        calls.append(len(x_t))
        return predictor(x_t, t, conditioning)

    return call


def test_unknown_losses_and_constants_are_named() -> None:
    with pytest.raises(ValueError, match="no loss is called 'dpoo'; there are: adpo, aot, .*dpo"):
        DiffusionDPO(loss="dpoo")
    with pytest.raises(ValueError, match="the loss 'cdpo' has no constant nois; its constants are: noise"):
        DiffusionDPO(loss="cdpo", loss_options={"nois": 0.2})
    with pytest.raises(ValueError, match="a constant of the loss 'cdpo' is not a number: .*'much'"):
        DiffusionDPO(loss="cdpo", loss_options={"noise": "much"})
    with pytest.raises(ValueError, match="noise should be at most 0.5; got 0.7"):
        DiffusionDPO(loss="cdpo", loss_options={"noise": "0.7"})
    with pytest.raises(ValueError, match="divergence is one of .*js.*; got 'jensen'"):
        DiffusionDPO(divergence="jensen")


@pytest.mark.parametrize("name", [n for n in losses.names() if losses.load(n).mixes_batch])
def test_losses_that_compare_a_batch_need_one(name: str) -> None:
    with pytest.raises(UserError, match=f"The loss {name} compares the pairs of a batch: batch_size must be at least 2"):
        at_work(DiffusionDPO(loss=name), batch=1)


@pytest.mark.parametrize("name", ["madpo", "adpo"])
def test_losses_on_rewards_need_scores(name: str) -> None:
    with pytest.raises(UserError, match=f"The loss {name} needs a judge's scores of both pictures, which these data do not have"):
        at_work(DiffusionDPO(loss=name), score_range=None)


def test_losses_on_rewards_need_scores_of_all_pairs() -> None:
    with pytest.raises(UserError, match="The loss adpo needs .* and 3 of the pairs have none: leave them out, or let a judge"):
        at_work(DiffusionDPO(loss="adpo"), score_range=(0.0, 1.0), unscored=3)


def test_constants_and_extras_of_a_loss_arrive() -> None:
    learner, given = at_work(DiffusionDPO(beta=500, loss="cdpo", loss_options={"noise": "0.3"}, sft_weight=0.2), by=OFF)
    batch = first_batch(learner)
    h = 250 * ratio_on(batch, given.policy, given.start).margin
    with torch.no_grad():
        error = pair_errors(given.policy, noised(batch, given.policy.schedule))[0]
    expected = 0.7 * logistic(h) + 0.3 * logistic(-h) + 0.2 * 250 * error
    torch.testing.assert_close(learner.losses(batch).loss.detach(), expected, rtol=1e-8, atol=0)  # 1 - 0.3 in float32


def test_a_baseline_learns_in_training_only() -> None:
    learner, given = at_work(DiffusionDPO(beta=500, loss="bco"), by=OFF)
    batch = first_batch(learner)
    learner.validate(batch)
    assert learner.things["baseline"].state_dict() == {"mean": 0.0, "count": 0}
    learner.losses(batch)
    ratio = ratio_on(batch, given.policy, given.start)
    state = learner.things["baseline"].state_dict()
    assert state == pytest.approx({"mean": float(torch.cat([ratio.winner, ratio.loser]).mean()), "count": 8}, abs=1e-14)


# ----------------------------------------------------------------------------------------------------------------- SmPO


def scored(batch: PairBatch, scores: list[list[float]]) -> PairBatch:
    return replace(batch, scores=torch.tensor(scores))


def test_smpo_learns_nothing_from_pictures_that_score_alike() -> None:
    learner, given = at_work(SmPO(beta=500, inversion_steps=3), by=OFF)
    outcome = learner.losses(scored(first_batch(learner), [[0.4, 0.4]] * 4))
    assert outcome.loss.tolist() == pytest.approx([LN2] * 4, abs=1e-15)
    assert outcome.metrics["margin"].abs().min() > 1e-4
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
    assert smoothed[3] == batch.label[3] == 1.0
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
    torch.testing.assert_close(outcome.loss.detach(), logistic(10 * outcome.metrics["margin"]), rtol=1e-12, atol=0)


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


# ---------------------------------------------------------------------------------------------------------------- SePPO


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


# ------------------------------------------------------------------------------------------------------------------- DRO


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


@pytest.mark.parametrize(
    "objective, name, more",
    [
        (seppo, "hypo", "policy, reference"),
        (seppo, "kto", "baseline"),
        (dro, "madpo", "rewards"),
        (dro, "bco", "baseline"),
        (d3po, "mapo", "policy"),
        (d3po, "beta-dpo", "baseline"),
    ],
)
def test_losses_that_look_at_more_than_there_is_are_refused_at_once(objective: Any, name: str, more: str) -> None:
    with pytest.raises(ValueError, match=f"the loss {name} looks at more than this objective can show it: {more}"):
        objective(loss=name)


def test_a_loss_at_a_scale_that_it_was_not_made_for_is_remarked_on() -> None:
    (said,) = remarks(DiffusionDPO(loss="orpo", beta=2000.0))
    assert "orpo takes likelihoods as they are" in said and "beta is 2000" in said
    assert remarks(DiffusionDPO(loss="orpo", beta=1.0)) == [] == remarks(DiffusionDPO(beta=2000.0))
    (said,) = remarks(D3PO(loss="ipo"))
    assert "within 0.02 of zero" in said and "--clip inf" in said
    assert remarks(D3PO(loss="ipo", clip=math.inf)) == [] == remarks(D3PO())


@pytest.mark.parametrize("objective, name", [(seppo, "aot-unpaired"), (dro, "aot"), (d3po, "aot-unpaired")])
def test_losses_that_compare_a_batch_need_one_everywhere(objective: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"The loss {name} compares the pairs of a batch"):
        at_work(objective(loss=name), batch=1)
    learner, _ = at_work(objective(loss=name))
    assert learner.losses(first_batch(learner)).loss.isfinite().all()


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


# ------------------------------------------------------------------------------------------------------------------ D3PO


def densities_of(batch: TransitionBatch, predictor: Any, schedule: NoiseSchedule, given: Any) -> Any:
    with torch.no_grad():
        return transition(Guided(predictor, given.unconditional, 2.0), schedule, batch.pair)


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


def pushed(objective: Any, by: float = OFF, **more: Any) -> tuple[TransitionBatch, Any, Any]:
    """A round's transitions, learnt from by a policy that has moved since."""
    learner, given = at_work(objective, accumulation=2, **more)
    batch = first_batch(learner)
    moved(given.policy.network, by)
    return batch, given.policy, given


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


def alike(latents: Tensor, prompts: Any) -> Tensor:
    return torch.zeros(len(latents), 1, dtype=torch.float64)


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
    total = on_one_scale(both, Alone())
    torch.testing.assert_close(total, on_one_scale(both * torch.tensor([100.0, 0.1]) + 7.0, Alone()), rtol=1e-3, atol=1e-3)
    assert extremes(total).tolist() == [[2, 2], [1, 1]]
    assert extremes(both.mean(dim=2)).tolist() == [[2, 0], [0, 2]]
    assert torch.equal(on_one_scale(small[..., None], Alone()), small)


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
    return tracker(Rewards(rewards, rewards[..., 0], prompts, positions, round_), Alone())[1]


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


def test_ddpo_names_its_choices() -> None:
    with pytest.raises(ValueError, match="baseline is one of prompt, round; got 'prompts'"):
        DDPO(baseline="prompts")


# ------------------------------------------------------------------------------------------------------------------- KTO


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
        assert paired.things["baseline"].state_dict() == pytest.approx(lone.things["baseline"].state_dict(), rel=1e-12)
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
    assert learner.things["baseline"].value.item() == pytest.approx(expected, abs=1e-12)


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
        values.append(learner.things["baseline"].value.item())
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


# -------------------------------------------------------------------------------------------------------- SFT, MaPO, IPO


def raising(x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
    raise AssertionError("the reference was asked")


@pytest.mark.parametrize("objective", [SFT(), MaPO()], ids=["sft", "mapo"])
def test_without_a_reference_means_without(objective: Any) -> None:
    learner, given = at_work(objective, by=OFF)
    batch = first_batch(learner)
    expected = learner.losses(batch).loss
    given.start._model = raising
    assert torch.equal(learner.losses(batch).loss, expected)
    with pytest.raises(AssertionError, match="was asked"):  # on held-out pairs it is, for drift and accuracy
        learner.validate(batch)


def test_sft_is_the_winners_error() -> None:
    learner, given = at_work(SFT(), by=OFF)
    batch = first_batch(learner)
    with torch.no_grad():
        error = pair_errors(given.policy, noised(batch, given.policy.schedule))[0]
    torch.testing.assert_close(learner.losses(batch).loss.detach(), error, rtol=1e-12, atol=0)
    assert torch.equal(learner.losses(batch).loss, learner.losses(replace(batch, loser=batch.loser * 0)).loss)


def test_mapo_by_hand() -> None:
    learner, given = at_work(MaPO(weight=0.2, rate=0.7, sharpness=30.0), by=OFF)
    batch = first_batch(learner)
    with torch.no_grad():
        winner, loser = pair_errors(given.policy, noised(batch, given.policy.schedule))
    q_w, q_l = (0.7 * e / (torch.exp(0.7 * e) - 1) for e in (winner, loser))
    expected = winner + 0.2 * logistic(30.0 * (q_w - q_l))
    torch.testing.assert_close(learner.losses(batch).loss.detach(), expected, rtol=1e-10, atol=0)


def test_ipo_wants_a_margin_of_a_half_and_no_more() -> None:
    learner, given = at_work(IPO(beta=500), batch=1)
    batch = first_batch(learner)
    assert learner.losses(batch).loss.item() == 0.25
    moved(given.policy.network, OFF)
    margin = ratio_on(batch, given.policy, given.start).margin
    batch = batch if margin > 0 else exchanged(batch)
    beta = 1.0 / abs(margin.item())  # beta/2 times the margin is 1/2
    met, more, less = (IPO(beta=k * beta)(batch, given.policy, given.start) for k in (1.0, 1.5, 0.5))
    assert met.loss.item() == pytest.approx(0, abs=1e-20)
    directions = [gradients(o.loss.sum(), given.policy.network) for o in (met, more, less)]
    assert directions[0].abs().max() < 1e-9 * directions[1].abs().max()
    torch.testing.assert_close(directions[1], -3 * directions[2], rtol=1e-9, atol=1e-9)  # 1.5 (0.25) against 0.5 (-0.25)


def test_scores_of_the_test_data_span_the_given_range() -> None:
    known = ScoredPairs().scores
    assert known[~known.isnan()].aminmax() == (0.0, 1.0)


@pytest.mark.parametrize(("objective", "own"), [(D3PO, "clipped"), (DiffusionDRO, "margin")])
@pytest.mark.parametrize("extra", [{"divergence": "js"}, {"sft_weight": 0.1}, {"loss_options": {"noise": 0.1}}])
def test_settings_that_would_do_nothing_are_refused(objective, own: str, extra: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(extra))} would do nothing: the loss '{own}' is the objective's own"):
        objective(**extra)
    options = extra if "loss_options" in extra else {**extra, "loss_options": {"noise": 0.1}}
    assert objective(loss="rdpo", **options).chosen().name == "rdpo"
