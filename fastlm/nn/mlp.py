"""Feed-forward blocks of transformers."""

from __future__ import annotations

from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.linear import Linear, project

__all__ = ["MLP", "SwiGLU"]


class MLP(nn.Module):
    """down(gelu(up(x))), the GELU in its tanh form as in GPT-2 (Hendrycks & Gimpel, 2016, arXiv:1606.08415).

    x [..., hidden_size] to [..., hidden_size].
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(x)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020, https://arxiv.org/abs/2002.05202).

    x [..., hidden_size] to [..., hidden_size].
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, intermediate_size, bias=bias)
        self.up = Linear(hidden_size, intermediate_size, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate, self.up)
        return self.down(ops.swiglu(gate, up))
