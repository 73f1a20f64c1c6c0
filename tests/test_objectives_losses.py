"""``--loss`` at work in an objective: any of the family, its constants and baseline, and which are refused or remarked on.

The losses by themselves are in ``test_losses_family``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from judged import OFF, at_work, d3po, dro, first_batch, gradients, logistic, ratio_on, seppo
from torch import Tensor

from diffalign import losses
from diffalign.errors import UserError
from diffalign.likelihood import pair_errors
from diffalign.objectives._family import remarks
from diffalign.objectives.d3po import D3PO
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.diffusion_dro import DiffusionDRO
from diffalign.sources.dataset import noised

# ------------------------------------------------------------------------------------------------------ In Diffusion-DPO


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
    assert learner.stateful["baseline"].state_dict() == {"mean": 0.0, "count": 0}
    learner.losses(batch)
    ratio = ratio_on(batch, given.policy, given.start)
    state = learner.stateful["baseline"].state_dict()
    assert state == pytest.approx({"mean": float(torch.cat([ratio.winner, ratio.loser]).mean()), "count": 8}, abs=1e-14)


# --------------------------------------------------------------------------------------------- Wherever one can be named


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


@pytest.mark.parametrize(("objective", "own"), [(D3PO, "clipped"), (DiffusionDRO, "margin")])
@pytest.mark.parametrize("extra", [{"divergence": "js"}, {"sft_weight": 0.1}, {"loss_options": {"noise": 0.1}}])
def test_settings_that_would_do_nothing_are_refused(objective, own: str, extra: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(extra))} would do nothing: the loss '{own}' is the objective's own"):
        objective(**extra)
    options = extra if "loss_options" in extra else {**extra, "loss_options": {"noise": 0.1}}
    assert objective(loss="rdpo", **options).chosen().name == "rdpo"
