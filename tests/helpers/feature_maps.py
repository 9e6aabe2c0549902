"""Maps of a pyramid for the tests of kernels."""

from collections.abc import Sequence

import torch


def feature_maps(
    scales: Sequence[float],
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
    last: bool = True,
    images: int = 2,
    height: int = 48,
    width: int = 64,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """The same random maps at each call, which require gradients; ``last``: channels last."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    return [
        torch.randn(images, channels, int(height * s), int(width * s), generator=generator)
        .to(device, dtype, memory_format=layout)
        .requires_grad_()
        for s in scales
    ]
