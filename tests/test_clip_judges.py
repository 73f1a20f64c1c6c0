"""CLIP and the judges on its towers, against open_clip with the same random weights, from files in the originals' layouts."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from test_preprocess import noise
from towers import GELU, PROMPTS, QUICK, exchange_words, original, pictures, write_tokenizer

import reward_models
from reward_models import _clip, aesthetic
from reward_models._pictures import Pictures
from reward_models._preprocess import DEVIATION, MEAN, ShortestSide
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


def test_a_tokenizer_with_other_numbers_makes_another_judge(tiny_towers: None, tmp_path: Path) -> None:
    """From wherever it is read, also from the folder in which the first was: a cache would take the one for the other."""
    model = _clip.build(GELU)
    model.load_state_dict(_clip.to_transformers(original().state_dict()))
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    first = reward_models.load("pickscore", weights=tmp_path)
    write_tokenizer(tmp_path / "copy")
    again = reward_models.load("pickscore", weights=tmp_path, tokenizer=tmp_path / "copy")
    assert again.encoder is first.encoder  # of equal content
    exchange_words(tmp_path / "tokenizer.json", "red</w>", "blue</w>")
    other, cache = reward_models.load("pickscore", weights=tmp_path), tmp_path / "c.sqlite"
    assert other.fingerprint != first.fingerprint and other.encoder.fingerprint != first.encoder.fingerprint
    scores = [judge.score(pictures(), PROMPTS[0], cache=cache) for judge in (first, other)]
    torch.testing.assert_close(scores[1], other.score(pictures(), PROMPTS[0]))
    assert not torch.allclose(scores[0], scores[1])


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


def test_prompts_that_are_too_long_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tokenizer(tmp_path)
    for tokenise in (_clip.open_clip_tokens(), _clip.transformers_tokens(tmp_path, "pickscore")):
        whole, cut = "cat " * 75, "cat " * 76  # with the two marks 77 and 78 tokens
        assert tokenise.n_cut([whole, cut, "a cat"]) == 1
        assert tokenise([whole]).shape == (1, 77) and torch.equal(tokenise([whole]), tokenise([cut]))
    assert not caplog.messages  # Transformers would tell of errors that there are none


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


# --------------------------------------------------------------------------------------------------- open_clip's released tags

TAGS = {
    "openai": ("ViT-B-32", "openai"),
    "mean of a half": ("ViT-L-14", "laion2b_s32b_b82k"),
    "siglip": ("ViT-B-16-SigLIP", "webli"),
    "clipa": ("ViT-L-14-CLIPA", "datacomp1b"),
    "pe-core": ("PE-Core-T-16-384", "meta"),
    "mobileclip": ("MobileCLIP-S1", "datacompdr"),
    "mobileclip2": ("MobileCLIP2-S3", "dfndr2b"),
    "dfn": ("ViT-H-14", "dfn5b"),
}
"""One of each kind of preprocessing and activation."""


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A small network in open_clip's list, with random weights for each tag that the test names, configured as one of TAGS."""
    folder = tmp_path / "configurations"
    folder.mkdir()

    def release(name: str = "small", text: dict | None = None, **tags: dict) -> str:
        vision = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
        words = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **(text or {})}
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": words}))
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        open_clip.add_model_config(folder / f"{name}.json")
        torch.manual_seed(0)
        network = open_clip.create_model(name)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        torch.save(network.state_dict(), folder / f"{name}.pt")
        entries = {tag: {**of, "url": "", "hf_hub": "", "file": str(folder / f"{name}.pt")} for tag, of in tags.items()}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, entries)
        return name

    return release


def opens(name: str, tag: str, **forced: bool) -> tuple[CLIP, torch.Tensor]:
    """open_clip's own network, and the pictures through its own transform."""
    network, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag, **forced)
    return network.eval(), torch.stack([transform(picture) for picture in pictures()])


@pytest.mark.parametrize("kind", TAGS)
def test_pictures_reach_a_model_of_open_clip_as_its_tag_asks(kind: str, released: Callable[..., str]) -> None:
    asked = open_clip.get_pretrained_cfg(*TAGS[kind])
    name = released(theirs=asked)
    network, pixels = opens(name, "theirs", force_quick_gelu=bool(asked.get("quick_gelu")))
    theirs = cosines(network, pixels, open_clip.get_tokenizer(name)(PROMPTS))
    by_tag = reward_models.load("clip", model=f"open_clip:{name}", weights="theirs")
    by_file = reward_models.load("clip", model=f"open_clip:{name}", weights=asked_file(name), tag="theirs")
    for judge in (by_tag, by_file):
        torch.testing.assert_close(judge.score(pictures(), PROMPTS), theirs, rtol=0, atol=1e-6)
    smooth = noise(70, 110)
    tensor = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None]
    pixels = (tensor / 255).requires_grad_()
    by_pixels = by_tag.differentiable_score(pixels, PROMPTS[0])
    by_pixels.sum().backward()
    assert (pixels.grad != 0).any()
    fast = reward_models.load("clip", model=f"open_clip:{name}", weights="theirs", preprocess="fast").score(smooth, PROMPTS[0])
    for other in (by_pixels, fast):
        torch.testing.assert_close(other, by_tag.score(smooth, PROMPTS[0]), rtol=0, atol=5e-3)


def asked_file(name: str) -> Path:
    return Path(next(iter(open_clip.pretrained._PRETRAINED[name].values()))["file"])


def test_without_weights_the_first_tag_and_its_activation_are_taken(released: Callable[..., str]) -> None:
    """ViT-B-32 is OpenAI's then, whose activation its name does not tell."""
    quick = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    name = released(openai=quick, laion=open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_e16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (reward_models.load("clip", model=f"open_clip:{name}", weights=tag) for tag in (None, "laion"))
    assert (first.made_of["quick_gelu"], second.made_of["quick_gelu"]) == (True, False)
    network, pixels = opens(name, "openai", force_quick_gelu=True)
    theirs = cosines(network, pixels, open_clip.get_tokenizer(name)(PROMPTS))
    torch.testing.assert_close(first.score(pictures(), PROMPTS), theirs, rtol=0, atol=1e-6)
    assert (second.score(pictures(), PROMPTS) - theirs).abs().max() > 1e-5


def test_a_file_is_read_as_all_tags_of_its_name_are(released: Callable[..., str]) -> None:
    siglip, clips = (open_clip.get_pretrained_cfg(*TAGS[kind]) for kind in ("siglip", "openai"))
    name = released("alike", a=siglip, b=siglip)
    assert reward_models.load("clip", model=f"open_clip:{name}", weights=asked_file(name)).preparation.how.mean == (0.5, 0.5, 0.5)
    name = released("unlike", a=siglip, b=clips)
    with pytest.warns(UserWarning, match=r"do not all take pictures alike.*by tag=TAG: a, b"):
        judge = reward_models.load("clip", model=f"open_clip:{name}", weights=asked_file(name))
    assert judge.preparation.how == ShortestSide(32)


def test_provenance_of_a_model_of_open_clip_tells_its_weights(released: Callable[..., str]) -> None:
    name = released(theirs=open_clip.get_pretrained_cfg(*TAGS["openai"]))
    judge = reward_models.load("clip", model=f"open_clip:{name}", weights="theirs")
    told = judge.provenance()
    assert told["weights"] == f"sha256:{hashlib.sha256(asked_file(name).read_bytes()).hexdigest()}" and told["tag"] == "theirs"
    assert told["open_clip_torch"] == open_clip.__version__
    assert "publisher" in judge.info.licence
    fits, cut = "cat " * 18, "cat " * 19  # with the two marks 20 and 21 tokens
    assert judge.n_cut([fits, cut, "a cat"]) == 1


def test_the_length_of_a_prompt_is_told_by_a_tokenizer_of_transformers(released: Callable[..., str], tmp_path: Path) -> None:
    """As of SigLIP, which has another one, cleans prompts first and reads 64 tokens."""
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    siglip = {"hf_tokenizer_name": str(tmp_path), "tokenizer_kwargs": {"clean": "canonicalize"}}
    name = released(text=siglip, webli=open_clip.get_pretrained_cfg(*TAGS["siglip"]))
    judge = reward_models.load("clip", model=f"open_clip:{name}")
    assert judge.n_cut(["cat, " * 18, "cat, " * 19]) == 1
    network, pixels = opens(name, "webli")
    theirs = cosines(network, pixels, open_clip.get_tokenizer(name)(PROMPTS))
    torch.testing.assert_close(judge.score(pictures(), PROMPTS), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"weights": "laoin"}, "'laoin' is no file, and none of the weights that open_clip has for small: openai"),
        ({"weights": "openai", "tag": "openai"}, "a tag alone is weights=openai"),
        ({"weights": "FILE", "tag": "other"}, "'other' is no file, and none of the weights"),
        ({"weights": "PICKLE"}, "would run their code, which is refused"),
        ({"weights": "OTHER"}, "cannot be loaded as open_clip's small: .*size mismatch"),
    ],
)
def test_weights_that_open_clip_cannot_have_are_told(
    how: dict, message: str, released: Callable[..., str], tmp_path: Path
) -> None:
    name = released(openai=open_clip.get_pretrained_cfg(*TAGS["openai"]))
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Harmful()))
    state = torch.load(asked_file(name), weights_only=True)
    torch.save({**state, "visual.proj": torch.zeros(3, 3)}, tmp_path / "other.pt")
    files = {"FILE": asked_file(name), "PICKLE": tmp_path / "pickle.pt", "OTHER": tmp_path / "other.pt"}
    how = {**how, "weights": files.get(how["weights"], how["weights"])}
    with pytest.raises(JudgeError, match=f"(?s){message}"):
        reward_models.load("clip", model=f"open_clip:{name}", **how)


def test_what_clips_own_numbers_rest_on_is_said_as_before(judge: Judge) -> None:
    """Or scores that a cache holds would be computed anew."""
    told = judge.provenance()
    assert told.pop("weights").startswith("sha256:") and told.pop("versions")
    preprocess = "ShortestSide(size=224, crop='round', convert_first=False)"
    tokenizer = f"open_clip {open_clip.__version__}"
    wanted = {"judge": "clip", "tokenizer": tokenizer, "dtype": "float32", "factor": 1.0}
    assert told == {**wanted, "preprocess": preprocess, "fast": False}


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
