"""Classification networks of timm and of torchvision as bottom-up pathways (paper, section 3)."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Sequence

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from fpn_plugin.errors import UserError, near_names, one_line

from .network_weights import load_network
from .scripting import spelt_out

__all__ = [
    "ImageNetwork",
    "as_cfg_node",
    "build_timm_backbone",
    "build_torchvision_backbone",
    "without_network_weights",
]

_LOGGER = logging.getLogger(__name__)
_CONVERTERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "FrozenBN": FrozenBatchNorm2d.convert_frozen_batchnorm,
    "SyncBN": nn.SyncBatchNorm.convert_sync_batchnorm,
}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A network runs once on this size: sides that differ, multiples of 32, not the size of training.
_TEST_SIZE = (128, 160)
_ODD_SIZE = (101, 131)


def as_cfg_node(cfg: CfgNode | DictConfig) -> CfgNode:
    """A config as a CfgNode; OmegaConf may have made it a DictConfig."""
    return cfg if isinstance(cfg, CfgNode) else CfgNode(OmegaConf.to_container(cfg, resolve=True))


class ImageNetwork(Backbone):
    """A network for RGB images in [0, 1] with its own mean and deviation.

    Detectron2's models normalise images as their config says. This class reverts that and
    normalises as the network was trained, so that PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT need not
    change for its weights.

    Args:
        net: returns a map for each stage, as a list or an ordered dict, finest first.
        strides: of the stages, in input pixels; stage k of stride 2^k is named ``res{k}``.
        out_features: the stages to return; the others are only there to be frozen.
        channels: of the stages.
        channels_last: whether maps are ``(N, H, W, C)``.
        mean: of the images on which the network was trained, RGB in [0, 1].
        std: their standard deviation.
        cfg: MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT and MODEL.BACKBONE.FREEZE_AT are
            read. FREEZE_AT 0 freezes nothing, k >= 2 all parameters that ``res{k}`` depends on.
        norm: "FrozenBN" or "SyncBN" convert the network's batch norms, "" keeps them. "auto" is
            "FrozenBN" for weights of the network or in MODEL.WEIGHTS. Without any it is "", and
            nothing is frozen.
        pretrained: whether the network has weights.
        converters: the functions that convert them, by these two names; Detectron2's and torch's
            by default. Networks whose batch norms do more than normalise have their own.

    Raises:
        UserError: the network does not take images of any size or returns other maps than
            declared, or FREEZE_AT or norm are none of the above.
    """

    def __init__(
        self,
        net: nn.Module,
        strides: Sequence[int],
        channels: Sequence[int],
        out_features: Sequence[str],
        *,
        channels_last: bool = False,
        mean: Sequence[float] = _IMAGENET_MEAN,
        std: Sequence[float] = _IMAGENET_STD,
        cfg: CfgNode,
        norm: str = "",
        pretrained: bool = True,
        converters: dict[str, Callable[[nn.Module], nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        converters = _CONVERTERS if converters is None else converters
        freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
        if norm == "auto" and (pretrained or cfg.MODEL.WEIGHTS):
            norm = "FrozenBN"
        elif norm == "auto":
            norm, freeze_at = "", 0
            _LOGGER.info(
                "No weights are given for %s: all of it is trained, from random values. With "
                "pretrained weights fewer images are enough",
                type(net).__name__,
            )
        if norm and norm not in converters:
            names = near_names(norm, [*converters, "auto"])
            raise UserError(f"NORM {norm!r} is unknown: {names} Or none, ''")
        names = [f"res{stride.bit_length() - 1}" for stride in strides]
        self._stages = names
        self._out_features = [name for name in names if name in out_features]
        self._out_feature_strides = dict(zip(names, strides, strict=True))
        self._out_feature_channels = dict(zip(names, channels, strict=True))
        self._channels_last = channels_last
        self._set_input(cfg, mean, std)
        self.net = net
        maps = self._checked_maps()
        self._size_divisibility = self._needed_divisibility()
        self._freeze(maps, freeze_at, converters["FrozenBN"])
        if norm:
            self.net = converters[norm](self.net)
        self._frozen_norms = converters["FrozenBN"]

    def _set_input(self, cfg: CfgNode, mean: Sequence[float], std: Sequence[float]) -> None:
        """One factor and one shift a channel from the model's normalisation to the network's."""
        flip = cfg.INPUT.FORMAT == "BGR"
        if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
            raise UserError(
                f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; timm's and torchvision's networks take "
                "colours: set it RGB or BGR"
            )
        order = slice(None, None, -1) if flip else slice(None)
        for key in ("PIXEL_MEAN", "PIXEL_STD"):
            if len(cfg.MODEL[key]) != 3:
                raise UserError(
                    f"MODEL.{key} is {list(cfg.MODEL[key])}; timm's and torchvision's networks "
                    "take three channels: give it three values"
                )
        model_mean = torch.tensor(cfg.MODEL.PIXEL_MEAN[order]) / 255
        model_std = torch.tensor(cfg.MODEL.PIXEL_STD[order]) / 255
        own_mean, own_std = torch.tensor(mean), torch.tensor(std)
        self._flip = flip
        scale, shift = model_std / own_std, (model_mean - own_mean) / own_std
        self.register_buffer("_scale", scale.view(-1, 1, 1), persistent=False)
        self.register_buffer("_shift", shift.view(-1, 1, 1), persistent=False)

    def freeze_norms(self) -> None:
        """Makes every batch norm one that keeps its statistics."""
        self.net = self._frozen_norms(self.net)

    @property
    def size_divisibility(self) -> int:
        """What input sides, in pixels, must be multiples of; 0 if any size works."""
        return self._size_divisibility

    def _needed_divisibility(self) -> int:
        """0 for a network that takes an image of odd sides, else its coarsest stride."""
        was_training = self.net.training
        self.net.eval()
        try:
            with torch.no_grad():
                self(torch.zeros(1, 3, *_ODD_SIZE))
        except (RuntimeError, AssertionError, ValueError):
            return max(self._out_feature_strides.values())
        finally:
            self.net.train(was_training)
        return 0

    def _checked_maps(self) -> dict[str, Tensor]:
        """Maps of a small image, which must be as declared."""
        height, width = _TEST_SIZE
        was_training = self.net.training
        self.net.eval()
        try:
            given = self.net(self._normalised(torch.zeros(1, 3, height, width)))
            self._keys = list(given if isinstance(given, dict) else range(len(given)))
            maps = self._by_stage(given)
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            raise UserError(_no_such_size(self.net, error)) from error
        finally:
            self.net.train(was_training)
        for name, stride in self._out_feature_strides.items():
            expected = (1, self._out_feature_channels[name], height // stride, width // stride)
            if tuple(maps[name].shape) != expected:
                raise UserError(
                    f"{name} of {type(self.net).__name__} is {tuple(maps[name].shape)} for an "
                    f"image of {height} x {width} px; stride {stride} would be {expected}"
                )
        return maps

    def _freeze(
        self,
        maps: dict[str, Tensor],
        freeze_at: int,
        freeze_norm: Callable[[nn.Module], nn.Module],
    ) -> None:
        """Freezes the parameters that a stage depends on, and the batch norms among them."""
        if freeze_at == 0:
            return
        name = f"res{freeze_at}"
        if name not in maps:
            raise UserError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but {name} is not among this network's "
                f"stages {self._stages}: 0 freezes nothing"
            )
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(maps[name].sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad = gradient is None
        for path, module in list(self.net.named_modules()):
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if norm and module.affine and not module.weight.requires_grad:
                parent, _, last = path.rpartition(".")
                setattr(self.net.get_submodule(parent), last, freeze_norm(module))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the stages.

        Args:
            x: ``(N, 3, H, W)``, normalised as the model's config says.

        Returns:
            ``{"res2": (N, C, H / 4, W / 4), ...}``, finest first.
        """
        maps = self._by_stage(self.net(self._normalised(x)))
        return {name: maps[name] for name in self._out_features}

    def _normalised(self, x: Tensor) -> Tensor:
        x = x.flip(1) if self._flip else x
        return x * self._scale + self._shift

    def _by_stage(self, given: list[Tensor] | dict[str, Tensor]) -> dict[str, Tensor]:
        maps = [given[key] for key in self._keys]
        if self._channels_last:
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        return dict(zip(self._stages, maps, strict=True))

    def __prepare_scriptable__(self) -> ImageNetwork:
        return spelt_out(self)


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode | DictConfig, input_shape: ShapeSpec) -> ImageNetwork:
    """A network of timm that offers ``features_only``: most CNNs and hierarchical transformers.

    MODEL.TIMM names it. Stages are named by their stride, res2 to res5.

    Args:
        cfg: a config with the plugin's keys, see :func:`fpn_plugin.add_fpn_config`.
        input_shape: channels of the input image; must be 3.

    Raises:
        UserError: timm is not installed, has no network of that name or cannot fetch its weights,
            the file of weights does not fit, or the network lacks the stages or stochastic depth.
    """
    cfg = as_cfg_node(cfg)
    node = cfg.MODEL.TIMM
    if not 0 <= node.DROP_PATH < 1:
        raise UserError(
            f"MODEL.TIMM.DROP_PATH is {node.DROP_PATH}: a rate from 0, for none, to below 1 is "
            "expected"
        )
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "build_timm_backbone needs timm, which is not installed: pip install 'fpn_plugin[timm]'"
        ) from error
    base = node.NAME.partition(".")[0]
    if not timm.is_model(base):
        raise UserError(
            f"MODEL.TIMM.NAME {node.NAME!r} is no model of timm {timm.__version__}: "
            f"{near_names(base, timm.list_models())}"
        )

    def create(**kwargs: object) -> nn.Module:
        return _create_timm(timm.create_model, node, **kwargs)

    with torch.device("meta"):
        info = create().feature_info
    wanted = _wanted_strides(node.OUT_FEATURES, "MODEL.TIMM.OUT_FEATURES")
    wanted = _with_frozen(wanted, info.reduction(), cfg)
    what = f"timm's {node.NAME}"
    chosen = _chosen(wanted, info.reduction(), what, "MODEL.TIMM.OUT_FEATURES")
    indices = tuple(info.out_indices[i] for i in chosen)
    try:
        net = create(pretrained=node.PRETRAINED and not node.WEIGHTS, out_indices=indices)
    except OSError as error:  # the hub's and the system's for what cannot be fetched
        raise UserError(
            f"timm's weights of {node.NAME} cannot be fetched: {one_line(error)}; "
            "MODEL.TIMM.PRETRAINED False builds it without, MODEL.TIMM.WEIGHTS takes a file"
        ) from error
    if node.WEIGHTS:
        load_network(net, node.WEIGHTS, "MODEL.TIMM.WEIGHTS", what)
    config = timm.data.resolve_model_data_config(net)
    return ImageNetwork(
        net,
        wanted,
        net.feature_info.channels(),
        node.OUT_FEATURES,
        channels_last=getattr(net, "output_fmt", "NCHW") == "NHWC",
        mean=config["mean"],
        std=config["std"],
        cfg=cfg,
        norm=node.NORM,
        pretrained=bool(node.PRETRAINED or node.WEIGHTS),
        # Some of timm's batch norms hold the activation too, which other converters would drop.
        converters={
            "FrozenBN": timm.layers.freeze_batch_norm_2d,
            "SyncBN": timm.layers.convert_sync_batchnorm,
        },
    )


def _create_timm(
    create_model: Callable[..., nn.Module], node: CfgNode, **kwargs: object
) -> nn.Module:
    """A network for input of any size, and with stochastic depth, if its class supports them."""
    # Windowed transformers otherwise take only the size of training, and some networks have
    # stochastic depth by default.
    options = {"strict_img_size": False, "drop_path_rate": node.DROP_PATH}
    while True:
        try:
            return create_model(node.NAME, features_only=True, **options, **kwargs)
        except (TypeError, RuntimeError, AttributeError, AssertionError) as error:
            unknown = next((word for word in options if word in str(error)), None)
            if unknown == "drop_path_rate" and node.DROP_PATH:
                raise UserError(
                    f"MODEL.TIMM.DROP_PATH is {node.DROP_PATH}, and timm's {node.NAME} has no "
                    "stochastic depth: set it 0.0"
                ) from error
            if unknown is None or not isinstance(error, TypeError):
                raise UserError(
                    f"timm's {node.NAME} gives no feature maps: {one_line(error)}"
                ) from error
            del options[unknown]


@BACKBONE_REGISTRY.register()
def build_torchvision_backbone(cfg: CfgNode | DictConfig, input_shape: ShapeSpec) -> ImageNetwork:
    """A classification network of torchvision: ResNet, RegNet, ConvNeXt, MobileNet, and others.

    MODEL.TORCHVISION names it. A stage is the last block of its stride, as in the paper (section
    3). A single convolution for the classifier is no stage.

    Args:
        cfg: a config with the plugin's keys, see :func:`fpn_plugin.add_fpn_config`.
        input_shape: channels of the input image; must be 3.

    Raises:
        UserError: torchvision has no network or weights of that name or cannot fetch them, the file
            of weights does not fit, or the network lacks the stages.
    """
    cfg = as_cfg_node(cfg)
    node = cfg.MODEL.TORCHVISION
    known = torchvision.models.list_models(module=torchvision.models)
    if node.NAME not in known:
        raise UserError(
            f"MODEL.TORCHVISION.NAME {node.NAME!r} is no classification network of torchvision "
            f"{torchvision.__version__}: {near_names(node.NAME, known)}"
        )
    known_weights = torchvision.models.get_model_weights(node.NAME).__members__
    name = node.WEIGHTS if node.WEIGHTS in known_weights else ""
    if not name and node.WEIGHTS and not _is_file(node.WEIGHTS):
        raise UserError(
            f"MODEL.TORCHVISION.WEIGHTS {node.WEIGHTS!r} is not known for {node.NAME}: "
            f"{near_names(node.WEIGHTS, known_weights)} Or a file, or an empty string for none"
        )
    try:
        net = torchvision.models.get_model(node.NAME, weights=name or None)
    except OSError as error:  # urllib's for what cannot be fetched
        raise UserError(
            f"torchvision's weights {node.WEIGHTS} of {node.NAME} cannot be fetched: "
            f"{one_line(error)}; MODEL.TORCHVISION.WEIGHTS '' builds it without, or takes a file"
        ) from error
    blocks = _torchvision_blocks(net)
    strides = [stride for _, stride, _ in blocks]
    wanted = _wanted_strides(node.OUT_FEATURES, "MODEL.TORCHVISION.OUT_FEATURES")
    wanted = _with_frozen(wanted, strides, cfg)
    indices = _chosen(
        wanted, strides, f"torchvision's {node.NAME}", "MODEL.TORCHVISION.OUT_FEATURES"
    )
    chosen = [blocks[i] for i in indices]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nodes differ between training and evaluation
        extractor = create_feature_extractor(net, {path: path for path, _, _ in chosen})
    if node.WEIGHTS and not name:
        what = f"torchvision's {node.NAME}"
        load_network(extractor, node.WEIGHTS, "MODEL.TORCHVISION.WEIGHTS", what)
    preset = known_weights[name or "DEFAULT"].transforms()
    return ImageNetwork(
        extractor,
        wanted,
        [channels for _, _, channels in chosen],
        node.OUT_FEATURES,
        mean=preset.mean,
        std=preset.std,
        cfg=cfg,
        norm=node.NORM,
        pretrained=bool(node.WEIGHTS),
    )


def without_network_weights(cfg: CfgNode) -> CfgNode:
    """A copy of a config whose network reads no weights of its own.

    It is for models whose weights are all loaded from a checkpoint, also where the network's file
    is not.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if "TIMM" in cfg.MODEL:
        cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, ""
    # A name of torchvision's stays if it says that images are normalised in another way.
    node = cfg.MODEL.get("TORCHVISION")
    if node and (_is_file(node.WEIGHTS) or _has_usual_input(node.NAME, node.WEIGHTS)):
        node.WEIGHTS = ""
    return cfg


def _has_usual_input(name: str, weights: str) -> bool:
    """Whether torchvision normalises images for a network's weights as it does for "DEFAULT"."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        return False
    known = torchvision.models.get_model_weights(name).__members__
    inputs = [known[each].transforms() for each in ("DEFAULT", weights) if each in known]
    return len({(tuple(given.mean), tuple(given.std)) for given in inputs}) == 1


def _is_file(weights: str) -> bool:
    """Whether MODEL.TORCHVISION.WEIGHTS is a file: torchvision's names have no dots or slashes."""
    return re.search(r"[./\\]", weights) is not None


def _torchvision_blocks(net: nn.Module) -> list[tuple[str, int, int]]:
    """``(path, stride, channels)`` of a network's blocks, in order of their computation."""
    holders = ("features", "trunk_output", "layers")
    container = next((getattr(net, name) for name in holders if hasattr(net, name)), net)
    paths = {module: path for path, module in net.named_modules()}
    found: list[tuple[str, int, int]] = []
    blocks_of: dict[float, bool] = {}  # strides that have had a block of several convolutions
    height, width = _TEST_SIZE

    def note(module: nn.Module, _: object, output: object) -> None:
        if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[-1] == 1:
            return
        down, across = height / output.shape[-2], width / output.shape[-1]
        convolutions = sum(isinstance(part, nn.Conv2d) for part in module.modules())
        # A convolution and its norm after the blocks of a stride belong to the classifier.
        bare = convolutions <= 1 and blocks_of.get(down)
        if down == across and down == int(down) and not bare:
            blocks_of[down] = convolutions > 1 or blocks_of.get(down, False)
            found.append((paths[module], int(down), output.shape[1]))

    hooks = [child.register_forward_hook(note) for child in container.children()]
    was_training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError) as error:
        raise UserError(_no_such_size(net, error)) from error
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def _no_such_size(net: nn.Module, error: Exception) -> str:
    height, width = _TEST_SIZE
    return (
        f"{type(net).__name__} does not take images of {height} x {width} px, so not of any size "
        f"that Detectron2 resizes to: {one_line(error, 150)}"
    )


def _wanted_strides(names: Sequence[str], key: str) -> list[int]:
    known = {f"res{level}": 2**level for level in range(1, 8)}
    for name in names:
        if name not in known:
            raise UserError(f"{key} names {name!r}: {near_names(str(name), known)}")
    if not names:
        raise UserError(f"{key} is empty: name stages, res2 to res5 usually")
    return sorted(known[name] for name in names)


def _with_frozen(wanted: Sequence[int], offered: Sequence[int], cfg: CfgNode) -> list[int]:
    """The strides wanted and that of the last stage to freeze, if the network has it."""
    frozen = 2**cfg.MODEL.BACKBONE.FREEZE_AT
    return sorted({*wanted, frozen} if frozen > 1 and frozen in offered else wanted)


def _chosen(wanted: Sequence[int], offered: Sequence[int], what: str, key: str) -> list[int]:
    """Index of the last map of each stride wanted, among those offered."""
    last = {stride: index for index, stride in enumerate(offered)}
    missing = [
        f"res{stride.bit_length() - 1} (stride {stride})" for stride in wanted if stride not in last
    ]
    if missing:
        raise UserError(
            f"{what} has maps of strides {sorted(set(offered))}, and {key} asks for "
            f"{', '.join(missing)}, which it does not have: choose among those there are "
            "(MODEL.FPN.IN_FEATURES), or another network"
        )
    return [last[stride] for stride in wanted]
