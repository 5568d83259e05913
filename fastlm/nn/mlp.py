"""Feed-forward blocks of transformers."""

from __future__ import annotations

from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.linear import Linear, plain, project

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
        if not plain(self.up, self.down):
            return self.down(ops.gelu(self.up(x)))
        return ops.feed_forward(x, self.up.weight, self.down.weight, up_bias=self.up.bias, down_bias=self.down.bias)


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
        if not plain(self.gate, self.up, self.down):
            gate, up = project(x, self.gate, self.up)
            return self.down(ops.swiglu(gate, up))
        return ops.feed_forward(
            x,
            self.up.weight,
            self.down.weight,
            up_bias=self.up.bias,
            down_bias=self.down.bias,
            gate=self.gate.weight,
            gate_bias=self.gate.bias,
        )
