"""ImageReward on Transformers against BLIP written out here in the released file's layout, with the same random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import reward_models
from reward_models import imagereward
from reward_models._preprocess import DEVIATION, MEAN
from reward_models.base import JudgeError

KEYS = Path(__file__).parent / "keys" / "imagereward.json"  # names and shapes in the released file
TINY = imagereward.Shape(vision=(48, 96, 2, 3), text=(36, 72, 2, 12), head=(36, 24, 12, 8, 4, 1), vocabulary=40)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "blue",
    "circle",
    "star",
    "on",
    "the",
    "left",
    "of",
    "two",
    "big",
    "small",
]
PROMPTS = ["a red circle", "a small blue star on the left of two big red circle " * 5, "two star"]


def released_names(shape: imagereward.Shape) -> dict[str, list[int]]:
    """The released file's names, with the sizes of another shape."""
    sizes = {1024: shape.vision[0], 4096: shape.vision[1], 768: shape.text[0], 3072: shape.text[1], 30524: shape.vocabulary}
    out = {}
    for name, dims in json.loads(KEYS.read_text()).items():
        layer = next((int(p) for p in name.split(".") if p.isdigit()), 0)
        if ("blocks." in name or "layer." in name) and layer >= 2:
            continue
        out[name] = [3 * shape.vision[0] if d == 3072 and "qkv" in name else sizes.get(d, d) for d in dims]
    for i, number in enumerate((0, 2, 4, 6, 7)):
        out[f"mlp.layers.{number}.weight"] = [shape.head[i + 1], shape.head[i]]
        out[f"mlp.layers.{number}.bias"] = [shape.head[i + 1]]
    return out


@pytest.fixture
def state() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    drawn = {name: 0.3 * torch.randn(dims, generator=rng) for name, dims in released_names(TINY).items()}
    return {name: value + 1 if "orm" in name and name.endswith("weight") else 2 * value for name, value in drawn.items()}


@pytest.fixture
def folder(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(imagereward, "SHAPE", TINY)
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS + [f"[unused{i}]" for i in range(40 - len(WORDS))]) + "\n")
    return tmp_path


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((64, 64), (100, 61), (230, 300))]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None, :] == 0, -math.inf)
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def see(s: dict[str, Tensor], pixels: Tensor, heads: int, eps: float) -> Tensor:
    """BLIP's picture encoder: norms first, one matrix for query, key and value."""
    at = "blip.visual_encoder."
    x = F.conv2d(pixels, s[at + "patch_embed.proj.weight"], s[at + "patch_embed.proj.bias"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([s[at + "cls_token"].expand(len(x), -1, -1), x], 1) + s[at + "pos_embed"]

    def part(name: str, x: Tensor) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    for i in range(2):
        b = f"{at}blocks.{i}."
        x = x + part(b + "attn.proj", attention(*part(b + "attn.qkv", norm(b + "norm1", x)).chunk(3, -1), heads))
        x = x + part(b + "mlp.fc2", F.gelu(part(b + "mlp.fc1", norm(b + "norm2", x))))
    return norm(at + "norm", x)


def read(s: dict[str, Tensor], ids: Tensor, mask: Tensor, seen: Tensor, heads: int) -> Tensor:
    """BERT, which looks at the picture in every layer: norms last."""
    at = "blip.text_encoder."

    def part(name: str, x: Tensor) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.LayerNorm.weight"], s[f"{name}.LayerNorm.bias"], 1e-12)

    words, places = (s[f"{at}embeddings.{n}_embeddings.weight"] for n in ("word", "position"))
    x = norm(at + "embeddings", words[ids] + places[: ids.shape[1]])
    for i in range(2):
        b = f"{at}encoder.layer.{i}."
        for kind, other, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            source = x if other is None else other
            q, k, v = (part(f"{b}{kind}.self.{n}", y) for n, y in (("query", x), ("key", source), ("value", source)))
            x = norm(f"{b}{kind}.output", part(f"{b}{kind}.output.dense", attention(q, k, v, heads, hidden)) + x)
        inner = F.gelu(part(b + "intermediate.dense", x))
        x = norm(b + "output", part(b + "output.dense", inner) + x)
    return x


def by_hand(s: dict[str, Tensor], folder: Path, eps: float = 1e-6, text_heads: int = 12) -> Tensor:
    from transformers import BertTokenizer

    words = BertTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    chain = image_transform(224, is_train=False, mean=MEAN, std=DEVIATION)
    seen = see(s, torch.stack([chain(p) for p in pictures()]), TINY.vision[3], eps)
    x = read(s, words.input_ids, words.attention_mask, seen, text_heads)[:, 0]
    for number in (0, 2, 4, 6, 7):
        x = F.linear(x, s[f"mlp.layers.{number}.weight"], s[f"mlp.layers.{number}.bias"])
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_the_score_is_that_of_the_original_layout(state: dict[str, Tensor], folder: Path) -> None:
    judge = reward_models.load("imagereward", weights=folder, tokenizer=folder)
    score = judge.score(pictures(), PROMPTS)
    assert score.std() > 1e-2
    torch.testing.assert_close(score, by_hand(state, folder), rtol=1e-5, atol=1e-5)
    singles = torch.cat([judge.score(p, t) for p, t in zip(pictures(), PROMPTS, strict=True)])
    torch.testing.assert_close(score, singles, rtol=1e-5, atol=1e-6)
    a, b = judge.score(pictures()[:2], PROMPTS[0])
    chance = judge.prefer(pictures()[0], pictures()[1], PROMPTS[0]).item()
    assert chance == pytest.approx(torch.sigmoid(1.0333394966054072 * (a - b)).item(), rel=1e-5)


def test_the_two_defaults_of_transformers_would_score_differently(state: dict[str, Tensor], folder: Path) -> None:
    right = by_hand(state, folder)
    assert (by_hand(state, folder, text_heads=9) - right).abs().max() > 1e-3
    vision, text, _ = imagereward.build(imagereward.SHAPE)
    assert vision.config.layer_norm_eps == vision.post_layernorm.eps == 1e-6
    assert text.config.num_attention_heads == 12 and text.config._attn_implementation == "eager"


def test_every_name_of_the_released_file_has_one_place() -> None:
    with torch.device("meta"):
        nets = imagereward.build(imagereward.Shape())
        state = {name: torch.empty(dims) for name, dims in json.loads(KEYS.read_text()).items()}
    assert len(state) == 625
    for net, part in zip(nets, imagereward.split(state), strict=True):
        assert {k: v.shape for k, v in part.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert [net.config.num_attention_heads for net in nets[:2]] == [16, 12]


def test_a_foreign_weight_is_refused(state: dict[str, Tensor], folder: Path) -> None:
    torch.save({**state, "blip.text_encoder.pooler.dense.bias": torch.zeros(3)}, folder / "ImageReward.pt")
    with pytest.raises(JudgeError, match=r"1 are unknown \(pooler"):
        reward_models.load("imagereward", weights=folder, tokenizer=folder)


def test_the_gradient_reaches_the_picture(folder: Path) -> None:
    judge = reward_models.load("imagereward", weights=folder, tokenizer=folder)
    pixels = torch.rand(3, 3, 70, 80, requires_grad=True)
    judge.differentiable_score(pixels, PROMPTS).sum().backward()
    assert (pixels.grad != 0).float().mean() > 0.5


def test_a_tokenizer_with_other_words_makes_another_judge(folder: Path) -> None:
    first = reward_models.load("imagereward", weights=folder, tokenizer=folder)
    words = (folder / "vocab.txt").read_text()
    (folder / "vocab.txt").write_text(words.replace("red\nblue", "blue\nred"))
    other = reward_models.load("imagereward", weights=folder, tokenizer=folder)
    assert other.fingerprint != first.fingerprint
    assert not torch.allclose(other.score(pictures(), PROMPTS[0]), first.score(pictures(), PROMPTS[0]))


def test_prompts_beyond_35_tokens_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 35}')
    judge = reward_models.load("imagereward", weights=folder, tokenizer=folder)
    assert judge.n_cut(PROMPTS) == 1 and judge.n_cut(["red " * 33, "red " * 34]) == 1 and judge.n_cut([]) == 0
    assert not caplog.messages  # Transformers would tell of errors that there are none
