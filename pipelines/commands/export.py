"""``diffalign export``: a result of training, in the layout of another program."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a trained LoRA or model for other programs: kohya's layout, ComfyUI's, one file, or Diffusers'"
LAYOUTS = ("diffusers", "kohya", "comfyui", "single-file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign export``."""
    parser.add_argument(
        "result",
        metavar="RESULT",
        help="folder of a run of `diffalign train`, `diffalign prompts sft` or `diffalign prompts train`",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        help="checkpoint of a run, finished or not, to export: its step, latest, or best, by "
        "its validation loss (default: the finished result)",
    )
    parser.add_argument(
        "--to",
        dest="layout",
        choices=LAYOUTS,
        default="diffusers",
        help="layout: kohya (a LoRA for A1111, Forge and ComfyUI); comfyui (a LoRA by the original network's names); "
        "single-file (the whole model as one .safetensors file; SD 1.x, 2.x, XL); diffusers (a LoRA folder, or with --merge the "
        "pipeline; the default). Prompt writers have only the last, as a folder of PEFT or Transformers",
    )
    parser.add_argument(
        "--out", "--output", required=True, metavar="PATH", help="output: a .safetensors file, or a folder with --to diffusers"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge the LoRA into the whole pipeline (with --to diffusers), or into a prompt writer's model",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA (default 1: as it was trained)")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="leave out the LoRA that this one was trained on top of (--base-lora), to load both together (default: one LoRA "
        "that does what both do)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "fp32", "fp16", "bf16"),
        help="precision of the tensors (default float32)",
    )
    parser.add_argument("--base", metavar="MODEL", help="base model of the LoRA, if it is not where it was")
    parser.add_argument("--title", help="title in the header of the file (default: name of the result's folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there at the output")


def run(args: argparse.Namespace) -> int:
    """Write, and say how to use it; 0 when everything is written."""
    from pipelines.export import Export, export

    asked = Export(
        args.result,
        Path(args.out).expanduser(),
        layout=args.layout,
        merge=args.merge,
        scale=args.scale,
        alone=args.alone,
        dtype=args.dtype,
        base=args.base,
        title=args.title,
        overwrite=args.overwrite,
        checkpoint=args.checkpoint,
    )
    print(export(asked).text)
    return 0
