"""An embedding table in one of GGUF's formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastlm.nn.linear import apply_to_weight
from fastlm.ops.quantized import QuantizedTensor

__all__ = ["QuantizedEmbedding"]


class QuantizedEmbedding(nn.Module):
    """Looks rows up in a frozen table, which is never expanded as a whole.

    Args:
        weight: [num_embeddings, embedding_dim]; no parameter and not in the state_dict. It may be the weight of a
            `QuantizedLinear` too (tied embeddings).
    """

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, input: Tensor) -> Tensor:
        """Integer ids [...] to float32 [..., embedding_dim]. Raises IndexError for an id outside the table."""
        return self.weight.rows(input)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.weight = apply_to_weight(fn, self.weight)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """For repr()."""
        return f"{self.num_embeddings}, {self.embedding_dim}, kind={self.weight.kind}"
