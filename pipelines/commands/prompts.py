"""``diffalign prompts``: train and use a language model that rewrites prompts so that they score better and mean the same.

build      build preferences between rewrites: a writer proposes, a generator draws, judges choose
sft        teach a writer to imitate rewrites
train      teach a writer by Sem-DPO to prefer rewrites that score better and mean the same
rewrite    rewrite a prompt, or a file of prompts
evaluate   compare writers with each other and with the plain prompts
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipelines.several import Joined, told_unknown

HELP = "rewrite prompts so that they score better and mean the same"
OBJECTIVES = {"sft": "prompt-sft", "train": "sem-dpo"}
WRITER = "language model that rewrites: 'tiny', a folder (of a model, a LoRA or a run), or a hub id"
GENERATOR = "image model that draws: 'tiny', a Diffusers folder, a hub id, a .safetensors file, or the folder of a run"
MAX_DISTANCE = "largest distance of a rewrite from its prompt; the prompt itself stays where none is near enough (default: any)"
GOES_ON = "The same command goes on where it stopped; with --overwrite it begins anew."
EMBEDDING = "text embedding that distances are measured in: clip, clip-h, tiny, or a text encoder's folder or hub id"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The five commands and their options."""
    parser.set_defaults(takes_unknown=True)
    sub = parser.add_subparsers(dest="prompts_command", metavar="COMMAND", required=True)
    for name, (add, run_it, text) in _COMMANDS.items():
        own = sub.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        own.set_defaults(run_prompts=run_it)
        if name not in OBJECTIVES:  # these bring their own
            own.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        add(own)


def run(args: argparse.Namespace) -> int:
    from diffalign.errors import UserError

    if args.unknown and args.prompts_command not in OBJECTIVES:  # training checks its own, and names the nearest
        raise UserError(told_unknown(args.unknown))
    return args.run_prompts(args)


# ------------------------------------------------------------------------------------------------------------ training


def _training(command: str) -> Any:
    def add(parser: argparse.ArgumentParser) -> None:
        from diffalign import objectives
        from pipelines import config
        from pipelines.commands.train import add_run_options, citation

        module = objectives.load(OBJECTIVES[command])
        parser.description = citation(module)
        parser.set_defaults(objective_name=OBJECTIVES[command])
        add_run_options(parser)
        config.add_options(parser, module.Objective)

    return add


def _train(args: argparse.Namespace) -> int:
    from pipelines.commands.train import carry_out

    def start(*given: Any, **how: Any) -> Any:
        from pipelines.writers import training

        return training.train(*given, **how)

    return carry_out(args, start, _dry_run)


def _dry_run(name: str, settings: Any, check_output: Callable[[], None]) -> int:
    from diffalign.data.hold_out import split_rows
    from diffalign.objectives._family import remarks
    from pipelines.run import Epochs
    from pipelines.run_folder import to_yaml
    from pipelines.writers import ingredients, training
    from pipelines.writers.settings import COMMANDS

    print("\n".join([to_yaml(COMMANDS[name], settings), *remarks(settings.objective)]))
    table, writer = ingredients.open_rewrites(settings), ingredients.load_writer(settings, print)
    rows = ingredients.encode(table, writer, settings.data, print, ingredients.wants_gold(settings))
    ingredients.check_dry(settings, table, rows)
    check_output()
    print(table.description)
    print(", ".join(f"{what}: {n}" for what, n in rows.counts.items()))
    train_rows, _ = split_rows([row.prompt for row in rows.rows], settings.data.validation_pairs, settings.seed)
    print(f"On one device {Epochs(training.rows_per_step(settings, 1), len(train_rows)).told(settings.loop.steps)}")
    return 0


# ------------------------------------------------------------------------------------------------------------- writing


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """The options of the writers."""
    from pipelines.sampling_options import whole

    parser.add_argument("--base", metavar="MODEL", help="base model of a writer that is a LoRA, if it is not the one on record")
    text = "prompt template: rephrase, chat, or a text with {prompt} in it (default: the one of the training)"
    parser.add_argument("--template", help=text)
    parser.add_argument("--instruction", metavar="TEXT", help="user turn of a chat template, with {prompt} in it")
    parser.add_argument("--system", metavar="TEXT", help="system turn of a chat template")
    parser.add_argument("--seed", type=whole(0), default=0, help="random seed of rewrites and pictures (default 0)")
    text = "precision of the weights of writer and generator (default float32)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help=text)
    parser.add_argument("--device", help="device: cuda, cuda:1, mps or cpu, say (default: the best there is)")


def _add_decoding(parser: argparse.ArgumentParser, method: bool = True) -> None:
    """The options of ``Decoding``, with its method or without."""
    from pipelines.sampling_options import whole

    if method:
        text = "decoding method (default sample)"
        parser.add_argument("--way", "--decoding", default="sample", choices=("sample", "beam", "diverse-beam"), help=text)
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default 1)")
    text = "nucleus sampling: probability of the tokens that are kept (default 1: all)"
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help=text)
    text = "top-k sampling: number of tokens that are kept (default 0: all)"
    parser.add_argument("--top-k", type=whole(0), default=0, metavar="K", help=text)
    text = "penalty of diverse beam search on a token that an earlier beam has at the same place (default 1)"
    parser.add_argument("--diversity", dest="diversity_penalty", type=float, default=1.0, metavar="NATS", help=text)
    text = "power of the length that scores of beams are divided by (default 1)"
    parser.add_argument("--length-penalty", type=float, default=1.0, help=text)
    text = "most tokens of a rewrite (default 75)"
    parser.add_argument("--max-rewrite-tokens", type=whole(1), default=75, metavar="N", help=text)


def _decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``Decoding`` without its method."""
    names = ("temperature", "top_p", "top_k", "diversity_penalty", "length_penalty", "max_rewrite_tokens")
    return {name: getattr(args, name) for name in names}


def _add_drawing(parser: argparse.ArgumentParser, needed: bool = True) -> None:
    """The options of the generator and the judges."""
    from pipelines.sampling_options import whole

    parser.add_argument("--generator", required=needed, help=GENERATOR)
    text = "judges that score the pictures for the prompt that was typed"
    joined = {"action": Joined} if needed else {}  # `rewrite` also takes words without an option
    parser.add_argument("--judges", "--judge", required=needed, metavar="NAME,...", help=text, **joined)
    options = {"nargs": "+", "action": "extend", "default": [], "metavar": "JUDGE.OPTION=VALUE"}
    parser.add_argument("--judge-options", **options, help="options that judges are loaded with")
    parser.add_argument("--pictures", type=whole(1), default=1, metavar="N", help="pictures of each rewrite (default 1)")
    parser.add_argument("--steps", type=whole(1), default=25, help="sampling steps of the generator (default 25)")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance scale (default: the generator's own)")
    parser.add_argument("--sampler", default="auto", help="sampler: auto, ddim, dpm++, euler or 'as saved' (default auto)")
    parser.add_argument("--batch-size", type=whole(1), default=16, metavar="N", help="pictures drawn together (default 16)")


def _add_prompts(parser: argparse.ArgumentParser, required: bool = True) -> None:
    from pipelines.prompts import FORMATS, NAMES
    from pipelines.sampling_options import whole

    text = f"prompts: a {', '.join(FORMATS)} file, one of {', '.join(NAMES)}, or tiny"
    parser.add_argument("--prompts", required=required, help=text)
    parser.add_argument("--column", help="column of the prompts in a .csv, .tsv, .json or .jsonl file")
    text = "number of prompts, from the first on (default: all; 500 of tiny)"
    parser.add_argument("--count", type=whole(1), metavar="N", help=text)


def _prompts(args: argparse.Namespace, split: str) -> list[Any]:
    from pipelines.prompts import Prompt, read_prompts

    if args.prompts == "tiny":
        from pipelines.tiny import scenes

        captions = scenes.captions(args.count or 500, seed={"train": 11, "test": 2026}[split], split=split)
        return [Prompt(text, None, f"tiny:{number}") for number, text in enumerate(captions, start=1)]
    return read_prompts(args.prompts, args.column, strict=False)[: args.count]


def _scorer(args: argparse.Namespace) -> Any:
    from pipelines import families
    from pipelines.judge_options import load_judges
    from pipelines.sampling import sampler_name
    from pipelines.writers.rewrite_scorer import DrawingSettings, RewriteScorer

    judges = load_judges(args.judges, args.judge_options, args.device, typed=True)
    pipe = families.load_pipeline(args.generator, dtype=args.dtype, device=args.device)
    drawing = {"guidance_scale": args.guidance_scale, "sampler": sampler_name(args.sampler), "batch_size": args.batch_size}
    return RewriteScorer(pipe, judges, DrawingSettings(args.pictures, args.seed, args.steps, **drawing), args.generator)


def _writer(where: str, args: argparse.Namespace) -> Any:
    return _writers([where], args)[0]


def _writers(places: Iterable[str], args: argparse.Namespace) -> list[Any]:
    """The writers in their order, with ``--base`` as the base of all that are LoRAs."""
    from diffalign.errors import UserError
    from pipelines.writers.writer import Writer
    from reward_models._judge import device_of

    device = device_of(args.device)
    how = {"dtype": args.dtype, "template": args.template, "instruction": args.instruction, "system": args.system}
    writers = [Writer.load(where, base=args.base, **how).to(device) for where in places]
    if args.base and not any(writer.origin.adapters for writer in writers):
        raise UserError("--base is the model below a LoRA, and no writer here is a LoRA: leave it out.")
    return writers


# ------------------------------------------------------------------------------------------------------------ building


def _add_build(parser: argparse.ArgumentParser) -> None:
    from pipelines.sampling_options import whole

    _add_prompts(parser)
    parser.set_defaults(goes_on=GOES_ON)
    parser.add_argument("--writer", required=True, help=WRITER)
    text = "file to write the pairs to: .jsonl or .parquet"
    parser.add_argument("--out", "--output", required=True, type=Path, metavar="FILE", help=text)
    parser.add_argument("--candidates", type=whole(2), default=8, metavar="K", help="candidates for each prompt (default 8)")
    parser.add_argument(
        "--ways",
        action=Joined,
        default="sample,diverse-beam",
        metavar="METHOD,...",
        help="decoding methods that share out the candidates: sample, beam, diverse-beam (default sample,diverse-beam)",
    )
    parser.add_argument("--with-prompt", action="store_true", help="make the prompt itself a candidate, too")
    text = "least gap between best and worst score, in standard deviations (default 1)"
    parser.add_argument("--min-gap", type=float, default=1.0, help=text)
    parser.add_argument("--max-distance", type=float, help="largest distance from the prompt of a chosen rewrite (default: any)")
    parser.add_argument("--embedding", default="clip", help=f"{EMBEDDING} (default clip)")
    parser.add_argument("--chunk", type=whole(1), default=8, metavar="N", help="prompts between two saves (default 8)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file, and drop candidates of another build")
    _add_writing(parser)
    _add_decoding(parser, method=False)
    _add_drawing(parser)


def _build(args: argparse.Namespace) -> int:
    from pipelines.progress import Bar
    from pipelines.semantics import load_embedding
    from pipelines.shares import processes
    from pipelines.writers import build
    from pipelines.writers.sampling import Decoding

    share, wait, device = processes()
    build.check_out(args.out, args.overwrite)
    args.device = args.device or device
    ways = tuple(way.strip() for way in args.ways.split(",") if way.strip())
    decodings = tuple(Decoding(way, **_decoding_options(args)) for way in ways)
    proposing = build.Proposing(args.candidates, decodings, args.seed, args.with_prompt)
    prompts = _prompts(args, "train")
    with Bar(shown=share[0] == 0, unit="prompt") as bar:
        built = build.build(
            prompts,
            _writer(args.writer, args),
            _scorer(args),
            load_embedding(args.embedding, device=args.device),
            args.out,
            proposing=proposing,
            pairing=build.Pairing(args.min_gap, args.max_distance),
            chunk=args.chunk,
            overwrite=args.overwrite,
            share=share,
            wait=wait,
            progress=bar.advance,
        )
    if built is not None:
        print(built.to_text())
    return 0


# ----------------------------------------------------------------------------------------------------------- rewriting


def _add_rewrite(parser: argparse.ArgumentParser) -> None:
    from pipelines.sampling_options import whole

    parser.set_defaults(goes_on=f"With --out: {GOES_ON[0].lower()}{GOES_ON[1:]}")
    parser.add_argument("texts", nargs="*", metavar="PROMPT", help="prompts to rewrite; or name a list with --prompts")
    _add_prompts(parser, required=False)
    parser.add_argument("--writer", required=True, help=WRITER)
    parser.add_argument("-n", type=whole(1), default=1, metavar="N", help="rewrites of each prompt (default 1)")
    text = "candidates to choose from (default: 4 for each rewrite with --max-distance or --judges, else 1)"
    parser.add_argument("--draw", type=whole(1), metavar="N", help=text)
    parser.add_argument("--max-distance", type=float, help=MAX_DISTANCE)
    parser.add_argument("--embedding", help=f"{EMBEDDING} (default: clip with --max-distance, else none)")
    text = "file to write to: .jsonl or .csv (default: the terminal)"
    parser.add_argument("--out", "--output", type=Path, metavar="FILE", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace the file, and drop what is left of another job")
    _add_writing(parser)
    _add_decoding(parser)
    _add_drawing(parser, needed=False)


def _rewrite(args: argparse.Namespace) -> int:
    from diffalign.errors import UserError
    from pipelines.progress import Bar
    from pipelines.prompts import FORMATS
    from pipelines.semantics import load_embedding
    from pipelines.writers import rewriting
    from pipelines.writers.optimizer import PromptOptimizer

    if bool(args.texts) == bool(args.prompts):
        raise UserError("Give prompts on the command line, or a list with --prompts: one of the two.")
    if bool(args.generator) != bool(args.judges):
        raise UserError("--generator draws rewrites and --judges choose among them: give both, or neither.")
    if args.texts and (args.column or args.count):
        raise UserError("--column and --count belong to a list (--prompts); these prompts stand on the command line.")
    if files := [text for text in args.texts if text.strip().lower().endswith(FORMATS) and Path(text.strip()).is_file()]:
        raise UserError(f"{files[0]!r} is a file; its prompts are rewritten by --prompts {files[0]}.")
    if args.out is not None:
        rewriting.check_out(args.out, args.overwrite)
    prompts = args.texts or [prompt.text for prompt in _prompts(args, "test")]
    name = args.embedding or ("clip" if args.max_distance is not None else None)
    embedding = load_embedding(name, device=args.device) if name else None
    optimizer = PromptOptimizer(_writer(args.writer, args), embedding, _scorer(args) if args.generator else None)
    options = {"n": args.n, "how": args.way, "seed": args.seed, "max_distance": args.max_distance, "draw": args.draw}
    options |= _decoding_options(args)
    with Bar(shown=len(prompts) > 8, unit="prompt") as bar:
        if args.out is None:
            if args.texts:  # a wrong prompt on the command line is an error; in a list it must not stop the others
                found = optimizer(prompts, **options)
            else:
                found = rewriting.rewritten(optimizer, prompts, bar.advance, **options)
            text = rewriting.to_text(found)
        else:
            more = {"overwrite": args.overwrite, "progress": bar.advance}
            text = rewriting.rewrite_file(optimizer, prompts, args.out, **more, **options).to_text()
    print(text)
    return 0


# ---------------------------------------------------------------------------------------------------------- evaluating


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    from pipelines.sampling_options import whole

    _add_prompts(parser)
    parser.add_argument(
        "--writers",
        required=True,
        action=Joined,
        metavar="NAME=WRITER,...",
        help="writers to compare, each with a name of its own (default: its folder's)",
    )
    text = "compare the best of N rewrites of each writer by the judges, too"
    parser.add_argument("--best-of", type=whole(2), metavar="N", help=text)
    parser.add_argument("--embedding", default="clip", help=f"{EMBEDDING} (default clip)")
    parser.add_argument("--max-distance", type=float, help=MAX_DISTANCE)
    parser.add_argument("--delta", type=float, default=0.1, help="distance beyond which a rewrite has drifted (default 0.1)")
    text = "folder to write report, numbers and pictures to"
    parser.add_argument("--out", "--output", required=True, type=Path, metavar="FOLDER", help=text)
    text = "keep all pictures in FOLDER/pictures, a folder for each writer, for `diffalign score` and other judges"
    parser.add_argument("--keep-pictures", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier evaluation wrote there")
    _add_writing(parser)
    _add_decoding(parser)
    _add_drawing(parser)


def _evaluate(args: argparse.Namespace) -> int:
    from pipelines import outputs
    from pipelines.progress import Bar
    from pipelines.semantics import load_embedding
    from pipelines.writers import evaluation
    from pipelines.writers.drift import read_drift
    from pipelines.writers.sampling import Decoding

    outputs.check_folder(args.out, args.overwrite)
    contenders = []
    named = _named(args.writers)
    for (name, where), writer in zip(named.items(), _writers(named.values(), args), strict=True):
        contenders.append(evaluation.Contender(name, writer, drift=read_drift(where)))
        if args.best_of:
            contenders.append(evaluation.Contender(f"{name}, best of {args.best_of}", writer, args.best_of))
    with Bar(unit="picture") as bar:
        evaluation.evaluate(
            _prompts(args, "test"),
            contenders,
            _scorer(args),
            load_embedding(args.embedding, device=args.device),
            args.out,
            decoding=Decoding(args.way, **_decoding_options(args)),
            seed=args.seed,
            delta=args.delta,
            max_distance=args.max_distance,
            keep_pictures=args.keep_pictures,
            overwrite=args.overwrite,
            progress=bar.advance,
        )
    print((args.out / "report.md").read_text("utf-8").split("\n## Pictures")[0])
    return 0


def _named(text: str) -> dict[str, str]:
    """Writers by name from ``sft=runs/sft,sem=runs/sem``; one without a name has its folder's."""
    from diffalign.errors import UserError

    out: dict[str, str] = {}
    for item in (item.strip() for item in text.split(",") if item.strip()):
        name, sign, where = item.partition("=")
        name, where = (name, where) if sign else (Path(item).name, item)
        if not name or not where or name in out:
            raise UserError(f"--writers: found {item!r}; expected NAME=WRITER, each name once, as in sft=runs/sft,sem=runs/sem.")
        out[name] = where
    if not out:
        raise UserError(f"--writers: found {text!r}; expected at least one, as in sft=runs/sft.")
    return out


_COMMANDS = {
    "build": (_add_build, _build, "build preferences between rewrites: a writer proposes, a generator draws, judges choose"),
    "sft": (_training("sft"), _train, "teach a writer to imitate rewrites"),
    "train": (_training("train"), _train, "teach a writer by Sem-DPO to prefer rewrites that score better and mean the same"),
    "rewrite": (_add_rewrite, _rewrite, "rewrite a prompt, or a file of prompts"),
    "evaluate": (_add_evaluate, _evaluate, "compare writers with each other and with the plain prompts"),
}
