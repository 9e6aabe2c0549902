"""The featurized image pyramid: one network on an image at several scales (Figure 1 (a))."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.modeling.backbone import Backbone
from torch import Tensor, fx, nn

from fpn_plugin.errors import UserError

from .neck import by_level, check_channels, checked_shapes, pyramid_conv, top_block_levels
from .scripting import spelt_out

__all__ = ["FeaturizedImagePyramid"]


class FeaturizedImagePyramid(Backbone):
    """The design of Figure 1 (a): a bottom-up network runs on the image at several scales.

    One stage is read at every scale. At scale s, a stage of stride t gives the level of stride
    t / s: C4, of stride 16, gives P2 of an image enlarged 4 times, and P5 of one of half the size::

        Pk = lateral(C(image resized by s))    with one network, and one 1x1, for all levels

    All levels have the semantics of the same stage. Time and memory grow with the area of the
    enlarged images: scales 4, 2, 1 and 1/2 have 21 times the area of the image itself.

    The 1x1 convolution, ``fpn_lateral{k}`` for stage Ck, gives levels the channels of the feature
    pyramid's, so that heads on both cost the same. Images are enlarged bilinearly, and reduced by
    the mean over each output pixel's area.

    Args:
        bottom_up: the network.
        in_features: the name of the stage that is read, in a list of one.
        image_scales: of the image, largest first, each half of the one before. Stride of the stage
            and scales make the levels.
        out_channels: d, channels of every level.
        norm: a normalization that Detectron2 knows, after the 1x1 convolution; "" for none.
        top_block: adds levels after the coarsest, as in
            :class:`~fpn_plugin.modeling.neck.FeaturePyramidNetwork`.

    Raises:
        UserError: the stage does not exist, the scales do not make a pyramid, or another argument
            does not fit, as in FeaturePyramidNetwork.

    Example::

        >>> backbone = FeaturizedImagePyramid(resnet, ["res4"], [4, 2, 1, 0.5], 256)
        >>> {name: tuple(p.shape) for name, p in backbone(torch.rand(1, 3, 64, 64)).items()}
        {'p2': (1, 256, 16, 16), 'p3': (1, 256, 8, 8), 'p4': (1, 256, 4, 4), 'p5': (1, 256, 2, 2)}
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        image_scales: Sequence[float],
        out_channels: int,
        *,
        norm: str = "",
        top_block: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_channels(out_channels)
        [shape, *others] = checked_shapes(bottom_up, in_features)
        if others:
            raise UserError(
                f"`in_features` {list(in_features)} are {len(in_features)} stages; an image "
                "pyramid reads one stage at every scale: name one"
            )
        levels = _levels(shape.stride, image_scales)
        self.in_features = tuple(in_features)
        self.image_scales = tuple(float(scale) for scale in image_scales)
        coarsest = f"p{levels[-1]}"
        outputs = levels + top_block_levels(top_block, levels[-1], [in_features[0], coarsest])
        self._lateral = f"fpn_lateral{shape.stride.bit_length() - 1}"
        self.add_module(self._lateral, pyramid_conv(shape.channels, out_channels, 1, norm))
        weight_init.c2_xavier_fill(getattr(self, self._lateral))
        self.top_block = top_block
        self.bottom_up = bottom_up

        self._out_features = [f"p{level}" for level in outputs]
        self._out_feature_strides = {f"p{level}": 2**level for level in outputs}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        # Input sides of this multiple stay whole numbers at every scale.
        self._multiple = max(1, round(1 / self.image_scales[-1]))
        own = max(getattr(bottom_up, "size_divisibility", 0), 0)
        self._size_divisibility = max(2 ** levels[-1], own * self._multiple)

    @property
    def size_divisibility(self) -> int:
        """What Detectron2 pads input sides to multiples of, in pixels: the coarsest stride.

        Sides of other lengths work too if the network takes them.
        """
        return self._size_divisibility

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the pyramid of a batch of images.

        Args:
            x: ``(N, 3, H, W)``, or whatever the bottom-up network takes.

        Returns:
            ``{"p2": (N, out_channels, H / 4, W / 4), ...}``, finest level first.
        """
        lateral, read = getattr(self, self._lateral), self.in_features[0]
        pyramid: dict[str, Tensor] = {}
        for name, scale in zip(self._out_features, self.image_scales, strict=False):
            stage = self.bottom_up(_resized(x, scale, self._multiple))[read]
            pyramid[name] = lateral(stage)
        if self.top_block is not None:
            source = self.top_block.in_feature
            extra = self.top_block(stage if source == read else pyramid[source])
            pyramid |= by_level(self._out_features[len(pyramid) :], extra)
        return pyramid

    def __prepare_scriptable__(self) -> FeaturizedImagePyramid:
        return spelt_out(self)


def _levels(stride: int, scales: Sequence[float]) -> list[int]:
    """The levels of a stage of a stride at each scale; refuses those that are no pyramid."""
    strides = [stride / scale if scale > 0 else 0 for scale in scales]
    powers = [s >= 1 and s == 2 ** (int(s).bit_length() - 1) for s in strides]
    doubling = all(b == 2 * a for a, b in itertools.pairwise(strides))
    if not strides or not all(powers) or not doubling:
        raise UserError(
            f"`image_scales` {list(scales)} make levels of strides {strides} from a stage of "
            f"stride {stride}, which are not a pyramid: list the largest scale first, each half of "
            f"the one before, for example {[stride / s for s in (4, 8, 16, 32)]} for p2 to p5"
        )
    return [int(s).bit_length() - 1 for s in strides]


@fx.wrap
def _resized(x: Tensor, scale: float, multiple: int) -> Tensor:
    """The images at a scale. Zeros make odd sides even first, so that pixels stay in place."""
    height, width = x.shape[-2], x.shape[-1]
    below, right = -height % multiple, -width % multiple
    if scale < 1 and below + right > 0:
        x = F.pad(x, [0, right, 0, below])
    if scale == 1:
        return x
    if scale < 1:
        return F.avg_pool2d(x, int(1 / scale))
    return F.interpolate(x, scale_factor=scale, mode="bilinear")
