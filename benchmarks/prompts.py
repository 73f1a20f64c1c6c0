"""Measure Sem-DPO on the tiny world: faithfulness against taste over alpha, with the same data and budget.

    python benchmarks/prompts.py --out runs/prompts [--seeds 0 1 2] [--alphas 0 0.5 1 2 5 10]
    python benchmarks/prompts.py --out runs/prompts --report
    python benchmarks/prompts.py --out runs/normalised --normalise step --seeds 0       (or --pairs FILE)

The writer after SFT (on what the tiny world's people write, half of whom change what the prompt said) proposed the rewrites of
the shipped pairs (``pipelines/tiny/shipped.py`` says how they were made). People who weigh style nine to one against content
chose, so that more than a third of the preferred rewrites mean something else. From the same pairs, by the same number of steps,
come DPO (alpha = 0) and Sem-DPO.

Measured on captions of the test split, for the prompt that was typed: the oracle's taste and faithfulness, the win rate over the
plain prompt by the world's own people (who weigh both alike, and whom no training saw), the distance, and best-of-n for
comparison. The numbers of every run are kept in ``OUT/results``; a run whose numbers are there is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CAPTIONS, CAPTION_SEED, PICTURES = 192, 8192, 2
DRAWING = {"steps": 15, "guidance_scale": 4.0, "batch_size": 32}
JUDGE = {"taste_weight": 0.9}
DELTA = 0.1
BEST_OF = 4


def scorer(judge: dict[str, Any], pictures: int, seed: int) -> Any:
    import reward_models
    from pipelines import families
    from pipelines.writers.rewrite_scorer import DrawingSettings, RewriteScorer

    judges = {"oracle": reward_models.load("oracle", **judge)}
    return RewriteScorer(families.load_pipeline("tiny"), judges, DrawingSettings(pictures, seed, **DRAWING))


def sft(folder: Path) -> Path:
    """Train the writer by SFT that all other runs start from."""
    from pipelines.writers.training import train_writer

    output = folder / "sft"
    if not (output / "summary.json").is_file():
        train_writer("prompt-sft", recipe="tiny", output=str(output), tracker="none", progress=False, overwrite=True)
    return output


def train(alpha: float, seed: int, folder: Path, **more: Any) -> Path:
    """Train a writer by Sem-DPO with one alpha; 0 is DPO."""
    from pipelines.writers.training import train_writer

    output = folder / "models" / f"alpha{alpha:g}-{seed}"
    options = {"model": str(folder / "sft"), "tracker": "none", "progress": False}
    train_writer("sem-dpo", recipe="tiny", output=str(output), overwrite=True, alpha=alpha, seed=seed, **options, **more)
    return output


def measure(writer: Path | None, seed: int, best_of: int = 1) -> dict[str, Any]:
    """Numbers for each picture, or each prompt, of one writer; None measures the plain prompts."""
    from pipelines.semantics import distance, load_embedding
    from pipelines.tiny import scenes
    from pipelines.writers.sampling import Decoding, candidates
    from pipelines.writers.writer import Writer

    prompts = scenes.captions(CAPTIONS, seed=CAPTION_SEED, split="test")
    texts = prompts
    if writer is not None:
        drawn = candidates(Writer.load(writer), prompts, best_of, Decoding(max_rewrite_tokens=48), seed=seed)
        texts = [found[0] for found in drawn] if best_of == 1 else _best(prompts, drawn)
    at_work = scorer({}, PICTURES, CAPTION_SEED)
    pictures = at_work.pictures(prompts, texts)
    repeated = [prompt for prompt in prompts for _ in range(PICTURES)]
    oracle = at_work.judges["oracle"]
    details = oracle.details(pictures, repeated)
    return {
        "utility": oracle.score(pictures, repeated).tolist(),
        "taste": np.asarray(details["taste"]).tolist(),
        "faithfulness": np.asarray(details["faithfulness"]).tolist(),
        "distance": distance(load_embedding("tiny"), prompts, texts).tolist(),
        "texts": texts,
    }


def _best(prompts: list[str], drawn: list[list[str]]) -> list[str]:
    """The best rewrite of each prompt by the judge of the training data, on pictures that the measurement does not use."""
    rows = [(prompt, text) for prompt, texts in zip(prompts, drawn, strict=True) for text in texts]
    scores = scorer(JUDGE, 1, CAPTION_SEED + 1).scores([p for p, _ in rows], [t for _, t in rows])["oracle"]
    return [texts[int(np.argmax(of_prompt))] for texts, of_prompt in zip(drawn, scores.reshape(len(prompts), -1), strict=True)]


def run(alphas: Sequence[float], seeds: Sequence[int], folder: Path, **more: Any) -> None:
    """Train and measure every run that has no result yet."""
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)

    def kept(name: str, make: Any) -> None:
        if not (results / f"{name}.json").is_file():
            (results / f"{name}.part").write_text(json.dumps(make()))
            (results / f"{name}.part").replace(results / f"{name}.json")
            print(f"{name} done", flush=True)

    start = sft(folder)
    kept("plain", lambda: measure(None, 0))
    for seed in seeds:
        kept(f"sft-{seed}", lambda seed=seed: measure(start, seed))
        kept(f"sft-best-{seed}", lambda seed=seed: measure(start, seed, BEST_OF))
        for alpha in alphas:
            kept(f"alpha{alpha:g}-{seed}", lambda alpha=alpha, seed=seed: measure(train(alpha, seed, folder, **more), seed))


# ------------------------------------------------------------------------------------------------------------------ report


def found(folder: Path, name: str) -> list[dict[str, Any]]:
    paths = sorted((folder / "results").glob(f"{name}-*.json"))
    return [json.loads(path.read_text()) for path in paths if path.stem.rsplit("-", 1)[0] == name]


def row(name: str, results: list[dict[str, Any]], plain: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds, their spread over seeds, and the win rate over the plain prompts, pooled."""
    from diffalign.evaluate import win_rate

    groups = [n // PICTURES for n in range(CAPTIONS * PICTURES)] * len(results)
    won = win_rate(plain["utility"] * len(results), [u for r in results for u in r["utility"]], groups=groups)
    means = {key: [float(np.mean(r[key])) for r in results] for key in ("taste", "faithfulness", "utility", "distance")}
    beyond = [float(np.mean(np.array(r["distance"]) > DELTA)) for r in results]
    return {"name": name, "seeds": len(results), "win": won, "beyond": beyond, **means}


def report(folder: Path, alphas: Sequence[float]) -> None:
    """Write ``prompts.md`` and ``prompts.png``."""
    plain = json.loads((folder / "results" / "plain.json").read_text())
    rows = [row("plain", [plain], plain)]
    named = [("SFT", "sft"), (f"SFT, best of {BEST_OF} by the judge", "sft-best")]
    named += [("DPO" if alpha == 0 else f"Sem-DPO, alpha {alpha:g}", f"alpha{alpha:g}") for alpha in alphas]
    rows += [row(title, results, plain) for title, name in named if (results := found(folder, name))]
    text = as_markdown(rows) + "\n" + against_dpo(rows)
    (folder / "prompts.md").write_text(text)
    print(text)
    draw(rows, folder / "prompts.png")


def as_markdown(rows: list[dict[str, Any]]) -> str:
    def cell(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
        spread = f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{scale * np.mean(values):.{digits}f}{spread}"

    head = ("", "taste", "faithfulness", "wins over plain (95 %)", "mean distance", f"beyond {DELTA:g}")
    table = [head, ("---",) * len(head)]
    for r in rows:
        won = "-" if r["name"] == "plain" else f"{100 * r['win'].rate:.0f} % ({100 * r['win'].low:.0f}-{100 * r['win'].high:.0f})"
        numbers = (cell(r["taste"]), cell(r["faithfulness"]), won, cell(r["distance"]), cell(r["beyond"], 100.0, 0) + " %")
        table.append((r["name"], *numbers))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"


def against_dpo(rows: list[dict[str, Any]]) -> str:
    """How much taste each alpha gives up, and how much faithfulness it saves."""
    means = {r["name"]: {key: float(np.mean(r[key])) for key in ("taste", "faithfulness")} for r in rows}
    if "DPO" not in means:
        return ""
    plain, dpo, out = means["plain"], means["DPO"], ""
    for name in (name for name in means if name.startswith("Sem-DPO")):
        kept = (means[name]["taste"] - plain["taste"]) / (dpo["taste"] - plain["taste"])
        saved = means[name]["faithfulness"] - dpo["faithfulness"]
        out += f"{name}: {100 * kept:.0f} % of DPO's gain in taste over plain, {100 * saved:+.1f} points of faithfulness\n"
    return out


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Taste gained against faithfulness kept: one point for each way, bars over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.subplots()
    swept = [r for r in rows if "DPO" in r["name"]]
    line = {"color": "0.8", "zorder": 0, "label": "Sem-DPO, from alpha 0 (DPO) on"}
    panel.plot([np.mean(r["faithfulness"]) for r in swept], [np.mean(r["taste"]) for r in swept], **line)
    for k, r in enumerate(rows):
        spread = {key: np.std(r[key], ddof=1) if r["seeds"] > 1 else 0.0 for key in ("faithfulness", "taste")}
        at = np.mean(r["faithfulness"]), np.mean(r["taste"])
        panel.errorbar(*at, xerr=spread["faithfulness"], yerr=spread["taste"], fmt="o", capsize=2)
        beside = (6, 6 if k % 2 else -13)  # neighbours of the sweep lie close together
        panel.annotate(r["name"].removeprefix("Sem-DPO, "), at, xytext=beside, textcoords="offset points", fontsize=8)
    panel.set(xlabel="faithfulness to the prompt that was typed", ylabel="taste", title="held-out prompts, by the oracle")
    panel.margins(0.12)
    panel.legend(frameon=False, loc="lower left", fontsize=8)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0, 5.0, 10.0])
    parser.add_argument(
        "--normalise", default="none", help="normalisation of the weights: none, step or data; needs an --out of its own"
    )
    parser.add_argument("--pairs", default="tiny", help="pairs to learn from, of `prompts build`; needs an --out of its own")
    parser.add_argument("--report", action="store_true", help="write the report only")
    args = parser.parse_args()
    if not args.report:
        run(args.alphas, args.seeds, args.out, normalise=args.normalise, pairs=args.pairs)
    report(args.out, args.alphas)


if __name__ == "__main__":
    main()
