"""The options that ``diffalign generate`` and ``diffalign evaluate`` share. Imports the standard library only."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from diffalign.errors import UserError
from pipelines.sampling import SAMPLERS, SamplerSettings, sampler_name

DTYPES = ("float32", "float16", "bfloat16")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling, of loading the model and of the output folder."""
    parser.add_argument("--n", type=whole(1), metavar="N", help="use the first N prompts only")
    parser.add_argument("--column", help="column of the prompts in a .csv, .tsv, .json or .jsonl file")
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="random seed, from which every picture's own seed follows (default 0)"
    )
    parser.add_argument(
        "--steps", type=whole(1), default=SamplerSettings.steps, help="steps of the sampler (default %(default)s)"
    )
    parser.add_argument("--guidance-scale", type=number(), help="classifier-free guidance scale (default: what the model wants)")
    one_of = f"sampler: {', '.join(SAMPLERS)} (default auto: ddim, but as saved for flow models)"
    parser.add_argument("--sampler", type=_sampler, default=SamplerSettings.sampler, help=one_of)
    together = "number of pictures sampled together, which alters none of them (default %(default)s)"
    parser.add_argument("--batch-size", type=whole(1), default=SamplerSettings.batch_size, help=together)
    parser.add_argument("--height", type=whole(8), help="pixels (default: the model's own)")
    parser.add_argument("--width", type=whole(8), help="pixels (default: the model's own)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights (default float32)")
    quantise = "quantisation of the network's layers: int8 (torchao) or nf4 (bitsandbytes), as in training (default none)"
    parser.add_argument("--quantise", choices=("none", "int8", "nf4"), default="none", help=quantise)
    parser.add_argument("--device", help="device, such as cuda, cuda:1, mps or cpu (default: the best there is)")
    offload = "keep each part of the model on the device only while it works, and decode one picture at a time: less memory"
    parser.add_argument("--offload", action="store_true", help=offload)
    parser.add_argument(
        "--single-file-config",
        metavar="FOLDER",
        help="Diffusers folder with the configuration and tokenizer of a single-file model",
    )
    add_without(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote into the output folder")


def add_without(parser: argparse.ArgumentParser) -> None:
    """Add the option that names parts of a model to leave out."""
    words = "parts of the model to leave out: t5, for SD3 (a LoRA that was trained without it remembers)"
    parser.add_argument("--without", type=_words, default=(), metavar="PART,...", help=words)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``SamplerSettings``, from the parsed options."""
    return {field.name: getattr(args, field.name) for field in fields(SamplerSettings)}


def loading_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``families.load_pipeline``, from the parsed options."""
    names = ("dtype", "device", "without", "offload", "quantise")
    return {"config": args.single_file_config, **{name: getattr(args, name) for name in names}}


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers that are at least ``least``."""

    def parse(text: str) -> int:
        if not text.strip().isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"wants a whole number, at least {least}; got {text!r}")
        return int(text)

    return parse


def number(most: float | None = None) -> Callable[[str], float]:
    """A parser of finite numbers that are at least 0 and, where it is given, at most ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0 or (most is not None and value > most):
            wanted = "at least 0" if most is None else f"from 0 to {most:g}"
            raise argparse.ArgumentTypeError(f"wants a number, {wanted}; got {text!r}")
        return value

    return parse


def _sampler(text: str) -> str:
    try:
        return sampler_name(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
