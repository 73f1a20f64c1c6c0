"""How the shipped miniature PickScore was made: ``diffalign world train-judge --output DIR``.

A genuine CLIP of 1.7 million parameters (``reward_models.tiny_pickscore``), in the two steps of the real one (Kirstain et al.
2023, arXiv 2305.01569):

1. It learns what captions mean, by CLIP's contrastive loss (Radford et al. 2021, arXiv 2103.00020) on freshly drawn scenes.
   Each batch also holds captions that are wrong in one word, for in the tiny world any two captions are far apart otherwise.
   Where CLIP has 400 million pictures for that, this one has minutes; so a linear head, thrown away afterwards, also has to
   tell what was drawn: which shapes in which colours, where they are, and in what style. The same head reads the captions, so
   that both towers come to say "this one is left" in the same way; with pictures alone read, left and right were not learnt.
2. It learns what people prefer, by Pick-a-Pic's loss on the votes of the synthetic people: the cross-entropy between
   (label_0, label_1), a tie being (0.5, 0.5), and the softmax of the two pictures' scores for their caption.

       score = exp(logit_scale) * cos(picture, caption)

   People are asked about drawn scenes, which are cheap in any number and of which some break a claim of their caption; about
   pictures of the tiny checkpoint; and the shipped pairs are there as well.

People are all it learns from: the oracle's utilities go into their votes and nowhere else. Every caption, right or wrong, is
of the train split.

B = batch, P = pictures, D = width of the common space.
"""

from __future__ import annotations

import io
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.optimisation import OptimizerSettings, build_optimizer, build_schedule
from diffalign.written_aside import folder_aside
from pipelines import sampling
from pipelines.families import load_pipeline
from pipelines.tiny import model, pairs, scenes
from pipelines.tiny.people import TIE, People
from pipelines.tiny.settings import JudgeTraining
from reward_models import _clip, oracle, tiny_pickscore
from reward_models._preprocess import ShortestSide

Say = Callable[[str], None]

PREPROCESS = ShortestSide(size=tiny_pickscore.SIZE)
KINDS = [(colour, shape) for colour in oracle.COLOURS for shape in oracle.SHAPES]
TRAITS = tuple(oracle.TASTE_WEIGHTS)
FAR = 16.0
"""Pixels from the middle of two objects to either, about."""
STYLED = 0.1
"""Share of the captions with style words that people are asked about, as in the shipped pairs."""
HIGHEST_SCALE = 100.0
"""CLIP's own bound on exp(logit_scale)."""


# ------------------------------------------------------------------------------------------------------------- near misses

_RIVALS = [
    *(list(words) for words in (oracle.COLOURS, oracle.SHAPES, oracle.SIZES, oracle.BACKGROUNDS, oracle.RELATIONS)),
    *(list(pair) for pair in scenes.STYLE_WORDS.values()),
]
"""Words of which at most one is true of the same thing."""
_CLAIM = re.compile(rf"\b({'|'.join(sorted({w for words in _RIVALS for w in words}, key=len, reverse=True))})\b")


def changed(caption: str, rng: np.random.Generator) -> str:
    """The caption with one of its words replaced by a rival, so that it is true no longer; every kind of claim as often."""
    claims = list(_CLAIM.finditer(caption))
    kinds = [words for words in _RIVALS if any(claim[0] in words for claim in claims)]
    rivals = kinds[rng.integers(len(kinds))]
    those = [claim for claim in claims if claim[0] in rivals]
    claim = those[rng.integers(len(those))]
    other = rivals[(rivals.index(claim[0]) + int(rng.integers(1, len(rivals)))) % len(rivals)]
    return caption[: claim.start()] + other + caption[claim.end() :]


def near_miss(caption: str, rng: np.random.Generator) -> str:
    """A changed caption of the train split."""
    while True:
        wrong = changed(caption, rng)
        if scenes.split_of(wrong) == "train":
            return wrong


# -------------------------------------------------------------------------------------------------------- scenes and twins

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def draw_twins(rng: np.random.Generator, styled: float) -> list[tuple[scenes.Scene, str]]:
    """Two scenes that differ in one claim (and in style), each with its caption of the train split.

    Among pictures drawn at random, colours and shapes alone tell which caption is whose, and relations would not be learnt.
    """
    scene, caption = scenes.draw_captioned(rng, "train", styled)
    while True:
        swapped = scene.relation is not None and rng.random() < 0.5
        way = "places" if swapped else str(rng.choice(["colour", "shape"]))
        relation = _OPPOSITE[scene.relation] if swapped else scene.relation
        twin = _redrawn(replace(scene, objects=_altered(scene.objects, way, rng), relation=relation), rng)
        write = scenes.styled_caption if rng.random() < styled else scenes.plain_caption
        other = write(twin, rng)
        if len({(o.colour, o.shape) for o in twin.objects}) == len(twin.objects) and scenes.split_of(other) == "train":
            return [(scene, caption), (twin, other)]


def _redrawn(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """The same objects beside each other in another style, as far off the middle as that style has it."""
    style, angle = scenes.draw_style(rng), rng.uniform(0, 2 * np.pi)
    centres, reach = np.array([o.centre for o in scene.objects]), np.array([o.radius for o in scene.objects])[:, None] * 1.12
    low, high = (centres - reach).min(axis=0), (centres + reach).max(axis=0)
    room = np.maximum((scenes.SIZE - 4 - (high - low)) / 2, 0.0)
    off = np.clip(style.offset * oracle.OFFSET_PIXELS * np.array([np.cos(angle), np.sin(angle)]), -room, room)
    moved = centres - (low + high) / 2 + scenes.SIZE / 2 + off
    objects = tuple(replace(o, centre=(float(x), float(y))) for o, (x, y) in zip(scene.objects, moved, strict=True))
    return replace(scene, objects=objects, style=style, speck_seed=int(rng.integers(2**31)))


def _altered(objects: tuple[scenes.SceneObject, ...], way: str, rng: np.random.Generator) -> tuple[scenes.SceneObject, ...]:
    """One claim broken: another ``colour`` or ``shape``, ``places`` exchanged, or one missing or too many (``number``)."""
    which = int(rng.integers(len(objects)))
    one, others = objects[which], objects[:which] + objects[which + 1 :]
    if way == "places":
        return (replace(objects[0], centre=objects[1].centre), replace(objects[1], centre=objects[0].centre))
    if way == "number":
        return others or (one, _beside(one, rng))
    return (*objects[:which], _other(one, way, rng), *objects[which + 1 :])


def _beside(one: scenes.SceneObject, rng: np.random.Generator) -> scenes.SceneObject:
    """An object of another colour and shape that nobody asked for."""
    angle, gap = rng.uniform(0, 2 * np.pi), 2.4 * one.radius
    centre = (one.centre[0] + gap * float(np.cos(angle)), one.centre[1] + gap * float(np.sin(angle)))
    return replace(_other(_other(one, "colour", rng), "shape", rng), centre=centre)


def _other(one: scenes.SceneObject, trait: str, rng: np.random.Generator) -> scenes.SceneObject:
    rivals = [w for w in (oracle.COLOURS if trait == "colour" else oracle.SHAPES) if w != getattr(one, trait)]
    return replace(one, **{trait: str(rng.choice(rivals))})


# ----------------------------------------------------------------------------------------------------------------- choices


@dataclass(frozen=True)
class Choices:
    """Pictures of one caption, and what people said when they were shown two of them."""

    caption: str
    pictures: np.ndarray  # [n, 64, 64, 3] uint8
    asked: np.ndarray  # [pairs, 2] places of the two pictures
    labels: np.ndarray  # [pairs] float32 label_0: 1, 0, or 0.5 for a tie

    def as_tensors(self) -> dict[str, Any]:
        """For ``torch.save``."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ("pictures", "asked", "labels")}
        return {"caption": self.caption, **arrays}

    @classmethod
    def from_tensors(cls, saved: dict[str, Any]) -> Choices:
        return cls(saved["caption"], *(saved[name].numpy() for name in ("pictures", "asked", "labels")))


def ask_about(pictures: Sequence[Image.Image], caption: str, people: People, group: int) -> Choices:
    """People's votes on every pair of the pictures, which they see as they would be stored, after JPEG."""
    stored = [Image.open(io.BytesIO(pairs.encode_jpeg(picture))).convert("RGB") for picture in pictures]
    verdicts = [oracle.judge(picture, caption) for picture in stored]
    asked, rng = list(combinations(range(len(stored)), 2)), people.generator(group)
    labels = [people.choose(verdicts[i], verdicts[j], rng) for i, j in asked]
    return Choices(caption, np.stack([np.asarray(p) for p in stored]), np.array(asked), np.array(labels, dtype=np.float32))


def rendered_choices(config: JudgeTraining, rng: np.random.Generator) -> Iterator[Choices]:
    """People's votes on drawings of one caption."""
    people, group = People(seed=config.seed + 10), 0
    while True:
        caption, drawn = draw_variants(rng, "train", config.candidates, config.broken)
        yield ask_about(drawn, caption, people, group)
        group += 1


def draw_variants(rng: np.random.Generator, split: str, n: int, broken: float) -> tuple[str, list[Image.Image]]:
    """A caption and ``n`` drawings of it in several styles and places, a share ``broken`` of them not as it says."""
    scene, caption = scenes.draw_captioned(rng, split, styled=STYLED)
    return caption, [scenes.render(_variant(scene, rng, rng.random() < broken)) for _ in range(n)]


def _variant(scene: scenes.Scene, rng: np.random.Generator, broken: bool) -> scenes.Scene:
    ways = ("places", "places", "colour", "shape", "number") if scene.relation else ("colour", "shape", "number")
    objects = _altered(scene.objects, str(rng.choice(ways)), rng) if broken else scene.objects
    return _redrawn(replace(scene, objects=objects, background=str(rng.choice(list(oracle.BACKGROUNDS)))), rng)


def sampled_choices(config: JudgeTraining, say: Say = print) -> list[Choices]:
    """People's votes on pictures of the tiny checkpoint."""
    people, pipe = People(seed=config.seed + 20), load_pipeline("tiny")
    captions = [caption for _, caption in islice(scenes.stream(config.seed + 20, "train", STYLED), config.sampled)]
    out, part, start = [], 64 // config.candidates, time.time()
    for first in range(0, len(captions), part):
        now = captions[first : first + part]
        seeds = [sampling.picture_seed(config.seed + 20, first + i, k) for i in range(len(now)) for k in range(config.candidates)]
        drawn = sampling.sample(pipe, [c for c in now for _ in range(config.candidates)], seeds=seeds, batch_size=64)
        for i, caption in enumerate(now):
            out.append(ask_about(drawn[i * config.candidates : (i + 1) * config.candidates], caption, people, first + i))
        if len(out) % 160 == 0:
            say(f"sampled {len(out)}/{len(captions)} captions {time.time() - start:.0f} s")
    return out


def shipped_choices() -> list[Choices]:
    """The votes in ``pairs.parquet``."""
    import pyarrow.parquet as pq

    out = []
    for row in pq.read_table(model.pairs_path(), columns=["caption", "jpg_0", "jpg_1", "label_0"]).to_pylist():
        two = np.stack([np.asarray(Image.open(io.BytesIO(row[side])).convert("RGB")) for side in ("jpg_0", "jpg_1")])
        out.append(Choices(row["caption"], two, np.array([[0, 1]]), np.array([row["label_0"]], dtype=np.float32)))
    return out


# ---------------------------------------------------------------------------------------------------------------- training


class JudgeInTraining:
    """The CLIP and its tokenizer, the head that is thrown away, and the losses."""

    def __init__(self, config: JudgeTraining) -> None:
        torch.manual_seed(config.seed)
        self.config, self.tokenizer = config, model.build_tokenizer()
        self.clip = tiny_pickscore.build().train()
        self.head = nn.Linear(tiny_pickscore.WIDTH, 3 * len(KINDS) + len(TRAITS))

    def pictures(self, pictures: np.ndarray) -> Tensor:
        """[P, D] for uint8 [P, 64, 64, 3]."""
        return self.clip.encode_image(PREPROCESS.fast(torch.from_numpy(pictures).permute(0, 3, 1, 2)))

    def texts(self, captions: Sequence[str]) -> Tensor:
        """[len(captions), D], not of length one."""
        how = {"padding": "max_length", "max_length": tiny_pickscore.TOKENS, "truncation": True, "return_tensors": "pt"}
        return self.clip.encode_text(self.tokenizer(list(captions), **how).input_ids)

    @property
    def scale(self) -> Tensor:
        return self.clip.logit_scale.exp()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Weights of the CLIP and of the head."""
        return {"clip": self.clip.state_dict(), "head": self.head.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.clip.load_state_dict(state["clip"])
        self.head.load_state_dict(state["head"])

    def reading_loss(self, features: Tensor, drawn: Drawn) -> Tensor:
        """How far the head is from what was drawn; each trait weighs as the kinds do together."""
        return (
            self._objects_loss(features, drawn) + (self.head(features)[:, 3 * len(KINDS) :] - drawn.traits).square().sum(1).mean()
        )

    def telling_loss(self, features: Tensor, said: Drawn) -> Tensor:
        """How far the same head is from what the captions say, if it is given captions instead of pictures."""
        return self._objects_loss(features, said)

    def _objects_loss(self, features: Tensor, truth: Drawn) -> Tensor:
        read, n = self.head(features), len(KINDS)
        kinds = F.binary_cross_entropy_with_logits(read[:, :n], truth.kinds)
        places = (read[:, n : 3 * n] - truth.places).square() * truth.known
        return len(TRAITS) * kinds + places.sum(dim=1).mean()

    def contrast_loss(self, features: Tensor, captions: Sequence[str], wrong: Sequence[str]) -> tuple[Tensor, Tensor]:
        """CLIP's loss on B pictures and captions, and the features [B + B * k, D] of all captions, the right ones first.

        Each picture must also tell its caption from its own ``wrong`` ones (B * k).
        """
        told = self.texts([*captions, *wrong])
        seen, said = _clip.unit(features), _clip.unit(told)
        true, false = said[: len(seen)], said[len(seen) :].view(len(seen), -1, said.shape[1])  # [B, D], [B, k, D]
        across, own = seen @ true.T, torch.einsum("bd,bkd->bk", seen, false)
        place = torch.arange(len(seen))
        of_pictures = F.cross_entropy(self.scale * torch.cat([across, own], dim=1), place)
        return (of_pictures + F.cross_entropy(self.scale * across.T, place)) / 2, told

    def choice_loss(self, asked: Sequence[Choices]) -> Tensor:
        """Pick-a-Pic's loss, each caption's pairs weighing as much together as another's."""
        sizes = [len(c.pictures) for c in asked]
        seen = _clip.unit(self.pictures(np.concatenate([c.pictures for c in asked])))
        said = _clip.unit(self.texts([c.caption for c in asked]))
        score = self.scale * (seen * said.repeat_interleave(torch.tensor(sizes), dim=0)).sum(dim=1)  # [P]
        losses = []
        for c, of in zip(asked, score.split(sizes), strict=True):
            two, label_0 = of[torch.from_numpy(c.asked)], torch.from_numpy(c.labels)  # [pairs, 2], [pairs]
            losses.append(F.cross_entropy(two, torch.stack([label_0, 1.0 - label_0], dim=1)))
        return torch.stack(losses).mean()

    def fit(self, steps: int, learning_rate: float, next_loss: Callable[[], Tensor], say: Say) -> None:
        """AdamW with a warm-up and a cosine down to nothing."""
        settings = OptimizerSettings(
            learning_rate=learning_rate, beta2=0.98, weight_decay=0.05, schedule="cosine", warmup_steps=steps // 20
        )
        parameters = [*self.clip.parameters(), *self.head.parameters()]
        optimizer = build_optimizer(parameters, settings)
        schedule, smooth, start = build_schedule(optimizer, steps, settings), None, time.perf_counter()
        for step in range(1, steps + 1):
            loss = next_loss()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            with torch.no_grad():
                self.clip.logit_scale.clamp_(max=float(np.log(HIGHEST_SCALE)))
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            if step % 100 == 0 or step == steps:
                say(f"{step}/{steps} loss {smooth:.4f} scale {self.scale.item():.1f} {time.perf_counter() - start:.0f} s")


def caption_losses(judge: JudgeInTraining, batch: int, say: Say) -> Callable[[], Tensor]:
    """Losses of step 1, each on ``batch`` freshly chosen scenes and twins."""
    config, rng = judge.config, np.random.default_rng([judge.config.seed + 1, batch])
    draw = np.random.default_rng(config.seed)
    drawn = [one for _ in range(config.scenes // 2) for one in draw_twins(draw, config.styled)]
    pictures, captions = np.stack([np.asarray(scenes.render(scene)) for scene, _ in drawn]), [caption for _, caption in drawn]
    truth = drawn_truth([scene for scene, _ in drawn])
    say(f"{len(captions)} scenes drawn")

    def next_loss() -> Tensor:
        first = 2 * rng.integers(len(captions) // 2, size=batch // 2)
        chosen = np.concatenate([first, first + 1])
        said = [captions[i] for i in chosen]
        wrong = [near_miss(c, rng) for c in said for _ in range(config.near_misses)]
        features = judge.pictures(pictures[chosen])
        contrast, of_texts = judge.contrast_loss(features, said, wrong)
        read, told = judge.reading_loss(features, truth.of(chosen)), judge.telling_loss(of_texts, said_truth([*said, *wrong]))
        return contrast + read + told

    return next_loss


def contrast(judge: JudgeInTraining, say: Say) -> None:
    """Step 1: what captions mean."""
    config, next_loss = judge.config, caption_losses(judge, judge.config.contrast_batch, say)
    judge.fit(config.contrast_steps, config.contrast_learning_rate, next_loss, lambda line: say(f"captions {line}"))


def choose(judge: JudgeInTraining, sources: Sequence[Sequence[Choices]], say: Say) -> None:
    """Step 2: what people prefer. Every batch takes as much from each source: there are more drawings than pictures to be had.

    Step 1 goes on beside it, at half its weight: without, style is learnt and captions are forgotten.
    """
    config, rng = judge.config, np.random.default_rng(judge.config.seed + 2)
    of_captions = caption_losses(judge, config.contrast_batch // 2, say)

    def next_loss() -> Tensor:
        asked = [sources[i % len(sources)] for i in range(config.choice_batch)]
        choice = judge.choice_loss([source[rng.integers(len(source))] for source in asked])
        return choice + config.captions_kept * of_captions()

    judge.fit(config.choice_steps, config.choice_learning_rate, next_loss, lambda line: say(f"choices {line}"))


@dataclass(frozen=True)
class Drawn:
    """What pictures or captions hold, for the head. K = kinds."""

    kinds: Tensor  # [P, K] 1 for every kind of object that there is
    places: Tensor  # [P, 2 K] how far right (first K) and below (last K) of the objects' middle each is; about -1 to 1
    known: Tensor  # [P, 2 K] 1 where a place is there to be known
    traits: Tensor  # [P, traits] in [0, 1]

    def of(self, which: np.ndarray) -> Drawn:
        """Those of some pictures."""
        return Drawn(self.kinds[which], self.places[which], self.known[which], self.traits[which])


def drawn_truth(shown: Sequence[scenes.Scene]) -> Drawn:
    """From the scenes themselves."""
    there, places = np.zeros((len(shown), len(KINDS))), np.zeros((len(shown), 2, len(KINDS)))
    for i, scene in enumerate(shown):
        middle = np.mean([o.centre for o in scene.objects], axis=0)
        for o in scene.objects:
            there[i, kind := KINDS.index((o.colour, o.shape))] = 1.0
            places[i, :, kind] = (np.array(o.centre) - middle) / FAR
    known = np.repeat(there[:, None], 2, axis=1)
    traits = [[getattr(scene.style, trait) for trait in TRAITS] for scene in shown]
    return Drawn(*(torch.tensor(np.reshape(a, (len(shown), -1)), dtype=torch.float32) for a in (there, places, known, traits)))


def said_truth(captions: Sequence[str]) -> Drawn:
    """From what captions claim: the relation tells one of the two places. They say nothing of the style's numbers."""
    there, places, known = np.zeros((len(captions), len(KINDS))), *np.zeros((2, len(captions), 2, len(KINDS)))
    for i, caption in enumerate(captions):
        claims = oracle.read_caption(caption)
        of = [KINDS.index((o.colour, o.shape)) for o in claims.objects]
        there[i, of] = 1.0
        if claims.relation is not None:
            axis = int(claims.relation in ("above", "below"))
            known[i, axis, of] = 1.0
            places[i, axis, of] = (-1.0, 1.0) if claims.relation in ("left of", "above") else (1.0, -1.0)
    none = np.zeros((len(captions), len(TRAITS)))
    return Drawn(*(torch.tensor(np.reshape(a, (len(captions), -1)), dtype=torch.float32) for a in (there, places, known, none)))


# ------------------------------------------------------------------------------------------------------------------ output


def train(output: Path, config: JudgeTraining, say: Say = print) -> None:
    """Train both steps and write ``output``: half-precision weights, configuration, tokenizer and ``training.json``.

    Called again after a kill, it goes on behind the last part that was finished; they are kept in ``output`` + ".work", which
    is removed at the end.
    """
    work = output.with_name(output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    judge, parts = JudgeInTraining(config), _Parts(work)
    judge.load_state_dict(parts.get("captions", lambda: _contrasted(judge, say)))
    sampled = parts.get("sampled", lambda: [c.as_tensors() for c in sampled_choices(config, say=say)])
    seen = [Choices.from_tensors(c) for c in sampled] + shipped_choices() * bool(config.sampled)
    start = time.perf_counter()
    drawn = list(islice(rendered_choices(config, np.random.default_rng(config.seed + 3)), config.rendered))
    asked = [*seen, *drawn]
    say(f"{len(asked)} captions, {sum(len(c.labels) for c in asked)} votes")
    choose(judge, [source for source in (seen, drawn) if source], say)
    parts.seconds["choices"] = time.perf_counter() - start
    save(output, judge, _record(config, asked, parts.seconds))
    say(f"saved {output}")
    shutil.rmtree(work)


def _contrasted(judge: JudgeInTraining, say: Say) -> dict[str, dict[str, Tensor]]:
    contrast(judge, say)
    return judge.state_dict()


class _Parts:
    """What is made once and read again by a later call, and the seconds that it took."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.seconds = folder, {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        file = self._folder / f"{name}.pt"
        if not file.is_file():
            start = time.perf_counter()
            made = make()
            torch.save({"made": made, "seconds": time.perf_counter() - start}, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        kept = torch.load(file, weights_only=True)
        self.seconds[name] = kept["seconds"]
        return kept["made"]


def save(output: Path, judge: JudgeInTraining, record: dict[str, Any]) -> None:
    """Weights, the tokenizer and ``training.json``. On disk in half precision, but for what the norms have counted."""
    kept = set(dict(judge.clip.named_parameters()))
    state = {k: v.detach().half() if k in kept else v for k, v in judge.clip.state_dict().items()}
    with folder_aside(output) as folder:
        save_file({k: v.contiguous() for k, v in state.items()}, folder / tiny_pickscore.FILE)
        judge.tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def _record(config: JudgeTraining, asked: Sequence[Choices], seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "command": "diffalign world train-judge --output DIR",
        "config": asdict(config),
        "captions": len(asked),
        "votes": sum(len(c.labels) for c in asked),
        "ties": sum(int((c.labels == TIE).sum()) for c in asked),
        "seconds": {name: round(value) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
    }
