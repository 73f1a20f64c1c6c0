"""TF32 is asked for, refused where there is no GPU, part of what a run is, and over when the run is."""

from types import SimpleNamespace

import pytest
import torch

from pipelines import devices, run
from pipelines.run import settings_of


@pytest.mark.parametrize("asked", [True, False])
def test_it_ends_with_the_run(asked: bool) -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="mine"), devices.products_in_tf32(asked):
        assert torch.get_float32_matmul_precision() == ("high" if asked else before)
        raise RuntimeError("mine")
    assert torch.get_float32_matmul_precision() == before == "highest"


@pytest.mark.parametrize(
    ("device", "precision", "tf32", "told"),
    [("cuda", "no", False, True), ("cuda", "no", True, False), ("cuda", "bf16", False, False), ("cpu", "no", False, False)],
)
def test_idle_tensor_cores_are_told(device: str, precision: str, tf32: bool, told: bool) -> None:
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    assert bool(devices.slow_products(accelerator, tf32)) == told


def test_a_resumed_run_shares_it() -> None:
    plain, asked = (
        run.identity("diffusion-dpo", settings_of("diffusion-dpo", "tiny", {"output": "x", "tf32": on})) for on in (False, True)
    )
    assert asked == {**plain, "tf32": True} and "tf32" not in plain
