"""The Stable Diffusion family on an untrained miniature: LoRA, encoders, saving."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from miniature import PROMPTS, draw, edited, make_adapter_matter, sample, save_untrained
from safetensors.torch import load_file, save_file

from diffalign.errors import UserError
from diffalign.protocols import Denoiser, Encoder
from pipelines import families
from pipelines.families import _files
from pipelines.tiny import model as tiny

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def family(folder: Path):
    return families.load_family(folder)


# ------------------------------------------------------------------------------------------------------------ denoiser


def test_the_family_keeps_the_cores_contracts(family) -> None:
    assert isinstance(family.denoiser, Denoiser)
    assert isinstance(family.encoder, Encoder)
    assert "stable_diffusion" in families.names()
    assert family.resolution == 64


def test_denoiser_is_the_unet(family) -> None:
    x_t, t, conditioning = draw()
    with torch.no_grad():
        expected = family.network(x_t, t, encoder_hidden_states=conditioning["encoder_hidden_states"]).sample
        assert torch.equal(family.denoiser(x_t, t, conditioning), expected)


def test_schedule_is_the_schedulers(family) -> None:
    assert family.denoiser.schedule.prediction_type == "epsilon"
    assert torch.equal(family.denoiser.schedule.alpha_bar, tiny.build_scheduler().alphas_cumprod)


def test_v_prediction_and_zero_terminal_snr_come_from_the_scheduler_file(folder: Path, tmp_path: Path) -> None:
    other = edited(folder, tmp_path / "v", "scheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule = families.load_family(other, prediction_type="v_prediction").denoiser.schedule
    assert schedule.prediction_type == "v_prediction"
    assert torch.equal(schedule.alpha_bar, DDIMScheduler.from_pretrained(other / "scheduler").alphas_cumprod)
    assert schedule.alpha_bar[-1] < 1e-10


def test_denoiser_answers_in_double_precision_when_asked_in_it(family) -> None:
    family.network.double()
    assert family.denoiser(*draw(1, torch.float64)).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------- LoRA


def test_with_the_adapter_off_the_network_is_the_base_to_the_bit(family) -> None:
    with torch.no_grad():
        base = family.denoiser(*draw())
        family.attach_lora(rank=4, alpha=16)
        make_adapter_matter(family)
        tuned = family.denoiser(*draw())
        with family.denoiser.adapter_off():
            with family.denoiser.adapter_off():
                assert torch.equal(family.denoiser(*draw()), base)
            assert torch.equal(family.denoiser(*draw()), base)
        assert not torch.equal(tuned, base)
        assert torch.equal(family.denoiser(*draw()), tuned)


def test_adapter_off_restores_switches_and_gradient_flags_after_an_error(family) -> None:
    family.attach_lora(rank=2)
    make_adapter_matter(family)
    some = next(iter(family.denoiser.trainable_parameters()))
    some.requires_grad_(False)
    flags = [p.requires_grad for p in family.network.parameters()]
    before = family.denoiser(*draw()).detach()
    with pytest.raises(RuntimeError, match="on purpose"), family.denoiser.adapter_off():
        raise RuntimeError("on purpose")
    assert [p.requires_grad for p in family.network.parameters()] == flags
    assert torch.equal(family.denoiser(*draw()).detach(), before)


def test_gradients_survive_a_reference_call_between_forward_and_backward(family) -> None:
    family.attach_lora(rank=2)
    make_adapter_matter(family)
    parameters = list(family.denoiser.trainable_parameters())
    alone = torch.autograd.grad(family.denoiser(*draw()).square().mean(), parameters)
    loss = family.denoiser(*draw()).square().mean()
    with torch.no_grad(), family.denoiser.adapter_off():
        family.denoiser(*draw())
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, alone, strict=True))


def test_adapter_off_works_through_a_wrapper(family) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    with torch.no_grad():
        base = family.denoiser(*draw())
        family.attach_lora(rank=2)
        make_adapter_matter(family)
        bare = family.network
        wrapped = family.denoiser = family.denoiser.with_network(Wrapped(bare))
        assert family.network is bare
        assert not torch.equal(wrapped(*draw()), base)
        with wrapped.adapter_off():
            assert torch.equal(wrapped(*draw()), base)


def test_base_weights_are_neither_copied_nor_trained(family) -> None:
    before = {p.data_ptr() for p in family.network.parameters()}
    values = {n: p.clone() for n, p in family.network.named_parameters()}
    family.attach_lora(rank=2)
    base = {n: p for n, p in family.network.named_parameters() if "lora_" not in n}
    assert {p.data_ptr() for p in base.values()} == before
    assert not any(p.requires_grad for p in base.values())
    make_adapter_matter(family)
    optimizer = torch.optim.AdamW(family.denoiser.trainable_parameters(), lr=0.1)
    family.denoiser(*draw()).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, values[n.replace(".base_layer", "")]) for n, p in base.items())


def test_a_bfloat16_base_carries_a_float32_adapter(folder: Path) -> None:
    family = families.load_family(folder, dtype="bf16")
    family.attach_lora(rank=2)
    dtypes = {"lora_" in n: p.dtype for n, p in family.network.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    prediction = family.denoiser(*draw())
    prediction.square().mean().backward()
    assert prediction.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in family.denoiser.trainable_parameters())
    assert family.encoder.encode_prompts(PROMPTS)["encoder_hidden_states"].dtype == torch.float32


def test_the_seed_decides_the_adapter_and_nothing_else_is_drawn(folder: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    states = []
    for seed in (7, 7, 8):
        family = families.load_family(folder)
        family.attach_lora(rank=2, seed=seed)
        states.append(family.adapter_state())
    assert torch.equal(torch.get_rng_state(), state)
    same, other = [all(torch.equal(states[0][n], s[n]) for n in s) for s in states[1:]]
    assert same and not other


def test_adapter_state_goes_back_into_the_same_tensors(family) -> None:
    family.attach_lora(rank=2)
    make_adapter_matter(family)
    kept = {n: v.clone() for n, v in family.adapter_state().items()}
    held = list(family.denoiser.trainable_parameters())
    make_adapter_matter(family)
    family.load_adapter_state(kept)
    assert all(now is then for now, then in zip(family.denoiser.trainable_parameters(), held, strict=True))
    assert all("lora_" in n and torch.equal(v, kept[n]) for n, v in family.adapter_state().items())
    with pytest.raises(UserError, match="another rank"):
        family.load_adapter_state({n: v[:1] for n, v in kept.items()})


def test_full_training_moves_every_weight_and_keeps_a_frozen_copy(folder: Path) -> None:
    family = families.load_family(folder, dtype="bfloat16")
    reference = family.frozen_copy()
    family.train_fully()
    assert {p.dtype for p in family.network.parameters()} == {torch.float32}
    assert (
        len(list(family.denoiser.trainable_parameters())) == len(family.adapter_state()) == len(list(family.network.parameters()))
    )
    with torch.no_grad():
        before = reference(*draw())
        next(family.denoiser.trainable_parameters()).add_(1.0)
        assert torch.equal(reference(*draw()), before)
    assert not any(p.requires_grad for p in reference.network.parameters())


def test_gradient_checkpointing_and_channels_last_change_no_gradient(family) -> None:
    family.attach_lora(rank=2)
    make_adapter_matter(family)
    family.network.train()
    parameters = list(family.denoiser.trainable_parameters())
    plain = torch.autograd.grad(family.denoiser(*draw()).square().mean(), parameters)
    family.set_gradient_checkpointing(True)
    saved = torch.autograd.grad(family.denoiser(*draw()).square().mean(), parameters)
    family.set_gradient_checkpointing(False)
    family.set_channels_last(True)
    assert family.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    last = torch.autograd.grad(family.denoiser(*draw()).square().mean(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
    torch.testing.assert_close(plain, last, rtol=1e-3, atol=1e-6)


def test_lora_mistakes_are_explained(family) -> None:
    with pytest.raises(UserError, match=r"'to_x' matches no layer of UNet2DConditionModel.*to_out\.0.*to_q"):
        family.attach_lora(rank=2, targets=["to_q", "to_x"])
    with pytest.raises(UserError, match="rank 0"):
        family.attach_lora(rank=0)
    assert not family.has_adapter
    with pytest.raises(ValueError, match="no adapter"), family.denoiser.adapter_off():
        pass


def test_xformers_is_refused_where_it_cannot_run(family, monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, reason in ((None, "not installed"), (object(), "needs a CUDA device")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match=f"{reason}.*use sdpa"):
            family.set_attention("xformers")
    monkeypatch.undo()
    with pytest.raises(UserError, match="'fast'"):
        family.set_attention("fast")


def test_attention_is_by_the_kernel_that_was_asked_for(family) -> None:
    """PyTorch's flash kernel runs where another is asked for around the network, also where blocks are recomputed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.no_grad():
        before = family.denoiser(*draw())
        family.set_attention("flash")
        by_flash = family.denoiser(*draw())
        family.set_attention("sdpa")
        assert torch.equal(family.denoiser(*draw()), before)
    torch.testing.assert_close(by_flash, before)
    assert family.attention("sdpa") == "attention: SDPA, flash for heads of 24, 28 channels in float32 on cpu"
    family.set_attention("flash")
    family.set_gradient_checkpointing(True)
    family.train_fully()
    with sdpa_kernel(SDPBackend.MATH), torch.profiler.profile() as profile:
        family.denoiser(*draw()).square().mean().backward()
    called = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
    assert not any("attention_math" in name for name in called)
    family.set_attention("sdpa")
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), torch.profiler.profile() as profile:
        family.denoiser(*draw())
    assert not any("flash" in event.key for event in profile.key_averages())


# ------------------------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize("masked", [False, True])
def test_prompts_are_encoded_as_the_pipeline_does(folder: Path, tmp_path: Path, masked: bool) -> None:
    place = edited(folder, tmp_path / "m", "text_encoder", use_attention_mask=masked)
    family = families.load_family(place)
    prompts = [*PROMPTS, " ".join(["red"] * 60)]
    expected, _ = families.load_pipeline(place).encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(family.encoder.encode_prompts(prompts)["encoder_hidden_states"], expected)


def test_images_become_the_scaled_posterior(family) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoded, vae = family.encoder.encode_images(pixels), family.pipeline().vae
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        mean, logvar = posterior.parameters.chunk(2, dim=1)
    assert torch.equal(encoded["mean"], mean * vae.config.scaling_factor)
    torch.testing.assert_close(encoded["std"], (0.5 * logvar.clamp(-30, 20)).exp() * vae.config.scaling_factor)
    assert encoded["mean"].shape == (2, 4, 16, 16)


def test_fingerprint_follows_what_encodes_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    print_ = families.load_family(folder).encoder.fingerprint()
    again = families.load_family(folder, dtype="bf16")
    again.encoder.encode_prompts(PROMPTS)  # leaves its padding in the tokenizer
    with torch.no_grad():
        next(again.pipeline().unet.parameters()).add_(1.0)
    assert dict(again.encoder.fingerprint()) == dict(print_)
    assert json.loads(json.dumps(print_)) == print_
    scaled = edited(folder, tmp_path / "s", "vae", scaling_factor=0.5)
    assert families.load_family(scaled).encoder.fingerprint() != print_
    weights = load_file(scaled / "text_encoder" / "model.safetensors")
    name = next(n for n in weights if "mlp.fc1.bias" in n)
    save_file({**weights, name: weights[name] + 1}, scaled / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    changed = families.load_family(scaled).encoder.fingerprint()
    assert changed["text_encoder"] != print_["text_encoder"] and changed["vae_encoder"] == print_["vae_encoder"]


def test_what_is_lost_of_long_prompts(family) -> None:
    long = " ".join(["red"] * 38 + ["blue", "square"])
    [cut] = family.truncated(["a red circle", " ".join(["red"] * 38), long])
    assert (cut.prompt, cut.lost, cut.tokens) == (long, "blue square", 42)
    assert family.truncated([]) == []


def test_released_encoders_are_gone_but_saving_and_sampling_still_work(family, folder: Path, tmp_path: Path) -> None:
    fingerprint = dict(family.encoder.fingerprint())
    expected = sample(families.load_pipeline(folder))
    family.release_encoders()
    with pytest.raises(ValueError, match="released"):
        family.encoder.encode_prompts(PROMPTS)
    assert dict(family.encoder.fingerprint()) == fingerprint
    assert torch.equal(sample(family.pipeline()), expected)
    family.save_pipeline(tmp_path / "saved")
    assert torch.equal(sample(StableDiffusionPipeline.from_pretrained(tmp_path / "saved")), expected)


# -------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("alpha", [4, 16, 2.5])
def test_a_saved_adapter_loads_in_diffusers_with_its_alpha(family, folder: Path, tmp_path: Path, alpha: float) -> None:
    family.attach_lora(rank=4, alpha=alpha)
    make_adapter_matter(family)
    tuned = sample(family.pipeline())
    family.save_adapter(tmp_path / "run")
    plain = StableDiffusionPipeline.from_pretrained(folder)
    base = sample(plain)
    plain.load_lora_weights(tmp_path / "run", weight_name=LORA)
    assert torch.equal(sample(plain), tuned)
    assert not torch.equal(base, tuned)
    assert torch.equal(sample(families.load_pipeline(tmp_path / "run")), tuned)


def test_a_fully_trained_pipeline_loads_in_diffusers(family, tmp_path: Path) -> None:
    family.train_fully()
    with torch.no_grad():
        for p in family.denoiser.trainable_parameters():
            p.mul_(1.01)
    tuned = sample(family.pipeline())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    for _ in range(2):
        family.save_pipeline(tmp_path / "run")
    assert torch.equal(sample(StableDiffusionPipeline.from_pretrained(tmp_path / "run")), tuned)
    assert torch.equal(sample(families.load_pipeline(str(tmp_path / "run"))), tuned)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_others_may_read_a_pipeline_as_the_umask_has_it(family, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        family.save_pipeline(tmp_path / "run")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_dir()} == {0o750}


def test_a_pipeline_with_an_adapter_is_not_saved_as_if_it_had_none(family, tmp_path: Path) -> None:
    family.attach_lora(rank=2)
    with pytest.raises(ValueError, match="adapter"):
        family.save_pipeline(tmp_path / "x")
    family.detach_lora()
    family.save_pipeline(tmp_path / "x")
    names = load_file(tmp_path / "x" / "unet" / "diffusion_pytorch_model.safetensors").keys()
    assert not any("base_layer" in n or "lora" in n for n in names)


def test_a_bfloat16_network_with_adapter_can_be_sampled(folder: Path) -> None:
    family = families.load_family(folder, dtype="bf16")
    family.attach_lora(rank=2)
    make_adapter_matter(family)
    pipe = family.pipeline()
    assert pipe.unet is family.network and pipe.text_encoder.dtype == torch.bfloat16
    assert sample(pipe).isfinite().all()
    assert family.encoder.encode_prompts(PROMPTS)["encoder_hidden_states"].dtype == torch.float32


def test_a_full_disk_leaves_the_old_result(family, tmp_path: Path) -> None:
    """A file-size limit of the process stands in for a full disk: the writing itself fails, in safetensors."""
    import resource
    import signal

    family.train_fully()
    target = tmp_path / "run"
    family.save_pipeline(target)
    before = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    with torch.no_grad():
        next(family.denoiser.trainable_parameters()).add_(1.0)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not be written.*untouched"):
            family.save_pipeline(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_failure_while_replacing_puts_everything_back(tmp_path: Path) -> None:
    target, fresh = tmp_path / "run", tmp_path / "new"
    fresh.mkdir()
    (target / "b").mkdir(parents=True)
    (target / "a").write_text("old a")
    (fresh / "a").write_text("new a")
    (fresh / "b").write_text("new b")
    (fresh / "c").write_text("new c")
    with pytest.raises(OSError):
        _files._install(fresh, target, target / "b" / "old", "")  # b cannot be moved into itself, after a has been replaced
    assert (target / "a").read_text() == "old a"
    assert (target / "b").is_dir() and not (target / "c").exists()
