"""Pictures per second of scoring: one at a time as the original scripts do it, against batches, shared passes and the cache.

    python benchmarks/score.py [--models vit-l-14 vit-h-14] [--pictures 16] [--per-prompt 4] [--rounds 2] [--json out.json]

The genuine shapes with random weights, on whatever device there is. Compared, in one process and in alternation, the quickest of
``--rounds`` each:

    one at a time     open_clip, float32: for every picture open, transform, encode it and its prompt (77 tokens), take the
                      cosine: the loop of the released scripts of CLIP score, PickScore and HPSv2
    batches           ``judge.score``: threads open ahead, pictures in batches, each different prompt once; float32
    batches, bf16     the same with towers in bfloat16
    three judges      CLIP and both aesthetic predictors in one pass, against three passes
    again             the same folder a second time, from the cache
    again, new judge  another judge on the same encoder: embeddings from the cache
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import reward_models
from reward_models import _clip, _heads
from reward_models._dual import ClipEncoder, DualEncoder
from reward_models._judge import device_of
from reward_models._preprocess import ShortestSide
from reward_models.aesthetic import WIDTHS, Aesthetic
from reward_models.base import RewardInfo

SHAPES = {"vit-l-14": ("ViT-L-14-quickgelu", _clip.VIT_L_14), "vit-h-14": ("ViT-H-14", _clip.VIT_H_14)}
PLACE = ("a lighthouse", "a crowded market", "an old bicycle", "the harbour at dawn", "a bowl of figs", "two dogs")


def write_pictures(folder: Path, n: int, per_prompt: int, size: int) -> tuple[list[Path], list[str]]:
    """``n`` pictures with the entropy of photographs (noise at several scales), and their prompts."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(n):
        layers = [rng.normal(size=(max(2, size >> k), max(2, size >> k), 3)) * 2.0**k for k in range(2, 8)]
        tall = [np.asarray(_grown(layer, size)) for layer in layers]
        picture = np.clip(128 + 3.0 * sum(tall), 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:05d}.png")
        Image.fromarray(picture).save(paths[-1])
    words = [f"{PLACE[(i // per_prompt) % len(PLACE)]}, detailed, number {i // per_prompt}, soft evening light" for i in range(n)]
    return paths, words


def _grown(layer: np.ndarray, size: int) -> np.ndarray:
    channels = [
        Image.fromarray(layer[..., c].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC) for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


# ---------------------------------------------------------------------------------------------------------------- contenders


def one_at_a_time(shape: str) -> tuple[Callable[[list[Path], list[str]], torch.Tensor], dict[str, torch.Tensor]]:
    """The loop of the released scripts, and its weights."""
    import open_clip

    name, device = SHAPES[shape][0], device_of(None)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights are random
        model, _, transform = open_clip.create_model_and_transforms(name, device=device)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    @torch.no_grad()
    def score(paths: list[Path], prompts: list[str]) -> torch.Tensor:
        scores = []
        for path, prompt in zip(paths, prompts, strict=True):
            picture = model.encode_image(transform(Image.open(path))[None].to(device), normalize=True)
            text = model.encode_text(tokenizer([prompt]).to(device), normalize=True)
            scores.append((picture * text).sum().cpu())
        return torch.stack(scores)

    return score, model.state_dict()


def encoder(shape: str, state: dict[str, torch.Tensor], dtype: torch.dtype) -> ClipEncoder:
    """The same weights on Transformers, as the judges use them."""
    model = _clip.build(SHAPES[shape][1])
    model.load_state_dict(_clip.to_transformers(state))
    made_of = {"weights": f"random {shape}", "dtype": str(dtype)}
    return ClipEncoder(_clip.Towers(model, _clip.open_clip_tokens(), device_of(None), dtype), ShortestSide(), made_of)


def clip_judge(on: ClipEncoder, name: str = "clip", factor: float = 1.0) -> DualEncoder:
    return DualEncoder(RewardInfo(name, needs_prompt=True), on, factor)


def three_judges(on: ClipEncoder) -> list[Any]:
    """CLIP and two heads on its embedding."""
    width = on.towers._model.config.projection_dim
    heads = [_heads.build((width, 1)), _heads.build((width, *WIDTHS[1:]))]
    names = ("aesthetic-v1", "aesthetic-v2")
    return [clip_judge(on), *(Aesthetic(on, head, name) for head, name in zip(heads, names, strict=True))]


# ------------------------------------------------------------------------------------------------------------------- timing


def quickest(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each, all in turn, the best of ``rounds``."""
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(shape: str, n: int, per_prompt: int, size: int, rounds: int) -> dict[str, Any]:
    """Seconds of every variant on ``n`` pictures, and the ratios."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths, prompts = write_pictures(folder, n, per_prompt, size)
        original, state = one_at_a_time(shape)
        full, half = encoder(shape, state, torch.float32), encoder(shape, state, torch.bfloat16)
        judge, quick, panel = clip_judge(full), clip_judge(half), three_judges(full)
        cache = folder / "cache.sqlite"
        expected, ours = original(paths, prompts), judge.score(paths, prompts, progress=False)
        assert (expected - ours).abs().max() < 1e-5, "the two do not compute the same"
        seconds = quickest(
            {
                "one at a time": lambda: original(paths, prompts),
                "batches": lambda: judge.score(paths, prompts, progress=False),
                "batches, bf16": lambda: quick.score(paths, prompts, progress=False),
                "three passes": lambda: [j.score(paths, prompts, progress=False) for j in panel],
                "three judges in one pass": lambda: reward_models.score(panel, paths, prompts, progress=False),
            },
            rounds,
        )
        judge.score(paths, prompts, cache=cache, progress=False)
        other = clip_judge(full, "another", factor=100.0)
        seconds |= quickest({"again, from the cache": lambda: judge.score(paths, prompts, cache=cache, progress=False)}, rounds)
        seconds |= quickest({"again, new judge": lambda: other.score(paths, prompts, cache=cache, progress=False)}, 1)
        error = float((quick.score(paths, prompts, progress=False) - ours).abs().max())
    return {"model": shape, "pictures": n, "seconds": seconds, "ratios": _ratios(seconds), "largest error of bf16": error}


def _ratios(seconds: dict[str, float]) -> dict[str, float]:
    base, batches = seconds["one at a time"], seconds["batches"]
    return {
        "batches over one at a time": base / batches,
        "batches in bf16 over one at a time": base / seconds["batches, bf16"],
        "three judges in one pass over three passes": seconds["three passes"] / seconds["three judges in one pass"],
        "from the cache over batches": batches / seconds["again, from the cache"],
        "a new judge on kept embeddings over batches": batches / seconds["again, new judge"],
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Markdown: pictures per second, then the ratios."""
    for row in rows:
        print(f"\n{row['model']}, {row['pictures']} pictures, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print("| variant | pictures per second |\n|---|---|")
        for name, seconds in row["seconds"].items():
            print(f"| {name} | {row['pictures'] / seconds:.2f} |")
        print("\n| ratio | |\n|---|---|")
        for name, ratio in row["ratios"].items():
            print(f"| {name} | {ratio:.2f}x |")
        print(f"\nlargest error of a cosine in bf16: {row['largest error of bf16']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [measure(model, args.pictures, args.per_prompt, args.size, args.rounds) for model in args.models]
    report(rows)
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
