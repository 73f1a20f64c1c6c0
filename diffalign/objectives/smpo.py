"""SmPO: Lu et al. 2025, "Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models", arXiv 2506.02698.

Two ideas on top of Diffusion-DPO. A label is not certain, so the log-densities of the two pictures are blended, which turns
into a factor on the margin:

    P    = softmax of the two min-max-normalised scores of a judge, for the winner
    h    = -(beta/2) gamma (2P - 1) [ (L_policy^w - L_reference^w) - (L_policy^l - L_reference^l) ]        gamma = 10
    loss = -log sigma(h)

And x_t is not drawn but found, by a few steps of ReNoise inversion from x_0 with the policy itself (``sources.inversion``);
the target is the noise tau that the way amounts to. At P = 1/2 the gradient vanishes.

In our frame: source = a data-set pair, inverted; reference = the frozen start; likelihood = denoising error; loss =
``losses.smpo`` at beta/2, or any other of ``losses`` by ``--loss``, which then sees P as its label.

DDIM-InPO (Lu et al. 2025, arXiv 2503.18454) is a setting: ``smoothing="label", gamma=1, steps=10, renoise=0, eta=0.1`` with
people's labels (the recipe ``sd15-inpo``).

Departures of the released code (JaydenLyh/SmPO, train.py and preprocessing.py) from what is done here; ``released`` brings the
inversion's back:

* the inversion stops on a fixed grid, elsewhere than at t, while tau and the network get t; what that does depends on
  the version of Diffusers (see ``sources.inversion``). Here every sample climbs to exactly its t;
* it uses the first sample's t and the first pair's P for the whole local batch; here each pair has its own;
* it normalises by the extremes of PickScore on Pick-a-Pic (0.11543526500463486 and 0.28201571106910706), whatever the data
  and the judge; here by those of the data set at hand. A number can be given for each, to get the release's;
* alpha_bar is cast to half precision before tau is computed;
* SD1.5 starts from, and refers to, an SFT checkpoint that was not released.

The paper's people's labels only decide which pairs are ties; P comes from the judge alone, as here.

Numbers of the paper: beta 2000 (SD1.5) or 5000 (SDXL), gamma 10, 9 inversion steps (the released SD1.5 code: 5), AdamW at
1.024e-5 for a batch of 1024, 200 steps with 100 of warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign import losses
from diffalign.errors import UserError
from diffalign.learner import Learner, RunContext
from diffalign.objectives._about import PAIRS, About, Cost
from diffalign.objectives._denoising import DenoisingLosses, cost_of, denoising_learner
from diffalign.objectives._family import LossChoice
from diffalign.objectives._pieces import smoothed_label
from diffalign.protocols import Denoiser, Predictor
from diffalign.settings import check_options, option
from diffalign.sources.inversion import Evaluate, Inversion, Released, Window, inverted
from diffalign.types import NoisyPair, Outcome, PairBatch, widest
from diffalign.weights import without_dropout

ABOUT = About("2506.02698", "data set, ReNoise inversion", "frozen start", "smpo", (PAIRS,), judged="optional", takes_loss=True)
Smoothing = Literal["scores", "label"]


@dataclass(frozen=True)
class SmPO(LossChoice):
    """The objective; ``beta`` is the paper's, for errors that are means over the latent's dimensions."""

    about: ClassVar[About] = ABOUT
    loss: str = option("smpo", "loss on the two log-ratios; `diffalign objectives --losses` lists them")
    beta: float = option(2000.0, "strength of the tie to the reference", gt=0)
    gamma: float = option(10.0, "sharpness of the smoothing, for the loss smpo", gt=0)
    smoothing: Smoothing = option("scores", "source of the smoothed label P: a judge's scores, or the data's own label")
    score_low: float = option(None, "lowest score, for the normalisation; by default the data set's")  # type: ignore[assignment]
    score_high: float = option(None, "highest score, for the normalisation; by default the data set's")  # type: ignore[assignment]
    inversion_steps: int = option(
        9, "number of strides from clean to pure noise; a sample that stops at t takes its share of them", ge=1
    )
    renoise: int = option(1, "number of ReNoise corrections of each stride; 0 is plain DDIM inversion", ge=0)
    window: Window = option("all", "predictions of a stride that are averaged: all, last or renoise")
    evaluate: Evaluate = option("target", "noise level at which the network predicts: target or source")
    inversion_eta: float = option(0.0, "eta, the noise added after each stride; 0.1 in DDIM-InPO", ge=0)
    released: Released = option(None, "version of Diffusers, 0.20 or 0.42, under which the released code is reproduced")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_options(self)
        self._loss(), self.inversion

    @property
    def inversion(self) -> Inversion:
        return Inversion(self.inversion_steps, self.renoise, self.window, self.evaluate, self.inversion_eta, self.released)

    def _loss(self) -> losses.Loss:
        return self.chosen(gamma=self.gamma) if self.loss == "smpo" else self.chosen()

    @property
    def cost(self) -> Cost:
        """A t drawn uniformly is (n + 1) / 2 of n strides away; in the code of Diffusers 0.20 nearly one more."""
        n, plain = self.inversion_steps, cost_of(self._loss())
        strides = (n + 3) / 2 - 1 / n if self.released == "0.20" else (n + 1) / 2
        return Cost(with_gradient=2, forward_only=plain.forward_only + 2 * (self.renoise + 1) * strides)

    def learner(self, run: RunContext) -> Learner:
        """Raises UserError where P is to come from scores and there are none."""
        run.require(pairs="preference pairs")
        low, high = run.score_range or (None, None)
        low, high = (low if self.score_low is None else self.score_low), (high if self.score_high is None else self.score_high)
        self.refuse_unscored(low, high)
        return denoising_learner(
            run, self.noised, self._loss(), self.beta / 2, label=lambda batch: self.smoothed(batch, low, high)
        )

    def refuse_unscored(self, low: float | None, high: float | None) -> None:
        """Raises UserError where P is to come from scores, whose least and greatest nobody knows."""
        if self.smoothing == "scores" and (low is None or high is None):
            raise UserError(
                "SmPO smooths labels by a judge's scores, which these data do not have. Name a judge (--reward), use data that "
                "`diffalign relabel` wrote (--scores), or take people's labels as they are (--smoothing label --gamma 1)."
            )

    def smoothed(self, batch: PairBatch, low: float | None, high: float | None) -> Tensor:
        """P [B]; of a pair without scores among others, its own label, which weighs what it weighs in DPO.

        The loss takes ``gamma (2 P - 1)``, and a judge's P is near 1/2: with gamma 10 a human's P of 1 would count thirty times
        as much as the usual pair.
        """
        if self.smoothing == "label":
            return batch.label
        own = 0.5 + (batch.label.to(widest(batch.label)) - 0.5) / max(self.gamma, 1.0) if self.loss == "smpo" else batch.label
        if batch.scores is None:
            return own
        p = smoothed_label(batch.scores[:, 0], batch.scores[:, 1], low, high)
        return torch.where(p.isnan(), own.to(p), p)

    def noised(self, batch: PairBatch, policy: Denoiser) -> NoisyPair:
        """Both sides carried up to the pair's t by the policy, without dropout: an inversion's strides must agree."""
        with without_dropout(policy.network):
            return inverted(batch, policy, policy.schedule, self.inversion)

    def __call__(self, batch: PairBatch, policy: Denoiser, reference: Predictor, low: float = 0.0, high: float = 1.0) -> Outcome:
        """Losses [B] of the pairs in ``batch``; ``low`` and ``high`` are the least and the greatest score there can be."""
        batch = replace(batch, label=self.smoothed(batch, low, high))
        return DenoisingLosses(policy, reference, self.noised, self._loss(), self.beta / 2)(batch, reference)


Objective = SmPO
