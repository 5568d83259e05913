"""Llama (Touvron et al., 2023, https://arxiv.org/abs/2302.13971) and its kin: Llama 2 and 3, SmolLM, Mistral, Qwen2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.models.base import CausalLM, ModelConfig, State, initialize
from fastlm.nn.attention import Attention, RotaryTables
from fastlm.nn.linear import Linear
from fastlm.nn.mlp import SwiGLU
from fastlm.nn.norm import RMSNorm, add_norm
from fastlm.nn.rotary import Rotary
from fastlm.nn.state import KVCache, KVStep, Rows

__all__ = ["Llama", "LlamaConfig"]


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Sizes of a Llama.

    Attributes:
        num_kv_heads: None: num_heads.
        head_dim: None: hidden_size / num_heads.
        rope_dim: leading dimensions of each head that rotate; None: head_dim.
        rope_scaling: as `fastlm.nn.Rotary` takes it, or {"rope_type": "divisors", "divisors": [one number for each
            pair's frequency]}, as GGUF files carry it.
        rope_interleaved: adjacent dimensions rotate together, as in GGUF's order of rows; else the two halves do.
        window: tokens each query sees, itself included; None: all.
    """

    architecture = "llama"
    vocab_size: int = 32000
    context_length: int = 2048
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_size: int = 4096
    intermediate_size: int = 11008
    rope_theta: float = 10000.0
    rope_dim: int | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_interleaved: bool = False
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        names = ("vocab_size", "context_length", "num_layers", "num_heads", "hidden_size", "intermediate_size")
        self.expect_positive(*names, "kv_heads", "head_size")

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim


def make_rotary(config: LlamaConfig) -> Rotary:
    """The rotary embedding of this configuration. ValueError: `rope_scaling` or the dimension does not fit."""
    scaling = config.rope_scaling or {}
    divisors = scaling.get("divisors") if scaling.get("rope_type") == "divisors" else None
    rotary = Rotary(
        config.rope_dim or config.head_size,
        base=config.rope_theta,
        interleaved=config.rope_interleaved,
        scaling=None if divisors is not None else scaling,
    )
    if divisors is not None:
        if len(divisors) != len(rotary.frequencies):
            raise ValueError(f"rope_scaling: {len(divisors)} divisors for {len(rotary.frequencies)} frequencies")
        rotary.frequencies /= torch.tensor(divisors, dtype=torch.float32, device="cpu")
    return rotary


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_size,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            window=config.window,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self, branch: Tensor, x: Tensor | None, rotary: RotaryTables, step: KVStep | None, layer: int
    ) -> tuple[Tensor, Tensor]:
        """The layer at branch + x, each [B, T, hidden_size], as such a pair: what follows adds and normalises."""
        h, x = add_norm(self.attention_norm, branch, x)
        h, x = add_norm(self.mlp_norm, self.attention(h, rotary, step, layer), x)
        return self.mlp(h), x


class Llama(CausalLM):
    """Rotary positions, RMS norm before each block, grouped-query attention, SwiGLU."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = make_rotary(config)
        initialize(self, config.num_layers, residual=("attention.output", "mlp.down"))

    def hidden(self, input_ids: Tensor, state: State | None = None, rows: Rows = None) -> Tensor:
        self.check_ids(input_ids)
        batch, count = input_ids.shape
        branch, x = self.embedding(input_ids), None
        step = None
        if state is not None:
            assert isinstance(state, KVCache)
            step = state.step(batch, count, rows)
        rotary = RotaryTables.of(self.rotary, count, step, branch.device)
        for index, layer in enumerate(self.layers):
            branch, x = self.run_layer(layer, branch, x, rotary, step, index)
        if state is not None:
            state.advance(count, rows)
        return add_norm(self.norm, branch, x)[0]

    def make_state(self, rows: int, max_length: int | None = None, *, kv_dtype: torch.dtype | None = None) -> KVCache:
        """An empty KV cache; see `CausalLM.make_state`."""
        config = self.config
        return self._make_kv_cache(rows, max_length, kv_dtype, config.num_layers, config.kv_heads, config.head_size)
