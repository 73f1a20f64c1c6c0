"""Every image objective on a flow model; and denoising errors measured as those of another parametrisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from judged import CASES, at_work, first_batch, gradients
from worlds import flow_denoiser, sd_alpha_bar, small_denoiser

from diffalign.differences import differences
from diffalign.likelihood import pair_errors
from diffalign.schedule import FlowSchedule, NoiseSchedule, Schedule
from diffalign.sources.dataset import noised
from diffalign.sources.store import Store, TrajectoryOrigin, schedule_fingerprint
from pipelines.families.stable_diffusion import UNetDenoiser

OF_STEPS = {"d3po", "ddpo"}  # learn from densities of transitions
OF_ERRORS = [name for name in CASES if name not in OF_STEPS]


def working(name: str, by: float, make: Any = flow_denoiser) -> Any:
    case = CASES[name]
    return at_work(case.objective, by=by, batch=case.batch, kind=case.kind, make=make)


# ---------------------------------------------------------------------------------------------------------- Objectives


@pytest.mark.parametrize("name", CASES)
def test_one_step_on_a_flow_model(name: str) -> None:
    """Losses and gradients are finite, and there is a gradient, at levels that are no whole numbers; on held-out pairs, too."""
    learner, given = working(name, by=2e-3)
    batch = first_batch(learner)
    outcome = learner.losses(batch)
    assert outcome.t.dtype == torch.float32
    assert outcome.loss.isfinite().all()
    gradient = gradients(outcome.loss.mean(), given.policy.network)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    if learner.validate:
        (pairs,) = next(iter(given.pairs.steps(0, 1)))
        assert any(t != int(t) for t in pairs.t.tolist())
        assert learner.validate(pairs).loss.isfinite().all()


@pytest.mark.parametrize(
    "name, expected",
    [(n, math.log(2)) for n in ("diffusion-dpo", "smpo", "smpo as ddim-inpo", "seppo", "d3po")]
    + [("ipo", 0.25), ("diffusion-dro", 0.05), ("kto", 1.0), ("kto of pictures", 0.5)],
)
def test_a_policy_at_its_start_has_the_loss_of_a_zero_margin(name: str, expected: float) -> None:
    learner, _ = working(name, by=0.0)
    outcome = learner.losses(first_batch(learner))
    torch.testing.assert_close(outcome.loss, torch.full_like(outcome.loss, expected), rtol=0, atol=1e-9)


def test_a_gradient_step_raises_the_margin_of_a_flow_model() -> None:
    learner, given = working("diffusion-dpo", by=0.0)
    batch = first_batch(learner)
    optimizer = torch.optim.SGD(given.policy.network.parameters(), lr=1e-6)
    learner.losses(batch).loss.mean().backward()
    optimizer.step()
    assert learner.losses(batch).metrics["margin"].mean() > 1e-5


def test_learning_asks_of_a_trajectory_the_density_that_sampling_stored() -> None:
    """The policy that made a round has ratios of 1 exactly; every transition but the last has a density."""
    learner, _ = working("d3po", by=0.0)
    batch = first_batch(learner)
    assert (batch.pair.t_previous > 0).all()
    outcome = learner.losses(batch)
    torch.testing.assert_close(outcome.metrics["margin"], torch.zeros_like(outcome.loss), rtol=0, atol=1e-9)
    before, after = batch.pair.t.to("cpu"), batch.to("cpu").pair.t
    assert torch.equal(before, after)


# ------------------------------------------------------------------------------------------------- Errors of what, then?


@dataclass(frozen=True)
class Translated:
    """A denoiser whose answers are given in another parametrisation: the same model, seen differently."""

    inner: UNetDenoiser
    schedule: Schedule

    @property
    def network(self) -> torch.nn.Module:
        return self.inner.network

    def trainable_parameters(self) -> Any:
        return self.inner.trainable_parameters()

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: dict) -> torch.Tensor:
        own, said = self.inner.schedule, self.inner(x_t, t, conditioning)
        epsilon, x_0 = own.to_epsilon(said, x_t, t), own.to_x_0(said, x_t, t)
        return own.__class__.target(self.schedule, x_0, epsilon, t)


def table(kind: str) -> NoiseSchedule:
    return NoiseSchedule(sd_alpha_bar(torch.float64), kind)


def flow(kind: str) -> FlowSchedule:
    return FlowSchedule(prediction_type=kind)


def seen_as(own: Schedule, other: Schedule) -> Any:
    """What makes a denoiser under ``own`` that is looked at under ``other``."""
    return lambda dtype: Translated(replace(small_denoiser(dtype), schedule=own), other)


PAIRS = [
    (flow, "velocity", "epsilon"),
    (flow, "velocity", "sample"),
    (flow, "epsilon", "velocity"),
    (flow, "sample", "epsilon"),
    (table, "v_prediction", "epsilon"),
    (table, "v_prediction", "sample"),
    (table, "epsilon", "v_prediction"),
    (table, "sample", "epsilon"),
]


@pytest.mark.parametrize("kind, own, other", PAIRS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("name", ["diffusion-dpo", "smpo", "sft"])
def test_errors_as_another_parametrisation_are_those_of_a_model_that_predicts_it(kind, own: str, other: str, name: str) -> None:
    """Losses and gradients of ``error_as`` against a network that is translated, to 1e-6."""
    found = []
    for make in (
        lambda dtype: replace(small_denoiser(dtype), schedule=replace(kind(own), error_as=other)),
        seen_as(kind(own), kind(other)),
    ):
        learner, given = working(name, by=2e-3, make=make)
        loss = learner.losses(first_batch(learner)).loss
        found.append((loss.detach(), gradients(loss.mean(), given.policy.network)))
    (loss, gradient), (expected, gradient_expected) = found
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, gradient_expected, rtol=1e-5, atol=1e-6 * gradient_expected.abs().max().item())


@pytest.mark.parametrize("name", OF_ERRORS)
def test_one_setting_reaches_every_objective_with_denoising_errors(name: str) -> None:
    """(1 - sigma)^2 on a velocity's error: the epsilon form of the same model, in training and on held-out pairs.

    SePPO samples from pure noise, where an epsilon says nothing about x_0: there it is x_0's form, sigma^2.
    """
    other = "sample" if name == "seppo" else "epsilon"
    weighted = lambda dtype: replace(small_denoiser(dtype), schedule=replace(flow("velocity"), error_as=other))  # noqa: E731
    found = []
    for make in (weighted, seen_as(flow("velocity"), flow(other)), flow_denoiser):
        learner, given = working(name, by=2e-3, make=make)
        outcomes = [learner.losses(first_batch(learner))]
        if learner.validate:
            outcomes.append(learner.validate(next(iter(given.pairs.steps(0, 1)))[0]))
        found.append(torch.cat([o.loss.detach() for o in outcomes]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
    assert not torch.allclose(found[0], found[2], rtol=1e-3)


def test_by_hand_a_velocitys_error_counts_one_minus_sigma_squared() -> None:
    """At t = 750: (1 - 0.75)^2 = 1/16 of the error, at 250 it is 9/16; with ``sample`` sigma^2: 9/16 and 1/16."""
    t = torch.tensor([750.0, 250.0])
    schedule = flow("velocity")
    assert schedule.error_weight(t) is None
    assert replace(schedule, error_as="velocity").error_weight(t) is None
    torch.testing.assert_close(replace(schedule, error_as="epsilon").error_weight(t), torch.tensor([1, 9]).double() / 16)
    torch.testing.assert_close(replace(schedule, error_as="sample").error_weight(t), torch.tensor([9, 1]).double() / 16)
    half = NoiseSchedule(torch.tensor([0.9, 0.36], dtype=torch.float64), "v_prediction", error_as="epsilon")
    torch.testing.assert_close(half.error_weight(torch.tensor([0, 1])), torch.tensor([0.9, 0.36]).double())
    pixels = replace(half, prediction_type="sample")
    torch.testing.assert_close(pixels.error_weight(torch.tensor([1])), torch.tensor([0.36 / 0.64]).double())
    with pytest.raises(ValueError, match="error_as is one of"):
        replace(schedule, error_as="x_0")


def test_both_sides_of_a_pair_get_their_own_levels_weight() -> None:
    learner, given = working("diffusion-dpo", by=2e-3)
    batch = first_batch(learner)
    plain = pair_errors(given.policy, noised(batch, flow("velocity")))
    weighted = pair_errors(given.policy, noised(batch, replace(flow("velocity"), error_as="epsilon")))
    factor = (1.0 - batch.t.double() / 1000).square()
    for before, after in zip(plain, weighted, strict=True):
        torch.testing.assert_close(after, factor * before)


# --------------------------------------------------------------------------------------------------------------- Stores


def test_trajectories_of_a_flow_come_back_from_disk_as_they_were(tmp_path) -> None:
    from diffalign.sources.rollout import Sampling, rollout

    policy, sampling = flow_denoiser(), Sampling(steps=3, guidance=1.0)
    text = {"encoder_hidden_states": torch.randn(2, 7, 32)}
    made = rollout(policy, policy.schedule, text, sampling, shape=(4, 8, 8), seeds=[1, 2])
    about = TrajectoryOrigin(sampling, schedule_fingerprint(policy.schedule), {"digest": "x"}, ("a",), 2, False, 0)
    Store.create(tmp_path, about).write(range(2), made)
    store = Store.open(tmp_path)
    back = store.read([0, 1])
    assert back.t.dtype == torch.float32 and torch.equal(back.t, made.t) and torch.equal(back.x, made.x)
    assert store.made == about
    assert not differences(store.made.schedule, schedule_fingerprint(policy.schedule))


def test_what_is_measured_is_no_part_of_a_chain_but_its_grid_is() -> None:
    one = schedule_fingerprint(FlowSchedule())
    assert one == schedule_fingerprint(FlowSchedule(error_as="epsilon"))
    other = schedule_fingerprint(FlowSchedule(sigmas=replace(FlowSchedule().sigmas, shift=3.0)))
    assert "flow" in differences(one, other)
    assert "alpha_bar" in differences(schedule_fingerprint(small_denoiser().schedule), one)
