"""``diffalign train`` as a user calls it, on an untrained miniature: results, resume, and what bad input gets."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from miniature import edited, sample, save_untrained, write_pairs
from safetensors.torch import load_file
from threads import Process, in_threads

from diffalign import checkpoint
from diffalign.data.cache_shards import ShardFiller
from diffalign.errors import UserError
from pipelines import cli, progress, training
from pipelines import run as shared
from pipelines.families.stable_diffusion import StableDiffusionEncoder
from pipelines.training import align

QUICK = ["--steps", "2", "--batch-size", "2", "--validation-pairs", "2", "--validation-draws", "1", "--learning-rate", "1e-3"]


@dataclass(frozen=True)
class Inputs:
    model: Path
    pairs: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return Inputs(save_untrained(folder / "model"), write_pairs(folder / "data", 10))


def run(inputs: Inputs, output: Path, *words: str, model: Path | None = None, pairs: Path | str | None = None) -> int:
    where = ["--model", str(model or inputs.model), "--pairs", str(pairs or inputs.pairs), "--output", str(output)]
    return cli.main(["train", "diffusion-dpo", *where, "--quiet", *QUICK, *words])


def tensors(output: Path, name: str = "pytorch_lora_weights.safetensors") -> dict[str, list]:
    """Exported weights as plain values (safetensors writes its header in random order, so bytes cannot be compared)."""
    return {name: value.tolist() for name, value in load_file(output / name).items()}


@pytest.mark.curves
def test_a_lora_run_leaves_what_diffusers_loads(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(shared, "LONG_WAIT", 0.0)
    out = tmp_path / "run"
    assert run(inputs, out, "--rank", "2", "--alpha", "8") == 0
    said = capsys.readouterr().out
    assert "alpha 8 at rank 2: the LoRA acts alpha / rank = 4 times" in said
    pipe = StableDiffusionPipeline.from_pretrained(inputs.model, safety_checker=None)
    before = sample(pipe)
    pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    assert pipe.unet.peft_config["default_0"].lora_alpha == 8
    assert not torch.equal(before, sample(pipe))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["objective"] == "diffusion-dpo" and summary["steps"] == 2 and summary["seconds"] > 0
    for name in ("README.md", "config.yaml", "metrics.jsonl", "curves.png", "tensorboard"):
        assert (out / name).exists(), name
    assert "load_lora_weights" in (out / "README.md").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert f"are {summary['epochs']:.3g} epochs, passes over the" in said and summary["epochs"] > 0
    assert 0 <= summary["waiting"] < 1 and [line["step"] for line in lines if 0 <= line.get("waiting", -1) < 1] == [1, 2]
    assert "% of the steps' time went by waiting for data: a faster disk" in said


def test_a_tracker_without_its_package_is_refused_before_anything_is_read(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    missing = next(kind.value for kind in LoggerType if kind.value not in ("all", *map(str, get_available_trackers())))
    assert run(inputs, tmp_path / "run", "--tracker", missing, model=tmp_path / "nowhere") == 2
    refused(capsys, f"tracker is '{missing}', whose package is not installed: pip install {missing}, or take")


def test_a_tracker_is_told_of_the_run(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "--steps", "1", "--rank", "2", "--targets", "to_q,to_k", "--tracker", "tensorboard") == 0
    (told,) = (out / "tensorboard").glob("*/hparams.yml")
    found = yaml.safe_load(told.read_text())
    assert found["output"] == str(out) and found["lora.rank"] == 2 and found["compute.compile"] is False
    assert found["lora.targets"] == "to_q,to_k" and found["data.resolution"] == "none"
    assert {type(value) for value in found.values()} == {str, int, float, bool}


def test_a_cache_is_prepared_in_parts_and_trained_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ShardFiller, "MAX_BYTES", 1)  # a batch in each
    cache, encoded, read = tmp_path / "cache", [], []
    from_pretrained = UNet2DConditionModel.from_pretrained
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *a, **k: read.append(a) or from_pretrained(*a, **k))
    original = StableDiffusionEncoder.encode_images
    monkeypatch.setattr(
        StableDiffusionEncoder, "encode_images", lambda self, pixels: encoded.append(len(pixels)) or original(self, pixels)
    )
    for part in ("1/2", "2/2"):
        assert run(inputs, tmp_path / "run", "--cache", str(cache), "--prepare", part) == 0
    said = capsys.readouterr().out
    assert "The reference's errors are not made here" not in said
    assert "Part 1/2 is done; " in said and f"The cache in {cache} is complete." in said and not (tmp_path / "run").exists()
    assert sum(encoded) == 20 and not read  # the UNet is not needed for it
    assert run(inputs, tmp_path / "run", "--cache", str(cache), "--tracker", "none") == 0
    assert read and sum(encoded) == 20 and not (tmp_path / "run" / "cache").exists()
    assert run(inputs, tmp_path / "run", "--cache", str(cache), "--prepare", "--reference-draws", "2") == 0
    assert "The reference's errors are not made here" in capsys.readouterr().out
    for words, message in (
        (["--prepare"], "--prepare needs --cache FOLDER"),
        (["--prepare", "3/2", "--cache", str(cache)], "--prepare is '3/2'; expected K/N"),
        (["--prepare", "half", "--cache", str(cache)], "expected K/N with K from 1 to N"),
    ):
        assert run(inputs, tmp_path / "run", *words) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_preparation_is_one_line_and_goes_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--cache", str(tmp_path / "cache"), "--prepare"]

    def stop(self: StableDiffusionEncoder, prompts: list[str]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionEncoder, "encode_prompts", stop)
        assert run(inputs, tmp_path / "run", *words) == 130
        assert capsys.readouterr().err == "Interrupted. The same command goes on where it stopped.\n"
        with pytest.raises(KeyboardInterrupt):
            run(inputs, tmp_path / "run", *words, "--debug")
    assert run(inputs, tmp_path / "run", *words) == 0


def test_a_full_run_leaves_a_whole_pipeline(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "--adapter", "full", "--ema-decay", "0.5") == 0
    tuned = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    base = StableDiffusionPipeline.from_pretrained(inputs.model, safety_checker=None)
    assert not torch.equal(tuned.unet.conv_in.weight, base.unet.conv_in.weight)
    assert torch.equal(tuned.vae.encoder.conv_in.weight, base.vae.encoder.conv_in.weight)
    average = torch.load(out / "checkpoints" / "checkpoint-00000002" / "ema.pt", weights_only=True)["average"]
    assert torch.equal(average[0], next(tuned.unet.parameters()))  # the average is what is exported


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_resume_from_the_command_line_is_bitwise(
    adapter: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--steps", "4", "--checkpoint-every", "2", "--adapter", adapter, "--dropout", "0.1"]
    assert run(inputs, tmp_path / "whole", *words) == 0
    real = progress.TrainingBar.update

    def die(self, step, numbers, **more):
        if step == 3:
            raise KeyboardInterrupt
        real(self, step, numbers, **more)

    with monkeypatch.context() as patch:
        patch.setattr(progress.TrainingBar, "update", die)
        assert run(inputs, tmp_path / "cut", *words) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("Interrupted. Once there is a checkpoint, go on from it with --resume") and len(said) == 1
    assert checkpoint.Checkpoints(tmp_path / "cut" / "checkpoints").latest().name == "checkpoint-00000002"
    assert run(inputs, tmp_path / "cut", *words, "--resume") == 0
    name = "pytorch_lora_weights.safetensors" if adapter == "lora" else "unet/diffusion_pytorch_model.safetensors"
    assert tensors(tmp_path / "whole", name) == tensors(tmp_path / "cut", name)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(inputs: Inputs, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(inputs, tmp_path / name, "--seed", seed, "--tracker", "none") == 0
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b") != tensors(tmp_path / "c")


def test_a_v_prediction_model_is_recognised_and_trains(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = edited(inputs.model, tmp_path / "v", "scheduler", prediction_type="v_prediction")
    assert run(inputs, tmp_path / "run", model=model) == 0
    assert "v_prediction" in capsys.readouterr().out
    (first, *_) = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert first["reference_winner_error"] > 0


def test_noise_levels_and_what_errors_are_measured_in_can_be_set(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Levels near noise only; an epsilon network whose errors count as those of x_0, 1 / alpha_bar - 1 times as much: more."""
    found = {}
    for name, words in {"eps": [], "x_0": ["--error-as", "sample"]}.items():
        noisy = ["--level-distribution", "logit-normal", "--level-mean", "4", "--level-std", "0.1"]
        assert run(inputs, tmp_path / name, *noisy, *words) == 0
        assert "noise levels: logit-normal, mean 4, std 0.1, shift 1" in capsys.readouterr().out
        found[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        assert [b["t_from"] for b in found[name]["bins"]] == [900]
    assert found["x_0"]["reference_winner_error"] > 10 * found["eps"]["reference_winner_error"]
    assert run(inputs, tmp_path / "eps", *noisy, "--error-as", "sample", "--resume") != 0
    assert 'error_as was "prediction" and is now "sample"' in capsys.readouterr().err


def test_in_python_it_is_one_call(inputs: Inputs, tmp_path: Path) -> None:
    options = dict(model=str(inputs.model), pairs=str(inputs.pairs), output=tmp_path / "run", steps=1, batch_size=1, rank=2)
    summary = align("diffusion-dpo", progress=False, validation_pairs=0, **options)
    assert summary["steps"] == 1
    assert tensors(tmp_path / "run")


@pytest.mark.parametrize("least", [2, 16])
def test_prompts_that_come_back_too_seldom_for_their_baseline_are_told(
    least: int, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    how = {
        "model": str(inputs.model),
        "train_prompts": "tiny",
        "output": tmp_path,
        "judge": lambda shown, _: shown.mean((1, 2, 3)),
    }
    small = {"rollout_steps": 2, "guidance": 1.0, "round_pairs": 2, "accumulation": 2, "steps": 1}
    align("ddpo", **how, **small, least=least, tracker="none", progress=False)
    said = (
        "500 prompts come back every 250 rounds, and have the 16 rewards that their own baseline takes from round 1751 on, of 1:"
    )
    assert (said in capsys.readouterr().out) == (least == 16)


def test_a_run_with_evaluation_ends_with_win_rates_and_pictures(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--prompts", "tiny", "--prompt-count", "3", "--judges", "oracle,jpeg", "--sampling-steps", "2"]
    assert run(inputs, out, *words) == 0
    summary = json.loads((out / "summary.json").read_text())
    for judge in ("oracle", "jpeg"):
        assert {"base", "tuned", "win_rate", "win_rate_interval"} <= summary["judges"][judge].keys()
    assert set(summary["faithfulness"]) >= {"base", "tuned"}
    assert (out / "samples.png").is_file() and (out / "evaluation" / "index.html").is_file()


def test_a_dry_run_prints_everything_and_writes_nothing(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(inputs, tmp_path / "run", "--dry-run", "--beta", "1234") == 0
    said = capsys.readouterr().out
    assert "beta: 1234" in said and "M trainable parameters" in said and "GiB" in said and "min in all" in said
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture, *parts: str) -> str:
    """One paragraph on stderr that holds the parts, and no traceback."""
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("diffalign train: "), said
    assert "Traceback" not in said
    for part in parts:
        assert part in said, f"{part!r} not in {said!r}"
    return said


def test_a_missing_model_folder(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(inputs, tmp_path / "run", model=tmp_path / "nowhere") == 2
    refused(capsys, "nowhere")
    assert not (tmp_path / "run").exists()


def test_a_pipeline_of_an_unknown_family(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = edited(inputs.model, tmp_path / "odd", "", _class_name="KandinskyPipeline")
    assert run(inputs, tmp_path / "run", model=model) == 2
    refused(capsys, "KandinskyPipeline", "StableDiffusionPipeline")


def test_a_wrong_prediction_type(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(inputs, tmp_path / "run", "--prediction-type", "v_prediction") == 2
    refused(capsys, "v_prediction", "epsilon", "scheduler_config.json")


def test_missing_columns(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "good": "x.png", "bad": "y.png"}\n')
    assert run(inputs, tmp_path / "run", pairs=bad) == 2
    refused(capsys, "text", "good", "bad", "prompt")


def test_too_many_corrupt_images_and_then_enough_patience(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pairs = write_pairs(tmp_path / "data", 8, broken=2)
    assert run(inputs, tmp_path / "run", pairs=pairs) == 2
    refused(capsys, "pairs.jsonl:line 7", "limit of 1.00%", "max_unreadable")
    assert run(inputs, tmp_path / "run", "--max-unreadable", "0.3", pairs=pairs) == 0  # the refused run is not in the way
    assert "2 skipped" in capsys.readouterr().out


def test_an_output_folder_with_another_run(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert run(inputs, out) == 0
    kept = tensors(out)
    assert run(inputs, out) == 2
    refused(capsys, "--resume", "--overwrite")
    assert tensors(out) == kept
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(inputs, tmp_path / "elsewhere") == 0
    other = ["--cache", str(tmp_path / "elsewhere" / "cache"), "--resolution", "32"]
    assert run(inputs, out, "--overwrite", *other) == 2  # that cache is of another size: seen late, when data are encoded
    refused(capsys, "transform", "another folder")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert run(inputs, out, "--overwrite", "--seed", "9") == 0
    assert tensors(out) != kept


def test_a_run_that_is_replaced_takes_its_own_stale_caches_with_it(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, elsewhere = tmp_path / "run", ["--reference-cache", str(tmp_path / "errors")]
    assert run(inputs, out, "--reference-draws", "1") == 0
    pairs = (out / "cache" / "pairs.npy").stat().st_mtime_ns
    assert run(inputs, out, "--overwrite", "--reference-draws", "2") == 0
    assert (out / "cache" / "pairs.npy").stat().st_mtime_ns == pairs  # the pairs are the same
    assert np.load(out / "cache" / "reference" / "errors.npy").shape[1] == 2
    assert run(inputs, out, "--overwrite", "--reference-draws", "2", "--resolution", "32", *elsewhere) == 0
    assert (out / "cache" / "pairs.npy").stat().st_mtime_ns != pairs
    assert run(inputs, out, "--overwrite", "--reference-draws", "1", "--resolution", "32", *elsewhere) == 2  # not the run's own
    refused(capsys, "draws", "--reference-cache")


def test_an_output_folder_with_other_files_is_never_overwritten(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert run(inputs, tmp_path, "--overwrite") == 2
    refused(capsys, "no run of diffalign")
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_resuming_nothing_and_resuming_something_else(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(inputs, tmp_path / "run", "--resume") == 2
    refused(capsys, "no run to resume")
    assert run(inputs, tmp_path / "run") == 0
    capsys.readouterr()
    assert run(inputs, tmp_path / "run", "--resume", "--beta", "7") == 2
    refused(capsys, "belongs to another run", "2000", "7")
    for words in (["--prompt-dropout", "0.5"], ["--latents", "mode"]):
        assert run(inputs, tmp_path / "run", "--resume", *words) == 2
        refused(capsys, "belongs to another run", f"data.{words[0][2:].replace('-', '_')}")


@pytest.mark.parametrize(("loss", "code"), [("ipo", 0), ("beta-dpo", 2)])
def test_a_step_is_divided_anew_only_where_it_does_not_matter(
    loss: str, code: int, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--loss", loss, "--batch-size", "4"]
    assert run(inputs, tmp_path / "run", *words) == 0
    assert run(inputs, tmp_path / "run", "--resume", "--loss", loss, "--accumulation", "2") == code
    assert ("was [4, 1, 1] and is now [2, 2, 1]" in " ".join(capsys.readouterr().err.split())) == (code == 2)


def test_an_unknown_judge_is_found_before_anything_is_loaded(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--prompts", "tiny", "--judges", "orakle"]
    assert run(inputs, tmp_path / "run", *words, model=tmp_path / "nowhere") == 2
    refused(capsys, "orakle", "oracle")


def test_all_configuration_mistakes_at_once(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(inputs, tmp_path / "run", "--betta", "3", "--batch-size", "0") == 2
    refused(capsys, "2 mistakes", "--betta", "did you mean --beta", "batch.batch_size")


def test_debug_shows_the_traceback(inputs: Inputs, tmp_path: Path) -> None:
    from diffalign.errors import UserError

    with pytest.raises(UserError):
        run(inputs, tmp_path / "run", "--debug", model=tmp_path / "nowhere")


def test_a_non_finite_loss_ends_with_a_message(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(inputs, tmp_path / "run", "--steps", "30", "--learning-rate", "1e30", "--checkpoint-every", "1") == 2
    refused(capsys, "Step", "Timesteps", "margins")
    last = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").latest()
    state = torch.load(last / "weights.pt", weights_only=True)
    assert state  # a checkpoint from before the blow-up is there


def test_judges_are_loaded_when_a_process_knows_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Accelerate begins, the current GPU of every process is the machine's first."""
    done: list[str] = []
    begin = training.start_accelerator

    def judges(*given: object) -> None:
        done.append("judges")
        raise UserError("enough")

    monkeypatch.setattr(training, "start_accelerator", lambda settings: done.append("accelerator") or begin(settings))
    monkeypatch.setattr(training.ingredients, "training_judges", judges)
    monkeypatch.setattr(training, "load_panel", judges)
    with pytest.raises(UserError, match="enough"):
        training.align("diffusion-dpo", recipe="tiny", output=tmp_path / "out", progress=False)
    assert done == ["accelerator", "judges"]


def test_judges_of_the_comparison_are_loaded_where_they_will_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first of several processes; all of them hear of what is refused."""
    loaded, load = [], training.load_panel
    monkeypatch.setattr(training, "load_panel", lambda *given: loaded.append(1) or load(*given))

    def checked(judge: str) -> list[str]:
        objective = training.objectives.load("sft").Objective
        given = {"model": "tiny", "pairs": "tiny", "output": "never", "prompts": "tiny", "judges": [judge]}
        settings = training.config.resolve(training.config.placed(given, objective), objective)

        def told(process: Process) -> str:
            try:
                return str(training.check_judges(settings, everyone=process))
            except UserError as error:
                return str(error)

        return in_threads(2, told)

    assert checked("oracle") == ["None", "None"] and len(loaded) == 1
    one, other = checked("orakle")
    assert one in other and "oracle" in one


@pytest.mark.parametrize("decay", ["0", "0.5"])
def test_another_average_is_another_run(decay: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(inputs, tmp_path / "run", "--ema-decay", "0.9") == 0
    capsys.readouterr()
    assert run(inputs, tmp_path / "run", "--ema-decay", decay, "--resume", "--cache", str(tmp_path / "new")) == 2
    refused(capsys, "belongs to another run", f"ema_decay was 0.9 and is now {float(decay)}")
    assert not (tmp_path / "new").exists()


def test_a_run_without_the_scores_that_its_loss_needs_encodes_nothing(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(inputs, tmp_path / "run", "--loss", "adpo", "--cache", str(tmp_path / "cache")) == 2
    refused(capsys, "The loss adpo needs a judge's scores of both pictures")
    assert not (tmp_path / "cache").exists()


def test_another_run_is_refused_before_anything_is_encoded(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """And what differs is named by itself, not with all that stands beside it."""
    out = tmp_path / "run"
    assert run(inputs, out) == 0
    capsys.readouterr()
    new = ["--cache", str(tmp_path / "new"), "--reference-draws", "3", "--reference-cache", str(tmp_path / "errors")]
    assert run(inputs, out, "--resume", *new, "--learning-rate", "1e-5") == 2
    told = refused(capsys, "belongs to another run", "optimizer.learning_rate was 0.001 and is now 1e-05")
    assert "weight_decay" not in told and not (tmp_path / "new").exists() and not (tmp_path / "errors").exists()


def test_the_configuration_is_that_of_the_run_as_it_went_on(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert run(inputs, out, "--steps", "3") == 0
    before = json.loads((out / "summary.json").read_text())
    assert run(inputs, out, "--steps", "3", "--resume", "--log-every", "2") == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["loop"]["log_every"] == 2
    after = json.loads((out / "summary.json").read_text())
    assert after["seconds"] > after["seconds_training"] > 0.5 * before["seconds_training"] > 0  # till the last checkpoint
    assert after["waiting"] == before["waiting"]  # of the steps that were done
    before = (out / "config.yaml").read_bytes()
    assert run(inputs, out, "--resume", "--steps", "3", "--beta", "7") == 2
    assert (out / "config.yaml").read_bytes() == before  # a refused one has changed nothing
    capsys.readouterr()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("# a run that was refused\n")
    assert run(inputs, tmp_path / "begun", "--resume", "--beta", "7") == 0
    assert "there is no checkpoint yet: the run begins anew" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "begun" / "config.yaml").read_text())["objective"]["beta"] == 7


def test_a_refused_runs_own_cache_is_not_in_the_way_when_the_data_are_mended(inputs: Inputs, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "data", 8, broken=2)
    assert run(inputs, tmp_path / "run", pairs=pairs) == 2
    whole = write_pairs(tmp_path / "whole", 8)
    for file in whole.parent.iterdir():
        (pairs.parent / file.name).write_bytes(file.read_bytes())
    assert run(inputs, tmp_path / "run", pairs=pairs) == 0
    assert not json.loads((tmp_path / "run" / "cache" / "complete.json").read_text())["skipped"]


def test_a_lost_shard_is_prepared_again(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    assert run(inputs, tmp_path / "run", *cache, "--prepare") == 0
    (tmp_path / "cache" / "images" / "00000.moments.npy").unlink()
    assert run(inputs, tmp_path / "run", *cache) == 2
    refused(capsys, "images/00000.moments.npy", "--prepare encodes what is lost")
    assert run(inputs, tmp_path / "run", *cache, "--prepare") == 0
    assert "lost or cut short, and made anew: images/00000.moments.npy" in " ".join(capsys.readouterr().out.split())
    assert run(inputs, tmp_path / "run", *cache) == 0


def test_options_that_would_do_nothing(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("reference-cache", "reference-seed", "reference-batch"):
        assert run(inputs, tmp_path / "run", f"--{name}", "5") == 2
        refused(capsys, f"reference.{name.replace('-', '_')}: is about cached errors of the reference, and reference_draws is 0")
    for name in ("resume", "overwrite"):
        assert run(inputs, tmp_path / "run", "--cache", str(tmp_path / "cache"), "--prepare", f"--{name}") == 2
        refused(capsys, "--prepare always goes on where it stopped")


@pytest.mark.parametrize("where", ["metrics", "configuration"])
def test_a_disk_that_takes_no_more_is_told_in_a_sentence(
    where: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    names = {"metrics": "metrics.jsonl", "configuration": "config.yaml"}
    opened = Path.open

    def full(path: Path, *how: object, **more: object) -> object:
        if names[where] in path.name and {*how, more.get("mode")} & {"a", "w", "wb"}:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", full)
    assert run(inputs, tmp_path / "run") == 2
    refused(capsys, names[where], "could not be written: the disk is full")


def test_ctrl_c_while_options_are_read_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Those of objectives come with their modules, and torch takes seconds to import."""

    def interrupted(asked: str | None) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupted)
    assert cli.main(["train", "diffusion-dpo"]) == 130
    assert capsys.readouterr().err == "Interrupted before anything was begun.\n"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["train", "diffusion-dpo", "--debug"])
