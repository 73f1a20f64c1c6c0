"""MPS against itself written out here, in the released file's layout and in float64, with the same random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from towers import GELU, exchange_words, original, pictures, write_tokenizer

import reward_models
from reward_models import _clip, mps
from reward_models.base import JudgeError

KEYS = Path(__file__).parent / "keys" / "mps_cross.json"  # names and shapes behind "mps.cross_model." in the released file
FULL = _clip.VIT_H_14
TINY = mps.Cross(layers=2, heads=2, head=8)
PROMPTS = [
    "a red circle",
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair of two people",
    "a small blue star to the left of a big green square " * 8,  # longer than 77 tokens
]
WORDS = "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, \
quantity, attributes, position, number, location, word, things."


def shape_of(name: str, width: int, cross: mps.Cross) -> list[int]:
    """Of a weight of the network behind CLIP."""
    queries, inner = cross.heads * cross.head, 4 * width
    shapes = {
        "norm.weight": [width],
        "norm.bias": [width],
        "to_q.weight": [queries, width],
        "to_kv.weight": [2 * cross.head, width],
        "to_out.weight": [width, queries],
        "ff.0.weight": [2 * inner, width],
        "ff.2.weight": [width, inner],
        "rotary_emb.inv_freq": [cross.head // 2],
        "fused_attn_ff_proj.weight": [queries + 2 * cross.head + 2 * inner, width],
        "attn_out.weight": [width, queries],
        "ff_out.1.weight": [width, inner],
    }
    return shapes[name.split(".fn.")[1]]


def released() -> dict[str, Tensor]:
    """A small file in the released file's layout."""
    state = _clip.to_transformers(original().state_dict())
    state = {f"mps.model.{name}": value.clone() for name, value in state.items()}
    state["mps.model.logit_scale"] = torch.tensor(0.7)
    rng = torch.Generator().manual_seed(28)
    few = 0.9 * 0.5 ** torch.arange(GELU.projection)[:, None]  # directions that matter, so that tokens differ in likeness
    state["mps.model.text_projection.weight"] = few * torch.randn(GELU.projection, GELU.text[0], generator=rng)
    for name in json.loads(KEYS.read_text()):
        if int(name.split(".")[1]) < TINY.layers:
            dims = shape_of(name, GELU.projection, TINY)
            value = 0.3 * torch.randn(dims, generator=rng)
            if name.endswith("inv_freq"):
                value = (1 / 10000 ** (torch.arange(0, TINY.head, 2) / TINY.head)).half().float()  # as half precision keeps it
            state[f"mps.cross_model.{name}"] = value + 1 if name.endswith("norm.weight") else value
    return state


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_clip, "VIT_H_14", GELU)
        patch.setattr(mps, "CROSS", TINY)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mps")
    save_file(released(), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tiny: None, folder: Path) -> mps.MPS:
    return reward_models.load("mps", weights=folder, tokenizer=folder, device="cpu")


# ----------------------------------------------------------------------------------------------------------------- by hand


class ByHand:
    """The published computation on the released file's names."""

    def __init__(self) -> None:
        self.s = {name: value.double() for name, value in released().items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.s[f"{name}.weight"], self.s.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.s[f"{name}.weight"], self.s[f"{name}.bias"], 1e-5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | float = 0.0) -> Tensor:
        """q [n, i, h, d]; k and v [n, j, h, d]; the mask is added."""
        weights = torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(q.shape[-1]) + mask
        return torch.einsum("nhij,njhd->nihd", weights.softmax(-1), v).flatten(2)

    def tower(self, at: str, x: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
        for i in range(2):
            b = f"{at}.encoder.layers.{i}."
            y = self.norm(b + "layer_norm1", x)
            q, k, v = (self.linear(f"{b}self_attn.{p}_proj", y).unflatten(-1, (heads, -1)) for p in "qkv")
            x = x + self.linear(b + "self_attn.out_proj", self.attend(q, k, v, mask))
            x = x + self.linear(b + "mlp.fc2", F.gelu(self.linear(b + "mlp.fc1", self.norm(b + "layer_norm2", x))))
        return x

    def see(self, pixels: Tensor) -> Tensor:
        at = "mps.model.vision_model"
        e = at + ".embeddings."
        x = F.conv2d(pixels, self.s[e + "patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
        x = torch.cat([self.s[e + "class_embedding"].expand(len(x), 1, -1), x], 1) + self.s[e + "position_embedding.weight"]
        x = self.tower(at, self.norm(at + ".pre_layrnorm", x), GELU.vision[3])
        return self.linear("mps.model.visual_projection", x)

    def read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """All tokens, and the one at the end mark. open_clip's tokenizer has the same words, but pads with 0."""
        ids = open_clip.tokenizer.SimpleTokenizer(context_length=77)(texts)
        ends = ids.argmax(-1)
        ids = torch.where(torch.arange(77) > ends[:, None], 49407, ids)
        at = "mps.model.text_model"
        x = self.s[at + ".embeddings.token_embedding.weight"][ids] + self.s[at + ".embeddings.position_embedding.weight"]
        x = self.tower(at, x, GELU.text[3], torch.full((77, 77), -math.inf).triu(1))
        x = self.linear("mps.model.text_projection", self.norm(at + ".final_layer_norm", x))
        return x, x[torch.arange(len(x)), ends]

    def mask(self, words: Tensor, threshold: float, over_batch: bool) -> Tensor:
        """[n, 77] of 0 and minus infinity."""
        likeness = torch.einsum("nid,jd->nij", words, self.read([WORDS])[0][0]).max(-1).values
        largest = likeness.max() if over_batch else likeness.max(-1, keepdim=True).values
        return torch.where(likeness / largest > threshold, 0.0, -math.inf).double()

    def turned(self, x: Tensor, frequencies: Tensor) -> Tensor:
        """[n, i, h, d] as complex numbers, of which each is turned by its frequency times its place."""
        real, imaginary = x.unflatten(-1, (2, -1)).unbind(-2)
        angles = torch.arange(x.shape[1]).double()[:, None, None] * frequencies
        out = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([out.real, out.imag], -1)

    def gated(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x[..., :half] * x[..., half:] * torch.sigmoid(x[..., half:])

    def look(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        d, h = TINY.head, TINY.heads
        for i in range(TINY.layers):
            b = f"mps.cross_model.layers.{i}.0.fn."
            y = self.norm(b + "norm", x)
            q, kv = self.linear(b + "to_q", y).unflatten(-1, (h, d)), self.linear(b + "to_kv", words)
            k, v = (part[:, :, None].repeat(1, 1, h, 1) for part in (kv[..., :d], kv[..., d:]))
            seen = self.linear(b + "to_out", self.attend(q, k, v, mask[:, None, None, :]))
            x = x + seen + self.linear(b + "ff.2", self.gated(self.linear(b + "ff.0", y)))
            b = f"mps.cross_model.layers.{i}.1.fn."
            y = self.linear(b + "fused_attn_ff_proj", self.norm(b + "norm", x))
            q, k, v, forward = y[..., : h * d], y[..., h * d :][..., :d], y[..., h * d + d :][..., :d], y[..., h * d + 2 * d :]
            q, k, v = q.unflatten(-1, (h, d)), *(part[:, :, None].repeat(1, 1, h, 1) for part in (k, v))
            q, k = (self.turned(part, self.s[b + "rotary_emb.inv_freq"]) for part in (q, k))
            x = x + self.linear(b + "attn_out", self.attend(q, k, v)) + self.linear(b + "ff_out.1", self.gated(forward))
        return x

    def score(self, prompts: list[str], threshold: float = 0.3, over_batch: bool = False) -> Tensor:
        from transformers import CLIPImageProcessorPil

        pixels = CLIPImageProcessorPil()(pictures(), return_tensors="pt")["pixel_values"].double()
        words, whole = self.read(prompts)
        first = self.look(self.see(pixels), words, self.mask(words, threshold, over_batch))[:, 0]
        return (self.s["mps.model.logit_scale"].exp() * F.cosine_similarity(first, whole)).float()


@pytest.fixture(scope="module")
def by_hand() -> ByHand:
    return ByHand()


# ------------------------------------------------------------------------------------------------------------------- tests


def test_the_score_is_that_of_the_original_layout(judge: mps.MPS, by_hand: ByHand) -> None:
    score = judge.score(pictures(), PROMPTS)
    assert score.dtype == torch.float32 and score.std() > 1e-2
    torch.testing.assert_close(score, by_hand.score(PROMPTS), rtol=0, atol=1e-6)
    low, high = judge.info.range
    assert high == -low == pytest.approx(math.exp(0.7)) and low < score.min() and score.max() < high
    a, b = judge.score(pictures()[:2], PROMPTS[0])
    assert judge.prefer(pictures()[0], pictures()[1], PROMPTS[0]).item() == pytest.approx(torch.sigmoid(a - b).item(), rel=1e-6)


def test_a_batch_is_its_pictures_one_by_one(judge: mps.MPS, by_hand: ByHand) -> None:
    """The original's module divides by the largest likeness of the whole batch."""
    together = judge.score(pictures(), PROMPTS)
    singles = torch.cat([judge.score(p, t) for p, t in zip(pictures(), PROMPTS, strict=True)])
    torch.testing.assert_close(together, singles, rtol=0, atol=1e-6)
    assert (by_hand.score(PROMPTS, over_batch=True) - singles).abs().max() > 1e-3
    same = judge.score(pictures() * 2, PROMPTS * 2, batch_size=6)
    torch.testing.assert_close(same, together.repeat(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(judge.matrix(pictures(), PROMPTS).diag(), together, rtol=0, atol=1e-6)


def test_the_mask_keeps_some_of_every_prompt(judge: mps.MPS, by_hand: ByHand) -> None:
    words, _ = judge._read(PROMPTS)
    kept = judge._kept(words)
    assert ((kept.sum(1) > 0) & (kept.sum(1) < 70)).all()
    mask = by_hand.mask(by_hand.read(PROMPTS)[0], 0.3, over_batch=False)
    assert torch.equal(kept, mask == 0)


def test_a_token_that_is_not_kept_is_not_seen(judge: mps.MPS) -> None:
    torch.manual_seed(3)
    picture, prompt = torch.randn(2, 9, GELU.projection), torch.randn(2, 7, GELU.projection)
    kept = torch.tensor([[True, True, False, True, False, False, True], [False] * 6 + [True]])
    whole = mps.look(judge._cross, picture, prompt, kept)
    hidden = mps.look(judge._cross, picture, torch.where(kept[..., None], prompt, 100.0), kept)
    torch.testing.assert_close(hidden, whole, rtol=0, atol=1e-6)
    fewer = mps.look(judge._cross, picture[:1], prompt[:1, kept[0]], kept[:1, kept[0]])
    torch.testing.assert_close(fewer, whole[:1], rtol=0, atol=1e-5)
    seen = mps.look(judge._cross, picture, torch.where(kept[..., None], prompt + 1, prompt), kept)
    assert (seen - whole).abs().amax(dim=(1, 2)).min() > 1e-2


def test_prompts_whose_every_likeness_is_small_or_negative_keep_a_token(judge: mps.MPS) -> None:
    condition = judge._condition.mean(0)
    words = torch.stack([scale * condition.expand(77, -1) * torch.linspace(0.1, 1, 77)[:, None] for scale in (1.0, 1e-4, -1.0)])
    kept = judge._kept(words)
    assert kept.any(dim=1).all() and torch.equal(kept[0], kept[1]) and not kept[0].all()


def test_the_threshold_of_the_module_scores_differently(judge: mps.MPS, folder: Path, by_hand: ByHand) -> None:
    other = reward_models.load("mps", weights=folder, tokenizer=folder, device="cpu", threshold=0.01)
    score = other.score(pictures(), PROMPTS)
    torch.testing.assert_close(score, by_hand.score(PROMPTS, threshold=0.01), rtol=0, atol=1e-6)
    assert (score - judge.score(pictures(), PROMPTS)).abs().max() > 1e-3
    assert other.fingerprint != judge.fingerprint and judge.made_of["threshold"] == 0.3


def test_the_gradient_reaches_the_picture(judge: mps.MPS) -> None:
    pixels = torch.rand(3, 3, 224, 224, requires_grad=True)
    score = judge.differentiable_score(pixels, PROMPTS)
    score.sum().backward()
    assert torch.isfinite(pixels.grad).all() and (pixels.grad != 0).float().mean() > 0.5
    with torch.no_grad():  # a step against the loss raises the score
        better = judge.differentiable_score(pixels + 0.01 * pixels.grad / pixels.grad.abs().max(), PROMPTS)
    assert (better > score).all()


def test_half_precision_towers_leave_the_network_behind_them_in_float32(folder: Path, judge: mps.MPS) -> None:
    low = reward_models.load("mps", weights=folder, tokenizer=folder, device="cpu", dtype="bfloat16")
    assert low._clip.dtype == torch.bfloat16 and {p.dtype for p in low._cross.state_dict().values()} == {torch.float32}
    score = low.score(pictures(), PROMPTS)
    assert score.dtype == torch.float32 and (score - judge.score(pictures(), PROMPTS)).abs().max() < 0.3


def test_every_name_of_the_released_file_has_one_place() -> None:
    keys = json.loads(KEYS.read_text())
    with torch.device("meta"):
        nets = mps.build(FULL, mps.Cross())
        clip = _clip.to_transformers(open_clip.create_model("ViT-H-14", device="meta").state_dict())
        state = {f"mps.model.{name}": value for name, value in clip.items()}
        state |= {f"mps.model.{part}_model.embeddings.position_ids": torch.empty(1, 77) for part in ("text", "vision")}
        state |= {f"mps.cross_model.{name}": torch.empty(dims) for name, dims in keys.items()}
    assert len(keys) == 52 and len(clip) == 686 + 4 * 56  # open_clip has query, key and value in one
    for net, part in zip(nets, mps.split(state), strict=True):
        assert {k: v.shape for k, v in part.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert {k: shape_of(k, 1024, mps.Cross()) for k in keys} == keys


def test_the_condition_is_the_models_own() -> None:
    assert mps.CONDITION == WORDS and len(WORDS.split()) == 22


# ------------------------------------------------------------------------------------------------------------------- files


class CLIPModel(torch.nn.Module):
    """As the authors saved it: the whole module."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.cross_model = mps.build(GELU, TINY)


def test_the_authors_pickled_module_is_refused_and_its_state_is_not(folder: Path, tmp_path: Path, judge: mps.MPS) -> None:
    module = CLIPModel()
    module.load_state_dict({name.removeprefix("mps."): value for name, value in released().items()})
    torch.save(module, tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(JudgeError, match=r"MPS_overall_checkpoint\.pth.*would run their code.*Use a \.safetensors copy"):
        reward_models.load("mps", weights=tmp_path / "MPS_overall_checkpoint.pth", tokenizer=folder)
    torch.save(module.half().state_dict(), tmp_path / "mps.pt")
    theirs = reward_models.load("mps", weights=tmp_path / "mps.pt", tokenizer=folder, device="cpu")
    assert theirs._cross["layers"][0][0]["fn"]["to_q"].weight.dtype == torch.float32
    assert (theirs.score(pictures(), PROMPTS) - judge.score(pictures(), PROMPTS)).abs().max() < 1e-2


@pytest.mark.parametrize(
    "name, found",
    [
        ("mps.cross_model.layers.1.1.fn.attn_out.weight", r"1 are missing \(layers\.1\.1\.fn\.attn_out\.weight\), 0 are unknown"),
        ("mps.model.visual_projection.weight", r"1 are missing \(visual_projection\.weight\), 0 are unknown"),
        (None, r"0 are missing \(none\), 1 are unknown \(mean\)"),
    ],
)
def test_nothing_may_be_missing_or_left_over(folder: Path, tmp_path: Path, name: str | None, found: str) -> None:
    state = released()
    state = {k: v for k, v in state.items() if k != name} if name else {**state, "mps.mean": torch.zeros(3)}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(JudgeError, match=f"'mps' are not those of its network: {found}"):
        reward_models.load("mps", weights=tmp_path / "other.safetensors", tokenizer=folder)


def test_weights_that_are_not_here_are_named_with_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"'mps'.*`hf download RE-N-Y/mpsv1 model\.safetensors`.*mps\.weights=PATH"):
        reward_models.load("mps")
    with pytest.raises(JudgeError, match=r"'mps' should be in .*model\.safetensors; there is no such file"):
        reward_models.load("mps", weights=tmp_path)


@pytest.mark.parametrize("threshold", [1, -0.1, float("nan"), "0.3", True])
def test_a_threshold_that_leaves_nothing_is_refused(threshold: object) -> None:
    with pytest.raises(JudgeError, match=r"share of the largest likeness, from 0 to below 1 .*; got .*uses 0\.3, .* 0\.01"):
        reward_models.load("mps", threshold=threshold)


def test_a_tokenizer_with_other_numbers_makes_another_judge(judge: mps.MPS, folder: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    same = reward_models.load("mps", weights=folder, tokenizer=tmp_path, device="cpu")
    exchange_words(tmp_path / "tokenizer.json", "red</w>", "blue</w>")
    other = reward_models.load("mps", weights=folder, tokenizer=tmp_path, device="cpu")
    assert same.fingerprint == judge.fingerprint != other.fingerprint


def test_a_tokenizer_that_pads_otherwise_is_refused(folder: Path, tmp_path: Path) -> None:
    """That of Stable Diffusion 2 pads with the exclamation mark, token 0; LAION's own with the end mark."""
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(folder, pad_token="!").save_pretrained(tmp_path)
    with pytest.raises(JudgeError, match=r"'mps' pads with token 0, .*end mark \(49407\).*laion/CLIP-ViT-H-14"):
        reward_models.load("mps", weights=folder, tokenizer=tmp_path)


def test_a_typed_end_mark_does_not_end_the_prompt(judge: mps.MPS) -> None:
    typed, plain, short = judge.score([pictures()[0]] * 3, ["a cat <|endoftext|> on a mat", "a cat on a mat", "a cat"])
    assert typed == plain != short
