"""The feature pyramid: lateral connections, top-down pathway, output convolutions (section 3)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, fx, nn

from fpn_plugin.errors import UserError, by_keys, near_names

from .scripting import spelt_out

__all__ = [
    "TOP_BLOCKS", "FeaturePyramidNetwork", "build_top_block", "by_level", "check_channels",
    "checked_shapes", "pyramid_conv", "top_block_levels",
]  # fmt: skip

_FUSE_TYPES = ("sum", "avg")
_NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
TOP_BLOCKS = ("maxpool", "p6p7_c5", "p6p7_p5", "none")


class FeaturePyramidNetwork(Backbone):
    """The feature pyramid of section 3, over any bottom-up pathway.

    For each level k of the bottom-up pathway, finest to coarsest C2 ... C5::

        M5 = lateral(C5)                    1x1 to out_channels
        Mk = lateral(Ck) + upsample(Mk+1)   nearest neighbour, x2
        Pk = output(Mk)                     3x3; P5 = M5 unless coarsest_output_conv

    There is no non-linearity in it. Convolutions that the forward pass does not use are not built.

    Convolutions are named ``fpn_lateral{k}`` and ``fpn_output{k}`` and initialised as in
    :class:`detectron2.modeling.FPN`. With ``coarsest_output_conv=True``, the same norm, stages and
    top block, and otherwise the defaults, the state dict has the same keys and shapes as
    Detectron2's, and checkpoints load in both directions. ``load_state_dict`` raises a UserError,
    even with ``strict=False``, if only one of state dict and pyramid has the 3x3 convolution of the
    coarsest level: the model would run and detect badly.

    Args:
        bottom_up: the network whose stages are C2 ... C5.
        in_features: names of the stages to build on, finest first, each with twice the stride of
            the one before. Any contiguous run works, for example ``["res3", "res4", "res5"]``.
        out_channels: d, channels of every level.
        norm: a normalization that Detectron2 knows, after each convolution; "" for none.
        top_block: adds levels after the coarsest, see :func:`build_top_block`. Any module with
            ``num_levels``, ``in_feature`` (a stage or a level) and a list of maps as its output.
        fuse_type: "sum", or "avg" to halve each sum.
        coarsest_output_conv: whether the coarsest level too has a 3x3 convolution, as in
            Detectron2. The paper can be read both ways; by default the level has none.
        top_down: False removes the top-down pathway, row (d) of Tables 1 and 2: Mk = lateral(Ck).
        lateral: False removes lateral connections below the coarsest, row (e): Mk = upsample(Mk+1).
        match_lateral_size: upsample to the lateral map's exact size instead of by 2, so that
            input sides need not be multiples of the coarsest stride.
        out_features: the levels to compute, for example ``["p2"]`` for row (f); all by default.

    Raises:
        UserError: the stages do not exist or are not a pyramid; the norm is unknown or does not
            fit out_channels; the top block's input does not exist; out_features do not exist or
            leave a stage or the top block unused.

    Example::

        >>> neck = FeaturePyramidNetwork(resnet, ["res2", "res3", "res4", "res5"], 256)
        >>> {name: tuple(p.shape) for name, p in neck(torch.rand(1, 3, 64, 64)).items()}
        {'p2': (1, 256, 16, 16), 'p3': (1, 256, 8, 8), 'p4': (1, 256, 4, 4), 'p5': (1, 256, 2, 2)}
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        *,
        norm: str = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
        coarsest_output_conv: bool = False,
        top_down: bool = True,
        lateral: bool = True,
        match_lateral_size: bool = False,
        out_features: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_channels(out_channels)
        shapes = checked_shapes(bottom_up, in_features)
        if fuse_type not in _FUSE_TYPES:
            raise UserError(
                f"`fuse_type` {fuse_type!r} is unknown: {near_names(str(fuse_type), _FUSE_TYPES)}"
            )
        if not (top_down or lateral):
            raise UserError(
                "`top_down` and `lateral` are both False, which leaves the levels below the "
                "coarsest without any input: set one of them True"
            )
        self._config_keys: Mapping[str, str] = {}  # set by build_fpn_backbone
        self.in_features = tuple(in_features)
        self._fuse_type = fuse_type
        self._top_down = top_down
        self._match_lateral_size = match_lateral_size

        levels = [shape.stride.bit_length() - 1 for shape in shapes]
        self._coarsest_first = levels[::-1]
        present = [*self.in_features, *(f"p{level}" for level in self._coarsest_first)]
        outputs = [*levels, *top_block_levels(top_block, levels[-1], present)]
        self._out_features = [f"p{level}" for level in outputs]
        if out_features is not None:
            self._out_features = self._checked_choice(out_features, len(levels))
        # In Detectron2's order, so that a seed gives its weights and an optimizer's saved state
        # finds its parameters.
        for level, shape in zip(levels, shapes, strict=True):
            coarsest = level == levels[-1]
            convs = {}
            if lateral or coarsest:
                convs[f"fpn_lateral{level}"] = pyramid_conv(shape.channels, out_channels, 1, norm)
            if (coarsest_output_conv or not coarsest) and f"p{level}" in self._out_features:
                convs[f"fpn_output{level}"] = pyramid_conv(out_channels, out_channels, 3, norm)
            for name, conv in convs.items():
                weight_init.c2_xavier_fill(conv)
                self.add_module(name, conv)
        self.top_block = top_block
        self.bottom_up = bottom_up

        self._out_feature_strides = {name: 2 ** int(name[1:]) for name in self._out_features}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        # A network may need padding itself. Detectron2's Swin has the property but not its value.
        own = getattr(bottom_up, "size_divisibility", 0)
        self._size_divisibility = own if match_lateral_size else shapes[-1].stride

    def _checked_choice(self, chosen: Sequence[str], num_stages: int) -> list[str]:
        """The chosen levels, finest first; refuses a choice that leaves a module unused."""
        offered = self._out_features
        for name in chosen:
            if name not in offered:
                raise UserError(
                    f"`out_features` names {name!r}, which this pyramid does not have: "
                    f"{near_names(str(name), offered)}"
                )
        merged, extra = offered[:num_stages], offered[num_stages:]
        if extra and not {merged[-1], *extra} <= set(chosen):
            raise UserError(
                f"`out_features` {list(chosen)} leaves out some of {[merged[-1], *extra]}, which "
                "the top block reads or makes: name them all, or set `top_block` none"
            )
        # The top-down pathway reads all stages from the coarsest to the finest chosen level.
        # Without it, only a stage's own level reads it.
        needed = [merged[0]] if self._top_down else merged
        if not set(needed) <= set(chosen):
            raise UserError(
                f"`out_features` {list(chosen)} leaves stages of `in_features` "
                f"{list(self.in_features)} without use: it must have {', '.join(needed)}, or "
                "`in_features` must begin at a coarser stage"
            )
        return [name for name in offered if name in chosen]

    @property
    def size_divisibility(self) -> int:
        """What input sides, in pixels, must be multiples of; 0 if any size works."""
        return self._size_divisibility

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the pyramid of a batch of images.

        Args:
            x: ``(N, 3, H, W)``, or whatever the bottom-up pathway takes.

        Returns:
            ``{"p2": (N, out_channels, H / 4, W / 4), ...}``, finest level first.

        Raises:
            UserError: sides are not multiples of the coarsest stride, unless match_lateral_size.
        """
        stages = self.bottom_up(x)
        results: dict[str, Tensor] = {}
        merged: Tensor | None = None
        for name, level in zip(self.in_features[::-1], self._coarsest_first, strict=True):
            merged = self._merge(stages[name], level, merged)
            if f"p{level}" in self._out_feature_strides:
                output = getattr(self, f"fpn_output{level}", None)
                results[f"p{level}"] = merged if output is None else output(merged)
        pyramid = dict(reversed(results.items()))
        if self.top_block is not None:
            source = self.top_block.in_feature
            extra = self.top_block((stages if source in self.in_features else pyramid)[source])
            pyramid |= by_level(self._out_features[len(pyramid) :], extra)
        return pyramid

    def _merge(self, stage: Tensor, level: int, coarser: Tensor | None) -> Tensor:
        """Mk of a stage Ck and the next coarser M (section 3, figure 3)."""
        lateral = getattr(self, f"fpn_lateral{level}", None)
        if coarser is None or not self._top_down:
            return lateral(stage)
        if self._match_lateral_size:
            upsampled = F.interpolate(coarser, size=stage.shape[-2:], mode="nearest")
        else:
            upsampled = F.interpolate(coarser, scale_factor=2.0, mode="nearest")
            upsampled = self._fitting(upsampled, stage)
        if lateral is None:
            return upsampled
        merged = lateral(stage) + upsampled
        return merged / 2 if self._fuse_type == "avg" else merged

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        # The two readings of P5 differ by one convolution. A model that lacks it, or has its
        # initial values, runs and detects badly, so strict=False does not allow it.
        coarsest = self._coarsest_first[0]
        longer = f"{prefix}fpn_lateral{coarsest + 1}.weight" in state_dict  # of more levels
        computed = f"p{coarsest}" in self._out_feature_strides
        if computed and f"{prefix}fpn_lateral{coarsest}.weight" in state_dict and not longer:
            key = f"{prefix}fpn_output{coarsest}.weight"
            saved, built = key in state_dict, hasattr(self, f"fpn_output{coarsest}")
            if saved != built:
                message = (
                    f"the checkpoint {'has' if saved else 'lacks'} {key}, which this model "
                    f"{'has' if built else 'lacks'}: set `coarsest_output_conv` {saved}"
                )
                raise UserError(by_keys(message, self._config_keys))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fitting(self, upsampled: Tensor, stage: Tensor) -> Tensor:
        matching = self._config_keys.get("match_lateral_size", "`match_lateral_size`")
        return _fitting(upsampled, stage, self._size_divisibility, matching)

    def __prepare_scriptable__(self) -> FeaturePyramidNetwork:
        return spelt_out(self)


@fx.wrap
def _fitting(upsampled: Tensor, stage: Tensor, divisibility: int, matching: str) -> Tensor:
    """Checks that an upsampled map and the stage to which it is added have one size."""
    if not torch.jit.is_tracing() and upsampled.shape[-2:] != stage.shape[-2:]:
        raise UserError(
            f"a map of {stage.shape[-2]} x {stage.shape[-1]} cells is added to an upsampled one of "
            f"{upsampled.shape[-2]} x {upsampled.shape[-1]}: input sides must be multiples of "
            f"{divisibility} px; pad them, or set {matching} True"
        )
    return upsampled


def top_block_levels(
    top_block: nn.Module | None, coarsest: int, present: Sequence[str]
) -> list[int]:
    """The levels that a top block adds after the coarsest one.

    Args:
        top_block: None for no levels.
        coarsest: the coarsest level below it, for example 5.
        present: names of the stages and levels that it may read.

    Raises:
        UserError: it reads another one.
    """
    if top_block is None:
        return []
    if top_block.in_feature not in present:
        raise UserError(
            f"the top block reads {top_block.in_feature!r}, which this pyramid does not "
            f"have; it has {', '.join(present)}. build_top_block() follows the coarsest level"
        )
    return [coarsest + 1 + i for i in range(top_block.num_levels)]


def by_level(names: Sequence[str], extra: list[Tensor]) -> dict[str, Tensor]:
    """The maps of a top block by the names of its levels; refuses another number of maps."""
    extra = _as_many_as(len(names), extra)
    return {name: extra[i] for i, name in enumerate(names)}


@fx.wrap
def _as_many_as(count: int, maps: list[Tensor]) -> list[Tensor]:
    """Checks that a top block gives as many maps as it declares."""
    if len(maps) != count:
        raise UserError(f"the top block gives {len(maps)} maps, and its num_levels is {count}")
    return maps


def build_top_block(
    name: str, *, coarsest_stage: str, coarsest_level: int, in_channels: int, out_channels: int
) -> nn.Module | None:
    """Builds the levels after the coarsest one, P6 and on.

    Args:
        name: "maxpool": one level by stride-2 subsampling of the coarsest (P6 in footnote 1);
            "p6p7_c5", "p6p7_p5": RetinaNet's two stride-2 convolutions, on the coarsest stage or
            on the coarsest level; "none".
        coarsest_stage: name of the coarsest stage, for example "res5".
        coarsest_level: its level, for example 5.
        in_channels: channels of that stage.
        out_channels: channels of every level.

    Raises:
        UserError: an unknown name, or convolutions of no channels.
    """
    level = f"p{coarsest_level}"
    if name == "maxpool":
        block = LastLevelMaxPool()
        block.in_feature = level  # Detectron2's says "p5" whatever the pyramid
        return block
    if name in ("p6p7_c5", "p6p7_p5"):
        check_channels(out_channels)
        on_stage = name == "p6p7_c5"
        source, channels = (coarsest_stage, in_channels) if on_stage else (level, out_channels)
        return LastLevelP6P7(channels, out_channels, source)
    if name == "none":
        return None
    raise UserError(f"`name` {name!r} is unknown: {near_names(str(name), TOP_BLOCKS)}")


def check_channels(out_channels: int) -> None:
    """Refuses a level of no channels."""
    if out_channels < 1:
        raise UserError(
            f"`out_channels` is {out_channels}; a level has 1 channel or more, 256 in the paper"
        )


def checked_shapes(bottom_up: Backbone, in_features: Sequence[str]) -> list[ShapeSpec]:
    """Shapes of the chosen stages; refuses those whose strides are not a pyramid."""
    offered = bottom_up.output_shape()
    says = ", ".join(f"{name} (stride {shape.stride})" for name, shape in offered.items())
    if not in_features:
        raise UserError(f"`in_features` is empty; the bottom-up pathway offers {says}")
    for name in in_features:
        if name not in offered:
            raise UserError(
                f"`in_features` names {name!r}, but the bottom-up pathway offers {says}"
            )
    shapes = [offered[name] for name in in_features]
    strides = [shape.stride for shape in shapes]
    doubling = all(b == 2 * a for a, b in itertools.pairwise(strides))
    if not doubling or strides[0] != 2 ** (int(strides[0]).bit_length() - 1):
        raise UserError(
            f"`in_features` {list(in_features)} have strides {strides}, which are not a "
            "pyramid: list contiguous stages, finest first, with power-of-2 strides, each twice "
            f"the one before; the bottom-up pathway offers {says}"
        )
    return shapes


def pyramid_conv(in_channels: int, out_channels: int, kernel_size: int, norm: str) -> Conv2d:
    """A convolution that keeps the map's size, with a bias unless a norm has one."""
    try:
        norm_layer = get_norm(norm, out_channels)
    except KeyError:
        known = near_names(norm, known_norms())
        raise UserError(f"`norm` {norm!r} is no norm of this Detectron2: {known}") from None
    except ValueError as error:
        raise UserError(
            f"`norm` {norm!r} does not fit `out_channels` {out_channels}: {error}; Detectron2's GN "
            "has 32 groups, so `out_channels` must be a multiple of 32"
        ) from None
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        bias=norm_layer is None,
        norm=norm_layer,
    )


def known_norms() -> list[str]:
    """Names of the norms that the installed Detectron2 has; its release 0.6 has no LN."""
    known = []
    for name in _NORMS:
        with contextlib.suppress(KeyError):
            get_norm(name, 32)
            known.append(name)
    return known
