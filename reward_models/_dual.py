"""Judges that compare a picture with its prompt in CLIP's space: CLIP score, PickScore, HPSv2 and HPSv2.1 differ in weights,
preprocessing, tokenizer and scale alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from reward_models._pictures import read_pictures
from reward_models._preprocess import Preprocess
from reward_models.base import JudgeError, RewardInfo, prompt_per_image

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reward_models._clip import Towers

BATCH = 16


class DualEncoder:
    """``score = factor * cos(picture, prompt)``; ``P(a before b) = sigmoid(sharpness * (score_a - score_b))``.

    ``sharpness`` None: the judge was not trained on preferences, and its scores have an order only.
    """

    def __init__(
        self, info: RewardInfo, towers: Towers, preprocess: Preprocess, factor: float = 1.0, sharpness: float | None = None
    ) -> None:
        self.info, self.preprocess = info, preprocess
        self._towers, self._factor, self._sharpness = towers, factor, sharpness

    def score(self, images: Any, prompts: str | Sequence[str] | None = None, *, batch_size: int = BATCH) -> Tensor:
        """Scores [N] float32 in the order of ``images``; NaN where a file could not be read.

        Raises:
            JudgeError: there are not as many prompts as pictures, or what was given are no pictures.
        """
        pictures = read_pictures(images)
        texts = self.embed_text(prompt_per_image(self.info, len(pictures), prompts))
        return self._factor * (self.embed_images(pictures, batch_size=batch_size) * texts).sum(dim=-1)

    def matrix(self, images: Any, prompts: Sequence[str], *, batch_size: int = BATCH) -> Tensor:
        """[N, M]: every picture against every prompt."""
        return self._factor * self.embed_images(images, batch_size=batch_size) @ self.embed_text(prompts).T

    def prefer(self, images_a: Any, images_b: Any, prompts: str | Sequence[str]) -> Tensor:
        """[N] the judge's own probability that the first picture of each pair is preferred.

        Raises:
            JudgeError: the judge was not trained on preferences.
        """
        import torch

        if self._sharpness is None:
            raise JudgeError(f"the judge {self.info.name!r} was not trained on preferences; its scores have an order only")
        return torch.sigmoid(self._sharpness * (self.score(images_a, prompts) - self.score(images_b, prompts)))

    def embed_images(self, images: Any, *, batch_size: int = BATCH) -> Tensor:
        """[N, D] of length one, float32, on the CPU; rows of NaN for what could not be read."""
        import torch

        pictures = read_pictures(images)
        readable = [i for i, picture in enumerate(pictures) if picture is not None]
        with torch.no_grad():
            parts = in_batches(self._embed, [pictures[i] for i in readable], batch_size)
        out = torch.full((len(pictures), parts[0].shape[1] if parts else 1), float("nan"))
        if parts:
            out[readable] = torch.cat(parts)
        return out

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """[M, D] of length one, float32, on the CPU."""
        return self._towers.texts(prompts).cpu()

    def differentiable_score(self, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """[N] for pixels float [N, 3, H, W] in [0, 1], with gradients to the pixels: for training by reward."""
        texts = self._towers.texts(prompt_per_image(self.info, len(pixels), prompts))
        return self._factor * (self.embed_pixels(pixels) * texts).sum(dim=-1)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """[N, D] of length one for pixels float [N, 3, H, W] in [0, 1], with gradients to the pixels."""
        return self._towers.images(self.preprocess.grad(pixels))

    def _embed(self, pictures: Sequence[Any]) -> Tensor:
        import torch

        return self._towers.images(torch.stack([self.preprocess.exact(p) for p in pictures])).cpu()


def in_batches(work: Callable[[Sequence[Any]], Tensor], items: Sequence[Any], size: int) -> list[torch.Tensor]:
    """``work`` on every batch of ``items``; out of memory, the batches are halved, down to one."""
    import torch

    done, start = [], 0
    while start < len(items):
        try:
            done.append(work(items[start : start + size]))
            start += size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(size // 2, 1)
    return done
