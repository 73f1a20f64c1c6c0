"""``diffalign generate``: pictures of prompts from any checkpoint, at fixed seeds."""

from __future__ import annotations

import argparse

HELP = "sample pictures of prompts from a checkpoint at fixed seeds, with a grid and a record of the seeds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign generate``."""
    from pipelines.prompts import FORMATS, NAMES
    from pipelines.sampling_options import add_sampling_options, whole

    model = "'tiny', 'tiny-flow', a Diffusers folder, a hub id, a .safetensors file or the folder of a run"
    parser.add_argument("--model", required=True, help=model)
    parser.add_argument(
        "--lora", metavar="PATH", help="LoRA from any program to merge into the model: a .safetensors file, or a folder"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", help=f"prompts: a {', '.join(FORMATS)} file, or a list by name ({', '.join(NAMES)})")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="single prompt; may be given several times")
    parser.add_argument("--out", "--output", required=True, metavar="FOLDER", help="folder for the pictures")
    parser.add_argument("--n-per-prompt", type=whole(1), default=1, metavar="K", help="number of pictures per prompt (default 1)")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="negative prompt of all pictures, which guidance leads away from"
    )
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Sample and write; 0 when all is written."""
    from functools import partial

    from pipelines.families import find, load_pipeline
    from pipelines.generation import generate
    from pipelines.progress import Bar
    from pipelines.prompts import read_prompts
    from pipelines.sampling_options import loading_arguments, sampling_arguments

    prompts = args.prompt if args.prompt else read_prompts(args.prompts, args.column)
    with Bar(unit="picture") as bar:
        record = generate(
            args.model,
            prompts[: args.n],
            args.out,
            load=partial(load_pipeline, base_lora=args.lora, **loading_arguments(args)),
            images_per_prompt=args.n_per_prompt,
            seed=args.seed,
            negative_prompt=args.negative_prompt,
            overwrite=args.overwrite,
            progress=bar.advance,
            **sampling_arguments(args),
        )
    if words := find(args.model, config=args.single_file_config).own_words:
        print(words)
    print(f"{len(record['pictures'])} pictures in {args.out}, {record['seconds']:.0f} s; look at {args.out}/grid.png")
    return 0
