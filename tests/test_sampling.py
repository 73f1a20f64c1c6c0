"""Pictures depend on prompt and seed alone; grids can be read."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from miniatures import MINIATURES
from PIL import Image

from diffalign.errors import UserError
from pipelines import grids, sampling
from pipelines.evaluation import evaluate
from pipelines.generation import generate
from pipelines.tiny import model

PROMPTS = ["a red circle", "a blue star above a green cross", "a large cyan square", "a purple triangle"]


def build_pipe(seed: int = 0):
    torch.manual_seed(seed)
    tokenizer = model.build_tokenizer()
    return model.assemble(tokenizer, model.build_text_encoder(tokenizer), model.build_vae(), model.build_unet())


@pytest.fixture(scope="module")
def pipe():
    return build_pipe()


def as_arrays(images) -> np.ndarray:
    return np.stack([np.asarray(i, dtype=np.int16) for i in images])


def test_pictures_do_not_depend_on_the_batch(pipe):
    seeds = sampling.picture_seeds(4, 1, seed=3)
    together = as_arrays(sampling.sample(pipe, PROMPTS, seeds=seeds, steps=2, batch_size=4))
    alone = as_arrays(sampling.sample(pipe, PROMPTS, seeds=seeds, steps=2, batch_size=1))
    reversed_ = as_arrays(sampling.sample(pipe, PROMPTS[::-1], seeds=seeds[::-1], steps=2, batch_size=3))
    assert together.shape == (4, 64, 64, 3)
    assert np.abs(together - alone).max() <= 1
    assert np.abs(together - reversed_[::-1]).max() <= 1
    assert np.abs(together[0] - together[1]).mean() > 2


def test_seed_and_prompt_decide_the_picture(pipe):
    def draw(prompt: str, seed: int) -> np.ndarray:
        return as_arrays(sampling.sample(pipe, [prompt], seeds=[seed], steps=2, guidance_scale=7.5))

    assert np.array_equal(draw("a red circle", 1), draw("a red circle", 1))
    assert not np.array_equal(draw("a red circle", 1), draw("a red circle", 2))
    assert not np.array_equal(draw("a red circle", 1), draw("a blue star", 1))


def test_seeds_of_pictures_stay_when_prompts_are_added():
    few, many = sampling.picture_seeds(3, 2, seed=5), sampling.picture_seeds(10, 2, seed=5)
    assert many[:6] == few
    assert len(set(many)) == 20
    assert all(0 <= s < 2**32 for s in many)
    assert not set(many) & set(sampling.picture_seeds(10, 2, seed=6))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler", "as-saved"])
def test_every_sampler_samples_and_gives_the_scheduler_back(pipe, sampler):
    saved = pipe.scheduler
    images = sampling.sample(pipe, PROMPTS[:2], seeds=[1, 2], steps=3, sampler=sampler)
    assert pipe.scheduler is saved
    assert as_arrays(images).std() > 1


def test_samplers_differ_and_the_saved_one_is_ddim_here(pipe):
    pictures = {s: as_arrays(sampling.sample(pipe, PROMPTS[:1], seeds=[1], steps=3, sampler=s)) for s in sampling.SAMPLERS}
    assert np.array_equal(pictures["ddim"], pictures["as saved"])
    assert not np.array_equal(pictures["ddim"], pictures["euler"])
    assert not np.array_equal(pictures["dpm++"], pictures["euler"])


def test_noise_schedule_of_the_checkpoint_is_kept(pipe):
    seen = []
    inner = build_pipe()
    inner.scheduler = DDIMScheduler.from_config(inner.scheduler.config, prediction_type="v_prediction", beta_end=0.02)
    with sampling._scheduler(inner, "euler"):
        seen.append(inner.scheduler)
    assert type(seen[0]).__name__ == "EulerDiscreteScheduler"
    assert (seen[0].config.prediction_type, seen[0].config.beta_end) == ("v_prediction", 0.02)


def test_unknown_sampler_lists_the_samplers(pipe):
    with pytest.raises(UserError, match="'plms'; the samplers are 'auto', 'ddim', 'dpm\\+\\+', 'euler', 'as saved'"):
        sampling.sample(pipe, PROMPTS[:1], seeds=[1], sampler="plms")


def test_flow_models_are_sampled_as_saved(pipe):
    from diffusers import FlowMatchEulerDiscreteScheduler

    flow = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    with (
        pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler. Use the sampler 'auto' or 'as saved'"),
        sampling._scheduler(flow, "ddim"),
    ):
        raise AssertionError("not refused")


def test_a_negative_prompt_leads_away_and_is_refused_where_it_would_do_nothing(pipe):
    how = {"seeds": [1, 2], "steps": 2, "guidance_scale": 4.0}
    plain, same, away = (
        as_arrays(sampling.sample(pipe, PROMPTS[:2], **how, **negative))
        for negative in ({}, {"negative_prompt": ""}, {"negative_prompt": "a red circle"})
    )
    assert np.array_equal(plain, same) and not np.array_equal(plain, away)
    with pytest.raises(UserError, match="does nothing without guidance, and the scale is 1"):
        sampling.sample(pipe, PROMPTS[:2], **{**how, "guidance_scale": 1.0}, negative_prompt="clutter")
    with pytest.raises(UserError, match="takes its guidance scale as an input"):
        sampling.sample(MINIATURES["flux"].build(), PROMPTS[:1], seeds=[1], steps=1, negative_prompt="clutter")


def test_prompts_and_seeds_must_be_as_many(pipe):
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sampling.sample(pipe, PROMPTS[:2], seeds=[1])


def test_training_mode_is_put_aside_and_comes_back():
    pipe = build_pipe()
    calm = as_arrays(sampling.sample(pipe, PROMPTS[:1], seeds=[1], steps=2))
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert np.array_equal(as_arrays(sampling.sample(pipe, PROMPTS[:1], seeds=[1], steps=2)), calm)
    assert pipe.unet.training and pipe.unet.down_blocks[0].training
    assert not pipe.unet.mid_block.training and not pipe.vae.training


def test_progress_and_size_reach_the_pipeline(pipe):
    done = []
    images = sampling.sample(pipe, PROMPTS[:3], seeds=[1, 2, 3], steps=1, batch_size=2, height=32, width=48, progress=done.append)
    assert done == [2, 1]
    assert [i.size for i in images] == [(48, 32)] * 3


def test_sizes_that_no_picture_can_have_are_answered_with_the_nearest(pipe, tmp_path):
    with pytest.raises(UserError, match=r"height 100: sides are multiples of 8 pixels here; nearest is 96 or 104"):
        sampling.sample(pipe, PROMPTS[:1], seeds=[1], steps=1, height=100)
    for run in (generate, partial(evaluate, "other")):
        with pytest.raises(UserError, match=r"width 77: sides are multiples of 8 pixels here; nearest is 72 or 80"):
            run("net", PROMPTS, *([["jpeg"]] if run is not generate else []), tmp_path / "out", load=None, width=77)
    (tall,) = sampling.sample(pipe, PROMPTS[:1], seeds=[1], steps=1, height=96)  # with the model's own width
    assert tall.size == (64, 96)
    assert not (tmp_path / "out").exists()  # before anything is loaded


def test_pictures_hidden_by_the_safety_checker_say_so():
    images = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))]
    marked = sampling._marked(SimpleNamespace(images=images, nsfw_content_detected=[False, True]))
    assert [bool(i.info.get(sampling.FLAGGED)) for i in marked] == [False, True]


def test_guidance_is_what_the_model_wants(tmp_path):
    pipe = build_pipe()
    assert sampling.guidance_of(pipe) == 7.5
    pipe.save_pretrained(tmp_path)
    (tmp_path / "sampling.json").write_text(json.dumps({"guidance_scale": 3.0}))
    loaded = type(pipe).from_pretrained(tmp_path)
    assert sampling.guidance_of(loaded) == 3.0
    (tmp_path / "sampling.json").write_text("[3]")
    with pytest.raises(UserError, match="sampling.json should read"):
        sampling.guidance_of(loaded)


# ---------------------------------------------------------------------------------------------------------------- grids


def colour(value: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, value)


def test_small_pictures_are_enlarged_by_a_whole_factor_without_smoothing():
    checks = np.zeros((64, 64, 3), dtype=np.uint8)
    checks[::2, ::2] = 255
    sheet = np.asarray(grids.grid([Image.fromarray(checks)], columns=1))
    shown = sheet[grids.MARGIN : grids.MARGIN + 192, grids.MARGIN : grids.MARGIN + 192]
    assert np.array_equal(shown, checks.repeat(3, axis=0).repeat(3, axis=1))


def test_large_pictures_are_reduced_and_all_keep_their_shape():
    sheet = grids.grid([colour((255, 0, 0), (1024, 512)), colour((0, 255, 0), (512, 512))], columns=2)
    assert sheet.width == 2 * grids.MARGIN + 2 * 512 + grids.GAP
    right = np.asarray(sheet)[grids.MARGIN + 128, grids.MARGIN + 512 + grids.GAP :]
    assert (right == (0, 255, 0)).all(axis=1).sum() == 256


def test_grid_places_pictures_row_by_row():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    sheet = grids.grid([colour(c) for c in colours], columns=2)
    step = 192 + grids.GAP
    middle = [(grids.MARGIN + 96 + x * step, grids.MARGIN + 96 + y * (step + 4)) for y, x in ((0, 0), (0, 1), (1, 0))]
    assert [sheet.getpixel(at) for at in middle] == colours


def test_long_captions_are_wrapped_inside_their_column_and_cut():
    lines = grids._wrap("a concept art of a vehicle, cyberpunk, " * 12, 192, 4)
    assert len(lines) == 4 and lines[-1].endswith("...")
    assert all(grids._length(line, grids.TEXT_SIZE) <= 192 for line in lines)
    assert "".join(grids._wrap("x" * 100, 192, 9)) == "x" * 100
    assert grids._wrap("", 192, 4) == []


def test_side_by_side_has_base_left_and_tuned_right_with_text_below():
    base, tuned = [colour((200, 0, 0))], [colour((0, 0, 200))]
    sheet = grids.side_by_side(base, tuned, ["a prompt"], [("0.250", "0.750")])
    assert sheet.getpixel((grids.MARGIN + 96, grids.MARGIN + 96)) == (200, 0, 0)
    assert sheet.getpixel((grids.MARGIN + 192 + 4 + 96, grids.MARGIN + 96)) == (0, 0, 200)
    below = np.asarray(sheet)[grids.MARGIN + 192 : -grids.MARGIN]
    assert (below < 100).any() and sheet.height > grids.MARGIN * 2 + 192 + 30


def test_grids_refuse_lengths_that_differ():
    with pytest.raises(ValueError, match="2 pictures and 1 captions"):
        grids.grid([colour((0, 0, 0))] * 2, 2, ["one"])
    with pytest.raises(ValueError, match="1 base pictures, 2 tuned"):
        grids.side_by_side([colour((0, 0, 0))], [colour((0, 0, 0))] * 2, ["one"])
    with pytest.raises(ValueError, match="0 pictures"):
        grids.grid([], 2)


def test_a_model_saved_with_another_scheduler_is_sampled_by_ddim_without_clipping_on_ddims_own_grid() -> None:
    """PixArt's files are of a DPM-Solver: they say nothing of clipping, and space their levels otherwise."""
    from diffusers import DPMSolverMultistepScheduler
    from miniatures import pixart_sigma

    pipe = pixart_sigma()
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler) and "clip_sample" not in pipe.scheduler.config
    with sampling._scheduler(pipe, "ddim"):
        found = pipe.scheduler
        found.set_timesteps(4)
    assert found.config.clip_sample is False
    assert found.timesteps.diff().tolist() == [-250] * 3  # by as much as each of its steps goes down
    (picture,) = sampling.sample(pipe, ["a red circle"], seeds=[1], steps=2)
    assert picture.size == (32, 32)
