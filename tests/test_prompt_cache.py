"""Prompts by themselves: encoded once, in the order that was given, whatever happens meanwhile."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_cache import CENTRAL, DISTINCT, SmallEncoder, _vector, contents, write_pairs

from diffalign.data import cache_files
from diffalign.data.cache import PairCache, build_cache
from diffalign.data.cache_values import FillOptions
from diffalign.data.cached_errors import cache_errors
from diffalign.data.draws import FixedDraws
from diffalign.data.open import open_pairs
from diffalign.data.prompt_cache import PromptCache, build_prompt_cache, prompt_fingerprint
from diffalign.errors import StaleCacheError, UserError
from diffalign.levels import Levels

PROMPTS = [f"prompt {i % 7}" for i in range(10)] + ["", "another"]


def test_prompts_keep_their_order_and_are_encoded_once(tmp_path: Path) -> None:
    encoder, told = SmallEncoder(), []
    cache = build_prompt_cache(
        PROMPTS, encoder, tmp_path / "c", FillOptions(dtype="float32", batch_size=3), progress=lambda *state: told.append(state)
    )
    assert cache.prompts == PROMPTS and len(cache) == 12
    assert sorted(encoder.texts) == sorted(set(PROMPTS)) and encoder.images == 0
    for index, prompt in enumerate(PROMPTS):
        assert torch.equal(cache.conditioning(index)["encoder_hidden_states"], _vector(prompt))
    assert torch.equal(cache.conditioning(None)["encoder_hidden_states"], _vector(""))
    assert cache.conditioning(3)["mask"].dtype == torch.int64
    with pytest.raises(IndexError):
        cache.conditioning(12)
    stats = cache.stats()
    assert (stats["prompts"], stats["unique_prompts"]) == (12, 9) and stats["seconds"] >= 0
    assert stats["bytes"] == sum(f.stat().st_size for f in (tmp_path / "c").rglob("*") if f.is_file())
    assert told[-1] == ("prompts", 9, 9)


def test_the_empty_prompt_is_there_though_nobody_gave_it(tmp_path: Path) -> None:
    cache = build_prompt_cache(["a"], SmallEncoder(), tmp_path / "c", FillOptions(dtype="float32"))
    assert cache.prompts == ["a"] and torch.equal(cache.conditioning(None)["encoder_hidden_states"], _vector(""))
    assert torch.equal(cache.conditioning(0)["encoder_hidden_states"], _vector("a"))


def test_it_opens_again_and_in_other_processes(tmp_path: Path) -> None:
    build_prompt_cache(PROMPTS, SmallEncoder(), tmp_path / "c")
    idle = SmallEncoder()
    with cache_files.CacheFolder(tmp_path / "c").locked():  # opening needs no lock
        cache = build_prompt_cache(PROMPTS, idle, tmp_path / "c")
    assert idle.calls == 0
    for other in (PromptCache.open(tmp_path / "c"), pickle.loads(pickle.dumps(cache))):
        assert other.prompts == PROMPTS and other.fingerprint == prompt_fingerprint(PROMPTS, idle)
        assert torch.equal(other.conditioning(11)["encoder_hidden_states"], cache.conditioning(11)["encoder_hidden_states"])
    assert cache.conditioning(0)["encoder_hidden_states"].dtype == torch.float32
    assert np.load(tmp_path / "c/prompts/00000.encoder_hidden_states.npy").dtype == np.float16


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
def test_a_killed_build_goes_on_where_it_was_and_ends_in_the_same_bytes(tmp_path: Path, calls: int) -> None:
    how = FillOptions(batch_size=2, shard_items=2)
    build_prompt_cache(PROMPTS, SmallEncoder(), tmp_path / "whole", how)
    with pytest.raises(KeyboardInterrupt):
        build_prompt_cache(PROMPTS, SmallEncoder(fail_after=calls), tmp_path / "cut", how)
    with pytest.raises(UserError, match="not complete; build it again"):
        PromptCache.open(tmp_path / "cut")
    rest = SmallEncoder()
    build_prompt_cache(PROMPTS, rest, tmp_path / "cut", how)
    assert len(rest.texts) == 9 - 2 * calls, "what was committed is not encoded again"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with cache_files.CacheFolder(tmp_path / "c").locked(), pytest.raises(UserError, match="Another process is filling"):
        build_prompt_cache(PROMPTS, SmallEncoder(), tmp_path / "c")


def test_other_prompts_another_encoder_or_precision_make_it_stale(tmp_path: Path) -> None:
    build_prompt_cache(PROMPTS, SmallEncoder(), tmp_path / "c")
    before = contents(tmp_path / "c")
    with pytest.raises(StaleCacheError) as caught:
        build_prompt_cache(PROMPTS[1:], SmallEncoder("b"), tmp_path / "c", FillOptions(dtype="float32"))
    message = str(caught.value)
    for part in ('encoder.weights was "a" and is now "b"', 'dtype was "float16"', "prompts.count was 12 and is now 11"):
        assert part in message
    assert "Name another folder (--cache), or delete" in message
    with pytest.raises(StaleCacheError, match=r"prompts.sha256 was .* Name another folder \(--out\)") as caught:
        build_prompt_cache(PROMPTS[::-1], SmallEncoder(), tmp_path / "c", option="--out")
    assert "count" not in str(caught.value)
    with pytest.raises(StaleCacheError, match="prompts.sha256"):
        PromptCache.open(tmp_path / "c", prompt_fingerprint(["a"] * 12, SmallEncoder()))
    assert contents(tmp_path / "c") == before


def test_prompts_that_are_cut_elsewhere_are_other_prompts() -> None:
    one, two = (prompt_fingerprint(prompts, SmallEncoder()) for prompts in (["a b", "c"], ["a", "b c"]))
    assert one != two and json.loads(json.dumps(one)) == one


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "begun"])
def test_the_kinds_of_cache_are_told_apart_and_none_is_to_make_room_for_another(tmp_path: Path, complete: bool) -> None:
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    cache = build_cache(table, SmallEncoder(), tmp_path / "open", CENTRAL)
    ask, draws = (lambda batch: torch.zeros(len(batch), 2)), FixedDraws(2, 0, Levels())
    makes = {
        "encoded pairs": lambda folder: build_cache(table, SmallEncoder(), folder, CENTRAL),
        "encoded prompts": lambda folder: build_prompt_cache(PROMPTS, SmallEncoder(), folder),
        "cached reference errors": lambda folder: cache_errors(cache, draws, ask, folder, {"reference": "r"}),
    }
    options = {"cached reference errors": "--reference-cache"}
    for held, make in makes.items():
        make(tmp_path / held)
        if not complete:
            (tmp_path / held / "complete.json").unlink()
        before = contents(tmp_path / held)
        for wanted in makes.keys() - {held}:
            named = rf"{held} holds {held}, not {wanted}: name another folder \({options.get(wanted, '--cache')}\)\.$"
            with pytest.raises(UserError, match=named):
                makes[wanted](tmp_path / held)
        assert contents(tmp_path / held) == before


def test_a_cache_of_another_kind_does_not_open(tmp_path: Path) -> None:
    build_prompt_cache(PROMPTS, SmallEncoder(), tmp_path / "prompts")
    build_cache(open_pairs(write_pairs(tmp_path, DISTINCT)), SmallEncoder(), tmp_path / "pairs", CENTRAL)
    with pytest.raises(UserError, match="prompts holds encoded prompts, not encoded pairs"):
        PairCache.open(tmp_path / "prompts")
    with pytest.raises(UserError, match="pairs holds encoded pairs, not encoded prompts"):
        PromptCache.open(tmp_path / "pairs")
    with pytest.raises(UserError, match="There is no cache in"):
        PromptCache.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("prompts", "how", "message"),
    [
        ([], {}, "There are no prompts to encode"),
        ("a corgi", {}, "prompts is one text, 'a corgi'; expected a list"),
        (["a"], {"dtype": "int8"}, "float16, float32"),
        (["a"], {"batch_size": 0}, "batch_size is 0 .*at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path: Path, prompts: object, how: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_prompt_cache(prompts, SmallEncoder(), tmp_path / "c", FillOptions(**how))
    assert not (tmp_path / "c").exists()


def test_values_that_the_cache_cannot_hold_name_the_prompt(tmp_path: Path) -> None:
    class Loud(SmallEncoder):
        def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
            return {name: value * 1_000_000 for name, value in super().encode_prompts(prompts).items()}

    with pytest.raises(UserError, match=r"more than float16 holds; use dtype float32 .*\(for the prompt ''\)"):
        build_prompt_cache(["a"], Loud(), tmp_path / "c")
