"""What each objective is worth on the tiny world, with an equal budget of UNet forward passes.

    python benchmarks/objectives.py --out runs/bench [--objectives sft diffusion-dpo ...] [--seeds 0 1 2] [--budget 23040]
    python benchmarks/objectives.py --out runs/bench --noise        (DPO, rDPO, SmPO, ADPO with 0 to 30 % of the labels flipped)
    python benchmarks/objectives.py --out runs/bench --draws        (DPO on 240 pairs with 1 to 8 kept draws each, or fresh ones)
    python benchmarks/objectives.py --out runs/flow --recipe tiny-flow --objectives diffusion-dpo smpo d3po   (the transformer)
    python benchmarks/objectives.py --out runs/bench --report       (table and plots from what is there)

Every objective starts from its recipe (tiny, a UNet; or tiny-flow, a transformer that follows a flow); only the number of steps
follows from the budget, in which a sample through the network with a gradient counts three forward passes and one without
counts one (``Objective().cost``). Models are compared with the base on captions of the test split, from the same noise, pooled
over seeds; those by which the recipes were tuned (the evaluation captions of ``tiny``) are drawn, too, but not counted.

    win rate         by the oracle's utility, over captions, with a prompt-clustered 95 % interval
    taste, faith     the oracle's means: style that the synthetic people like; claims of the caption that are kept
    judge            win rate by the miniature PickScore, which SmPO, D3PO and DDPO are trained on: far above the oracle's win
                     rate means that the judge was exploited
    drift            |policy - reference|^2 / |reference|^2 of predictions at noised test scenes
    diversity        distance of two pictures of one caption (1 - cosine of the judge's embeddings), relative to the base

Every run's numbers are kept in ``OUT/results/NAME-SEED.json``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

CAPTIONS, CAPTION_SEED, PER_CAPTION = 128, 4096, 2
TUNED_BY = 224
"""Captions of the recipes' own comparison with the base."""
STEPS, GUIDANCE = 25, 4.0
NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3)
DRAWS, DRAWN_PAIRS = (1, 2, 4, 8, 0), 240
"""Kept draws (t, noise) of every pair, 0 for fresh ones; so few pairs that the tiny recipe comes to each twelve times."""
RECIPES = ("tiny", "tiny-flow")
"""Each is called as the model that it starts from."""


@dataclass(frozen=True)
class Variant:
    """One line of the table: an objective, and the options that differ from its recipe."""

    name: str
    objective: str
    options: tuple[tuple[str, Any], ...] = ()
    recipe: str = RECIPES[0]


OBJECTIVES = ("sft", "diffusion-dpo", "ipo", "kto", "mapo", "smpo", "seppo", "diffusion-dro", "d3po", "ddpo")
NOISY = {
    "dpo": Variant("dpo", "diffusion-dpo"),
    "rdpo": Variant("rdpo", "diffusion-dpo", (("loss", "rdpo"),)),
    "smpo": Variant("smpo", "smpo"),
    "adpo": Variant("adpo", "diffusion-dpo", (("loss", "adpo"), ("reward", ("tiny-pickscore",)))),
}


# ---------------------------------------------------------------------------------------------------------------- training


def steps_for(budget: float, variant: Variant) -> int:
    """Optimizer steps that the budget pays for."""
    from diffalign import objectives
    from diffalign.objectives._about import PROMPTS
    from pipelines import config, recipes

    objective = objectives.load(variant.objective).Objective
    given = config.placed({**dict(variant.options), "output": "."}, objective)
    tree = config.merge(recipes.load(variant.objective, variant.recipe), given)
    settings = config.resolve(tree, objective)
    pairs = settings.batch.accumulation * (1 if PROMPTS in objective.about.data else settings.batch.batch_size)
    return max(1, round(budget / (pairs * settings.objective.cost.forwards)))


def train(variant: Variant, seed: int, budget: float, folder: Path, **more: Any) -> tuple[Path, int]:
    """The trained LoRA's folder, and the optimizer steps."""
    from pipelines.training import align

    steps, output = steps_for(budget, variant), folder / "models" / f"{variant.name}-{seed}"
    share = {"warmup_steps": max(1, steps // 6), "validate_every": 0, "checkpoint_every": 0}
    options = {**dict(variant.options), **more, "steps": steps, "seed": seed, "prompts": "none", **share}
    align(variant.objective, recipe=variant.recipe, output=str(output), overwrite=True, progress=False, **options)
    return output, steps


# ------------------------------------------------------------------------------------------------------------- measurement


@cache
def captions() -> tuple[str, ...]:
    """Of the test split, each ``PER_CAPTION`` times."""
    from pipelines.tiny import scenes

    return tuple(c for c in scenes.captions(CAPTIONS, seed=CAPTION_SEED) for _ in range(PER_CAPTION))


@cache
def counted() -> tuple[int, ...]:
    """The places in ``captions`` of those that no training, judge or recipe has seen."""
    from pipelines.prompts import held_out_prompts

    tuned = {prompt.text for prompt in held_out_prompts("tiny", TUNED_BY)}
    return tuple(n for n, caption in enumerate(captions()) if caption not in tuned)


def unseen(values: Sequence[float]) -> list[float]:
    """Of one number for each of ``captions``."""
    return [values[n] for n in counted()]


def measure(model: str, base: str) -> dict[str, Any]:
    """Everything about one model's pictures, one number per picture where there is one; ``base`` is what it started from."""
    import reward_models
    from pipelines import families, sampling

    texts = list(captions())
    seeds = sampling.picture_seeds(CAPTIONS, PER_CAPTION, CAPTION_SEED)
    pictures = sampling.sample(
        families.load_pipeline(model), texts, seeds=seeds, steps=STEPS, guidance_scale=GUIDANCE, batch_size=32
    )
    oracle, judge = reward_models.load("oracle"), reward_models.load("tiny-pickscore")
    details = oracle.details(pictures, texts)
    embedded = torch.nn.functional.normalize(judge.embed_images(pictures).float(), dim=-1).view(CAPTIONS, PER_CAPTION, -1)
    apart = 1.0 - (embedded[:, 0] * embedded[:, 1]).sum(dim=-1)
    return {
        "utility": oracle.score(pictures, texts).tolist(),
        "taste": np.asarray(details["taste"]).tolist(),
        "faithfulness": np.asarray(details["faithfulness"]).tolist(),
        "judge": judge.score(pictures, texts).tolist(),
        "diversity": float(apart.mean()),
        "drift": drift(model, base),
    }


@torch.no_grad()
def drift(model: str, base: str, scenes_shown: int = 64) -> float:
    """How far the predictions have moved from the base's, relative to their size."""
    from pipelines import families
    from pipelines.tiny import scenes

    if model == base:
        return 0.0
    known, tuned = (families.wrap(families.load_pipeline(name)) for name in (base, model))
    shown = [x for x, _ in zip(scenes.stream(CAPTION_SEED, "test", 0.0), range(scenes_shown), strict=False)]
    pixels = torch.stack([torch.from_numpy(np.asarray(scenes.render(scene))).permute(2, 0, 1) for scene, _ in shown])
    generator = torch.Generator().manual_seed(CAPTION_SEED)
    latents = known.encoder.encode_images(pixels / 127.5 - 1.0)["mean"]
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.randint(1000, (len(latents),), generator=generator)
    x_t, said = known.denoiser.schedule.add_noise(latents, noise, t), known.encoder.encode_prompts([c for _, c in shown])
    before, now = (family.denoiser(x_t, t, said) for family in (known, tuned))
    return float((now - before).square().sum() / before.square().sum())


# ------------------------------------------------------------------------------------------------------------------- runs


def run(variants: Sequence[Variant], seeds: Sequence[int], budget: float, folder: Path, **more: Any) -> None:
    """Train and measure what has no result yet."""
    results, base = folder / "results", variants[0].recipe
    results.mkdir(parents=True, exist_ok=True)
    if not (results / "base.json").is_file():
        _write(results / "base.json", measure(base, base))
    for seed in seeds:
        for variant in variants:
            path = results / f"{variant.name}-{seed}.json"
            if path.is_file():
                continue
            model, steps = train(variant, seed, budget, folder, **more)
            _write(path, {"name": variant.name, "seed": seed, "steps": steps, "budget": budget, **measure(str(model), base)})
            print(f"{path.name} done, {steps} steps", flush=True)


def noisy(name: str, level: float) -> Variant:
    """One run of the sweep. rDPO is told the share. Without noise it is DPO, and DPO and SmPO are what the bench has run."""
    variant, options = NOISY[name], NOISY[name].options
    if name == "rdpo":
        options = (*options, ("loss_options", {"noise": level})) if level else ()
    plain = not level and not options
    return Variant(variant.objective if plain else f"noise{round(100 * level):02d}-{name}", variant.objective, options)


def run_noise(names: Sequence[str], seeds: Sequence[int], budget: float, folder: Path) -> None:
    """The same for labels of which a share is flipped."""
    for level in NOISE_LEVELS:
        pairs = flipped_pairs(level, folder)
        cache_folder = str(folder / "caches" / pairs.stem)
        run([noisy(name, level) for name in names], seeds, budget, folder, pairs=str(pairs), cache=cache_folder)


def flipped_pairs(level: float, folder: Path) -> Path:
    """The shipped pairs with a share of the labels turned round, drawn once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.tiny.model import pairs_path

    path = folder / f"pairs-noise{round(100 * level):02d}.parquet"
    if not path.is_file():
        table = pq.read_table(pairs_path())
        label = table["label_0"].to_numpy()
        turned = np.where(np.random.default_rng(7).random(len(label)) < level, 1.0 - label, label)
        for name, values in (("label_0", turned), ("label_1", 1.0 - turned)):
            if name in table.column_names:
                kind = table.schema.field(name).type
                table = table.set_column(table.column_names.index(name), name, pa.array(values, type=kind))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    return path


def drawn(count: int, seed: int | None = None) -> Variant:
    """One run of the sweep over kept draws, which are another set for every seed."""
    own = {} if seed is None or not count else {"reference_seed": seed}
    options = {"validation_pairs": 0, "reference_draws": count, **own}
    return Variant(f"draws{count}" if count else "draws-fresh", "diffusion-dpo", tuple(options.items()))


def run_draws(counts: Sequence[int], seeds: Sequence[int], budget: float, folder: Path) -> None:
    """The same few pairs again and again, at draws that come back or that do not."""
    pairs = first_pairs(DRAWN_PAIRS, folder)
    for seed in seeds:
        for count in counts:
            kept = {"reference_cache": str(folder / "caches" / f"draws{count}-{seed}")} if count else {}
            more = {"pairs": str(pairs), "cache": str(folder / "caches" / pairs.stem), **kept}
            run([drawn(count, seed)], [seed], budget, folder, **more)


def first_pairs(count: int, folder: Path) -> Path:
    """The first of the shipped pairs."""
    import pyarrow.parquet as pq

    from pipelines.tiny.model import pairs_path

    path = folder / f"pairs-first{count}.parquet"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(pairs_path()).slice(0, count), path)
    return path


def _write(path: Path, values: dict[str, Any]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(values))
    aside.replace(path)


# ----------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Line:
    """One line of the table, pooled over seeds."""

    name: str
    seeds: int
    steps: int
    win: Any  # diffalign.evaluate.WinRate by the oracle
    by_seed: tuple[float, ...]  # the same rate of each seed alone: the interval is over captions and does not hold their spread
    judge: Any  # WinRate by the miniature PickScore
    taste: float
    faithfulness: float
    drift: float
    diversity: float


def lines(folder: Path, names: Sequence[str]) -> Iterator[Line]:
    """A line for everything that has results."""
    base = json.loads((folder / "results" / "base.json").read_text())
    for name in names:
        found = [json.loads(p.read_text()) for p in sorted((folder / "results").glob(f"{name}-*.json"))]
        found = [r for r in found if r["name"] == name]
        if found:
            yield _line(name, found, base)


def _line(name: str, found: Sequence[dict[str, Any]], base: dict[str, Any]) -> Line:
    from diffalign.evaluate import win_rate

    groups = unseen(captions())

    def won(key: str, results: Sequence[dict[str, Any]] = found) -> Any:
        values = [v for r in results for v in unseen(r[key])]
        return win_rate(unseen(base[key]) * len(results), values, groups=groups * len(results))

    def mean(key: str) -> float:
        return float(np.mean([np.mean(unseen(r[key])) for r in found]))

    return Line(
        name=name,
        seeds=len(found),
        steps=found[0]["steps"],
        win=won("utility"),
        by_seed=tuple(won("utility", [r]).rate for r in found),
        judge=won("judge"),
        taste=mean("taste"),
        faithfulness=mean("faithfulness"),
        drift=float(np.mean([r["drift"] for r in found])),
        diversity=float(np.mean([r["diversity"] for r in found])) / base["diversity"],
    )


HEAD = ("objective", "steps", "win rate (95 %)", "by seed", "taste", "faith", "judge's win rate", "drift", "diversity")


def as_markdown(rows: Sequence[Line], base: dict[str, Any]) -> str:
    """The table."""
    table = [HEAD, ("---",) * len(HEAD)]
    table.append(
        ("base", "", "50 %", "", *(f"{np.mean(unseen(base[key])):.3f}" for key in ("taste", "faithfulness")), "50 %", "0", "1.00")
    )
    for r in rows:
        win = f"{100 * r.win.rate:.1f} % ({100 * r.win.low:.1f}-{100 * r.win.high:.1f})"
        judge = f"{100 * r.judge.rate:.1f} %"
        cells = (
            r.name,
            str(r.steps),
            win,
            ", ".join(f"{100 * rate:.0f}" for rate in r.by_seed),
            f"{r.taste:.3f}",
            f"{r.faithfulness:.3f}",
            judge,
            f"{r.drift:.4f}",
            f"{r.diversity:.2f}",
        )
        table.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"


def report(folder: Path) -> None:
    """A table and a plot of each comparison that was run: ``objectives.md`` and ``.png``, ``noise...``, ``draws...``."""
    base = json.loads((folder / "results" / "base.json").read_text())
    if rows := list(lines(folder, OBJECTIVES)):
        (folder / "objectives.md").write_text(as_markdown(rows, base))
        print(as_markdown(rows, base))
        _draw_objectives(rows, base, folder / "objectives.png")
    sweep = {
        name: [(level, line) for level in NOISE_LEVELS for line in lines(folder, [noisy(name, level).name])] for name in NOISY
    }
    swept = {line.name: line for found in sweep.values() for _, line in found}
    if any(name.startswith("noise") for name in swept):
        text = as_markdown(list(swept.values()), base)
        (folder / "noise.md").write_text(text)
        print(text)
        _draw_noise(sweep, folder / "noise.png")
    kept = {count: line for count in DRAWS for line in lines(folder, [drawn(count).name])}
    if kept:
        text = as_markdown(list(kept.values()), base)
        (folder / "draws.md").write_text(text)
        print(text)
        _draw_draws(kept, folder / "draws.png")


def _draw_objectives(rows: Sequence[Line], base: dict[str, Any], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.42 * len(rows) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = sorted(rows, key=lambda r: r.win.rate)
    y = np.arange(len(rows))
    rates = np.array([[r.win.rate, r.win.low, r.win.high] for r in rows]) * 100
    left.errorbar(rates[:, 0], y, xerr=np.abs(rates[:, 1:] - rates[:, :1]).T, fmt="o", label="oracle (95 %)")
    left.plot([100 * r.judge.rate for r in rows], y, "x", color="tab:orange", label="miniature PickScore")
    left.axvline(50, color="0.6", linestyle=":")
    left.set(title="win rate against the base, %", yticks=y, yticklabels=[r.name for r in rows])
    left.legend(frameon=False, loc="lower right")
    change = [r.faithfulness - float(np.mean(unseen(base["faithfulness"]))) for r in rows]
    right.barh(y - 0.18, [r.taste - float(np.mean(unseen(base["taste"]))) for r in rows], height=0.34, label="taste")
    right.barh(y + 0.18, change, height=0.34, label="faithfulness")
    right.axvline(0, color="0.6", linewidth=0.8)
    right.set(title="change of the oracle's means")
    right.legend(frameon=False, loc="lower right")
    figure.savefig(picture, dpi=110)


def _draw_noise(sweep: dict[str, list[tuple[float, Line]]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    for i, (name, found) in enumerate(sweep.items()):
        if found:
            at = np.array([100 * level for level, _ in found]) + 0.4 * (i - 1.5)  # beside each other, so that bars do not hide
            rates = np.array([[r.win.rate, r.win.low, r.win.high] for _, r in found]) * 100
            panel.errorbar(at, rates[:, 0], yerr=np.abs(rates[:, 1:] - rates[:, :1]).T, fmt="o-", label=name, capsize=2)
    panel.axhline(50, color="0.6", linestyle=":")
    panel.set(xlabel="labels flipped, %", ylabel="win rate against the base, %")
    panel.legend(frameon=False)
    figure.savefig(picture, dpi=110)


def _draw_draws(kept: dict[int, Line], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    found = [line for count, line in kept.items() if count]
    names = [str(count) for count in kept if count]
    rates = np.array([[line.win.rate, line.win.low, line.win.high] for line in found]).reshape(-1, 3) * 100
    panel.errorbar(names, rates[:, 0], yerr=np.abs(rates[:, 1:] - rates[:, :1]).T, fmt="o", capsize=2, label="kept draws")
    for name, line in zip(names, found, strict=True):
        panel.plot([name] * len(line.by_seed), [100 * rate for rate in line.by_seed], "x", color="0.5")
    if 0 in kept:
        fresh = kept[0].win
        panel.axhspan(100 * fresh.low, 100 * fresh.high, color="tab:orange", alpha=0.2)
        panel.axhline(100 * fresh.rate, color="tab:orange", label="fresh draws")
    panel.set(xlabel="draws kept of each pair (crosses: single seeds)", ylabel="win rate against the base, %")
    panel.legend(frameon=False)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=23_040, help="forward passes of each run")
    parser.add_argument("--noise", nargs="*", choices=list(NOISY), help="the sweep over flipped labels, of all or of these")
    parser.add_argument("--draws", nargs="*", type=int, choices=DRAWS, help="the sweep over kept draws, of all counts or these")
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[0], help="of which model; has a folder to itself")
    parser.add_argument("--report", action="store_true", help="only the report")
    args = parser.parse_args()
    if args.draws is not None and not args.report:
        run_draws(args.draws or DRAWS, args.seeds, args.budget, args.out)
    elif args.noise is not None and not args.report:
        run_noise(args.noise or list(NOISY), args.seeds, args.budget, args.out)
    elif not args.report:
        run([Variant(name, name, recipe=args.recipe) for name in args.objectives], args.seeds, args.budget, args.out)
    report(args.out)


if __name__ == "__main__":
    main()
