"""Optimizers: AdamW with states of 8 bits, Adafactor, and what they take of memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from family_runs import Saved, assert_equal, run, weights
from torch import Tensor, nn

from diffalign import objectives
from diffalign.errors import UserError
from diffalign.optimisation import build_optimizer, moments_bytes, register
from pipelines import cli, config
from pipelines.optimizers import OptimizerSettings
from pipelines.sizing import Sizing

# --------------------------------------------------------------------------------------------------------------- 8 bits


def test_the_8_bit_optimizer_steps_nearly_as_the_whole_one() -> None:
    """States of one byte for tensors of 4096 numbers and more, bitsandbytes' own rule; on a CPU, too."""
    pytest.importorskip("bitsandbytes")
    start, states, moved = torch.randn(64, 128), {}, {}
    for eight_bit in (False, True):
        weight, draw = nn.Parameter(start.clone()), torch.Generator().manual_seed(0)
        optimizer = build_optimizer([weight], OptimizerSettings(learning_rate=1e-2, eight_bit=eight_bit))
        for _ in range(5):
            weight.grad = torch.randn(weight.shape, generator=draw) + 1.0
            optimizer.step()
        states[eight_bit], moved[eight_bit] = optimizer.state[weight], weight.detach() - start
    assert {states[True][name].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert 0 < (moved[True] - moved[False]).norm() < 0.1 * moved[False].norm()


def test_a_run_with_the_8_bit_optimizer_resumes_to_the_bit(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    how = {"eight_bit": True, "rank": 256, "steps": 3}  # 256 x 16: large enough for 8 bits
    run(saved, pairs, "diffusion-dpo", whole, **how)
    kept = torch.load(whole / "checkpoints" / "checkpoint-00000002" / "optimizer.pt", weights_only=False)
    assert "torch.uint8" in json.dumps(kept, default=lambda value: str(getattr(value, "dtype", value)))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-00000003")
    (cut / "pytorch_lora_weights.safetensors").unlink()
    run(saved, pairs, "diffusion-dpo", cut, **how, resume=True)
    assert_equal(weights(whole), weights(cut))


# ------------------------------------------------------------------------------------------------------------ Adafactor


def adafactor_by_hand(start: Tensor, gradients: list[Tensor], rate: float, decay: float) -> Tensor:
    """Weights [R, C] after Algorithm 4 of arXiv 1804.04235, without relative steps, in double precision."""
    weight, rows, columns = start.double(), torch.zeros(len(start)).double(), torch.zeros(start.shape[1]).double()
    for step, gradient in enumerate(gradients, start=1):
        square, beta2 = gradient.double() ** 2 + 1e-30, 1 - step**-0.8
        rows = beta2 * rows + (1 - beta2) * square.mean(1)
        columns = beta2 * columns + (1 - beta2) * square.mean(0)
        update = gradient.double() / (torch.outer(rows, columns) / rows.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        weight = weight - rate * decay * weight - rate * update
    return weight


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["weights of 1", "weights of a thousandth"])
def test_adafactor_is_the_papers_with_the_learning_rate_as_given(size: float) -> None:
    """The released Diffusion-DPO has scale_parameter off: a small weight moves as far as a large one."""
    start, draw = torch.randn(6, 5) * size, torch.Generator().manual_seed(1)
    gradients = [torch.randn(6, 5, generator=draw) * scale for scale in (1.0, 30.0, 1e-3, 1.0)]
    weight = nn.Parameter(start.clone())
    optimizer = build_optimizer([weight], OptimizerSettings(optimizer="adafactor", learning_rate=1e-2, weight_decay=0.1))
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    expected = adafactor_by_hand(start, gradients, rate=1e-2, decay=0.1)
    assert torch.allclose(weight.detach().double(), expected, rtol=1e-5, atol=1e-7)
    assert (expected - start).abs().max() > 5e-3


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_with_adafactor_resumes_to_the_bit(saved: Saved, pairs: Path, tmp_path: Path, adapter: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    how = {"optimizer": "adafactor", "adapter": adapter, "steps": 3, "checkpoint_every": 1}
    run(saved, pairs, "diffusion-dpo", whole, **how)
    kept = torch.load(whole / "checkpoints" / "checkpoint-00000002" / "optimizer.pt", weights_only=False)
    assert any("exp_avg_sq_row" in moments for moments in kept["state"].values())
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-00000003")
    if adapter == "lora":
        (cut / "pytorch_lora_weights.safetensors").unlink()
    run(saved, pairs, "diffusion-dpo", cut, **how, resume=True)
    assert_equal(weights(whole), weights(cut))


@pytest.mark.parametrize("more", [{"eight_bit": True}, {"beta1": 0.5}, {"epsilon": 1e-6}])
def test_constants_of_adamw_are_refused_for_adafactor(more: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(more))} would do nothing: adafactor has no use for it"):
        OptimizerSettings(optimizer="adafactor", **more)
    with pytest.raises(ValueError, match="optimizer is one of adafactor, adamw.*; got 'lion'"):
        OptimizerSettings(optimizer="lion")


def test_the_command_line_says_so_too(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = ["--model", "tiny", "--pairs", "tiny", "--output", str(tmp_path / "o"), "--optimizer", "adafactor", "--beta1", "0.5"]
    assert cli.main(["train", "diffusion-dpo", *words]) != 0
    assert "beta1 would do nothing" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- your own


def test_an_optimizer_of_ones_own_is_known_by_its_name(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    def build(parameters: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.beta1)

    register("heavy-ball", build, moments_bytes=lambda shape, settings: 4 * shape.numel(), ignores=("epsilon",))
    assert moments_bytes([nn.Parameter(torch.zeros(3, 2))], OptimizerSettings(optimizer="heavy-ball")) == 24
    with pytest.raises(ValueError, match="epsilon would do nothing: heavy-ball has no use for it"):
        OptimizerSettings(optimizer="heavy-ball", epsilon=1e-3)
    for shipped in ("adamw", "adafactor"):
        with pytest.raises(UserError, match=f"There is an optimizer '{shipped}' already"):
            register(shipped, build)
    register("heavy-ball", lambda *given: build(*given))  # as a notebook's cell that is run again
    run(saved, pairs, "diffusion-dpo", tmp_path / "whole", optimizer="heavy-ball", steps=2)
    run(saved, pairs, "diffusion-dpo", tmp_path / "cut", optimizer="heavy-ball", steps=1)
    run(saved, pairs, "diffusion-dpo", tmp_path / "cut", optimizer="heavy-ball", steps=2, resume=True)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    run(saved, pairs, "diffusion-dpo", tmp_path / "adamw", steps=2)
    assert any(not torch.equal(weights(tmp_path / "adamw")[n], w) for n, w in weights(tmp_path / "whole").items())
    with pytest.raises(UserError, match='optimizer.optimizer was "heavy-ball" and is now none'):
        run(saved, pairs, "diffusion-dpo", tmp_path / "whole", steps=3, resume=True)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("more", [{}, {"optimizer": "adafactor"}], ids=["adamw", "adafactor"])
def test_what_moments_take_is_what_is_announced(more: dict, saved: Saved, pairs: Path, tmp_path: Path) -> None:
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", adapter="full", steps=1, checkpoint_every=1, **more)
    kept = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-00000001" / "optimizer.pt", weights_only=False)
    tensors = [t for moments in kept["state"].values() for t in moments.values() if isinstance(t, Tensor) and t.ndim]
    objective = objectives.load("diffusion-dpo").Objective
    given = {"model": str(saved.folder), "pairs": "tiny", "output": "never", "adapter": "full", "prompts": None, **more}
    announced = Sizing().of(config.resolve(config.placed(given, objective), objective)).moments
    assert announced == sum(4 * t.numel() for t in tensors)


def test_convolutions_gain_less_than_matrices() -> None:
    """Rows and columns are those of the last two dimensions, 3 x 3 in a convolution."""
    settings = OptimizerSettings(optimizer="adafactor")
    assert moments_bytes([nn.Parameter(torch.zeros(320, 1280))], settings) == 4 * (320 + 1280)
    assert moments_bytes([nn.Parameter(torch.zeros(320, 1280, 3, 3))], settings) == 4 * 2 * 320 * 1280 * 3
    assert moments_bytes([nn.Parameter(torch.zeros(320))], settings) == 4 * 320
