"""The miniature Stable Diffusion: its tokenizer, its files, the script that trains it, and the checkpoint that ships."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from diffalign.errors import UserError
from pipelines import sampling
from pipelines.commands import world
from pipelines.tiny import check, model, scenes
from pipelines.tiny.settings import JudgeTraining, WorldTraining
from pipelines.tiny.train import (
    UNetTraining,
    draw_training_set,
    save_half,
    standardise_latents,
    to_pixels,
    train,
)
from reward_models import oracle

TINY = WorldTraining(scenes=40, vae_crop_steps=2, vae_crop_batch=4, vae_steps=2, vae_batch=4, unet_steps=3, unet_batch=4)
LARGEST = 12_000_000
"""Bytes of weights that may ship."""


@pytest.fixture(scope="module")
def tokenizer():
    return model.build_tokenizer()


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    world.add_arguments(parser)
    return world.run(parser.parse_args(words))


# --------------------------------------------------------------------------------------------------------------- tokenizer


def test_every_word_of_the_grammar_is_one_token(tokenizer) -> None:
    words = model.vocabulary()
    assert {"red", "triangle", "above", "background", "vivid", "centred", ","} <= set(words)
    pieces = {word: tokenizer.tokenize(word) for word in words}
    assert all(p == [word + "</w>"] for word, p in pieces.items()), pieces


def test_captions_are_as_long_as_their_words_and_end_as_clips_do(tokenizer) -> None:
    for caption in scenes.captions(50, seed=0):
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= model.MAX_TOKENS
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_the_longest_caption_is_not_truncated(tokenizer) -> None:
    longest = "a large purple triangle right of a large yellow triangle on a white background, borderless, cluttered, displaced"
    ids = tokenizer(longest, truncation=True).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == longest


@pytest.mark.parametrize("text", ["a photo of a Zebra!", "naïve café", "写真 🎨", "x" * 30, ""])
def test_any_text_becomes_known_tokens_and_comes_back(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert all(0 <= i < len(tokenizer) for i in ids)
    body = ids[1:-1]
    assert tokenizer.unk_token_id not in body
    assert tokenizer.decode(body).replace(" ", "") == text.lower().replace(" ", "")


def test_the_tokenizer_is_the_same_every_time_and_after_saving(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again, loaded = model.build_tokenizer(), type(tokenizer).from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() == loaded.get_vocab()
    text = "a small red circle, vivid and odd"
    assert tokenizer(text).input_ids == again(text).input_ids == loaded(text).input_ids
    assert loaded.model_max_length == model.MAX_TOKENS


# ----------------------------------------------------------------------------------------------------------------- folders


def weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def dtypes(file: Path) -> set[str]:
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        return {tensors.get_slice(name).get_dtype() for name in names}


def test_half_precision_files_load_as_float32_with_the_same_numbers(tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = model.build_text_encoder(tokenizer), model.build_vae(), model.build_unet()
    save_half(tmp_path, model.assemble(tokenizer, *nets))
    assert len(weights(tmp_path)) == 3 and all(dtypes(f) == {"F16"} for f in weights(tmp_path))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    for net, loaded in zip(nets, (pipe.text_encoder, pipe.vae, pipe.unet), strict=True):
        assert net.dtype == torch.float32  # saving left the original as it was
        state = loaded.state_dict()
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}
        assert all(torch.equal(state[k], v.half().float() if v.is_floating_point() else v) for k, v in net.state_dict().items())
    assert sum(f.stat().st_size for f in weights(tmp_path)) <= LARGEST


def test_the_pipeline_is_made_of_genuine_classes_with_sd15s_schedule(tokenizer) -> None:
    pipe = model.assemble(tokenizer, model.build_text_encoder(tokenizer), model.build_vae(), model.build_unet())
    assert {type(c).__module__.split(".")[0] for c in pipe.components.values() if c is not None} == {"diffusers", "transformers"}
    assert not any(net.training for net in (pipe.unet, pipe.vae, pipe.text_encoder))
    alpha_bar = pipe.scheduler.alphas_cumprod
    assert len(alpha_bar) == 1000 and alpha_bar[0].item() == pytest.approx(1 - 0.00085)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == scenes.SIZE


# ---------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    folder, said = tmp_path_factory.mktemp("world") / "checkpoint", []
    train(folder, TINY, say=said.append)
    return folder, said


def test_three_steps_of_training_leave_a_folder_that_samples(trained) -> None:
    folder, said = trained
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    (picture,) = sampling.sample(pipe, ["a red circle"], seeds=[0], steps=2)
    assert isinstance(picture, Image.Image) and picture.size == (scenes.SIZE, scenes.SIZE)
    assert said[-1].startswith("saved") and not folder.with_name(folder.name + ".work").exists()


def test_standardised_latents_leave_the_autoencoder_as_it_was() -> None:
    torch.manual_seed(0)
    vae, (pictures, _) = model.build_vae().eval(), draw_training_set(TINY)
    x = to_pixels(pictures)
    with torch.no_grad():
        vae.quant_conv.weight[1] *= 7.0
        before, sampled = vae.encode(x).latent_dist, torch.randn(len(x), 4, 16, 16)
        picture = vae.decode(before.mean + before.std * sampled).sample
        standardise_latents(vae, pictures)
        after = vae.encode(x).latent_dist
        again = vae.decode(after.mean + after.std * sampled).sample
    torch.testing.assert_close(again, picture, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before.mean, after.mean, atol=0.1)


def test_a_killed_training_of_the_unet_goes_on_to_the_bit(tmp_path: Path) -> None:
    pictures, captions = draw_training_set(TINY)
    vae = model.build_vae().eval()
    whole = UNetTraining(TINY, vae, pictures, captions)
    errors = [whole.step() for _ in range(3)]
    first = UNetTraining(TINY, vae, pictures, captions)
    first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    second = UNetTraining(TINY, vae, pictures, captions)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [second.step() for _ in range(2)] == errors[1:]
    assert all(torch.equal(a, b) for a, b in zip(whole.unet.parameters(), second.unet.parameters(), strict=True))
    assert second.done == 3


def test_training_leaves_its_recipe_and_scales_latents_to_unit_deviation(trained) -> None:
    folder, _ = trained
    record = json.loads((folder / "training.json").read_text())
    assert WorldTraining(**record["config"]) == TINY and record["unet_steps_done"] == 3
    vae = StableDiffusionPipeline.from_pretrained(folder).vae
    assert vae.config.scaling_factor != model.build_vae().config.scaling_factor and vae.config.scaling_factor > 0


def test_training_moved_all_networks(trained) -> None:
    folder, _ = trained
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(TINY.seed + 2)
    start = model.build_text_encoder(pipe.tokenizer), model.build_unet()
    for before, after in zip(start, (pipe.text_encoder, pipe.unet), strict=True):
        moved = [(p.half().float() - q).abs().max().item() for p, q in zip(before.parameters(), after.parameters(), strict=True)]
        assert max(moved) > 1e-4


def test_a_checkpoint_is_checked_and_reported(trained, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(trained[0])
    report = check.check(pipe, n=4, steps=1, seed=1, guidance_scale=2.0)
    verdicts = [oracle.judge(p, c) for p, c in zip(report.pictures, report.captions, strict=True)]
    assert report.captions == tuple(scenes.captions(4, 1, "test"))
    assert report.faithfulness == pytest.approx(sum(v.faithfulness for v in verdicts) / 4)
    assert not report.passed and 0.0 <= report.objects_found < check.BAR
    report.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.figures()
    assert Image.open(tmp_path / "out" / "grid.png").width > 4 * scenes.SIZE


class Painter:
    """A pipeline that draws exactly what it is asked for: the scenes that its captions came from."""

    def __init__(self, pipe: StableDiffusionPipeline, pictures: dict[str, Image.Image]) -> None:
        self.pipe, self.pictures = pipe, pictures

    def __getattr__(self, name: str):
        return getattr(self.pipe, name)

    def __call__(self, prompt: list[str], **options):
        return argparse.Namespace(images=[self.pictures[p] for p in prompt])


def test_a_perfect_painter_passes_the_check(trained) -> None:
    pictures: dict[str, Image.Image] = {}
    wanted, stream = set(scenes.captions(12, 5, "test")), scenes.stream(5, "test", styled=0.0)
    while wanted - set(pictures):
        scene, caption = next(stream)
        pictures.setdefault(caption, scenes.render(scene))
    pipe = Painter(StableDiffusionPipeline.from_pretrained(trained[0]), pictures)
    report = check.check(pipe, n=12, steps=1, seed=5, guidance_scale=1.0)
    assert (report.objects_found, report.relation_kept, report.faithfulness, report.passed) == (1.0, 1.0, 1.0, True)


# -------------------------------------------------------------------------------------------------------- shipped checkpoint


def test_the_shipped_checkpoint_is_small_and_says_how_it_was_made() -> None:
    folder = model.checkpoint_path()
    assert folder.is_dir(), f"the shipped checkpoint is missing: {folder}"
    assert len(weights(folder)) == 3
    assert sum(f.stat().st_size for f in weights(folder)) <= LARGEST
    assert not [f for f in folder.rglob("*.json") if "_name_or_path" in f.read_text()]
    record = json.loads((folder / "training.json").read_text())
    assert {"command", "config", "seconds_vae", "seconds_unet"} <= set(record)
    assert record["unet_steps_done"] == record["config"]["unet_steps"]
    assert WorldTraining(**record["config"])


def test_the_shipped_checkpoint_draws_what_held_out_captions_ask_for() -> None:
    assert model.checkpoint_path().is_dir(), f"the shipped checkpoint is missing: {model.checkpoint_path()}"
    pipe = StableDiffusionPipeline.from_pretrained(model.checkpoint_path())
    report = check.check(pipe, n=24, steps=25, seed=0)
    assert report.objects_found >= 0.75, report.figures()


# ----------------------------------------------------------------------------------------------------------------- command


def test_the_options_of_the_trainings_need_nothing_heavy() -> None:
    code = "from pipelines import cli; import sys; cli.build_parser('world'); print({'torch', 'numpy', 'PIL'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_captions_are_written_one_a_line_from_the_test_split(tmp_path: Path) -> None:
    assert run("captions", "--n", "20", "--seed", "7", "--out", str(tmp_path / "sub" / "p.txt")) == 0
    lines = (tmp_path / "sub" / "p.txt").read_text().splitlines()
    assert lines == scenes.captions(20, 7, "test")


def test_more_captions_than_there_are_is_an_error_not_an_endless_search(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 2500"):
        run("captions", "--n", "2501", "--split", "validation", "--out", str(tmp_path / "p.txt"))
    assert not (tmp_path / "p.txt").exists()


def test_draw_writes_pictures_captions_and_the_truth(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    assert run("draw", "--n", "5", "--seed", "3", "--split", "validation", "--styled", "0", "--out", str(out)) == 0
    captions = (out / "captions.txt").read_text().splitlines()
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == captions and {scenes.split_of(c) for c in captions} == {"validation"}
    for line in lines:
        assert oracle.judge(Image.open(out / line["file"]), line["caption"]).objects_found == 1.0
        assert abs(oracle.taste_of(line["scene"]["style"]) - line["taste"]) < 1e-9
    assert (out / "grid.png").exists() and [p.name for p in tmp_path.iterdir()] == ["scenes"]


def test_folders_in_use_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for words in (("draw", "--out", str(tmp_path)), ("train", "--output", str(tmp_path))):
        with pytest.raises(UserError, match="holds something already"):
            run(*words)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_train_passes_only_what_was_given(tmp_path: Path) -> None:
    out = tmp_path / "c"
    vae = ("--vae-crop-steps", "1", "--vae-crop-batch", "2", "--vae-steps", "1", "--vae-batch", "2")
    settings = ("--scenes", "8", *vae, "--unet-steps", "1", "--unet-batch", "2")
    assert run("train", "--output", str(out), *settings) == 0
    config = json.loads((out / "training.json").read_text())["config"]
    assert (config["scenes"], config["unet_batch"], config["ema_decay"]) == (8, 2, WorldTraining.ema_decay)


def test_pairs_and_check_work_from_the_command_line(trained, tmp_path: Path, capsys) -> None:
    model_folder = str(trained[0])
    sampled = ("--model", model_folder, "--steps", "1")
    assert run("pairs", *sampled, "--n", "2", "--out", str(tmp_path / "p.parquet")) == 0
    assert "2 pairs of" in capsys.readouterr().out and (tmp_path / "p.parquet").exists()
    assert run("check", *sampled, "--n", "2", "--out", str(tmp_path / "report")) == 1
    assert "BELOW THE BAR" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"report.json", "captions.txt", "grid.png"}


@pytest.mark.parametrize(
    "words", [("draw", "--n", "0"), ("captions", "--seed", "-1"), ("pairs", "--flip-rate", "2"), ("check", "--steps", "x")]
)
def test_impossible_numbers_are_refused_while_parsing(words: tuple[str, ...], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*words, "--out", "nowhere")
    assert stopped.value.code == 2 and words[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--caption-dropout", "1.5"),
        ("train", "--kl-weight", "-1"),
        ("train-flow", "--flow-steps", "0"),
        ("train-judge", "--candidates", "1"),
        ("train-judge", "--broken", "nan"),
        ("train-writer", "--lists", "2"),
    ],
)
def test_settings_of_a_training_outside_their_bounds_are_refused_while_parsing(words: tuple[str, ...], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*words, "--output", "nowhere")
    assert stopped.value.code == 2 and words[1] in capsys.readouterr().err


def test_settings_of_a_training_are_checked_in_python_as_well() -> None:
    assert JudgeTraining(sampled=0, candidates=2).sampled == 0
    with pytest.raises(ValueError, match="candidates should be at least 2; got 1"):
        JudgeTraining(candidates=1)


def test_help_of_a_training_names_every_setting_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit):
        run("train", "--help")
    words = " ".join(capsys.readouterr().out.split())
    assert "--unet-steps UNET_STEPS steps of UNet and text encoder (default 8000)" in words
