"""Diffusion-DPO against numbers that the released code itself produced.

The cases are those of the folder named by the variable DIFFALIGN_GOLDEN (default: tests/golden), so that the test can be
pointed at cases it has never seen. ``f64`` outputs repeat to 1e-14 where they were made and are compared tightly; ``f32``
outputs are compared within a few times the rounding that the released code itself shows.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from worlds import given

from diffalign.likelihood import pair_errors
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.optimisation import OptimizerSettings
from diffalign.references import Frozen
from diffalign.schedule import NoiseSchedule
from diffalign.sources.dataset import noised
from diffalign.train import LoopSettings, Trainer
from diffalign.types import PairBatch
from pipelines.families.stable_diffusion import UNetDenoiser

OURS = Path(__file__).parent / "golden"
GOLDEN = Path(os.environ.get("DIFFALIGN_GOLDEN", OURS))
CASES = sorted((GOLDEN / "diffusion_dpo").glob("*.json"))
SINGLE = [p for p in CASES if "micro_steps" not in json.loads(p.read_text())["constants"]]
TRAJECTORIES = [p for p in CASES if p not in SINGLE]
PRECISIONS = {"f32": torch.float32, "f64": torch.float64}


def shared(*parts: str) -> Path:
    """A file of the shared tiny model: from the golden folder in use, or else from ours."""
    path = GOLDEN.joinpath(*parts)
    return path if path.exists() else OURS.joinpath(*parts)


def parameter_names() -> list[str]:
    """The order in which per-parameter numbers are listed."""
    return json.loads(shared("unet", "param_names.json").read_text())["param_names"]


@dataclass
class Case:
    precision: str
    constants: dict
    files: dict
    tensors: dict

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def input(self, name: str) -> torch.Tensor:
        value = self.tensors[f"in.{name}"]
        return value.to(self.dtype) if value.is_floating_point() else value

    def expected(self, name: str) -> torch.Tensor:
        return self.tensors[f"{self.precision}.{name}"]

    def check(self, name: str, actual: torch.Tensor, floor: float = 0.0) -> None:
        """Within 1e-9 (f64) or 5e-4 (f32) of the largest expected value; ``floor`` is an absolute allowance in f32."""
        expected = self.expected(name).double()
        scale = expected.abs().max().item() if expected.numel() else 0.0
        tolerance = max(scale * 1e-9, 1e-12) if self.precision == "f64" else max(scale * 5e-4, floor)
        torch.testing.assert_close(
            actual.detach().double().reshape(expected.shape), expected, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )

    def network(self, which: str) -> UNet2DConditionModel:
        config = json.loads(shared("unet", self.files["config"]).read_text())
        net = UNet2DConditionModel.from_config(config)
        net.load_state_dict(load_file(shared("unet", self.files[which])))
        return net.to(self.dtype)

    def batch(self, prefix: str = "") -> PairBatch:
        n = len(self.input(f"{prefix}timesteps"))
        return PairBatch(
            winner=self.input(f"{prefix}latents_w"),
            loser=self.input(f"{prefix}latents_l"),
            conditioning={"encoder_hidden_states": self.input(f"{prefix}encoder_hidden_states")},
            t=self.input(f"{prefix}timesteps"),
            noise=self.input(f"{prefix}noise"),
            label=torch.ones(n),
            weight=torch.ones(n),
            index=torch.arange(n),
        )


def read(path: Path, precision: str) -> Case:
    description = json.loads(path.read_text())
    return Case(precision, description["constants"], description["unet"], load_file(path.with_suffix(".safetensors")))


def schedule() -> NoiseSchedule:
    """SD1.5's table, float32 as Diffusers keeps it."""
    config = json.loads(shared("scheduler", "scheduler_config.json").read_text())
    assert config["beta_schedule"] == "scaled_linear"
    betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"]) ** 2
    return NoiseSchedule(torch.cumprod(1.0 - betas, dim=0), config["prediction_type"])


def models(case: Case) -> tuple[UNetDenoiser, Frozen]:
    policy = UNetDenoiser(schedule(), case.network("policy").train())
    reference = UNetDenoiser(schedule(), case.network("reference").eval())
    return policy, Frozen(reference)


class GivenBatches:
    """A loader that hands out given micro-batches."""

    def __init__(self, steps: list[list[PairBatch]]) -> None:
        self._steps = steps

    def steps(self, start: int, stop: int):
        yield from self._steps[start:stop]


def trained(
    case: Case, policy: UNetDenoiser, reference: Frozen, steps: list[list[PairBatch]], warmup: int, tmp_path: Path
) -> list[dict]:
    """Run the real loop on given batches with the released optimizer settings; the lines of metrics.jsonl."""
    optimizer = OptimizerSettings(learning_rate=1e-4, warmup_steps=warmup, max_grad_norm=case.constants["max_grad_norm"])
    trainer = Trainer(
        learner=DiffusionDPO(beta=case.constants["beta_dpo"]).learner(given(policy, reference, GivenBatches(steps))),
        policy=policy,
        validation=[],
        accelerator=Accelerator(cpu=True),
        output=tmp_path,
        loop=LoopSettings(steps=len(steps), checkpoint_every=0),
        optimizer=optimizer,
        identity={},
    )
    trainer.run()
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def check_parameters(case: Case, net: torch.nn.Module) -> None:
    parameters = dict(net.named_parameters())
    for name in [k.split(".", 2)[2] for k in case.tensors if k.startswith(f"{case.precision}.param_after.")]:
        case.check(f"param_after.{name}", parameters[name], floor=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", SINGLE, ids=lambda p: p.stem)
def test_errors_margin_loss_and_gradients(path: Path, precision: str) -> None:
    case = read(path, precision)
    policy, reference = models(case)
    batch, n = case.batch(), len(case.batch())
    pair = noised(batch, policy.schedule)
    case.check("noisy_latents", torch.cat([pair.winner, pair.loser]))
    with torch.no_grad():
        case.check("model_losses", torch.cat(pair_errors(policy, pair)))
        case.check("ref_losses", torch.cat(pair_errors(reference, pair)))
    outcome = DiffusionDPO(beta=case.constants["beta_dpo"])(batch, policy, reference)
    outcome.loss.mean().backward()
    m = outcome.metrics
    case.check("model_diff", m["winner_error"] - m["loser_error"], floor=1e-6)
    case.check("ref_diff", m["reference_winner_error"] - m["reference_loser_error"], floor=1e-6)
    case.check("inside_term", m["margin"], floor=case.constants["beta_dpo"] * 1e-6)
    assert outcome.loss.shape == (n,)
    case.check("loss", outcome.loss.mean(), floor=case.constants["beta_dpo"] * 1e-6)
    assert m["accuracy"].mean().item() == pytest.approx(case.expected("implicit_acc").item())
    gradients = {name: p.grad for name, p in policy.network.named_parameters()}
    for name in [k.split(".", 2)[2] for k in case.tensors if k.startswith(f"{precision}.grad.")]:
        case.check(f"grad.{name}", gradients[name])
    norms = torch.stack([gradients[name].norm() for name in parameter_names()])
    case.check("grad_norm_per_param", norms)
    case.check("grad_norm", norms.double().norm())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", SINGLE, ids=lambda p: p.stem)
def test_parameters_after_one_step_of_the_loop(path: Path, precision: str, tmp_path: Path) -> None:
    case = read(path, precision)
    policy, reference = models(case)
    (line,) = trained(case, policy, reference, [[case.batch()]], warmup=0, tmp_path=tmp_path)
    assert line["step"] == 1
    case.check("loss", torch.tensor(line["loss"], dtype=torch.float64), floor=case.constants["beta_dpo"] * 1e-6)
    case.check("grad_norm_returned_by_clip", torch.tensor(line["gradient_norm"], dtype=torch.float64))
    check_parameters(case, policy.network)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", TRAJECTORIES, ids=lambda p: p.stem)
def test_a_trajectory_with_accumulation_and_warmup(path: Path, precision: str, tmp_path: Path) -> None:
    case = read(path, precision)
    policy, reference = models(case)
    c = case.constants
    per_step = c["gradient_accumulation_steps"]
    micro = [case.batch(f"step{i}.") for i in range(c["micro_steps"])]
    steps = [micro[i : i + per_step] for i in range(0, len(micro), per_step)]
    lines = trained(case, policy, reference, steps, warmup=c["lr_warmup_steps"], tmp_path=tmp_path)
    losses = case.expected("loss_per_microstep").double().view(-1, per_step).mean(dim=1)
    norms = case.expected("clip_norm_per_microstep").double().view(-1, per_step)[:, -1]
    rates = case.expected("lr_after_microstep").double().view(-1, per_step)[:-1, -1]
    tolerance = 1e-9 if precision == "f64" else 5e-4
    torch.testing.assert_close(
        torch.tensor([x["loss"] for x in lines], dtype=torch.float64), losses, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        torch.tensor([x["gradient_norm"] for x in lines], dtype=torch.float64), norms, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        torch.tensor([x["learning_rate"] for x in lines[1:]], dtype=torch.float64), rates, rtol=1e-9, atol=0
    )
    squares = torch.stack([p.double().square().sum() for p in policy.network.parameters()])
    by_name = dict(zip([n for n, _ in policy.network.named_parameters()], squares, strict=True))
    final = torch.stack([by_name[n] for n in parameter_names()])
    expected = case.expected("param_sqnorm_after_microstep")[-1].double()
    torch.testing.assert_close(
        final, expected, rtol=1e-9 if precision == "f64" else 1e-4, atol=1e-9 if precision == "f64" else 1e-4
    )
    check_parameters(case, policy.network)
