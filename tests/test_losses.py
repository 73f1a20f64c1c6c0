"""Likelihood, loss and objective: identities that hold whatever the network says."""

from __future__ import annotations

import math

import pytest
import torch
from worlds import PairsInMemory, small_denoiser

from diffalign import losses
from diffalign.data.draws import draw
from diffalign.data.loader import collate
from diffalign.levels import Levels
from diffalign.likelihood import denoising, denoising_error, log_ratio, pair_errors
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.references import AdapterOff, Frozen
from diffalign.sources.dataset import noised
from diffalign.types import LogRatio, PairBatch


def a_batch(n: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> PairBatch:
    pairs = PairsInMemory(n, seed=seed)
    draws = [draw(seed, p, pairs.latent_shape, Levels(), 0.0, False) for p in range(n)]
    return collate(pairs, range(n), draws, latent_mode=False).to("cpu", dtype)


def test_dpo_by_hand() -> None:
    """h = 2 * (0.3 - (-0.2)) = 1: loss = log(1 + e^-1) = 0.31326; as a tie, half of that plus half of log(1 + e) = 0.81326."""
    ratio = LogRatio(torch.tensor([0.3]), torch.tensor([-0.2]))
    assert losses.dpo(ratio, torch.tensor([1.0]), 2.0).item() == pytest.approx(math.log1p(math.exp(-1)), abs=1e-6)
    assert losses.dpo(ratio, torch.tensor([0.5]), 2.0).item() == pytest.approx(0.5 * (0.3132617 + 1.3132617), abs=1e-6)


def test_dpo_is_one_number_per_pair_and_never_mixes_them() -> None:
    ratio = LogRatio(torch.tensor([0.1, 5.0, -3.0]), torch.tensor([0.0, 1.0, 2.0]))
    whole = losses.dpo(ratio, torch.ones(3), 0.7)
    single = [losses.dpo(LogRatio(ratio.winner[i : i + 1], ratio.loser[i : i + 1]), torch.ones(1), 0.7) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(single))
    assert whole.shape == (3,)


def test_swapping_the_sides_is_swapping_the_label() -> None:
    w, lo = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(
        losses.dpo(LogRatio(w, lo), torch.full((5,), 0.8), 3.0), losses.dpo(LogRatio(lo, w), torch.full((5,), 0.2), 3.0)
    )


def test_a_tie_at_zero_margin_gives_no_gradient() -> None:
    w = torch.zeros(3, requires_grad=True)
    losses.dpo(LogRatio(w, torch.zeros(3)), torch.full((3,), 0.5), 10.0).sum().backward()
    assert w.grad.abs().max() == 0


def test_a_smaller_error_is_likelier() -> None:
    likelihood = denoising(torch.tensor([0.1]), torch.tensor([0.4]))
    assert likelihood.winner > likelihood.loser
    ratio = log_ratio(likelihood, denoising(torch.tensor([0.2]), torch.tensor([0.2])))
    assert ratio.margin.item() == pytest.approx(0.3)


def test_the_error_is_a_mean_per_sample() -> None:
    prediction, target = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    target[1] = 2.0
    assert denoising_error(prediction, target).tolist() == [0.0, 4.0]


def test_half_precision_errors_are_raised_before_they_are_subtracted() -> None:
    """In float16 the error itself would be rounded: at beta = 5000 that moves the logit by up to 0.3 (methods, 1.6.2)."""
    prediction, target = torch.randn(3, 4, 16, 16).half(), torch.randn(3, 4, 16, 16).half()
    error = denoising_error(prediction, target)
    assert error.dtype == torch.float64
    torch.testing.assert_close(
        error.double(), (prediction.double() - target.double()).square().mean(dim=(1, 2, 3)), rtol=1e-6, atol=0
    )
    naive = (prediction - target).square().mean(dim=(1, 2, 3))
    assert (2500 * (naive.double() - error.double()).abs()).max() > 0.01


def test_the_margin_keeps_the_digits_that_beta_multiplies() -> None:
    """Two nearly equal errors of order one: in float32 their difference times 2500 would be off by some 1e-4."""
    prediction, target = torch.randn(64, 4, 16, 16), torch.randn(64, 4, 16, 16)
    moved = prediction + 1e-4 * torch.randn_like(prediction)
    exact = [(p.double() - target.double()).square().mean(dim=(1, 2, 3)) for p in (moved, prediction)]
    wanted = 2500 * (exact[0] - exact[1])
    found = 2500 * (denoising_error(moved, target) - denoising_error(prediction, target))
    naive = 2500 * ((moved - target).square().mean(dim=(1, 2, 3)) - (prediction - target).square().mean(dim=(1, 2, 3)))
    assert (found - wanted).abs().max() < 1e-9 < 1e-4 < (naive - wanted).abs().max()


def test_policy_equal_to_reference_gives_log_two() -> None:
    denoiser = small_denoiser()
    outcome = DiffusionDPO(beta=5000)(a_batch(), denoiser, Frozen(small_denoiser()))
    torch.testing.assert_close(outcome.loss, torch.full_like(outcome.loss, math.log(2)), rtol=0, atol=1e-6)
    assert outcome.metrics["margin"].abs().max() < 1e-6
    assert outcome.metrics["accuracy"].tolist() == [0.5] * 4


def test_swapping_winner_and_loser_flips_the_margin() -> None:
    policy, reference = small_denoiser(), Frozen(small_denoiser())
    with torch.no_grad():
        for p in policy.network.parameters():
            p.add_(0.01 * torch.randn_like(p))
    batch = a_batch()
    swapped = PairBatch(
        batch.loser, batch.winner, batch.conditioning, batch.t, batch.noise, batch.label, batch.weight, batch.index
    )
    one, other = (DiffusionDPO(beta=100)(b, policy, reference).metrics["margin"] for b in (batch, swapped))
    torch.testing.assert_close(one, -other, rtol=1e-4, atol=1e-5)
    assert one.abs().max() > 1e-3


def test_winner_and_loser_share_noise_and_timestep() -> None:
    """With equal latents on both sides the two noisy latents and targets are equal to the bit."""
    batch = a_batch()
    equal = PairBatch(
        batch.winner, batch.winner, batch.conditioning, batch.t, batch.noise, batch.label, batch.weight, batch.index
    )
    pair = noised(equal, small_denoiser().schedule)
    assert torch.equal(pair.winner, pair.loser)
    assert torch.equal(pair.winner_target, pair.loser_target)


def test_a_gradient_step_raises_the_margin() -> None:
    policy, reference, batch = small_denoiser(), Frozen(small_denoiser()), a_batch()
    optimizer = torch.optim.SGD(policy.network.parameters(), lr=1e-6)
    objective = DiffusionDPO(beta=2000)
    objective(batch, policy, reference).loss.mean().backward()
    optimizer.step()
    assert objective(batch, policy, reference).metrics["margin"].mean() > 1e-4


def test_stacking_the_pair_changes_nothing() -> None:
    policy, batch = small_denoiser(torch.float64), a_batch(dtype=torch.float64)
    pair = noised(batch, policy.schedule)
    winner, loser = pair_errors(policy, pair)
    alone = denoising_error(policy(pair.loser, pair.t, pair.conditioning), pair.loser_target)
    torch.testing.assert_close(loser, alone, rtol=1e-10, atol=0)
    assert not torch.equal(winner, loser)


def test_the_adapter_off_reference_has_no_gradient_and_is_the_base() -> None:
    from pipelines.families import _lora

    policy, base = small_denoiser(), small_denoiser()
    _lora.attach(policy.network, rank=2, alpha=4, targets=("to_q", "to_v"), dropout=0.0, seed=1)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(torch.randn_like(p))
    batch = a_batch()
    answer = AdapterOff(policy)(batch.winner, batch.t, batch.conditioning)
    assert not answer.requires_grad
    assert torch.equal(answer, base(batch.winner, batch.t, batch.conditioning).detach())
    assert not torch.allclose(answer, policy(batch.winner, batch.t, batch.conditioning))


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta should be greater than 0"):
        DiffusionDPO(beta=beta)
