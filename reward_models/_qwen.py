"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191) for judges: built, filled from a file, and shown a picture.

It is run as it was when HPSv3 was trained on it, in Transformers 4.45 and bfloat16. What differs today scores differently without
a word: positions (``decode``), angles (``frequencies``), and the decoder's norms, whose epsilon is 1e-6 and not 1e-5.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reward_models._pictures import UnreadablePictureWarning
from reward_models._preprocess import normalise, pixels_of, resize
from reward_models._weights import check_fit
from reward_models.base import JudgeError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

PATCH, MERGED = 14, 2
"""Pixels of a patch's side, and patches of a token's side: the decoder sees one token for 28 by 28 pixels."""
TOKEN = PATCH * MERGED
FRAMES = 2
"""A patch is a short film; in a picture nothing moves."""
THINNEST = 200
"""Qwen2-VL refuses a picture that is more than so many times as long as it is wide."""
THETA_TEXT, THETA_VISION = 1_000_000.0, 10_000.0


@dataclass(frozen=True)
class Shape:
    """That of Qwen2-VL-7B with one token more.

    ``text``: width, MLP width, layers, heads, heads of keys and values. ``vision``: width, layers, heads.
    """

    text: tuple[int, int, int, int, int] = (3584, 18944, 28, 28, 4)
    vision: tuple[int, int, int] = (1280, 32, 16)
    vocabulary: int = 151658

    @property
    def turned(self) -> tuple[int, int]:
        """Numbers that one position turns, in a head of the decoder and of the picture encoder, which has two positions."""
        return self.text[0] // self.text[3], self.vision[0] // self.vision[2] // 2


# ----------------------------------------------------------------------------------------------------------------- picture


@dataclass(frozen=True)
class TokenGrid:
    """Resize to about the area of ``tokens`` tokens, in whole tokens, with the proportions kept as far as that goes."""

    tokens: int = 256

    def exact(self, image: Image.Image) -> Tensor | None:
        """One picture to [3, H, W], by PIL; None, with a warning, where the picture is too thin to have a size."""
        from PIL import Image

        size = self.size(image.height, image.width)
        if size is None:
            told = f"{_too_thin(image.height, image.width)}; it scores NaN"
            warnings.warn(told, UnreadablePictureWarning, stacklevel=2)
            return None
        image = image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
        return normalise(pixels_of(image) / 255.0)

    def grad(self, pixels: Tensor) -> Tensor:
        """float [N, 3, H, W] in [0, 1] to the network's own size; gradients reach the pixels.

        Raises:
            JudgeError: the pictures are too thin.
        """
        size = self.size(*pixels.shape[-2:])
        if size is None:
            raise JudgeError(_too_thin(*pixels.shape[-2:]))
        return normalise(resize(pixels.float(), *size).clamp(0.0, 1.0))

    def size(self, height: int, width: int) -> tuple[int, int] | None:
        """Height and width, multiples of a token's side; None where one is more than ``THINNEST`` times the other."""
        if max(height, width) > THINNEST * min(height, width):
            return None
        area = self.tokens * TOKEN**2
        sides = [max(round(side / TOKEN), 1) * TOKEN for side in (height, width)]
        if sides[0] * sides[1] > area:
            shrink = math.sqrt(height * width / area)
            sides = [math.floor(side / shrink / TOKEN) * TOKEN for side in (height, width)]
        elif sides[0] * sides[1] < area:
            grow = math.sqrt(area / (height * width))
            sides = [math.ceil(side * grow / TOKEN) * TOKEN for side in (height, width)]
        return sides[0], sides[1]


def _too_thin(height: int, width: int) -> str:
    return (
        f"a picture of {width} x {height} pixels is more than {THINNEST} times as long as it is wide; "
        f"there is no size at which Qwen2-VL looks at it"
    )


def patches(pixels: Tensor) -> Tensor:
    """[3, H, W] to [H / 14 * W / 14, 1176], the four patches of a token one after the other."""
    height, width = (side // TOKEN for side in pixels.shape[1:])
    tiles = pixels.reshape(3, height, MERGED, PATCH, width, MERGED, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    return tiles.unsqueeze(5).expand(*tiles.shape[:5], FRAMES, PATCH, PATCH).flatten(4).flatten(0, 3)


def places(height: int, width: int) -> Tensor:
    """[height * width, 2]: row and column of every patch, in the order of ``patches``."""
    import torch

    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return grid.reshape(height // MERGED, MERGED, width // MERGED, MERGED, 2).transpose(1, 2).reshape(-1, 2)


# ----------------------------------------------------------------------------------------------------------------- network


def build(shape: Shape) -> nn.Module:
    """The network without its weights, on torch's device ``meta``; see ``fill``."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLModel

    width, inner, layers, heads, keys = shape.text
    pairs = shape.turned[0] // 2
    sections = [
        pairs // 4,
        3 * pairs // 8,
        pairs - pairs // 4 - 3 * pairs // 8,
    ]  # time, height, width: equal here, see ``decode``
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": THETA_TEXT},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"embed_dim": shape.vision[0], "depth": shape.vision[1], "num_heads": shape.vision[2], "hidden_size": width}
    with torch.device("meta"):
        return Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision)).eval().requires_grad_(False)


def fill(net: nn.Module, state: dict[str, Tensor], shape: Shape, dtype: torch.dtype, judge: str) -> None:
    """Give the network its weights in ``dtype``; what has it already is not copied.

    Empties ``state``, so that weights which have to be converted are not in memory twice.

    Raises:
        JudgeError: they are those of another network; names some.
    """
    check_fit(net, state, judge)
    net.load_state_dict({name: state.pop(name).to(dtype) for name in list(state)}, assign=True)
    modules = ((net.language_model.rotary_emb, THETA_TEXT), (net.visual.rotary_pos_emb, THETA_VISION))
    for (module, theta), width in zip(modules, shape.turned, strict=True):
        for name in dict(module.named_buffers(recurse=False)):  # no weights, so not in the file, and still on ``meta``
            setattr(module, name, frequencies(theta, width))


def frequencies(theta: float, width: int) -> Tensor:
    """[width / 2] float32: how far each pair of numbers is turned from one position to the next, rounded to bfloat16.

    Transformers does not round; HPSv3's ``model.to(torch.bfloat16)`` did, before training and ever after, as these were buffers.
    That is up to 0.2 %, after the 800 tokens of a conversation about a radian.
    """
    import torch

    return (1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)).bfloat16().float()


def see(visual: nn.Module, pictures: Sequence[Tensor]) -> Tensor:
    """[T, D]: the tokens of several pictures [3, H, W], one picture after the other, each encoded by itself."""
    import torch

    turned = visual.rotary_pos_emb.inv_freq
    grids = [(picture.shape[1] // PATCH, picture.shape[2] // PATCH) for picture in pictures]
    cells = torch.cat([places(*grid) for grid in grids]).to(turned.device)
    angles = (cells[..., None] * turned).flatten(1).bfloat16()  # rounded once more in the original, as are their cosines
    turns = tuple(torch.cat([turn, turn], dim=-1).float() for turn in (angles.cos(), angles.sin()))
    ends = torch.tensor([0, *(height * width for height, width in grids)]).cumsum(0).to(turned.device, torch.int32)
    states = visual.patch_embed(torch.cat([patches(picture) for picture in pictures]).to(turned.device))
    for block in visual.blocks:
        states = block(states, cu_seqlens=ends, position_embeddings=turns)
    return visual.merger(states)


def decode(net: nn.Module, ids: Tensor, mask: Tensor, seen: Tensor, picture: int) -> Tensor:
    """[N, L, D]: states of the tokens ``ids`` [N, L], those that equal ``picture`` replaced by ``seen``, in their order.

    Positions count on through the pictures, 0 to L - 1. Qwen2-VL's own (M-RoPE: row and column within a picture) are what
    Transformers computes today; HPSv3's class never asked for them.
    """
    import torch

    words = net.get_input_embeddings()(ids)
    words = words.masked_scatter((ids == picture)[..., None], seen.to(words))
    position = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
    out = net.language_model(inputs_embeds=words, attention_mask=mask, position_ids=position, use_cache=False)
    return out.last_hidden_state
