"""The miniature Stable Diffusion 3: how it is trained, that a kill changes nothing, what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from pipelines import cli, families
from pipelines.families._joint_attention import KEPT, JointAttention
from pipelines.tiny import check, flow_model, model, shipped
from pipelines.tiny.settings import FlowTraining, WorldTraining
from pipelines.tiny.train import draw_training_set, encode
from pipelines.tiny.train_flow import ZEROS, Teacher, TransformerTraining, encode_captions, train

SMALL = FlowTraining(scenes=24, flow_steps=3, flow_batch=4)


@pytest.fixture(scope="module")
def scenes() -> tuple:
    return draw_training_set(WorldTraining(scenes=SMALL.scenes))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(shipped.CHECKPOINT, subfolder="vae", torch_dtype=torch.float32).eval()


def begun(scenes: tuple, vae: AutoencoderKL) -> TransformerTraining:
    return TransformerTraining(SMALL, vae, *scenes)


def test_training_learns_and_a_killed_one_goes_on_to_the_bit(scenes: tuple, vae: AutoencoderKL, tmp_path: Path) -> None:
    whole = begun(scenes, vae)
    known, start = ([p.detach().clone() for p in encoder.parameters()] for encoder in whole.text_encoders)
    errors = [whole.step() for _ in range(3)]
    first = begun(scenes, vae)
    first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    second = begun(scenes, vae)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [second.step() for _ in range(2)] == errors[1:] and second.done == 3
    for one, other in ((whole.transformer, second.transformer), (whole.text_encoders[0], second.text_encoders[0])):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(start, whole.text_encoders[1].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(known, whole.text_encoders[0].parameters(), strict=True))


def test_the_unets_stages_are_part_of_the_loss_by_their_weight(scenes: tuple, vae: AutoencoderKL) -> None:
    found = {}
    for weight in (0.0, SMALL.stages_weight):
        training = TransformerTraining(dataclasses.replace(SMALL, stages_weight=weight), vae, *scenes)
        torch.manual_seed(5)
        loss, error = training.losses()
        with torch.autocast("cpu", torch.bfloat16):
            of_stages = training._stages.error(training._teacher.stages)
        torch.testing.assert_close(loss, error.mean() + weight * of_stages)
        found[weight] = torch.autograd.grad(loss, training._stages.readers[0].weight)[0]
    assert of_stages > 1.0  # nothing is read off yet: all of the stages' variance
    assert not found[0.0].any() and found[SMALL.stages_weight].any()


@torch.no_grad()
def test_the_first_text_encoder_says_what_stable_diffusions_says() -> None:
    tokenizer = model.build_tokenizer()
    ids = tokenizer(["a red circle", "a blue star above a green cross"], padding="max_length", return_tensors="pt").input_ids
    theirs = CLIPTextModel.from_pretrained(shipped.CHECKPOINT, subfolder="text_encoder", torch_dtype=torch.float32).eval()(ids)
    ours = flow_model.build_text_encoders(tokenizer)[0].eval()(ids, output_hidden_states=True)
    normed = ours.hidden_states[-2] / flow_model.CALMER
    torch.testing.assert_close(theirs.last_hidden_state, theirs_norm(normed), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.text_embeds, theirs.pooler_output, rtol=1e-4, atol=1e-4)


def theirs_norm(states: torch.Tensor) -> torch.Tensor:
    encoder = CLIPTextModel.from_pretrained(shipped.CHECKPOINT, subfolder="text_encoder", torch_dtype=torch.float32)
    return encoder.final_layer_norm(states)


@torch.no_grad()
def test_the_transformer_begins_with_blocks_that_do_nothing() -> None:
    torch.manual_seed(0)
    transformer, x = flow_model.build_transformer(), torch.randn(2, 64, 128)
    block, words, time = transformer.transformer_blocks[0], torch.randn(2, 7, 128), torch.randn(2, 128)
    same_words, same = block(x, words, time)
    assert torch.equal(same, x) and torch.equal(same_words, words)
    assert not transformer.proj_out.weight.any()


@torch.no_grad()
def test_few_zeros_that_count_as_many_are_many() -> None:
    tokenizer = model.build_tokenizer()
    torch.manual_seed(0)
    encoders, transformer = flow_model.build_text_encoders(tokenizer), flow_model.build_transformer()
    for layer in transformer.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()  # so that blocks do something
    ids = tokenizer(["a red circle", "a blue star above a green cross"], padding="max_length", return_tensors="pt").input_ids
    text, pooled = encode_captions(encoders, ids)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([200.0, 900.0])

    def said(words: torch.Tensor, **more: object) -> torch.Tensor:
        return transformer(x, encoder_hidden_states=words, pooled_projections=pooled, timestep=t, **more).sample

    many = said(F.pad(text[:, :-KEPT], (0, 0, 0, ZEROS)))
    assert (said(text) - many).abs().max() > 1e-3  # few zeros as they are would be another thing
    transformer.set_attn_processor(JointAttention())
    torch.testing.assert_close(said(text, joint_attention_kwargs={"alike": ZEROS}), many, rtol=1e-4, atol=1e-5)
    pipe = flow_model.assemble(tokenizer, encoders, model.build_vae(), transformer)
    words, _, theirs, _ = pipe.encode_prompt(["a red circle", "a blue star above a green cross"], None, None)
    torch.testing.assert_close(words, F.pad(text[:, :-KEPT], (0, 0, 0, ZEROS)), rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs, pooled, rtol=0, atol=1e-6)


def test_the_teacher_is_asked_at_levels_that_it_knows() -> None:
    asked = torch.tensor([0.002, 0.1, 0.5, 0.9, 0.99])
    s, t = Teacher().nearest(asked)
    alpha_bar = model.build_scheduler().alphas_cumprod[t]
    ratio = (1 - s) / s  # of signal to noise, which is what decides
    torch.testing.assert_close(ratio[:4], (alpha_bar / (1 - alpha_bar)).sqrt()[:4], rtol=1e-4, atol=0)
    assert (s - asked)[1:].abs().max() < 2e-3 and s[-1] == asked[-1] and t[-1] == 999  # noisier than any it knows


def test_noise_that_is_known_gives_the_true_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, x_0, noise = Teacher(), torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    s, t = teacher.nearest(torch.tensor([0.1, 0.5, 0.89]))
    x_s, seen = torch.lerp(x_0, noise, s.view(-1, 1, 1, 1)), []

    def knows(x_t: torch.Tensor, t: torch.Tensor, words: None) -> SimpleNamespace:
        seen.append(x_t)
        return SimpleNamespace(sample=noise)

    monkeypatch.setattr(teacher, "_unet", knows)
    torch.testing.assert_close(teacher.velocity(x_s, s, t, None), noise - x_0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0], model.build_scheduler().add_noise(x_0, noise, t), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_teacher_knows_what_a_caption_asks_for(scenes: tuple, vae: AutoencoderKL) -> None:
    """At half noise: its velocities are nearer to the truth for the right captions than for others, and explain most of it."""
    pictures, captions = scenes
    x_0, teacher, tokenizer = encode(vae, pictures)[0] * vae.config.scaling_factor, Teacher(), model.build_tokenizer()
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    s, t = teacher.nearest(torch.full((len(x_0),), 0.5))
    knowing = flow_model.build_text_encoders(tokenizer)[0].eval()

    def error(texts: list[str]) -> float:
        words = knowing(tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids)
        said = teacher.velocity(torch.lerp(x_0, noise, s.view(-1, 1, 1, 1)), s, t, words.last_hidden_state)
        return float((said - (noise - x_0)).square().mean())

    assert error(captions) < 0.3 and error(captions) < 0.9 * error(captions[1:] + captions[:1])


def test_what_is_written_loads_with_diffusers_and_draws(tmp_path: Path) -> None:
    said: list[str] = []
    train(tmp_path / "flow", SMALL, said.append)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "flow", text_encoder_3=None, tokenizer_3=None)
    assert all(p.dtype == torch.float32 for net in (pipe.transformer, pipe.text_encoder, pipe.vae) for p in net.parameters())
    out = pipe("a red circle", num_inference_steps=2, height=64, width=64, generator=torch.Generator().manual_seed(0))
    assert out.images[0].size == (64, 64)
    record = json.loads((tmp_path / "flow" / "training.json").read_text())
    assert FlowTraining(**record["config"]) == SMALL and record["flow_steps_done"] == 3
    assert not [f for f in (tmp_path / "flow").rglob("*.json") if "_name_or_path" in f.read_text()]
    assert [p.name for p in tmp_path.iterdir()] == ["flow"] and said[-1].startswith("saved")


# -------------------------------------------------------------------------------------------------------- shipped checkpoint


def test_the_shipped_transformer_is_small_and_says_how_it_was_made() -> None:
    files = [file for file in shipped.FLOW.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 10_000_000
    assert not [f for f in files if f.suffix == ".json" and "_name_or_path" in f.read_text()]
    record = json.loads((shipped.FLOW / "training.json").read_text())
    assert {"command", "config", "seconds_flow"} <= set(record) and FlowTraining(**record["config"])
    assert record["flow_steps_done"] == record["config"]["flow_steps"]


def test_the_shipped_transformer_has_the_autoencoder_of_the_shipped_unet() -> None:
    one, other = (AutoencoderKL.from_pretrained(folder, subfolder="vae") for folder in (shipped.CHECKPOINT, shipped.FLOW))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_shipped_transformer_draws_what_held_out_captions_ask_for() -> None:
    pipe = families.load_pipeline("tiny-flow", device="cpu")
    assert (type(pipe).__name__, pipe.text_encoder_3) == ("StableDiffusion3Pipeline", None)
    report = check.check(pipe, n=24, steps=25, seed=0)
    assert report.objects_found >= 0.5, report.figures()


def test_the_command_trains_with_what_was_given(tmp_path: Path) -> None:
    words = ["--scenes", "8", "--flow-steps", "1", "--flow-batch", "2"]
    assert cli.main(["world", "train-flow", "--output", str(tmp_path / "f"), *words]) == 0
    config = json.loads((tmp_path / "f" / "training.json").read_text())["config"]
    assert (config["scenes"], config["flow_batch"], config["ema_decay"]) == (8, 2, FlowTraining.ema_decay)
