"""Rounds of the loop: every so many optimizer steps the reference becomes the policy, or the policy goes a little further still.

Iterative DPO compares the policy with what it was when the round began, instead of with the run's frozen start. AccelerateUpdates
Preference Optimization (He et al. 2024, arXiv 2410.06293) sees in this a proximal-point method, and adds Nesterov's momentum.
With e_k the weights at the end of round k, and e_0 = s_0 those of the start,

    s_k = e_k + a (e_k - e_(k-1))            the weights that round k + 1 begins with, and is compared with if the reference moves

Note that the difference is to the end of the round before, not to s_(k-1), where this round began: that would only make each
round's own step larger by the factor 1 + a, without momentum. On an adapter the factors B and A are extrapolated, which moves
their product B A as extrapolating it would, up to terms of second order.

What is decided here, because the paper leaves it open:

* nothing is extrapolated after the run's last step: s_k is where the next round begins, and the answer of the last one is e_k;
* the optimizer keeps its moments. They are averages of gradients, not of weights, so a short way further in the direction of
  travel leaves them as good as a step does; emptied, AdamW's next step would be the gradient's sign at the full learning rate,
  and there is no second warm-up;
* a moving average of the weights (EMA) is carried along by the same difference. It would otherwise lag behind every jump, and
  the export with it.

Both pasts are saved with the run. At a round's end they are renewed before the checkpoint of that step is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from diffalign.optimisation import Ema
from diffalign.references import Snapshot
from diffalign.weights import TrainedWeights, Weights


class LoopRounds:
    """What happens when a round of ``every`` optimizer steps is over.

    ``reference`` is renewed, if there is one; the weights are extrapolated by ``extrapolation`` (0: they stay as they are).
    """

    def __init__(
        self,
        weights: TrainedWeights,
        every: int,
        extrapolation: float = 0.0,
        reference: Snapshot | None = None,
        ema: Ema | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"a round has at least one optimizer step; got {every}")
        self._weights, self._every, self._by = weights, every, extrapolation
        self._reference, self._ema = reference, ema
        self._end: Weights = {}  # of the round before, on the CPU: it is looked at once per round
        self._begun = False

    def begin(self) -> None:
        """Before the first step: the start is what the first round is compared with. A resumed run has begun already."""
        if not self._begun:
            self._begun = True
            self._renew(self._weights.copy("cpu") if self._by else {})

    def stepped(self, step: int, last: bool) -> bool:
        """After ``step`` optimizer steps; ``last`` if no other follows. Whether weights were moved."""
        if step % self._every or last:
            return False
        end = self._weights.copy("cpu") if self._by else {}
        if self._by:
            with self._ema.carried() if self._ema else nullcontext():
                self._weights.move(self._end, self._by)
        self._renew(end)
        return self._by > 0

    def _renew(self, end: Weights) -> None:
        self._end = end
        if self._reference is not None:
            self._reference.keep()

    def collect(self) -> None:
        """Before it is saved, on all processes."""
        if self._reference is not None:
            self._reference.collect()

    def state_dict(self) -> dict[str, Any]:
        reference = {} if self._reference is None else self._reference.state_dict()
        return {"begun": self._begun, "end": dict(self._end), "reference": reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._begun, self._end = state["begun"], dict(state["end"])
        if self._reference is not None:
            self._reference.load_state_dict(state["reference"])
