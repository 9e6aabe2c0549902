"""Timings of the plugin against stock Detectron2, torchvision and bare convolutions."""

from .run import benchmark_main

__all__ = ["benchmark_main"]
