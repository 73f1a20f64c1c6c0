"""Rollouts: seeds and prompts decide, nothing else does; densities are those of the steps; the result is Diffusers' own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from worlds import sd_alpha_bar, small_denoiser

from diffalign.likelihood import transition
from diffalign.schedule import NoiseSchedule
from diffalign.solvers import Guided
from diffalign.sources.rollout import DRO, Sampling, Trajectory, chain, rollout
from diffalign.types import TransitionPair
from pipelines.families import load_family, load_pipeline

SHAPE = (4, 8, 8)
EMPTY = {"encoder_hidden_states": torch.zeros(1, 7, 32, dtype=torch.float64)}


def prompts(n: int = 3) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": torch.randn(n, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(9))}


def rolled(sampling: Sampling, seeds: list[int], **options) -> Trajectory:
    network = small_denoiser(torch.float64)
    options = {"unconditional": EMPTY, **options}
    return rollout(network, network.schedule, prompts(), sampling, shape=SHAPE, seeds=seeds, **options)


def assert_same(a: Trajectory, b: Trajectory) -> None:
    for name in ("x", "prediction", "log_density"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-5)
    for name in ("t", "t_previous", "has_noise", "index", "start_seed", "seed"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


SAMPLINGS = {"d3po": Sampling(steps=4), "perturbed": Sampling(steps=4, perturbed=True), "dro": replace(DRO, steps=4)}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_batch_size_and_order_change_nothing(sampling: Sampling) -> None:
    seeds, index = [11, 12, 13, 11, 15], [0, 1, 2, 1, 0]
    whole = rolled(sampling, seeds, index=index)
    assert_same(rolled(sampling, seeds, index=index, batch_size=2), whole)
    order = [3, 0, 4, 2, 1]
    assert_same(rolled(sampling, [seeds[i] for i in order], index=[index[i] for i in order]), whole.rows(order))
    assert torch.equal(whole.x[0, 0], whole.x[3, 0])  # the same seed
    assert not torch.equal(whole.x[0, -1], whole.x[3, -1])  # for another prompt
    assert not torch.equal(whole.x[0, 0], whole.x[1, 0])


def test_shapes_and_labels() -> None:
    made = rolled(Sampling(steps=4), [5, 6], index=[2, 0], start_seeds=[1, 1])
    assert made.x.shape == (2, 5, *SHAPE)
    assert made.prediction.shape == (2, 4, *SHAPE)
    assert made.t.tolist() == [[751, 501, 251, 1]] * 2
    assert made.t_previous.tolist() == [[501, 251, 1, -1]] * 2
    assert (made.index.tolist(), made.seed.tolist(), made.start_seed.tolist()) == ([2, 0], [5, 6], [1, 1])
    assert torch.equal(made.final, made.x[:, -1])
    assert len(made) == 2
    assert made.log_density.dtype == torch.float64


def test_trajectories_may_share_their_start_and_differ_in_their_noise() -> None:
    made = rolled(Sampling(steps=3), [5, 6, 5], index=[1, 1, 1], start_seeds=[7, 7, 8])
    assert torch.equal(made.x[0, 0], made.x[1, 0])
    assert not torch.equal(made.x[0, 1], made.x[1, 1])
    assert not torch.equal(made.x[0, 0], made.x[2, 0])


def test_the_start_is_not_the_noise_of_the_first_step() -> None:
    """One seed serves both when no start seeds are given; the two draws must still be independent."""
    made = rolled(Sampling(steps=2, guidance=1.0), [5])
    network = small_denoiser(torch.float64)
    mean, deviation = network.schedule.ddim_mean_and_deviation(
        made.x[:, 0].double(), made.prediction[:, 0].double(), made.t[:, 0], made.t_previous[:, 0], 1.0
    )
    noise = (made.x[:, 1] - mean) / deviation
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), made.x[0, 0].flatten().double()]))[0, 1]) < 0.3
    assert 0.8 < noise.std() < 1.2


def test_densities_are_what_the_likelihood_finds_for_the_same_model() -> None:
    """So the ratio of a policy that has not moved is 1, on every step, with guidance inside."""
    network, sampling = small_denoiser(torch.float64), Sampling(steps=4, eta=0.8)
    made = rolled(sampling, [1, 2, 3, 4], index=[0, 0, 1, 1])
    text = {"encoder_hidden_states": prompts()["encoder_hidden_states"][:2]}
    guided, winner, loser = Guided(network, EMPTY, sampling.guidance), made.rows([0, 2]), made.rows([1, 3])
    for j in range(3):  # the last step has no noise
        pair = TransitionPair(
            winner=winner.x[:, j],
            loser=loser.x[:, j],
            winner_next=winner.x[:, j + 1],
            loser_next=loser.x[:, j + 1],
            t=winner.t[:, j],
            t_previous=winner.t_previous[:, j],
            conditioning=text,
        )
        with torch.no_grad():
            found = transition(guided, network.schedule, pair, sampling.eta)
        torch.testing.assert_close(found.winner, winner.log_density[:, j], rtol=0, atol=1e-9)
        torch.testing.assert_close(found.loser, loser.log_density[:, j], rtol=0, atol=1e-9)


def test_steps_without_noise_have_density_zero_and_say_so() -> None:
    stochastic = rolled(Sampling(steps=3), [1])
    assert stochastic.has_noise.tolist() == [[True, True, False]]
    assert stochastic.log_density[0, -1] == 0
    assert (stochastic.log_density[0, :-1] != 0).all()
    for sampling in (Sampling(steps=3, eta=0.0), Sampling(steps=3, solver="dpm-solver++")):
        quiet = rolled(sampling, [1])
        assert not quiet.has_noise.any()
        assert not quiet.log_density.any()


def test_with_the_first_alpha_at_the_end_every_step_is_stochastic() -> None:
    network, sampling = small_denoiser(torch.float64), Sampling(steps=3, guidance=1.0)
    schedule = NoiseSchedule(sd_alpha_bar(), clean_end="first")
    made = rollout(network, schedule, prompts(), sampling, shape=SHAPE, seeds=[1])
    assert made.has_noise.all()
    assert made.log_density.isfinite().all()


def test_perturbed_grids_are_drawn_per_seed_and_reach_all_levels() -> None:
    made = rolled(Sampling(steps=2, perturbed=True, guidance=1.0), list(range(40)), index=[0] * 40)
    shifts = made.t[:, 1]
    assert torch.equal(made.t[:, 0] - shifts, torch.full((40,), 500))
    assert shifts.min() >= 0 and shifts.max() < 500
    assert len(shifts.unique()) > 30


def test_guided_rollouts_cost_one_call_per_step_and_no_gradient() -> None:
    network, calls = small_denoiser(torch.float64), []

    def counted(x_t, t, conditioning):
        calls.append((len(x_t), torch.is_grad_enabled()))
        return network(x_t, t, conditioning)

    options = {"shape": SHAPE, "unconditional": EMPTY, "batch_size": 2}
    rollout(counted, network.schedule, prompts(), Sampling(steps=2), seeds=[1, 2, 3], **options)
    assert calls == [(4, False)] * 2 + [(2, False)] * 2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        rolled(Sampling(steps=2), [1, 2], start_seeds=[1])
    with pytest.raises(ValueError, match=r"guidance = 5.0 compares with the empty prompt"):
        rolled(Sampling(steps=2), [1], unconditional=None)
    with pytest.raises(ValueError, match="solver is one of"):
        Sampling(solver="euler")
    with pytest.raises(ValueError, match="eta should be at most 1"):
        Sampling(eta=1.5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_it_is_the_picture_that_the_diffusers_pipeline_makes(sampler: str) -> None:
    """From the same x_T, with guidance, on the trained tiny model."""
    from diffusers import DPMSolverMultistepScheduler

    from pipelines.families._schedules import schedule_of
    from pipelines.families.stable_diffusion import UNetDenoiser

    pipe = load_pipeline("tiny", device="cpu")
    ours = schedule_of(pipe.scheduler.config, allowed=["epsilon"], expected=None, where="tiny")
    ours = NoiseSchedule(ours.alpha_bar, clean_end="first" if sampler == "ddim" else "one")
    if sampler != "ddim":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    x = torch.randn(2, 4, 16, 16)
    words = ["a red circle on a white background", "a blue square on a black background"]
    expected = pipe(words, latents=x, num_inference_steps=5, guidance_scale=3.0, output_type="latent").images
    with torch.no_grad():
        text, empty = pipe.encode_prompt(words, "cpu", 1, True, negative_prompt=["", ""])
    denoiser = Guided(UNetDenoiser(ours, pipe.unet), {"encoder_hidden_states": empty[:1]}, 3.0)
    sampling = Sampling(steps=5, solver=sampler, eta=0.0)
    grid = torch.as_tensor(pipe.scheduler.timesteps).expand(2, -1)
    made = chain(denoiser, ours, x, {"encoder_hidden_states": text}, grid, sampling)
    torch.testing.assert_close(made.final, expected, rtol=0, atol=2e-4)


def test_the_last_transitions_hold_most_of_the_gradient(capsys: pytest.CaptureFixture) -> None:
    """On the trained tiny model: what ``timestep_fraction`` of D3PO and DDPO leaves out, and why."""
    family = load_family("tiny")
    family.train_fully()
    trained = [p for p in family.network.parameters() if p.requires_grad]
    words = family.encoder.encode_prompts(["a red circle on a white background", "a blue square on a black background"])
    words = {name: value.detach() for name, value in words.items()}
    schedule = family.denoiser.schedule
    seeds = {"seeds": [1, 2], "start_seeds": [3, 4], "index": [0, 1]}
    made = rollout(family.denoiser, schedule, words, Sampling(10, guidance=1.0), shape=family.latent_shape(64), **seeds)
    energy = torch.zeros(10)
    for j in range(10):
        prediction = family.denoiser(made.x[:, j], made.t[:, j], words)
        density = schedule.log_density(made.x[:, j + 1], made.x[:, j], prediction, made.t[:, j], made.t_previous[:, j], 1.0)
        energy[j] = sum(g.square().sum() for g in torch.autograd.grad(density.sum(), trained))
    share = float(energy[-2:].sum() / energy.sum())
    with capsys.disabled():
        print(f"\nenergy of the gradient in the last two of ten transitions: {100 * share:.0f} %")
    assert share > 0.9
