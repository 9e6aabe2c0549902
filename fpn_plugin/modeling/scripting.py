"""For torch.jit.script: modules whose forward gets its parts by name, written out."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import fx, nn

__all__ = ["spelt_out"]

Module = TypeVar("Module", bound=nn.Module)


class _PartsAsTheyAre(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def spelt_out(module: Module) -> Module:
    """A copy whose forward has unrolled loops and its parts' names written out.

    A module's ``__prepare_scriptable__``, which torch.jit.script calls, returns it. Class, parts,
    state dict and values stay. Functions decorated with ``torch.fx.wrap`` are called, not unrolled.

    Args:
        module: whose forward maps a tensor to a dict of tensors, and makes no decision by values or
            sizes.
    """
    graph = _PartsAsTheyAre().trace(module)
    for node in graph.nodes:
        node.type = None  # an annotation as text, which torch.jit.script would misread
    made = copy.copy(module)
    made._modules = dict(module._modules)  # torch puts the parts' own copies there
    forward = type(fx.GraphModule(module, graph)).forward
    made.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})
    return made
