"""Loading weights without running what is in their files, saying plainly where they do not fit,
and writing them so that no checkpoint is ever half there.
"""

from __future__ import annotations

import os
import pickle
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer, detection_checkpoint
from fvcore.common import checkpoint as fvcore_checkpoint
from torch import Tensor, nn

from fpn_plugin.errors import NonFiniteError, UserError
from fpn_plugin.utils.atomic import AtomicWrites, explained_full_disk
from fpn_plugin.utils.pickles import NO_PICKLE, load_arrays

__all__ = [
    "StrictCheckpointer",
    "classes_in",
    "read_checkpoint",
    "weights_of",
    "write_checkpoint",
]


@dataclass(frozen=True)
class _Dependent:
    """Tensors with a dimension that a model for other data has otherwise.

    Args:
        names: what their names match from the beginning.
        axis: the dimension.
        on: what it depends on.
        keys: the config keys that decide it.
    """

    names: str
    axis: int
    on: tuple[str, ...]
    keys: str


_BOXES = r"roi_heads\.box_predictor\.(\d+\.)?"  # cascades number their stages
_CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES (lazy: roi_heads.num_classes)"
_ANCHORS = "MODEL.ANCHOR_GENERATOR (lazy: anchor_generator, num_anchors)"
# Of all of Detectron2's architectures; FCOS has RetinaNet's names. The last row is for heads of
# one's own.
_DEPENDENT = (
    _Dependent(_BOXES + r"cls_score\.", 0, ("classes",), _CLASSES),
    _Dependent(
        _BOXES + r"bbox_pred\.", 0, ("classes",), f"{_CLASSES}, ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
    ),
    _Dependent(
        r"roi_heads\.mask_head\.predictor\.", 0, ("classes",),
        f"{_CLASSES}, ROI_MASK_HEAD.CLS_AGNOSTIC_MASK",
    ),
    # A transposed convolution: its weight begins with the dimension of the input.
    _Dependent(
        r"roi_heads\.keypoint_head\.score_lowres\.weight", 1, ("keypoints",),
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS (lazy: num_keypoints)",
    ),
    _Dependent(
        r"roi_heads\.keypoint_head\.score_lowres\.bias", 0, ("keypoints",),
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS (lazy: num_keypoints)",
    ),
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

# Where in a model a tensor lies, and the keys that else decide whether it is there and its shape.
_MENDED_BY = {
    r"fpn_": "MODEL.FPN.OUT_CHANNELS, IN_FEATURES, NORM",
    r"top_block": "MODEL.FPN.TOP_BLOCK, OUT_CHANNELS",
    r"bottom_up": "MODEL.RESNETS.DEPTH, NORM, NUM_GROUPS, WIDTH_PER_GROUP; MODEL.FPN.BOTTOM_UP",
    r"^backbone": "MODEL.BACKBONE.NAME; MODEL.RESNETS",
    r"^proposal_generator": "MODEL.ANCHOR_GENERATOR, MODEL.RPN; MODEL.FPN.OUT_CHANNELS",
    r"box_head|box_predictor": "MODEL.ROI_BOX_HEAD, MODEL.FPN.OUT_CHANNELS; MODEL.ROI_HEADS.NAME",
    r"mask_head": "MODEL.MASK_ON, MODEL.ROI_MASK_HEAD",
    r"keypoint_head": "MODEL.KEYPOINT_ON, MODEL.ROI_KEYPOINT_HEAD",
    r"^sem_seg_head": "MODEL.SEM_SEG_HEAD",
    r"^head\.": "MODEL.META_ARCHITECTURE, MODEL.RETINANET, MODEL.FPN.OUT_CHANNELS",
}

# What reading something else, or looking for weights in it, ends in.
_NO_CHECKPOINT = (*NO_PICKLE, AssertionError, RuntimeError)

_OF_TORCH_SAVE = (b"PK\x03\x04", b"\x80")  # an archive; before torch 1.6, pickles
_HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml")

_TRUSTED = (
    "Where its author is trusted: load it once with torch.load(..., weights_only=False) or pickle, "
    "and save its state dict with safetensors.torch.save_file"
)


class _WeightsOnly:
    """torch.load as every version of torch should have it by default."""

    device = torch.device

    @staticmethod
    def load(file: str | IO[bytes], map_location: Any = None) -> dict[Any, Any]:
        path = file if isinstance(file, str) else file.name
        _check_kind(path, _OF_TORCH_SAVE)
        try:
            return _a_dict(torch.load(file, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError as error:
            if "Weights only load failed" not in str(error):
                raise
            found = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
            raise UserError(
                f"it holds more than tensors{f', {found[1]} first' if found else ''}; loading that "
                "would run code that is in it"
            ) from error


class _ArraysOnly:
    """pickle.load of what holds arrays alone."""

    @staticmethod
    def load(file: IO[bytes], encoding: str = "latin1") -> dict[Any, Any]:
        return _a_dict(load_arrays(file, encoding))


def _a_dict(content: Any) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a value of type {_type(content)}, expected a dict of tensors")
    return content


def _type(value: Any) -> str:
    return type(value).__name__


def _check_kind(path: str, begins: tuple[bytes, ...] = (b"",)) -> None:
    """Refuses what is no file of weights at all, and archives of which torch before 2.6 runs code
    in spite of ``weights_only`` (CVE-2025-32434).

    Args:
        path: of a file.
        begins: how files of its kind may begin.

    Raises:
        ValueError: says what it is.
        UserError: it may hold code.
    """
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(0)
        if not head:
            raise ValueError("it is empty")
        if head.startswith(b"version https://git-lfs"):
            raise ValueError(
                "it is a pointer of git-lfs, which stands for the weights: get them by git lfs pull"
            )
        if head.lstrip().lower().startswith(_HTML):
            raise ValueError(
                "it is an HTML page, as a server gives that asks for a log-in or has an error: "
                "download the weights again"
            )
        if begins == _OF_TORCH_SAVE and _is_tar(file):
            raise UserError("it is a tar file, as torch before 0.1.10 wrote; these may run code")
    if not head.startswith(begins):
        raise ValueError(f"it begins with {head[:20]!r}, as no file of its kind does")
    if begins == _OF_TORCH_SAVE and head.startswith(_OF_TORCH_SAVE[0]):
        # By torch's own reader, as another might see another content.
        members = torch._C.PyTorchFileReader(path).get_all_records()
        if any(member.rpartition("/")[2] == "constants.pkl" for member in members):
            raise UserError(
                "it is a TorchScript archive, a program with its weights (it has constants.pkl)"
            )


def _is_tar(file: IO[bytes]) -> bool:
    try:
        with tarfile.open(fileobj=file, mode="r:"):  # as torch.load does
            return True
    except tarfile.TarError:
        return False


def weights_of(checkpoint: Any, *parts: str) -> dict[str, Tensor]:
    """The tensors that a checkpoint has by name.

    Args:
        checkpoint: what a file of weights holds.
        parts: names that the weights may have in it; it is the weights where it has none of them.

    Raises:
        ValueError: it is something else.
    """
    part = next((part for part in parts if isinstance(checkpoint, dict) and part in checkpoint), "")
    weights = checkpoint[part] if part else checkpoint
    where = f"its {part!r}" if part else "it"
    if not isinstance(weights, dict):
        told = f"{where} holds a value of type {_type(weights)}"
        raise ValueError(f"{told}, expected a dict of tensors")
    if not weights:
        raise ValueError(f"{where} holds no tensors")
    for key, value in weights.items():
        named = f"{where} has {str(key)[:60]!r}"
        if not isinstance(key, str):
            raise ValueError(f"{named} of type {_type(key)} for the name of a tensor")
        if not isinstance(value, Tensor | np.ndarray):
            raise ValueError(f"{named} of type {_type(value)}, expected a tensor")
        if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
            raise ValueError(f"{named} of dtype {value.dtype}, expected numbers")
    return {key: torch.as_tensor(value) for key, value in weights.items()}


def read_checkpoint(path: str | Path, *, trust_pickle: bool = False) -> dict[str, Any]:
    """What a weights file holds, read without running code that is in it.

    Args:
        path: ``.safetensors``; ``.pkl`` of arrays, as in Detectron2's model zoo; or any file of
            torch.save that holds tensors and plain values.
        trust_pickle: read files of torch.save that hold more, which runs code that is in them:
            for a file whose author is trusted.

    Raises:
        UserError: it cannot be read, would run code, or holds something else.
    """
    path = str(path)
    try:
        _check_kind(path)
        if path.endswith(".safetensors"):
            return {"model": safetensors.torch.load_file(path)}
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                return _ArraysOnly.load(file)
        if trust_pickle:
            return _a_dict(torch.load(path, map_location="cpu", weights_only=False))
        return _WeightsOnly.load(path)
    except UserError as error:
        raise UserError(f"{path!r} is not loaded: {error}. {_TRUSTED}") from error
    except OSError as error:
        raise UserError(f"cannot read weights {path!r}: {error.strerror or error}") from error
    except (*_NO_CHECKPOINT, safetensors.SafetensorError) as error:
        raise UserError(f"{path!r} is not a checkpoint: {_first_line(error)}") from error


def classes_in(path: str | Path) -> list[str] | None:
    """Names of the classes that a checkpoint's model was trained on, in its order.

    Args:
        path: of a file, which need not be there: whoever loads the weights says what is wrong.

    Returns:
        None where the file does not tell, as those of other programs.
    """
    try:
        _check_kind(str(path), _OF_TORCH_SAVE)
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except (*_NO_CHECKPOINT, OSError):
        return None
    classes = content.get("classes") if isinstance(content, dict) else None
    if type(classes) is not list or not all(type(name) is str for name in classes):
        return None
    return classes


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_checkpoint(state: dict[str, Tensor], path: str | Path, *, bare: bool = False) -> None:
    """Writes a state dict.

    Args:
        state: tensors by name.
        path: ``.safetensors``, or anything else for torch.save.
        bare: whether torch.save's file holds the state dict itself, as torchvision's do, instead
            of ``{"model": state dict}``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state if bare else {"model": state}, path)


class StrictCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that refuses weights which would leave a model half random, and
    whose files are written aside, put on the disk and then named.

    Starting a training from weights that lack parts (a backbone's) is ordinary and goes on as in
    Detectron2, with its warnings. So is one from a detector of other classes, keypoints, anchors
    or channels of the image: the tensors that depend on their number are left out, and one line
    says which. What is refused: a file of which nothing fits; a tensor of another shape for any
    other reason; and, where ``complete`` is asked for or a training is resumed, any parameter that
    the file does not give. No code that a file holds is run: see :func:`read_checkpoint`.

    Args:
        model: the model to load into.
        save_dir: where checkpoints are kept.
        complete: whether a file must give every parameter, as for evaluation.
        classes: names of the model's classes in its order, kept in each checkpoint; None: not
            known.
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
            UserError: there is no space for it; earlier checkpoints are as they were.
            NonFiniteError: a weight is NaN or infinite; nothing could go on from it.
        """
        if self.save_dir and self.save_to_disk:
            self._check_finite(name)
        last = self.get_checkpoint_file()
        remedy = "make room, then go on with --resume" + (f" from {last}" if last else "")
        with explained_full_disk(f"checkpoint {name}.pth in {self.save_dir}", remedy):
            if self._classes is not None:
                kwargs["classes"] = list(self._classes)
            super().save(name, **kwargs)

    def _check_finite(self, name: str) -> None:
        for key, value in self.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"checkpoint {name} is not written: {key} of the model is not finite; the "
                    f"last one is {self.get_checkpoint_file() or 'none'}"
                )

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the last checkpoint or else ``path``; see
        :meth:`fvcore.common.checkpoint.Checkpointer.resume_or_load`.

        Raises:
            UserError: as :meth:`load`; a last checkpoint that cannot be read, as another program
                may have left it, or that is of another model, is told with those that are beside
                it.
        """
        if not resume or not self.has_checkpoint():
            return super().resume_or_load(path, resume=resume)
        self._complete = True  # the model and its momentum are those of the checkpoint
        try:
            last = self.get_checkpoint_file()
        except UnicodeDecodeError as error:
            told = os.path.join(self.save_dir, "last_checkpoint")
            raise UserError(f"cannot resume: {told!r} is no text: {error}") from error
        try:
            # As it is written: the name of a file beside it.
            if Path(last).parent != Path(self.save_dir):
                raise UserError(f"{last!r} leads out of the folder")
            return super().resume_or_load(path, resume=resume)
        except UserError as error:
            others = sorted(set(self.get_all_checkpoint_files()) - {last})
            named = ", ".join(os.path.basename(each) for each in others) or "none"
            raise UserError(
                f"cannot resume: {error}. {os.path.join(self.save_dir, 'last_checkpoint')} names "
                f"the checkpoint to go on from; others there: {named}"
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
                "there are no weights: set MODEL.WEIGHTS (train_net.py --eval-only --resume takes "
                "the last ones in OUTPUT_DIR)"
            )
        try:
            loaded = super().load(path, checkpointables=[])
        except OSError as error:
            remedy = (
                '; a file that you have, or MODEL.WEIGHTS "" for training from scratch, needs no '
                "network"
                if "://" in path
                else ""
            )
            raise UserError(f"cannot read weights {path!r}: {error}{remedy}") from error
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in loaded:
                self._load_part(key, loaded.pop(key))
        return loaded

    def _load_part(self, key: str, state: Any) -> None:
        """Loads what a checkpoint has beside the weights: of the optimizer, of the trainer."""
        try:
            iteration = _a_dict(state).get("iteration", 0)
            if type(iteration) is not int:
                raise ValueError(f"its 'iteration' is {str(iteration)[:20]!r}, expected a number")
            self.checkpointables[key].load_state_dict(state)
        except UserError:
            raise
        except _NO_CHECKPOINT as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"{key!r} of {self._path!r} cannot be gone on from ({told}): is it of another "
                "config, or of another program?"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        # Detectron2 sorts out whose layout a pickle has; it is given one that runs nothing.
        in_safetensors = filename.endswith(".safetensors")
        loaded = read_checkpoint(filename) if in_safetensors else {}
        try:
            with (
                mock.patch.object(detection_checkpoint, "pickle", _ArraysOnly),
                mock.patch.object(detection_checkpoint, "torch", _WeightsOnly),
                # Detectron2 0.6 has no _torch_load and leaves reading to fvcore.
                mock.patch.object(fvcore_checkpoint, "torch", _WeightsOnly),
            ):
                if not in_safetensors:
                    _check_kind(filename)
                    loaded = super()._load_file(filename)
            loaded["model"] = weights_of(loaded["model"])
            return loaded
        except UserError as error:
            raise UserError(f"{self._path!r} is not loaded: {error}. {_TRUSTED}") from error
        except _NO_CHECKPOINT as error:
            raise UserError(f"{self._path!r} is not a checkpoint: {_first_line(error)}") from error

    def _torch_load(self, f: str) -> dict[str, Any]:
        return _WeightsOnly.load(f)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        given = set(checkpoint["model"])
        state = self.model.state_dict()
        dependent = _dependent(self.model, state)
        initial = {key: state[key].clone() for key in dependent}
        try:
            incompatible = super()._load_model(checkpoint)
        except _NO_CHECKPOINT as error:  # matching names, or a tensor without values
            told = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self._path!r} does not fit this model: {told}") from error
        wrong = {key: (saved, built) for key, saved, built in incompatible.incorrect_shapes}
        missing = [key for key in incompatible.missing_keys if key not in wrong]
        # BN counts its batches in a tensor that is never missing.
        parameters = [k for k in state if not k.endswith("num_batches_tracked")]
        if not set(parameters) - set(missing) - set(wrong):
            raise UserError(
                f"none of the {len(given)} tensors of {self._path!r} fits this model; the file "
                f"begins with {sorted(given)[:2]}, the model with {sorted(parameters)[:2]}"
            )
        left = {
            key: dependent[key]
            for key, shapes in wrong.items()
            if key in dependent and _differ_in_one(*shapes, dependent[key].axis)
        }
        # What does not fit for a reason that no data explains is told first.
        for key in sorted(wrong, key=lambda key: key in left):
            if self._complete or key not in left:
                saved, built = wrong[key]
                keys = left[key].keys if key in left else _mended_by(key)
                raise UserError(
                    f"{self._path!r} does not fit in {len(wrong)} tensors: {key} is {saved} in "
                    f"the file and {built} in the model; see {keys}"
                )
        if self._complete and missing:
            raise UserError(
                f"{self._path!r} lacks {len(missing)} of the model's {len(parameters)} tensors, "
                f"{', '.join(missing[:3])} among them; see {_mended_by(missing[0])}"
            )
        if left:
            # 9 anchors of 3 classes have the shape of 3 anchors of 9: only what depends on one of
            # the two tells them apart.
            single = {row.on[0] for row in left.values() if len(row.on) == 1}
            for key, row in dependent.items():
                if len(row.on) > 1 and single & set(row.on) and key not in (*left, *missing):
                    state[key].copy_(initial[key])
                    left[key] = row
                    wrong[key] = (tuple(state[key].shape),) * 2
            self.logger.warning(self._left_out(left, wrong, len(parameters) - len(missing)))
            # They are told: Detectron2 would warn of each once more.
            incompatible.incorrect_shapes.clear()
            incompatible.missing_keys[:] = missing
        return incompatible

    def _left_out(
        self, left: dict[str, _Dependent], shapes: dict[str, tuple[Any, Any]], of: int
    ) -> str:
        """Which tensors were not loaded and why, in one line."""
        reasons: dict[str, list[str]] = {}
        for key, row in left.items():
            saved, built = (shape[row.axis] for shape in shapes[key])
            reason = f"another number of {' or '.join(row.on)} ({row.keys})"
            reasons.setdefault(reason, []).append(f"{key} ({saved} in the file, {built} here)")
        told = "; ".join(f"{reason}: {', '.join(keys)}" for reason, keys in reasons.items())
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        frozen = [key for key in left if key not in trained]
        if frozen:
            told += (
                f". Frozen, and so random for good: {', '.join(frozen)}; MODEL.BACKBONE.FREEZE_AT "
                "0 and MODEL.FPN.FREEZE False train all"
            )
        return (
            f"{self._path!r}: {of - len(left)} of {of} tensors are loaded, {len(left)} left out, "
            f"which start from random values. {told}"
        )


def _dependent(model: nn.Module, state: dict[str, Tensor]) -> dict[str, _Dependent]:
    """The tensors of a model that depend on its classes, keypoints, anchors or image channels."""
    found = {
        key: row
        for key in state
        if (row := next((row for row in _DEPENDENT if re.match(row.names, key)), None))
    }
    backbone = getattr(model, "backbone", nn.Module())
    network = getattr(backbone, "bottom_up", backbone)
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        name = next(name for name, module in model.named_modules() if module is first)
        found[f"{name}.weight"] = _FIRST_CONVOLUTION
    return found


def _differ_in_one(saved: Sequence[int], built: Sequence[int], axis: int) -> bool:
    """Whether two shapes differ in one dimension only, this one."""
    places = [i for i, (a, b) in enumerate(zip(saved, built, strict=False)) if a != b]
    return len(saved) == len(built) and places == [axis]


def _mended_by(key: str) -> str:
    for part, config_keys in _MENDED_BY.items():
        if re.search(part, key):
            return config_keys
    return "the config that the weights were trained with"
