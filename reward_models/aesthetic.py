"""LAION's aesthetic predictors: how much people liked pictures of this kind, whatever the prompt, on a scale of 1 to 10.

Both are heads on the unit-length picture embedding of OpenAI's CLIP ViT-L/14:

    v1   one linear layer (LAION-AI/aesthetic-predictor, ``sa_0_4_vit_l_14_linear.pth``, MIT licence)
    v2   768-1024-128-64-16-1 without activations between, so an affine map as well (christophschuhmann/
         improved-aesthetic-predictor, ``sac+logos+ava1-l14-linearMSE.pth``, Apache-2.0); the usual reward of DDPO

The two disagree a lot. Typical scores are 4.5 to 6.5. The heads lie on GitHub and not on the hub; give their file as ``head``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reward_models import _heads, clip
from reward_models._judge import EmbeddingJudge
from reward_models._weights import Source, fill, path_of, read_state
from reward_models.base import JudgeError, RewardInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from reward_models._dual import ClipEncoder

NAMES = ("aesthetic-v1", "aesthetic-v2")
HEADS = {
    "aesthetic-v1": ("LAION-AI/aesthetic-predictor", "sa_0_4_vit_l_14_linear.pth", "MIT"),
    "aesthetic-v2": ("christophschuhmann/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth", "Apache-2.0"),
}
"""Name -> repository on GitHub, file, licence."""
WIDTHS = (768, 1024, 128, 64, 16, 1)


class Aesthetic(EmbeddingJudge):
    """``score = head(embedding)`` with an embedding of length one; no prompt enters."""

    encoder: ClipEncoder

    def __init__(self, encoder: ClipEncoder, head: nn.Module, name: str, head_file: Path | None = None) -> None:
        self.encoder, self._head = encoder, head
        self.made_of = {**encoder.made_of, "head": head_file}
        self.info = RewardInfo(
            name=name,
            needs_prompt=False,
            licence=HEADS[name][2],
            differentiable=True,
            description="how much people liked pictures of this kind: LAION's predictor, about 1 to 10, on CLIP-L",
        )

    def score_embeddings(self, pictures: Tensor, texts: Tensor | None) -> Tensor:
        return self._head(pictures)[:, 0]

    def differentiable_score(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        vectors = self.encoder.embed_pixels(pixels)
        return self.score_embeddings(vectors.cpu(), None).to(vectors.device)  # the head stays where ``score`` needs it


def load(
    name: str = "aesthetic-v2",
    weights: str | Path | None = None,
    head: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    preprocess: str = "exact",
) -> Aesthetic:
    """The judge.

    Args:
        name: which of the two.
        weights: of CLIP ViT-L/14, as for the judge ``clip``; fetched from the hub if not given.
        head: the file of the head.
        device, dtype, preprocess: as for ``clip``; judges that agree in these and in ``weights`` share one forward pass.

    Raises:
        JudgeError: no head is given, or the file is not one of this version.
    """
    repo, file, _ = HEADS[name]
    if head is None:
        raise JudgeError(
            f"the judge {name!r} needs its head: {file} from github.com/{repo}; give its path as head=PATH "
            f"(in the shell --judge-options {name}.head=PATH)"
        )
    place = path_of(Source(repo, file, None, Path(head)), name)
    state = read_state(place, name)
    is_linear = name == "aesthetic-v1"
    layers = _heads.build((WIDTHS[0], WIDTHS[-1]) if is_linear else WIDTHS)
    fill(layers, {f"0.{key}": value for key, value in state.items()} if is_linear else _heads.renumbered(state, "layers."), name)
    encoder = clip.encoder("vit-l-14", weights, name, revision=revision, device=device, dtype=dtype, preprocess=preprocess)
    return Aesthetic(encoder, layers, name, place)
