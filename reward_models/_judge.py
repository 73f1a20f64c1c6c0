"""What every judge of single pictures can do, made from the one thing that tells it apart: scores of a few prepared pictures.

``N`` pictures are opened in batches by threads ahead of the network, prepared there (``preparation``), and scored
(``score_prepared``); see ``_scoring`` for the order of events.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reward_models._pictures import Pictures
from reward_models.base import JudgeError, RewardInfo, prompt_per_image

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor

    from reward_models._combine import Combined
    from reward_models._preprocess import Preprocess
    from reward_models._rank import Ranking
    from reward_models._scoring import CacheLike, ProgressLike

BATCH = 16
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Preparation:
    """What the threads do to a picture before the network sees it; judges with equal preparations share the result.

    ``how`` None leaves the picture as it is. ``fast`` goes through uint8 tensors: up to one grey level off, in few values.
    """

    how: Preprocess | None = None
    fast: bool = False

    def __call__(self, picture: Image.Image) -> Any:
        if self.how is None:
            return picture
        if not self.fast:
            return self.how.exact(picture)
        import numpy as np
        import torch

        return self.how.fast(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None])[0]


class Scorer(ABC):
    """What users see of a judge, or of several combined: everything that follows from having scores.

    ``PointwiseJudge`` and ``Combined`` are the two kinds.
    """

    info: RewardInfo
    sharpness: float | None = None
    """P(a before b) = sigmoid(sharpness * (score_a - score_b)), of scores where lower is better with b and a the other way round;
    above zero, or None where the scores have an order only."""

    @property
    @abstractmethod
    def parts(self) -> tuple[PointwiseJudge, ...]:
        """The judges whose scores are needed."""

    @abstractmethod
    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        """[N] from the scores [N] of ``parts``."""

    @property
    def is_pointwise(self) -> bool:
        """Whether a picture's score is the same whatever pictures are judged beside it."""
        return True

    def check_pointwise(self) -> None:
        """Raises JudgeError unless it is: scores of pictures that are judged part by part could not be compared."""
        if not self.is_pointwise:
            raise JudgeError(
                f"{self.info.name!r} is standardised by the pictures judged together; give it scores seen before: .z(scores)"
            )

    def n_cut(self, prompts: Sequence[str]) -> int | None:
        """How many prompts are too long to be read to their end; 0 for a judge that reads none, None if it is not known."""
        return None if self.info.needs_prompt else 0

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """All that decides its numbers: hashes of the weights, preprocessing, tokenizer, precision, versions of libraries."""

    @cached_property
    def fingerprint(self) -> str:
        """24 hexadecimal digits, equal for judges that give equal scores: a hash of ``provenance``."""
        return _hash(self.provenance())

    # ------------------------------------------------------------------------------------------------------------- scores

    def score(
        self,
        images: Any,
        prompts: str | Sequence[str] | None = None,
        *,
        batch_size: int = BATCH,
        cache: CacheLike = None,
        progress: ProgressLike = None,
    ) -> Tensor:
        """Scores [N] float32 in the order of ``images``; NaN where a file could not be read, with a warning that names it.

        Args:
            images: whatever ``Pictures`` takes: PIL images, paths, a folder, arrays, tensors, a column of a data set, ...
            prompts: one for all, or one for each picture; None where the judge needs none.
            batch_size: halved as often as need be where memory runs out.
            cache: a file or an open ``Cache`` in which scores and embeddings are kept by content; True for the user's own.
            progress: True, False, or a callback (done, all); None shows a bar for more than one batch, where somebody looks.

        Raises:
            JudgeError: there are not as many prompts as pictures, or what was given are no pictures.
        """
        from reward_models._scoring import score_all

        options = {"batch_size": batch_size, "cache": cache, "progress": progress}
        return score_all([self], images, prompts, **options)[0]

    def matrix(self, images: Any, prompts: Sequence[str], *, batch_size: int = BATCH, cache: CacheLike = None) -> Tensor:
        """[N, M]: every picture against every prompt."""
        import torch

        pictures, prompts = Pictures.of(images), [prompts] if isinstance(prompts, str) else prompts
        columns = [self.score(pictures, prompt, batch_size=batch_size, cache=cache) for prompt in prompts]
        return torch.stack(columns, dim=1) if columns else torch.empty(len(pictures), 0)

    def rank(self, images: Any, prompt: str | None = None, *, cache: CacheLike = None) -> Ranking:
        """The pictures in order, best first; in a notebook with thumbnails."""
        from reward_models._rank import ranking

        pictures = Pictures.of(images)
        return ranking(self, pictures, prompt, self.score(pictures, prompt, cache=cache))

    def prefer(self, images_a: Any, images_b: Any, prompts: str | Sequence[str] | None = None, **how: Any) -> Tensor:
        """[N] the judge's own probability that the first picture of each pair is preferred. ``how``: see ``score``.

        Raises:
            JudgeError: the judge was not trained on preferences, or the sides are not equally long.
        """
        first, second = Pictures.of(images_a), Pictures.of(images_b)
        if len(first) != len(second):
            raise JudgeError(f"pictures are preferred pair by pair; got {len(first)} and {len(second)}")
        self.check_preference()
        return self.preference(self.score(first, prompts, **how), self.score(second, prompts, **how))

    def preference(self, score_a: Tensor, score_b: Tensor) -> Tensor:
        """P(a before b) from scores; see ``prefer``."""
        import torch

        self.check_preference()
        ahead = score_a - score_b if self.info.higher_is_better else score_b - score_a
        return torch.sigmoid(self.sharpness * ahead)

    def check_preference(self) -> None:
        """Raises JudgeError, saying why, unless ``preference`` follows from scores alone."""
        if self.sharpness is None:
            raise JudgeError(f"the judge {self.info.name!r} was not trained on preferences; its scores have an order only")
        if not self.sharpness > 0:
            raise JudgeError(
                f"the sharpness of {self.info.name!r} is {self.sharpness}; it is above zero: whether higher is better says info"
            )

    # ----------------------------------------------------------------------------------------------------------- training

    def differentiable_score(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        """[N] for pixels float [N, 3, H, W] in [0, 1], with gradients to the pixels. What a decoder overshoots is cut off.

        Raises:
            JudgeError: the judge has no gradient, or the pixels are of another form or range.
        """
        raise JudgeError(f"the judge {self.info.name!r} is not differentiable")

    def loss(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        """Minus the mean score, a scalar to descend: ReFL's and DRaFT's use of a reward."""
        sign = 1.0 if self.info.higher_is_better else -1.0
        return -sign * self.differentiable_score(pixels, prompts).mean()

    def as_callable(self, layout: Literal["ddpo", "trl"] = "ddpo", **how: Any) -> Callable[..., Any]:
        """The judge as a reward function for on-line training, higher always better. ``how``: see ``score``.

        ``ddpo``: (images, prompts, metadata) -> (scores float32 [N] as an array, {}), as DDPO, D3PO and Flow-GRPO call it.
        ``trl``: (prompts, completions, **others) -> list of N floats or None, as TRL's GRPO calls it; completions are pictures.
        """
        if layout not in ("ddpo", "trl"):
            raise JudgeError(f"a reward function is laid out as 'ddpo' or 'trl'; got {layout!r}")
        sign = 1.0 if self.info.higher_is_better else -1.0

        def ddpo(images: Any, prompts: Any = None, metadata: Any = None) -> tuple[np.ndarray, dict]:
            return sign * self.score(images, _strings(prompts), progress=False, **how).numpy(), {}

        def trl(prompts: Any, completions: Any, **others: Any) -> list[float | None]:
            scores = ddpo(completions, prompts)[0].tolist()
            return [None if s != s else s for s in scores]  # TRL's word for a score that there is not

        return ddpo if layout == "ddpo" else trl

    # -------------------------------------------------------------------------------------------------------- combinations

    def scaled(self, factor: float) -> Combined:
        """``factor`` times this judge."""
        from reward_models._combine import Combined, Term

        if not isinstance(self, PointwiseJudge):
            raise JudgeError(f"{self.info.name!r} is no PointwiseJudge: only these can be combined")
        return Combined((Term(self, factor),))

    def z(self, reference: Any = None) -> Combined:
        """This judge less the mean and over the deviation of ``reference``, scores seen before; of the pictures judged together
        if None, as group-relative training has it.
        """
        from reward_models._combine import Combined, standardised

        return Combined((standardised(self, reference),))

    def __mul__(self, factor: float) -> Combined:
        return self.scaled(factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Combined:
        return self.scaled(1.0 / factor)

    def __neg__(self) -> Combined:
        return self.scaled(-1.0)

    def __radd__(self, other: Any) -> Combined:
        return self.scaled(1.0) if other == 0 else NotImplemented  # where sum() begins

    def __add__(self, other: Any) -> Combined:
        return self.scaled(1.0).plus(other.scaled(1.0)) if isinstance(other, Scorer) else NotImplemented

    def __sub__(self, other: Any) -> Combined:
        return self.scaled(1.0).plus(other.scaled(-1.0)) if isinstance(other, Scorer) else NotImplemented


class PointwiseJudge(Scorer):
    """A judge that gives every picture a number of its own.

    A subclass sets ``info``, and where it has them ``sharpness``, ``preparation`` and ``made_of``, and gives
    ``score_prepared``; a differentiable one gives ``differentiable_score``, too.
    """

    preparation: Preparation = Preparation()
    made_of: Mapping[str, Any] = {}
    """All that decides its numbers, for the cache and for reports; a ``Path`` stands for the content of the file. Of a judge of
    somebody's own that does not say, nothing is kept in a cache: it may be another one tomorrow."""

    @abstractmethod
    def score_prepared(self, prepared: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """[n] float32, for n prepared pictures and their prompts."""

    @property
    def says_what_it_is(self) -> bool:
        """Whether its scores may be kept."""
        return bool(self.made_of) or type(self).__module__.startswith(f"{__package__}.")

    @property
    def parts(self) -> tuple[PointwiseJudge, ...]:
        return (self,)

    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        return scores[0]

    def provenance(self) -> dict[str, Any]:
        return {"judge": self.info.name, **_provenance(self.made_of, self.preparation)}


class EmbeddingJudge(PointwiseJudge):
    """A judge that sees a picture as one vector. Judges with one ``encoder`` share its forward pass when they score together."""

    encoder: Encoder

    @property
    def preparation(self) -> Preparation:  # type: ignore[override]
        return self.encoder.preparation

    @abstractmethod
    def score_embeddings(self, pictures: Tensor, texts: Tensor | None) -> Tensor:
        """[n] from pictures [n, D] and, where the judge needs prompts, their texts [n, D]; float32, of length one."""

    def score_prepared(self, prepared: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        texts = self.encoder.embed_text(prompts) if self.info.needs_prompt else None
        return self.score_embeddings(self.encoder.embed(prepared), texts)

    def embed_images(self, images: Any, *, batch_size: int = BATCH, cache: CacheLike = None) -> Tensor:
        """[N, D] of length one, float32, on the CPU; rows of NaN for what could not be read."""
        from reward_models._scoring import embed_all

        return embed_all(self.encoder, images, batch_size=batch_size, cache=cache)


class Encoder(ABC):
    """Pictures to unit vectors, and words where there is a tower for them."""

    preparation: Preparation
    made_of: Mapping[str, Any] = {}

    @abstractmethod
    def embed(self, prepared: Sequence[Tensor]) -> Tensor:
        """[n, D] float32 of length one, on the CPU, for n prepared pictures."""

    @abstractmethod
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """[n, D] float32 of length one, on the CPU."""

    @cached_property
    def fingerprint(self) -> str:
        """Equal for encoders that give equal vectors."""
        return _hash(_provenance(self.made_of, self.preparation))


def device_of(asked: torch.device | str | None) -> torch.device:
    """The device a user asked for; the accelerator, if there is one, where nothing was asked.

    Raises:
        JudgeError: PyTorch knows no such device.
    """
    import torch

    if asked is not None:
        try:
            return torch.device(asked)
        except RuntimeError as error:
            raise JudgeError(f"there is no device {asked!r}; devices are called cuda, cuda:1, mps, cpu ...") from error
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises JudgeError, naming the choices, if ``value`` is none of them."""
    if value not in choices:
        raise JudgeError(f"{name} is one of {', '.join(choices)}; got {value!r}")


def check_pixels(pixels: Tensor) -> Tensor:
    """``pixels``, if they are what ``differentiable_score`` takes.

    Raises:
        JudgeError: they are not; values far outside of [0, 1] would be cut off in silence, and their gradients with them.
    """
    if not hasattr(pixels, "is_floating_point") or not pixels.is_floating_point() or pixels.ndim != 4 or pixels.shape[1] != 3:
        given = f"{pixels.dtype} {list(pixels.shape)}" if hasattr(pixels, "dtype") else type(pixels).__name__
        raise JudgeError(f"differentiable scores are of a float tensor [N, 3, H, W] in [0, 1]; got {given}")
    seen = pixels.detach()
    if ((seen < -0.5) | (seen > 1.5)).any():  # one look at the device
        low, high = seen.aminmax()
        raise JudgeError(
            f"pixels are to be in [0, 1]; these go from {float(low):.2f} to {float(high):.2f}. A decoder's become (x + 1) / 2, "
            "bytes x / 255"
        )
    return pixels


def texts_for(judge: Scorer, n: int, prompts: str | Sequence[str] | None) -> list[str]:
    """One prompt for each of ``n`` pictures; a column of a data set or of a frame is a list."""
    return prompt_per_image(judge.info, n, _strings(prompts))


def _strings(prompts: Any) -> Any:
    """Raises JudgeError for what are no prompts, such as the picture of swapped arguments."""
    if prompts is None or isinstance(prompts, str):
        return prompts
    if hasattr(prompts, "convert") or not hasattr(prompts, "__iter__"):
        raise JudgeError(f"a prompt is a string, or there is a list of them; got {type(prompts).__name__} (pictures come first)")
    return list(prompts)


def _provenance(made_of: Mapping[str, Any], preparation: Preparation) -> dict[str, Any]:
    from reward_models._weights import digest

    told = {k: f"sha256:{digest(v)}" if isinstance(v, Path) else _plain(v) for k, v in made_of.items()}
    preprocess = {"preprocess": str(preparation.how), "fast": preparation.fast} if preparation.how else {}
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "transformers", "pillow")}
    return {**told, **preprocess, "versions": versions}


def _hash(provenance: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:24]


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
