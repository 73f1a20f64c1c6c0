"""``--dry-run`` refuses what the run would refuse, in the run's own words, and says what nobody looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from miniature import save_untrained, write_pairs
from safetensors.torch import save_file

from diffalign import objectives
from diffalign.errors import UserError
from pipelines import cli, config, dry_run, families
from pipelines.image_settings import TrainSettings
from pipelines.sizing import Sizing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 6)


def settings(model: Path | str, pairs: Path | str, name: str = "diffusion-dpo", /, **options: object) -> TrainSettings:
    objective = objectives.load(name).Objective
    given = {"model": str(model), "pairs": str(pairs), "output": "never", "resolution": 32, **options}
    return config.resolve(config.placed(given, objective), objective)


SAMPLING = {"reward": ["jpeg"], "train_prompts": "tiny"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("diffusion-dpo", {"model": "/nowhere"}, "There is no model /nowhere"),
        ("diffusion-dpo", {"pairs": "/nowhere.jsonl"}, "There is no file or folder /nowhere.jsonl"),
        ("diffusion-dpo", {"without": ["t5"]}, "cannot do without 't5'"),
        ("diffusion-dpo", {"prediction_type": "v_prediction"}, "'v_prediction' was asked for, but "),
        ("diffusion-dpo", {"level_mean": 0.5}, "data.level_mean would do nothing: noise levels are uniform"),
        ("diffusion-dpo", {"targets": ["nope"]}, "LoRA target 'nope' matches no layer"),
        ("diffusion-dpo", {"tracker": "foo"}, "tracker is 'foo'; Accelerate knows"),
        ("diffusion-dpo", {"judges": ["nosuch"], "prompts": "tiny"}, "--judges: "),
        ("diffusion-dpo", {"judges": ["jpeg"], "prompts": "/nope"}, "/nope"),
        ("diffusion-dpo", {"preview_every": 5, "preview_prompts": "/nope"}, "/nope"),
        ("diffusion-dpo", {"start_lora": "/nope"}, "There is no LoRA in /nope"),
        ("diffusion-dpo", {"base_lora": "/nope"}, "There is no LoRA at /nope"),
        ("diffusion-dpo", {"scores": "x"}, "has no scores by 'x'"),
        ("diffusion-dpo", {"curriculum": "margin"}, "A curriculum orders pairs by a judge's scores, which these data do not"),
        (
            "diffusion-dpo",
            {"loss": "madpo"},
            "The loss madpo needs a judge's scores of both pictures, which these",
        ),
        ("smpo", {}, "SmPO smooths labels by a judge's scores, which these data do not have. Name a judge (--reward)"),
        ("diffusion-dpo", {"split": "validation"}, "is one file, which has no splits"),
        ("diffusion-dpo", {"single_file_config": "/nowhere"}, "single_file_config: is about a single file, and "),
        (
            "smpo",
            {"curriculum": "margin", "reward": ["jpeg"], "steps": 4},
            "5 stages need at least as many rows (6) and steps (4)",
        ),
        (
            "d3po",
            {**SAMPLING, "round_pairs": 7, "accumulation": 2},
            "A round of 7 pairs is not a whole number of optimizer steps",
        ),
        ("d3po", {**SAMPLING, "reward": ["nosuch"]}, "--judges: "),
        ("ddpo", {**SAMPLING, "train_prompts": "/nope"}, "/nope"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_what_the_run_would_refuse_is_found(name: str, options: dict, message: str, model: Path, pairs: Path) -> None:
    (found,) = dry_run.look(settings(model, pairs, name, **options)).mistakes
    assert message in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_what_could_be_meant_by_a_model_is_a_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("x")
    with pytest.raises(UserError, match=r"There is no model .*mother: in .* there is none\. A model is a Diffusers folder"):
        families.find(tmp_path / "mother")
    with pytest.raises(UserError, match=rf"there is {model.name}\."):
        families.find(model.parent / "bsae")
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2), "lora_unet_x.alpha": torch.ones(1)}, lora)
    with pytest.raises(
        UserError, match=r"lora\.safetensors is a LoRA, which acts on a model: name the model, and .* --lora; train"
    ):
        families.find(lora)


def test_what_a_machine_without_a_gpu_cannot_do(model: Path, pairs: Path) -> None:
    found = dry_run.look(settings(model, pairs, mixed_precision="fp16", attention="xformers", tf32=True)).mistakes
    assert "fp16, which needs a GPU" in found[0] and "compute.tf32 is about NVIDIA GPUs" in found[1]
    assert "attention xformers needs" in found[2]


def test_a_lora_to_go_on_from_should_be_like_this_run_s(model: Path, pairs: Path, tmp_path: Path) -> None:
    family = families.load_family(model)
    family.attach_lora(rank=2)
    family.save_adapter(tmp_path / "run")
    (found,) = dry_run.look(settings(model, pairs, start_lora=str(tmp_path / "run"), rank=4)).mistakes
    assert "Give this run --rank 2" in found
    assert dry_run.look(settings(model, pairs, start_lora=str(tmp_path / "run"), rank=2, alpha=2)).mistakes == []


def test_what_is_right_is_not_refused_and_what_is_elsewhere_is_not_looked_at(model: Path, pairs: Path) -> None:
    assert dry_run.look(settings(model, pairs)) == dry_run.Findings()
    assert dry_run.look(settings(model, pairs, "d3po", **SAMPLING)) == dry_run.Findings()
    found = dry_run.look(settings("nobody/nothing", "nobody/pairs"))
    assert found.mistakes == [] and "no data nobody/pairs here" in found.unchecked[0]
    assert "the model nobody/nothing is neither in the local hub cache" in found.unchecked[1]


def test_the_command_shows_everything_and_then_refuses(
    model: Path, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who has no data yet sees the estimate all the same; and the advice counts nothing that the estimate has counted."""
    made, begin = [], Sizing.__init__
    monkeypatch.setattr(Sizing, "__init__", lambda sizing: made.append(sizing) or begin(sizing))
    where = ["--model", str(model), "--pairs", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "run")]
    assert cli.main(["train", "diffusion-dpo", *where, "--tracker", "foo", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "min in all" in said.out and "tracker: foo" in said.out and not (tmp_path / "run").exists()
    told = " ".join(said.err.split())
    assert told.startswith("diffalign train: The run would be refused: tracker is 'foo'") and "none.jsonl" in told
    assert "24 GB" in said.out and len(made) == 1
    where[1], where[3] = "nobody/nothing", "nobody/pairs"  # a model that is not here need not be counted
    for output, words, message in (
        (__file__, [], "is a file; the output should be a folder"),
        (tmp_path / "run", ["--resume"], "There is no run to resume"),
        (model, ["--overwrite"], "holds files that are no run of diffalign"),
    ):
        where[5] = str(output)
        assert cli.main(["train", "diffusion-dpo", *where, "--dry-run", *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    where[1], where[5] = str(model), str(tmp_path / "run")
    assert cli.main(["train", "diffusion-dpo", *where, "--dry-run"]) == 0
    assert "Not checked: there are no data nobody/pairs here" in capsys.readouterr().out
