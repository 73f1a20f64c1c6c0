"""CLIP and the judges on its towers, against open_clip with the same random weights, from files in the originals' layouts."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from towers import GELU, PROMPTS, QUICK, original, pictures, write_tokenizer

import reward_models
from reward_models import _clip, aesthetic
from reward_models._pictures import Pictures
from reward_models._preprocess import DEVIATION, MEAN
from reward_models.base import Judge, JudgeError


@torch.no_grad()
def cosines(model: CLIP, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    return (image * text).sum(-1)


def open_clip_pixels() -> torch.Tensor:
    chain = image_transform(224, is_train=False, mean=MEAN, std=DEVIATION)
    return torch.stack([chain(p) for p in pictures()])


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
def test_every_weight_has_one_place(quick: bool) -> None:
    model = original(quick)
    mapped = _clip.to_transformers(model.state_dict())
    target = _clip.build(QUICK if quick else GELU)
    assert mapped.keys() == target.state_dict().keys()
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in target.state_dict().items()}
    target.load_state_dict(mapped)
    pixels, tokens = torch.randn(3, 3, 224, 224), _clip.open_clip_tokens()(PROMPTS)
    towers = _clip.Towers(target, _clip.open_clip_tokens())
    with torch.no_grad():
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(towers.images(pixels), image, rtol=0, atol=1e-6)
    torch.testing.assert_close(towers.texts(PROMPTS), text, rtol=0, atol=1e-6)


def test_the_full_shapes_are_those_of_open_clip() -> None:
    for name, architecture in (("ViT-H-14", _clip.VIT_H_14), ("ViT-L-14", _clip.VIT_L_14)):
        with torch.device("meta"):
            theirs, ours = open_clip.create_model(name, device="meta"), _clip.build(architecture)
        mapped = _clip.to_transformers(theirs.state_dict())
        assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert _clip.VIT_H_14.activation == "gelu" and _clip.VIT_L_14.activation == "quick_gelu"


def test_the_wrong_activation_scores_differently() -> None:
    mapped, pixels = _clip.to_transformers(original().state_dict()), torch.randn(1, 3, 224, 224)
    out = []
    for architecture in (GELU, QUICK):
        model = _clip.build(architecture)
        model.load_state_dict(mapped)
        with torch.no_grad():
            out.append(_clip.Towers(model, _clip.open_clip_tokens()).images(pixels))
    assert (out[0] - out[1]).abs().max() > 1e-4


def test_clip_score_is_the_cosine(tiny_towers: None, tmp_path: Path) -> None:
    model = original(quick=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    judge = reward_models.load("clip", weights=tmp_path)
    assert isinstance(judge, Judge)
    theirs = cosines(model, open_clip_pixels(), _clip.open_clip_tokens()(PROMPTS))
    torch.testing.assert_close(judge.score(pictures(), PROMPTS), theirs, rtol=0, atol=1e-6)
    matrix = judge.matrix(pictures(), PROMPTS)
    torch.testing.assert_close(matrix.diag(), judge.score(pictures(), PROMPTS), rtol=0, atol=1e-6)
    with pytest.raises(JudgeError, match="not trained on preferences"):
        judge.prefer(pictures(), pictures(), PROMPTS)


@pytest.mark.parametrize("name, file", [("hps-v2", "HPS_v2_compressed.pt"), ("hps-v2.1", "HPS_v2.1_compressed.pt")])
def test_hps_from_its_half_precision_file(name: str, file: str, tiny_towers: None, tmp_path: Path) -> None:
    model = original().half().float()  # what float16 keeps
    state = {key: value.half() for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / file)
    judge = reward_models.load(name, weights=tmp_path)
    from test_preprocess import hps_original

    pixels = torch.stack([hps_original(p, antialias=True) for p in pictures()])
    theirs = cosines(model, pixels, _clip.open_clip_tokens()(PROMPTS))
    torch.testing.assert_close(judge.score(pictures(), PROMPTS), theirs, rtol=0, atol=1e-6)
    assert judge.score(pictures(), PROMPTS).dtype == torch.float32
    chance = judge.prefer(pictures()[0], pictures()[1], PROMPTS[0])
    a, b = judge.score(pictures()[:2], PROMPTS[0])
    assert chance.item() == pytest.approx(torch.sigmoid(100 * (a - b)).item(), rel=1e-4)


def test_pickscore_is_scaled_and_keeps_transformers_tokenizer(tiny_towers: None, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = _clip.build(GELU)
    model.load_state_dict(_clip.to_transformers(original().state_dict()))
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    judge = reward_models.load("pickscore", weights=tmp_path)
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    pixels = CLIPImageProcessorPil()(pictures(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = CLIPModel.from_pretrained(tmp_path)(pixel_values=pixels, **tokens)
    torch.testing.assert_close(judge.score(pictures(), PROMPTS), out.logits_per_image.diag(), rtol=0, atol=2e-4)
    a, b = judge.score(pictures()[:2], PROMPTS[0])
    assert judge.prefer(pictures()[0], pictures()[1], PROMPTS[0]).item() == pytest.approx(torch.sigmoid(a - b).item(), rel=1e-4)


def test_the_two_tokenizers_agree_on_plain_prompts_and_not_on_curly_quotes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    theirs, ours = _clip.open_clip_tokens(), _clip.transformers_tokens(tmp_path, "pickscore")

    def words(row: torch.Tensor) -> list[int]:
        return row[: row.argmax() + 1].tolist()

    same = [words(a) == words(b) for a, b in zip(theirs(PROMPTS), ours(PROMPTS), strict=True)]
    assert same == [True, True, False]


def test_a_tokenizer_that_knows_no_word_is_refused(tmp_path: Path) -> None:
    """Transformers makes one, without a word, where it finds no file."""
    for nowhere in (tmp_path, "nobody/no-such-repository"):
        with pytest.raises(JudgeError, match=r"'pickscore' needs the tokenizer of .*`hf download .*tokenizer=PATH"):
            _clip.transformers_tokens(nowhere, "pickscore")


def test_prompts_that_are_too_long_are_counted(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for tokenise in (_clip.open_clip_tokens(), _clip.transformers_tokens(tmp_path, "pickscore")):
        whole, cut = "cat " * 75, "cat " * 76  # with the two marks 77 and 78 tokens
        assert tokenise.n_cut([whole, cut, "a cat"]) == 1
        assert tokenise([whole]).shape == (1, 77) and torch.equal(tokenise([whole]), tokenise([cut]))


def test_a_typed_end_mark_does_not_end_the_prompt(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for tokenise in (_clip.open_clip_tokens(), _clip.transformers_tokens(tmp_path, "pickscore")):
        typed, other, plain = tokenise(["a cat <|endoftext|> on a mat", "a cat <end_of_text> on a mat", "a cat on a mat"])
        assert torch.equal(typed, plain) and torch.equal(other, plain)


@pytest.fixture
def judge(tiny_towers: None, tmp_path: Path) -> Judge:
    save_file(original(quick=True).state_dict(), tmp_path / "model.safetensors")
    return reward_models.load("clip", weights=tmp_path / "model.safetensors")


def test_pictures_of_every_kind_score_alike(judge: Judge, tmp_path: Path) -> None:
    picture = pictures()[0]
    picture.save(tmp_path / "a.png")
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [picture, tmp_path / "a.png", str(tmp_path / "a.png"), array, array / 255.0, tensor, tensor / 255]
    scores = judge.score(forms, PROMPTS[0])
    assert torch.equal(scores, scores[:1].expand(len(forms)))
    for others in (torch.stack([tensor, tensor]), picture, np.stack([array] * 3)):
        torch.testing.assert_close(judge.score(others, PROMPTS[0]), scores[:1].expand(len(judge.score(others, PROMPTS[0]))))


def test_a_batch_of_sixteen_is_sixteen_singles(judge: Judge) -> None:
    rng = np.random.default_rng(3)
    many = [Image.fromarray(rng.integers(0, 256, (40 + i, 70, 3), dtype=np.uint8)) for i in range(16)]
    singles = torch.cat([judge.score(p, PROMPTS[1]) for p in many])
    torch.testing.assert_close(judge.score(many, PROMPTS[1], batch_size=16), singles, rtol=0, atol=1e-6)


def test_out_of_memory_halves_the_batch(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes, real = judge.score(pictures(), PROMPTS), [], judge.encoder.embed

    def scarce(batch):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return real(batch)

    monkeypatch.setattr(judge.encoder, "embed", scarce)
    torch.testing.assert_close(judge.score(pictures(), PROMPTS, batch_size=3), whole, rtol=0, atol=1e-6)
    assert sizes == [3, 1, 1, 1]


def test_unreadable_files_score_nan_and_are_named(judge: Judge, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(pictures()):
        picture.save(folder / f"{i}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"1 of 3 pictures cannot be read and score NaN: .*1\.png"):
        scores = judge.score(folder, PROMPTS)
    assert torch.isnan(scores).tolist() == [False, True, False]


def test_the_gradient_reaches_the_picture(judge: Judge) -> None:
    pixels = torch.rand(2, 3, 80, 90, requires_grad=True)
    judge.differentiable_score(pixels, PROMPTS[:2]).sum().backward()
    assert torch.isfinite(pixels.grad).all() and (pixels.grad != 0).float().mean() > 0.5


def test_float_pictures_outside_their_range_are_refused(judge: Judge) -> None:
    with pytest.raises(JudgeError, match=r"reach from -1 to 1\. These look like \[-1, 1\]"):
        judge.score(torch.linspace(-1, 1, 192).view(1, 3, 8, 8), "a")
    with pytest.raises(JudgeError, match=r"look like \[0, 255\]"):
        judge.score(torch.rand(1, 3, 8, 8) * 255, "a")


def test_float_pictures_are_rounded_not_cut_off() -> None:
    (picture,) = Pictures(np.full((2, 2, 3), 100.6 / 255))
    assert picture.getpixel((0, 0)) == (101, 101, 101)


def test_wrong_lengths_are_refused(judge: Judge) -> None:
    with pytest.raises(JudgeError, match="3 pictures and 2 prompts"):
        judge.score(pictures(), PROMPTS[:2])


def test_weights_that_are_not_here_are_named_with_the_way_to_get_them() -> None:
    with pytest.raises(JudgeError, match=r"hps-v2\.1.*HPS_v2\.1_compressed\.pt.*`hf download xswu/HPSv2 .*weights=PATH"):
        reward_models.load("hps-v2.1")


def test_weights_of_another_network_are_refused(tiny_towers: None, tmp_path: Path) -> None:
    state = original().state_dict()
    del state["visual.proj"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(JudgeError, match=r"1 are missing \(visual_projection\.weight\)"):
        reward_models.load("clip", weights=tmp_path)


class Harmful:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickled_module_is_refused_and_not_run(tiny_towers: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "judge.pt"
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(JudgeError, match="would run their code"):
        reward_models.load("hps-v2", weights=path)
    torch.save({"state_dict": Harmful()}, path)
    with pytest.raises(JudgeError, match="would run their code"):
        reward_models.load("hps-v2", weights=path)
    assert "this ran" not in capsys.readouterr().out


def test_any_model_of_open_clip_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(theirs.state_dict(), tmp_path / "alt.pt")
    judge = reward_models.load("clip", model="open_clip:ViT-S-32-alt", weights=tmp_path / "alt.pt")
    chain = image_transform(224, is_train=False, mean=MEAN, std=DEVIATION)
    pixels = torch.stack([chain(p) for p in pictures()])
    tokens = open_clip.get_tokenizer("ViT-S-32-alt")(PROMPTS)
    torch.testing.assert_close(judge.score(pictures(), PROMPTS), cosines(theirs, pixels, tokens), rtol=0, atol=1e-6)
    with pytest.raises(JudgeError, match="open_clip knows no model"):
        reward_models.load("clip", model="open_clip:ViT-Z")


# --------------------------------------------------------------------------------------------------------------- aesthetic


@pytest.fixture
def narrow_head(tiny_towers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CLIP of the tiny shape, and heads as wide as its embedding, in the layout of the released files."""
    monkeypatch.setattr(aesthetic, "WIDTHS", (24, 16, 8, 8, 4, 1))
    save_file(original(quick=True).state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(4)
    layers = torch.nn.Sequential(
        *(torch.nn.Linear(24, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 8)),
        *(torch.nn.Dropout(0.1), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)),
    )
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, tmp_path / "v2.pth")
    torch.save(torch.nn.Linear(24, 1).state_dict(), tmp_path / "v1.pth")
    return tmp_path


def test_aesthetic_heads_on_the_unit_embedding(narrow_head: Path) -> None:
    with torch.no_grad():
        embedding = original(quick=True).encode_image(open_clip_pixels(), normalize=True)
    state = torch.load(narrow_head / "v2.pth", weights_only=True)
    by_hand = embedding
    for number in (0, 2, 4, 6, 7):
        by_hand = by_hand @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    judge = reward_models.load("aesthetic-v2", weights=narrow_head, head=narrow_head / "v2.pth")
    torch.testing.assert_close(judge.score(pictures()), by_hand[:, 0], rtol=0, atol=1e-6)
    linear = torch.load(narrow_head / "v1.pth", weights_only=True)
    first = reward_models.load("aesthetic-v1", weights=narrow_head, head=narrow_head / "v1.pth")
    torch.testing.assert_close(
        first.score(pictures()), (embedding @ linear["weight"].T + linear["bias"])[:, 0], rtol=0, atol=1e-6
    )
    pixels = torch.rand(1, 3, 70, 70, requires_grad=True)
    judge.differentiable_score(pixels).sum().backward()
    assert (pixels.grad != 0).any()


def test_an_aesthetic_head_must_be_given_and_fit(narrow_head: Path) -> None:
    with pytest.raises(JudgeError, match=r"sac\+logos\+ava1.*github.com/christophschuhmann.*head=PATH"):
        reward_models.load("aesthetic-v2", weights=narrow_head)
    with pytest.raises(JudgeError, match="aesthetic-v1.*not those of its network"):
        reward_models.load("aesthetic-v1", weights=narrow_head, head=narrow_head / "v2.pth")
