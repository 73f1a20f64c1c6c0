"""The schedule by round trips and by numbers derived by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from worlds import sd_alpha_bar

from diffalign.schedule import NoiseSchedule

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def drawn(batch: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(batch, 4, 5, 3, dtype=dtype),
        torch.randn(batch, 4, 5, 3, dtype=dtype),
        torch.tensor([0, 1, 250, 500, 998, 999]),
    )


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_target_gives_back_noise_and_clean_latent(kind: str) -> None:
    schedule = NoiseSchedule(sd_alpha_bar(torch.float64), kind)
    x_0, noise, t = drawn()
    x_t, target = schedule.add_noise(x_0, noise, t), schedule.target(x_0, noise, t)
    torch.testing.assert_close(schedule.to_epsilon(target, x_t, t), noise, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.to_x_0(target, x_t, t), x_0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_it_agrees_with_diffusers(kind: str) -> None:
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)
    ours = NoiseSchedule(theirs.alphas_cumprod, kind)
    x_0, noise, t = drawn(dtype=torch.float32)
    torch.testing.assert_close(ours.add_noise(x_0, noise, t), theirs.add_noise(x_0, noise, t), rtol=0, atol=1e-6)
    expected = {"epsilon": noise, "sample": x_0, "v_prediction": theirs.get_velocity(x_0, noise, t)}[kind]
    torch.testing.assert_close(ours.target(x_0, noise, t), expected, rtol=0, atol=1e-6)


def test_by_hand() -> None:
    """alpha_bar = 0.36: x_t = 0.6 * 2 + 0.8 * 1 = 2.0 and v = 0.6 * 1 - 0.8 * 2 = -1.0."""
    schedule = NoiseSchedule(torch.tensor([1.0, 0.36], dtype=torch.float64), "v_prediction")
    x_0, noise, t = torch.full((1, 1), 2.0, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), torch.tensor([1])
    assert schedule.add_noise(x_0, noise, t).item() == pytest.approx(2.0)
    assert schedule.target(x_0, noise, t).item() == pytest.approx(-1.0)


def test_half_precision_latents_keep_a_float32_schedule() -> None:
    """In float16, 1 - alpha_bar_0 would be 9.8e-4 instead of 8.5e-4: the noise on step 0 would be 7 % too strong."""
    schedule = NoiseSchedule(sd_alpha_bar())
    _, s = schedule.coefficients(torch.tensor([0]), torch.zeros(1, 1, dtype=torch.float16))
    assert s.dtype == torch.float32
    assert s.item() == pytest.approx(0.00085**0.5, rel=1e-3)
    noisy = schedule.add_noise(torch.zeros(1, 64, dtype=torch.float16), torch.ones(1, 64, dtype=torch.float16), torch.tensor([0]))
    assert noisy.dtype == torch.float16
    assert noisy[0, 0].item() == pytest.approx(0.00085**0.5, rel=2e-3)


def test_targets_of_half_precision_latents_are_float32() -> None:
    schedule = NoiseSchedule(sd_alpha_bar(), "v_prediction")
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert schedule.target(x, x, torch.tensor([3, 900])).dtype == torch.float32


@pytest.mark.parametrize(
    ("table", "kind", "words"),
    [
        (torch.tensor([0.5, 0.9]), "epsilon", "must not increase"),
        (torch.tensor([[0.9, 0.5]]), "epsilon", "table \\[T\\]"),
        (torch.tensor([0.9, 0.5]), "flow", "prediction_type is one of"),
    ],
)
def test_nonsense_is_refused(table: torch.Tensor, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NoiseSchedule(table, kind)


def test_one_timestep_does_not_stand_for_the_batch() -> None:
    schedule = NoiseSchedule(sd_alpha_bar())
    with pytest.raises(ValueError, match="one step per sample"):
        schedule.add_noise(torch.zeros(4, 2), torch.zeros(4, 2), torch.tensor([5]))
