"""The chain and its learners against numbers that the released code of D3PO, DDPO, Diffusion-DRO and SmPO produced.

Which cases, and how tightly: see ``test_golden.py``. Here they pin the ``released`` variants where the code is odd; what is done
by default instead is tested by identities (``test_inversion.py``, ``test_solvers.py``), and by ``ownsigma.*``: the same released
lines run one sample at a time.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_dpo import GOLDEN, PRECISIONS, Case, parameter_names
from golden_dpo import schedule as one_schedule
from safetensors.torch import load_file

from diffalign import losses
from diffalign.grids import perturbed_grid, timestep_grid
from diffalign.likelihood import denoising, denoising_error, log_ratio, pair_errors, transition
from diffalign.objectives import _pieces
from diffalign.schedule import NoiseSchedule
from diffalign.solvers import Guided
from diffalign.sources.inversion import Inversion, inverted
from diffalign.sources.replay import ReplayBuffer
from diffalign.sources.rollout import Sampling, Trajectory, chain
from diffalign.types import LogRatio, PairBatch, TransitionPair
from pipelines.families.stable_diffusion import UNetDenoiser


def cases(folder: str, pattern: str) -> list[Path]:
    return sorted((GOLDEN / folder).glob(f"{pattern}.json"))


def ids(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


STEPS = [*cases("d3po", "logprob*"), *cases("ddpo", "logprob*")]
D3PO, DDPO = cases("d3po", "loss*"), cases("ddpo", "ppo*")
DRO, ROLLOUTS = cases("dro", "loss*"), cases("dro", "rollout*")
SMPO = cases("smpo", "*")
CASES = [*STEPS, *D3PO, *DDPO, *DRO, *ROLLOUTS, *SMPO]
both_precisions = pytest.mark.parametrize("precision", PRECISIONS)


def read(path: Path, precision: str) -> Case:
    description = json.loads(path.read_text())
    return Case(precision, description["constants"], description.get("unet", {}), load_file(path.with_suffix(".safetensors")))


def clamped() -> NoiseSchedule:
    """SD1.5's schedule with the released clamp of the previous timestep."""
    return replace(one_schedule(), clean_end="first")


def previous(t: torch.Tensor, steps: int) -> torch.Tensor:
    return t - 1000 // steps


def denoiser(case: Case, which: str) -> UNetDenoiser:
    return UNetDenoiser(one_schedule(), case.network(which))


def guided(case: Case, denoiser: UNetDenoiser) -> Guided:
    empty = {"encoder_hidden_states": case.input("neg_prompt_embed")}
    return Guided(denoiser, empty, case.constants["guidance_scale"] if case.constants["cfg"] else 1.0)


def check_gradients(case: Case, policy: UNetDenoiser, floor: float = 0.0) -> None:
    gradients = {name: p.grad for name, p in policy.network.named_parameters()}
    for name in [k.split(".", 2)[2] for k in case.tensors if k.startswith(f"{case.precision}.grad.")]:
        case.check(f"grad.{name}", gradients[name], floor)
    norms = torch.stack([gradients[name].norm() for name in parameter_names()])
    case.check("grad_norm_per_param", norms, floor)
    case.check("grad_norm", norms.double().norm(), floor)


class Recorded:
    """A predictor that keeps what it was asked."""

    def __init__(self, predictor: UNetDenoiser) -> None:
        self._predictor = predictor
        self.x: list[torch.Tensor] = []
        self.t: list[torch.Tensor] = []

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: dict) -> torch.Tensor:
        self.x.append(x_t)
        self.t.append(t)
        return self._predictor(x_t, t, conditioning)


# -------------------------------------------------------------------------------------------------- One stochastic step


@both_precisions
@pytest.mark.parametrize("path", STEPS, ids=ids)
def test_a_stochastic_step_and_its_density(path: Path, precision: str) -> None:
    case, schedule = read(path, precision), clamped()
    t, eta = case.input("timesteps"), case.constants["eta"]
    before = previous(t, case.constants["num_inference_steps"])
    assert torch.equal(before.clamp(min=0), case.expected("prev_timestep"))
    x_t, said, noise = case.input("sample"), case.input("model_output"), case.input("variance_noise")
    case.check("std_dev_t", eta * schedule.ddim_deviation(t, before, x_t))
    stepped = schedule.ddim_step(x_t, said, t, before, eta, noise)
    assert stepped.dtype == case.dtype
    case.check("prev_sample", stepped)
    case.check("log_prob", schedule.log_density(stepped, x_t, said, t, before, eta))
    other = case.input("model_output_2").requires_grad_()
    given = schedule.log_density(case.input("prev_sample_given"), x_t, other, t, before, eta)
    case.check("log_prob_given", given)
    given.sum().backward()
    case.check("grad_model_output_2", other.grad)


@pytest.mark.parametrize("path", STEPS, ids=ids)
def test_the_grid_is_the_one_that_was_walked(path: Path) -> None:
    case = read(path, "f64")
    assert torch.equal(timestep_grid(1000, case.constants["num_inference_steps"], offset=1), case.expected("scheduler_timesteps"))


# -------------------------------------------------------------------------------------------------------- D3PO and DDPO


@both_precisions
@pytest.mark.parametrize("path", D3PO, ids=ids)
def test_d3po(path: Path, precision: str) -> None:
    case, schedule, c = read(path, precision), clamped(), read(path, precision).constants
    policy, reference = denoiser(case, "policy"), denoiser(case, "reference")
    t, prompt = case.input("timesteps"), {"encoder_hidden_states": case.input("prompt_embeds")}
    pair = TransitionPair(
        winner=case.input("latents_0"),
        loser=case.input("latents_1"),
        winner_next=case.input("next_latents_0"),
        loser_next=case.input("next_latents_1"),
        t=t,
        t_previous=previous(t, c["num_inference_steps"]),
        conditioning=prompt,
    )
    with torch.no_grad():
        for side, x_t in ((0, pair.winner), (1, pair.loser)):
            case.check(f"noise_pred_{side}", guided(case, policy)(x_t, t, prompt))
            case.check(f"noise_ref_pred_{side}", guided(case, reference)(x_t, t, prompt))
        of_reference = transition(guided(case, reference), schedule, pair, c["eta"])
    of_policy = transition(guided(case, policy), schedule, pair, c["eta"])
    case.check("total_prob_0", of_policy.winner)
    case.check("total_prob_1", of_policy.loser)
    case.check("total_ref_prob_0", of_reference.winner)
    case.check("total_ref_prob_1", of_reference.loser)
    ratio = log_ratio(of_policy, of_reference)
    case.check("ratio_0", ratio.winner.exp().clamp(1 - c["eps"], 1 + c["eps"]))
    case.check("ratio_1", ratio.loser.exp().clamp(1 - c["eps"], 1 + c["eps"]))
    label = _pieces.dominance(case.input("rewards_0"), case.input("rewards_1"))
    case.check("human_prefer", torch.stack([2 * label - 1, 1 - 2 * label], dim=1))
    loss = _pieces.d3po(ratio, label, c["beta"], c["eps"])
    assert loss.shape == t.shape
    case.check("loss", loss.mean())
    loss.mean().backward()
    check_gradients(case, policy)


@both_precisions
@pytest.mark.parametrize("path", DDPO, ids=ids)
def test_ddpo(path: Path, precision: str) -> None:
    case, schedule, c = read(path, precision), clamped(), read(path, precision).constants
    policy = denoiser(case, "policy")
    t, prompt = case.input("timesteps"), {"encoder_hidden_states": case.input("prompt_embeds")}
    said = guided(case, policy)(case.input("latents"), t, prompt)
    case.check("noise_pred", said)
    before = previous(t, c["num_inference_steps"])
    log_density = schedule.log_density(case.input("next_latents"), case.input("latents"), said, t, before, c["eta"])
    case.check("log_prob", log_density)
    old, advantage = case.input("old_log_probs"), case.input("advantages")
    case.check("ratio", (log_density - old).exp())
    case.check("approx_kl", 0.5 * (log_density - old).square().mean(), floor=1e-9)
    loss = _pieces.ppo(log_density, old, advantage, c["clip_range"], c["adv_clip_max"])
    expected = torch.maximum(case.expected("unclipped_loss"), case.expected("clipped_loss")).double()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-9 if precision == "f64" else 1e-4, atol=0)
    case.check("loss", loss.mean())
    loss.mean().backward()
    check_gradients(case, policy)


# -------------------------------------------------------------------------------------------------------- Diffusion-DRO


@both_precisions
@pytest.mark.parametrize("path", DRO, ids=ids)
def test_dro(path: Path, precision: str) -> None:
    case = read(path, precision)
    policy, reference = denoiser(case, "policy"), denoiser(case, "reference")
    t, n = case.input("timesteps"), len(case.input("timesteps"))
    text = case.input("encoder_hidden_states")
    expert = policy.schedule.add_noise(case.input("x0_expert"), case.input("eps_expert"), t)
    x_t = torch.cat([expert, case.input("xt_policy")])
    case.check("xt", x_t)
    target = torch.cat([case.input("eps_expert"), case.input("eps_policy")])

    def errors(model: UNetDenoiser) -> torch.Tensor:
        return denoising_error(model(x_t, torch.cat([t, t]), {"encoder_hidden_states": torch.cat([text, text])}), target)

    with torch.no_grad():
        of_reference = errors(reference)
    of_policy = errors(policy)
    case.check("losses0", of_reference)
    case.check("losses", of_policy)
    ratio = log_ratio(denoising(*of_policy.chunk(2)), denoising(*of_reference.chunk(2)))
    case.check("loss_expert_diff", -ratio.winner, floor=1e-6)
    case.check("loss_policy_diff", -ratio.loser, floor=1e-6)
    case.check("diff", -ratio.margin, floor=1e-6)
    loss = _pieces.dro(ratio, case.constants["margin"])
    assert loss.shape == (n,)
    case.check("loss", loss.mean(), floor=1e-6)
    loss.mean().backward()
    check_gradients(case, policy, floor=1e-6)


def dro_grid(case: Case) -> torch.Tensor:
    c, shift = case.constants, case.input("perturb")[0]
    steps = c["buffer_num_inference_steps"]
    if c["buffer_perturb_timesteps"]:
        return perturbed_grid(1000, steps, shift)
    if c["buffer_scheduler"] == "DPMSolver++":
        return timestep_grid(1000, steps + 1, "linspace")[:-1].expand(len(shift), -1)
    return timestep_grid(1000, steps, offset=1).expand(len(shift), -1)


def dro_rollout(case: Case, *, released: bool) -> Trajectory:
    kind = case.constants["buffer_scheduler"]
    solver = {"DPMSolver++": ("dpm-solver++", 0.0), "DDIM": ("ddim", 0.0), "DDPM": ("ddim", 1.0)}[kind]
    sampling = Sampling(solver=solver[0], eta=solver[1], released=released)
    noise = case.input("variance_noise") if kind == "DDPM" else None
    policy, text = denoiser(case, "policy"), {"encoder_hidden_states": case.input("encoder_hidden_states")}
    schedule = clamped() if kind == "DDIM" else one_schedule()  # the only one of the three that goes by set_alpha_to_one
    return chain(policy, schedule, case.input("xT"), text, dro_grid(case), sampling, lambda j: noise[j])


def check_walk(case: Case, name: str, actual: torch.Tensor) -> None:
    """DPM-Solver++ moves in float32 there even in the float64 run, so nobody can agree with it better than to float32."""
    if case.constants["buffer_scheduler"] != "DPMSolver++":
        case.check(name, actual)
        return
    expected = case.expected(name).double()
    tolerance = 3e-6 * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


@both_precisions
@pytest.mark.parametrize("path", ROLLOUTS, ids=ids)
def test_dro_rollouts_as_released(path: Path, precision: str) -> None:
    case = read(path, precision)
    made = dro_rollout(case, released=True)
    assert torch.equal(made.t, case.expected("traj_t"))
    check_walk(case, "traj_xt", made.x[:, :-1])
    check_walk(case, "traj_eps", made.prediction)
    check_walk(case, "final_latents", made.final)


@both_precisions
@pytest.mark.parametrize("path", [p for p in ROLLOUTS if "ownsigma" in p.read_text()], ids=ids)
def test_dro_rollouts_with_each_samples_own_noise_levels(path: Path, precision: str) -> None:
    case = read(path, precision)
    made = dro_rollout(case, released=False)
    check_walk(case, "ownsigma.traj_xt", made.x[:, :-1])
    check_walk(case, "ownsigma.final_latents", made.final)
    if case.constants["buffer_scheduler"] == "DPMSolver++":  # and the oddity is there: all but the first sample differ
        gap = (dro_rollout(case, released=True).final - made.final).abs().flatten(1).amax(dim=1)
        assert gap[0] == 0
        assert (gap[1:] > 1e-2).all()


@pytest.mark.parametrize("path", ROLLOUTS, ids=ids)
def test_the_buffer_draws_as_the_released_one(path: Path) -> None:
    case = read(path, "f64")
    made, c = dro_rollout(case, released=True), case.constants
    buffer = ReplayBuffer(len(made))
    buffer.push(made, case.input("x0"), {"encoder_hidden_states": case.input("encoder_hidden_states")})
    drawn = buffer.sample(c["sample_n"], torch.Generator().manual_seed(c["sample_seed"]))
    assert torch.equal(drawn.t, case.expected("sample_t"))
    check_means = {"sample_xt_mean": drawn.x_t, "sample_eps_mean": drawn.prediction}
    for name, value in check_means.items():
        torch.testing.assert_close(value.flatten(1).mean(dim=1), case.expected(name), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- SmPO


@both_precisions
@pytest.mark.parametrize("path", SMPO, ids=ids)
def test_smpo(path: Path, precision: str) -> None:
    case, c = read(path, precision), read(path, precision).constants
    policy, reference = denoiser(case, "policy"), denoiser(case, "reference")
    n, t = len(case.input("timesteps")), case.input("timesteps")
    batch = PairBatch(
        winner=case.input("latents_w"),
        loser=case.input("latents_l"),
        conditioning={"encoder_hidden_states": case.input("encoder_hidden_states")},
        t=t,
        noise=torch.zeros_like(case.input("latents_w")),
        label=case.input("probs")[:1].expand(n),
        weight=torch.ones(n),
        index=torch.arange(n),
    )
    version = {"diffusers_0.20.0": "0.20", "diffusers_0.42.1": "0.42"}[c["inverse_scheduler"]]
    asked = Recorded(policy)
    pair = inverted(batch, asked, policy.schedule, Inversion(steps=c["num_inversion_steps"], released=version))
    assert [int(level[0]) for level in asked.t[::2]] == case.expected("times").tolist()
    if asked.x:
        case.check("inv_first_latents", torch.stack(asked.x[1::2]))
        case.check("inv_refined_latents", torch.stack([*asked.x[2::2], torch.cat([pair.winner, pair.loser])]))
    case.check("noisy_latents", torch.cat([pair.winner, pair.loser]))
    case.check("noise", torch.cat([pair.winner_target, pair.loser_target]))
    with torch.no_grad():
        of_reference = pair_errors(reference, pair)
    of_policy = pair_errors(policy, pair)
    case.check("ref_losses", torch.cat(of_reference))
    case.check("model_losses", torch.cat(of_policy))
    ratio = log_ratio(denoising(*of_policy), denoising(*of_reference))
    gamma = c["loss_extra_factor"]
    scale = 0.5 * c["beta_dpo"] * gamma * (2 * float(case.input("probs")[0]) - 1)
    case.check("inside_term", scale * ratio.margin, floor=scale * 1e-6)
    loss = losses.smpo(ratio, batch.label, c["beta_dpo"] / 2, gamma)
    assert loss.shape == (n,)
    case.check("loss", loss.mean(), floor=scale * 1e-6)
    loss.mean().backward()
    check_gradients(case, policy, floor=1e-4)


# --------------------------------------------------------------------------------------------- The cores, by identities


def ratio_of(winner: list[float], loser: list[float]) -> LogRatio:
    return LogRatio(
        *(torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in (winner, loser)),
    )


def test_d3po_starts_at_ln_2_and_has_no_gradient_outside_the_clip() -> None:
    ratio = ratio_of([0.0, 0.2, -0.2, 0.05], [0.0, 0.05, 0.05, -0.05])
    loss = _pieces.d3po(ratio, torch.ones(4), beta=0.1, clip=0.1)
    inside = [math.log(1.0), 0.1 * (math.log(1.1) - 0.05), 0.1 * (math.log(0.9) - 0.05), 0.1 * (0.05 + 0.05)]
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-h)) for h in inside], abs=1e-12)
    loss.sum().backward()
    assert (ratio.winner.grad != 0).tolist() == [True, False, False, True]
    assert (ratio.loser.grad != 0).tolist() == [True, True, True, True]


def test_d3po_without_a_clip_is_dpo_and_a_tie_teaches_nothing() -> None:
    ratio = ratio_of([1.0, 2.0], [-1.0, 0.5])
    loss = _pieces.d3po(ratio, torch.tensor([1.0, 0.5]), beta=0.7, clip=float("inf"))
    assert loss[0].item() == pytest.approx(-torch.nn.functional.logsigmoid(torch.tensor(1.4, dtype=torch.float64)).item())
    loss.sum().backward()
    assert ratio.winner.grad[1] == 0
    swapped = _pieces.d3po(LogRatio(ratio.loser, ratio.winner), torch.zeros(2), beta=0.7, clip=float("inf"))
    assert swapped[0].item() == pytest.approx(loss[0].item())


def test_dominance_needs_all_rewards_to_agree() -> None:
    first = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    assert _pieces.dominance(first, second).tolist() == [1.0, 0.5, 0.5, 0.0]
    assert _pieces.dominance(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])).tolist() == [1.0, 0.0]


def test_dro_starts_at_the_margin_and_stops_where_it_is_reached() -> None:
    ratio = ratio_of([0.0, 0.01], [0.0, 0.0])
    loss = _pieces.dro(ratio, 0.001)
    assert loss.tolist() == [0.001, 0.0]
    loss.sum().backward()
    assert ratio.winner.grad.tolist() == [-1.0, 0.0]


def test_smpo_at_a_half_teaches_nothing_and_at_one_is_dpo() -> None:
    ratio = ratio_of([0.3, 0.3], [-0.1, -0.1])
    loss = losses.smpo(ratio, torch.tensor([0.5, 1.0]), beta=2.0, gamma=1.0)
    assert loss[1].item() == pytest.approx(-torch.nn.functional.logsigmoid(torch.tensor(0.8, dtype=torch.float64)).item())
    loss.sum().backward()
    assert ratio.winner.grad[0] == 0
    assert ratio.winner.grad[1] != 0


def test_smoothed_labels_by_hand() -> None:
    low, high = 0.11543526500463486, 0.28201571106910706  # SmPO's constants for PickScore
    label = _pieces.smoothed_label(torch.tensor([0.22]), torch.tensor([0.21]), low, high)
    assert 10 * (2 * label.item() - 1) == pytest.approx(0.30, abs=2e-3)
    with pytest.raises(ValueError, match="must differ"):
        _pieces.smoothed_label(label, label, 1.0, 1.0)


def test_ppo_is_pessimistic() -> None:
    old, new = torch.zeros(4), torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    _pieces.ppo(new, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), clip=0.1).sum().backward()
    assert (new.grad != 0).tolist() == [False, True, True, False]
