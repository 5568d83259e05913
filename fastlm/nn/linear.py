"""Linear layers over `fastlm.ops.linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.hooks import untouched
from fastlm.ops.linear import apart
from fastlm.ops.quantized import QuantizedTensor

__all__ = ["Linear", "QuantizedLinear", "plain", "project", "rows_apart"]


class Linear(nn.Linear):
    """torch's Linear, its state_dict included; forward is `ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return ops.linear(input, self.weight, self.bias)


class QuantizedLinear(nn.Module):
    """A linear layer with a frozen weight in one of GGUF's formats.

    Args:
        weight: [out_features, in_features]. Read in place; it is no parameter and not in the state_dict.
        bias: [out_features] or None; becomes a parameter.
        compute: "fast" or "exact", as in `ops.linear`.
    """

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None, compute: str = "fast") -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.compute = compute

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the input's dtype."""
        return ops.linear(input, self.weight, self.bias, compute=self.compute)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.weight = apply_to_weight(fn, self.weight)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """For repr()."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kind={self.weight.kind}, compute={self.compute}"
        )


def project(input: Tensor, *layers: Linear | QuantizedLinear) -> list[Tensor]:
    """What each layer gives for one input; by `ops.linear_group` where nothing has replaced or hooks into a layer."""
    computes = {layer.compute for layer in layers if isinstance(layer, QuantizedLinear)} or {"fast"}
    if not _untouched(*layers) or len(computes) > 1:
        return [layer(input) for layer in layers]
    return ops.linear_group(input, [x.weight for x in layers], [x.bias for x in layers], compute=computes.pop())


def rows_apart(model: nn.Module, tokens: int, *, besides: nn.Module | None = None) -> bool:
    """Whether the linear layers of a model, but for one, give each sequence of a batch, all of so many tokens, the bits
    that it would have alone."""
    layers = [x for x in model.modules() if isinstance(x, (nn.Linear, QuantizedLinear)) and x is not besides]
    return all(apart(x.weight, tokens, getattr(x, "compute", "exact")) for x in layers)


def plain(*layers: nn.Module) -> bool:
    """Whether these are dense layers that nothing has replaced or hooks into: an op may take their weights."""
    return all(type(layer) is Linear for layer in layers) and _untouched(*layers)


def _untouched(*layers: nn.Module) -> bool:
    return all(type(layer) in (Linear, QuantizedLinear) for layer in layers) and untouched(*layers)


def apply_to_weight(fn: Callable[[Tensor], Tensor], weight: QuantizedTensor) -> QuantizedTensor:
    """What `module.to(...)` does to a quantised weight: it may move; its bytes have no dtype to change."""
    return weight.to(fn(weight.data[:0]).device)
