"""``diffalign rollout``, people's choices, ``train d3po --feedback``: the whole loop on an untrained miniature."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from miniature import edited, sample, save_untrained, write_pairs
from PIL import Image
from safetensors.torch import load_file, save_file

import reward_models
from diffalign.data.prompt_cache import PromptCache
from diffalign.sources import store as store_module
from diffalign.sources.store import Store
from pipelines import cli, families, progress
from pipelines.families._names import LORA_FILE

PROMPTS = ["a red circle", "a small blue square on a green background", "a red circle", "a green star"]
CHAIN = ["--steps", "3", "--guidance", "2"]
QUICK = ["--rank", "2", "--steps", "4", "--batch-size", "4", "--learning-rate", "1e-3", "--tracker", "none", "--quiet"]


@dataclass(frozen=True)
class Inputs:
    model: Path
    prompts: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return Inputs(save_untrained(folder / "model"), folder / "prompts.txt")


@pytest.fixture(scope="module")
def rolled(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rollout, and what a person chose: scores of two prompts, a choice and a tie."""
    folder = tmp_path_factory.mktemp("rolled") / "roll"
    assert rollout(inputs, folder) == 0
    rows = [{"picture": f"0000{g}-{k}", "score": (g + k) % 2} for g in (0, 1) for k in (0, 1)]
    rows += [{"chosen": "00002-0", "rejected": "00002-1"}, {"chosen": "00003-0", "rejected": "00003-1", "label": 0.5}]
    write_choices(folder, *rows)
    return folder


@pytest.fixture(scope="module")
def first(inputs: Inputs, rolled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that was trained on it."""
    folder = tmp_path_factory.mktemp("first") / "run"
    assert train(inputs, folder, "--feedback", str(rolled)) == 0
    return folder


def rollout(inputs: Inputs, out: Path, *words: str, model: Path | None = None) -> int:
    where = ["--model", str(model or inputs.model), "--prompts", str(inputs.prompts), "--out", str(out), "--device", "cpu"]
    return cli.main(["rollout", *where, *CHAIN, "--batch-size", "2", *words])


def train(inputs: Inputs, out: Path, *words: str, model: Path | None = None, objective: str = "d3po") -> int:
    where = ["--model", str(model or inputs.model), "--output", str(out)]
    return cli.main(["train", objective, *where, *QUICK, *words])


def write_choices(folder: Path, *rows: dict, name: str = "choices.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, list]:
    return {name: value.tolist() for name, value in load_file(out / LORA_FILE).items()}


def refused(capsys: pytest.CaptureFixture, command: str, *parts: str) -> None:
    """One paragraph on stderr that holds the parts, and no traceback."""
    said = " ".join(capsys.readouterr().err.split())
    assert f"diffalign {command}: " in said and "Traceback" not in said, said
    for part in parts:
        assert part in said, f"{part!r} not in {said!r}"


# ------------------------------------------------------------------------------------------------------------- rolling out


def test_it_leaves_pictures_a_list_a_page_and_the_trajectories(inputs: Inputs, rolled: Path) -> None:
    store, rows = Store.open(rolled), [json.loads(line) for line in (rolled / "pictures.jsonl").read_text().splitlines()]
    assert [row["picture"] for row in rows] == [f"0000{g}-{k}" for g in range(4) for k in (0, 1)]
    assert [row["prompt"] for row in rows] == [p for p in PROMPTS for _ in (0, 1)]
    made = store.read(range(8))
    assert [row["seed"] for row in rows] == made.seed.tolist() and len({row["seed"] for row in rows}) == 8
    assert [row["start_seed"] for row in rows] == made.start_seed.tolist()
    decode = families.load_family(inputs.model).encoder.decode
    for row, picture in zip(rows, decode(made.final), strict=True):
        shown = np.asarray(Image.open(rolled / row["file"])).astype(float) / 255
        assert np.abs(shown - picture.permute(1, 2, 0).numpy()).max() < 0.51 / 255
    page = (rolled / "index.html").read_text()
    assert all(f'src="{row["file"]}"' in page and f'value="{row["picture"]}"' in page for row in rows)
    assert PROMPTS[1] in page and "http" not in page  # nothing from elsewhere
    assert torch.equal(made.x[0, 0], made.x[1, 0]) and not torch.equal(made.x[0, 1], made.x[1, 1])  # the same start
    assert not torch.equal(made.x[0, 0], made.x[4, 0])  # though the prompt comes again
    assert PromptCache.open(rolled / "prompts").prompts == PROMPTS


def test_it_says_what_to_do_next(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "roll"
    assert rollout(inputs, out, "--count", "2", "--per-prompt", "3", "--no-same-start") == 0
    said = capsys.readouterr().out
    for part in (
        f"2 prompts, 6 pictures in {out / 'pictures'}",
        f"Open {out / 'index.html'} to look at them",
        '{"chosen": "00000-1", "rejected": "00000-0"}    with "label": 0.5 for a tie',
        '{"picture": "00000-1", "score": 4}',
        f"diffalign train d3po --model {inputs.model} --feedback {out} --output RUN",
    ):
        assert part in said, part
    made = Store.open(out).read([0, 1])
    assert not torch.equal(made.x[0, 0], made.x[1, 0])


def test_a_count_beyond_the_list_goes_through_it_again_with_other_seeds(inputs: Inputs, tmp_path: Path) -> None:
    assert rollout(inputs, tmp_path / "roll", "--count", "6") == 0
    store = Store.open(tmp_path / "roll")
    assert store.made.prompts == (*PROMPTS, *PROMPTS[:2])
    assert not torch.equal(store.read([0]).x[0, 0], store.read([8]).x[0, 0])


def test_prompts_of_the_tiny_world(inputs: Inputs, tmp_path: Path) -> None:
    assert rollout(inputs, tmp_path / "roll", "--prompts", "tiny", "--count", "1") == 0
    from pipelines.ingredients import tiny_prompts

    assert Store.open(tmp_path / "roll").made.prompts == tuple(tiny_prompts()[:1])


def everything(folder: Path) -> dict[str, bytes]:
    """Files by name; the safetensors by their tensors, since the order in its header is random."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "complete.json")):
        tensors = load_file(path) if path.suffix == ".safetensors" else {}
        values = {name: tensors[name].numpy().tobytes() for name in sorted(tensors)}
        out[str(path.relative_to(folder))] = repr(values).encode() if tensors else path.read_bytes()
    return out


def test_a_killed_rollout_goes_on_to_the_very_same_files(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "PER_SHARD", 2)
    assert rollout(inputs, tmp_path / "whole") == 0
    real = Store.write

    def dies(self: Store, numbers: range, made) -> None:
        if numbers.start == 4:
            raise KeyboardInterrupt
        real(self, numbers, made)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", dies)
        assert rollout(inputs, tmp_path / "cut") == 130
    assert not (tmp_path / "cut" / "index.html").exists()
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted. The same command goes on where it stopped."
    assert train(inputs, tmp_path / "run", "--feedback", str(tmp_path / "cut")) == 2
    refused(capsys, "train", "holds 4 of 8 trajectories: the rollout was stopped")
    assert rollout(inputs, tmp_path / "cut") == 0
    assert "(4 were there already)" in capsys.readouterr().out
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")


def test_the_same_command_again_keeps_what_people_wrote_and_brings_back_lost_pictures(
    inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    again = shutil.copytree(rolled, tmp_path / "roll")
    (again / "pictures" / "00001-1.png").unlink()
    assert rollout(inputs, again) == 0
    assert "(8 were there already)" in capsys.readouterr().out
    assert everything(again) == everything(rolled)


def test_a_folder_of_something_else_or_of_another_rollout_is_left_alone(
    inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert rollout(inputs, tmp_path) == 2
    refused(capsys, "rollout", "holds files that are no rollout of diffalign; nothing is written there. Choose another --out")
    before = everything(rolled)
    assert rollout(inputs, rolled, "--seed", "1", "--count", "3") == 2
    refused(capsys, "rollout", "made otherwise", "seed was 0 and is now 1", "prompts was ")
    assert everything(rolled) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--eta", "0"], "noise in every step: eta is 0; give one greater than 0"),
        (["--eta", "2"], "eta should be at most 1; got 2.0"),
        (["--per-prompt", "1"], "1 picture of each prompt leaves nothing to choose among; make 2 or more"),
        (["--lora", "nowhere"], "There is no LoRA in nowhere (no pytorch_lora_weights.safetensors)"),
        (["--judge-options", "oracle.a=1"], "--judge-options are for judges, and --judges names none"),
        (["--judges", "orakle"], "Did you mean 'oracle'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    words: list[str], message: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert rollout(inputs, tmp_path / "roll", *words) == 2
    refused(capsys, "rollout", message)
    assert not (tmp_path / "roll").exists()


# ----------------------------------------------------------------------------------------------------------------- judges


def test_judges_choose_by_dominance_and_say_so(
    inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "roll"
    assert rollout(inputs, out, "--judges", "jpeg,oracle", "--per-prompt", "3", "--count", "3") == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "choices.jsonl").read_text().splitlines()]
    assert f"{len(lines)} choices by judges, {9 - len(lines)} pairs undecided. No person has chosen anything." in said
    rows = {r["picture"]: r for r in map(json.loads, (out / "pictures.jsonl").read_text().splitlines())}
    files, prompts = [out / r["file"] for r in rows.values()], [r["prompt"] for r in rows.values()]
    scores = reward_models.score(["jpeg", "oracle"], files, prompts, cache=False)
    of = {name: [float(scores[judge][i]) for judge in ("jpeg", "oracle")] for i, name in enumerate(rows)}

    def dominates(a: str, b: str) -> bool:
        return all(x >= y for x, y in zip(of[a], of[b], strict=True)) and of[a] != of[b]

    expected = {(a, b) for a in rows for b in rows if a[:5] == b[:5] and a != b and dominates(a, b)}
    assert {(line["chosen"], line["rejected"]) for line in lines} == expected and 0 < len(lines) < 9
    assert all(line["judges"] == ["jpeg", "oracle"] for line in lines)
    assert rollout(inputs, out, "--judge", "jpeg", "--per-prompt", "3", "--count", "3") == 0  # judges replace judges
    assert len((out / "choices.jsonl").read_text().splitlines()) == 9
    assert train(inputs, tmp_path / "run", "--feedback", str(out)) == 0
    assert "9 pairs of 3 of 3 prompts; 9 lines chosen by judges, not people" in capsys.readouterr().out


def test_judges_do_not_replace_what_people_chose(inputs: Inputs, rolled: Path, capsys: pytest.CaptureFixture) -> None:
    before = everything(rolled)
    assert rollout(inputs, rolled, "--judges", "jpeg") == 2
    refused(capsys, "rollout", "choices.jsonl holds what people chose; judges do not replace it")
    assert everything(rolled) == before


# --------------------------------------------------------------------------------------------------------------- learning


def test_what_is_learnt_is_a_lora_that_diffusers_loads(inputs: Inputs, rolled: Path, first: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(inputs.model, safety_checker=None)
    before = sample(pipe)
    pipe.load_lora_weights(first, weight_name=LORA_FILE)
    assert not torch.equal(before, sample(pipe))
    start, *_, last = metrics(first)
    assert abs(start["margin"]) < 1e-5 and start["loss"] == pytest.approx(0.693147, abs=1e-5) and start["clipped"] == 0
    assert start["gradient_norm"] > 0 and "reward" not in last and last["step"] == 4
    summary, config = json.loads((first / "summary.json").read_text()), (first / "config.yaml").read_text()
    assert summary["feedback"] == str(rolled) and "guidance: 2.0" in config and "rollout_steps: 3" in config
    card = (first / "README.md").read_text()
    assert "prompts_with_choices | 4" in card and "ties | 1" in card
    assert (first / "curves.png").is_file() and not (first / "cache-prompts").exists()


def test_resume_is_bitwise(inputs: Inputs, rolled: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, real = ["--feedback", str(rolled), "--checkpoint-every", "2"], progress.TrainingBar.update

    def die(self, step, numbers, **more):
        if step == 3:
            raise KeyboardInterrupt
        real(self, step, numbers, **more)

    with monkeypatch.context() as patch:
        patch.setattr(progress.TrainingBar, "update", die)
        assert train(inputs, tmp_path / "cut", *words) == 130
    assert train(inputs, tmp_path / "cut", *words, "--resume") == 0
    assert weights(tmp_path / "cut") == weights(first)


def test_a_resumed_run_notices_other_choices(inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    roll, out = shutil.copytree(rolled, tmp_path / "roll"), tmp_path / "run"
    assert train(inputs, out, "--feedback", str(roll)) == 0
    write_choices(roll, {"chosen": "00000-0", "rejected": "00000-1"})
    assert train(inputs, out, "--feedback", str(roll), "--resume") == 2
    refused(capsys, "train", "belongs to another run: data was")


def test_another_file_of_choices_gives_another_result(inputs: Inputs, rolled: Path, first: Path, tmp_path: Path) -> None:
    roll = shutil.copytree(rolled, tmp_path / "roll")
    rows = [json.loads(line) for line in (roll / "choices.jsonl").read_text().splitlines()]
    turned = [{**row, "score": 1 - row["score"]} if "score" in row else row for row in rows]
    other = write_choices(roll, *turned, name="other.jsonl")
    assert train(inputs, tmp_path / "run", "--feedback", str(other)) == 0
    assert weights(tmp_path / "run") != weights(first)


def test_settings_of_the_chain_come_from_the_trajectories_unless_they_contradict(
    inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(inputs, tmp_path / "run", "--feedback", str(rolled), "--guidance", "2") == 0
    assert train(inputs, tmp_path / "run2", "--feedback", str(rolled), "--guidance", "7", "--rollout-steps", "9") == 2
    refused(capsys, "train", "guidance was 2.0 and is now 7.0; steps was 3 and is now 9", "Leave these settings out")


def test_a_recipe_gives_way_to_how_the_trajectories_were_sampled(
    inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The README's way: the tiny recipe has other steps, no guidance, eight candidates and a judge."""
    words = ["--recipe", "tiny", "--feedback", str(rolled), "--prompts", "none", "--steps", "1"]
    assert train(inputs, tmp_path / "run", *words) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    found = {name: config["objective"][name] for name in ("guidance", "rollout_steps", "candidates", "timestep_fraction")}
    assert found == {"guidance": 2.0, "rollout_steps": 3, "candidates": 2, "timestep_fraction": 0.8}
    assert config["reward"]["reward"] == []
    assert train(inputs, tmp_path / "no", *words, "--candidates", "5", "--reward", "oracle") == 2
    refused(capsys, "train", "objective.candidates: is about sampling rounds", "reward.reward: with feedback it is people")


def test_mistakes_in_the_choices_are_told_with_their_line(
    inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    roll = shutil.copytree(rolled, tmp_path / "roll")
    bad = write_choices(
        roll, {"chosen": "00000-0", "rejected": "00000-1"}, {"chosen": "00000-0", "rejected": "00009-1"}, name="b.jsonl"
    )
    for where, parts in {
        bad: ("b.jsonl, line 2: there is no picture '00009-1'; they are called 00000-0 to 00003-1",),
        roll / "none.jsonl": (f"There is no {roll / 'none.jsonl'}: it should hold people's choices",),
        tmp_path / "nowhere": ("There are no trajectories in", "`diffalign rollout --out"),
    }.items():
        assert train(inputs, tmp_path / "run", "--feedback", str(where)) == 2
        refused(capsys, "train", *parts)
    assert not (tmp_path / "run").exists()


def test_only_d3po_learns_from_people(inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for objective in ("ddpo", "diffusion-dpo"):
        assert train(inputs, tmp_path / "run", "--feedback", str(rolled), "--pairs", "tiny", objective=objective) == 2
        refused(capsys, "train", "feedback: this objective does not learn from choices among rollouts; d3po does")


def test_another_model_is_refused(inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part, name, why in (
        ("unet", "conv_out.bias", "were made by another model"),
        ("text_encoder", "text_model.final_layer_norm.bias", "its text encoder or tokenizer differs"),
    ):
        other = shutil.copytree(inputs.model, tmp_path / part)
        file = next(other.joinpath(part).glob("*.safetensors"))
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith(name.removeprefix("text_model.")))
        save_file({**tensors, key: tensors[key] + 1}, file, metadata={"format": "pt"})
        assert train(inputs, tmp_path / "run", "--feedback", str(rolled), model=other) == 2
        refused(capsys, "train", why)
    assert train(inputs, tmp_path / "run", "--feedback", str(rolled), model=tmp_path / "unet") == 2
    refused(capsys, "train", f"made by another model: {inputs.model} (digest", f"starts from {tmp_path / 'unet'} (digest")
    last = edited(inputs.model, tmp_path / "last", "scheduler", set_alpha_to_one=True)
    assert train(inputs, tmp_path / "run", "--feedback", str(rolled), model=last) == 2
    refused(
        capsys, "train", "noise schedule of this run is not that of the trajectories", 'clean_end was "first" and is now "one"'
    )


def test_another_precision_is_refused(inputs: Inputs, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    roll = shutil.copytree(rolled, tmp_path / "roll")
    about = roll / "rollout.json"
    about.write_text(about.read_text().replace('"mixed_precision": "no"', '"mixed_precision": "bf16"'))
    assert train(inputs, tmp_path / "run", "--feedback", str(roll)) == 2
    refused(capsys, "train", "made with mixed precision bf16", "Train with --mixed-precision bf16, or roll out again")


# ----------------------------------------------------------------------------------------------------------- second round


def test_a_second_round_goes_on_from_the_lora_of_the_first(
    inputs: Inputs, rolled: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    roll, out = tmp_path / "roll", tmp_path / "run"
    assert rollout(inputs, roll, "--lora", str(first), "--judges", "jpeg") == 0
    assert f"--model {inputs.model} --start-lora {first} --feedback {roll}" in capsys.readouterr().out
    one, two = (Store.open(folder).read(range(8)) for folder in (rolled, roll))
    assert torch.equal(one.x[:, 0], two.x[:, 0]) and not torch.equal(one.x[:, 1], two.x[:, 1])
    assert train(inputs, out, "--feedback", str(roll), "--start-lora", str(first)) == 0
    start = metrics(out)[0]
    assert abs(start["margin"]) < 1e-5 and start["clipped"] == 0  # the policy is what made them
    # against the base it has moved already
    assert train(inputs, tmp_path / "against", "--feedback", str(roll), "--start-lora", str(first), "--reference", "start") == 0
    assert abs(metrics(tmp_path / "against")[0]["margin"]) > 10 * abs(start["margin"])
    capsys.readouterr()
    assert train(inputs, tmp_path / "no", "--feedback", str(roll)) == 2
    refused(capsys, "train", f"made with the LoRA {first}, and this run starts from no LoRA", f"--start-lora {first}")
    assert train(inputs, tmp_path / "no", "--feedback", str(rolled), "--start-lora", str(first)) == 2
    refused(
        capsys, "train", f"made by {inputs.model} itself, and this run starts from the LoRA {first}", "Leave --start-lora out"
    )


def test_a_folder_with_a_lora_may_be_named_as_the_model(inputs: Inputs, first: Path, tmp_path: Path) -> None:
    assert rollout(inputs, tmp_path / "a", "--count", "1", "--lora", str(first)) == 0
    assert rollout(inputs, tmp_path / "b", "--count", "1", model=first) == 0
    a, b = (Store.open(tmp_path / name) for name in "ab")
    assert a.made == b.made and torch.equal(a.read([0, 1]).x, b.read([0, 1]).x)


def test_any_objective_may_go_on_from_a_lora(inputs: Inputs, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pairs = ["--pairs", str(write_pairs(tmp_path / "data", 6)), "--validation-pairs", "2", "--validation-draws", "1"]
    still = ["--learning-rate", "1e-30", "--steps", "1"]

    def learn(out: str, *words: str) -> int:
        return train(inputs, tmp_path / out, *pairs, *still, *words, objective="diffusion-dpo")

    assert learn("on", "--start-lora", str(first)) == 0
    assert weights(tmp_path / "on") == weights(first)
    assert metrics(tmp_path / "on")[0]["margin"] != 0  # the reference is the base model
    assert learn("fresh") == 0
    assert weights(tmp_path / "fresh") != weights(first)
    capsys.readouterr()
    assert learn("bad", "--start-lora", str(first), "--rank", "4") == 2
    refused(
        capsys, "train", f"The LoRA in {first} has rank 2, alpha 16", "this run's has rank 4", "Give this run --rank 2 --alpha 16"
    )
    assert learn("bad", "--start-lora", str(first), "--alpha", "4") == 2
    refused(capsys, "train", "has rank 2, alpha 16", "this run's has rank 2, alpha 4")
    assert learn("on", "--resume") == 2
    refused(capsys, "train", "belongs to another run: start_lora was")
    assert learn("bad", "--start-lora", str(first), "--targets", "to_q") == 2
    refused(capsys, "train", "the targets to_k, to_out.0, to_q, to_v; this run's", "--targets to_k,to_out.0,to_q,to_v")
    assert learn("bad", "--start-lora", str(tmp_path)) == 2
    refused(capsys, "train", f"There is no LoRA in {tmp_path}")
    assert learn("bad", "--start-lora", str(first), "--adapter", "full") == 2
    refused(capsys, "train", "start_lora: an adapter to go on from, and adapter is full")


def test_a_lora_of_another_making_is_refused(inputs: Inputs, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = load_file(first / LORA_FILE)
    for name, metadata, message in (
        ("bare", None, "does not say its rank, alpha and layers"),
        ("dora", {"lora_adapter_metadata": '{"unet.r": 2, "unet.use_dora": true}'}, "is a LoRA with use_dora"),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / LORA_FILE, metadata=metadata)
        assert rollout(inputs, tmp_path / "roll", "--lora", str(tmp_path / name)) == 2
        refused(capsys, "rollout", message)


# -------------------------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes_learn_as_one(inputs: Inputs, rolled: Path, tmp_path: Path) -> None:
    words = ["--feedback", str(rolled), "--targets", "to_q,to_k,to_v,to_out.0"]
    assert train(inputs, tmp_path / "one", *words, "--accumulation", "2") == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "pipelines.cli"]
    where = ["--model", str(inputs.model), "--output", str(tmp_path / "two")]
    done = subprocess.run(
        [*launcher, "train", "d3po", *where, *QUICK, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "margin", "tie", "gradient_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), (one["step"], name)
    assert abs(metrics(tmp_path / "one")[-1]["margin"]) > 1e-5
