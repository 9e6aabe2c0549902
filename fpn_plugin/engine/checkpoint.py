"""Checkpoints: checked against the model, and written whole."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from fpn_plugin.errors import NonFiniteError, UserError, one_line
from fpn_plugin.modeling.network_weights import network_weights, origin
from fpn_plugin.utils.atomic import AtomicWrites, explained_full_disk
from fpn_plugin.utils.weight_files import (
    NO_CHECKPOINT,
    a_dict,
    explained_reading,
    read_file,
    weights_of,
)

__all__ = ["StrictCheckpointer"]

_LOGGER = logging.getLogger(__name__)


class _Dependent(NamedTuple):
    """Tensors of which one dimension depends on the data."""

    names: str  # a pattern of the beginning of their names
    axis: int  # the dimension
    on: tuple[str, ...]  # what it depends on
    keys: str  # the config keys that set it


_BOXES = r"roi_heads\.box_predictor\.(\d+\.)?"  # cascades number their stages
_POINTS = r"roi_heads\.keypoint_head\.score_lowres"
_CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES (lazy: roi_heads.num_classes)"
_ANCHORS = "MODEL.ANCHOR_GENERATOR (lazy: anchor_generator, num_anchors)"
_KEYPOINTS = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS (lazy: num_keypoints)"
# All of Detectron2's architectures; FCOS has RetinaNet's names. The last row is for a user's heads.
_DEPENDENT = (
    _Dependent(_BOXES + r"cls_score\.", 0, ("classes",), _CLASSES),
    _Dependent(
        _BOXES + r"bbox_pred\.", 0, ("classes",), f"{_CLASSES}, ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
    ),
    _Dependent(
        r"roi_heads\.mask_head\.predictor\.", 0, ("classes",),
        f"{_CLASSES}, ROI_MASK_HEAD.CLS_AGNOSTIC_MASK",
    ),
    # The weight of a transposed convolution begins with the dimension of the input.
    _Dependent(_POINTS + r"\.weight", 1, ("keypoints",), _KEYPOINTS),
    _Dependent(_POINTS + r"\.bias", 0, ("keypoints",), _KEYPOINTS),
    _Dependent(
        r"sem_seg_head\.predictor\.", 0, ("classes",),
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES (lazy: sem_seg_head.num_classes)",
    ),
    _Dependent(
        r"proposal_generator\.rpn_head\.(heads\.\d+\.)?(objectness_logits|anchor_deltas)\.", 0,
        ("anchors",), _ANCHORS,
    ),
    _Dependent(
        r"head\.cls_score\.", 0, ("classes", "anchors"),
        f"MODEL.RETINANET.NUM_CLASSES (lazy: num_classes), {_ANCHORS}",
    ),
    _Dependent(r"head\.(bbox_pred|ctrness)\.", 0, ("anchors",), _ANCHORS),
    _Dependent(r".*predictor\.", 0, ("classes",), _CLASSES),
)  # fmt: skip
_FIRST_CONVOLUTION = _Dependent(
    "", 1, ("channels of the image",), "MODEL.PIXEL_MEAN, PIXEL_STD, INPUT.FORMAT"
)

# Patterns of tensors' names, and the other keys that decide on their existence and shape.
_KEYS = {
    r"fpn_": "MODEL.FPN.OUT_CHANNELS, IN_FEATURES, NORM",
    r"top_block": "MODEL.FPN.TOP_BLOCK, OUT_CHANNELS",
    r"^backbone\.(bottom_up\.)?net\.": "MODEL.TIMM.NAME or MODEL.TORCHVISION.NAME",
    r"bottom_up": "MODEL.RESNETS.DEPTH, NORM, NUM_GROUPS, WIDTH_PER_GROUP; MODEL.FPN.BOTTOM_UP",
    r"^backbone": "MODEL.BACKBONE.NAME; MODEL.RESNETS",
    r"^proposal_generator\.heads": "MODEL.SEGMENT_PROPOSALS, MODEL.FPN.OUT_CHANNELS",
    r"^proposal_generator": "MODEL.ANCHOR_GENERATOR, MODEL.RPN; MODEL.FPN.OUT_CHANNELS",
    r"box_head|box_predictor": "MODEL.ROI_BOX_HEAD, MODEL.FPN.OUT_CHANNELS; MODEL.ROI_HEADS.NAME",
    r"mask_head": "MODEL.MASK_ON, MODEL.ROI_MASK_HEAD",
    r"keypoint_head": "MODEL.KEYPOINT_ON, MODEL.ROI_KEYPOINT_HEAD",
    r"^sem_seg_head": "MODEL.SEM_SEG_HEAD",
    r"^head\.": "MODEL.META_ARCHITECTURE, MODEL.RETINANET, MODEL.FPN.OUT_CHANNELS",
}


def _detectron2_layout(content: dict[Any, Any], path: str) -> dict[str, Any]:
    """A checkpoint of any layout that Detectron2 reads, with its weights under "model".

    The layouts are Detectron2's own, its model zoo's, Caffe2's (.pkl) and pycls's (.pyth).
    """
    if path.endswith(".pyth"):
        if "model_state" not in content:
            raise ValueError("it has no 'model_state', which checkpoints of pycls (.pyth) have")
        author, weights, left_out = "pycls", content["model_state"], "num_batches_tracked"
    elif path.endswith(".pkl") and not {"model", "__author__"} <= content.keys():
        author, weights, left_out = "Caffe2", content.get("blobs", content), "_momentum"
    else:
        whole = {} if content.keys().isdisjoint(("model", "state_dict")) else content
        return {**whole, "model": weights_of(content, "model", "state_dict")}
    kept = {key: v for key, v in weights_of(weights).items() if not key.endswith(left_out)}
    return {"model": kept, "__author__": author, "matching_heuristics": True}


class StrictCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also refuses weights that would leave a model half random.

    A training may start from weights of a part, such as a backbone; Detectron2 warns of the rest.
    It may start from a detector of other classes, keypoints, anchors or image channels. Tensors
    that depend on their number are then left out, and one line names them. A file of which nothing
    fits is refused, and a tensor that has another shape for any other reason. So is a file that
    lacks a parameter, if ``complete`` is set or a training is resumed.

    Reading runs no code of the file. A file gets its name when it is complete and on the disk.

    Args:
        model: the model to load into.
        save_dir: the folder of the checkpoints.
        complete: whether a file must have every parameter, as for evaluation.
        classes: names of the model's classes in its order, for the checkpoints; None if unknown.
        checkpointables: see :class:`fvcore.common.checkpoint.Checkpointer`.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        complete: bool = False,
        classes: Sequence[str] | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._classes = classes
        self._complete = complete
        self._path = ""
        self.path_manager = AtomicWrites(self.path_manager)

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes a checkpoint; see :meth:`fvcore.common.checkpoint.Checkpointer.save`.

        Raises:
            UserError: the disk is full; earlier checkpoints remain.
            NonFiniteError: a weight is NaN or infinite.
        """
        if self.save_dir and self.save_to_disk:
            self._check_finite(name)
        last = self.get_checkpoint_file()
        remedy = "make room, then continue with --resume" + (f" from {last}" if last else "")
        with explained_full_disk(f"checkpoint {name}.pth in {self.save_dir}", remedy):
            if self._classes is not None:
                kwargs["classes"] = list(self._classes)
            super().save(name, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the checkpoint to resume from, which the best model is not."""
        if last_filename_basename != "model_best.pth":
            super().tag_last_checkpoint(last_filename_basename)

    def _check_finite(self, name: str) -> None:
        for key, value in self.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"checkpoint {name} is not written: {key} of the model is not finite; the "
                    f"last one is {self.get_checkpoint_file() or 'none'}"
                )

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the last checkpoint or else ``path``; see :meth:`Checkpointer.resume_or_load`.

        Raises:
            UserError: see :meth:`load`. If the last checkpoint cannot be loaded, the message names
                the others in its folder.
        """
        if not resume or not self.has_checkpoint():
            return super().resume_or_load(path, resume=resume)
        self._complete = True  # the checkpoint has all of the model, and its momentum
        try:
            last = self.get_checkpoint_file()
        except UnicodeDecodeError as error:
            name = os.path.join(self.save_dir, "last_checkpoint")
            raise UserError(f"cannot resume: {name!r} is not text: {error}") from error
        try:
            # Detectron2 writes the name of a file next to it.
            if Path(last).parent != Path(self.save_dir):
                raise UserError(f"{last!r} leads out of the folder")
            return super().resume_or_load(path, resume=resume)
        except UserError as error:
            others = sorted(set(self.get_all_checkpoint_files()) - {last})
            named = ", ".join(os.path.basename(each) for each in others) or "none"
            raise UserError(
                f"cannot resume: {error}. {os.path.join(self.save_dir, 'last_checkpoint')} names "
                f"the checkpoint to resume from; others there: {named}"
            ) from error

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict[str, Any]:
        """Loads a checkpoint; see :meth:`DetectionCheckpointer.load`.

        Raises:
            UserError: the file is not there, is not a checkpoint, or does not fit.
        """
        self._path = path
        if path and "://" not in path and not os.path.isfile(path.partition("?")[0]):
            raise UserError(
                f"no weights file {path!r}: MODEL.WEIGHTS names a file, or a URL that Detectron2 "
                "knows"
            )
        if not path and self._complete:
            raise UserError(
                "there are no weights: set MODEL.WEIGHTS (fpn-plugin evaluate --resume takes the "
                "last checkpoint in OUTPUT_DIR)"
            )
        try:
            loaded = super().load(path, checkpointables=[])
        except OSError as error:
            remedy = "; without a network, set MODEL.WEIGHTS to a file, or to '' for random weights"
            remedy = remedy if "://" in path else ""
            raise UserError(f"cannot read weights {path!r}: {error}{remedy}") from error
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in loaded:
                self._load_part(key, loaded.pop(key))
        return loaded

    def _load_part(self, key: str, state: Any) -> None:
        """Loads the state of the optimizer or the trainer."""
        try:
            iteration = a_dict(state).get("iteration", 0)
            if type(iteration) is not int:
                raise ValueError(f"its 'iteration' is {str(iteration)[:20]!r}, expected a number")
            self.checkpointables[key].load_state_dict(state)
        except UserError:
            raise
        except NO_CHECKPOINT as error:
            raise UserError(
                f"{key!r} of {self._path!r} cannot be loaded ({type(error).__name__}: "
                f"{one_line(error)}): is it from another config or another program?"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        with explained_reading(self._path):
            loaded = _detectron2_layout(read_file(filename), filename)
            queries = parse_qs(urlparse(self._path).query)
            if queries.pop("matching_heuristics", None) == ["True"]:
                loaded["matching_heuristics"] = True
            if queries and "__author__" not in loaded:
                raise ValueError(
                    f"?{'&'.join(queries)} is unknown; ?matching_heuristics=True is known"
                )
        if "__author__" in loaded:
            _LOGGER.info("Reading a file from %r", loaded["__author__"])
        return loaded

    def _with_prefix(self, checkpoint: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Renames a state dict of the bottom-up network by itself, of timm or torchvision."""
        given = checkpoint["model"]
        whole = any(name.removeprefix("module.") in state for name in given)  # of a detector
        if whole or checkpoint.get("matching_heuristics"):
            return
        network = _bottom_up(self.model)
        names = {id(module): name for name, module in self.model.named_modules()}
        found = network_weights(network.state_dict(), given)
        if len(found.tensors) > len(found.missing):
            prefix = names[id(network)]
            checkpoint["model"] = {f"{prefix}.{k}": value for k, value in found.tensors.items()}
            _LOGGER.info("%r is loaded as %s: %s", self._path, prefix, found.report())

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        state = self.model.state_dict()
        self._with_prefix(checkpoint, state)
        given = set(checkpoint["model"])
        dependent = _dependent(self.model, state)
        initial = {key: state[key].clone() for key in dependent}
        try:
            incompatible = super()._load_model(checkpoint)
        except NO_CHECKPOINT as error:  # matching names, or a tensor without values
            raise UserError(f"{self._path!r} does not fit this model: {one_line(error)}") from error
        wrong = {key: (saved, built) for key, saved, built in incompatible.incorrect_shapes}
        missing = [key for key in incompatible.missing_keys if key not in wrong]
        # torch never reports the tensors in which batch norms count batches as missing.
        parameters = [k for k in state if not k.endswith("num_batches_tracked")]
        if not set(parameters) - set(missing) - set(wrong):
            raise UserError(
                f"none of the {len(given)} tensors of {self._path!r} fits this model; the file "
                f"begins with {sorted(given)[:2]}, the model with {sorted(parameters)[:2]}; "
                f"{origin(given)}"
            )
        left = {
            key: dependent[key]
            for key, shapes in wrong.items()
            if key in dependent and _differ_in_one(*shapes, dependent[key].axis)
        }
        # Report the shapes that other data does not explain first.
        for key in sorted(wrong, key=lambda key: key in left):
            if self._complete or key not in left:
                saved, built = wrong[key]
                keys = left[key].keys if key in left else _keys_of(key)
                raise UserError(
                    f"{self._path!r} does not fit in {len(wrong)} tensors: {key} is {saved} in "
                    f"the file and {built} in the model; see {keys}"
                )
        if self._complete and missing:
            raise UserError(
                f"{self._path!r} lacks {len(missing)} of the model's {len(parameters)} tensors, "
                f"{', '.join(missing[:3])} among them; see {_keys_of(missing[0])}"
            )
        if left:
            # 9 anchors of 3 classes have the shape of 3 anchors of 9 classes. Only a tensor that
            # depends on one of the two can tell them apart.
            single = {row.on[0] for row in left.values() if len(row.on) == 1}
            for key, row in dependent.items():
                if len(row.on) > 1 and single & set(row.on) and key not in (*left, *missing):
                    state[key].copy_(initial[key])
                    left[key] = row
                    wrong[key] = (tuple(state[key].shape),) * 2
            _LOGGER.warning(self._left_out(left, wrong, len(parameters) - len(missing)))
            # Otherwise Detectron2 warns of each again.
            incompatible.incorrect_shapes.clear()
            incompatible.missing_keys[:] = missing
        return incompatible

    def _left_out(
        self, left: dict[str, _Dependent], shapes: dict[str, tuple[Any, Any]], of: int
    ) -> str:
        """One line that says which tensors are not loaded, and why."""
        reasons: dict[str, list[str]] = {}
        for key, row in left.items():
            saved, built = (shape[row.axis] for shape in shapes[key])
            reason = f"another number of {' or '.join(row.on)} ({row.keys})"
            reasons.setdefault(reason, []).append(f"{key} ({saved} in the file, {built} here)")
        listed = "; ".join(f"{reason}: {', '.join(keys)}" for reason, keys in reasons.items())
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        frozen = [key for key in left if key not in trained]
        if frozen:
            listed += (
                f". Frozen, so they stay random: {', '.join(frozen)}; MODEL.BACKBONE.FREEZE_AT 0 "
                "and MODEL.FPN.FREEZE False train them"
            )
        return (
            f"{self._path!r}: {of - len(left)} of {of} tensors are loaded, {len(left)} left out, "
            f"which start from random values. {listed}"
        )


def _dependent(model: nn.Module, state: dict[str, Tensor]) -> dict[str, _Dependent]:
    """Tensors that depend on the number of classes, keypoints, anchors or image channels."""
    found = {
        key: row
        for key in state
        if (row := next((row for row in _DEPENDENT if re.match(row.names, key)), None))
    }
    first = next((m for m in _bottom_up(model).modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        name = next(name for name, module in model.named_modules() if module is first)
        found[f"{name}.weight"] = _FIRST_CONVOLUTION
    return found


def _bottom_up(model: nn.Module) -> nn.Module:
    """The network under the pyramid, or the backbone; one of no tensors if there is neither."""
    backbone = getattr(model, "backbone", nn.Module())
    return getattr(backbone, "bottom_up", backbone)


def _differ_in_one(saved: Sequence[int], built: Sequence[int], axis: int) -> bool:
    """Whether two shapes differ in this dimension only."""
    places = [i for i, (a, b) in enumerate(zip(saved, built, strict=False)) if a != b]
    return len(saved) == len(built) and places == [axis]


def _keys_of(tensor: str) -> str:
    found = (keys for pattern, keys in _KEYS.items() if re.search(pattern, tensor))
    return next(found, "the config that the weights were trained with")
