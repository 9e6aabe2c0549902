"""Weights of other libraries' FPN detectors into this plugin's names and back: torchvision, mmdet.

Faster and Mask R-CNN; of torchvision's also Keypoint R-CNN and RetinaNet. :data:`CONFIG_KEYS` says
what a config must have to compute what the original does: its input, its strides, its pooling. What
still differs are torchvision's anchors, which it rounds to whole pixels.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import Tensor

from fpn_plugin.engine.checkpoint import read_checkpoint, weights_of, write_checkpoint
from fpn_plugin.engine.settings import load_config
from fpn_plugin.errors import UserError

__all__ = [
    "CONFIG_KEYS",
    "LIBRARIES",
    "argument_parser",
    "convert_main",
    "from_library",
    "to_library",
]

_PYTORCH_STYLE = [
    "INPUT.FORMAT", "RGB",
    "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]",
    "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]",
    "MODEL.RESNETS.STRIDE_IN_1X1", "False",
    "MODEL.FPN.COARSEST_OUTPUT_CONV", "True",
]  # fmt: skip
# What a config must say for converted weights.
CONFIG_KEYS = {
    "torchvision": [
        *_PYTORCH_STYLE,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "2",
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign",
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", "2",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", "ROIAlign",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", "2",
    ],
    "mmdet": _PYTORCH_STYLE,
}  # fmt: skip
_BN_EPS = 1e-5  # of Detectron2's frozen batch norm

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


def _shifted(template: str, group: int, by: int) -> Callable[[re.Match[str]], str]:
    """A replacement in which one group is a number that the two libraries count from elsewhere."""

    def replace(match: re.Match[str]) -> str:
        numbers = {f"n{group}": int(match[group]) + by}
        return match.expand(template).format(**numbers)

    return replace


def _halved(template: str) -> Callable[[re.Match[str]], str]:
    """A replacement for one of convolutions that are numbered with the ReLUs between them."""
    return lambda match: template.format(int(match[1]) // 2)


_RESNET: Rules = (
    (r"^backbone\.bottom_up\.stem\.conv1\.norm\.", "BODY.bn1."),
    (r"^backbone\.bottom_up\.stem\.conv1\.", "BODY.conv1."),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.", _shifted(r"BODY.layer{n1}.\2.", 1, -1)),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
)
_TORCHVISION: Rules = (
    *_RESNET,
    ("^BODY", "backbone.body"),
    (r"^backbone\.fpn_lateral(\d)\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^backbone\.fpn_output(\d)\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"^backbone\.top_block\.", "backbone.fpn.extra_blocks."),
    (r"^head\.cls_score\.", "head.classification_head.cls_logits."),
    (r"^head\.bbox_pred\.", "head.regression_head.bbox_reg."),
    (r"^head\.cls_subnet\.(\d)\.", _halved("head.classification_head.conv.{}.0.")),
    (r"^head\.bbox_subnet\.(\d)\.", _halved("head.regression_head.conv.{}.0.")),
    (r"^proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"^roi_heads\.box_head\.fc(\d)\.", _shifted("roi_heads.box_head.fc{n1}.", 1, 5)),
    (r"^roi_heads\.mask_head\.mask_fcn(\d)\.", _shifted("roi_heads.mask_head.{n1}.0.", 1, -1)),
    (r"^roi_heads\.mask_head\.deconv\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^roi_heads\.mask_head\.predictor\.", "roi_heads.mask_predictor.mask_fcn_logits."),
    # A convolution and a ReLU in turn, numbered from 0.
    (
        r"^roi_heads\.keypoint_head\.conv_fcn(\d)\.",
        lambda match: f"roi_heads.keypoint_head.{2 * int(match[1]) - 2}.",
    ),
    (
        r"^roi_heads\.keypoint_head\.score_lowres\.",
        "roi_heads.keypoint_predictor.kps_score_lowres.",
    ),
)
_MMDET: Rules = (
    *_RESNET,
    ("^BODY", "backbone"),
    (r"^backbone\.fpn_lateral(\d)\.", r"neck.lateral_convs.\1.conv."),
    (r"^backbone\.fpn_output(\d)\.", r"neck.fpn_convs.\1.conv."),
    (r"^proposal_generator\.rpn_head\.conv\.", "rpn_head.rpn_conv."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn_head.rpn_cls."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn_head.rpn_reg."),
    (r"^roi_heads\.box_head\.fc(\d)\.", _shifted("roi_head.bbox_head.shared_fcs.{n1}.", 1, -1)),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (
        r"^roi_heads\.mask_head\.mask_fcn(\d)\.",
        _shifted("roi_head.mask_head.convs.{n1}.conv.", 1, -1),
    ),
    (r"^roi_heads\.mask_head\.deconv\.", "roi_head.mask_head.upsample."),
    (r"^roi_heads\.mask_head\.predictor\.", "roi_head.mask_head.conv_logits."),
)
LIBRARIES = {"torchvision": _TORCHVISION, "mmdet": _MMDET}

# Predictors have rows by class: torchvision's first row is the background's, Detectron2's last.
_BY_CLASS = (
    "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_head.predictor.",
)
_NOT_CONVERTED = ("num_batches_tracked", "pixel_mean", "pixel_std")


def library_name(key: str, library: str, finest: int = 2) -> str:
    """The name that a library has for a parameter of this plugin's models.

    Args:
        key: of the parameter.
        library: one of :data:`LIBRARIES`.
        finest: the pyramid's finest level, from which both libraries count from 0.
    """
    key = re.sub(
        r"^(backbone\.fpn_(?:lateral|output))(\d)",
        lambda match: f"{match[1]}{int(match[2]) - finest}",
        key,
    )
    for pattern, replacement in LIBRARIES[library]:
        key = re.sub(pattern, replacement, key)
    return key


def from_library(
    state: dict[str, Tensor], cfg: CfgNode, library: str, bn_eps: float = _BN_EPS
) -> dict[str, Tensor]:
    """A library's detector as a state dict for a config's model.

    Args:
        state: the library's.
        cfg: of the model, whose names and shapes it must have; see :data:`CONFIG_KEYS`.
        library: one of :data:`LIBRARIES`.
        bn_eps: what the original adds to its batch norms' variance, put into the variance where
            it is another than here. torchvision's COCO_V1 weights were made with 0.

    Returns:
        Every parameter and buffer of the model, in its order. Where torchvision has COCO's 91
        category numbers and the model COCO's 80 categories, the 80 are taken.

    Raises:
        UserError: something is missing, has another shape, or has no place in the model.
    """
    wanted = _wanted(cfg)
    finest = _finest(wanted)
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for key, shape in wanted.items():
        theirs = library_name(key, library, finest)
        name = _present(theirs, state)
        if name is None:
            raise UserError(
                f"{library}'s weights lack {theirs}, which the model's {key} is made of: is the "
                "config of their kind and depth?"
            )
        used.add(name)
        tensor = state[name]
        rows = _class_rows(key, tensor, shape, library)
        tensor = tensor if rows is None else tensor[rows]
        if tensor.shape != shape:
            raise UserError(
                f"{name} is {tuple(tensor.shape)}, the model's {key} {tuple(shape)}: is the config "
                "of its width and number of classes?"
            )
        converted[key] = tensor.clone()
        if key.endswith("running_var"):
            converted[key] += bn_eps - _BN_EPS
    left = [k for k in state if k not in used and not k.endswith(_NOT_CONVERTED)]
    if left:
        raise UserError(
            f"{len(left)} of {library}'s tensors have no place in this config's model, "
            f"{', '.join(left[:3])} among them: does it lack a head (MODEL.MASK_ON)?"
        )
    return converted


def to_library(
    state: dict[str, Tensor], library: str, into: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A state dict of this plugin's models in a library's names.

    Args:
        state: of a model.
        library: one of :data:`LIBRARIES`.
        into: a state dict of the library's, for its layout, and for what this plugin's models do
            not have: the rows of torchvision's background box and of category numbers that COCO
            does not use. Without it, those rows are zero and categories numbered without gaps.

    Raises:
        UserError: a tensor does not fit ``into``.
    """
    converted: dict[str, Tensor] = {} if into is None else {k: v.clone() for k, v in into.items()}
    finest = _finest(state)
    for key, tensor in state.items():
        if key.endswith(_NOT_CONVERTED):
            continue
        name = library_name(key, library, finest)
        name = _present(name, converted) or name
        if into is not None and name not in converted:
            raise UserError(f"{library}'s layout has no {name}, which {key} would become")
        full = converted.get(name)
        if full is None:
            full = _with_background(key, tensor, library)
        rows = _class_rows(key, full, tensor.shape, library)
        if rows is None:
            full = tensor.clone()
        else:
            full[rows] = tensor
        converted[name] = full
    return converted


def _finest(keys: Iterable[str]) -> int:
    """The finest level that parameters of these names are of."""
    levels = [int(m[1]) for key in keys if (m := re.match(r"backbone\.fpn_lateral(\d)", key))]
    return min(levels, default=2)


def _wanted(cfg: CfgNode) -> dict[str, torch.Size]:
    """Names and shapes of a config's model, without making its values."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    state = build_model(cfg).state_dict()
    return {k: v.shape for k, v in state.items() if not k.endswith(_NOT_CONVERTED)}


def _present(name: str, state: dict[str, Tensor]) -> str | None:
    """The name as a state dict has it: torchvision's older layout lacks some ``.0``."""
    older = re.sub(r"(inner_blocks\.\d|layer_blocks\.\d)\.0\.", r"\1.", name)
    older = re.sub(r"^rpn\.head\.conv\.0\.0\.", "rpn.head.conv.", older)
    return next((n for n in (name, older) if n in state), None)


def _class_rows(key: str, full: Tensor, shape: torch.Size, library: str) -> list[int] | None:
    """Rows of a library's predictor that are this plugin's, in its order; None where all are."""
    if library == "torchvision" and key.startswith(("head.cls_score.", "head.bbox_pred.")):
        return _dense_rows(full.shape[0], shape[0], scores="cls_score" in key)
    if library != "torchvision" or not key.startswith(_BY_CLASS):
        return None
    per_class = 4 if "bbox_pred" in key else 1
    scores = "cls_score" in key
    classes = shape[0] // per_class - (1 if scores else 0)
    numbers = _class_numbers(full.shape[0] // per_class - 1, classes)
    if numbers is None:
        return None  # the shapes will be found to differ
    order = [*numbers, 0] if scores else numbers
    return [number * per_class + i for number in order for i in range(per_class)]


def _class_numbers(given: int, classes: int) -> list[int] | None:
    """Torchvision's numbers, from 1 on, of a model's classes."""
    if (given, classes) == (90, 80):
        return sorted(MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id)
    return list(range(1, classes + 1)) if given == classes else None


def _dense_rows(given: int, wanted: int, *, scores: bool) -> list[int] | None:
    """Rows of RetinaNet's predictors. Of a cell's nine anchors torchvision has the three scales
    of a ratio side by side, Detectron2 the three ratios of a scale.
    """
    anchors = [ratio * 3 + scale for scale in range(3) for ratio in range(3)]
    if scores:
        numbers = _class_numbers(given // 9 - 1, wanted // 9)
        each = given // 9
    else:
        numbers, each = list(range(4)), 4
    if numbers is None or given % 9 or wanted % 9:
        return None
    return [anchor * each + number for anchor in anchors for number in numbers]


def _with_background(key: str, tensor: Tensor, library: str) -> Tensor:
    """A tensor of zeros of the library's shape."""
    rows = tensor.shape[0]
    if library == "torchvision" and key.startswith("head.cls_score."):
        rows += 9  # one for each anchor
    if library == "torchvision" and key.startswith(_BY_CLASS) and "cls_score" not in key:
        rows += 4 if "bbox_pred" in key else 1
    return tensor.new_zeros(rows, *tensor.shape[1:])


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of tools/convert_weights.py."""
    parser = argparse.ArgumentParser(
        description="Convert an FPN detector's weights from torchvision or mmdetection into this "
        "plugin's names, or back. Files are read without running code that is in them.",
        epilog="""
Examples:
  convert_weights.py --from torchvision --weights maskrcnn.pth --output maskrcnn_d2.pth \\
      --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml
  convert_weights.py --to torchvision --weights model_final.pth --output for_torchvision.pth
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source", choices=LIBRARIES, help="library it is from")
    direction.add_argument("--to", dest="target", choices=LIBRARIES, help="library it is for")
    parser.add_argument("--weights", required=True, help=".pth, .pkl or .safetensors")
    parser.add_argument(
        "--bn-eps",
        type=float,
        default=_BN_EPS,
        help="of the original's batch norms; 0 for torchvision's COCO_V1 weights",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read weights that hold more than tensors, as mmdetection's checkpoints do, which "
        "runs code that is in them: for files whose author you trust",
    )
    parser.add_argument("--config-file", help="of the model, path or packaged name; for --from")
    parser.add_argument("--into", help="weights of the library whose layout to fill; for --to")
    parser.add_argument("--output", required=True, help="file to write, .pth or .safetensors")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def convert_main(argv: Sequence[str] | None = None) -> None:
    """Writes converted weights and, from a library, the config beside them.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: a file cannot be read, or does not fit the config.
    """
    args = argument_parser().parse_args(argv)
    state = _tensors(args.weights, trust_pickle=args.trust_pickle)
    output = Path(args.output)
    if args.target:
        into = _tensors(args.into) if args.into else None
        write_checkpoint(to_library(state, args.target, into), output, bare=True)
        print(f"{output}: in the names of {args.target}")
        return
    if not args.config_file:
        raise UserError("--from needs --config-file: the config of the model they are for")
    keys = [*CONFIG_KEYS[args.source], *_top_block_keys(state)]
    cfg = load_config(args.config_file, [*keys, *args.opts])
    write_checkpoint(from_library(state, cfg, args.source, args.bn_eps), output)
    cfg.MODEL.WEIGHTS = str(output)
    config = output.with_suffix(".yaml")
    config.write_text(cfg.dump())
    print(f"{output}, and {config} that loads it")


def _top_block_keys(state: dict[str, Tensor]) -> list[str]:
    """The config keys that say what a torchvision RetinaNet's P6 reads: P5, or C5."""
    p6 = state.get("backbone.fpn.extra_blocks.p6.weight")
    if p6 is None:
        return []
    on_level = p6.shape[0] == p6.shape[1]
    return ["MODEL.FPN.TOP_BLOCK", "p6p7_p5" if on_level else "p6p7_c5"]


def _tensors(path: str, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    try:
        return weights_of(checkpoint, "model", "state_dict")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path!r} has no weights: {error}") from error
