"""``diffalign rollout``: pictures for people to choose among, and the trajectories that ``train d3po --feedback`` learns from."""

from __future__ import annotations

import argparse

from pipelines.several import Joined

HELP = "sample pictures for people to choose among, with all that learning from the choices needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffalign rollout``."""
    from pipelines.prompts import FORMATS, NAMES
    from pipelines.sampling_options import add_without, whole

    parser.set_defaults(goes_on="The same command goes on where it stopped.")
    parser.description = (
        "Samples pictures of prompts by the stochastic chain that D3PO learns from, and keeps the trajectories. The same command "
        "goes on where a stopped one was. Choices go into choices.jsonl in the folder; `diffalign train d3po --feedback FOLDER` "
        "learns from them."
    )
    model = "'tiny', 'tiny-flow', a Diffusers folder, a hub id, a .safetensors file or the folder of a run"
    parser.add_argument("--model", required=True, help=model)
    parser.add_argument("--lora", metavar="FOLDER", help="LoRA that diffalign trained, to sample with in the next round")
    parser.add_argument("--base-lora", metavar="PATH", help="LoRA that is part of the base, as `diffalign train` takes it")
    add_without(parser)
    parser.add_argument(
        "--prompts",
        required=True,
        help=f"prompts: a {', '.join(FORMATS)} file, a list by name ({', '.join(NAMES)}), or tiny (its training captions)",
    )
    parser.add_argument("--column", help="column of the prompts in a .csv, .tsv, .json or .jsonl file")
    parser.add_argument("--count", type=whole(1), metavar="N", help="number of prompts; a shorter list is gone through again")
    parser.add_argument(
        "--per-prompt", type=whole(1), default=2, metavar="K", help="number of pictures per prompt (default 2; D3PO's study: 7)"
    )
    parser.add_argument(
        "--out", "--output", required=True, metavar="FOLDER", help="folder for pictures, trajectories and the page to choose on"
    )
    parser.add_argument(
        "--steps", type=whole(1), default=20, help="number of sampling steps, each a transition of a trajectory (default 20)"
    )
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance scale (default 5)")
    parser.add_argument("--eta", type=float, default=1.0, help="noise of each DDIM step as a multiple of DDPM's (default 1)")
    parser.add_argument(
        "--same-start",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start all pictures of a prompt from the same x_T, so that only the steps' noise differs (default: yes)",
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="random seed, from which every picture's own seed follows (default 0)"
    )
    parser.add_argument("--batch-size", type=whole(1), default=16, help="number of pictures sampled together (default 16)")
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="mixed precision, the same as of the training that is to learn from the pictures (default no)",
    )
    parser.add_argument(
        "--single-file-config",
        metavar="FOLDER",
        help="Diffusers folder with the configuration and tokenizer of a single-file model",
    )
    parser.add_argument("--device", help="device, such as cuda, cuda:1 or cpu (default: the best there is)")
    parser.add_argument(
        "--judges",
        "--judge",
        action=Joined,
        metavar="NAME,...",
        help="judges that choose instead of people, to try the loop; named as for `diffalign score`",
    )
    parser.add_argument(
        "--judge-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="JUDGE.OPTION=VALUE",
        help="options of the judges, as in pickscore.weights=PATH",
    )


def run(args: argparse.Namespace) -> int:
    """Sample, write, and say what to do next; 0 when everything is written."""
    from diffalign.errors import UserError
    from diffalign.sources.rollout import Sampling
    from pipelines.judge_options import load_judges
    from pipelines.progress import Bar
    from pipelines.rollouts import RolloutModel, roll_out

    try:
        sampling = Sampling(args.steps, eta=args.eta, guidance=args.guidance)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    if args.judge_options and not args.judges:
        raise UserError("--judge-options are for judges, and --judges names none.")
    prompts = _prompts(args.prompts, args.column, args.count)
    judges = load_judges(args.judges, args.judge_options, args.device, typed=True) if args.judges else None
    with Bar(unit="picture") as bar:
        done = roll_out(
            RolloutModel(
                args.model,
                args.lora,
                args.mixed_precision,
                args.single_file_config,
                args.device,
                args.base_lora,
                args.without,
            ),
            prompts,
            args.out,
            per_prompt=args.per_prompt,
            sampling=sampling,
            same_start=args.same_start,
            seed=args.seed,
            batch_size=args.batch_size,
            judges=judges,
            progress=bar.advance,
        )
    print(done.to_text())
    return 0


def _prompts(where: str, column: str | None, count: int | None) -> list[str]:
    """``count`` prompts, the list gone through as often as it takes; all of them, once, for None."""
    from itertools import cycle, islice

    from pipelines.ingredients import tiny_prompts
    from pipelines.prompts import read_prompts

    found = tiny_prompts() if where == "tiny" else [prompt.text for prompt in read_prompts(where, column)]
    return found if count is None else list(islice(cycle(found), count))
