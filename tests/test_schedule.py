"""The schedule by round trips, by numbers derived by hand, and against Diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from worlds import sd_alpha_bar

from diffalign.grids import perturbed_grid, steps_down, timestep_grid
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


# ------------------------------------------------------------------------------------------------------- The chain back

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def test_below_zero_is_the_clean_end_and_never_the_last_step() -> None:
    x, t = torch.ones(3, 2), torch.tensor([-1, -1, -199])
    one, first = (NoiseSchedule(sd_alpha_bar(), clean_end=end) for end in ("one", "first"))
    assert one.coefficients(t, x)[0].flatten().tolist() == [1.0] * 3
    assert one.coefficients(t, x)[1].flatten().tolist() == [0.0] * 3
    assert torch.equal(first.coefficients(t, x)[0], first.coefficients(torch.zeros(3, dtype=torch.long), x)[0])
    assert torch.equal(one.add_noise(x, torch.randn(3, 2), t), x)
    with pytest.raises(ValueError, match="clean_end is one of"):
        NoiseSchedule(sd_alpha_bar(), clean_end="zero")
    with pytest.raises(IndexError):
        one.coefficients(torch.tensor([1000]), x[:1])


@pytest.mark.parametrize("end", ["one", "first"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_step_is_that_of_diffusers_ddim(kind: str, eta: float, end: str) -> None:
    theirs = DDIMScheduler(**SD, prediction_type=kind, set_alpha_to_one=end == "one", steps_offset=1)
    theirs.set_timesteps(20)
    schedule = NoiseSchedule(theirs.alphas_cumprod.double(), kind, clean_end=end)
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = theirs.alphas_cumprod.double(), theirs.final_alpha_cumprod.double()
    t = torch.tensor([951, 501, 51, 1])
    x_t, said, noise = (torch.randn(4, 2, 3, dtype=torch.float64) for _ in range(3))
    ours = schedule.ddim_step(x_t, said, t, t - 50, eta, noise if eta else None)
    for i in range(4):
        row = slice(i, i + 1)
        step = theirs.step(said[row], t[i], x_t[row], eta=eta, variance_noise=noise[row] if eta else None).prev_sample
        torch.testing.assert_close(ours[row], step, rtol=0, atol=1e-12)


def test_with_eta_one_a_step_is_that_of_ddpm() -> None:
    theirs = DDPMScheduler(**SD)
    schedule = NoiseSchedule(theirs.alphas_cumprod.double())
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    x_t, said = (torch.randn(1, 4, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([500])
    mean, deviation = schedule.ddim_mean_and_deviation(x_t, said, t, t - 1, eta=1.0)
    drawn = theirs.step(said, 500, x_t, generator=torch.Generator().manual_seed(3)).prev_sample
    noise = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean + deviation * noise, drawn, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_without_eta_a_step_is_a_move_and_moves_undo_each_other(kind: str) -> None:
    schedule = NoiseSchedule(sd_alpha_bar(torch.float64), kind)
    x_t, said, t = drawn()
    before = torch.tensor([-1, 0, 3, 499, 0, 700])
    epsilon = schedule.to_epsilon(said, x_t, t)
    moved = schedule.ddim_move(x_t, epsilon, t, before)
    torch.testing.assert_close(schedule.ddim_step(x_t, said, t, before, eta=0.0), moved, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.ddim_move(moved, epsilon, before, t), x_t, rtol=0, atol=1e-10)


def test_a_move_along_the_true_noise_is_the_forward_process() -> None:
    schedule = NoiseSchedule(sd_alpha_bar(torch.float64))
    x_0, noise, t = drawn()
    up = schedule.ddim_move(x_0, noise, torch.full_like(t, -1), t)
    torch.testing.assert_close(up, schedule.add_noise(x_0, noise, t), rtol=0, atol=1e-12)


def test_log_density_is_the_normal_distributions_mean() -> None:
    schedule = NoiseSchedule(sd_alpha_bar(torch.float64), "v_prediction")
    x_t, said, t = drawn()
    before, given = t - torch.tensor([0, 1, 20, 50, 1, 20]), torch.randn_like(x_t)
    rows = torch.tensor([2, 3, 4, 5])  # the first two steps have no noise, see below
    mean, deviation = schedule.ddim_mean_and_deviation(x_t, said, t, before, 0.7)
    expected = torch.distributions.Normal(mean[rows], deviation[rows].expand_as(mean[rows])).log_prob(given[rows]).flatten(1)
    density = schedule.log_density(given, x_t, said, t, before, 0.7)
    torch.testing.assert_close(density[rows], expected.mean(1), rtol=1e-12, atol=0)


def test_half_precision_loses_nothing_of_a_log_density() -> None:
    schedule = NoiseSchedule(sd_alpha_bar())
    given, x_t, said = (torch.randn(2, 4, 8, 8).half() for _ in range(3))
    t = torch.tensor([1, 999])
    halves = schedule.log_density(given, x_t, said, t, t - 1, 1.0)
    assert halves.dtype == torch.float64
    assert torch.equal(halves, schedule.log_density(given.double(), x_t.double(), said.double(), t, t - 1, 1.0))


def test_steps_without_noise_are_known_and_have_no_density() -> None:
    t, before = torch.tensor([[51, 1, 0], [999, 500, 1]]), torch.tensor([[1, 0, -1], [500, 1, -1]])
    one, first = (NoiseSchedule(sd_alpha_bar(), clean_end=end) for end in ("one", "first"))
    assert one.has_noise(t, before, 1.0).tolist() == [[True, True, False], [True, True, False]]
    assert first.has_noise(t, before, 1.0).tolist() == [[True, True, False], [True, True, True]]
    assert not one.has_noise(t, before, 0.0).any()
    x = torch.randn(3, 4)
    density = one.log_density(x, x, x, t[0], before[0], 1.0)
    assert density.isnan().tolist() == [False, False, True]


def test_the_deviation_of_small_steps_keeps_its_digits_in_float32() -> None:
    """1 - alpha_bar_t / alpha_bar_t' is 9e-4 at t = 1: a float32 difference would be off in the fifth digit."""
    schedule = NoiseSchedule(sd_alpha_bar())
    now, before = schedule.alpha_bar[1].item(), schedule.alpha_bar[0].item()  # Python's floats are float64
    exact = ((1 - before) / (1 - now) * (1 - now / before)) ** 0.5
    found = schedule.ddim_deviation(torch.tensor([1]), torch.tensor([0]), torch.zeros(1, 1))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, rel=1e-7)


def test_a_stochastic_step_needs_noise_and_a_sensible_eta() -> None:
    schedule, x, t = NoiseSchedule(sd_alpha_bar()), torch.zeros(1, 2), torch.tensor([500])
    with pytest.raises(ValueError, match="give it noise"):
        schedule.ddim_step(x, x, t, t - 1, eta=0.5)
    with pytest.raises(ValueError, match="between 0 .* and 1"):
        schedule.ddim_step(x, x, t, t - 1, eta=1.5, noise=x)


# ---------------------------------------------------------------------------------------------------------------- Grids


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 20, 30, 50, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_are_those_of_diffusers(spacing: str, steps: int) -> None:
    theirs = DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    theirs.set_timesteps(steps)
    if not (spacing == "linspace" and steps == 1):  # there a line of one point is 0 for NumPy, pure image
        assert timestep_grid(1000, steps, spacing, theirs.config.steps_offset).tolist() == theirs.timesteps.tolist()
    theirs = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    points = steps + (spacing != "trailing")  # of these DPM-Solver leaves out the lowest
    assert timestep_grid(1000, points, spacing)[:steps].tolist() == theirs.timesteps.tolist()


def test_a_line_of_one_point_begins_in_noise() -> None:
    assert timestep_grid(1000, 1, "linspace").tolist() == [999]


def test_grids_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and the 1000"):
        timestep_grid(1000, 1001)
    with pytest.raises(ValueError, match="begins at 1000; training ended at 999"):
        timestep_grid(1000, 1000, offset=1)
    with pytest.raises(ValueError, match="spacing is one of"):
        timestep_grid(1000, 10, "karras")
    with pytest.raises(ValueError, match="lies in \\[0, 50\\)"):
        perturbed_grid(1000, 20, torch.tensor([0, 50]))


def test_perturbed_grids_and_what_comes_after_each_level() -> None:
    grid = perturbed_grid(1000, 4, torch.tensor([0, 249]))
    assert grid.tolist() == [[750, 500, 250, 0], [999, 749, 499, 249]]
    assert steps_down(grid).tolist() == [[500, 250, 0, -1], [749, 499, 249, -1]]
    assert steps_down(grid[0]).tolist() == [500, 250, 0, -1]


def test_a_schedule_with_another_end_is_made_once() -> None:
    """It keeps tables on devices, which would otherwise be brought there at every call."""
    schedule = NoiseSchedule(sd_alpha_bar(), clean_end="first")
    other = schedule.ending("one")
    assert other.clean_end == "one" and schedule.ending("one") is other and other.ending("one") is other
