"""The feature pyramid of Lin et al., CVPR 2017, as a Detectron2 extension.

Importing it registers backbones, RoI and RPN heads, and the mini datasets with Detectron2.
"""

import importlib as _importlib
import warnings as _warnings

with _warnings.catch_warnings():
    # Detectron2 calls torch.jit.script while it is imported; torch deprecates that at length.
    _warnings.filterwarnings("ignore", r"`torch\.jit", module=r"torch\.jit")
    try:
        import detectron2 as _detectron2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "fpn_plugin extends Detectron2, which is not installed (or does not import: "
            f"{error}). From source:  pip install --no-build-isolation "
            "'git+https://github.com/facebookresearch/detectron2.git'  ; without a compiler:  "
            "make env  in a checkout of fpn_plugin"
        ) from error

    from . import model_zoo
    from .config import add_fpn_config
    from .deploy import optimize_for_inference
    from .errors import UserError
    from .mini import register_mini as _register_mini
    from .mini import register_mini_weights as _register_mini_weights
    from .modeling import (
        FeaturePyramidNetwork,
        FeaturizedImagePyramid,
        FPNCascadeROIHeads,
        FPNROIHeads,
        PerLevelRPNHead,
        PyramidROIPooler,
        SegmentProposals,
        assign_levels,
        build_fpn_backbone,
        build_image_pyramid_backbone,
        build_timm_backbone,
        build_torchvision_backbone,
    )

__all__ = [
    "Detector",
    "FPNCascadeROIHeads",
    "FPNROIHeads",
    "FeaturePyramidNetwork",
    "FeaturizedImagePyramid",
    "PerLevelRPNHead",
    "PyramidROIPooler",
    "SegmentProposals",
    "UserError",
    "__version__",
    "add_fpn_config",
    "assign_levels",
    "build_fpn_backbone",
    "build_image_pyramid_backbone",
    "build_timm_backbone",
    "build_torchvision_backbone",
    "check",
    "fit",
    "model_zoo",
    "optimize_for_inference",
    "train",
]

__version__ = "0.2.0"

# The modules of these are imported when one is used: the rooms below them import this package.
_MODULES = {
    "Detector": "engine.inference",
    "check": "cli.functions",
    "fit": "cli.functions",
    "train": "cli.functions",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


_register_mini()
_register_mini_weights()
