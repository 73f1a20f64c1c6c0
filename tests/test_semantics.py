"""Embeddings of texts: each form of model gives the vectors that it should; what is not read or not there is told."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import towers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5Model,
)

import reward_models
from diffalign.errors import UserError
from pipelines import embedding_files
from pipelines.semantics import between, distance, embed_all, load_embedding
from pipelines.tiny import scenes
from pipelines.tiny.model import checkpoint_path
from reward_models import _clip, oracle

TEXTS = ["a cat", "a cat on a mat, oil painting", "", "a dog"]
WORDS = ["a", "cat", "on", "mat", ",", "oil", "painting", "dog", "big", "query", ":", "Cat"]


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------------------------- distance


class Recorded:
    """The tiny embedding, which notes what it is asked."""

    def __init__(self) -> None:
        self._inner, self.asked = load_embedding("tiny", device="cpu"), []
        self.name, self.cut, self.fingerprint = "tiny", self._inner.cut, self._inner.fingerprint

    def embed(self, texts):
        self.asked.append(list(texts))
        return self._inner.embed(texts)


def test_the_distance_is_one_less_the_cosine_and_each_text_is_embedded_once() -> None:
    prompts = ["a red circle", "a red circle", "a small blue star", "a green cross"]
    rewrites = ["a red circle, vivid", "a red circle", "a large blue star, flat", "a yellow cross"]
    recorded, told = Recorded(), []
    found = distance(recorded, prompts, rewrites, batch_size=2, progress=lambda *now: told.append(now))
    a, b = (load_embedding("tiny", device="cpu").embed(side) for side in (prompts, rewrites))
    close(found, 1 - cosine_similarity(a, b))
    assert found.dtype == torch.float32 and found.shape == (4,) and found[1] == 0.0
    assert 0 < found[0] < found[3] <= 2
    assert sorted(text for batch in recorded.asked for text in batch) == sorted({*prompts, *rewrites})
    assert max(map(len, recorded.asked)) == 2
    assert told == [("embedding", 2, 6), ("embedding", 4, 6), ("embedding", 6, 6)]
    with pytest.raises(ValueError, match="2 prompts and 1 rewrites"):
        distance(recorded, prompts[:2], rewrites[:1])
    assert distance(recorded, [], []).shape == (0,)


def test_the_distance_keeps_its_digits_and_its_range() -> None:
    a = unit(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(between(a, a), torch.zeros(100))
    assert between(a, -a).max() <= 2.0 and between(a, -a).min() > 2 - 1e-5
    angle = torch.tensor([1e-3, 1e-2])
    near = between(torch.tensor([[1.0, 0.0]] * 2), torch.stack([angle.cos(), angle.sin()], dim=1))
    torch.testing.assert_close(near, 2 * (angle / 2).sin() ** 2, rtol=1e-5, atol=0)  # of 5e-7, 1 - cos would leave one digit


def test_many_texts_come_in_their_order_whatever_the_batch() -> None:
    embedding, texts = load_embedding("tiny", device="cpu"), ["a red circle on a black background", "a cross", "", "a cross"]
    singles = torch.cat([embedding.embed([text]) for text in texts])
    for size in (1, 2, 64):
        close(embed_all(embedding, texts, size), singles)
    assert embed_all(embedding, []).shape == embedding.embed([]).shape == (0, singles.shape[1])


# ---------------------------------------------------------------------------------------------------------------- the tiny one


def test_the_tiny_one_is_the_miniature_pickscore_and_tells_drift_from_style() -> None:
    embedding, captions = load_embedding("tiny", device="cpu"), scenes.captions(60, 5, "test")
    close(embedding.embed(captions), reward_models.load("tiny-pickscore", device="cpu").embed_text(captions))
    rng, words = np.random.default_rng(1), [word for pair in scenes.STYLE_WORDS.values() for word in pair]

    def styled(caption: str) -> str:
        return ", ".join([caption, *rng.choice(words, 3, replace=False)])

    def drifted(caption: str) -> str:
        parts = caption.split()
        kinds = (oracle.COLOURS, oracle.SHAPES)
        where, kind = next((i, kind) for i, part in enumerate(parts) for kind in kinds if part in kind)
        parts[where] = str(rng.choice([word for word in kind if word != parts[where]]))
        return " ".join(parts)

    style = distance(embedding, captions, [styled(c) for c in captions])
    drift = distance(embedding, captions, [styled(drifted(c)) for c in captions])
    assert (drift[:, None] > style).float().mean() > 0.95


def test_the_tiny_checkpoints_own_text_encoder_by_a_pooling() -> None:
    network = CLIPTextModel.from_pretrained(checkpoint_path() / "text_encoder").eval()
    embedding = load_embedding("tiny", pooling="mean", device="cpu")
    ids = embedding._tokenizer(["a red circle"], return_tensors="pt").input_ids
    with torch.no_grad():
        out = network(input_ids=ids)
    close(embedding.embed(["a red circle"]), unit(out.last_hidden_state.mean(dim=1)))
    words = load_embedding("tiny", pooling="words", device="cpu")
    close(words.embed(["a red circle"]), unit(out.last_hidden_state[:, 1:-1].mean(dim=1)))
    close(words.embed(["", "a red circle"])[:1], words.embed([""]))  # no words: the marks, and no padding
    for folder in (checkpoint_path(), checkpoint_path() / "text_encoder"):  # whose tokenizer lies beside it
        close(load_embedding(folder, device="cpu").embed(["a red circle"]), unit(out.pooler_output))


# ---------------------------------------------------------------------------------------------------------------------- CLIPs


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A CLIP with a tokenizer, as Transformers saves it; a config of the kind that states the projection outside only."""
    folder = tmp_path / "clip"
    model = _clip.build(towers.GELU)
    model.load_state_dict(_clip.to_transformers(towers.original().state_dict()))
    model.save_pretrained(folder)
    towers.write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["projection_dim"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def features(folder: Path, texts: list[str]) -> torch.Tensor:
    tokens = _clip.transformers_tokens(folder, "clip")(texts)
    with torch.no_grad():
        return unit(CLIPModel.from_pretrained(folder).eval().get_text_features(input_ids=tokens).pooler_output)


def test_a_clip_is_read_without_its_eye(clip: Path) -> None:
    embedding = load_embedding(clip, device="cpu")
    close(embedding.embed(TEXTS), features(clip, TEXTS))
    assert embedding.name == str(clip) and embedding.recipe.window == 77
    assert not [name for name, _ in embedding._network.named_parameters() if "vision" in name]
    half = load_embedding(clip, device="cpu", dtype="bfloat16").embed(TEXTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(4))
    assert 1e-4 < (half - features(clip, TEXTS)).abs().max() < 0.1


def test_its_text_tower_alone(clip: Path, tmp_path: Path) -> None:
    network = load_embedding(clip, device="cpu")._network
    network.save_pretrained(tmp_path / "projected")
    close(load_embedding(tmp_path / "projected", tokenizer=clip, device="cpu").embed(TEXTS), features(clip, TEXTS))
    assert isinstance(network, CLIPTextModelWithProjection)
    network.text_model.save_pretrained(tmp_path / "plain")
    plain = load_embedding(tmp_path / "plain", tokenizer=clip, device="cpu").embed(TEXTS)
    assert plain.shape == (4, 32) and features(clip, TEXTS).shape == (4, 24)
    close(unit(network.text_projection(plain)), features(clip, TEXTS))
    with pytest.raises(UserError, match="reads forwards only: its first state is the same for every text"):
        load_embedding(clip, pooling="cls")


def test_what_lies_beyond_77_tokens_is_told_as_it_was_typed(clip: Path) -> None:
    embedding = load_embedding(clip, device="cpu")
    whole = "A Cat, " * 25  # 75 tokens and two marks
    texts = [whole, whole + "an Oil  Painting!", "a cat", ""]
    assert embedding.cut(texts) == ["", "an Oil  Painting!", "", ""]
    close(embedding.embed([whole]), embedding.embed([texts[1]]))
    assert embedding.cut([]) == []


def test_a_typed_mark_does_not_end_the_text(clip: Path) -> None:
    embedding = load_embedding(clip, device="cpu")
    close(embedding.embed(["a cat <|endoftext|> on a mat"]), embedding.embed(["a cat on a mat"]))
    embedding = load_embedding(clip, device="cpu", prefix="query: ")
    close(embedding.embed(["a cat"]), features(clip, ["query: a cat"]))


def test_padding_with_an_exclamation_mark_does_not_swallow_it(clip: Path) -> None:
    """SD 2's tokenizer pads with it."""
    rules = json.loads((clip / "tokenizer_config.json").read_text())
    (clip / "tokenizer_config.json").write_text(json.dumps({**rules, "pad_token": "!"}))
    embedding = load_embedding(clip, device="cpu")
    assert embedding._tokenizer.pad_token == "!"
    assert distance(embedding, ["a cat"], ["a cat!"])[0] > 1e-3
    close(embedding.embed(["a cat!", "a cat on a mat, oil painting"])[:1], embedding.embed(["a cat!"]))


def test_siglip_reads_its_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 40, "max_position_embeddings": 8, "projection_size": 32}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14})).eval()
    model.save_pretrained(tmp_path)
    write_words(tmp_path, marks=("", "[SEP]"), length=8)
    embedding = load_embedding(tmp_path, device="cpu")
    ids = embedding._tokenizer(TEXTS, padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model.get_text_features(input_ids=ids).pooler_output
    close(embedding.embed(TEXTS), unit(theirs))
    with pytest.raises(UserError, match="is a siglip model, which makes its own vector: pooling must be auto"):
        load_embedding(tmp_path, pooling="mean")


# ------------------------------------------------------------------------------------------------------------ other encoders


def write_words(folder: Path, marks: tuple[str, str] = ("[CLS]", "[SEP]"), length: int = 16, pad: bool = True) -> None:
    """A tokenizer of whole words with a mark before and after."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    before, after = marks
    template = " ".join(filter(None, (before, "$A", after)))
    if before or after:
        special = [(mark, vocabulary[mark]) for mark in marks if mark]
        words.post_processor = TemplateProcessing(single=template, special_tokens=special)
    named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} if before or after else {"unk_token": "[UNK]"}
    named |= {"pad_token": "[PAD]"} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **named).save_pretrained(folder)


SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    BertModel(BertConfig(**SMALL, max_position_embeddings=16), add_pooling_layer=False).save_pretrained(folder)
    write_words(folder)
    return folder


def states(bert: Path, text: str) -> torch.Tensor:
    """[S, D] of one text, marks and all."""
    from transformers import AutoTokenizer

    model = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(bert)(text, return_tensors="pt")).last_hidden_state[0]


def make_sentences(folder: Path, extra: str = "", **pooling: object) -> None:
    """The files of sentence-transformers."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", extra or "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"} for i, (p, k) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    if pooling:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))


MEANS = {
    "mean": lambda h: h.mean(dim=0),
    "cls": lambda h: h[0],
    "max": lambda h: h.amax(dim=0),
    "last": lambda h: h[-1],
    "words": lambda h: h[1:-1].mean(dim=0) if len(h) > 2 else h.mean(dim=0),
}


@pytest.mark.parametrize("pooling", MEANS)
def test_every_pooling_leaves_the_padding_out(pooling: str, bert: Path) -> None:
    wanted = torch.stack([MEANS[pooling](states(bert, text)) for text in TEXTS])
    close(load_embedding(bert, pooling=pooling, device="cpu").embed(TEXTS), unit(wanted))
    if pooling == "mean":
        close(load_embedding(bert, device="cpu").embed(TEXTS), unit(wanted))


@pytest.mark.parametrize(
    "switches, poolings",
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ["mean"]),
        ({"pooling_mode_cls_token": True}, ["cls"]),
        ({"pooling_mode_max_tokens": True}, ["max"]),
        ({"pooling_mode_lasttoken": True}, ["last"]),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ["mean"]),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ["cls", "mean"]),
        ({"pooling_mode": "cls"}, ["cls"]),
        ({"pooling_mode": ["mean", "max"]}, ["mean", "max"]),
    ],
)
def test_sentence_embeddings_pool_as_their_files_say(switches: dict, poolings: list[str], bert: Path) -> None:
    make_sentences(bert, **switches)
    wanted = torch.stack([torch.cat([MEANS[p](states(bert, text)) for p in poolings]) for text in TEXTS])
    close(load_embedding(bert, device="cpu").embed(TEXTS), unit(wanted))
    close(load_embedding(bert, pooling="max", device="cpu").embed(TEXTS[:1]), unit(states(bert, TEXTS[0]).amax(dim=0))[None])


def test_sentence_embeddings_keep_their_other_habits(bert: Path) -> None:
    make_sentences(bert, pooling_mode_cls_token=True)
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": true}')
    (bert / "config_sentence_transformers.json").write_text('{"prompts": {"q": "query : "}, "default_prompt_name": "q"}')
    embedding = load_embedding(bert, device="cpu")
    close(embedding.embed(["Cat"])[0], unit(states(bert, "query : cat")[0]))
    assert embedding.cut(["a cat on a Mat", "a cat"]) == ["on a mat", ""]
    plain = load_embedding(bert, prefix="", device="cpu")
    close(plain.embed(["Cat"])[0], unit(states(bert, "cat")[0]))
    assert plain.cut(["a cat on a mat"]) == ["mat"]
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true, "include_prompt": false}')
    with pytest.raises(UserError, match="leaves its instruction 'query : ' out of its pooling, which is not supported"):
        load_embedding(bert)


def test_a_network_in_a_folder_of_its_own(bert: Path, tmp_path: Path) -> None:
    wanted, outer = states(bert, "a cat"), tmp_path / "outer"
    outer.mkdir()
    bert.rename(outer / "0_Transformer")
    make_sentences(outer, pooling_mode_max_tokens=True)
    modules = json.loads((outer / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (outer / "modules.json").write_text(json.dumps(modules))
    (outer / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    embedding = load_embedding(outer, device="cpu")
    close(embedding.embed(["a cat"])[0], unit(wanted.amax(dim=0)))
    assert embedding.recipe.window == 5


def test_sentence_embeddings_that_would_be_others_are_refused(bert: Path) -> None:
    make_sentences(bert, extra="Dense", pooling_mode_mean_tokens=True)
    with pytest.raises(UserError, match=r"bert has a Dense layer behind its encoder, which is not supported"):
        load_embedding(bert)
    make_sentences(bert, pooling_mode_weightedmean_tokens=True)
    with pytest.raises(
        UserError, match="pools by weightedmean_tokens, which is not supported here; known are cls_token, mean_tok"
    ):
        load_embedding(bert)
    (bert / "1_Pooling" / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"is not whole: its modules\.json names 1_Pooling, and there is no 1_Pooling/config\.json"
    ):
        load_embedding(bert)
    (bert / "modules.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"modules\.json is not a list of modules"):
        load_embedding(bert)


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2"])
def test_encoders_of_other_kinds(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 20, "d_model": 16, "decoder_start_token_id": 0}
    if kind == "t5":
        model = T5Model(T5Config(**small, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    elif kind == "bart":
        heads = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        model = BartModel(BartConfig(**small, **heads, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16))
    else:
        model = GPT2Model(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    model.eval().save_pretrained(tmp_path)
    write_words(tmp_path, ("", "") if kind == "gpt2" else ("", "[SEP]"), pad=kind != "gpt2")
    embedding = load_embedding(tmp_path, device="cpu")
    encoder, texts = model if kind == "gpt2" else model.get_encoder(), [text for text in TEXTS if text]
    wanted = []
    for text in texts:
        with torch.no_grad():
            ids = embedding._tokenizer(text, return_tensors="pt").input_ids
            wanted.append(encoder(input_ids=ids).last_hidden_state[0].mean(dim=0))
    close(embedding.embed(texts), unit(torch.stack(wanted)))
    assert embedding.recipe.window == 16
    if kind == "t5":
        assert not [name for name, _ in embedding._network.named_parameters() if "decoder" in name]


def test_a_vector_of_its_own_is_not_made_up(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not whole: its files lack 2 weights, for example pooler\.dense\.bias"):
        load_embedding(bert, pooling="pooled")
    model = BertModel(BertConfig(**SMALL, max_position_embeddings=16)).eval()
    model.save_pretrained(bert)
    embedding = load_embedding(bert, pooling="pooled", device="cpu")
    with torch.no_grad():
        close(embedding.embed(["a cat"]), unit(model(**embedding._tokenizer("a cat", return_tensors="pt")).pooler_output))
    GPT2Model(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16)).save_pretrained(tmp_path / "gpt2")
    write_words(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"gpt2 could not be loaded as an embedding of texts: it makes no vector of its own"):
        load_embedding(tmp_path / "gpt2", pooling="pooled")


def test_roberta_has_two_places_less(tmp_path: Path) -> None:
    RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=12, pad_token_id=0), add_pooling_layer=False).save_pretrained(
        tmp_path
    )
    write_words(tmp_path, length=10**30)
    embedding = load_embedding(tmp_path, device="cpu")
    assert embedding.cut(["cat " * 20]) == [" ".join(["cat"] * 12)] and embedding.embed(["cat " * 20]).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_follows_what_the_vectors_depend_on(bert: Path) -> None:
    def of(**options: object) -> str:
        return load_embedding(bert, device="cpu", **options).fingerprint

    first, seen = of(), set()
    assert of() == first
    for options in ({"pooling": "max"}, {"prefix": "query : "}, {"dtype": "bfloat16"}):
        seen.add(of(**options))
    weights = load_file(bert / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][3] += 1e-3
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    seen.add(of())
    write_words(bert, ("", "[SEP]"))
    seen.add(of())
    assert first not in seen and len(seen) == 5


# -------------------------------------------------------------------------------------------------------------- what is amiss


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's library, without a connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(hub: Path, folder: Path, name: str) -> Path:
    """A model where the hub's library keeps those that it has fetched."""
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / ("0" * 40))
    return place


@pytest.mark.parametrize("name, place", embedding_files.CLIPS.items())
def test_a_named_clip_that_is_missing_offline_and_one_that_is_there(name: str, place: str, hub: Path, clip: Path) -> None:
    wanted = (
        rf"The embedding '{name}' needs {place}, which is not on this machine and could not be fetched from the hub\. "
        rf"Where there is a connection, `hf download {place} --include \"\*\.json\" .*` fetches it; a folder that holds a copy"
    )
    with pytest.raises(UserError, match=wanted):
        load_embedding(name)
    theirs = features(clip, TEXTS)
    put(hub, clip, place)
    embedding = load_embedding(name, device="cpu")
    close(embedding.embed(TEXTS), theirs)
    assert embedding.name == name


def test_a_hub_id_that_is_missing_offline(hub: Path) -> None:
    said = r"There is no folder of that name, and org/nothing is not on this machine .* `hf download org/nothing .*'tiny'"
    with pytest.raises(UserError, match=said):
        load_embedding("org/nothing")


def test_nobody_can_tell_offline_how_half_a_model_pools(hub: Path, bert: Path) -> None:
    """Somebody fetched the network alone; sentence-transformers would pool by the first token, say."""
    first = unit(states(bert, "a cat").mean(dim=0))
    place = put(hub, bert, "org/bert")
    with pytest.raises(
        UserError, match=r"Whether org/bert has a modules\.json, .* cannot be told without a connection\..*hf down"
    ):
        load_embedding("org/bert")
    close(load_embedding("org/bert", pooling="mean", device="cpu").embed(["a cat"])[0], first)
    known = place / ".no_exist" / ("0" * 40)  # the hub was asked for it once, and had none
    known.mkdir(parents=True)
    (known / "modules.json").write_text("")
    close(load_embedding("org/bert", device="cpu").embed(["a cat"])[0], first)


def test_a_sentence_embedding_from_the_hub(hub: Path, bert: Path) -> None:
    make_sentences(bert, pooling_mode_cls_token=True)
    first = unit(states(bert, "a cat")[0])
    place = put(hub, bert, "org/bert")  # without the files that such a model need not have
    close(load_embedding("org/bert", device="cpu").embed(["a cat"])[0], first)
    (place / "snapshots" / ("0" * 40) / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UserError, match=r"Whether org/bert has a 1_Pooling/config\.json"):
        load_embedding("org/bert")


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no embedding 'clipp' .*Did you mean 'clip'\? An embedding is clip, clip-h, tiny, a folder"
    ):
        load_embedding("clipp")
    with pytest.raises(UserError, match=r"no embedding '.*/gone'"):
        load_embedding(tmp_path / "gone")
    with pytest.raises(UserError, match="pooling is 'average'; it must be auto or one of pooled, mean, words"):
        load_embedding("tiny", pooling="average")
    with pytest.raises(UserError, match="dtype is 'int8'; it must be one of float32"):
        load_embedding("tiny", dtype="int8")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"is not a text encoder: it has no config\.json\. It holds: notes\.txt\."):
        load_embedding(tmp_path)


def test_models_that_are_not_whole(bert: Path, clip: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layer.1.output" not in k}, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"bert is not whole: its files lack 4 weights, for example encoder\.layer\.1\.output"):
        load_embedding(bert)
    (bert / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bert could not be loaded as an embedding of texts: "):
        load_embedding(bert)
    (bert / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"bert could not be loaded as an embedding of texts: .*model\.safetensors"):
        load_embedding(bert)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (clip / file).unlink()
    with pytest.raises(UserError, match=r"clip has no tokenizer in .*clip that knows a word\. .* is used by tokenizer=PATH"):
        load_embedding(clip)


def test_numbers_that_overflow_are_refused(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5] = torch.nan  # "cat"
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    embedding = load_embedding(bert, device="cpu", dtype="bfloat16")
    assert embedding.embed(["a dog"]).isfinite().all()
    with pytest.raises(
        UserError, match="no finite numbers for 'a cat': its network overflows in bfloat16. Load it with dtype float"
    ):
        embedding.embed(["a dog", "a cat"])
