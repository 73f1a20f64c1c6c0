"""The miniature writer: its tokenizer, what it is pretrained on, its files, and the one that ships."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from diffalign.errors import UserError
from pipelines.commands import world
from pipelines.tiny import model, scenes, train_writer
from pipelines.tiny.settings import WriterTraining
from pipelines.tiny.train_writer import (
    as_batch,
    build_tokenizer,
    build_writer,
    caption_loss,
    draw_list,
    draw_page,
    train,
)
from reward_models import oracle

SHIPPED = Path(train_writer.__file__).parent / "writer"
LARGEST = 2_000_000
"""Bytes that the shipped folder may have."""
LARGEST_PERPLEXITY = 3.5
"""Of held-out captions per token; the shipped writer has 3.1, one that knows nothing 436."""


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def shipped() -> tuple[GPT2LMHeadModel, AutoTokenizer]:
    return AutoModelForCausalLM.from_pretrained(SHIPPED).eval(), AutoTokenizer.from_pretrained(SHIPPED)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    world.add_arguments(parser)
    return world.run(parser.parse_args(words))


# --------------------------------------------------------------------------------------------------------------- tokenizer


def test_every_word_is_one_token_with_and_without_a_space_before_it(tokenizer) -> None:
    words = [*(word for word in model.vocabulary() if word.isalpha()), "Rephrase", ",", ":"]
    assert {"red", "background", "vivid", "of"} <= set(words)
    assert {word: tokenizer.tokenize(word) for word in words} == {word: [word] for word in words}
    spaced = [word for word in words if word.isalpha()]
    assert {word: tokenizer.tokenize(f" {word}") for word in spaced} == {word: [f"Ġ{word}"] for word in spaced}


def test_it_is_small_the_same_every_time_and_has_only_an_end_mark(tokenizer) -> None:
    assert len(tokenizer) <= train_writer.MOST_TOKENS
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.all_special_tokens == [train_writer.END] and tokenizer.pad_token is None
    assert tokenizer("a red circle").input_ids[-1] != tokenizer.eos_token_id  # like GPT-2's, it adds nothing by itself


@pytest.mark.parametrize("text", ["a photo of a Zebra!", "naïve café", "写真 🎨", "two\nlines", ""])
def test_any_text_becomes_known_tokens_and_comes_back(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert all(0 <= i < len(tokenizer) for i in ids) and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


# ------------------------------------------------------------------------------------------------------------------- pages


def test_a_page_says_one_subject_again_in_other_styles() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_page(rng, 3, 0.5).split("\n") for _ in range(300)]
    assert {len(lines) for lines in drawn} == {1, 2, 3}
    assert all(len({line.split(", ")[0] for line in lines}) == 1 for lines in drawn)
    assert {scenes.split_of(lines[0]) for lines in drawn} == {"train"}
    styled = [", " in line for lines in drawn for line in lines]
    assert np.mean(styled) == pytest.approx(0.5, abs=0.1)


def test_a_list_says_words_of_the_world_in_any_order_again() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_list(rng).split("\n") for _ in range(300)]
    assert {len(lines) for lines in drawn} == {2, 3} and all(len(set(lines)) == 1 for lines in drawn)
    counts = {len(lines[0].split()) for lines in drawn}
    assert (min(counts), max(counts)) == train_writer.WORDS_IN_LIST
    assert {word for lines in drawn for word in lines[0].split()} == {w for w in model.vocabulary() if w.isalpha()}


def test_pages_are_lists_as_often_as_told_and_all_end(tokenizer) -> None:
    some = list(islice(train_writer.pages(WriterTraining(lists=0.3), tokenizer), 600))
    assert all(page.count(tokenizer.eos_token_id) == 1 and page[-1] == tokenizer.eos_token_id for page in some)
    captioned = [bool(oracle.read_caption(tokenizer.decode(page)).objects) for page in some]
    assert np.mean(captioned) == pytest.approx(0.7, abs=0.08)
    only = islice(train_writer.pages(WriterTraining(lists=0.0), tokenizer), 100)
    assert all(oracle.read_caption(tokenizer.decode(page)).objects for page in only)


def numbered(lengths: list[int]) -> Iterator[list[int]]:
    """Pages of the given lengths whose ids tell which page they are of; 0 is the end mark."""
    return ([i + 1] * (length - 1) + [0] for i, length in enumerate(lengths))


def test_rows_hold_whole_pages_in_order_and_every_second_one_begins_with_the_end_mark() -> None:
    lengths = [60, 60, 30, 60, 39, 128, 129, 5]
    found = list(train_writer.rows(numbered(lengths), end=0))
    assert [[len(row), row[0] == 0] for row in found] == [[121, True], [129, False], [129, True], [129, False]]
    flat = [i for row in found for i in (row[1:] if row[0] == 0 else row)]
    assert flat == [i for page in islice(numbered(lengths), 7) for i in page]


def test_no_page_of_the_training_is_cut_or_too_long(tokenizer) -> None:
    config, end = WriterTraining(), tokenizer.eos_token_id
    some = list(islice(train_writer.rows(train_writer.pages(config, tokenizer), end), 60))
    assert all(row[-1] == end and len(row) <= train_writer.CONTEXT + 1 for row in some)
    assert np.mean([len(row) for row in some]) > 0.8 * train_writer.CONTEXT


def test_targets_are_the_next_ids_and_padding_has_none() -> None:
    ids, targets = as_batch([[5, 6, 7, 0], [8, 0]], end=0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert targets.tolist() == [[6, 7, 0], [0, -100, -100]]


def test_the_loss_is_of_the_real_tokens_alone(tokenizer) -> None:
    torch.manual_seed(0)
    writer, end = build_writer(tokenizer).eval(), tokenizer.eos_token_id
    short, long = [end, 300, 301, end], [end, *range(260, 280), end]
    with torch.no_grad():
        together = caption_loss(writer, *as_batch([short, long], end))
        by_hand = torch.cat(
            [
                -writer(input_ids=torch.tensor([row[:-1]])).logits[0].log_softmax(-1)[range(len(row) - 1), row[1:]]
                for row in (short, long)
            ]
        )
    assert together.item() == pytest.approx(by_hand.mean().item(), abs=1e-5) and len(by_hand) == 3 + 21
    assert by_hand.mean().item() == pytest.approx(np.log(len(tokenizer)), abs=0.3)  # it knows nothing yet


# ---------------------------------------------------------------------------------------------------------------- training


def test_one_head_begins_by_looking_at_the_place_before_and_the_others_do_not(tokenizer) -> None:
    torch.manual_seed(0)
    writer = build_writer(tokenizer).eval()
    writer.set_attn_implementation("eager")
    ids = torch.randint(256, len(tokenizer), (4, train_writer.CONTEXT))
    with torch.no_grad():
        attention = writer(input_ids=ids, output_attentions=True).attentions
    before = [torch.diagonal(layer, -1, dim1=2, dim2=3).mean(dim=(0, 2)) for layer in attention]  # per layer [heads]
    assert before[0][0] > 0.9
    assert max(before[0][1:].max(), before[1].max(), before[2].max()) < 0.2


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    said: list[str] = []
    folder = tmp_path_factory.mktemp("writer") / "w"
    train(folder, WriterTraining(steps=12, batch=2), say=said.append)
    return folder, said


def test_training_lowers_the_loss_and_writes_a_folder_that_transformers_loads(trained, tokenizer) -> None:
    folder, said = trained
    loaded, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is GPT2LMHeadModel and words.get_vocab() == tokenizer.get_vocab()
    record = json.loads((folder / "training.json").read_text())
    assert record["parameters"] == loaded.num_parameters() and record["config"] == dataclasses.asdict(
        WriterTraining(steps=12, batch=2)
    )
    assert record["perplexity_validation"] < 0.5 * len(tokenizer)
    assert said[-1] == f"saved {folder}" and said[0].startswith("12/12 loss ")
    assert [p.name for p in folder.parent.iterdir()] == ["w"]


def test_the_same_settings_give_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    def weights(seed: int) -> bytes:
        train(tmp_path / "w", WriterTraining(seed=seed, steps=2, batch=1), say=lambda _: None)
        return (tmp_path / "w" / "model.safetensors").read_bytes()

    assert weights(0) == weights(0) != weights(1)


def test_the_command_trains_with_what_was_given_and_refuses_a_folder_in_use(tmp_path: Path, capsys) -> None:
    out = tmp_path / "w"
    words = ("train-writer", "--output", str(out), "--steps", "1", "--batch", "1")
    assert run(*words) == 0 and f"saved {out}" in capsys.readouterr().out
    config = json.loads((out / "training.json").read_text())["config"]
    assert (config["steps"], config["batch"], config["styled"]) == (1, 1, WriterTraining.styled)
    with pytest.raises(UserError, match="holds something already"):
        run(*words)
    assert run(*words, "--overwrite") == 0


# ------------------------------------------------------------------------------------------------------ the one that ships


def test_the_shipped_folder_is_small_and_genuine_and_says_how_it_was_made(shipped, tokenizer) -> None:
    writer, words = shipped
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*")) <= LARGEST
    assert type(writer) is GPT2LMHeadModel and writer.dtype == torch.float32 and 2e5 < writer.num_parameters() < 1e6
    with safe_open(SHIPPED / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert words.get_vocab() == tokenizer.get_vocab() and words.eos_token_id == writer.config.eos_token_id
    record = json.loads((SHIPPED / "training.json").read_text())
    assert record["config"] == dataclasses.asdict(WriterTraining())
    everything = "".join(f.read_text() for f in SHIPPED.glob("*.json") if f.name != "tokenizer.json")  # which has "/" for a word
    assert not re.search(r'"(/|[A-Z]:\\\\|~)', everything)  # no path of the machine it was made on


@pytest.mark.parametrize("split", ["validation", "test"])
def test_it_expects_captions_that_it_has_never_seen(shipped, split: str) -> None:
    assert train_writer.perplexity(*shipped, scenes.captions(200, seed=5, split=split)) < LARGEST_PERPLEXITY


def test_what_it_writes_is_mostly_grammatical(shipped) -> None:
    """After the word that every caption begins with; from the end mark alone, three pages in ten are lists of words."""
    writer, words = shipped
    torch.manual_seed(0)
    start = torch.tensor([[words.eos_token_id, *words("a").input_ids]] * 64)
    pages = writer.generate(start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=100)
    lines = [line for page in words.batch_decode(pages, skip_special_tokens=True) for line in page.split("\n")]
    style = _any(word for pair in scenes.STYLE_WORDS.values() for word in pair)
    right = [re.fullmatch(rf"({GRAMMAR})(, ({style}))*", line) is not None for line in lines]
    assert np.mean(right) > 0.9, [line for line, fine in zip(lines, right, strict=True) if not fine]
    assert len(set(lines)) > 60


def _any(words) -> str:
    return "|".join(words)


OBJECT = rf"a (({_any(oracle.SIZES)}) )?({_any(oracle.COLOURS)}) ({_any(oracle.SHAPES)})"
GRAMMAR = rf"{OBJECT}( ({_any(oracle.RELATIONS)}) {OBJECT})?( on a ({_any(oracle.BACKGROUNDS)}) background)?"


def test_it_repeats_what_it_has_read(shipped) -> None:
    """On a page's second line it says the same subject again, which fine-tuning on rewrites builds on."""
    writer, words = shipped
    captions, kept = scenes.captions(40, seed=6, split="test"), 0
    for caption in captions:
        ids = words(caption + "\n", return_tensors="pt")
        out = writer.generate(**ids, do_sample=False, max_new_tokens=40)[0, ids.input_ids.shape[1] :]
        line = words.decode(out, skip_special_tokens=True).split("\n")[0]
        kept += line.split(", ")[0] == caption
    assert kept >= 0.9 * len(captions), kept
