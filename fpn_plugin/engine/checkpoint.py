"""Loading weights without running what is in their files, saying plainly where they do not fit,
and writing them so that no checkpoint is ever half there.
"""

from __future__ import annotations

import os
import pickle
import re
import types
from pathlib import Path
from typing import IO, Any
from unittest import mock

import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer, detection_checkpoint
from torch import Tensor, nn

from fpn_plugin.errors import NonFiniteError, UserError
from fpn_plugin.unpickling import load_arrays

from .atomic import AtomicWrites, explained_full_disk

__all__ = ["FittingCheckpointer", "read_checkpoint", "write_checkpoint"]

# Where in a model a tensor lies, and the keys that decide whether it is there and its shape.
_MENDED_BY = {
    "fpn_": "MODEL.FPN.OUT_CHANNELS, IN_FEATURES, NORM",
    "top_block": "MODEL.FPN.TOP_BLOCK",
    "bottom_up": "MODEL.RESNETS.DEPTH, NORM; MODEL.FPN.BOTTOM_UP",
    "proposal_generator": "MODEL.ANCHOR_GENERATOR, MODEL.RPN",
    "predictor": "MODEL.ROI_HEADS.NUM_CLASSES",
    "box_head": "MODEL.ROI_BOX_HEAD, MODEL.FPN.OUT_CHANNELS",
    "mask_head": "MODEL.MASK_ON, MODEL.ROI_MASK_HEAD",
    "keypoint_head": "MODEL.KEYPOINT_ON, MODEL.ROI_KEYPOINT_HEAD",
}

# What unpickling something else, or looking for weights in it, ends in.
_NO_CHECKPOINT = (
    AssertionError,
    AttributeError,
    EOFError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


_TRUSTED = (
    "Where its author is trusted: load it once with torch.load(..., weights_only=False) or pickle, "
    "and save its state dict with safetensors.torch.save_file"
)


class _WeightsOnly:
    """torch.load as every version of torch should have it by default."""

    @staticmethod
    def load(file: str | IO[bytes]) -> dict[str, Any]:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "Weights only load failed" not in str(error):
                raise
            found = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
            raise UserError(
                f"it holds more than tensors{f', {found[1]} first' if found else ''}; loading that "
                "would run code that is in it"
            ) from error


def read_checkpoint(path: str | Path, *, trust_pickle: bool = False) -> dict[str, Any]:
    """What a weights file holds, read without running code that is in it.

    Args:
        path: ``.safetensors``; ``.pkl`` of arrays, as in Detectron2's model zoo; or any file of
            torch.save that holds tensors and plain values.
        trust_pickle: read files of torch.save that hold more, which runs code that is in them:
            for a file whose author is trusted.

    Raises:
        UserError: it cannot be read, or would run code.
    """
    path = str(path)
    try:
        if path.endswith(".safetensors"):
            return {"model": safetensors.torch.load_file(path)}
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                return load_arrays(file)
        if trust_pickle:
            return torch.load(path, map_location="cpu", weights_only=False)
        return _WeightsOnly.load(path)
    except UserError as error:
        raise UserError(f"{path!r} is not loaded: {error}. {_TRUSTED}") from error
    except OSError as error:
        raise UserError(f"cannot read weights {path!r}: {error.strerror or error}") from error
    except (*_NO_CHECKPOINT, safetensors.SafetensorError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path!r} is not a checkpoint: {first_line}") from error


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


class FittingCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that refuses weights which would leave a model half random, and
    whose files are written aside, put on the disk and then named.

    Starting a training from weights that lack parts (a backbone's, or a detector's of other
    classes) is ordinary and goes on as in Detectron2, with its warnings. What is refused: a file
    of which nothing fits; a tensor of another shape anywhere but in a predictor; and, where
    ``complete`` is asked for, any parameter that the file does not give. No code that a file
    holds is run: see :func:`read_checkpoint`.

    Args:
        model: the model to load into.
        save_dir: where checkpoints are kept.
        complete: whether a file must give every parameter, as for evaluation.
        checkpointables: see :class:`fvcore.common.checkpoint.Checkpointer`.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        complete: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
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
                may have left it, is told with those that are beside it.
        """
        if not resume or not self.has_checkpoint():
            return super().resume_or_load(path, resume=resume)
        last = self.get_checkpoint_file()
        try:
            return super().resume_or_load(path, resume=resume)
        except UserError as error:
            others = sorted(set(self.get_all_checkpoint_files()) - {last})
            named = ", ".join(os.path.basename(each) for each in others) or "none"
            raise UserError(
                f"cannot resume: {error}. {os.path.join(self.save_dir, 'last_checkpoint')} names "
                f"the checkpoint to go on from; others there: {named}"
            ) from error

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
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
            return super().load(path, *args, **kwargs)
        except OSError as error:
            remedy = (
                '; a file that you have, or MODEL.WEIGHTS "" for training from scratch, needs no '
                "network"
                if "://" in path
                else ""
            )
            raise UserError(f"cannot read weights {path!r}: {error}{remedy}") from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        # Detectron2 sorts out whose layout a pickle has; it is given one that runs nothing.
        harmless = types.SimpleNamespace(load=load_arrays)
        try:
            if filename.endswith(".safetensors"):
                return read_checkpoint(filename)
            with (
                mock.patch.object(detection_checkpoint, "pickle", harmless),
                mock.patch.object(detection_checkpoint, "torch", _WeightsOnly),
            ):
                return super()._load_file(filename)
        except UserError as error:
            raise UserError(f"{self._path!r} is not loaded: {error}. {_TRUSTED}") from error
        except _NO_CHECKPOINT as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self._path!r} is not a checkpoint: {first_line}") from error

    def _torch_load(self, f: str) -> dict[str, Any]:
        return _WeightsOnly.load(f)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        given = set(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        wrong = {key: (saved, built) for key, saved, built in incompatible.incorrect_shapes}
        missing = [key for key in incompatible.missing_keys if key not in wrong]
        # BN counts its batches in a tensor that is never missing.
        parameters = [k for k in self.model.state_dict() if not k.endswith("num_batches_tracked")]
        if not set(parameters) - set(missing) - set(wrong):
            raise UserError(
                f"none of the {len(given)} tensors of {self._path!r} fits this model; the file "
                f"begins with {sorted(given)[:2]}, the model with {sorted(parameters)[:2]}"
            )
        for key, (saved, built) in wrong.items():
            if self._complete or "predictor" not in key:
                raise UserError(
                    f"{self._path!r} does not fit in {len(wrong)} tensors: {key} is {saved} in "
                    f"the file and {built} in the model; see {_mended_by(key)}"
                )
        if self._complete and missing:
            raise UserError(
                f"{self._path!r} lacks {len(missing)} of the model's {len(parameters)} tensors, "
                f"{', '.join(missing[:3])} among them; see {_mended_by(missing[0])}"
            )
        return incompatible


def _mended_by(key: str) -> str:
    for part, config_keys in _MENDED_BY.items():
        if part in key:
            return config_keys
    return "the config that the weights were trained with"
