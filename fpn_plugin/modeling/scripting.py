"""Modules that reach their parts by name, for torch.jit.script, which cannot."""

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
    """A copy whose forward has its loops unrolled and its parts' names written out.

    It is what a module's ``__prepare_scriptable__`` returns, which torch.jit.script calls. Class,
    parts, names in the state dict and values stay. Functions decorated with ``torch.fx.wrap`` are
    called by it, not unrolled.

    Args:
        module: of a forward from a tensor to a dict of them, which decides only by what the
            module was built of, not by values or sizes.
    """
    graph = _PartsAsTheyAre().trace(module)
    for node in graph.nodes:
        node.type = None  # an annotation as text, which torch.jit.script would misread
    made = copy.copy(module)
    made._modules = dict(module._modules)  # torch puts the parts' own copies there
    forward = type(fx.GraphModule(module, graph)).forward
    made.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})
    return made
