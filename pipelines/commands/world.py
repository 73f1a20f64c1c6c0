"""``diffalign world``: the tiny world's pictures, captions, preference pairs, checkpoint, judge and writer."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path

from pipelines.sampling_options import number, whole
from pipelines.tiny import settings

HELP = "draw the tiny world's scenes and captions, make preference pairs, train its checkpoint, judge and writer"

SPLITS = ("train", "validation", "test")

TRAININGS = {
    "train": ("checkpoint", settings.WorldTraining, "pipelines.tiny.train"),
    "train-flow": ("checkpoint", settings.FlowTraining, "pipelines.tiny.train_flow"),
    "train-judge": ("judge", settings.JudgeTraining, "pipelines.tiny.train_pickscore"),
    "train-writer": ("writer", settings.WriterTraining, "pipelines.tiny.train_writer"),
}
"""What each job trains, its settings, and the module whose ``train`` does it (imported late: it needs torch)."""

# --------------------------------------------------------------------------------------------------------------- arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The nine jobs of ``diffalign world``."""
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    _add_draw(jobs.add_parser("draw", help="draw scenes with their captions (no model)"))
    _add_captions(jobs.add_parser("captions", help="write different plain captions, one a line (no model)"))
    _add_pairs(jobs.add_parser("pairs", help="sample pairs from a checkpoint and let synthetic people choose"))
    _add_training(jobs.add_parser("train", help="train the miniature Stable Diffusion from nothing"), "train")
    _add_training(jobs.add_parser("train-flow", help="train the miniature Stable Diffusion 3 from nothing"), "train-flow")
    _add_check(jobs.add_parser("check", help="sample held-out captions and let the oracle count; status 1 if below the bar"))
    _add_training(jobs.add_parser("train-judge", help="train the miniature PickScore from nothing"), "train-judge")
    words = "count how often the miniature PickScore agrees with the oracle on held-out pairs; status 1 if below the bar"
    _add_check_judge(jobs.add_parser("check-judge", help=words))
    _add_training(jobs.add_parser("train-writer", help="pretrain the miniature writer of prompts from nothing"), "train-writer")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=whole(0), default=0, help="same seed, same result (default 0)")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the output")


def _add_split(parser: argparse.ArgumentParser, default: str) -> None:
    words = "captions of this split; no training saw validation or test"
    parser.add_argument("--split", choices=SPLITS, default=default, help=f"{words} (default {default})")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny (the shipped checkpoint) or a folder (default tiny)")
    parser.add_argument("--steps", type=whole(1), help="denoising steps (default 25)")
    parser.add_argument("--guidance-scale", type=number(), help="classifier-free guidance (default: the model's own)")
    parser.add_argument("--batch", type=whole(1), help="pictures sampled at once (default 32)")


def _add_draw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=whole(1), default=64, help="scenes (default 64)")
    _add_seed(parser)
    _add_split(parser, "train")
    parser.add_argument("--styled", type=number(1.0), default=0.35, help="share of captions with style words (default 0.35)")
    parser.add_argument("--out", "--output", type=Path, required=True, help="a new or empty folder")


def _add_captions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=whole(1), default=300, help="captions (default 300)")
    _add_seed(parser)
    _add_split(parser, "test")
    parser.add_argument("--out", "--output", type=Path, required=True, help="text file, one caption a line")
    _add_overwrite(parser)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=whole(1), default=1000, help="pairs (default 1000)")
    _add_seed(parser)
    _add_sampling(parser)
    _add_split(parser, "train")
    parser.add_argument("--styled", type=number(1.0), default=0.1, help="share of captions with style words (default 0.1)")
    parser.add_argument(
        "--candidates",
        type=whole(2),
        default=2,
        help="pictures of each caption, of which the two furthest apart are judged (default 2)",
    )
    parser.add_argument("--sharpness", type=number(), help="how decided the people are (default: about 80-85 %% agreement)")
    parser.add_argument("--flip-rate", type=number(1.0), help="share of careless answers (default 0.05)")
    parser.add_argument("--tie-band", type=number(), help="difference in utility below which people may call a tie")
    parser.add_argument("--out", "--output", type=Path, required=True, help="parquet file")
    _add_overwrite(parser)


def _add_training(parser: argparse.ArgumentParser, job: str) -> None:
    what, kind, _ = TRAININGS[job]
    parser.add_argument("--output", "--out", type=Path, required=True, help=f"folder for the {what}")
    parser.add_argument("--overwrite", action="store_true", help="write over what is in the folder")
    for field in dataclasses.fields(kind):
        flag, words, bounds = "--" + field.name.replace("_", "-"), field.metadata["help"], field.metadata["bounds"]
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", default=None, help=words)
            continue
        parse = whole(bounds["ge"]) if isinstance(field.default, int) else number(bounds.get("le"))
        parser.add_argument(flag, type=parse, help=f"{words} (default {field.default})")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=whole(1), default=256, help="captions (default 256)")
    _add_seed(parser)
    _add_sampling(parser)
    parser.add_argument("--out", "--output", type=Path, help="folder for report.json, captions.txt and grid.png")
    _add_overwrite(parser)


def _add_check_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=whole(1), default=500, help="held-out pairs of either kind (default 500)")
    _add_seed(parser)
    parser.add_argument("--weights", type=Path, help="a folder that train-judge wrote (default: the shipped judge)")
    words = "pictures of each caption, of which the two furthest apart are judged (default 2)"
    parser.add_argument("--candidates", type=whole(2), default=2, help=words)
    parser.add_argument("--model", default="tiny", help="where the sampled pictures come from (default tiny)")


# -------------------------------------------------------------------------------------------------------------------- jobs


def run(args: argparse.Namespace) -> int:
    """Do the job; returns the exit status.

    Raises:
        UserError: the request cannot be met (too many captions, a folder in use, an unwritable path, a wrong model).
    """
    jobs = {"draw": _draw, "captions": _captions, "pairs": _pairs, "check": _check, "check-judge": _check_judge}
    return jobs.get(args.job, _train)(args)


def _draw(args: argparse.Namespace) -> int:
    from dataclasses import asdict
    from itertools import islice

    from diffalign.written_aside import folder_aside
    from pipelines.tiny import scenes
    from pipelines.tiny.check import sheet

    _check_unused("--out", args.out, "name a new or an empty folder")
    with folder_aside(args.out) as folder:
        pictures, captions, lines = [], [], []
        for i, (scene, caption) in enumerate(islice(scenes.stream(args.seed, args.split, args.styled), args.n)):
            pictures.append(scenes.render(scene))
            captions.append(caption)
            name = f"{i:06d}.png"
            pictures[-1].save(folder / name)
            lines.append(json.dumps({"file": name, "caption": caption, "taste": scene.style.taste, "scene": asdict(scene)}))
        (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sheet(pictures, captions).save(folder / "grid.png")
    print(f"{args.n} scenes of the {args.split} split in {args.out} (grid.png, captions.txt, captions.jsonl)")
    return 0


def _check_count(n: int, split: str) -> None:
    from diffalign.errors import UserError
    from pipelines.tiny import scenes

    most = scenes.MOST_CAPTIONS[split]
    if n > most:
        raise UserError(f"--n {n}: the {split} split gives at most {most} different captions; ask for fewer.")


def _captions(args: argparse.Namespace) -> int:
    from diffalign.written_aside import write_file
    from pipelines.outputs import check_file
    from pipelines.tiny import scenes

    _check_count(args.n, args.split)
    check_file(args.out, args.overwrite)
    found = scenes.captions(args.n, args.seed, args.split)
    write_file(args.out, "\n".join(found) + "\n")
    print(f"{len(found)} captions of the {args.split} split in {args.out}")
    return 0


def _pairs(args: argparse.Namespace) -> int:
    from pipelines.families import load_pipeline
    from pipelines.outputs import check_file
    from pipelines.progress import Bar
    from pipelines.tiny.pairs import describe, sample_pairs, write_pairs
    from pipelines.tiny.people import People

    check_file(args.out, args.overwrite)
    people = People(seed=args.seed, **_given(args, "sharpness", "flip_rate", "tie_band"))
    name = args.model if args.model == "tiny" else Path(args.model).name
    pipe = load_pipeline(args.model)
    with Bar(unit="picture") as bar:
        progress = bar.counter("sampling", args.candidates * args.n)
        options = {"styled": args.styled, "split": args.split, "model_name": name, "progress": progress}
        options["candidates"] = args.candidates
        records = sample_pairs(pipe, args.n, args.seed, people=people, **options, **_sampling(args))
    write_pairs(records, args.out)
    figures, size = describe(records), args.out.stat().st_size / 1e6
    agreement = "none decided" if figures.agreement is None else f"{figures.agreement:.1%} of the others agree with the oracle"
    print(f"{figures.pairs} pairs of {figures.captions} captions in {args.out} ({size:.2f} MB)")
    print(f"{figures.ties:.1%} ties, {agreement}")
    return 0


def _train(args: argparse.Namespace) -> int:
    _, kind, module = TRAININGS[args.job]
    going_on = args.output.with_name(args.output.name + ".work").is_dir()
    if not (args.output.is_dir() and (args.overwrite or going_on)):
        _check_unused("--output", args.output, "name a new folder, or add --overwrite")
    chosen = kind(**_given(args, *(field.name for field in dataclasses.fields(kind))))
    importlib.import_module(module).train(args.output, chosen, say=lambda line: print(line, flush=True))
    return 0


def _check(args: argparse.Namespace) -> int:
    from pipelines.families import load_pipeline
    from pipelines.outputs import check_folder
    from pipelines.progress import Bar
    from pipelines.tiny.check import BAR, check

    _check_count(args.n, "test")
    if args.out is not None:
        check_folder(args.out, args.overwrite)
    pipe = load_pipeline(args.model)
    with Bar(unit="picture") as bar:
        report = check(pipe, args.n, seed=args.seed, progress=bar.counter("sampling", args.n), **_sampling(args))
    if args.out is not None:
        report.write(args.out)
    relation = "no caption has one" if report.relation_kept is None else f"{report.relation_kept:.1%}"
    print(f"captions {report.n}, steps {report.steps}, guidance {report.guidance_scale:g}, seed {report.seed}")
    print(f"objects found in the right shape and colour  {report.objects_found:.1%}  (bar {BAR:.0%})")
    print(f"relations kept                               {relation}")
    print(f"faithfulness                                 {report.faithfulness:.3f}")
    print(f"taste                                        {report.taste:.3f}")
    print("passed" if report.passed else "BELOW THE BAR")
    return 0 if report.passed else 1


def _check_judge(args: argparse.Namespace) -> int:
    from pipelines.families import load_pipeline
    from pipelines.progress import Bar
    from pipelines.tiny.check_pickscore import BAR, agreement, rendered_pairs, sampled_pairs
    from reward_models import tiny_pickscore

    judge = tiny_pickscore.load(args.weights)
    with Bar(unit="picture") as bar:
        progress = bar.counter("sampling", args.candidates * args.n)
        sampled = sampled_pairs(load_pipeline(args.model), args.n, args.seed, args.candidates, progress)
    found = {"sampled": agreement(judge.score, sampled), "rendered": agreement(judge.score, rendered_pairs(args.n, args.seed))}
    print(f"agreement with the oracle, held-out captions, seed {args.seed}, {args.candidates} candidates")
    for kind, parts in found.items():
        for part, figure in parts.items():
            print(f"{kind:9} {part:12} {figure}")
    rate = found["sampled"]["untied"].rate
    passed = rate is not None and rate >= BAR
    print("passed" if passed else f"BELOW THE BAR of {BAR:.0%} on sampled untied pairs")
    return 0 if passed else 1


# ----------------------------------------------------------------------------------------------------------------- helpers


def _given(args: argparse.Namespace, *names: str) -> dict:
    """The options that were set on the command line; the others keep the defaults of the function they go to."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _sampling(args: argparse.Namespace) -> dict:
    return _given(args, "steps", "guidance_scale", "batch")


def _check_unused(flag: str, folder: Path, hint: str) -> None:
    from diffalign.errors import UserError

    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{flag} {folder} is a file or holds something already; {hint}.")
