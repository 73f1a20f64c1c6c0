"""What SDXL and PixArt-alpha are told of a picture's size and crop: true to each side of a pair, through all of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import Saved, listening, on_disk, run, write_pairs
from miniatures import MINIATURES, PIXELS
from safetensors.torch import save_file

from diffalign.data.cache import PairCache, build_cache
from diffalign.data.cache_values import FillOptions
from diffalign.data.draws import draw
from diffalign.data.loader import collate
from diffalign.data.open import open_pairs
from diffalign.data.transform import Transform
from diffalign.errors import UserError
from diffalign.levels import Levels
from diffalign.likelihood import pair_errors
from diffalign.sources.dataset import noised
from diffalign.types import FRAMING, PairBatch
from pipelines import families

SIZES = [((64, 64), (40, 48)), ((64, 64), (40, 56)), ((64, 64), (40, 64)), ((64, 64), (40, 72))]
"""(height, width) of winner and loser of each pair that ``write_pairs`` writes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sizes")


@pytest.fixture
def sdxl(folders: Path) -> Saved:
    return on_disk("sdxl", folders)


@pytest.fixture(scope="module")
def pairs(folders: Path) -> Path:
    return write_pairs(folders / "data")


class Heard:
    """What a network is told, call by call."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        network.register_forward_pre_hook(lambda _, args, kwargs: self.calls.append(kwargs), with_kwargs=True)

    def sizes(self) -> list[torch.Tensor]:
        return sizes(self.calls)


def sizes(calls: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The numbers [B, 6] that SDXL's UNet was told in each call."""
    return [call["added_cond_kwargs"]["time_ids"] for call in calls]


def encoded(folder: Path, model: Saved, pairs: Path, **transform: Any) -> PairCache:
    encoder = families.load_family(model.folder).encoder
    return build_cache(open_pairs(pairs), encoder, folder, Transform(PIXELS, **transform), FillOptions(dtype="float32"))


def batch_of(cache: PairCache, seeds: range = range(4), flip: bool = False) -> PairBatch:
    draws = [draw(0, seed, cache.latent_shape, Levels(), 0.0, flip) for seed in seeds]
    return collate(cache, range(4), draws, latent_mode=True)


def expected_sizes(cache: PairCache, flips: list[bool], **transform: Any) -> torch.Tensor:
    """[8, 6], winners first, from the sizes of the files."""
    how, rows = Transform(PIXELS, **transform), []
    for side in (0, 1):
        for row, (sizes, flip) in enumerate(zip(SIZES, flips, strict=True)):
            height, width = sizes[side]
            rows.append(how.framings((width, height), how.position(row))[int(flip)])
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("transform", [{}, {"crop": "random", "seed": 3}, {"crop": "random", "flip": True}], ids=str)
def test_each_side_is_asked_about_with_its_own_size_and_crop_in_one_call(
    transform: dict, sdxl: Saved, pairs: Path, tmp_path: Path
) -> None:
    cache, family = encoded(tmp_path, sdxl, pairs, **transform), families.load_family(sdxl.folder)
    flip, heard = bool(transform.get("flip")), Heard(family.network)
    batch = batch_of(cache, flip=flip)
    flips = [draw(0, seed, cache.latent_shape, Levels(), 0.0, flip).flip for seed in range(4)]
    assert not flip or len(set(flips)) == 2  # both orientations are there
    pair_errors(family.denoiser, noised(batch, family.denoiser.schedule))
    (told,) = heard.sizes()
    assert torch.equal(told, expected_sizes(cache, flips, **transform))
    assert not torch.equal(told[:4], told[4:])


def test_a_training_run_tells_the_network_the_truth(sdxl: Saved, pairs: Path, tmp_path: Path) -> None:
    """Through ``diffalign train``: in each of two steps one call of the policy and one of the reference, of stacked pairs."""
    calls: list[dict[str, Any]] = []
    with listening(calls):
        run(sdxl, pairs, "diffusion-dpo", tmp_path / "run", adapter="lora", crop="random")
    of_training = [told for told in sizes(calls) if len(told) == 4]
    assert len(of_training) == 4
    how = Transform(PIXELS, "random", seed=0)
    true = [how.framings((w, h), how.position(row))[0] for row, both in enumerate(SIZES) for h, w in both]
    assert all(tuple(map(int, one)) in true for told in of_training for one in told.tolist())


def test_what_is_sampled_is_a_whole_picture_of_its_size(sdxl: Saved) -> None:
    family = families.load_family(sdxl.folder)
    heard, x = Heard(family.network), torch.randn(3, 4, 8, 6)
    words = {name: value.expand(3, *value.shape[1:]) for name, value in family.encoder.encode_prompts(["a red circle"]).items()}
    known = torch.tensor([40.0, 50.0, 1.0, 2.0, 32.0, 24.0])
    t = torch.tensor([5, 5, 5])
    family.denoiser(x, t, words)
    family.denoiser(x, t, {**words, FRAMING: torch.stack([known, torch.full((6,), torch.nan), known + 1])})
    whole = torch.tensor([32.0, 24.0, 0.0, 0.0, 32.0, 24.0])
    first, second = heard.sizes()
    assert torch.equal(first, whole.expand(3, 6))
    assert torch.equal(second, torch.stack([known, whole, known + 1]))


@pytest.mark.parametrize("objective", ["seppo", "diffusion-dro"])
def test_a_sampled_loser_is_not_told_the_size_of_a_file(objective: str, sdxl: Saved, pairs: Path, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []
    with listening(calls):
        run(sdxl, pairs, objective, tmp_path / "run", adapter="lora", crop="random")
    whole = torch.tensor([PIXELS, PIXELS, 0, 0, PIXELS, PIXELS], dtype=torch.float32)
    stacked = [told for told in sizes(calls) if len(told) == 4 and not torch.equal(told, whole.expand(4, 6))]
    assert len(stacked) == 4  # two steps, policy and reference; the other calls sample
    for told in stacked:
        assert (told[:2, 0] == 64).all() and torch.equal(told[2:], whole.expand(2, 6))


def test_sizes_stay_exact_in_bfloat16(sdxl: Saved) -> None:
    family = families.load_family(sdxl.folder, dtype="bf16")
    heard, x = Heard(family.network), torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    odd = torch.tensor([[1023.0, 2047.0, 33.0, 517.0, 1001.0, 999.0]])
    family.denoiser(x, torch.tensor([5]), {**family.encoder.encode_prompts(["a"]), FRAMING: odd})
    assert torch.equal(heard.sizes()[0], odd)


def test_pixart_alpha_is_told_the_originals_size_and_the_crops_ratio(folders: Path) -> None:
    family = families.load_family(on_disk("pixart alpha of 1024 pixels", folders).folder)
    heard, x = Heard(family.network), torch.randn(2, 4, 8, 4)
    words = family.encoder.encode_prompts(["a", "b"])
    known = torch.tensor([400.0, 300.0, 10.0, 0.0, 32.0, 16.0])
    family.denoiser(x, torch.tensor([5, 6]), {**words, FRAMING: torch.stack([known, torch.full((6,), torch.nan)])})
    told = heard.calls[0]["added_cond_kwargs"]
    assert told["resolution"].tolist() == [[400, 300], [32, 16]] and told["aspect_ratio"].tolist() == [[2], [2]]
    silent = families.load_family(on_disk("pixart", folders).folder)
    heard = Heard(silent.network)
    silent.denoiser(x, torch.tensor([5, 6]), silent.encoder.encode_prompts(["a", "b"]))
    assert heard.calls[0]["added_cond_kwargs"] == {"resolution": None, "aspect_ratio": None}


# ------------------------------------------------------------------------------------------------- refusals, single files


def test_a_refiner_is_refused(sdxl: Saved) -> None:
    from pipelines.families import sdxl as module

    pipe = sdxl.pipeline()
    pipe.text_encoder = None
    with pytest.raises(UserError, match="refiner, or incomplete. Align the base model"):
        module.build(pipe)


@pytest.mark.parametrize(("number", "kind"), [(1, None), (0, "refining what SDXL's base model sampled")])
def test_a_single_file_is_recognised(number: int, kind: str | None, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES

    name = CHECKPOINT_KEY_NAMES["xl_base" if number else "xl_refiner"]
    save_file({name: torch.zeros(1280), "model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    if kind is None:
        assert families.detect(tmp_path / "model.safetensors") == "sdxl"
        return
    with pytest.raises(UserError, match=kind):
        families.detect(tmp_path / "model.safetensors")


def test_both_tokenizers_say_what_they_cut(sdxl: Saved) -> None:
    encoder = families.load_family(sdxl.folder).encoder
    first, second = encoder._tokenizers
    second.model_max_length = first.model_max_length - 10
    long = "a red circle " * 20
    one, other = encoder.truncated([long, "a red circle"])
    assert one.prompt == other.prompt == long and len(one.lost) < len(other.lost)


def test_encoders_work_one_after_the_other(sdxl: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures, then prompts: what does not work is put back on the CPU. The meta device stands in for a GPU's memory."""
    encoder = families.load_family(sdxl.folder).encoder
    moves: list[tuple[str, str]] = []
    for name, network in encoder._networks.items():
        monkeypatch.setattr(network, "to", lambda device, name=name: moves.append((name, str(device))))
    encoder.work_on("meta")
    encoder._at_work("vae")
    assert moves == [("text_encoder", "cpu"), ("text_encoder_2", "cpu"), ("vae", "meta")]
    moves.clear()
    encoder._at_work("text_encoder", "text_encoder_2")
    assert moves == [("vae", "cpu"), ("text_encoder", "meta"), ("text_encoder_2", "meta")]


def test_miniatures_of_both_kinds_of_prediction_are_there() -> None:
    assert sum(m.family == "sdxl" for m in MINIATURES.values()) == 2
