"""References: models with which the policy is compared on the same inputs, and which never see a gradient.

They are the same for denoisers (``Predictor``) and language models (``LanguageModel``), hence ``inputs`` without names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.protocols import Denoiser, LanguageModel, Predictor, TextPolicy
from diffalign.sharding import Gathered
from diffalign.weights import TrainedWeights, Weights


class AdapterOff:
    """The frozen start of a LoRA run: the policy's own weights with the adapter switched off. Costs no memory."""

    kind = "adapter-off"

    def __init__(self, policy: Denoiser | TextPolicy) -> None:
        self._policy = policy

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Tensor:
        with self._policy.adapter_off():
            return self._policy(*inputs)


class Frozen:
    """The frozen start of a full fine-tuning run: a second network that is never trained."""

    kind = "frozen"

    def __init__(self, model: Predictor | LanguageModel) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Tensor:
        return self._model(*inputs)


class Cached:
    """The frozen start by its errors at the fixed draws of every pair, computed beforehand (``data.cached_errors``): no network.

    Pairs carry the errors (``PairBatch.known``, ``NoisyPair.known``); ``likelihood`` takes them from there. Code that changes
    a pair (another noise or level, another pair's prompt) must set ``known=None``, because a tensor does not show that it was
    changed; the call then raises UserError.
    """

    kind = "cached"

    def __call__(self, *inputs: Any) -> Tensor:
        raise UserError(
            "The reference's errors are kept for the draws of the data's pairs, and it was asked about something else."
        )


class Snapshot:
    """The policy as it was at some moment: its own network with the weights that were kept then, without dropout.

    The kept weights are saved with the run, so it resumes with the same one.
    """

    kind = "snapshot"

    def __init__(self, policy: Denoiser | TextPolicy, weights: TrainedWeights) -> None:
        self._policy, self._weights = policy, weights
        self._kept: Weights = {}
        self._gathered = Gathered()

    def keep(self) -> None:
        """Become what the policy is now."""
        self._kept = self._weights.copy()

    def become(self, kept: Weights) -> None:
        """Become a policy whose weights are where the parameters are (``TrainedWeights.copy``, ``placed``, ``fetched``)."""
        self._kept = kept

    @property
    def weights(self) -> Weights:
        """The weights that were kept (this process's shares of sharded ones); empty before ``keep``."""
        return self._kept

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Tensor:
        if not self._kept:
            raise ValueError("there is no snapshot yet: keep() takes one")
        with self._weights.held(self._kept):
            return self._policy(*inputs)

    def collect(self) -> None:
        """Before it is saved, on all processes."""
        if self._weights.sharded:
            self._gathered.collect(self._weights.gathered(self._kept))

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self._gathered.taken() if self._weights.sharded else dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = self._weights.placed(state["kept"]) if state["kept"] else {}
