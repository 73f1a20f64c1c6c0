"""What an on-line step costs: D3PO and Diffusion-DRO as the released scripts call the network, against how we call it.

    python benchmarks/rollout.py [--shapes tiny quarter] [--rounds 5] [--json out.json]

Random weights, LoRA of rank 4, the same trajectories and draws for both variants, which run in alternation in one process;
medians are reported. Counted are the samples that go through the network (with a gradient, and without) and the calls.

    D3PO, one pair of 20 transitions
        released    for every transition: each side's policy prediction in a call of its own (two samples, for the guidance), then
                    each side's reference prediction in a call of its own
        ours        several transitions in one call, both sides and both halves of the guidance together; the reference, which is
                    the round's beginning, was there when the trajectories were sampled
        ours, frozen start
                    the same, with the released code's reference, asked about all transitions in one call without gradient
    D3PO, sampling 2 trajectories for each of 8 prompts
        released    one trajectory after another of the two, in batches of 8
        ours        all 16 together
    DRO, an optimizer step of 16 experts (4 micro-steps of 4)
        released    before each micro-step 4 trajectories are sampled
        ours        all 16 at once
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import SHAPES, build_pipeline
from torch import Tensor, nn

from diffalign.learner import RunContext
from diffalign.objectives.d3po import D3PO
from diffalign.references import AdapterOff
from diffalign.schedule import NoiseSchedule
from diffalign.solvers import Guided
from diffalign.sources.rollout import DRO, Sampling, Trajectory, rollout
from diffalign.sources.rounds import JudgedPairs, densities, transitions
from diffalign.types import Conditioning
from diffalign.weights import TrainedWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUIDANCE, STEPS, PROMPTS = 5.0, 20, 8


@dataclass
class Counted:
    """A denoiser that counts what goes through it."""

    inner: Any
    learning: int = 0
    looking: int = 0
    calls: int = 0

    @property
    def schedule(self) -> NoiseSchedule:
        return self.inner.schedule

    @property
    def network(self) -> nn.Module:
        return self.inner.network

    def adapter_off(self) -> Any:
        return self.inner.adapter_off()

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls += 1
        if torch.is_grad_enabled():
            self.learning += len(x_t)
        else:
            self.looking += len(x_t)
        return self.inner(x_t, t, conditioning)


@dataclass
class Prompts:
    """Encoded prompts in memory."""

    text: Tensor
    prompts: list[str] = field(default_factory=lambda: ["a prompt"] * PROMPTS)

    def __len__(self) -> int:
        return PROMPTS

    def conditioning(self, index: int | None) -> Conditioning:
        return {"encoder_hidden_states": self.text[-1 if index is None else index]}


class Bench:
    """One network, its prompts, and every step in two variants."""

    def __init__(self, shape: str, batch: int) -> None:
        from pipelines.families import stable_diffusion

        family = stable_diffusion.build(build_pipeline(shape))
        family.attach_lora(rank=4)
        family.network.to(DEVICE)
        self.policy, self.batch = Counted(family.denoiser), batch
        self.start = AdapterOff(self.policy)
        config = family.network.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.prompts = Prompts(torch.randn(PROMPTS + 1, 40, SHAPES[shape]["text"]))
        self.empty = {"encoder_hidden_states": self.prompts.text[-1:].to(DEVICE)}
        self.objective = D3PO(rollout_steps=STEPS, guidance=GUIDANCE)
        self.given = RunContext(
            policy=self.policy,
            weights=TrainedWeights(family.network),
            start=self.start,
            latent_shape=self.shape,
            prompts=self.prompts,
            unconditional=self.empty,
            device=DEVICE,
        )
        made = self.sampled(range(2), batch=2, prompts=[0, 0])
        self.judge(made, made.log_density)  # the policy at the round's beginning, which made them, is the reference

    def judge(self, made: Trajectory, reference: Tensor) -> None:
        """Learn from two trajectories from now on: the first is the better one."""
        nothing = torch.zeros(1, 2)
        sides, densities_of = (made.rows([0]), made.rows([1])), (reference[:1], reference[1:])
        self.made = made
        self.judged = JudgedPairs(*sides, densities_of, torch.ones(1), nothing, nothing[:, 0], nothing)

    def sampled(self, seeds: range, batch: int, prompts: list[int], how: Sampling | None = None) -> Trajectory:
        conditioning = {"encoder_hidden_states": self.prompts.text[:-1]}
        return rollout(
            self.policy,
            self.policy.schedule,
            conditioning,
            how or self.objective.sampling,
            shape=self.shape,
            seeds=list(seeds),
            index=prompts,
            unconditional=self.empty,
            batch_size=batch,
            device=DEVICE,
        )

    # ------------------------------------------------------------------------------------------------------ D3PO, learning

    def learn_released(self) -> None:
        policy, reference = (Guided(p, self.empty, GUIDANCE) for p in (self.policy, self.start))
        for j in self.usable:
            batch = transitions(self.judged, [(0, j)], self.prompts).to(DEVICE)
            pair, s = batch.pair, self.policy.schedule
            ratios = []
            for x, x_next in ((pair.winner, pair.winner_next), (pair.loser, pair.loser_next)):
                now = s.log_density(x_next, x, policy(x, pair.t, pair.conditioning), pair.t, pair.t_previous, 1.0)
                with torch.no_grad():
                    said = reference(x, pair.t, pair.conditioning)
                ratios.append(now - s.log_density(x_next, x, said, pair.t, pair.t_previous, 1.0))
            loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1])).mean()
            loss.backward()

    def learn_ours(self) -> None:
        items = [(0, j) for j in self.usable]
        for low in range(0, len(items), self.batch):
            batch = transitions(self.judged, items[low : low + self.batch], self.prompts).to(DEVICE)
            self.objective(batch, self.policy, self.empty).loss.mean().backward()

    start_released = learn_released

    def start_ours(self) -> None:
        """The reference, as there, is the frozen start: it is asked about all transitions at once."""
        reference = densities(self.made, self.start, self.given, self.objective.sampling)
        self.judge(self.made, reference)
        self.learn_ours()

    @property
    def usable(self) -> list[int]:
        return self.judged.first.has_noise[0].nonzero().flatten().tolist()

    # ------------------------------------------------------------------------------------------------------------- sampling

    def sample_released(self) -> None:
        for side in range(2):
            self.sampled(range(side * PROMPTS, (side + 1) * PROMPTS), PROMPTS, list(range(PROMPTS)))

    def sample_ours(self) -> None:
        self.sampled(range(2 * PROMPTS), 2 * PROMPTS, list(range(PROMPTS)) * 2)

    def walk_released(self) -> None:
        for k in range(4):
            self.sampled(range(4 * k, 4 * k + 4), 4, [0, 1, 2, 3], DRO)

    def walk_ours(self) -> None:
        self.sampled(range(16), 16, list(range(8)) * 2, DRO)


def measure(shape: str, rounds: int, batch: int) -> list[dict[str, Any]]:
    """One entry per comparison."""
    bench = Bench(shape, batch)
    steps = {
        "D3PO, learning": "learn",
        "D3PO, learning, frozen start": "start",
        "D3PO, sampling": "sample",
        "DRO, sampling": "walk",
    }
    return [{"shape": shape, "what": what, **compared(bench, name, rounds)} for what, name in steps.items()]


def compared(bench: Bench, name: str, rounds: int) -> dict[str, Any]:
    """Both ways of one step, in alternation: medians of their seconds, and what each asked of the network."""
    variants: dict[str, Callable[[], None]] = {v: getattr(bench, f"{name}_{v}") for v in ("released", "ours")}
    seconds: dict[str, list[float]] = {v: [] for v in variants}
    counts = {}
    for round_ in range(rounds + 1):  # the first one warms up
        for variant, work in variants.items():
            bench.policy.learning = bench.policy.looking = bench.policy.calls = 0
            _settle()
            start = time.perf_counter()
            work()
            _settle()
            if round_:
                seconds[variant].append(time.perf_counter() - start)
            bench.policy.network.zero_grad()
            counts[variant] = {k: getattr(bench.policy, k) for k in ("learning", "looking", "calls")}
    medians = {v: statistics.median(s) for v, s in seconds.items()}
    return {"seconds": medians, "ratio": medians["released"] / medians["ours"], "counts": counts}


def _settle() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def as_table(rows: list[dict[str, Any]]) -> str:
    out = ["| network | step | samples with a gradient | without | calls | time, released / ours |", "|---|---|---|---|---|---|"]
    for r in rows:
        a, b = r["counts"]["released"], r["counts"]["ours"]
        pairs = [f"{a[k]} → {b[k]}" for k in ("learning", "looking", "calls")]
        out.append(f"| {r['shape']} | {r['what']} | {' | '.join(pairs)} | {r['ratio']:.2f}x |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=10, help="transitions at a time in our variant")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for shape in args.shapes for row in measure(shape, args.rounds, args.batch)]
    print(as_table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
