"""``diffalign objectives``: everything is listed, it fits a terminal, and the costs are what a counting network counts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch
from judged import Case, things_given
from worlds import small_denoiser

from diffalign import losses, objectives
from diffalign.learner import Learner
from diffalign.objectives._about import Cost
from diffalign.objectives.d3po import D3PO
from diffalign.objectives.ddpo import DDPO
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.diffusion_dro import DiffusionDRO
from diffalign.objectives.ipo import IPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.mapo import MaPO
from diffalign.objectives.seppo import SePPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.smpo import SmPO
from diffalign.references import Frozen, Snapshot
from pipelines import cli, recipes
from pipelines.objective_tables import WIDTH, to_text
from pipelines.text_tables import Table
from pipelines.writers.settings import COMMANDS


def said(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert cli.main(["objectives", *words]) == 0
    return capsys.readouterr().out


def row_of(text: str, name: str) -> str:
    """A table's line that begins with a name."""
    found = [line for line in text.splitlines() if line.lstrip("| ").split()[:1] == [name]]
    assert len(found) == 1, (name, found)
    return found[0]


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("words", [[], ["--markdown"]], ids=["text", "markdown"])
def test_every_objective_is_in_the_table(words: list[str], capsys: pytest.CaptureFixture) -> None:
    text = said(capsys, *words)
    for name in objectives.names():
        module = objectives.load(name)
        about, cost = module.ABOUT, module.Objective().cost
        row = row_of(text, name)
        assert about.paper in row and about.loss + (" *" if about.takes_loss else "  ") in row
        numbers = [f"{n:g}" for n in (cost.forward_only, cost.with_gradient, cost.forwards)]
        assert [word for word in row.split() if word.isdigit()] == numbers
        assert (about.judged or "-") in row.split()
        if words:
            cells = [about.source, about.reference, ", ".join(about.data), ", ".join(recipes.names(name))]
            assert all(f"| {cell} " in row for cell in cells), row
    for word in " ".join(f"{m.ABOUT.source} {m.ABOUT.reference}" for m in map(objectives.load, objectives.names())).split():
        assert word in text


@pytest.mark.parametrize("words", [[], ["--markdown"]], ids=["text", "markdown"])
def test_every_loss_has_its_line(words: list[str], capsys: pytest.CaptureFixture) -> None:
    text = said(capsys, "--losses", *words)
    for name in losses.names():
        loss, row = losses.load(name), row_of(text, name)
        assert loss.paper in row and " ".join(sorted(loss.needs)) in row
        assert ("absolute !" in row) == (loss.scale == "absolute")
        assert (" *" in row) == loss.mixes_batch
        for constant, value in vars(loss.settings).items():
            assert f"{constant}={value:g}" in row if isinstance(value, float) else f"{constant}={value}" in row
    assert "mean denoising errors of 0.01 to 1" in " ".join(text.split())  # what absolute means


def test_the_constants_can_be_given_back_as_they_are_shown(capsys: pytest.CaptureFixture) -> None:
    shown = row_of(said(capsys, "--losses"), "madpo").split()[-1]
    objective = DiffusionDPO(loss="madpo", loss_options=dict(part.split("=") for part in shown.split(",")))
    assert objective.chosen().settings == losses.load("madpo").settings


@pytest.mark.parametrize("words", [[], ["--losses"], *[[name] for name in objectives.names()]], ids=" ".join)
def test_it_fits_a_terminal(words: list[str], capsys: pytest.CaptureFixture) -> None:
    text = said(capsys, *words)
    own = (objectives.load(words[0]).__doc__ if words and words[0] in objectives.names() else "").splitlines()
    assert [line for line in text.splitlines() if len(line) > WIDTH and line not in own] == []
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_wide_tables_are_wrapped_where_they_are_widest() -> None:
    table = Table("", ("a", "bb"), [["one", "a cell of many words"], ["three", "word"]])
    assert to_text(table, 30).splitlines() == ["a      bb", "one    a cell of many words", "three  word"]
    assert to_text(table, 16).splitlines() == ["a      bb", "one    a cell of", "       many", "       words", "three  word"]
    assert max(map(len, to_text(table, 3).splitlines())) == 12  # no word is broken


# ------------------------------------------------------------------------------------------------------------- in full


@pytest.mark.parametrize("name", objectives.names())
def test_an_objective_in_full(name: str, capsys: pytest.CaptureFixture) -> None:
    text, module = said(capsys, name), objectives.load(name)
    assert text.startswith(module.__doc__.strip())
    assert f"{module.Objective().cost.forwards:g} passes" in text and f"{COMMANDS.get(name, f'train {name}')} --recipe" in text
    assert all(f"\n{field.name} " in text for field in fields(module.Objective))
    assert all(f"recipe  {recipe} " in text for recipe in recipes.names(name))


def test_settings_come_with_default_meaning_and_bounds(capsys: pytest.CaptureFixture) -> None:
    row = row_of(said(capsys, "smpo"), "gamma")
    assert row.split()[1] == "10" and "sharpness of the smoothing" in row and row.endswith("(above 0)")
    assert "No settings." in said(capsys, "sft")


def test_a_loss_in_full(capsys: pytest.CaptureFixture) -> None:
    text = said(capsys, "--losses", "mapo")
    assert text.startswith("MaPO:") and "2406.06424" in text and "Keep the learning rate low" in text
    assert row_of(text, "rate").split()[1] == "0.5"
    assert "Keep the learning rate low" not in said(capsys, "--losses", "dpo")


@pytest.mark.parametrize(
    "words, message",
    [
        (["diffusion-dp"], "No objective is called 'diffusion-dp'; there are: d3po, .* Did you mean 'diffusion-dpo'\\?"),
        (["--losses", "exoo"], "No loss is called 'exoo'; there are: adpo, .* Did you mean 'exo'\\?"),
        (["sft", "--markdown"], "--markdown prints the tables; without it, NAME is explained in full."),
    ],
)
def test_what_cannot_be_shown(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["objectives", *words]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


# --------------------------------------------------------------------------------------------------------------- costs


@dataclass
class Count:
    """Samples through all networks of a run, and the most at once with a gradient."""

    looking: int = 0
    learning: int = 0
    at_once: int = 0

    def note(self, rows: int) -> None:
        if torch.is_grad_enabled():
            self.learning += rows
            self.at_once = max(self.at_once, rows)
        else:
            self.looking += rows


@contextmanager
def counted(*networks: torch.nn.Module) -> Iterator[Count]:
    """What goes through the networks meanwhile."""
    count = Count()
    hooks = [network.register_forward_pre_hook(lambda _, inputs: count.note(len(inputs[0]))) for network in networks]
    yield count
    for hook in hooks:
        hook.remove()


def answer_nothing(network: torch.nn.Module) -> None:
    """Zeros, at once, that depend on the weights as far as autograd knows: who counts calls needs no numbers."""
    weight = next(network.parameters())
    network.forward = lambda x, *_, **__: SimpleNamespace(sample=x * 0 + 0 * weight.flatten()[0])


def at_work(case: Case, renewed: bool = False) -> tuple[Learner, tuple[torch.nn.Module, torch.nn.Module]]:
    """A learner whose chain has noise in its last transition, too, as Stable Diffusion's has."""
    policy, start = small_denoiser(), small_denoiser()
    for denoiser in (policy, start):
        answer_nothing(denoiser.network)
    policy = replace(policy, schedule=replace(policy.schedule, clean_end="first"))
    given = things_given(policy, Frozen(start), case, torch.float32)
    if renewed:
        given = replace(given, reference=Snapshot(policy, given.weights))
        given.reference.keep()
    return case.objective.learner(given), (policy.network, start.network)


def cost_counted(case: Case, steps: int, pairs: int, renewed: bool = False) -> Cost:
    """Per pair, over some steps of a learner."""
    learner, networks = at_work(case, renewed)
    size = 0
    with counted(*networks) as count:
        for batches in learner.source.steps(0, steps):
            for batch in batches:
                size = max(size, len(batch))
                learner.losses(batch)
    return Cost(count.learning / pairs, count.looking / pairs, count.at_once / size)


ROLLED = {"rollout_steps": 3, "guidance": 2.0}
UNGUIDED = {"rollout_steps": 3, "guidance": 1.0}
OF_PAIRS = {
    "diffusion-dpo": DiffusionDPO(),
    "diffusion-dpo with a baseline": DiffusionDPO(loss="bco"),
    "diffusion-dpo with mismatched prompts": DiffusionDPO(loss="kto"),
    "diffusion-dpo without a reference": DiffusionDPO(loss="simpo"),
    "diffusion-dpo of likelihoods": DiffusionDPO(loss="aot"),
    "sft": SFT(),
    "ipo": IPO(),
    "mapo": MaPO(),
    "kto": KTO(),
    "kto with mismatched prompts": KTO(baseline="mismatched"),
    "kto without a baseline": KTO(baseline="none"),
    "seppo": SePPO(round_steps=2, **ROLLED),
    "seppo unguided": SePPO(round_steps=2, checkpoint="first", **UNGUIDED),
    "diffusion-dro": DiffusionDRO(buffer=5, refresh=2, rollout_steps=3),
    "diffusion-dro guided": DiffusionDRO(**ROLLED),
}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_the_cost_of_a_pair_is_what_a_network_counts(name: str) -> None:
    found = cost_counted(Case(OF_PAIRS[name], batch=2, accumulation=2), steps=3, pairs=12)
    assert found == OF_PAIRS[name].cost


@pytest.mark.parametrize("baseline", ["batch", "mismatched"])
def test_a_lone_picture_costs_half_a_pair(baseline: str) -> None:
    objective = KTO(baseline=baseline)
    found = cost_counted(Case(objective, batch=2, kind="pictures"), steps=3, pairs=6)
    assert found == Cost(objective.cost.with_gradient / 2, objective.cost.forward_only / 2, objective.cost.at_once / 2)


def test_a_reference_of_the_loop_costs_what_the_frozen_start_does() -> None:
    found = cost_counted(Case(DiffusionDPO(), batch=2), steps=3, pairs=6, renewed=True)
    assert found == DiffusionDPO().cost


OF_TRAJECTORIES = {
    "d3po": D3PO(round_pairs=4, **ROLLED),
    "d3po unguided": D3PO(round_pairs=4, same_start=False, **UNGUIDED),
    "d3po against the start": D3PO(round_pairs=4, reference="start", **ROLLED),
    "d3po twice over": D3PO(round_pairs=4, round_epochs=2, **ROLLED),
    "d3po of the best and the worst of four": D3PO(round_pairs=4, candidates=4, **ROLLED),
    "d3po of four against the start": D3PO(round_pairs=4, candidates=4, reference="start", **UNGUIDED),
    "d3po of the noisy half": D3PO(round_pairs=4, timestep_fraction=0.5, **ROLLED),
    "ddpo": DDPO(round_pairs=4, **ROLLED),
    "ddpo of three, of the noisy third": DDPO(round_pairs=4, candidates=3, timestep_fraction=0.34, **UNGUIDED),
    "ddpo twice over": DDPO(round_pairs=4, round_epochs=2, **UNGUIDED),
}


@pytest.mark.parametrize("name", OF_TRAJECTORIES)
def test_the_cost_of_a_pair_of_trajectories_is_what_a_network_counts(name: str) -> None:
    """Two rounds of four pairs; two pairs to a step."""
    objective = OF_TRAJECTORIES[name]
    steps = 2 * 2 * objective.round_epochs
    found = cost_counted(Case(objective, batch=3, accumulation=2), steps=steps, pairs=8)
    assert found == objective.cost


INVERTED = {
    "smpo": SmPO(inversion_steps=4),
    "smpo without corrections": SmPO(inversion_steps=3, renoise=0),
    "smpo with three": SmPO(inversion_steps=2, renoise=3, window="last"),
    "smpo without a reference": SmPO(inversion_steps=2, loss="simpo"),
    "smpo as released": SmPO(inversion_steps=5, released="0.42"),
    "smpo as released, under 0.20": SmPO(inversion_steps=5, released="0.20"),
}


@pytest.mark.parametrize("name", INVERTED)
def test_the_cost_of_an_inverted_pair_is_the_mean_over_t(name: str) -> None:
    """Forty t, evenly over the thousand; one at a time, for the released code takes the first of a batch for all."""
    objective = INVERTED[name]
    learner, networks = at_work(Case(objective, batch=1))
    batch = next(iter(learner.source.steps(0, 1)))[0]
    with counted(*networks) as count:
        for t in range(12, 1000, 25):
            learner.losses(replace(batch, t=torch.tensor([t])))
    assert count.learning / 40 == objective.cost.with_gradient
    assert count.looking / 40 == pytest.approx(objective.cost.forward_only, rel=0.01)
    assert count.at_once == objective.cost.at_once


def test_every_objective_is_counted() -> None:
    counted_here = {type(o) for o in [*OF_PAIRS.values(), *OF_TRAJECTORIES.values(), *INVERTED.values()]}
    assert counted_here == {objectives.load(name).Objective for name in objectives.names(of_prompts=False)}
