"""Score rewrites by their pictures: a generator draws them, judges score them for the prompt that was typed.

Judges never see the rewrite: it is as good as its pictures are for somebody who typed the prompt. All rewrites of a prompt are
drawn from the same noise, so that their pictures differ by the words alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.errors import UserError
from pipelines import sampling
from pipelines.families._encoding import digest, truncated_prompts
from pipelines.own_judges import provenance_of
from pipelines.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

    from reward_models._judge import Scorer


@dataclass(frozen=True)
class DrawingSettings:
    """Settings of the pictures of rewrites. None stands for the generator's own default."""

    pictures: int = 1  # pictures of each rewrite
    seed: int = 0
    steps: int = 25
    guidance_scale: float | None = None
    sampler: str = sampling.AUTO
    batch_size: int = 16
    height: int | None = None
    width: int | None = None

    def seeds(self, prompt: str) -> list[int]:
        """The seeds of a prompt's pictures, which depend on its text and ``seed`` alone: all its rewrites share them."""
        place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
        return [sampling.picture_seed(self.seed, place, k) for k in range(self.pictures)]

    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``pipelines.sampling.sample``."""
        names = ("steps", "guidance_scale", "sampler", "batch_size", "height", "width")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class RewriteScorer:
    """A generator (a Diffusers text-to-image pipeline) with judges, by name."""

    pipe: Any
    judges: Mapping[str, Scorer]
    drawing: DrawingSettings = DrawingSettings()
    name: str = ""
    """Name of the generator: a folder or hub id; empty: ``pipe.name_or_path``."""

    def identity(self) -> list[Any]:
        """Plain values of everything that scores depend on."""
        return [self._networks(), {name: provenance_of(judge) for name, judge in self.judges.items()}, vars(self.drawing)]

    def generator(self) -> dict[str, str]:
        """The name of the generator, and a digest of its weights."""
        name = self.name or str(getattr(self.pipe, "name_or_path", None) or "")
        known = json.dumps(self._networks(), sort_keys=True)
        return {"name": name, "fingerprint": hashlib.sha256(known.encode()).hexdigest()[:16]}

    def _networks(self) -> dict[str, str]:
        parts = sorted(self.pipe.components.items())
        return {name: digest(part) for name, part in parts if hasattr(part, "state_dict")}

    def pictures(self, prompts: Sequence[str], rewrites: Sequence[str], progress: Progress | None = None) -> list[Image.Image]:
        """[N * pictures]: ``drawing.pictures`` pictures of each of the N rewrites in turn, from the noise of its prompt."""
        rows = [(rewrite, seed) for prompt, rewrite in zip(prompts, rewrites, strict=True) for seed in self.drawing.seeds(prompt)]
        out, size = [], self.drawing.batch_size
        for low in range(0, len(rows), size):
            part = rows[low : low + size]
            out += sampling.sample(self.pipe, [r for r, _ in part], seeds=[s for _, s in part], **self.drawing.options())
            if progress is not None:
                progress("drawing", len(out), len(rows))
        return out

    def scores(self, prompts: Sequence[str], rewrites: Sequence[str], progress: Progress | None = None) -> dict[str, np.ndarray]:
        """The mean score of the pictures of each rewrite for its prompt, by judge: [N] float64, larger is better.

        Equal pairs of prompt and rewrite are drawn and judged once.

        Raises:
            UserError: a judge cannot judge these pictures, or gives no number for one.
        """
        different = list(dict.fromkeys(zip(prompts, rewrites, strict=True)))
        asked = [prompt for prompt, _ in different]
        drawn = self.pictures(asked, [rewrite for _, rewrite in different], progress)
        scored = judged(self.judges, drawn, [prompt for prompt in asked for _ in range(self.drawing.pictures)])
        place = {pair: n for n, pair in enumerate(different)}
        rows = [place[pair] for pair in zip(prompts, rewrites, strict=True)]
        return {name: values.reshape(len(different), -1).mean(axis=1)[rows] for name, values in scored.items()}


def lost_by(pipe: Any, texts: Sequence[str]) -> list[str]:
    """The end of each text that a pipeline does not read, as its first text encoder takes fewer tokens; "" where it reads all."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return [""] * len(texts)
    lost = {cut.prompt: cut.lost for cut in truncated_prompts(tokenizer, list(dict.fromkeys(texts)))}
    return [lost.get(text, "") for text in texts]


def judged(judges: Mapping[str, Scorer], pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The scores of N pictures for their prompts by judge: [N] float64, negated for judges whose smaller scores are better.

    Raises:
        UserError: a judge cannot judge these pictures, or gives no number for one.
    """
    import reward_models
    from reward_models.base import JudgeError

    try:
        scores = reward_models.score(dict(judges), list(pictures), list(prompts), cache=False, progress=False)
    except JudgeError as error:
        raise UserError(f"Pictures of rewrites cannot be judged: {error}.") from error
    out = {}
    for name, judge in judges.items():
        values = np.asarray(scores[name], dtype=np.float64) * (1.0 if judge.info.higher_is_better else -1.0)
        if not np.isfinite(values).all():
            at = prompts[int(np.flatnonzero(~np.isfinite(values))[0])]
            raise UserError(f"The judge {name} gives no number for a picture of {at!r}.")
        out[name] = values
    return out


def standardised(scores: Mapping[str, Sequence[Sequence[float]]]) -> list[np.ndarray]:
    """The mean over judges of each rewrite's standardised scores: for each prompt an array with a number for each rewrite.

    A judge's scores are centred on their mean over the rewrites of a prompt and divided by their pooled standard deviation over
    all prompts. A judge whose scores do not differ adds nothing.

    Args:
        scores: by judge, for each prompt, the scores of its rewrites.
    """
    parts = [_standardised(of_judge) for of_judge in scores.values()]
    return [np.mean(columns, axis=0) for columns in zip(*parts, strict=True)]


def _standardised(scores: Sequence[Sequence[float]]) -> list[np.ndarray]:
    rows = [np.asarray(row, dtype=np.float64) for row in scores]
    centred = [row - row.mean() if len(row) else row for row in rows]
    freedom = sum(len(row) - 1 for row in centred if len(row))
    deviation = np.sqrt(sum((row**2).sum() for row in centred) / freedom) if freedom > 0 else 0.0
    return [row / deviation if deviation > 0 else row for row in centred]
