"""What torch.compile made of a function: a backend that looks at the graphs."""

from __future__ import annotations

from typing import Any

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._ops import OpOverload
from torch.fx import GraphModule

__all__ = ["Graphs", "ops_of"]


def ops_of(graph: GraphModule) -> list[OpOverload]:
    """The operators that a graph calls."""
    return [node.target for node in graph.graph.nodes if isinstance(node.target, OpOverload)]


class Graphs:
    """A backend of torch.compile that runs what it is given, and keeps which ops of ours are in it."""

    def __init__(self) -> None:
        self.ops: list[list[str]] = []
        """Of each graph, the forward's before the backward's."""

    def __call__(self, graph: GraphModule, inputs: Any) -> Any:
        def keep(module: GraphModule, _: Any) -> Any:
            self.ops.append([op._opname for op in ops_of(module) if op.namespace == "fastlm"])
            return make_boxed_func(module.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)
