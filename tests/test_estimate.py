"""``--dry-run``: what is counted without loading anything is what a loaded model has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import MINIATURES, PIXELS

from diffalign import losses, objectives
from diffalign.errors import UserError
from pipelines import config, memory_presets
from pipelines.counting import weights_bytes
from pipelines.estimate import Estimate, estimate
from pipelines.families import _convolutions, load_family
from pipelines.families._encoder import VAE
from pipelines.image_settings import TrainSettings
from pipelines.ingredients import open_data
from pipelines.sizing import PICTURES, Comparing, Sizing
from pipelines.tiny.model import checkpoint_path


def settings(name: str = "diffusion-dpo", **options: object) -> TrainSettings:
    objective = objectives.load(name).Objective
    given = {"model": "tiny", "pairs": "tiny", "output": "never", "prompts": None, **options}
    return config.resolve(config.placed(given, objective), objective)


SWITCHES = {
    "checkpointing": {"gradient_checkpointing": True},
    "precision, and checkpointing": {"gradient_checkpointing": True, "mixed_precision": "bf16"},
    "all weights in bf16": {"adapter": "full", "mixed_precision": "bf16"},
    "how much at a time, text in bf16": {"encode_batch": 2, "sampling_batch": 2, "text_precision": "bfloat16"},
    "int8": {"quantise": "int8"},
    "channels-last": {"channels_last": True},
    "another optimizer": {"optimizer": "adafactor"},
}


def test_what_was_counted_for_one_setting_is_not_taken_for_another() -> None:
    """Each number is counted once, under a name that must hold all that it depends on."""
    compared = {"prompts": "tiny", "judges": ["oracle"], "prompt_count": 10}
    shared, plain = Sizing(), settings(**compared)
    first = shared.of(plain)
    for name, switched in SWITCHES.items():
        one = settings(**compared, **switched)
        assert shared.of(one) == Sizing().of(one), name
        assert shared.of(one) != first, name
    assert shared.of(plain) == first


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_parameters_are_those_of_the_loaded_model(adapter: str) -> None:
    family = load_family(str(checkpoint_path()))
    if adapter == "lora":
        family.attach_lora(rank=3)
    else:
        family.train_fully()
    guess = estimate(settings(adapter=adapter, rank=3))
    assert guess.trainable == sum(p.numel() for p in family.denoiser.trainable_parameters())
    assert guess.bytes["weights"] == 4 * sum(p.numel() for p in family.network.parameters())
    assert (guess.bytes["reference"] > 0) == (adapter == "full")


def test_activations_grow_with_the_micro_batch_and_not_with_accumulation() -> None:
    one, four, accumulated = (estimate(settings(batch_size=b, accumulation=a)) for b, a in ((1, 1), (4, 1), (1, 4)))
    assert four.bytes["activations"] == pytest.approx(4 * one.bytes["activations"], rel=0.01)
    assert accumulated.bytes == one.bytes


def test_the_host_beside_gpus_is_announced() -> None:
    """The network and its encoders as they are read, quantised only on the device; or, these being gone, with its copy."""
    frozen, quantised = (estimate(settings(quantise=kind)) for kind in ("none", "int8"))
    encoders = sum(size for name, size in frozen.encoding.items() if name != PICTURES)
    assert frozen.host_of_each == quantised.host_of_each == frozen.bytes["weights"] - 4 * frozen.trainable + encoders
    full = estimate(settings(adapter="full"))
    assert full.host_of_each == full.bytes["weights"] + max(encoders, full.bytes["reference"])
    each = full.host_of_each / 2**30
    assert f"{each:.2f} GiB a process, {8 * each:.2f} of 8 together" in full.to_text()


def test_a_bank_of_past_checkpoints_is_announced() -> None:
    """SePPO forgets none that may be drawn: 7 rounds of 30 steps leave 7."""
    sizes = {}
    for choice in ("uniform", "last"):
        found = estimate(settings("seppo", adapter="full", steps=200, round_steps=30, checkpoint=choice))
        sizes[choice] = found.bank / (4 * found.trainable)
        assert f"by the end of the run: {found.bank / 2**30:.2f} GiB" in found.to_text()
    assert sizes == {"uniform": 7, "last": 1}
    assert estimate(settings()).bank == 0 and "Past checkpoints" not in estimate(settings()).to_text()


def test_the_comparison_is_announced_where_there_will_be_one() -> None:
    assert estimate(settings()).seconds_comparing == 0
    compared = estimate(settings(prompts="tiny", judges=["oracle"], prompt_count=10))
    assert compared.seconds_comparing > 0 and "comparison with the base" in compared.to_text()


def test_passes_of_the_reference_before_training_are_announced(tmp_path: Path) -> None:
    """Forty draws of a pair are eighty passes, of which training would make two a visit; those of other runs cost nothing."""
    drawn = settings(reference_draws=40, reference_cache=tmp_path)
    table = open_data(drawn)
    found, of_one = estimate(drawn, table=table), estimate(settings())
    passes = found.seconds_asking / (of_one.seconds_per_step / (2 * 2.1 + 2))  # the speed is measured anew each time
    assert 80 / 3 < passes < 80 * 3 and of_one.seconds_asking == 0
    minutes = found.seconds_asking * len(table) / 60
    assert f"before training, roughly: {minutes:.1f} min for {len(table)} of the data" in found.to_text()
    assert "s a pair" in estimate(drawn).to_text()
    (tmp_path / "fingerprint.json").write_text('{"draws": {"count": 40, "seed": 0}}')
    (tmp_path / "complete.json").write_text("{}")
    assert estimate(drawn, table=table).seconds_asking == 0


def test_a_model_that_is_not_here_has_no_estimate_and_says_so(tmp_path: Path) -> None:
    guess = estimate(replace(settings(), model=str(tmp_path / "nowhere")))
    assert isinstance(guess, Estimate) and "nowhere" in guess.to_text()


# ------------------------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("name", MINIATURES)
def test_every_family_is_counted_as_it_is(name: str, tmp_path: Path) -> None:
    folder = MINIATURES[name].save(tmp_path / "model")
    family = load_family(folder)
    given = settings(model=str(folder), rank=2, resolution=PIXELS)
    guess = estimate(given)
    assert guess.unknown is None, guess.unknown
    family.attach_lora(rank=2)
    network = family.network
    held = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
    assert guess.bytes["weights"] == held
    assert guess.trainable == sum(p.numel() for p in family.denoiser.trainable_parameters())
    encoders = dict(zip(family.encoder.components, family.encoder.networks(), strict=True))
    for part, network in encoders.items():
        assert guess.encoding[part] == sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())), (
            part
        )
    said = family.encoder.encode_prompts(["a"])
    assert guess.cached["prompt"] == sum(v.numel() * (2 if v.is_floating_point() else v.element_size()) for v in said.values())
    assert guess.bytes["activations"] > 0 and guess.seconds_per_step > 0


def kept_in_truth(family, size: tuple[int, int, int], rows: int, half: bool = False) -> int:
    """What autograd keeps of a forward pass that is really made, by a network as training wraps it."""
    own, kept = {p.untyped_storage().data_ptr() for p in family.network.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in own:
            kept[place.data_ptr()] = place.nbytes()
        return tensor

    told = family.encoder.encode_prompts(["a"] * rows)
    t = torch.full((rows,), 500.0 if family.denoiser.schedule.continuous else 500)
    wrapped = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with wrapped, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        family.denoiser(torch.randn(rows, *size), t, told)
    return sum(kept.values())


EVERY_LAYER = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("stable_diffusion", {}),
        ("stable_diffusion", {"targets": EVERY_LAYER}),
        ("stable_diffusion", {"targets": EVERY_LAYER, "channels_last": True}),
        ("pixart", {}),
        ("sd3", {}),
    ],
    ids=["unet", "unet, every layer", "unet, every layer, channels-last", "pixart", "sd3"],
)
def test_activations_are_those_of_a_real_pass(
    name: str, more: dict, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a network in training, its convolutions as a run on this machine has them."""
    monkeypatch.setattr(_convolutions, "WEIGHTS", 500)  # a miniature's, or none would be written as a product
    folder, half = MINIATURES[name].save(tmp_path / "model"), precision == "bf16"
    family = load_family(folder, dtype="bfloat16" if half else "float32")
    if not torch.accelerator.is_available():
        assert (family.use_products() > 0) == (name == "stable_diffusion")
    family.attach_lora(rank=2, targets=more.get("targets"))
    if more.get("channels_last"):
        family.set_channels_last(True)
    family.network.train()
    size = family.latent_shape(PIXELS)
    guess = estimate(settings(model=str(folder), rank=2, resolution=PIXELS, batch_size=1, mixed_precision=precision, **more))
    assert guess.bytes["activations"] == pytest.approx(kept_in_truth(family, size, 2, half), rel=0.02)


@pytest.mark.parametrize(("pairs", "last"), [(1, False), (4, False), (4, True)])
def test_copies_of_weights_in_half_precision_are_counted_once(pairs: int, last: bool, tmp_path: Path) -> None:
    """Of all weights that are trained, in whichever order; they do not grow with the batch."""
    folder = MINIATURES["stable_diffusion"].save(tmp_path / "model")
    family = load_family(folder)
    family.train_fully()
    family.set_channels_last(last)
    family.network.train()
    truth = kept_in_truth(family, family.latent_shape(PIXELS), 2 * pairs, half=True)
    more = {"resolution": PIXELS, "batch_size": pairs, "mixed_precision": "bf16", "channels_last": last}
    guess = estimate(settings(model=str(folder), adapter="full", **more))
    assert guess.bytes["activations"] == pytest.approx(truth, rel=0.03)


def test_recomputed_blocks_are_counted_apart(tmp_path: Path) -> None:
    folder = MINIATURES["stable_diffusion"].save(tmp_path / "model")
    plain, checked = (estimate(settings(model=str(folder), gradient_checkpointing=on)) for on in (False, True))
    assert 0 < checked.bytes["activations"] < plain.bytes["activations"]
    assert 0 < checked.bytes["a block gone through again"] < plain.bytes["activations"]
    assert checked.seconds_per_step > plain.seconds_per_step


def test_a_network_that_is_told_its_guidance_is_asked_once(tmp_path: Path) -> None:
    folder = MINIATURES["flux"].save(tmp_path / "model")
    own = {"model": str(folder), "pairs": None, "train_prompts": "tiny", "reward": ["tiny-pickscore"], "resolution": PIXELS}
    guided, plain = (estimate(settings("d3po", **own, guidance=scale)) for scale in (3.5, 1.0))
    assert guided.bytes == plain.bytes and guided.sampling == plain.sampling
    folder = MINIATURES["sd3"].save(tmp_path / "other")
    guided, plain = (estimate(settings("d3po", **{**own, "model": str(folder)}, guidance=scale)) for scale in (3.5, 1.0))
    assert guided.bytes["activations"] > 1.5 * plain.bytes["activations"] and guided.sampling > plain.sampling


# ----------------------------------------------------------------------------------------------------------------- presets


def of_size(training: float, encoding: float = 0.0) -> Estimate:
    return Estimate({"weights": int(training * 1e9)}, 0, 1.0, 0.0, 1, {"text_encoder": int(encoding * 1e9)})


def test_a_run_fits_where_its_larger_phase_does() -> None:
    assert memory_presets.fits(of_size(7.3), 8) and not memory_presets.fits(of_size(7.4), 8)
    assert not memory_presets.fits(of_size(1.0, encoding=9.0), 8)  # an encoder that is too large alone


@pytest.mark.parametrize("name", ["sd3", "sdxl", "flux"])
def test_text_encoders_that_work_together_are_announced_together(name: str, tmp_path: Path) -> None:
    folder = MINIATURES[name].save(tmp_path / "model")
    family, together = load_family(folder), []
    at_work = family.encoder._at_work

    def watched(*names: str) -> list[Any]:
        networks = at_work(*names)
        together.append(sum(weights_bytes(network) for network in networks))
        return networks

    family.encoder._at_work = watched
    family.encoder.fingerprint(), family.encoder.encode_prompts(["a red circle"])
    guess = estimate(settings(model=str(folder), text_precision="float32"))
    assert max(together) == sum(size for name, size in guess.encoding.items() if name not in (VAE, PICTURES))
    plain = Estimate({}, 0, 1.0, 0.0, 1, {VAE: 1, PICTURES: 3, "text_encoder": 4, "text_encoder_2": 2})
    assert plain.phases["encoding"] - Estimate({}, 0, 1.0, 0.0, 1).phases["encoding"] == 6


def test_one_pair_at_a_time_leaves_a_step_as_it_is() -> None:
    """Of what an objective samples, ``accumulation`` alone counts a step's pairs; some losses need company."""

    def told(name: str, **options: object) -> tuple[int, int]:
        batch = memory_presets._one_at_a_time(settings(name, batch_size=4, accumulation=8, **options)).batch
        return batch.batch_size, batch.accumulation

    assert told("diffusion-dpo") == (1, 32) and told("diffusion-dpo", loss="rdpo", loss_options={"noise": 0.1}) == (1, 32)
    assert told("d3po", pairs=None, train_prompts="tiny", reward=["tiny-pickscore"]) == (1, 8)
    assert told("kto") == (4, 8) and told("kto", baseline="none") == (1, 32)
    mixed = next(name for name in losses.names() if losses.load(name).mixes_batch)
    assert told("diffusion-dpo", loss=mixed) == (4, 8)


def test_what_does_not_fit_is_told_by_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_presets.Sizing, "of", lambda self, given: None)
    comparing = Comparing(network=int(9e9), decoder=0, encoders={}, asked=0, decoded=0)
    for found, words in (
        (of_size(9.0), "training itself"),
        (of_size(1.0, encoding=9.0), "encoders that do not fit"),
        (replace(of_size(1.0), sampling=int(9e9)), "sampling and decoding"),
        (replace(of_size(1.0), comparing=comparing), "comparison at the end"),
    ):
        monkeypatch.setattr(memory_presets, "estimate_of", lambda given, sized, found=found: found)
        with pytest.raises(UserError, match=words):
            memory_presets.fitted(settings(), 8)


def test_what_people_chose_among_is_not_made_otherwise_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their trajectories have the precision, prompts and weights that they had."""
    monkeypatch.setattr(memory_presets.Sizing, "of", lambda self, given: None)
    monkeypatch.setattr(memory_presets, "estimate_of", lambda given, sized: of_size(9.0))
    own = settings("d3po", pairs=None, train_prompts="tiny", reward=["tiny-pickscore"], adapter="full", batch_size=4)
    *_, last = memory_presets.Ladder(replace(own, feedback=Path("rounds"))).rungs()
    assert [name.split(" ")[0] for name in last.switched] == ["pictures", "one", "gradient", "a"]
    assert last.settings.compute.quantise == "none" and last.settings.data.text_precision == "float32"
    *_, last = memory_presets.Ladder(settings(model="net.gguf", mixed_precision="fp16")).rungs()
    assert last.settings.compute.quantise == "none" and last.settings.compute.mixed_precision == "fp16"


def test_a_preset_switches_on_as_much_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = settings(adapter="full", batch_size=4)

    def told(given: TrainSettings, sized: object) -> Estimate:
        total = 60.0 if given.adapter == "full" else 20.0
        total -= 8.0 * (given.compute.mixed_precision == "bf16") + 6.0 * given.compute.gradient_checkpointing
        total -= {"none": 0.0, "int8": 1.0, "nf4": 1.5}[given.compute.quantise]
        return of_size(total + given.batch.batch_size)

    monkeypatch.setattr(memory_presets, "estimate_of", told)
    monkeypatch.setattr(memory_presets.Sizing, "of", lambda self, given: None)
    enough = memory_presets.fitted(wide, 80)
    assert enough.settings == wide and enough.switched == ()
    less = memory_presets.fitted(wide, 48)  # 60 - 8 - 6 + 1 is too much: a LoRA it is
    assert less.settings.adapter == "lora" and less.settings.batch == wide.batch
    assert [name.split(" ")[0] for name in less.switched] == ["a"]  # the others would be on for nothing
    fewest = memory_presets.fitted(wide, 6)  # 20 - 8 - 6 + 1 is too much, and 8 bits save 1
    assert [name.split(" ")[0] for name in fewest.switched] == ["bf16", "one", "gradient", "a", "the"]
    assert fewest.settings.compute.quantise == "nf4" and (
        fewest.settings.batch.batch_size,
        fewest.settings.batch.accumulation,
    ) == (1, 4)
    of_bits = memory_presets.fitted(replace(fewest.settings, batch=wide.batch), 6)
    assert of_bits.settings.compute.quantise == "nf4" and len(of_bits.switched) == 1  # never back to 8
    with pytest.raises(UserError, match=r"still takes about 5.1 GiB, and a device of 5 GB has 4.3"):
        memory_presets.fitted(wide, 5)
    lines = memory_presets.advice(wide)
    assert lines[-1] == "  80 GB  nothing (59.6 GiB)" and lines[1].startswith("   8 GB  bf16")
    named, line = memory_presets.applied(replace(wide, preset="24gb"))
    assert named.adapter == "lora" and line.startswith("preset 24gb: bf16")
    assert memory_presets.applied(wide) == (wide, "")


def test_what_each_of_several_devices_holds() -> None:
    """By hand, of 16 bytes a weight: weights, gradients and moments are shared out, the frozen copy and the rest are not."""
    guess = estimate(settings(adapter="full"))
    weights = 4 * guess.trainable
    others = guess.training - 4 * weights
    assert guess.bytes["reference"] == weights < others and 0 < guess.gathered < weights
    assert guess.of_each(2) == others + 2 * weights + 2 * guess.gathered
    assert guess.of_each(8) == others + weights // 2 + 2 * guess.gathered
    half = estimate(settings(adapter="full", mixed_precision="bf16"))
    assert 2 * half.gathered == guess.gathered  # gathered in bfloat16
    assert "Shared out over 2, 4 and 8 GPUs (diffalign devices fsdp2): " in guess.to_text()
    assert "Shared out" not in estimate(settings()).to_text()  # a LoRA is not
