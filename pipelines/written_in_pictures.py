"""Prompts in the metadata of sampled pictures: AUTOMATIC1111's text of settings, ComfyUI's graph."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXIF_IFD, USER_COMMENT, COMMENT_CODES = 0x8769, 0x9286, {b"UNICODE\0": "utf-16", b"ASCII\0\0\0": "utf-8", b"\0" * 8: "utf-8"}
SETTINGS = ("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model", "Version")
"""Names that distinguish the line of settings from a prompt that happens to have colons."""
_PAIR = re.compile(r'([A-Za-z][\w /\-]{0,40}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class Made:
    """How a picture was made, according to its metadata."""

    prompt: str
    seed: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def made_from(picture: Path) -> Made | None:
    """The metadata of a picture, with the empty prompt if there is none; None for a picture that cannot be opened."""
    texts = _texts_in(picture)
    return None if texts is None else _made(texts)


@dataclass(frozen=True)
class _Texts:
    """The texts in a picture: by key (PNG), in EXIF's comment or the file's, and in EXIF's main directory (ComfyUI)."""

    chunks: Mapping[str, str]
    comments: Sequence[str]
    tags: Sequence[str]


def _texts_in(picture: Path) -> _Texts | None:
    """None for a picture that cannot be opened. Reads the head of the file only."""
    from PIL import Image

    # Decoders raise a dozen exception types on damaged files (OSError, SyntaxError, struct.error, EOFError, ...).
    try:
        with Image.open(picture) as image:
            info = dict(image.info)
            try:
                # Pillow decodes a whole PNG to look for EXIF data behind the pixels, where nobody writes them
                exif = image.getexif() if image.format != "PNG" or "exif" in info else Image.Exif()
                comment, tags = exif.get_ifd(EXIF_IFD).get(USER_COMMENT), list(exif.values())
            except Exception:
                comment, tags = None, []  # a picture with damaged EXIF data is still a picture
    except Exception:
        return None
    chunks = {str(key): text for key, text in info.items() if isinstance(text, str)}
    comments = [_decoded(text) for text in (comment, info.get("comment")) if isinstance(text, str | bytes)]
    return _Texts(chunks, comments, [text for text in tags if isinstance(text, str)])


def _decoded(comment: str | bytes) -> str:
    """EXIF's UserComment: eight bytes name the code; UTF-16 in either order of bytes, of which writers choose either."""
    if isinstance(comment, str):
        return comment
    code, text = COMMENT_CODES.get(comment[:8], ""), comment[8:]
    if code == "utf-16":
        # the settings are ASCII, so that one byte in two is zero, at even places where the high byte comes first
        code = "utf-16-be" if text[0::2].count(0) >= text[1::2].count(0) else "utf-16-le"
    decoded = (text if code else comment).decode(code or "utf-8", errors="replace")
    return decoded.strip("\ufeff\0 ")


def _made(texts: _Texts) -> Made:
    """The prompt from the first place that has one. AUTOMATIC1111's text comes before ComfyUI's graph: nodes that save both
    write the prompt as it was in the end, with wildcards filled in."""
    return next((made for made in _candidates(texts) if made is not None and made.prompt), Made(""))


def _candidates(texts: _Texts) -> Iterator[Made | None]:
    if parameters := texts.chunks.get("parameters"):
        yield _from_parameters(parameters)
    for comment in texts.comments:  # cameras and screenshots write comments too
        made = _from_parameters(comment)
        yield made if made.metadata else None
    for text in [texts.chunks.get("prompt", ""), *(t.partition(":")[2] for t in texts.tags if t.lower().startswith("prompt:"))]:
        graph = _json_object(text)
        yield Made(text.strip()) if graph is None else _from_graph(graph)


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _from_parameters(text: str) -> Made:
    """AUTOMATIC1111's text: the prompt (any number of lines), ``Negative prompt: ...`` if there is one, a line of settings.

    Other programs write JSON under the same key; of that, ``prompt`` is taken, at the top or one level below.
    """
    if (values := _json_object(text)) is not None:
        inner = next((v for v in (values, *values.values()) if isinstance(v, dict) and isinstance(v.get("prompt"), str)), {})
        return Made(inner.get("prompt", "").strip(), whole(inner.get("seed")), {k: v for k, v in inner.items() if k != "prompt"})
    lines = text.replace("\r\n", "\n").split("\n")
    # extensions append lines of their own below the settings
    last = next((i for i in reversed(range(len(lines))) if _is_settings(lines[i])), len(lines))
    settings = {name: _unquoted(value) for name, value in _PAIR.findall(lines[last])} if last < len(lines) else {}
    cut = next((i for i in range(last) if lines[i].lstrip().startswith("Negative prompt:")), last)
    negative = "\n".join(lines[cut:last]).lstrip().removeprefix("Negative prompt:").strip()
    metadata = ({"negative_prompt": negative} if negative else {}) | settings
    return Made("\n".join(lines[:cut]).strip(), whole(settings.get("Seed")), metadata)


def _is_settings(line: str) -> bool:
    known = {name for name, _ in _PAIR.findall(line)} & set(SETTINGS)
    return len(known) >= (2 if line.lstrip().startswith("Steps:") else 3)


def _unquoted(value: str) -> str:
    """A value that contains a comma or a colon is written as a JSON string."""
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value.strip()


# -------------------------------------------------------------------------------------------------------- ComfyUI's graph

TEXT_INPUTS = (
    *("populated_text", "text", "text_g", "text_l", "t5xxl", "clip_g", "clip_l", "prompt"),
    *("positive_prompt", "text_positive", "positive", "string", "value"),
)
"""Inputs that hold a prompt, or lead to one: of text encoders, of nodes that style or keep a text, of conditioning in passing."""
OTHER_INPUTS = (
    *("negative", "clip", "model", "vae", "image", "pixels", "mask", "control_net"),
    *("samples", "latent", "latent_image", "noise"),
)
"""Inputs that lead away from the prompt."""
SEED_INPUTS = ("seed", "noise_seed", "value", "int", "number")

Link = tuple[str, int]


def _from_graph(graph: Mapping[str, Any]) -> Made | None:
    """The positive prompt of the sampler next to the saved picture. Nodes are ``{id: {class_type, inputs}}``; an input is a value
    or a link ``[id, slot]`` to the node it comes from."""
    nodes = {str(k): n for k, n in graph.items() if isinstance(n, dict) and isinstance(n.get("inputs"), dict)}
    order = _from_the_end(nodes)
    starts = [(name, link) for name in order if (link := _conditioning(nodes, nodes[name]))]
    # detailers and upscalers take a prompt as well, but it need not be that of the picture
    first = next((s for s in starts if re.search("sampler|guider", _kind(nodes[s[0]]))), starts[0] if starts else None)
    if first is None:
        return None
    try:
        prompt = ", ".join(_texts_behind(nodes, first[1], {}))
    except RecursionError:
        return None
    return Made(prompt, _seed(nodes, [first[0], *order]))


def _kind(node: Mapping[str, Any]) -> str:
    return str(node.get("class_type", "")).lower()


def _link(nodes: Mapping[str, Any], value: Any) -> Link | None:
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and str(value[0]) in nodes
    return (str(value[0]), value[1]) if is_link else None


def _conditioning(nodes: Mapping[str, Any], node: Mapping[str, Any]) -> Link | None:
    """The link to a sampler's prompt; a guider without a negative side calls it ``conditioning``."""
    inputs = node["inputs"]
    if link := _link(nodes, inputs.get("positive")):
        return link
    return _link(nodes, inputs.get("conditioning")) if "guider" in _kind(node) else None


def _from_the_end(nodes: Mapping[str, Any]) -> list[str]:
    """The nodes in order of their distance from what was saved; those that lead nowhere else come after."""
    used = {link[0] for node in nodes.values() for value in node["inputs"].values() if (link := _link(nodes, value))}
    ends = [name for name in nodes if name not in used]
    queue = [*sorted(ends, key=lambda name: "save" not in _kind(nodes[name])), *nodes]
    order: dict[str, None] = {}
    # one end after the other, so that a preview of something else does not come between
    for end in queue:
        level = [end]
        while level := [name for name in dict.fromkeys(level) if name not in order]:
            order.update(dict.fromkeys(level))
            level = [link[0] for n in level for v in nodes[n]["inputs"].values() if (link := _link(nodes, v))]
    return list(order)


def _texts_behind(nodes: Mapping[str, Any], link: Link, known: dict[str, list[str]]) -> list[str]:
    """The texts that a link leads to, each once, in order. ``known`` holds what has been followed before, and stops circles."""
    name = link[0]
    if name in known:
        return known[name]
    known[name] = []
    inputs = nodes[name]["inputs"]

    def behind(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value.strip()] if value.strip() else []
        further = _link(nodes, value)
        return _texts_behind(nodes, further, known) if further else []

    if {"string_a", "string_b"} <= inputs.keys():  # ComfyUI's own node that joins two texts
        halves = [" ".join(behind(inputs[key])) for key in ("string_a", "string_b")]
        texts = [str(inputs.get("delimiter", "")).join(halves)]
    else:
        lower = {key.lower(): key for key in inputs}
        texts = [text for key in TEXT_INPUTS if key in lower for text in behind(inputs[lower[key]])]
        if not texts:
            texts = [text for key in inputs if "conditioning" in key.lower() for text in behind(inputs[key])]
        if not texts:
            others = (behind(v) for key, v in inputs.items() if key.lower() not in OTHER_INPUTS and not isinstance(v, str))
            texts = next((found for found in others if found), [])
    known[name] = list(dict.fromkeys(texts))
    return known[name]


def _seed(nodes: Mapping[str, Any], order: Iterable[str]) -> int | None:
    for name in order:
        inputs = nodes[name]["inputs"]
        value = next((inputs[key] for key in SEED_INPUTS[:2] if key in inputs), None)
        if link := _link(nodes, value):
            far = nodes[link[0]]["inputs"]
            value = next((far[key] for key in SEED_INPUTS if key in far), None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


# --------------------------------------------------------------------------------------------------------------- values


def as_name(value: Any) -> str:
    """A cell as the name of a picture; empty if it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def whole(value: Any) -> int | None:
    """A cell or a setting as a whole number; None if it is none."""
    text = as_name(value)
    return int(text) if text.isdecimal() else None
