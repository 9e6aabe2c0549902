"""PerLevelRPNHead: RPN heads whose parameters levels do not share (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import RPN_HEAD_REGISTRY
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from omegaconf import DictConfig
from torch import Tensor, nn

from fpn_plugin.errors import UserError

__all__ = ["PerLevelRPNHead"]


@RPN_HEAD_REGISTRY.register()
class PerLevelRPNHead(nn.Module):
    """One StandardRPNHead for each level, the variant of section 4.1 that shares no parameters.

    Parameters are named ``heads.{i}.*``, where i counts the levels of MODEL.RPN.IN_FEATURES from 0.
    Levels may differ in channels and, unlike in Detectron2's shared head, in the number of anchors.

    Args:
        cfg: the config; MODEL.RPN.CONV_DIMS is read for each head.
        input_shape: channels and stride of each level, as RPN gives them.
    """

    def __init__(self, cfg: CfgNode | DictConfig, input_shape: list[ShapeSpec]) -> None:
        super().__init__()
        generator = build_anchor_generator(cfg, input_shape)
        self.heads = nn.ModuleList(
            StandardRPNHead(
                in_channels=shape.channels,
                num_anchors=num_anchors,
                box_dim=generator.box_dim,
                conv_dims=cfg.MODEL.RPN.CONV_DIMS,
            )
            for shape, num_anchors in zip(input_shape, generator.num_anchors, strict=True)
        )

    @classmethod
    def of(cls, heads: Iterable[nn.Module]) -> PerLevelRPNHead:
        """A head made of given heads, finest level first."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.heads = nn.ModuleList(heads)
        return made

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Computes objectness and box deltas.

        Args:
            features: one ``(N, C, H, W)`` map per level, in the order of the heads.

        Returns:
            Objectness logits ``(N, A, H, W)`` and deltas ``(N, 4 A, H, W)``, a list a level.

        Raises:
            UserError: the numbers of levels and heads differ.
        """
        if len(features) != len(self.heads):
            raise UserError(f"got {len(features)} feature maps for {len(self.heads)} RPN heads")
        logits: list[Tensor] = []
        deltas: list[Tensor] = []
        for i, head in enumerate(self.heads):  # as torch.jit.script can read it
            of_level = head([features[i]])
            logits += of_level[0]
            deltas += of_level[1]
        return logits, deltas
