"""Diffusion-DPO, IPO, MaPO and SFT by hand, on pairs that are only noised; and which of them do without a reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from judged import OFF, at_work, exchanged, first_batch, gradients, logistic, moved, ratio_on
from torch import Tensor

from diffalign.likelihood import pair_errors
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.ipo import IPO
from diffalign.objectives.mapo import MaPO
from diffalign.objectives.sft import SFT
from diffalign.sources.dataset import noised


def test_dpo_by_hand() -> None:
    learner, given = at_work(DiffusionDPO(beta=500), by=OFF)
    batch = first_batch(learner)
    ratio = ratio_on(batch, given.policy, given.start)
    torch.testing.assert_close(learner.losses(batch).loss, logistic(250 * (ratio.winner - ratio.loser)), rtol=1e-12, atol=0)
    direct = DiffusionDPO(beta=500)(batch, given.policy, given.start)
    assert torch.equal(direct.loss, learner.losses(batch).loss)


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


def test_mapo_by_hand() -> None:
    learner, given = at_work(MaPO(weight=0.2, rate=0.7, sharpness=30.0), by=OFF)
    batch = first_batch(learner)
    with torch.no_grad():
        winner, loser = pair_errors(given.policy, noised(batch, given.policy.schedule))
    q_w, q_l = (0.7 * e / (torch.exp(0.7 * e) - 1) for e in (winner, loser))
    expected = winner + 0.2 * logistic(30.0 * (q_w - q_l))
    torch.testing.assert_close(learner.losses(batch).loss.detach(), expected, rtol=1e-10, atol=0)


def test_sft_is_the_winners_error() -> None:
    learner, given = at_work(SFT(), by=OFF)
    batch = first_batch(learner)
    with torch.no_grad():
        error = pair_errors(given.policy, noised(batch, given.policy.schedule))[0]
    torch.testing.assert_close(learner.losses(batch).loss.detach(), error, rtol=1e-12, atol=0)
    assert torch.equal(learner.losses(batch).loss, learner.losses(replace(batch, loser=batch.loser * 0)).loss)


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
