"""Configuration: layers, types, bounds, and messages that help."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from diffalign import objectives
from diffalign.errors import UserError
from diffalign.losses.registry import read_options
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.kto import KTO
from diffalign.optimisation import OptimizerSettings
from diffalign.train import LoopSettings
from pipelines import cli, config, recipes
from pipelines.commands.train import resolve_settings
from pipelines.image_settings import TrainSettings, remarks

NEEDED = {"model": "m", "pairs": "p", "output": "o"}


def resolved(tree: dict) -> TrainSettings:
    return config.resolve({**NEEDED, **tree}, DiffusionDPO)


def from_command_line(*words: str) -> TrainSettings:
    parser = cli.build_parser("train")
    args, unknown = parser.parse_known_args(["train", "diffusion-dpo", *words])
    args.unknown = unknown
    return resolve_settings(args)


@pytest.mark.parametrize("name", ["d3po", "ddpo"])
def test_help_says_what_a_batch_counts_where_an_objective_samples(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "for d3po and ddpo, transitions of their trajectories" in said
    assert "for d3po and ddpo, pairs per process and optimizer step" in said


def test_help_cites_the_whole_paper(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert (
        '"Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback", arXiv 2510.18353.'
        in " ".join(capsys.readouterr().out.split())
    )


def test_out_and_output_are_one(capsys: pytest.CaptureFixture) -> None:
    assert str(from_command_line("--recipe", "tiny", "--out", "o").output) == "o"
    assert cli.build_parser("generate").parse_args(["generate", "--model", "m", "--prompt", "x", "--output", "o"]).out == "o"
    parser = cli.build_parser("world")
    assert str(parser.parse_args(["world", "train", "--out", "o"]).output) == "o"


def test_defaults_are_those_of_the_core() -> None:
    settings = resolved({})
    assert settings.objective == DiffusionDPO()
    assert settings.optimizer.learning_rate == 2.048e-5 and settings.lora.targets == ()
    assert isinstance(settings.output, Path)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: OptimizerSettings(schedule="lineer"), "schedule is one of constant, linear, cosine; got 'lineer'"),
        (lambda: LoopSettings(round_reference="past"), "round_reference is one of start, round; got 'past'"),
        (lambda: KTO(utility="loss_averse"), "utility is one of kahneman-tversky, loss-averse.*; got 'loss_averse'"),
        (lambda: read_options("kto", {"utility": "loss_averse"}), "utility is one of .*; got 'loss_averse'"),
        (lambda: read_options("kto", {"desirable_weight": "nan"}), "desirable_weight should be at least 0; got nan"),
        (lambda: OptimizerSettings(learning_rate=-1, schedule=None), "learning_rate .*; schedule is one of"),
    ],
)
def test_settings_made_in_python_are_checked_as_those_of_the_command_line(made: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()


def test_recipe_then_file_then_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("objective: {beta: 77}\nloop: {steps: 5, validate_every: 3}\n")
    settings = from_command_line("--recipe", "tiny", "--config", str(file), "--steps", "9", "--output", "out")
    assert settings.model == "tiny"  # recipe
    assert settings.objective.beta == 77 and settings.loop.validate_every == 3  # file
    assert settings.loop.steps == 9  # option


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--learning-rate", "1e-4"], "optimizer.learning_rate", 1e-4),
        (["--optimizer.learning-rate", "1e-4"], "optimizer.learning_rate", 1e-4),
        (["--flip"], "data.flip", True),
        (["--flip", "false"], "data.flip", False),
        (["--targets", "to_q,to_k"], "lora.targets", ("to_q", "to_k")),
        (["--resolution", "none"], "data.resolution", None),
        (["--resolution", "256"], "data.resolution", 256),
        (["--columns", "prompt=text,chosen=a"], "data.columns", {"prompt": "text", "chosen": "a"}),
        (["--judges", "oracle,jpeg"], "evaluation.judges", ("oracle", "jpeg")),
        (["--targets", "to_q", "to_k,to_v"], "lora.targets", ("to_q", "to_k", "to_v")),
        (["--columns", "prompt=text", "chosen=a"], "data.columns", {"prompt": "text", "chosen": "a"}),
        (["--judge-options", "a.x=1", "b.y=2"], "evaluation.judge_options", ("a.x=1", "b.y=2")),
        (["--mixed-precision", "no"], "compute.mixed_precision", "no"),
        (["--seed", "7"], "seed", 7),
        (["--without", "t5"], "without", ("t5",)),
        (["--targets", "none"], "lora.targets", ()),
        (["--recipe", "tiny", "--judges", "none", "--prompts", "none"], "evaluation.judges", ()),
        (["--without", "none"], "without", ()),
        (["--without", "t5", "vae"], "without", ("t5", "vae")),
    ],
)
def test_options_are_typed(words: list[str], path: str, value: object) -> None:
    found = from_command_line("--model", "m", "--pairs", "p", "--output", "o", *words)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name", objectives.names())
def test_every_setting_has_its_own_short_option(name: str) -> None:
    objective = objectives.load(name).Objective
    leaves = [path.split(".")[-1] for path in config._paths(objective)]
    assert sorted(leaves) == sorted(set(leaves))
    silent = [f.name for s in config.sections(objective).values() for f in dataclasses.fields(s) if not f.metadata.get("help")]
    assert silent == []


def test_all_mistakes_come_at_once_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        from_command_line("--learning-rate", "-1", "--stpes", "5", "--rank", "many", "--adapter", "lorra", "--output", "o")
    message = str(caught.value)
    assert message.startswith("6 mistakes")
    for part in (
        "optimizer.learning_rate",
        "greater than 0",
        "found '-1'",
        "--stpes: unknown option; did you mean --steps?",
        "lora.rank",
        "adapter",
        "'lora'",
        "model: needed",
        "pairs: needed",
    ):
        assert part in message, part


def test_words_that_belong_to_no_option_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        from_command_line("--recipe", "tiny", "--pairs", "a.csv", "b.csv", "--resume", "runs/x", "--what", "7", "--output", "o")
    message = str(caught.value)
    assert "--what: unknown option" in message and "b.csv runs/x: belong to no option. Most options take one value" in message
    with pytest.raises(UserError, match=r"4: belongs to no option\. .* joined by commas, as in a,b"):
        from_command_line("--recipe", "tiny", "--output", "o", "--steps", "2", "4")


@pytest.mark.parametrize(("name", "ours"), [("lr", "learning-rate"), ("train_batch_size", "batch-size")])
def test_what_other_programs_call_a_setting_names_ours(name: str, ours: str) -> None:
    with pytest.raises(UserError, match=rf"--{name}: unknown option; did you mean --{ours}\?"):
        from_command_line("--recipe", "tiny", "--output", "o", f"--{name}", "3")
    with pytest.raises(UserError, match=r"lr: unknown setting; did you mean optimizer\.learning_rate\?"):
        resolved({"lr": 1e-4})


def test_an_objective_by_its_short_name_is_suggested(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"Did you mean 'diffusion-dpo'\?"):
        objectives.load("dpo")
    for words, near in ((["train", "dpo"], "diffusion-dpo"), (["trian"], "train")):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert f"did you mean {near}?" in capsys.readouterr().err


SAMPLING = {"reward": {"reward": ["oracle"]}, "train_prompts": "tiny"}
ALONE = {**SAMPLING, "pairs": None}
ROUNDS = {"round_every": 20, "round_reference": "round"}


@pytest.mark.parametrize(
    "name, tree, message",
    [
        ("diffusion-dpo", {"objective": {"loss": "dpoo"}}, "objective: no loss is called 'dpoo'; there are: adpo, .*"),
        ("diffusion-dpo", {"loop": {"extrapolation": 0.3}}, "loop: round_reference and extrapolation are .* set round_every"),
        (
            "diffusion-dpo",
            {"loop": {"round_reference": "round"}},
            "loop: round_reference and extrapolation are .* set round_every",
        ),
        ("seppo", {"loop": ROUNDS}, "loop.round_reference: only a frozen start can be renewed; .* is 'that checkpoint'"),
        ("mapo", {"loop": ROUNDS}, "loop.round_reference: only a frozen start can be renewed; .* is 'nobody'"),
        ("ddpo", {**SAMPLING, "loop": ROUNDS}, "loop.round_reference: only a frozen start .* is 'the policy that sampled'"),
        ("d3po", {**SAMPLING, "loop": {"round_every": 20, "extrapolation": 0.3}}, "loop.extrapolation: .* its policy sampled"),
        ("d3po", {**SAMPLING, "data": {"curriculum": "margin"}}, "data.curriculum: orders the pairs of a data set"),
        ("d3po", {**SAMPLING, "data": {"level_shift": 3.0}}, "data.level_shift: is about the noise levels of a data set"),
        ("ddpo", {**SAMPLING, "error_as": "epsilon"}, "error_as: is about denoising errors"),
        ("ddpo", {**SAMPLING, "data": {"flip": True}}, "data.flip: is about pictures of a data set, and this objective samples"),
        ("d3po", {**SAMPLING, "data": {"prompt_dropout": 0.5}}, "data.prompt_dropout: is about pictures of a data set"),
        ("diffusion-dpo", {"reward": {"reward": ["jpeg"]}}, "reward.reward: a judge scores the pairs, which neither this"),
        ("sft", {"reward": {"reward": ["jpeg"]}}, "reward.reward: a judge scores the pairs, which neither this"),
        ("diffusion-dpo", {"train_prompts": "tiny"}, "train_prompts: are what on-line objectives sample for"),
        ("diffusion-dpo", {"objective": {"divergence_alpha": 0.9}}, "objective.divergence_alpha: is about the alpha divergence"),
        (
            "diffusion-dpo",
            {"objective": {"loss": "simpo", "divergence": "js"}},
            "objective: the loss 'simpo' does not see log-ratios",
        ),
        ("sem-dpo", {"objective": {"loss": "kto", "divergence": "js"}}, "objective: the loss 'kto' has a baseline in log-ratios"),
        ("sft", {"data": {"bucket_step": 32}}, "data.bucket_step: is about the sides of buckets, and there are none"),
        ("sft", {"data": {"curriculum_stages": 3}}, "data.curriculum_stages: is about a curriculum, and there is none"),
        (
            "diffusion-dpo",
            {"loop": {"round_every": 50}},
            "loop.round_every: is the length of rounds at whose ends",
        ),
        (
            "diffusion-dpo",
            {"objective": {"loss": "simpo", "beta": 1}, "loop": ROUNDS},
            "loop.round_reference: the loss simpo asks no reference",
        ),
        ("mapo", {"reference": {"reference_draws": 4}}, "reference.reference_draws: training asks no reference here"),
        (
            "diffusion-dpo",
            {"objective": {"loss": "sft"}, "reference": {"reference_draws": 4}},
            "reference.reference_draws: training asks no reference here",
        ),
        ("diffusion-dpo", {"objective": {"loss": "aot"}}, "batch.batch_size: The loss aot compares the pairs of a batch"),
        (
            "seppo",
            {"objective": {"loss": "aot-unpaired"}},
            "batch.batch_size: The loss aot-unpaired compares the pairs",
        ),
        ("kto", {"objective": {"baseline": "mismatched"}}, "batch.batch_size: A baseline of mismatched prompts needs"),
        ("sem-dpo", {"objective": {"loss": "aot"}}, "batch.batch_size: The loss aot compares the pairs of a batch"),
        (
            "diffusion-dpo",
            {"loop": {"keep_best": True}, "data": {"validation_pairs": 0}},
            "loop.keep_best: .* validation_pairs is 0",
        ),
        ("sem-dpo", {"loop": {"round_every": 50}}, "loop.round_every: is the length of rounds at whose ends"),
        ("sem-dpo", {"loop": {"keep_best": True}, "data": {"validation_pairs": 0}}, "loop.keep_best: .* validation_pairs is 0"),
        ("ddpo", {**ALONE, "loop": {"keep_best": True}}, "loop.keep_best: .* samples its own pictures has none"),
        ("d3po", {**ALONE, "data": {"ties": "keep"}}, "data.ties: is about the rows of a data set, and there are prompts alone"),
        ("ddpo", {**ALONE, "data": {"scores": "x"}}, "data.scores: is about pictures of a data set, and this objective samples"),
        ("ddpo", {**ALONE, "data": {"validation_pairs": 3}}, "data.validation_pairs: is about pictures of a data set"),
        ("smpo", {"reward": {"reward_options": ["x.y=z"]}}, "reward.reward_options: are about judges that reward, and none is"),
        ("kto", {"reward": {"rollout_batch": 4}}, "reward.rollout_batch: is about pictures that are sampled in training"),
        (
            "seppo",
            {"objective": {"round_steps": 30}, "loop": {"round_every": 40, "extrapolation": 0.3}},
            r"loop.round_every: should be a multiple of the objective's own round_steps, 30 \(found 40\)",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(name: str, tree: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"A mistake in the configuration:\n  {message}"):
        config.resolve({**NEEDED, **tree}, objectives.load(name).Objective)


@pytest.mark.parametrize(
    "name, tree",
    [
        ("seppo", {"objective": {"round_steps": 30}, "loop": {"round_every": 60, "extrapolation": 0.3}}),
        ("sft", {"loop": {"round_every": 7, "extrapolation": 0.3}}),
        ("diffusion-dro", {"loop": {**ROUNDS, "extrapolation": 0.3}, "data": {"curriculum": "margin"}}),
    ],
)
def test_rounds_of_the_loop_where_they_mean_something(name: str, tree: dict) -> None:
    loop = config.resolve({**NEEDED, **tree}, objectives.load(name).Objective).loop
    assert {key: getattr(loop, key) for key in tree["loop"]} == tree["loop"]


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("smpo", {}),
        ("diffusion-dpo", {"objective": {"loss": "adpo"}}),
        ("sft", {"data": {"curriculum": "margin", "curriculum_stages": 3}}),
        ("diffusion-dpo", {"objective": {"loss": "adpo", "divergence": "alpha", "divergence_alpha": 0.9}}),
    ],
)
def test_a_judge_of_pairs_where_scores_are_looked_at(name: str, tree: dict) -> None:
    found = config.resolve({**NEEDED, "reward": {"reward": ["jpeg"]}, **tree}, objectives.load(name).Objective)
    assert found.reward.reward == ("jpeg",)


@pytest.mark.parametrize("name", ["--push-to-hub", "--train-text-encoder", "--use-dora", "--negative-prompt", "--early-stopping"])
def test_what_there_is_not_is_not_taken_for_a_slip(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: unknown option, and none is called alike; --help lists all there are"):
        from_command_line("--recipe", "tiny", "--output", "o", name)
    with pytest.raises(UserError, match=r"--lora-rank: unknown option; did you mean --lora.rank\?"):
        from_command_line("--recipe", "tiny", "--output", "o", "--lora-rank", "3")


def test_what_other_trainers_call_otherwise_is_named() -> None:
    formula = r"--steps says: epochs x rows to train on / \(--batch-size x --accumulation x processes\)"
    for flag in ("--epochs", "--num-train-epochs=3"):
        with pytest.raises(UserError, match=f"{flag}: unknown option; how long a run is, {formula}"):
            from_command_line("--recipe", "tiny", "--output", "o", flag)
    with pytest.raises(UserError, match="num_train_epochs: unknown setting; how long a run is"):
        resolved({"num_train_epochs": 3})
    with pytest.raises(UserError, match="--label-smoothing: unknown option; labels that may be wrong are --loss cdpo"):
        from_command_line("--recipe", "tiny", "--output", "o", "--label-smoothing", "0.1")
    smoothed = from_command_line("--recipe", "tiny", "--output", "o", "--loss", "cdpo", "--loss-options", "noise=0.1")
    assert smoothed.objective.loss == "cdpo"
    with pytest.raises(UserError, match="--label-smoothing: unknown option, and none is called alike"):
        config.resolve(NEEDED, objectives.load("sft").Objective, ["--label-smoothing"])  # which has no other losses


def test_numbers_that_were_set_apart_are_remarked_on() -> None:
    (said,) = remarks(from_command_line("--recipe", "sd15-lora", "--rank", "32", "--output", "o"))
    assert said.startswith("alpha 16 at rank 32: the LoRA acts alpha / rank = 0.5 times as strongly")
    (said,) = remarks(resolved({"optimizer": {"warmup_steps": 9}, "loop": {"steps": 9}}))
    assert said == "warmup_steps 9 of 9 steps: the learning rate never gets to 2.048e-05."
    (said,) = remarks(resolved({"adapter": "full", "lora": {"rank": 8, "dropout": 0.1}}))
    assert said == "adapter is full: rank, dropout of the LoRA do nothing."
    for words in (["--rank", "32", "--alpha", "32"], ["--adapter", "full"]):
        assert remarks(from_command_line("--recipe", "sd15-lora", *words, "--output", "o")) == []
    assert len(remarks(resolved({"objective": {"loss": "orpo"}, "lora": {"rank": 2}}))) == 2


@pytest.mark.parametrize(
    ("words", "remark"),
    [
        (
            ["--judges", "oracle", "--sampling-steps", "10"],
            "prompts is none, so nothing is compared with the base: judges",
        ),
        (
            ["--validation-pairs", "0", "--validation-draws", "9"],
            "nothing is held out for validation: validation_draws",
        ),
        (["--validation-pairs", "0", "--validate-every", "9"], "nothing is held out for validation: validate_every do nothing."),
        (["--checkpoint-every", "0", "--keep-checkpoints", "5"], "checkpoint_every is 0: keep_checkpoints has one checkpoint to"),
    ],
)
def test_settings_of_what_is_switched_off_are_remarked_on(words: list[str], remark: str) -> None:
    """They are not refused: a recipe that has them may be told to do without validation or comparison."""
    (said,) = remarks(from_command_line("--model", "m", "--pairs", "p", "--output", "o", *words))
    assert said.startswith(remark)


def test_unknown_settings_in_a_file_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"objective.betta: unknown setting; did you mean objective.beta\?"):
        resolved({"objective": {"betta": 3}})
    with pytest.raises(UserError, match=r"optimiser: unknown setting; did you mean optimizer\?"):
        resolved({"optimiser": {"learning_rate": 3}})


def test_a_plain_no_in_a_file_is_a_choice(tmp_path: Path) -> None:
    """YAML reads it as False."""
    file = tmp_path / "run.yaml"
    file.write_text("{model: m, pairs: p, output: o, compute: {mixed_precision: no, tf32: no}}")
    compute = config.resolve(config.read_yaml(file), DiffusionDPO).compute
    assert (compute.mixed_precision, compute.tf32) == ("no", False)
    with pytest.raises(UserError, match=r"compute.mixed_precision: .* \(found 'yes'\)"):
        resolved({"compute": {"mixed_precision": True}})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1, 2", ""])
def test_a_broken_file_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        config.read_yaml(file)
    with pytest.raises(UserError, match="no configuration file"):
        config.read_yaml(tmp_path / "none.yaml")


def test_the_optimizer_is_a_section_and_a_setting_of_it() -> None:
    """In Python and on the command line the name stands for either; a file says which."""
    assert config.placed({"optimizer": "adafactor", "warmup_steps": 3}, DiffusionDPO) == {
        "optimizer": {"optimizer": "adafactor", "warmup_steps": 3}
    }
    assert config.placed({"optimizer": {"warmup_steps": 3}}, DiffusionDPO) == {"optimizer": {"warmup_steps": 3}}
    with pytest.raises(UserError, match=r"optimizer: is a section, .*\(learning_rate, optimizer, .*found 'adafactor'"):
        resolved({"optimizer": "adafactor"})


def test_the_resolved_configuration_reads_back_to_the_same() -> None:
    settings = from_command_line("--recipe", "tiny", "--output", "o", "--columns", "prompt=text")
    again = config.resolve(yaml.safe_load(yaml.safe_dump(config.as_tree(settings))), DiffusionDPO)
    assert again == settings


def test_options_in_python_go_by_their_short_names() -> None:
    tree = config.placed({"learning_rate": 1e-4, "lora.rank": 4, "output": "o", "nonsense": 1}, DiffusionDPO)
    assert tree == {"optimizer": {"learning_rate": 1e-4}, "lora": {"rank": 4}, "output": "o", "nonsense": 1}


@pytest.mark.parametrize("objective", objectives.names())
def test_every_recipe_is_valid_and_says_where_it_comes_from(objective: str) -> None:
    assert recipes.names(objective)
    for name in recipes.names(objective):
        brought = {"model": "theirs", "pairs": "theirs"} if objective in objectives.names(of_prompts=True) else {}
        tree = {**brought, **recipes.load(objective, name), "output": "o"}
        settings = config.resolve(tree, objectives.load(objective).Objective)
        assert settings.model
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in recipes.describe(objective))


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'tiny'"):
        recipes.load("diffusion-dpo", "tinny")


def test_a_reader_that_has_seen_enough_ends_the_program_without_a_word() -> None:
    command = [sys.executable, "-c", "from pipelines.cli import script; script()", "objectives"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        program.stdout.close()  # as `head` does
        said = program.stderr.read()
    assert (program.returncode, said) == (141, "")
