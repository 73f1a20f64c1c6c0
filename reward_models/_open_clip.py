"""Any model of open_clip as CLIP. Each of its released weights (a tag) was trained with a preprocessing and an activation of
its own, which the shape of the network does not tell: another mean, a picture squashed instead of cropped, QuickGELU under a name
that does not say so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

from reward_models._clip import OpenClipTowers, Tokenise
from reward_models._dual import ClipEncoder
from reward_models._judge import DTYPES, check_choice, device_of
from reward_models._preprocess import DEVIATION, MEAN, Preprocess, ShortestSide, normalise, resize, shortest
from reward_models._weights import tokenizer_digest
from reward_models.base import JudgeError

if TYPE_CHECKING:
    import torch
    from PIL import Image

_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""What of a tag's configuration a picture goes through."""
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Transform:
    """open_clip's own chain, of whatever filter, shape and scale: SigLIP, CLIPA, MobileCLIP, PE-Core, DFN.

    ``size``: height and width. ``resize_mode``: ``shortest`` crops the middle, ``longest`` pads with ``fill`` (0 to 255),
    ``squash`` keeps all and changes the shape.
    """

    size: tuple[int, int]
    mean: Triple = MEAN
    deviation: Triple = DEVIATION
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill: int = 0

    def exact(self, image: Image.Image) -> torch.Tensor:
        """One picture to [3, height, width]."""
        return self._chain(image)

    def fast(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] to [N, 3, height, width]; about one grey level off ``exact``, in few values."""
        return normalise(self._fitted(pixels, self.fill).float() / 255.0, self.mean, self.deviation)

    def grad(self, pixels: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] in [0, 1] to [N, 3, height, width]; gradients reach the pixels."""
        return normalise(self._fitted(pixels.float(), self.fill / 255.0).clamp(0.0, 1.0), self.mean, self.deviation)

    @cached_property
    def _chain(self) -> Any:
        import open_clip

        how = {"interpolation": self.interpolation, "resize_mode": self.resize_mode, "fill_color": self.fill}
        return open_clip.image_transform(self.size, is_train=False, mean=self.mean, std=self.deviation, **how)

    def _fitted(self, pixels: torch.Tensor, fill: float) -> torch.Tensor:
        """The chain's geometry for tensors, which open_clip's own resizing does not take."""
        from open_clip.transform import center_crop_or_pad

        pixels = resize(pixels, *self._sides(*pixels.shape[-2:]), interpolation=self._filter)
        return center_crop_or_pad(pixels, list(self.size), fill=fill)

    @property
    def _is_square(self) -> bool:
        return self.size[0] == self.size[1]

    @property
    def _filter(self) -> str:
        """open_clip forgets what it was asked where it crops to another shape than a square."""
        return self.interpolation if self.resize_mode != "shortest" or self._is_square else "bicubic"

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before crop or padding."""
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and self._is_square:
            return shortest(height, width, self.size[0])
        ratios = (height / self.size[0], width / self.size[1])
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(height / ratio), round(width / ratio)


def preprocess_of(configuration: Mapping[str, Any]) -> Preprocess:
    """What a network's ``preprocess_cfg`` asks for; where that is what OpenAI's CLIP has, CLIP's own, which judges share."""
    size = configuration["size"]
    height, width = (size, size) if isinstance(size, int) else size
    bilinear = configuration["interpolation"] == "bilinear"
    found = Transform(
        size=(height, width),
        mean=_triple(configuration["mean"]),
        deviation=_triple(configuration["std"]),
        interpolation="bilinear"
        if bilinear
        else "bicubic",  # open_clip's third word, random, is bicubic where nothing is trained
        resize_mode=configuration["resize_mode"],
        fill=configuration["fill_color"],
    )
    is_clips = height == width and found == Transform((height, width), fill=found.fill)  # what is cropped has nothing to fill
    return ShortestSide(height) if is_clips else found


def _triple(values: float | tuple[float, ...]) -> Triple:
    return tuple(values) if isinstance(values, tuple | list) else (values,) * 3


# ----------------------------------------------------------------------------------------------------------------- loading


def load_encoder(
    name: str,
    weights: str | Path | None = None,
    tag: str | None = None,
    *,
    device: str | None = None,
    dtype: str = "float32",
    preprocess: str = "exact",
) -> ClipEncoder:
    """The model ``name`` of ``open_clip.list_models()`` behind the preprocessing that its weights were trained with.

    ``weights``: a file, or a tag; the first tag of the name if None. ``tag``: whose preprocessing and activation a file wants.

    Raises:
        JudgeError: an unknown model or tag, weights that cannot be had or are another model's, no tokenizer.
    """
    import open_clip
    import torch

    check_choice("preprocess", preprocess, ("exact", "fast"))
    check_choice("dtype", dtype, DTYPES)
    if name not in open_clip.list_models():
        raise JudgeError(f"open_clip knows no model called {name!r}; open_clip.list_models() lists them")
    is_file = weights is not None and Path(weights).expanduser().is_file()
    if tag is not None and not is_file:
        raise JudgeError(
            f"tag={tag} says what a file's weights are, and weights={weights} is no file; a tag alone is weights={tag}"
        )
    tag = tag if is_file else str(weights) if weights is not None else _first_tag(name)
    asked = _of_any_tag(name) if tag is None else _of_tag(name, tag)
    file = Path(weights).expanduser().absolute() if is_file else _fetched(name, tag, asked)
    network = _network(name, file, asked)
    words = _tokens(name)
    towers = OpenClipTowers(network, words, device_of(device), getattr(torch, dtype))
    made_of = {"model": f"open_clip:{name}", "weights": file, "tag": tag, "tokenizer": words.identity, "dtype": dtype}
    made_of |= {"quick_gelu": _is_quick(name, asked), **_versions(name)}
    return ClipEncoder(towers, preprocess_of(open_clip.get_model_preprocess_cfg(network)), made_of, preprocess == "fast")


def _network(name: str, file: Path, asked: Mapping[str, Any]) -> Any:
    import open_clip

    how = {"force_preprocess_cfg": {key: asked[key] for key in _PREPROCESSING if key in asked}}
    try:
        return open_clip.create_model(name, pretrained=str(file), force_quick_gelu=_is_quick(name, asked), **how)
    except UnpicklingError as error:
        raise JudgeError(
            f"{file} holds Python objects besides tensors; loading it would run their code, which is refused"
        ) from error
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise JudgeError(f"{file} cannot be loaded as open_clip's {name}: {str(error).strip()[:300]}") from error


def _is_quick(name: str, asked: Mapping[str, Any]) -> bool:
    """Whether the activation is QuickGELU: the name says so, or its tag, as of OpenAI's weights of every size."""
    import open_clip

    return bool(asked.get("quick_gelu") or open_clip.get_model_config(name).get("quick_gelu"))


def _first_tag(name: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        raise JudgeError(f"open_clip has no weights for {name!r}; give a file of your own as weights=PATH")
    return tags[0]


def _of_tag(name: str, tag: str) -> Mapping[str, Any]:
    import open_clip

    found = open_clip.get_pretrained_cfg(name, tag)
    if not found:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise JudgeError(f"{tag!r} is no file, and none of the weights that open_clip has for {name}: {tags}")
    return found


def _of_any_tag(name: str) -> Mapping[str, Any]:
    """The preprocessing of a file that nothing else is known of: that of the name's tags. Where they differ it is CLIP's, as in
    open_clip, with a warning. The activation is the name's own, which may say ``-quickgelu``."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    ways = [{key: value for key, value in _of_tag(name, tag).items() if key in _PREPROCESSING} for tag in tags]
    if ways and all(way == ways[0] for way in ways):
        return ways[0]
    if ways:
        warnings.warn(
            f"open_clip's weights for {name} do not all take pictures alike; the file is read as one that takes them as OpenAI's "
            f"CLIP does. If it does not, say whose it is by tag=TAG: {', '.join(tags)}",
            stacklevel=6,
        )
    return {}


def _fetched(name: str, tag: str, configuration: Mapping[str, Any]) -> Path:
    import open_clip

    try:
        return Path(open_clip.download_pretrained(dict(configuration)))
    except (OSError, RuntimeError) as error:
        raise JudgeError(
            f"the weights {tag!r} of open_clip's {name} are not on this machine and could not be fetched; a file that you have "
            f"is used by weights=PATH tag={tag} (in the shell --judge-options clip.weights=PATH clip.tag={tag})"
        ) from error


def _versions(name: str) -> dict[str, str]:
    """Of the packages that the network is built by."""
    import open_clip

    by_timm = "timm_model_name" in open_clip.get_model_config(name)["vision_cfg"]
    return {package: metadata.version(package) for package in ("open_clip_torch", *(["timm"] if by_timm else []))}


# ------------------------------------------------------------------------------------------------------------------- words


def _tokens(name: str) -> Tokenise:
    """The model's own tokenizer, cut at its own length: 77 for CLIP, 64 for SigLIP, 32 for CLIPA."""
    import open_clip

    try:
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, ValueError, ImportError) as error:
        wanted = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name", name)
        raise JudgeError(
            f"open_clip's {name} needs the tokenizer of {wanted}, which is not on this machine and could not be fetched; where "
            f"there is a connection, `hf download {wanted} --include '*token*' 'vocab*' 'merges*' '*.model'` fetches it"
        ) from error
    return Tokenise(tokenizer, partial(_count, tokenizer), tokenizer.context_length, _identity(tokenizer))


def _identity(tokenizer: Any) -> str:
    """What decides its tokens: the version of open_clip, and of one of Transformers that it wraps the content, too."""
    own = f"open_clip {metadata.version('open_clip_torch')}"
    if not hasattr(tokenizer, "tokenizer"):
        return own
    return f"{own} {tokenizer_digest(tokenizer.tokenizer)}"


def _count(tokenizer: Any, text: str) -> int:
    """Tokens of a prompt with the marks around it, by open_clip's own tokenizer or by one of Transformers that it wraps."""
    if not hasattr(tokenizer, "tokenizer"):
        return len(tokenizer.encode(text)) + 2
    cleaned = tokenizer.clean_fn(text)
    if tokenizer.tokenizer_mode == "clips":  # start, end and a token of the class
        return len(tokenizer.tokenizer(cleaned, add_special_tokens=False, verbose=False).input_ids) + 3
    return len(tokenizer.tokenizer(cleaned, verbose=False).input_ids)  # it would warn of errors, but what is long is cut
