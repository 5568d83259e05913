"""Multi-head self-attention with grouped keys, rotary positions and a KV cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.linear import Linear, project
from fastlm.nn.norm import RMSNorm
from fastlm.nn.rotary import Rotary
from fastlm.nn.state import KVStep

__all__ = ["Attention", "RotaryTables"]


class RotaryTables(NamedTuple):
    """Cosines and sines as `ops.rotary` takes them, how the rotated pairs lie, and each sequence's first position.

    cos and sin are [T, R/2], those of the current positions, or with `starts` [B] those of all positions, [P, R/2].
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    starts: Tensor | None = None

    @classmethod
    def of(cls, rotary: Rotary, count: int, step: KVStep | None, device: torch.device) -> RotaryTables:
        """For the `count` first positions, or those of a step over a cache."""
        if step is None:
            return cls(*rotary.tables(torch.arange(count, device=device)), rotary.interleaved)
        return cls(*rotary.table(step.cache.max_length, device), rotary.interleaved, step.starts)


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762).

    Grouped queries (Ainslie et al., 2023, https://arxiv.org/abs/2305.13245) where `num_kv_heads` < `num_heads`.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads, dividing `num_heads`; None: as many.
        head_dim: width of a head; None: hidden_size / num_heads.
        fused: one projection `qkv` instead of `query`, `key` and `value`.
        qkv_bias, output_bias: whether the projections have biases.
        dropout: probability of dropping an attention weight in training.
        window: tokens each query sees, itself included; None: all.
        norm_eps: each query and key goes through an RMS norm with this eps (before it is rotated); None: not.

    Raises:
        ValueError: the head counts do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        fused: bool = False,
        qkv_bias: bool = False,
        output_bias: bool = False,
        dropout: float = 0.0,
        window: int | None = None,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"Attention: hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
            head_dim = hidden_size // num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"Attention: num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout, self.window = dropout, window
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.fused = fused
        if fused:
            self.qkv = Linear(hidden_size, q_size + 2 * kv_size, bias=qkv_bias)
        else:
            self.query = Linear(hidden_size, q_size, bias=qkv_bias)
            self.key = Linear(hidden_size, kv_size, bias=qkv_bias)
            self.value = Linear(hidden_size, kv_size, bias=qkv_bias)
        self.norm_eps = norm_eps
        self.query_norm = self.key_norm = None
        if norm_eps is not None:
            self.query_norm, self.key_norm = RMSNorm(head_dim, eps=norm_eps), RMSNorm(head_dim, eps=norm_eps)
        self.output = Linear(q_size, hidden_size, bias=output_bias)

    def forward(
        self, x: Tensor, rotary: RotaryTables | None = None, step: KVStep | None = None, layer: int = 0
    ) -> Tensor:
        """x [B, T, hidden_size] to [B, T, hidden_size]; with a step, behind what layer `layer` of its cache holds."""
        batch, count, _ = x.shape
        dropout = self.dropout if self.training else 0.0
        if self.fused and step is None:
            y = ops.packed_attention(
                self.qkv(x),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                causal=True,
                window=self.window,
                dropout_p=dropout,
                norms=self._norm_weights(),
                norm_eps=self.norm_eps or 0.0,
                rotary=None if rotary is None else rotary[:3],
            )
            return self.output(y)
        if self.fused:
            kv_size = self.num_kv_heads * self.head_dim
            q, k, v = self.qkv(x).split((self.num_heads * self.head_dim, kv_size, kv_size), dim=-1)
        else:
            q, k, v = project(x, self.query, self.key, self.value)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotary is not None:
            cos, sin, interleaved, starts = rotary
            q = ops.rotary(q, cos, sin, interleaved=interleaved, starts=starts)
            k = ops.rotary(k, cos, sin, interleaved=interleaved, starts=starts)
        if step is None:
            y = ops.attention(q, k, v, causal=True, window=self.window, dropout_p=dropout)
        else:
            step.append(layer, k, v)
            y = step.attend(layer, q, self.window)
        if count > 1:
            y = y.transpose(1, 2)
        return self.output(y.reshape(batch, count, self.num_heads * self.head_dim))

    def _norm_weights(self) -> tuple[Tensor, Tensor] | None:
        if self.query_norm is None or self.key_norm is None:
            return None
        return self.query_norm.weight, self.key_norm.weight

    def _heads(self, x: Tensor) -> Tensor:
        batch, count, size = x.shape
        heads = size // self.head_dim
        # One token needs no transpose, and then is contiguous.
        if count == 1:
            return x.reshape(batch, heads, 1, self.head_dim)
        return x.view(batch, count, heads, self.head_dim).transpose(1, 2)
