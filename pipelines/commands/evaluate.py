"""``diffalign evaluate``: base and tuned model sample the same prompts from the same noise, and judges compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "compare a tuned model with its base: same prompts, same seeds, win rates by judge, a page of pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign evaluate``."""
    from pipelines.judge_options import add_judge_options
    from pipelines.prompts import FORMATS, NAMES
    from pipelines.sampling_options import add_sampling_options, whole

    model = "'tiny', 'tiny-flow', a Diffusers folder, a hub id, a .safetensors file or the folder of a run"
    parser.add_argument("--base", required=True, metavar="MODEL", help=f"model before tuning: {model}")
    parser.add_argument("--base-lora", metavar="PATH", help="LoRA that is part of the base, as `diffalign train` takes it")
    parser.add_argument("--tuned", required=True, metavar="MODEL", help="model after tuning, named the same way")
    parser.add_argument(
        "--prompts", required=True, help=f"prompts: a {', '.join(FORMATS)} file, or a list by name ({', '.join(NAMES)})"
    )
    add_judge_options(parser, default="oracle", apart=True)
    parser.add_argument("--out", "--output", required=True, metavar="FOLDER", help="folder for the report")
    parser.add_argument(
        "--images-per-prompt", type=whole(1), default=1, metavar="K", help="number of pictures per prompt (default 1)"
    )
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table and write the report; 0 when it is written."""
    from pipelines.evaluation import evaluate
    from pipelines.families import load_pipeline
    from pipelines.judge_options import judges_from
    from pipelines.progress import Bar
    from pipelines.prompts import read_prompts
    from pipelines.sampling_options import loading_arguments, sampling_arguments

    def load(name: str) -> Any:
        lora = args.base_lora if name == base else None
        called = args.base if name == base else name
        return load_pipeline(called, base_lora=lora, **loading_arguments(args))

    base = f"{args.base} with {Path(args.base_lora).name}" if args.base_lora else args.base
    prompts = read_prompts(args.prompts, args.column)[: args.n]
    judges = judges_from(args)
    with Bar(unit="picture") as bar:
        summary = evaluate(
            base,
            args.tuned,
            prompts,
            judges,
            args.out,
            load=load,
            seed=args.seed,
            images_per_prompt=args.images_per_prompt,
            overwrite=args.overwrite,
            progress=bar.advance,
            **sampling_arguments(args),
        )
    print(summary.to_text())
    return 0
