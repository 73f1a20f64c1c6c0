"""The page on which people look at the pictures of a rollout and choose.

It needs nothing from elsewhere and works from a folder on disk. Its script remembers choices in the browser and gives them as
``choices.jsonl``; without scripts the page is a contact sheet whose names can be written down.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from diffalign.digests import digest_of
from diffalign.sources.choices import CHOICES
from diffalign.sources.store import TrajectoryOrigin
from pipelines.report_page import STYLE

_SMALL = 256  # pictures below this side are shown enlarged, every pixel to be seen

_OWN_STYLE = """
fieldset { border: 1px solid var(--line); border-radius: .5rem; background: var(--card); margin: 0 0 1rem;
  padding: .4rem 1rem .8rem }
legend { padding: 0 .4rem; font-weight: 600 } legend .faint { font-weight: 400; margin-left: .5rem }
.choices { display: flex; flex-wrap: wrap; gap: .75rem; align-items: flex-end }
.choices label { cursor: pointer; border: 3px solid transparent; border-radius: .5rem; padding: .2rem; text-align: center;
  font-variant-numeric: tabular-nums; font-size: .9rem }
.choices label:has(:checked) { border-color: var(--mark) } .choices img { display: block; border-radius: .3rem;
  max-width: 100%; height: auto }
.small img { image-rendering: pixelated } .none { padding: .6rem; color: var(--faint) }
footer { position: sticky; bottom: 0; background: var(--paper); border-top: 1px solid var(--line); padding: .75rem 0;
  display: flex; gap: 1rem; align-items: center; flex-wrap: wrap }
button { font: inherit; padding: .4rem 1rem; border-radius: .4rem; border: 1px solid var(--mark); background: var(--mark);
  color: var(--paper); cursor: pointer } button.plain { background: none; color: var(--ink); border-color: var(--line) }
"""

_SCRIPT = """
const form = document.querySelector("form"), count = document.getElementById("count");
const groups = [...form.querySelectorAll("fieldset")];
const pictures = group => [...group.querySelectorAll("input[data-picture]")].map(input => input.value);
const picked = group => group.querySelector("input:checked");

function lines() {
  return groups.flatMap(group => {
    const said = picked(group), all = pictures(group);
    if (!said || said.value === "skip") return [];
    if (said.value === "tie") return [{chosen: all[0], rejected: all[1], label: 0.5}];
    return all.filter(name => name !== said.value).map(name => ({chosen: said.value, rejected: name}));
  });
}
function remember() {
  count.textContent = groups.filter(picked).length;
  const said = Object.fromEntries(groups.filter(picked).map(group => [group.id, picked(group).value]));
  try { localStorage.setItem(KEY, JSON.stringify(said)); } catch (refused) { /* choices then last as long as the page */ }
}
function recall() {
  let said = {};
  try { said = JSON.parse(localStorage.getItem(KEY) || "{}"); } catch (refused) { /* nothing is remembered here */ }
  for (const group of groups)
    for (const input of group.querySelectorAll("input")) input.checked = said[group.id] === input.value;
}
form.addEventListener("change", remember);
document.getElementById("save").addEventListener("click", () => {
  const text = lines().map(line => JSON.stringify(line) + "\\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/jsonl"}));
  link.download = FILE;
  link.click();
});
document.getElementById("forget").addEventListener("click", () => {
  if (!confirm("Forget every choice on this page?")) return;
  form.reset(); remember();
});
recall(); remember();
"""


def render(made: TrajectoryOrigin, files: Sequence[str], side: int) -> str:
    """The page. ``files`` are relative to it, one for each trajectory; ``side`` is their width in pixels."""
    shown = side * max(1, _SMALL // side) if side < _SMALL else min(side, 512)
    groups = "\n".join(_group(made, group, files, shown) for group in range(len(made.prompts)))
    key = "diffalign " + digest_of(made.to_plain())[:16]
    title = f"{len(made.prompts)} prompts, {made.per_prompt} pictures each"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{title}</title>\n<style>{STYLE}{_OWN_STYLE}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n<h1>{title}</h1>\n{_introduction(made)}\n'
        f'<form class="{"small" if side < _SMALL else "large"}">\n{groups}\n</form>\n{_footer(made)}\n'
        f"<script>\nconst KEY = {json.dumps(key)}, FILE = {json.dumps(CHOICES)};{_SCRIPT}</script>\n</body></html>\n"
    )


def _introduction(made: TrajectoryOrigin) -> str:
    s, called = made.sampling, made.called
    by = f"{called['model']} with the LoRA {called['lora']}" if called.get("lora") else str(called["model"])
    how = f"{by}, {s.steps} steps of DDIM with eta {s.eta:g}, guidance {s.guidance:g}, seed {made.seed}"
    return (
        f'<p class="faint">{escape(how)}</p>\n'
        f"<p>Click the picture that you like better for its prompt; leave out what you cannot decide. Then save: the file "
        f"belongs into this folder as <code>{CHOICES}</code>. Choices are kept in this browser until then.</p>"
    )


def _group(made: TrajectoryOrigin, group: int, files: Sequence[str], shown: int) -> str:
    numbers = range(group * made.per_prompt, (group + 1) * made.per_prompt)
    name = f"{group:05d}"
    labels = [
        f'<label><input type="radio" name="{name}" value="{made.picture(n)}" data-picture>'
        f'<img src="{escape(files[n])}" width="{shown}" alt="{made.picture(n)}" loading="lazy">{made.picture(n)}</label>'
        for n in numbers
    ]
    other = ("tie", "both alike") if made.per_prompt == 2 else ("skip", "none stands out")
    labels.append(f'<label class="none"><input type="radio" name="{name}" value="{other[0]}"> {other[1]}</label>')
    legend = f'<legend>{escape(made.prompts[group])}<span class="faint">{name}</span></legend>'
    return f'<fieldset id="{name}">{legend}<div class="choices">{"".join(labels)}</div></fieldset>'


def _footer(made: TrajectoryOrigin) -> str:
    return (
        f'<footer><span><b id="count">0</b> of {len(made.prompts)} prompts judged</span>'
        f'<button type="button" id="save">Save {CHOICES}</button>'
        '<button type="button" class="plain" id="forget">Forget all</button></footer>'
    )
