"""What many objectives promise: the first loss, swapped sides, batches in any order, held-out pairs, what a run must give.

What each promises for itself is in the files ``test_objective_*``, named after the modules of ``diffalign.objectives``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from judged import CASES, LN2, OFF, at_work, d3po, ddpo, exchanged, first_batch, gradients, moved, ratio_on, rows_of, seppo
from worlds import given as given_nothing
from worlds import small_denoiser

from diffalign import objectives
from diffalign.errors import UserError
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.smpo import SmPO

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
        learner.source.reference.become({k: v + OFF for k, v in learner.source._run.weights.copy().items()})
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
