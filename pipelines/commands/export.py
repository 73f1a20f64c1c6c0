"""``diffalign export``: a result of training, in the layout of another program."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a trained LoRA or model for other programs: kohya's layout, ComfyUI's, one file, or Diffusers'"
LAYOUTS = ("diffusers", "kohya", "comfyui", "single-file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign export``."""
    parser.add_argument("result", metavar="RESULT", help="a folder that `diffalign train`, or prompts sft|train, wrote")
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        help="what a run had learnt by a checkpoint, finished or not: the step, latest, or best, by "
        "its validation loss (default: the finished result)",
    )
    parser.add_argument(
        "--to",
        dest="layout",
        choices=LAYOUTS,
        default="diffusers",
        help="kohya: a LoRA for A1111, Forge and ComfyUI; comfyui: by the original network's names; single-file: the whole "
        "model as one .safetensors file (SD 1.x, 2.x, XL); diffusers: a LoRA folder, or with --merge the pipeline (default). "
        "A prompt writer has the last alone, as PEFT and Transformers keep them",
    )
    parser.add_argument("--out", "--output", required=True, metavar="PATH", help="a .safetensors file; for diffusers a folder")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="with --to diffusers: merge the LoRA into the whole pipeline; of a prompt writer: into the model",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="how strong the LoRA is made (default 1: as it was trained)")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="of a LoRA that was trained with --base-lora: without that one, to be loaded together with it (default: one LoRA "
        "that does what both do)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16", "fp32", "fp16", "bf16"), help="of the tensors (default float32)"
    )
    parser.add_argument("--base", metavar="MODEL", help="the base model of a LoRA, if it is not where it was")
    parser.add_argument("--title", help="name for the header of the file (default: that of the result's folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the output")


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
