"""Convolutions over few positions as matrix products, for CPUs.

In the deep levels of a UNet a convolution has more weights than its picture has numbers: SD1.5's lowest level has 14.7 million
for 4 x 4 positions at 256 px. oneDNN brings such weights into an order of its own at every call, forward and backward, which then
takes far longer than the arithmetic. Written as a product of the picture's neighbourhoods with the weights as they lie, nothing
but the few neighbourhoods is rearranged. Same numbers but for the order of the sums (tests/test_convolutions.py).
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

WEIGHTS = 500_000
"""Fewer weights stay in the processor's cache, however they are ordered."""
SHARE = {torch.float32: 20, torch.bfloat16: 4}
"""Neighbourhoods are rearranged if they hold at most this fraction of the numbers that the weights hold: of 1280 channels, 64 and
320 positions. Below, SD1.5's shapes took 1.1 to 2.8 and 1.4 to 8 times less time (two cores, both passes); none above."""


def use_products(network: nn.Module) -> int:
    """Have the large 3 x 3 convolutions of ``network`` choose by the size of their picture; how many they are.

    For frozen networks (below a LoRA): their weights are stored channels-last from now on, the order in which a product takes
    them, and all convolutions take their pictures so. Trained weights gain nothing, for AdamW is slower on them than the step
    becomes faster (SD1.5, 256 px: 11.8 s for 10.1 s). Parameters, their names and what is saved stay the same.
    """
    every = [module for module in network.modules() if type(module) is nn.Conv2d]
    large = [module for module in every if _fits(module)]
    for module in large:
        module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    for module in every if large else ():
        # Not a class of its own: PEFT makes an adapter's convolutions of the class of the one that they stand beside.
        module._conv_forward = MethodType(convolved if module in large else _plainly, module)  # type: ignore[method-assign]
    return len(large)


def convolved(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the 3 x 3 convolution ``module`` makes of ``x`` (B, C, h, w): by a product if its picture is small."""
    batch, channels, height, width = x.shape
    share = SHARE.get(x.dtype) if x.device.type == "cpu" else None
    if share is None or batch * height * width * share > module.out_channels:
        return _plainly(module, x, weight, bias)
    padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, row : row + height, column : column + width] for row in range(3) for column in range(3)]
    neighbourhoods = torch.cat(shifted, dim=-1).view(batch * height * width, 9 * channels)
    rows = nn.functional.linear(neighbourhoods, weight.permute(0, 2, 3, 1).flatten(1), bias)
    return rows.view(batch, height, width, module.out_channels).permute(0, 3, 1, 2)


def _plainly(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What PyTorch makes of it, channels-last in and out. A block of attention hands on pictures in the other order; with them
    the gradients of what follows would stand in another order than its activations, and SiLU's took 17 times longer."""
    return nn.Conv2d._conv_forward(module, x.contiguous(memory_format=torch.channels_last), weight, bias)


def _fits(module: nn.Conv2d) -> bool:
    plain = (module.stride, module.padding, module.dilation, module.groups) == ((1, 1), (1, 1), (1, 1), 1)
    return plain and module.kernel_size == (3, 3) and module.padding_mode == "zeros" and module.weight.numel() >= WEIGHTS
