"""VQAScore's CLIP-FlanT5, tiny and random in the released layout, against the wiring written out here."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import reward_models
from reward_models import _shards, vqascore
from reward_models._judge import Preparation
from reward_models.base import Judge, JudgeError

TINY = vqascore.Shape((32, 48, 2, 4), (24, 40, 3, 2), head=8, vocabulary=160)
TOWER = "vision_tower.vision_tower.vision_model."
PROMPTS = ["a red circle", "two small blue stars, one on the left of the other " * 3, "star"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = SYSTEM + ' USER: <image>\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((64, 64), (101, 60), (230, 400))]


def write_tokenizer(folder: Path) -> Any:
    """T5's own kind: a unigram model of words and letters, its marks first and its blanks last."""
    from transformers import T5Tokenizer

    words = ["yes", "no", "Yes", "figure", "show", "Please", "answer", "chat", "a", "red", "circle", "blue", "star", "USER:"]
    pieces = {"▁": -3.0, **{f"▁{word}": -2.0 for word in words}, **{chr(c): -9.0 for c in range(33, 127)}}
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    blanks = [(f"<extra_id_{i}>", 0.0) for i in (3, 2, 1, 0)]
    tokenizer = T5Tokenizer(vocab=[*marks, *pieces.items(), *blanks], extra_ids=4)
    tokenizer.save_pretrained(folder)
    return tokenizer


def random_state() -> dict[str, Tensor]:
    """Weights under the names that training saves: Transformers' T5 and CLIP, and LLaVA's projector."""
    names = {}
    with torch.device("meta"):
        nets = vqascore.build(TINY)
    for part, prefix in (("t5", ""), ("vision", TOWER), ("projector", "mm_projector.")):
        names |= {prefix + name.removeprefix("vision_model."): p.shape for name, p in nets[part].state_dict().items()}
    rng = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in names.items():
        if name.endswith("embed_tokens.weight"):
            continue
        norm = "norm" in name and name.endswith("weight")
        size = {"shared.weight": 2.0, "lm_head.weight": 0.3}.get(name, 0.4)
        state[name] = (1.0 if norm else 0.0) + (0.1 if norm else size) * torch.randn(shape, generator=rng)
    return state


def write_shards(state: dict[str, Tensor], folder: Path, suffix: str = "safetensors") -> None:
    """Two files and their index, as Transformers saves what is large."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(state)
    index = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(names)}
    for file in set(index.values()):
        part = {name: state[name] for name in names if index[name] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture
def folder(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(vqascore.SHAPES, "xxl", TINY)
    write_shards(state, tmp_path)
    write_tokenizer(tmp_path)
    return tmp_path


def judge_of(folder: Path, **options: Any) -> vqascore.VQAScore:
    return reward_models.load("vqascore", **{"weights": folder, "tokenizer": folder, "dtype": "float32", **options})


# -------------------------------------------------------------------------------------------------------------- by hand


def see(state: dict[str, Tensor], picture: Image.Image, keep_class: bool) -> Tensor:
    """[576, 24]: padded, resized, normalised as by Transformers' own processor; CLIP's tower one layer short."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    side, (width, height) = max(picture.size), picture.size
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(picture)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    pixels = processor(Image.fromarray(square), return_tensors="pt")["pixel_values"]
    width, inner, layers, heads = TINY.vision
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers - 1,
        num_attention_heads=heads,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModel(config).eval()
    weights = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
    assert not tower.load_state_dict(weights, strict=False).missing_keys
    tokens = tower(pixels).last_hidden_state[0]  # before the last norm
    x = tokens if keep_class else tokens[1:]
    x = F.gelu(F.linear(x, state["mm_projector.0.weight"], state["mm_projector.0.bias"]))
    return F.linear(x, state["mm_projector.2.weight"], state["mm_projector.2.bias"])


@torch.no_grad()
def by_hand(
    state: dict[str, Tensor],
    folder: Path,
    picture: Image.Image,
    prompt: str,
    *,
    keep_class: bool = False,
    one_end: bool = False,
    of_first: bool = False,
    whole_vocabulary: bool = False,
    scaled: bool = False,
    tied: bool = False,
) -> float:
    """One score; each option springs a trap."""
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

    tokenizer, (width, inner, layers, heads) = T5Tokenizer.from_pretrained(folder), TINY.text
    shape = {"d_model": width, "d_ff": inner, "d_kv": 8, "num_layers": layers, "num_heads": heads, "vocab_size": 160}
    config = T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    encoder, decoder = T5EncoderModel(config).encoder.eval(), T5ForConditionalGeneration(config).decoder.eval()
    for half, name in ((encoder, "encoder."), (decoder, "decoder.")):
        weights = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
        assert half.load_state_dict(weights, strict=False).missing_keys == ["embed_tokens.weight"]
    table = state["shared.weight"]
    before, after = (tokenizer(chunk).input_ids for chunk in QUESTION.format(prompt).split("<image>"))
    assert before[-1] == after[-1] == tokenizer.eos_token_id == 1
    before = before[:-1] if one_end else before
    row = torch.cat([table[before], see(state, picture, keep_class), table[after]])
    read = encoder(inputs_embeds=row[None]).last_hidden_state
    label = tokenizer("Yes").input_ids
    assert len(label) == 2 and label[1] == 1
    starts = table[torch.tensor([0, *label[:-1]])]  # the pad mark starts an answer
    said = decoder(inputs_embeds=starts[None], encoder_hidden_states=read).last_hidden_state[0]
    logits = (said * width**-0.5 if scaled else said) @ (table if tied else state["lm_head.weight"]).T
    logs = logits[:, : None if whole_vocabulary else len(tokenizer)].log_softmax(-1)
    logs = logs[torch.arange(2), torch.tensor(label)]
    return (logs[0] if of_first else logs.mean()).exp().item()


def scores_by_hand(state: dict[str, Tensor], folder: Path, **trap: bool) -> Tensor:
    return torch.tensor([by_hand(state, folder, *pair, **trap) for pair in zip(pictures(), PROMPTS, strict=True)])


# ---------------------------------------------------------------------------------------------------------------- tests


def test_the_score_is_that_of_the_original_wiring(state: dict[str, Tensor], folder: Path) -> None:
    judge = judge_of(folder)
    assert isinstance(judge, Judge)
    score = judge.score(pictures(), PROMPTS)
    assert score.dtype == torch.float32 and score.log().std() > 0.1 and 0 < score.min() < score.max() < 1
    torch.testing.assert_close(score, scores_by_hand(state, folder), rtol=1e-5, atol=0)


@pytest.mark.parametrize("trap", ["keep_class", "one_end", "of_first", "whole_vocabulary", "scaled", "tied"])
def test_each_trap_would_score_differently(trap: str, state: dict[str, Tensor], folder: Path) -> None:
    score = judge_of(folder).score(pictures()[0], PROMPTS[0])
    sprung = by_hand(state, folder, pictures()[0], PROMPTS[0], **{trap: True})
    assert abs(sprung / score.item() - 1) > 1e-4  # ten times what the scores may differ from the original's


def test_a_batch_scores_as_its_pictures_alone(folder: Path) -> None:
    judge = judge_of(folder)
    score = judge.score(pictures(), PROMPTS)
    singles = torch.cat([judge.score(p, t) for p, t in zip(pictures(), PROMPTS, strict=True)])
    torch.testing.assert_close(score, singles, rtol=1e-5, atol=0)
    matrix = judge.matrix(pictures(), PROMPTS)
    torch.testing.assert_close(matrix.diag(), score, rtol=1e-5, atol=0)
    assert matrix.log().std(0).min() > 1e-2 and matrix.log().std(1).min() > 1e-2  # pictures and prompts both matter


def test_prompts_are_data(folder: Path) -> None:
    judge = judge_of(folder)
    odd = judge.score(pictures()[0], 'a {red} {} {0} "circle"')
    assert torch.isfinite(odd).all() and odd != judge.score(pictures()[0], "a red circle")
    torch.testing.assert_close(judge.score(pictures()[0], "a </s><extra_id_1> star"), judge.score(pictures()[0], "a star"))
    assert torch.isfinite(judge.score(pictures()[0], "an <image> of an <image>")).all()
    seen = torch.zeros(576, 32)
    assert len(judge._question(seen, "circle " * 3000)) == 2048 - 1 + 576  # cut, the picture counted as one word
    assert len(judge._question(seen, "circle")) == 576 + len(judge._question(seen[:0], "circle")) < 1000


def test_the_released_sizes_are_those_of_the_files() -> None:
    """22.9 and 6.33 GB in bfloat16, as the hub lists them: with CLIP's part, and with one table of words."""
    for size, gigabytes in (("xxl", 22.9), ("xl", 6.33)):
        nets = vqascore.build(vqascore.SHAPES[size])
        weights = dict(nets.named_parameters(remove_duplicate=False))
        assert all(p.is_meta for p in weights.values())
        counted = {name: p.numel() for name, p in weights.items() if "embed_tokens" not in name}
        assert 2e-9 * sum(counted.values()) == pytest.approx(gigabytes, rel=3e-3)
        assert nets["t5"].encoder.embed_tokens is nets["t5"].decoder.embed_tokens is nets["t5"].shared
        assert nets["t5"].config.scale_decoder_outputs is False
        assert nets["t5"].config.dense_act_fn == "gelu_new" and nets["vision"].config.hidden_act == "quick_gelu"


def test_other_layouts_of_the_same_weights(state: dict[str, Tensor], folder: Path, tmp_path_factory: Any) -> None:
    """Pickled shards, one file, and the names under which the same table is saved again."""
    score = judge_of(folder).score(pictures()[1], PROMPTS[1])
    bins, one = (tmp_path_factory.mktemp(name) for name in ("bins", "one"))
    aliases = {f"{name}embed_tokens.weight": state["shared.weight"].clone() for name in ("", "encoder.", "decoder.")}
    buffer = {TOWER + "embeddings.position_ids": torch.arange(577)[None]}
    write_shards({**state, **aliases, **buffer}, bins, suffix="bin")
    nested = {f"model.{k}" if k.startswith(("mm_", "vision_")) else k: v for k, v in state.items() if k != "shared.weight"}
    save_file({**nested, "encoder.embed_tokens.weight": state["shared.weight"]}, one / "model.safetensors")
    torch.save(state, one / "old.bin", _use_new_zipfile_serialization=False)
    for where in (bins, bins / "pytorch_model.bin.index.json", one, one / "old.bin"):
        assert torch.equal(judge_of(folder, weights=where).score(pictures()[1], PROMPTS[1]), score), where


def test_a_tokenizer_with_other_numbers_makes_another_judge(folder: Path) -> None:
    first, place = judge_of(folder), folder / "tokenizer.json"
    told = json.loads(place.read_text())
    red, blue = (next(piece for piece in told["model"]["vocab"] if piece[0] == word) for word in ("▁red", "▁blue"))
    red[0], blue[0] = blue[0], red[0]
    place.write_text(json.dumps(told))
    other = judge_of(folder)
    assert other.fingerprint != first.fingerprint
    assert not torch.equal(other.score(pictures(), PROMPTS[0]), first.score(pictures(), PROMPTS[0]))


def test_the_tower_may_lie_elsewhere(state: dict[str, Tensor], folder: Path, tmp_path_factory: Any) -> None:
    alone, clip = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("clip")
    write_shards({k: v for k, v in state.items() if not k.startswith(TOWER)}, alone)
    tower = {"vision_model." + k.removeprefix(TOWER): v for k, v in state.items() if k.startswith(TOWER)}
    save_file({**tower, "logit_scale": torch.ones(()), "text_model.x": torch.ones(1)}, clip / "model.safetensors")
    judge = judge_of(folder, weights=alone, vision=clip)
    assert torch.equal(judge.score(pictures(), PROMPTS), judge_of(folder).score(pictures(), PROMPTS))
    assert len([key for key in judge.provenance() if key.startswith("weights")]) == 3
    with pytest.raises(JudgeError, match=r"needs the weights of openai/clip-vit-large-patch14-336 .*`hf download openai/clip"):
        judge_of(folder, weights=alone)


def test_no_weight_is_held_in_another_precision(folder: Path) -> None:
    exact, half = judge_of(folder), judge_of(folder, dtype="bfloat16")
    for net in (half._t5, half._vision, half._projector):
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16} and not any(p.requires_grad for p in net.parameters())
    torch.testing.assert_close(half.score(pictures(), PROMPTS).log(), exact.score(pictures(), PROMPTS).log(), rtol=0.1, atol=0.5)
    assert half.score(pictures(), PROMPTS).dtype == torch.float32
    assert half.fingerprint != exact.fingerprint
    assert not torch.equal(exact._t5.lm_head.weight, exact._t5.shared.weight)


def test_the_gradient_reaches_the_picture_and_is_that_of_the_score(folder: Path) -> None:
    judge = judge_of(folder)
    pixels = torch.rand(2, 3, 70, 80, requires_grad=True)
    judge.differentiable_score(pixels, PROMPTS[:2]).log().sum().backward()
    assert (pixels.grad != 0).float().mean() > 0.5
    step = 1e-3 * pixels.grad / pixels.grad.norm()
    with torch.no_grad():
        up, down = (judge.differentiable_score(pixels + sign * step, PROMPTS[:2]).log().sum() for sign in (1, -1))
    assert (up - down).item() == pytest.approx(2e-3 * pixels.grad.norm().item(), rel=0.05)
    assert judge.loss(pixels, PROMPTS[:2]).ndim == 0


@pytest.mark.parametrize("size", [(400, 400), (500, 371), (371, 500), (40, 1)], ids=str)
def test_the_ways_of_preparing_a_picture_agree(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    how = vqascore.PaddedSquare()
    assert how == vqascore.PaddedSquare() and hash(Preparation(how)) == hash(Preparation(vqascore.PaddedSquare()))
    exact, levels = how.exact(picture), 255 * torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    assert ((Preparation(how, fast=True)(picture) - exact) * levels).abs().max() < 1.01
    assert ((how.grad(whole / 255)[0] - exact) * levels).abs().mean() < 0.5
    height, width = size
    if height != width:  # the corner is CLIP's mean colour, cut down to whole levels
        corner = (exact[:, 0, 0] * levels[:, 0, 0]).tolist()
        assert corner == pytest.approx([122 - 0.48145466 * 255, 116 - 0.4578275 * 255, 104 - 0.40821073 * 255], abs=1e-3)


def test_errors_say_what_would_be_right(state: dict[str, Tensor], folder: Path, tmp_path_factory: Any) -> None:
    with pytest.raises(JudgeError, match="float16, which T5 overflows; use dtype=bfloat16 or float32"):
        judge_of(folder, dtype="float16")
    with pytest.raises(JudgeError, match="size is one of xxl, xl; got 'xs'"):
        judge_of(folder, size="xs")
    with pytest.raises(
        JudgeError, match=r"needs the weights of zhiqiulin/clip-flant5-xl .*`hf download zhiqiulin/clip-flant5-xl`"
    ):
        reward_models.load("vqascore", size="xl", tokenizer=folder)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(JudgeError, match=rf"should be in .*{empty.name}; there is none of model.safetensors.index.json, model"):
        judge_of(folder, weights=empty)
    for where in (empty, "google/flan-t5-xxl", empty / "absent"):  # for the first two Transformers makes an empty one
        with pytest.raises(JudgeError, match=f"T5's tokenizer from {where}, .*`hf download {where} .*tokenizer=PATH"):
            judge_of(folder, tokenizer=where)
    with pytest.raises(JudgeError, match=r"SelfAttention.k.weight of shape \(32, 32\) is of shape \(2048, 2048\) in its network"):
        judge_of(folder, size="xl")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder.final_layer_norm.weight": None}, r"1 are missing \(t5.encoder.final_layer_norm.weight"),
        ({"lm_head.weight": None}, r"1 are missing \(t5.lm_head.weight"),
        ({"mm_projector.4.weight": torch.ones(2)}, r"projector.4.weight of shape \(2,\) is unknown"),
        ({"query.weight": torch.ones(2)}, r"vision.query.weight of shape \(2,\) is unknown"),
    ],
    ids=["norm", "head", "projector", "foreign"],
)
def test_foreign_weights_are_refused(change: dict, message: str, state: dict[str, Tensor], folder: Path) -> None:
    write_shards({k: v for k, v in (state | change).items() if v is not None}, folder)
    with pytest.raises(JudgeError, match=message):
        judge_of(folder)


def test_an_absent_shard_is_named_and_objects_are_refused(folder: Path, tmp_path_factory: Any) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(JudgeError, match=r"should be in .*model-00002-of-00002.safetensors; there is no such file"):
        judge_of(folder)
    bad = tmp_path_factory.mktemp("bad") / "pytorch_model.bin"
    bad.write_bytes(pickle.dumps({"a": Path("x")}, protocol=2))
    with pytest.raises(JudgeError, match="holds Python objects besides tensors"):
        list(_shards.tensors([bad], "vqascore"))
