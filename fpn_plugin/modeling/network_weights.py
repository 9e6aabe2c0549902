"""State dicts of networks in another library's names, or with another prefix."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from fpn_plugin.errors import UserError
from fpn_plugin.utils.weight_files import read_checkpoint, weights_of

__all__ = ["NetworkWeights", "load_network", "network_weights", "origin"]

logger = logging.getLogger(__name__)

# What names of tensors look like, whose they are, and what takes them; the first that is found.
_ORIGINS = (
    (
        r"(^|\.)(roi_heads\.box_predictor|proposal_generator|backbone\.fpn_)",
        "a detector of Detectron2 or of this plugin",
        "MODEL.WEIGHTS, with the config of its training",
    ),
    (
        r"(^|\.)backbone\.(body|fpn)\.",
        "a detector of torchvision",
        "fpn-plugin convert --from torchvision",
    ),
    (
        r"(^|\.)(neck\.lateral_convs|rpn_head\.rpn_)",
        "a detector of mmdetection",
        "fpn-plugin convert --from mmdet",
    ),
    (
        r"(^|\.)res2[._]0[._]",
        "a ResNet of Detectron2",
        "MODEL.WEIGHTS, with MODEL.FPN.BOTTOM_UP build_resnet_backbone",
    ),
    (
        r"(^|\.)_(blocks|conv_stem)\.",
        "a network of EfficientNet-PyTorch",
        "MODEL.TIMM.WEIGHTS, after its tensors are renamed as timm's",
    ),
    (
        r"(^|\.)layer1\.0\.",
        "a ResNet of timm or torchvision",
        "MODEL.TIMM.WEIGHTS or MODEL.TORCHVISION.WEIGHTS, with the NAME of its depth",
    ),
    (
        r"(^|\.)(features|trunk_output)\.",
        "a network of torchvision",
        "MODEL.TORCHVISION.WEIGHTS, with its MODEL.TORCHVISION.NAME",
    ),
    (
        r"(^|\.)(blocks|conv_stem|layers|patch_embed|stages|stem|stem_0|stages_0)[._]",
        "a network of timm",
        "MODEL.TIMM.WEIGHTS, with its MODEL.TIMM.NAME",
    ),
)


def origin(names: Iterable[str]) -> str:
    """What tensors of these names look like, and the key or command that takes them."""
    listed = list(names)
    for pattern, what, key in _ORIGINS:
        if any(re.search(pattern, name) for name in listed):
            return f"it looks like {what}, for {key}"
    return "it looks like no network of timm, torchvision or Detectron2"


class NetworkWeights(NamedTuple):
    """A file's tensors for a network.

    Attributes:
        tensors: by the network's names. Shapes may differ.
        prefix: of their names in the file, such as ``"backbone.bottom_up.net."``; "" if the
            network's names have it too.
        missing: the network's names that the file lacks.
        unused: parts of the file that the network has no place for, such as ``"fc"``.
    """

    tensors: dict[str, Tensor]
    prefix: str
    missing: list[str]
    unused: list[str]

    def report(self) -> str:
        """What is loaded and what is not, as part of a line."""
        count = len(self.tensors)
        text = f"{count} of {count + len(self.missing)} tensors are loaded"
        if self.prefix:
            text += f" from {self.prefix}*"
        if self.missing:
            text += f"; not in the file, so they stay as they were: {_some(self.missing)}"
        if self.unused:
            text += f"; the network has no place for {_some(self.unused)}"
        return text


def network_weights(state: dict[str, Tensor], given: dict[str, Tensor]) -> NetworkWeights:
    """Finds a network's tensors in a file, under any prefix.

    Feature extractors rename ``stages.0`` to ``stages_0``, and torchvision's older files have
    ``norm.1`` for ``norm1``: such names are the same.

    Args:
        state: of the network.
        given: of the file.
    """
    state, given = _counted(state), _counted(given)
    modules = [name.rpartition(".")[0].replace(".", "/") for name in state]
    common = posixpath.commonpath(modules or [""]).replace("/", ".")
    own = {_parts(name.removeprefix(f"{common}.")): name for name in state}
    ends: Counter[tuple[str, ...]] = Counter()
    for name in given:
        parts = _parts(name)
        ends.update(parts[:i] for i in range(len(parts)) if parts[i:] in own)
    prefix = max(ends, key=lambda each: (ends[each], -len(each)), default=())
    places = {
        name: own[parts[len(prefix) :]]
        for name in given
        if (parts := _parts(name))[: len(prefix)] == prefix and parts[len(prefix) :] in own
    }
    used = {name[:end] for name in places for end in _ends(name)}
    unused = dict.fromkeys(
        next(name[:end] for end in _ends(name) if name[:end] not in used)
        for name in given
        if name not in places
    )
    first = next(iter(places), "")
    shown = next((first[:end] for end in _ends(first) if _parts(first[:end]) == prefix), "")
    return NetworkWeights(
        {place: given[name] for name, place in places.items()},
        f"{shown}." if shown not in ("", common) else "",
        [name for name in state if name not in set(places.values())],
        list(unused),
    )


def load_network(network: nn.Module, path: str, key: str, what: str) -> None:
    """Loads a file of weights into a network, and logs what fits in one line.

    Args:
        network: of timm or torchvision, cut to its stages or not.
        path: .pth or .safetensors: a state dict of the network, or of a detector that has it.
        key: the config key that names the file, for messages.
        what: the network, for messages.

    Raises:
        UserError: the file cannot be read, is of another network, or has less than half of it.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"{key}: there is no file {path!r}; {key} '' builds {what} without it, which is enough "
            "to resume, or if MODEL.WEIGHTS is a detector"
        )
    try:
        given = weights_of(read_checkpoint(path), "model", "state_dict")
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {path!r} has no weights: {error}") from error
    state = network.state_dict()
    found = network_weights(state, given)
    if len(found.tensors) <= len(found.missing):
        raise UserError(
            f"{key}: {path!r} does not fit: of {what} it has {len(found.tensors)} of "
            f"{len(found.tensors) + len(found.missing)} tensors. It begins with "
            f"{list(given)[:2]}; {origin(given)}"
        )
    for name, tensor in found.tensors.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{key}: {path!r} is of another network: {name} is {tuple(tensor.shape)} in it and "
                f"{tuple(state[name].shape)} in {what}; see {key.rpartition('.')[0]}.NAME"
            )
    network.load_state_dict(found.tensors, strict=False)
    level = logging.WARNING if found.missing else logging.INFO
    logger.log(level, "%s: %r for %s: %s", key, path, what, found.report())


def _counted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the counters of batch norms, which not every file has."""
    return {k: tensor for k, tensor in state.items() if not k.endswith("num_batches_tracked")}


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a name without the differences of spelling; numbers are parts."""
    spaced = re.sub(r"(?<=[A-Za-z])(?=\d)", ".", name.replace("_", "."))
    return tuple(spaced.split("."))


def _ends(name: str) -> list[int]:
    """Where the modules that hold a tensor end in its name, and the name itself."""
    return [*(match.start() for match in re.finditer(r"\.", name)), len(name)]


def _some(names: list[str]) -> str:
    more = len(names) - 6
    return ", ".join(names[:6]) + (f" and {more} more" if more > 0 else "")
