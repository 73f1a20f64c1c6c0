"""What is particular to the families that follow a flow: levels and time as their networks know them, guidance that is told,
optional parts, and what is refused."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from family_runs import PROMPTS, Saved, on_disk, run, write_pairs
from miniatures import MINIATURES, PIXELS
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.schedule import FlowSchedule
from diffalign.solvers import Guided
from diffalign.sources.rollout import Sampling, chain, rollout
from pipelines import cli, families, sampling
from pipelines.evaluation import evaluate
from pipelines.export import Export, export
from pipelines.families import _reading, flux
from pipelines.generation import generate
from pipelines.image_settings import EvaluationSettings
from pipelines.training import align

FLOWS = ("sd3", "flux", "sana", "z_image")
NAMES = [name for name, one in MINIATURES.items() if one.family in FLOWS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flows")


@pytest.fixture(scope="module")
def pairs(folders: Path) -> Path:
    return write_pairs(folders / "data")


@pytest.fixture(params=NAMES)
def flow(request: pytest.FixtureRequest, folders: Path) -> Saved:
    return on_disk(request.param, folders)


class Heard:
    """What a network is told, call by call; also by position."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        network.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, network: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        names = ("hidden_states", "timestep")  # of those that are called without names
        self.calls.append({**dict(zip(names, args, strict=False)), **kwargs})

    def times(self) -> list[float]:
        """The first sample's time in each call."""
        return [float(call["timestep"][0]) for call in self.calls]

    def told(self) -> set[str]:
        """The names of what the first call gave, but for how attention is computed (``test_few_zeros``)."""
        how = {"return_dict", "joint_attention_kwargs", "attention_kwargs"}
        return {name for name, value in self.calls[0].items() if value is not None} - how


def words(family: Any) -> dict[str, Tensor]:
    return family.encoder.encode_prompts(PROMPTS)


# ------------------------------------------------------------------------------------------------------ levels and time


@torch.no_grad()
def test_the_network_is_told_the_time_that_the_pipeline_tells_it(flow: Saved) -> None:
    """t, t / T, 1 - t / T or the whole part of t: in sampling, and likewise for a level of training."""
    family, pipe = families.load_family(flow.folder), flow.pipeline()
    theirs, ours = Heard(pipe.transformer), Heard(family.network)
    flow.latents(pipe, steps=4, guidance_scale=flow.miniature.guidance(1.0))
    schedule, shape = family.denoiser.schedule, family.latent_shape(PIXELS)
    grid, x = schedule.grid(4, shape).expand(2, -1), torch.randn(2, *shape)
    chain(family.denoiser, schedule, x, words(family), grid, Sampling(4, eta=0.0))
    assert len(ours.times()) == 4
    np.testing.assert_allclose(ours.times(), theirs.times(), rtol=1e-6, atol=1e-6)
    assert ours.told() == theirs.told()


def test_training_visits_noise_as_diffusers_script_for_sd3_does(folders: Path) -> None:
    """logit-normal(0, 1), looked up among the levels of a scheduler with shift 3."""
    schedule = families.load_family(on_disk("sd3", folders).folder).denoiser.schedule
    levels, generator = schedule.levels(), torch.Generator().manual_seed(0)
    ours = torch.tensor([levels.drawn(generator) for _ in range(4000)]) / 1000
    drawn = compute_density_for_timestep_sampling("logit_normal", 20000, 0.0, 1.0, generator=generator)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps[(drawn * 1000).long()] / 1000
    parts = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(ours.quantile(parts), theirs.quantile(parts), rtol=0, atol=0.02)
    assert ours.median().item() == pytest.approx(0.75, abs=0.02)  # 3 / (1 + 3)


@pytest.mark.parametrize(
    ("name", "shift"), [("sd3", 3.0), ("flux", math.exp(1.15)), ("flux schnell", 1.0), ("sana", 3.0), ("z_image", 3.0)]
)
def test_the_shift_of_training_is_that_of_sampling_at_the_models_own_size(name: str, shift: float, folders: Path) -> None:
    family = families.load_family(on_disk(name, folders).folder)
    trained = family.denoiser.schedule.trained_levels
    assert trained.shape == "logit-normal" and (trained.mean, trained.std) == (0.0, 1.0)
    assert trained.shift == pytest.approx(shift)


def test_sampling_bends_by_the_pictures_own_size(folders: Path) -> None:
    """FLUX: more tokens, noisier levels."""
    schedule = families.load_family(on_disk("flux", folders).folder).denoiser.schedule
    small, large = (schedule.grid(4, (8, side, side)) for side in (8, 128))
    assert (large[1:] > small[1:]).all() and large[0] == small[0] == 1000


# ------------------------------------------------------------------------------------------------------------- sampling


def test_a_flow_is_sampled_as_saved_without_being_told(flow: Saved) -> None:
    pipe = families.load_pipeline(flow.folder, device="cpu")
    how: dict[str, Any] = {"seeds": [1, 2], "steps": 2, "height": PIXELS, "width": PIXELS}
    assert sampling.sampler_of(pipe, "auto") == "as saved"
    first, second = (sampling.sample(pipe, PROMPTS, **how, **more)[0] for more in ({}, {"sampler": "as saved"}))
    assert first.size == (PIXELS, PIXELS) and first.tobytes() == second.tobytes()
    with pytest.raises(UserError, match="Use the sampler 'auto' or 'as saved'"):
        sampling.sample(pipe, PROMPTS, **how, sampler="ddim")


@pytest.mark.parametrize(("name", "guidance"), [("sd3", 7.0), ("flux", 3.5), ("sana", 4.5)])
def test_the_comparison_takes_sampler_and_guidance_of_the_family(
    name: str, guidance: float, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``diffalign train`` at its end and ``diffalign generate``, without an option; Sana's size is that of its network."""
    folder, size = on_disk(name, folders).folder, {"height": PIXELS, "width": PIXELS}
    load = partial(families.load_pipeline, device="cpu")
    made = evaluate(str(folder), str(folder), PROMPTS, ["jpeg"], tmp_path / "evaluation", load=load, steps=1, **size).values
    assert (made["sampler"], made["guidance_scale"]) == ("as saved", guidance)
    own = {} if name == "sana" else size
    record = generate(str(folder), PROMPTS[:1], tmp_path / "pictures", load=load, steps=1, **own)
    assert (record["sampler"], record["guidance_scale"]) == ("as saved", guidance)
    with Image.open(tmp_path / "pictures" / "00000.png") as picture:
        assert picture.size == (PIXELS, PIXELS)
    assert EvaluationSettings().guidance_scale is None


@pytest.mark.parametrize(("name", "layers"), [("sd3", "add_k_proj"), ("flux", "ff_context.net.2"), ("sana", "attn2.to_v")])
def test_a_run_adapts_the_layers_of_its_family(name: str, layers: str, folders: Path, pairs: Path, tmp_path: Path) -> None:
    saved = on_disk(name, folders)
    run(saved, pairs, "sft", tmp_path / "run", adapter="lora")
    found = families.read_adapter(tmp_path / "run")
    assert set(found.targets) == set(families.load_family(saved.folder)._lora_targets)
    assert any(f".{layers}.lora_A" in part for part in found.weights)


def test_rollouts_have_a_density_and_share_their_start(flow: Saved) -> None:
    family = families.load_family(flow.folder)
    schedule, shape = family.denoiser.schedule, family.latent_shape(PIXELS)
    empty = family.encoder.encode_prompts([""])
    how: dict[str, Any] = {"shape": shape, "seeds": [1, 2], "start_seeds": [5, 5], "unconditional": empty}
    made = rollout(family.denoiser, schedule, words(family), Sampling(3, eta=0.7, guidance=2.0), **how)
    assert torch.equal(made.x[0, 0], made.x[1, 0]) and not torch.equal(made.final[0], made.final[1])
    assert made.has_noise[:, :-1].all() and not made.has_noise[:, -1].any()
    again = schedule.log_density(made.x[:, 1], made.x[:, 0], made.prediction[:, 0], made.t[:, 0], made.t_previous[:, 0], 0.7)
    torch.testing.assert_close(again, made.log_density[:, 0], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "z_image"])
def test_checkpointing_and_half_precision_change_no_more_than_they_should(name: str, folders: Path) -> None:
    family = families.load_family(on_disk(name, folders).folder)
    family.attach_lora(rank=2, seed=1)
    for parameter in family.denoiser.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, said = torch.randn(2, *family.latent_shape(PIXELS)), torch.tensor([700.0, 20.5]), words(family)

    def gradients() -> dict[str, Tensor]:
        family.network.zero_grad()
        family.denoiser(x, t, said).square().mean().backward()
        return {n: p.grad.clone() for n, p in family.network.named_parameters() if p.grad is not None}

    plain = gradients()
    assert plain and all(g.isfinite().all() for g in plain.values())
    calls = Heard(next(m for m in family.network.modules() if type(m).__name__.endswith("Block"))).calls
    family.set_gradient_checkpointing(True)
    kept = gradients()
    assert len(calls) == 2  # forwards, and again on the way back
    assert plain.keys() == kept.keys()
    for part, gradient in plain.items():
        torch.testing.assert_close(kept[part], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        expected = family.denoiser(x, t, said)
        half = families.load_family(on_disk(name, folders).folder, dtype="bf16")
        found = half.denoiser(x, t, said)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert half.network.dtype == torch.bfloat16 and found.shape == expected.shape


def test_the_networks_own_attention_stays(folders: Path) -> None:
    """Diffusers' switch for xformers, off, would replace SD3's joint and Sana's linear attention by a plain one."""
    for name in ("sd3", "sana"):
        family = families.load_family(on_disk(name, folders).folder)
        before = {place: type(one) for place, one in family.network.attn_processors.items()}
        family.set_attention("sdpa")
        assert {place: type(one) for place, one in family.network.attn_processors.items()} == before
        with pytest.raises(UserError, match=f"xformers is for UNets; {name} has a transformer"):
            family.set_attention("xformers")


# ----------------------------------------------------------------------------------------------------------------- FLUX


def test_flux_packs_as_its_pipeline_does() -> None:
    x = torch.randn(2, 16, 6, 10)
    tokens = flux.packed(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, *x.shape))
    assert torch.equal(flux.unpacked(tokens, (6, 10)), x)
    assert torch.equal(flux.places(x), FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32))


def test_flux_is_told_its_guidance_in_one_call(folders: Path) -> None:
    family = families.load_family(on_disk("flux", folders).folder)
    heard, x, t = Heard(family.network), torch.randn(2, *family.latent_shape(PIXELS)), torch.tensor([700.0, 20.0])
    family.denoiser(x, t, words(family))
    Guided(family.denoiser, family.encoder.encode_prompts([""]), 3.5)(x, t, words(family))
    assert [call["guidance"].tolist() for call in heard.calls] == [[1.0, 1.0], [3.5, 3.5]]
    schnell = families.load_family(on_disk("flux schnell", folders).folder)
    heard = Heard(schnell.network)
    Guided(schnell.denoiser, schnell.encoder.encode_prompts([""]), 1.0)(x, t, words(schnell))
    assert [call["guidance"] for call in heard.calls] == [None]


@pytest.mark.parametrize(("name", "usual"), [("sd3", 7.0), ("flux", 3.5), ("flux schnell", 1.0), ("sana", 4.5), ("z_image", 6.0)])
def test_a_run_says_what_guidance_the_model_is_used_with(
    name: str, usual: float, folders: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for guidance in (usual, 2.0):
        run(on_disk(name, folders), pairs, "ddpo", tmp_path / str(guidance), adapter="lora", steps=1, guidance=guidance)
        said = f"trajectories are sampled with guidance 2; the model's own pipeline uses {usual:g}"
        assert (said in capsys.readouterr().out) == (guidance == 2.0)


@pytest.mark.parametrize(("objective", "told"), [("diffusion-dpo", {1.0}), ("d3po", {2.0})])
def test_flux_is_trained_with_the_guidance_of_its_objective(
    objective: str, told: set[float], folders: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3PO's guidance of 2 (``family_runs.SMALL``) reaches the network when it samples and when it learns."""
    heard: list[float] = []
    predict = flux.FluxDenoiser.predict

    def listened(self: Any, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        heard.extend(conditioning["guidance"].tolist())
        return predict(self, x_t, t, conditioning)

    monkeypatch.setattr(flux.FluxDenoiser, "predict", listened)
    run(on_disk("flux", folders), pairs, objective, tmp_path / "run", adapter="lora")
    assert set(heard) == told


# ------------------------------------------------------------------------------------------------------------------ SD3


def test_a_run_without_t5(folders: Path, pairs: Path, tmp_path: Path) -> None:
    where = {"model": str(on_disk("sd3", folders).folder), "pairs": str(pairs)}
    small = {"resolution": PIXELS, "steps": 1, "batch_size": 2, "validation_pairs": 1, "tracker": "none", "progress": False}
    align("sft", **where, **small, output=tmp_path / "run", without=("t5",))
    about = json.loads(next((tmp_path / "run").rglob("fingerprint.json")).read_text())
    assert about["encoder"]["text_3"] is None
    assert families.load_pipeline(tmp_path / "run", device="cpu").text_encoder_3 is None  # the LoRA remembers
    export(Export(str(tmp_path / "run"), tmp_path / "exported", "diffusers"))
    assert families.load_pipeline(tmp_path / "exported", device="cpu").text_encoder_3 is None


def test_commands_that_sample_leave_t5_out(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command as typed; what it read is seen by the loader of the weights."""
    model, read_now, had = str(on_disk("sd3", folders).folder), _reading.read, []

    def listened(*args: Any, **options: Any) -> Any:
        pipe = read_now(*args, **options)
        had.append(pipe.text_encoder_3 is not None)
        return pipe

    monkeypatch.setattr(families, "read", listened)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    sampled = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--device", "cpu"]
    size = ["--height", str(PIXELS), "--width", str(PIXELS)]
    for without in (["--without", "t5"], []):
        out = str(tmp_path / f"out{len(without)}")
        assert cli.main(["generate", "--model", model, "--out", f"{out}-g", *sampled, *size, *without]) == 0
        compared = ["--base", model, "--tuned", model, "--judge", "jpeg"]
        assert cli.main(["evaluate", *compared, "--out", f"{out}-e", *sampled, *size, *without]) == 0
        assert cli.main(["rollout", "--model", model, "--out", f"{out}-r", "--guidance", "1", *sampled, *without]) == 0
        assert set(had) == {not without}
        had.clear()
    left = json.loads((tmp_path / "out2-r" / "rollout.json").read_text())["called"]["without"]
    assert left == ["t5"]


@torch.no_grad()
def test_sd3_without_t5_says_what_its_pipeline_says_without(folders: Path, tmp_path: Path) -> None:
    saved = on_disk("sd3", folders)
    family = families.load_family(saved.folder, without=("t5",))
    assert family.encoder.components == ("vae", "text_encoder", "text_encoder_2")
    pipe = saved.pipeline()
    pipe.text_encoder_3 = None
    expected = saved.miniature.said(pipe, PROMPTS)[0]
    found = words(family)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert (found["encoder_hidden_states"][:, -256:] == 0).all()
    assert family.encoder.fingerprint() != families.load_family(saved.folder).encoder.fingerprint()
    assert family.pipeline().text_encoder_3 is None
    assert families.load_pipeline(saved.folder, device="cpu", without=("t5",)).tokenizer_3 is None
    family.release_encoders()
    family.save_pipeline(tmp_path / "whole")
    assert Saved(saved.miniature, tmp_path / "whole").pipeline().text_encoder_3 is not None  # left out, not lost


def test_only_what_a_family_can_do_without_is_left_out(folders: Path) -> None:
    with pytest.raises(UserError, match="sd3, which cannot do without 'vae': what may be left out is t5"):
        families.load_family(on_disk("sd3", folders).folder, without=("vae",))
    with pytest.raises(UserError, match="flux, which cannot do without 't5': nothing may be left out of it"):
        families.load_family(on_disk("flux", folders).folder, without=("t5",))


# ----------------------------------------------------------------------------------------------------------------- Sana


@torch.no_grad()
def test_sanas_empty_prompt_goes_without_the_instruction(folders: Path) -> None:
    encoder = families.load_family(on_disk("sana", folders).folder).encoder
    both = encoder.encode_prompts(["", " "])  # a blank is a prompt, if not much of one
    empty, blank = both["encoder_attention_mask"].sum(dim=1).tolist()
    assert empty == 1 and blank == 2  # the first token, and the last one of the instruction
    alone = encoder.encode_prompts([""])
    for name, value in alone.items():
        assert torch.equal(both[name][:1], value)


def test_sana_is_told_whole_levels_only_where_its_solver_tells_them(folders: Path) -> None:
    for name, expected in (("sana", [700.0, 20.0]), ("sana with Euler's steps and a scaled time", [350.375, 10.25])):
        family = families.load_family(on_disk(name, folders).folder)
        heard, x = Heard(family.network), torch.randn(2, *family.latent_shape(PIXELS))
        family.denoiser(x, torch.tensor([700.75, 20.5]), words(family))
        assert heard.calls[0]["timestep"].tolist() == expected


# ------------------------------------------------------------------------------------------------------------- refusals


def test_pictures_that_cannot_be_cut_into_patches_are_refused(folders: Path, pairs: Path, tmp_path: Path) -> None:
    saved = on_disk("flux", folders)
    with pytest.raises(UserError, match="sides are multiples of 8 pixels, 32 or 40; got 36"):
        families.load_family(saved.folder).latent_shape(36)
    with pytest.raises(UserError, match="sides are multiples of 8 pixels"):
        align("sft", model=str(saved.folder), pairs=str(pairs), output=tmp_path / "run", resolution=36)
    for name, odd in (("pixart", PIXELS + 4), ("sana", PIXELS + 1)):  # Sana's autoencoder takes whole latent pixels only
        with pytest.raises(UserError, match="sides are multiples of"):
            families.load_family(on_disk(name, folders).folder).latent_shape(odd)


def test_what_is_no_plain_flow_is_refused(folders: Path) -> None:
    from pipelines.families import sd3

    pipe = on_disk("sd3", folders).pipeline()
    with pytest.raises(UserError, match="prediction_type 'epsilon' is not known for this family; it is velocity"):
        sd3.build(pipe, prediction_type="epsilon")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    with pytest.raises(UserError, match="use_karras_sigmas is set"):
        sd3.build(pipe)
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(UserError, match="a EulerDiscreteScheduler does not follow. It should be a FlowMatchEuler"):
        sd3.build(pipe)
    pipe.text_encoder_2 = None
    with pytest.raises(UserError, match="only the third, T5, may lack"):
        sd3.build(pipe)
    pipe = on_disk("flux", folders).pipeline()
    pipe.transformer.register_to_config(in_channels=48)
    with pytest.raises(UserError, match="takes 48 channels where the autoencoder gives 32 a token"):
        flux.build(pipe)


def test_every_flow_is_one(flow: Saved) -> None:
    schedule = families.load_family(flow.folder, prediction_type="velocity").denoiser.schedule
    assert isinstance(schedule, FlowSchedule) and schedule.prediction_type == "velocity"
