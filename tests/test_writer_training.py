"""Runs of prompt writers from settings to files: what they leave, that they resume to the bit, what they refuse."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_writer_material import CHATML, writer
from transformers import AutoModelForCausalLM
from worlds import assert_same

from diffalign.errors import UserError
from diffalign.train import Trainer
from pipelines import cli, config, families, recipes
from pipelines.objective_tables import objective_in_full
from pipelines.writers import training
from pipelines.writers.drift import Drift, read_drift
from pipelines.writers.optimizer import PromptOptimizer
from pipelines.writers.sampling import Decoding, candidates
from pipelines.writers.settings import COMMANDS
from pipelines.writers.training import train_writer
from pipelines.writers.writer import Writer

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "star", "cross")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random writer in a folder."""
    folder = tmp_path_factory.mktemp("writers") / "start"
    writer("gpt2", template="rephrase").save(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen prompts; what is preferred is vivid, and every fourth winner means something else."""
    path, rows = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", []
    for n, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
        prompt = f"a {colour} {shape}"
        meant = f"a purple {shape}" if n % 4 == 0 else prompt
        row = {"prompt": prompt, "chosen": f"{meant}, vivid", "rejected": f"{prompt}, pale", "gold": f"{prompt}, vivid, clean"}
        rows.append({**row, "chosen_score": 0.5 + n / 100, "rejected_score": 0.1})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(start: Path, pairs: Path, output: Path, **more: Any) -> dict[str, Any]:
    plain = {"model": str(start), "pairs": str(pairs), "output": str(output), "tracker": "none", "embedding": "tiny"}
    sizes = {"steps": 4, "batch_size": 3, "warmup_steps": 0, "validation_pairs": 4, "validate_every": 2, "checkpoint_every": 2}
    return {**plain, **sizes, "rank": 4, "learning_rate": 1e-2, "progress": False, "keep_checkpoints": 5, **more}


def metrics(folder: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "waiting")} for row in rows if row["kind"] == kind]


# --------------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_leaves_a_writer_that_has_learnt(start: Path, pairs: Path, tmp_path: Path, adapter: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    more = {"adapter": adapter, "alpha": 5.0, "steps": 12, "show.prompts": str(prompts)}
    summary = train_writer("sem-dpo", **options(start, pairs, tmp_path / "run", **more))
    rows = metrics(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-3)  # policy and reference agree; W is on another line
    assert rows[0]["weighted_loss"] == pytest.approx(rows[0]["weight"] * math.log(2), rel=1e-3) and rows[0]["weight"] < 0.99
    assert metrics(tmp_path / "run", "validation")[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-3)  # one scale
    assert rows[-1]["margin"] > 0.05 and rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert summary["rows"]["rows"] == 16 and 0 < summary["weights"]["z"] < 1
    assert summary["weights"]["tilted_mean"] < summary["weights"]["mean"]
    assert [row["prompt"] for row in summary["rewritten"]] == ["a red circle", "a blue star"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "a red circle" in card and "arXiv 2507.20133" in card and str(tmp_path) not in card
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000
    trained, before = Writer.load(tmp_path / "run"), Writer.load(start)
    tokens, mask = torch.arange(4, 12)[None], torch.ones(1, 8, dtype=torch.bool)
    assert (trained(tokens, mask) - before(tokens, mask)).abs().max() > 1e-3
    assert trained.template == before.template


def test_a_run_says_how_many_epochs_its_steps_are(
    start: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    summary = train_writer("sem-dpo", **options(start, pairs, tmp_path / "run", alpha=0.0, accumulation=2))
    assert summary["epochs"] == 4 * 3 * 2 / 12  # of 16 rows 4 are held out
    assert "4 steps of 6 are 2 epochs, passes over the 12 to train on" in capsys.readouterr().out


def test_sft_learns_from_expansions_and_from_the_winners_of_pairs(start: Path, pairs: Path, tmp_path: Path) -> None:
    expansions = tmp_path / "expansions.csv"
    expansions.write_text("prompt,rewrite\n" + "".join(f'a {c} {s},"a {c} {s}, vivid"\n' for c in COLOURS for s in SHAPES))
    for where in (expansions, pairs):
        output = tmp_path / where.stem
        train_writer("prompt-sft", **options(start, where, output, adapter="full", steps=30))
        rows = metrics(output)
        assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]


def test_a_run_goes_on_from_a_lora(start: Path, pairs: Path, tmp_path: Path) -> None:
    train_writer("prompt-sft", **options(start, pairs, tmp_path / "sft", steps=6))
    train_writer("sem-dpo", **options(tmp_path / "sft", pairs, tmp_path / "sem", steps=2))
    first, second = Writer.load(tmp_path / "sft"), Writer.load(tmp_path / "sem")
    tokens, mask = torch.arange(4, 12)[None], torch.ones(1, 8, dtype=torch.bool)
    assert (first(tokens, mask) - second(tokens, mask)).abs().max() > 1e-4
    assert metrics(tmp_path / "sem")[0]["margin"] == pytest.approx(0, abs=1e-5)  # the reference is the writer after SFT
    base = AutoModelForCausalLM.from_pretrained(start)
    theirs = PeftModel.from_pretrained(base, tmp_path / "sem")  # one LoRA that does what both do
    torch.testing.assert_close(theirs(tokens).logits, second(tokens, mask), atol=1e-4, rtol=1e-4)
    longer = options(tmp_path / "sft", pairs, tmp_path / "sem", steps=4, schedule="constant")
    train_writer("sem-dpo", **options(tmp_path / "sft", pairs, tmp_path / "sem", steps=2, schedule="constant"), overwrite=True)
    train_writer("sem-dpo", **longer, resume=True)  # which finds the LoRA below and its own weights apart
    train_writer("sem-dpo", **{**longer, "output": str(tmp_path / "at once")})
    ends = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sem", "at once")]
    assert_same(*ends, "adapter")


@pytest.mark.parametrize("kind", ["gpt2", "llama chat"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_what_the_card_says_to_run_gives_the_rewrites(
    kind: str, adapter: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a begin mark, a chat template, and generation settings that would change what is written."""
    made = writer("llama", chat=CHATML, begin=True, context=256) if kind == "llama chat" else writer("gpt2", begin=True)
    made.model.generation_config.repetition_penalty = 1.7
    made.save(tmp_path / "start")
    train_writer("prompt-sft", **options(tmp_path / "start", pairs, tmp_path / "sft", steps=2, adapter=adapter))
    train_writer("sem-dpo", **options(tmp_path / "sft", pairs, tmp_path / "run", alpha=5.0, adapter=adapter))
    own, others = [part.split("\n```")[0] for part in (tmp_path / "run" / "README.md").read_text().split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    exec(own, found := {})
    assert found["optimizer"].embedding.name == "tiny"  # the one that the weights were measured in
    assert [r.distance is not None for r in found["rewrites"]]
    ours = PromptOptimizer.from_pretrained("run", embedding=None)("a cat", how="beam", max_rewrite_tokens=75)[0]
    capsys.readouterr()
    exec(others, {})
    assert " ".join(capsys.readouterr().out.split()) == ours.text
    assert str(tmp_path) not in own + others
    exec((tmp_path / "sft" / "README.md").read_text().split("```python\n")[1].split("\n```")[0], found := {})
    assert found["optimizer"].embedding is None  # nothing was measured


def exported(*given: Any) -> None:
    assert cli.main(["export", *map(str, given)]) == 0


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(torch.arange(4, 12)[None]).logits


def test_a_run_is_exported_as_a_whole_model_or_as_one_lora(
    start: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train_writer("prompt-sft", **options(start, pairs, tmp_path / "sft"))
    train_writer("sem-dpo", **options(tmp_path / "sft", pairs, tmp_path / "sem"))
    expected = logits_of(Writer.load(tmp_path / "sem").model)
    exported(tmp_path / "sem", "--merge", "--out", tmp_path / "whole")
    assert "a whole language model. In Transformers: AutoModelForCausalLM" in capsys.readouterr().out
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), Writer.load(tmp_path / "whole").model):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    exported(tmp_path / "whole", "--out", tmp_path / "half", "--merge", "--dtype", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    (start.parent / "moved").exists() or shutil.copytree(start, start.parent / "moved")
    exported(tmp_path / "sem", "--out", tmp_path / "lora", "--base", start.parent / "moved")
    assert "a LoRA of 8 layers, rank 8, alpha 8" in capsys.readouterr().out
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("moved")
    torch.testing.assert_close(logits_of(Writer.load(tmp_path / "lora").model), expected, atol=1e-5, rtol=1e-5)


def test_the_base_of_a_lora_that_was_moved_can_be_named(
    start: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(start, tmp_path / "here" / "base")
    train_writer("prompt-sft", **options(tmp_path / "here" / "base", pairs, tmp_path / "lora"))
    plain = Writer.load(tmp_path / "lora")
    (tmp_path / "here").rename(tmp_path / "there")
    base = str(tmp_path / "there" / "base")

    def rewritten(*more: str, writer: Path = tmp_path / "lora") -> str:
        capsys.readouterr()
        code = cli.main(["prompts", "rewrite", "a cat", "--writer", str(writer), "--max-rewrite-tokens", "6", *more])
        told = capsys.readouterr()
        return told.out if code == 0 else told.err

    assert "If it was moved, name it (--base)" in " ".join(rewritten().split())
    assert candidates(plain, ["a cat"], decoding=Decoding(max_rewrite_tokens=6))[0][0] in rewritten("--base", base)
    assert "no writer here is a LoRA" in " ".join(rewritten("--base", base, writer=start).split())
    given = {"base": base, **options(tmp_path / "lora", pairs, tmp_path / "sem", steps=2)}
    train_writer("sem-dpo", **given)
    assert Writer.load(tmp_path / "sem").origin.whole == base
    assert PromptOptimizer.from_pretrained(tmp_path / "lora", embedding=None, base=base).writer.origin.whole == base


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.5}, {"adapter": "full"}], ids=str)
def test_a_checkpoint_of_a_run_is_exported(more: dict, start: Path, pairs: Path, tmp_path: Path) -> None:
    how = {"schedule": "constant", "checkpoint_every": 1, **more}
    train_writer("prompt-sft", **options(start, pairs, tmp_path / "sft", steps=1))
    for steps in (1, 3):
        train_writer("sem-dpo", **options(tmp_path / "sft", pairs, tmp_path / str(steps), steps=steps, **how))
    for step, end in (("1", "1"), ("latest", "3")):
        expected = logits_of(Writer.load(tmp_path / end).model)
        exported(tmp_path / "3", "--checkpoint", step, "--out", tmp_path / f"at {step}")
        found = Writer.load(tmp_path / f"at {step}")
        torch.testing.assert_close(logits_of(found.model), expected, atol=1e-5, rtol=1e-5)
        assert found.origin.holds == ("" if "adapter" in more else str(tmp_path / "sft"))
        exported(tmp_path / "3", "--checkpoint", step, "--merge", "--out", tmp_path / f"whole {step}")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / f"whole {step}")
        torch.testing.assert_close(logits_of(whole), expected, atol=1e-5, rtol=1e-5)


def test_exports_of_a_writer_that_cannot_be(start: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train_writer("prompt-sft", **options(start, pairs, tmp_path / "run", steps=1, checkpoint_every=0))

    def refused(text: str, *given: Any) -> None:
        capsys.readouterr()
        assert cli.main([*map(str, given)]) != 0
        assert text in " ".join(capsys.readouterr().err.split())

    export, out = ("export", tmp_path / "run", "--out"), tmp_path / "out"
    refused(
        "is a prompt writer, a language model; --to, --scale are for image models", *export, out, "--to", "kohya", "--scale", 2
    )
    refused("--dtype is of a writer's whole model (--merge)", *export, out, "--dtype", "fp16")
    refused("A writer is a folder, and", *export, tmp_path / "m.safetensors", "--merge")
    refused("is not empty. Name another, or add --overwrite", *export, start)
    refused("is the result itself", *export, tmp_path / "run", "--overwrite")
    assert not out.exists()
    with pytest.raises(UserError, match="is a prompt writer, a language model, and draws nothing"):
        families.load_pipeline(tmp_path / "run")


def test_tgdpo_rewards_tokens_by_another_writer(start: Path, pairs: Path, tmp_path: Path) -> None:
    train_writer("sem-dpo", **options(start, pairs, tmp_path / "dpo", alpha=0.0, steps=6))
    guided = {"alpha": 0.0, "token_guidance": 0.5, "token_rewards": str(tmp_path / "dpo")}
    train_writer("sem-dpo", **options(start, pairs, tmp_path / "tgdpo", **guided))
    train_writer("sem-dpo", **options(start, pairs, tmp_path / "again", alpha=0.0))
    one, other = metrics(tmp_path / "tgdpo"), metrics(tmp_path / "again")
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], abs=1e-6)  # ln 2 both
    assert abs(one[-1]["margin"] - other[-1]["margin"]) > 1e-4
    with pytest.raises(UserError, match="token_rewards and objective.token_guidance: one is set and the other is not"):
        train_writer("sem-dpo", **options(start, pairs, tmp_path / "x", token_guidance=0.5))


def test_distances_of_the_data_are_taken_when_asked_for(start: Path, pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"distance": n / 100} for n, line in enumerate(pairs.read_text().splitlines())]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = options(start, own, tmp_path / "read", alpha=5.0, steps=1, validation_pairs=0)
    summary = train_writer("sem-dpo", **{**read, "distances": "data", "embedding": "nobody/nothing"})  # which nobody asks
    assert summary["weights"]["mean"] == pytest.approx(0.075) and summary["weights"]["embedding"] == "the data"
    assert read_drift(tmp_path / "read").distances == pytest.approx([n / 100 for n in range(16)])
    train_writer("sem-dpo", **{**read, "output": str(tmp_path / "measured")})
    measured = read_drift(tmp_path / "measured")
    assert measured.embedding == "tiny" and measured.fingerprint and max(measured.distances) > 0.2
    own.write_text("".join(json.dumps({**row, "distance": None} if n == 3 else row) + "\n" for n, row in enumerate(rows)))
    with pytest.raises(UserError, match=r"1 of 16 rows have no distance \(the first: own.jsonl:line 4\)"):
        train_writer("sem-dpo", **{**read, "distances": "data", "output": str(tmp_path / "x")})


def test_what_the_weights_promise_can_be_asked_for_any_threshold(tmp_path: Path) -> None:
    kept = Drift(2.0, "clip", "abc", [0.0, 0.1, 0.4])
    kept.write(tmp_path)
    weights = [math.exp(-2.0 * d) for d in kept.distances]
    for delta, beyond in ((0.05, weights[1] + weights[2]), (0.3, weights[2]), (0.5, 0.0)):
        told = read_drift(tmp_path).predicted_drift(delta)
        assert told.tilted_beyond == pytest.approx(beyond / sum(weights)) and told.tilted_beyond <= told.bound
    assert read_drift(tmp_path / "nothing") is None
    (tmp_path / "distances.json").write_text('{"alpha": 1}')
    with pytest.raises(UserError, match="is not as a run of Sem-DPO wrote it"):
        read_drift(tmp_path)


def test_gold_rewrites_are_read_only_where_they_are_learnt_from(start: Path, pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[2]["gold"], rows[5]["gold"] = None, "very " * 200  # one lacks it, one is too long
    some = tmp_path / "some.jsonl"
    some.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train_writer("sem-dpo", **options(start, some, tmp_path / "dpo", steps=1))["rows"] == {"rows": 16}
    triple = {"gold_weight": 1.0, "steps": 1, "max_left_out": 0.2}
    counts = train_writer("sem-dpo", **options(start, some, tmp_path / "tpo", **triple))["rows"]
    assert counts == {"rows": 14, "left out, no gold": 1, "left out, rewrite too long": 1}
    with pytest.raises(UserError, match=r"2 of 16 rows .* cannot be used.*some.jsonl:line 3: there is no reference rewrite"):
        train_writer("sem-dpo", **options(start, some, tmp_path / "x", gold_weight=1.0))


# ------------------------------------------------------------------------------------------------------------------ resume


class Killed(Exception):
    pass


@pytest.mark.parametrize("more", [{"alpha": 5.0}, {"loss": "kto", "alpha": 0.0}, {"adapter": "full", "ema_decay": 0.9}], ids=str)
def test_a_run_that_was_killed_goes_on_to_the_bit(start: Path, pairs: Path, tmp_path: Path, more: dict, monkeypatch) -> None:
    whole, cut = options(start, pairs, tmp_path / "whole", **more), options(start, pairs, tmp_path / "cut", **more)
    train_writer("sem-dpo", **whole)
    step = Trainer._optimizer_step

    def dying(self: Trainer, *given: Any) -> Any:
        if self.step == 3:
            raise Killed
        return step(self, *given)

    monkeypatch.setattr(Trainer, "_optimizer_step", dying)
    with pytest.raises(Killed):
        train_writer("sem-dpo", **cut)
    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    train_writer("sem-dpo", resume=True, **cut)
    for kind in ("train", "validation"):
        assert metrics(tmp_path / "whole", kind) == metrics(tmp_path / "cut", kind)
    ends = [sorted((tmp_path / name / "checkpoints").glob("checkpoint-*"))[-1] for name in ("whole", "cut")]
    for path in sorted(ends[0].glob("*.pt")):
        assert_same(torch.load(path, weights_only=True), torch.load(ends[1] / path.name, weights_only=True), path.name)


def test_a_run_does_not_go_on_with_another_rewarding_writer(start: Path, pairs: Path, tmp_path: Path) -> None:
    rewarding = options(start, pairs, tmp_path / "dpo", alpha=0.0, steps=2)
    train_writer("sem-dpo", **rewarding)
    guided = {"alpha": 0.0, "token_guidance": 0.5, "token_rewards": str(tmp_path / "dpo"), "steps": 2}
    train_writer("sem-dpo", **options(start, pairs, tmp_path / "run", **guided))
    train_writer("sem-dpo", **{**rewarding, "steps": 3}, overwrite=True)  # of the same name
    with pytest.raises(UserError, match="belongs to another run: data was"):
        train_writer("sem-dpo", resume=True, **options(start, pairs, tmp_path / "run", **guided))


def test_a_run_does_not_go_on_with_other_data(start: Path, pairs: Path, tmp_path: Path) -> None:
    train_writer("sem-dpo", **options(start, pairs, tmp_path / "run", steps=2))
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text().replace("vivid", "bright"))
    with pytest.raises(UserError, match="belongs to another run: data was"):
        train_writer("sem-dpo", resume=True, **options(start, other, tmp_path / "run", steps=2))


# ------------------------------------------------------------------------------------------------------------------ refused


def test_what_cannot_be_trained_on_is_said(start: Path, pairs: Path, tmp_path: Path) -> None:
    def refused(text: str, **more: Any) -> None:
        with pytest.raises(UserError, match=text):
            train_writer("sem-dpo", **{**options(start, pairs, tmp_path / "run"), **more})
        assert not (tmp_path / "run" / "checkpoints").exists()

    no_chosen = tmp_path / "no_chosen.jsonl"
    no_chosen.write_text('{"prompt": "a cat", "better": "a fluffy cat", "rejected": "a dog"}\n')
    refused("chosen", pairs=str(no_chosen))
    same = tmp_path / "same.jsonl"
    same.write_text('{"prompt": "a cat", "chosen": "a fluffy cat", "rejected": "a fluffy cat"}\n')
    refused("identical", pairs=str(same))
    refused(r"16 of 16 rows .* cannot be used.*the prompt takes .* tokens", max_prompt_tokens=3)
    refused(r"cannot be used, more than max_left_out \(0\.01\).*Raise max_prompt_tokens or max_rewrite", max_rewrite_tokens=4)
    refused("no-such-folder", embedding=str(tmp_path / "no-such-folder"))
    refused("no-such-writer", model=str(tmp_path / "no-such-writer"))


def test_identical_and_overlong_rows_are_counted(start: Path, pairs: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    same = {"prompt": "a cat", "chosen": "a cat, vivid", "rejected": "a cat, vivid"}
    long = {"prompt": "a cat", "chosen": "a cat, " + "very " * 60, "rejected": "a cat, pale"}
    text = pairs.read_text()
    text = text.replace(', "gold"', ', "other"')
    more.write_text(text + json.dumps(same) + "\n" + json.dumps(long) + "\n")
    told: list[str] = []
    settings = config.resolve(
        config.placed(
            {k: v for k, v in options(start, more, tmp_path / "run", max_left_out=0.1).items() if k != "progress"},
            training.objectives.load("sem-dpo").Objective,
        ),
        training.objectives.load("sem-dpo").Objective,
    )
    training.train("sem-dpo", settings, say=told.append, progress=False)
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert counts["rows"] == 16 and counts["left out, identical"] == 1 and counts["left out, rewrite too long"] == 1
    assert any("more.jsonl:line 18" in line and "chosen takes" in line for line in told)


# ------------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name", ["sem-dpo", "prompt-sft"])
def test_the_list_of_objectives_says_how_to_run_it(name: str) -> None:
    text = objective_in_full(name)
    assert f"diffalign {COMMANDS[name]} --recipe NAME" in text
    assert recipes.names(name)


@pytest.mark.parametrize("wrong", [{"embedding": "nobody/nothing"}, {"max_rewrite_tokens": 2}, {"gold_weight": 1.0}], ids=str)
def test_a_run_that_cannot_begin_replaces_nothing(
    wrong: dict, start: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is still whole after ``overwrite`` met a mistake that only the data show."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    (tmp_path / "no_gold.jsonl").write_text("".join(json.dumps({**row, "gold": None}) + "\n" for row in rows))
    given = options(start, tmp_path / "no_gold.jsonl", tmp_path / "run", alpha=1.0, steps=1, checkpoint_every=0)
    train_writer("sem-dpo", **given)
    there = {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError):
        train_writer("sem-dpo", **{**given, **wrong}, overwrite=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == there
    assert "adapter_model.safetensors" in there
