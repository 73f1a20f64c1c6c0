"""HPSv3 on Transformers against Qwen2-VL written out here in the released file's layout, picture encoder and decoder both, with
the same random weights; and against numbers that the original class gave on the Transformers it was written for.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from family_runs import write_pairs
from PIL import Image
from safetensors.torch import save_file
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm as bell
from torch import Tensor
from torch.nn import functional as F

import reward_models
from diffalign.data.open import open_pairs
from diffalign.errors import UserError
from pipelines.relabel_verdict import Verdict
from reward_models import _qwen, hpsv3
from reward_models._pictures import UnreadablePictureWarning
from reward_models._preprocess import DEVIATION, MEAN
from reward_models.base import JudgeError, ParticularJudge

PROMPTS = ["a red circle", "a small blue star, {left} of two big “red” circles " * 5, "two stars"]
WORDS = 400
TINY = _qwen.Shape(text=(32, 48, 2, 4, 2), vision=(32, 2, 2), vocabulary=WORDS + 14 + 1)


def released_names(shape: _qwen.Shape) -> dict[str, list[int]]:
    """Names and shapes in a file that Transformers 4.45 wrote of Qwen2-VL with HPSv3's head."""
    width, inner, layers, heads, keys = shape.text
    seen, blocks, _ = shape.vision
    narrow = keys * width // heads
    out = {"model.embed_tokens.weight": [shape.vocabulary, width], "model.norm.weight": [width]}
    out |= {"lm_head.weight": [shape.vocabulary, width], "visual.patch_embed.proj.weight": [seen, 3, 2, 14, 14]}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, rows in (("q", width), ("k", narrow), ("v", narrow)):
            out |= {f"{at}self_attn.{name}_proj.weight": [rows, width], f"{at}self_attn.{name}_proj.bias": [rows]}
        out |= {f"{at}self_attn.o_proj.weight": [width, width], f"{at}mlp.down_proj.weight": [width, inner]}
        out |= {f"{at}mlp.{name}_proj.weight": [inner, width] for name in ("gate", "up")}
        out |= {f"{at}{name}_layernorm.weight": [width] for name in ("input", "post_attention")}
    linear = {f"visual.blocks.{i}.{name}": shape for i in range(blocks) for name, shape in _block(seen).items()}
    linear |= {"visual.merger.mlp.0": (4 * seen, 4 * seen), "visual.merger.mlp.2": (width, 4 * seen)}
    linear |= {"rm_head.0": (1024, width), "rm_head.3": (16, 1024), "rm_head.5": (2, 16)}
    for name, (rows, columns) in linear.items():
        out |= {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}
    norms = [f"visual.blocks.{i}.norm{j}" for i in range(blocks) for j in (1, 2)] + ["visual.merger.ln_q"]
    return out | {f"{name}.{kind}": [seen] for name in norms for kind in ("weight", "bias")}


def _block(width: int) -> dict[str, tuple[int, int]]:
    return {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }


def draw(names: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Weights that bfloat16 holds exactly, in the order of their names."""
    rng, out = torch.Generator().manual_seed(3), {}
    for name in sorted(names):
        value = torch.randn(names[name], generator=rng)
        if value.ndim > 1:
            value = value / (1 if "embed_tokens" in name else value[0].numel() ** 0.5)
        elif name.endswith("weight"):
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        out[name] = value.bfloat16().float()
    return out


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return draw(released_names(TINY))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of Qwen2's own kind and its 14 marks, made from the prompt that it will read."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    raw = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), bytes_])
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=bytes_.alphabet(), show_progress=False)
    raw.train_from_iterator([hpsv3.RUBRIC.replace(hpsv3.REWARD, ""), *PROMPTS], trainer)
    raw.model.save(str(folder := tmp_path_factory.mktemp("vocabulary")))
    made = Qwen2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    made.add_tokens(list(hpsv3.MARKS), special_tokens=True)
    assert len(made) == WORDS + 14
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hpsv3, "SHAPE", TINY)
    save_file(state, tmp_path / "HPSv3.safetensors")
    return tmp_path


@pytest.fixture
def judge(folder: Path, vocabulary: Path) -> hpsv3.HPSv3:
    return reward_models.load("hps-v3", weights=folder, tokenizer=vocabulary, dtype="float32", device="cpu")


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((64, 64), (100, 61), (230, 300))]


SIZES = ((448, 448), (588, 364), (420, 532))  # of these pictures for the network, height first


# ---------------------------------------------------------------------------------------------------- Qwen2-VL, written out


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding in complex numbers: x [L, heads, d], angles [L, d / 2]."""
    first, second = x.chunk(2, dim=-1)
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


def turned_by_rounded(x: Tensor, angles: Tensor) -> Tensor:
    """The picture encoder's, whose cosines are rounded to bfloat16."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (f(angles.bfloat16()).float()[:, None] for f in (torch.cos, torch.sin))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def speeds(theta: float, width: int, rounded: bool = True) -> Tensor:
    exact = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)])
    return exact.bfloat16().float() if rounded else exact


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[L, heads, d] each; few heads of keys serve several of queries."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    weights = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        weights = weights.masked_fill(~mask, -math.inf)
    return torch.einsum("hqk,khd->qhd", weights.softmax(-1), v).flatten(1)


def see(s: Mapping[str, Tensor], picture: Tensor, shape: _qwen.Shape) -> Tensor:
    """[T, D] for a picture [3, H, W] that fits."""
    width, blocks, heads = shape.vision
    films, cells = [], []
    for y in range(0, picture.shape[1], 28):
        for x in range(0, picture.shape[2], 28):
            for top, left in ((y, x), (y, x + 14), (y + 14, x), (y + 14, x + 14)):
                patch = picture[:, top : top + 14, left : left + 14]
                films.append(torch.stack([patch, patch], dim=1).flatten())
                cells.append((top // 14, left // 14))
    speed = speeds(10_000.0, width // heads // 2)
    angles = torch.cat([torch.tensor(line)[:, None] * speed for line in zip(*cells, strict=True)], dim=-1)
    h = torch.stack(films) @ s["visual.patch_embed.proj.weight"].flatten(1).T

    def part(name: str, x: Tensor) -> Tensor:
        return F.linear(x, s[f"visual.{name}.weight"], s[f"visual.{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"visual.{name}.weight"], s[f"visual.{name}.bias"], 1e-6)

    for i in range(blocks):
        q, k, v = part(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", h)).unflatten(1, (3, heads, -1)).unbind(1)
        h = h + part(f"blocks.{i}.attn.proj", attend(turned_by_rounded(q, angles), turned_by_rounded(k, angles), v))
        inner = part(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", h))
        h = h + part(f"blocks.{i}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))
    return part("merger.mlp.2", F.gelu(part("merger.mlp.0", norm("merger.ln_q", h).unflatten(0, (-1, 4)).flatten(1))))


def read(s: Mapping[str, Tensor], words: Tensor, angles: Tensor, shape: _qwen.Shape) -> Tensor:
    """States [L, D] of tokens [L, D] that are turned by ``angles`` [L, d / 2]."""
    _, _, layers, heads, keys = shape.text
    causal = torch.ones(len(words), len(words), dtype=torch.bool).tril()

    def norm(name: str, x: Tensor) -> Tensor:
        return s[f"model.{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    h = words
    for i in range(layers):
        at = f"layers.{i}."
        x = norm(f"{at}input_layernorm", h)
        q, k, v = (
            F.linear(x, *(s[f"model.{at}self_attn.{name}_proj.{kind}"] for kind in ("weight", "bias"))).unflatten(-1, (n, -1))
            for name, n in (("q", heads), ("k", keys), ("v", keys))
        )
        h = h + attend(turned(q, angles), turned(k, angles), v, causal) @ s[f"model.{at}self_attn.o_proj.weight"].T
        x = norm(f"{at}post_attention_layernorm", h)
        gate, up, down = (s[f"model.{at}mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        h = h + (F.silu(x @ gate) * (x @ up)) @ down
    return norm("norm", h)


def prepared(picture: Image.Image, height: int, width: int) -> Tensor:
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (MEAN, DEVIATION))
    return (torch.from_numpy(resized).permute(2, 0, 1) - mean) / deviation


looked: dict[int, Tensor] = {}  # what ``see`` says of each picture; the weights are always the same


def by_hand(
    s: Mapping[str, Tensor],
    vocabulary: Path,
    prompts: Sequence[str] = PROMPTS,
    rows_and_columns: bool = False,
    rounded: bool = True,
) -> Tensor:
    """[n, 2], each picture with its prompt by itself. The last two arguments spring traps."""
    from transformers import Qwen2Tokenizer

    words, out = Qwen2Tokenizer.from_pretrained(vocabulary), []
    words.add_tokens(["<|Reward|>"], special_tokens=True)
    for number, (prompt, (height, width)) in enumerate(zip(prompts, SIZES)):
        if number not in looked:
            looked[number] = see(s, prepared(pictures()[number], height, width), TINY)
        seen = looked[number]
        whole = hpsv3.CONVERSATION.replace("{rubric}", hpsv3.RUBRIC)
        before, after = (text.format(prompt=prompt) for text in whole.split("{picture}"))
        ids, rest = words(before).input_ids, words(after).input_ids
        place = torch.arange(len(ids) + len(seen) + len(rest))
        axes = torch.stack([place] * 3)
        if rows_and_columns:
            start, side = len(ids), width // 28
            token = torch.arange(len(seen))
            axes[:, start : start + len(seen)] = start + torch.stack([0 * token, token // side, token % side])
            axes[:, start + len(seen) :] += max(height // 28, side) - len(seen)
        speed = speeds(1_000_000.0, TINY.turned[0], rounded)
        angles = torch.stack([axes[axis] * f for axis, f in zip((0, 1, 2, 2), speed, strict=True)], dim=-1)
        table = s["model.embed_tokens.weight"]
        h = read(s, torch.cat([table[ids], seen, table[rest]]), angles, TINY)
        h = h[len(ids) + len(seen) + rest.index(words.convert_tokens_to_ids("<|Reward|>"))]
        for layer in (0, 3, 5):
            h = F.linear(h, s[f"rm_head.{layer}.weight"], s[f"rm_head.{layer}.bias"])
            h = h if layer == 5 else h.relu()
        out.append(h)
    return torch.stack(out)


# ------------------------------------------------------------------------------------------------------------------- scores


def test_both_numbers_are_those_of_the_original_layout(state: dict[str, Tensor], judge: hpsv3.HPSv3, vocabulary: Path) -> None:
    right = by_hand(state, vocabulary)
    assert right.std(dim=0).min() > 1e-2
    score = judge.score(pictures(), PROMPTS)
    torch.testing.assert_close(score, right[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(judge.log_deviation.score(pictures(), PROMPTS), right[:, 1], rtol=0, atol=1e-5)
    singles = torch.cat([judge.score(p, t) for p, t in zip(pictures(), PROMPTS, strict=True)])
    torch.testing.assert_close(score, singles, rtol=0, atol=1e-6)


def test_todays_positions_and_angles_would_score_differently(state: dict[str, Tensor], vocabulary: Path) -> None:
    right = by_hand(state, vocabulary)
    assert (by_hand(state, vocabulary, rows_and_columns=True) - right).abs().max() > 1e-2  # M-RoPE
    assert (by_hand(state, vocabulary, rounded=False) - right).abs().max() > 1e-4


def test_positions_count_on_through_the_picture(judge: hpsv3.HPSv3, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    decoder = judge._reader._body.language_model
    decoder.register_forward_pre_hook(lambda module, args, named: told.update(named), with_kwargs=True)
    judge.score(pictures()[:2], PROMPTS[:2])
    n, length = told["attention_mask"].shape
    assert torch.equal(told["position_ids"], torch.arange(length).expand(3, n, length))
    assert told["attention_mask"].sum(dim=1).unique().numel() == 2 and told["attention_mask"][:, 0].all()  # padded on the right
    assert decoder.norm.variance_epsilon == 1e-6


def test_the_numbers_are_those_of_the_original_class() -> None:
    """``Qwen2VLRewardModelBT`` of hpsv3 1.0.0 on Transformers 4.45.2 gave these: cast to bfloat16 as the package does, then back
    to float32 with the angles left rounded, so that they do not depend on a machine's bfloat16 kernels.
    """
    shape = _qwen.Shape(text=(256, 256, 2, 2, 1), vision=(160, 2, 2), vocabulary=100)  # heads as wide as the real ones
    body, head = hpsv3.split(draw(released_names(shape)))
    nets = hpsv3.build(shape)
    _qwen.fill(nets[0], body, shape, torch.float32, "hps-v3")
    nets[1].load_state_dict(head)
    rng = torch.Generator().manual_seed(4)
    shown = [torch.randn(3, height, width, generator=rng) for height, width in ((448, 448), (252, 532))]
    ids = torch.zeros(2, 860, dtype=torch.long)
    for row, length, tokens in ((0, 860, 256), (1, 790, 171)):
        ids[row, :length] = torch.randint(1, 90, (length,), generator=rng)
        ids[row, 20 : 20 + tokens], ids[row, length - 8] = 95, 99
    with torch.no_grad():
        out = nets[1](_qwen.decode(nets[0], ids, (ids > 0).long(), _qwen.see(nets[0].visual, shown), picture=95)[ids == 99])
    golden = torch.tensor([[0.0038257, 0.3724128], [-0.0323167, 0.3584070]])  # without rounding -0.0057172 and -0.0272344
    torch.testing.assert_close(out, golden, rtol=0, atol=2e-6)


def test_a_picture_that_cannot_be_read_or_is_too_thin_scores_nan(judge: hpsv3.HPSv3, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    thin = Image.new("RGB", (201, 1))
    with pytest.warns(UnreadablePictureWarning) as told:
        score = judge.score([tmp_path / "broken.png", pictures()[0], thin, pictures()[2]], "two stars")
    assert score.isnan().tolist() == [True, False, True, False]
    told = sorted(str(w.message) for w in told)
    assert "1 of 4 pictures cannot be read" in told[0] and "broken.png" in told[0]
    assert told[1].startswith("a picture of 201 x 1 pixels is more than 200 times as long as it is wide") and "NaN" in told[1]
    singles = torch.cat([judge.score(pictures()[i], "two stars") for i in (0, 2)])
    torch.testing.assert_close(score[[1, 3]], singles, rtol=0, atol=1e-6)
    with pytest.warns(UnreadablePictureWarning):
        assert judge.score(thin, "two stars").isnan().all()
    with pytest.raises(JudgeError, match="201 x 1 pixels is more than 200 times"):
        judge.differentiable_score(torch.zeros(1, 3, 1, 201), "two stars")


def test_a_prompt_with_a_mark_of_the_judges_own_is_refused(judge: hpsv3.HPSv3) -> None:
    assert isinstance(judge, ParticularJudge)
    judge.check_prompts(PROMPTS)
    for mark in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(JudgeError, match=r"cannot read a prompt that holds <\|.*\|>, which .*: 'a .* star'"):
            judge.check_prompts(["a star", f"a {mark} star"])
        with pytest.raises(JudgeError, match="cannot read a prompt that holds"):
            judge.score(pictures()[0], f"a {mark} star")


def test_the_gradient_reaches_the_picture(judge: hpsv3.HPSv3) -> None:
    pixels = torch.from_numpy(np.stack([np.asarray(pictures()[2])] * 2)).permute(0, 3, 1, 2).float() / 255
    pixels.requires_grad_()
    score = judge.differentiable_score(pixels, PROMPTS[:2])
    torch.testing.assert_close(score, judge.score([pictures()[2]] * 2, PROMPTS[:2]), rtol=0, atol=2e-2)  # it does not round
    score[0].backward()
    assert (pixels.grad[0] != 0).float().mean() > 0.9 and not pixels.grad[1].any()


# ------------------------------------------------------------------------------------------------------------- preferences


def test_a_preference_is_the_mean_over_both_deviations(
    state: dict[str, Tensor], judge: hpsv3.HPSv3, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    monkeypatch.setattr(_qwen, "decode", lambda *args, decode=_qwen.decode, **named: looks.append(1) or decode(*args, **named))
    chance = judge.prefer(pictures()[:1], pictures()[1:2], PROMPTS[1])
    assert len(looks) == 2, "both numbers come from one look at each side"
    (mean_a, log_a), (mean_b, log_b) = by_hand(state, vocabulary, [PROMPTS[1]] * 2).tolist()
    assert chance.item() == pytest.approx(mean_sigmoid(mean_a - mean_b, math.hypot(math.exp(log_a), math.exp(log_b))), abs=1e-5)
    with pytest.raises(JudgeError, match="pair by pair; got 1 and 2"):
        judge.prefer(pictures()[0], pictures()[:2], "two stars")
    with pytest.raises(JudgeError, match="follows from scores and deviations; `prefer` has both"):
        judge.preference(torch.zeros(1), torch.ones(1))


def mean_sigmoid(mean: float, deviation: float) -> float:
    turn = min(max(-mean / deviation, -9), 9)
    return quad(lambda x: expit(mean + deviation * x) * bell.pdf(x), -10, 10, points=[turn], limit=400, epsabs=1e-13)[0]


@pytest.mark.parametrize("deviation", [1e-3, 0.5, 3.0, 20.0])
def test_the_mean_over_a_bell_curve_is_that_of_an_integral(deviation: float) -> None:
    for mean in (-4.0, 0.0, 0.3, 7.0):
        chance = hpsv3.preference(torch.tensor([mean, float("nan")]), torch.tensor([deviation, deviation]))
        assert chance[0].item() == pytest.approx(mean_sigmoid(mean, deviation), abs=1e-7) and chance[1].isnan()


# ----------------------------------------------------------------------------------------------------------------- pictures


def awkward() -> dict[str, Image.Image]:
    rng = np.random.default_rng(7)

    def noise(height: int, width: int, *channels: int) -> np.ndarray:
        return rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)

    return {
        "one pixel": Image.fromarray(noise(1, 1, 3)),
        "wide": Image.fromarray(noise(50, 4000, 3)),
        "tall": Image.fromarray(noise(4000, 50, 3)),
        "just not too thin": Image.fromarray(noise(1, 200, 3)),
        "large": Image.fromarray(noise(768, 1024, 3)),
        "fits": Image.fromarray(noise(448, 448, 3)),
        "odd": Image.fromarray(noise(333, 217, 3)),
        "grey": Image.fromarray(noise(90, 120)),
        "transparent": Image.fromarray(noise(90, 120, 4)),
        "palette": Image.fromarray(noise(90, 120, 3)).convert("P"),
        "CMYK": Image.fromarray(noise(90, 120, 3)).convert("CMYK"),
        "bilevel": Image.fromarray(noise(90, 120)).convert("1"),
    }


@pytest.mark.parametrize("name", awkward())
def test_pictures_are_prepared_as_by_transformers(name: str) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    picture, area = awkward()[name], 256 * 28 * 28
    other = Qwen2VLImageProcessorPil(min_pixels=area, max_pixels=area)(picture.convert("RGB"), return_tensors="pt")
    prepared = _qwen.TokenGrid().exact(picture)
    _, height, width = other["image_grid_thw"][0].tolist()
    assert prepared.shape == (3, 14 * height, 14 * width)
    torch.testing.assert_close(_qwen.patches(prepared), other["pixel_values"], rtol=0, atol=1e-6)


def test_sizes_are_the_rules_and_never_nothing() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    grid, rng = _qwen.TokenGrid(), random.Random(1)
    assert grid.size(768, 1024) == (364, 504) and grid.size(1, 1) == (448, 448) and grid.size(50, 4000) == (28, 4004)
    assert grid.size(1, 201) is None and grid.size(20_100, 100) is None
    for _ in range(20_000):
        height = int(10 ** rng.uniform(0, 4.5))
        width = max(int(height * 10 ** rng.uniform(-2.3, 2.3)), 1)
        if max(height, width) <= 200 * min(height, width):
            size = grid.size(height, width)
            assert size == smart_resize(height, width, 28, 256 * 28 * 28, 256 * 28 * 28) and min(size) >= 28


def test_the_differentiable_way_is_close_to_the_exact_one() -> None:
    picture = Image.fromarray(
        np.kron(np.random.default_rng(0).integers(0, 256, (9, 12, 3)), np.ones((40, 40, 1))).astype(np.uint8)
    )
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    grey, exact = (
        255 * (prepared * torch.tensor(DEVIATION)[:, None, None] + torch.tensor(MEAN)[:, None, None])
        for prepared in (_qwen.TokenGrid().grad(pixels)[0], _qwen.TokenGrid().exact(picture))
    )
    off = (grey - exact).abs()
    assert off.mean() < 0.1 and (off > 1).float().mean() < 0.005  # the few are at hard edges
    assert grey.min() > -0.01 and grey.max() < 255.01  # bicubic values overshoot there


# -------------------------------------------------------------------------------------------------------------------- words


def test_the_conversation_is_the_released_prompt_in_qwens_template(judge: hpsv3.HPSv3) -> None:
    """The digest is that of the text which hpsv3 1.0.0 makes with the chat template of Qwen2-VL-7B-Instruct."""
    text = hpsv3.conversation("a {red} circle", 3)
    assert hashlib.sha256(text.encode()).hexdigest() == "aafe6e54e65dfdb0f4d617179e97b0a8262ce65470a5bcb96236488464923d35"
    tokenizer = judge._reader._tokenizer
    ids = tokenizer.encode(text).ids
    assert judge._reader._reward == tokenizer.token_to_id("<|Reward|>") == TINY.vocabulary - 1
    assert ids.count(TINY.vocabulary - 1) == 1 and ids.count(tokenizer.token_to_id("<|image_pad|>")) == 3
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_marks_that_the_tokenizers_file_leaves_out_get_their_numbers(folder: Path, vocabulary: Path, tmp_path: Path) -> None:
    told = json.loads((vocabulary / "tokenizer.json").read_text())
    assert len(told["added_tokens"]) == 14
    del told["added_tokens"][3:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    whole, cut = (hpsv3._tokenizer(place / "tokenizer.json") for place in (vocabulary, tmp_path))
    assert whole.get_vocab() == cut.get_vocab() and cut.token_to_id("<|image_pad|>") == WORDS + 12


def test_its_scores_alone_give_no_probabilities_and_the_reason_is_the_right_one(judge: hpsv3.HPSv3, tmp_path: Path) -> None:
    assert judge.rank(pictures(), PROMPTS[0]).places[0].probability is None
    with pytest.raises(UserError, match="--labels soft: .* 'hps-v3' follows from scores and deviations.*Use --labels flip"):
        Verdict(open_pairs(write_pairs(tmp_path / "data", 1)), {"hps-v3": judge}, "soft", False, 0.0)


def test_a_foreign_tokenizer_is_refused(folder: Path, vocabulary: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    words = Qwen2Tokenizer.from_pretrained(vocabulary)
    words.add_tokens(["one", "two"])
    words.save_pretrained(tmp_path / "more")
    right = (
        rf"has {TINY.vocabulary + 2} tokens with <\|Reward\|>, where .* has {TINY.vocabulary}; the tokenizer of Qwen/Qwen2-VL-7B"
    )
    with pytest.raises(JudgeError, match=right):
        reward_models.load("hps-v3", weights=folder, tokenizer=tmp_path / "more")
    for place, named in ((tmp_path, str(tmp_path)), (tmp_path / "none", "none"), (None, "the cache")):
        told = rf"no tokenizer\.json in .*{named}\. .*`hf download Qwen/Qwen2-VL-7B-Instruct tokenizer\.json` .*tokenizer=PATH"
        with pytest.raises(JudgeError, match=told):
            reward_models.load("hps-v3", weights=folder, tokenizer=place)


# ------------------------------------------------------------------------------------------------------------------ weights


def test_every_name_of_the_released_file_has_one_place() -> None:
    names = released_names(_qwen.Shape())
    assert len(names) == 736
    with torch.device("meta"):
        state = {name: torch.empty(dims, dtype=torch.bfloat16) for name, dims in names.items()}
        body, head = hpsv3.build(_qwen.Shape())
    for net, part in zip((body, head), hpsv3.split(state), strict=True):
        assert {k: v.shape for k, v in part.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert sum(p.numel() for p in body.parameters()) == 7_744_923_136
    text, vision = body.config.text_config, body.config.vision_config
    assert (text.rms_norm_eps, text.rope_parameters["rope_theta"], text.hidden_act) == (1e-6, 1e6, "silu")
    assert (text.rope_parameters["mrope_section"], text.layer_types) == ([16, 24, 24], ["full_attention"] * 28)
    assert (vision.hidden_act, vision.patch_size, vision.spatial_merge_size) == ("quick_gelu", 14, 2)


def test_weights_are_not_copied_and_the_head_stays_float32(
    state: dict[str, Tensor], folder: Path, vocabulary: Path, judge: hpsv3.HPSv3, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = {name: value if name.startswith("rm_head") else value.bfloat16() for name, value in state.items()}
    at = {name: value.data_ptr() for name, value in halves.items()}
    save_file(halves, folder / "HPSv3.safetensors")
    monkeypatch.setattr(hpsv3, "read_state", lambda path, name: halves)
    coarse = reward_models.load("hps-v3", weights=folder, tokenizer=vocabulary, device="cpu")
    body, head = coarse._reader._body, coarse._reader._head
    assert {p.dtype for p in body.parameters()} == {torch.bfloat16} and {p.dtype for p in head.parameters()} == {torch.float32}
    assert body.get_input_embeddings().weight.data_ptr() == at["model.embed_tokens.weight"]
    assert all(b.dtype == torch.float32 and not b.is_meta for b in body.buffers())
    score = coarse.score(pictures(), PROMPTS)
    assert score.dtype == torch.float32 and not torch.equal(score, score.bfloat16().float())
    torch.testing.assert_close(score, judge.score(pictures(), PROMPTS), rtol=0, atol=0.05)
    assert coarse.fingerprint != judge.fingerprint != judge.log_deviation.fingerprint


def test_foreign_weights_are_refused(state: dict[str, Tensor], folder: Path, vocabulary: Path) -> None:
    wrong = {**state, "model.pooler.weight": torch.zeros(3), "model.norm.weight": torch.zeros(7)}
    save_file({k: v for k, v in wrong.items() if k != "visual.merger.ln_q.bias"}, folder / "HPSv3.safetensors")
    words = r"1 are missing \(visual.merger.ln_q.bias\), 1 are unknown \(language_model.pooler.weight\), 1 have another size"
    with pytest.raises(JudgeError, match=words):
        reward_models.load("hps-v3", weights=folder, tokenizer=vocabulary)
    save_file({k: v for k, v in state.items() if k != "rm_head.3.bias"}, folder / "HPSv3.safetensors")
    with pytest.raises(JudgeError, match=r"1 are missing \(3.bias\)"):
        reward_models.load("hps-v3", weights=folder, tokenizer=vocabulary)


def test_weights_that_are_not_here_are_named(vocabulary: Path, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"'hps-v3' needs HPSv3\.safetensors of MizzenAI/HPSv3.*`hf download .*weights=PATH"):
        reward_models.load("hps-v3", tokenizer=vocabulary)
    with pytest.raises(JudgeError, match=r"should be in .*HPSv3\.safetensors; there is no such file"):
        reward_models.load("hps-v3", weights=tmp_path, tokenizer=vocabulary)
    with pytest.raises(JudgeError, match="dtype is one of bfloat16, float32; got 'float16'"):
        reward_models.load("hps-v3", dtype="float16")
