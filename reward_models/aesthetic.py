"""LAION's aesthetic predictors: how much people liked pictures of this kind, whatever the prompt, on a scale of 1 to 10.

Both are heads on the unit-length picture embedding of OpenAI's CLIP ViT-L/14:

    v1   one linear layer (LAION-AI/aesthetic-predictor, ``sa_0_4_vit_l_14_linear.pth``, MIT licence)
    v2   768-1024-128-64-16-1 without activations between, so an affine map as well (christophschuhmann/
         improved-aesthetic-predictor, ``sac+logos+ava1-l14-linearMSE.pth``, Apache-2.0); the usual reward of DDPO

The two disagree a lot. Typical scores are 4.5 to 6.5. The heads lie on GitHub and not on the hub; give their file as ``head``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models import _heads, clip
from reward_models._dual import BATCH, DualEncoder
from reward_models._weights import Source, fill, read_state
from reward_models.base import JudgeError, RewardInfo, prompt_per_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

NAMES = ("aesthetic-v1", "aesthetic-v2")
HEADS = {
    "aesthetic-v1": ("LAION-AI/aesthetic-predictor", "sa_0_4_vit_l_14_linear.pth", "MIT"),
    "aesthetic-v2": ("christophschuhmann/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth", "Apache-2.0"),
}
"""Name -> repository on GitHub, file, licence."""
WIDTHS = (768, 1024, 128, 64, 16, 1)


class Aesthetic:
    """``score = head(embedding)`` with an embedding of length one; no prompt enters."""

    def __init__(self, encoder: DualEncoder, head: nn.Module, name: str) -> None:
        self._encoder, self._head = encoder, head
        self.info = RewardInfo(
            name=name,
            needs_prompt=False,
            licence=HEADS[name][2],
            differentiable=True,
            description="how much people liked pictures of this kind: LAION's predictor, about 1 to 10, on CLIP-L",
        )

    def score(self, images: Any, prompts: str | Sequence[str] | None = None, *, batch_size: int = BATCH) -> Tensor:
        """Scores [N] float32 in the order of ``images``; NaN where a file could not be read. Prompts are counted, not read."""
        import torch

        embeddings = self._encoder.embed_images(images, batch_size=batch_size)
        prompt_per_image(self.info, len(embeddings), prompts)
        with torch.no_grad():
            return self._head(embeddings)[:, 0]

    def differentiable_score(self, pixels: Tensor) -> Tensor:
        """[N] for pixels float [N, 3, H, W] in [0, 1], with gradients to the pixels."""
        return self._head(self._encoder.embed_pixels(pixels))[:, 0]


def load(
    name: str = "aesthetic-v2",
    weights: str | Path | None = None,
    head: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Aesthetic:
    """The judge.

    Args:
        name: which of the two.
        weights: of CLIP ViT-L/14, as for the judge ``clip``; fetched from the hub if not given.
        head: the file of the head.

    Raises:
        JudgeError: no head is given, or the file is not one of this version.
    """
    repo, file, _ = HEADS[name]
    if head is None:
        raise JudgeError(f"the judge {name!r} needs its head: {file} from github.com/{repo}; give its path as head=PATH")
    state = read_state(Source(repo, file, None, Path(head)), name)
    is_linear = name == "aesthetic-v1"
    layers = _heads.build((WIDTHS[0], WIDTHS[-1]) if is_linear else WIDTHS)
    fill(layers, {f"0.{key}": value for key, value in state.items()} if is_linear else _heads.renumbered(state, "layers."), name)
    return Aesthetic(clip.load("vit-l-14", weights, revision=revision, device=device, dtype=dtype), layers, name)
