"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlm.models.base import CausalLM, ModelConfig, State, initialize
from fastlm.nn.attention import Attention, RotaryTables
from fastlm.nn.linear import Linear
from fastlm.nn.mlp import MLP
from fastlm.nn.norm import LayerNorm, add_norm
from fastlm.nn.rotary import Rotary
from fastlm.nn.state import KVCache, KVStep, Rows

__all__ = ["GPT", "GPTConfig"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """Sizes of a GPT. The defaults are GPT-2's smallest; `intermediate_size` None is 4 * hidden_size.

    Attributes:
        rope_theta: rotary positions of this base in place of learned ones.
        qk_norm: each query and key is normalised (Henry et al., 2020, https://arxiv.org/abs/2010.04245), which lets a
            model learn at higher rates.
    """

    architecture = "gpt"
    vocab_size: int = 50257
    context_length: int = 1024
    num_layers: int = 12
    num_heads: int = 12
    hidden_size: int = 768
    intermediate_size: int | None = None
    dropout: float = 0.0
    bias: bool = True
    tie_embeddings: bool = True
    layer_norm_eps: float = 1e-5
    rope_theta: float | None = None
    qk_norm: bool = False

    def __post_init__(self) -> None:
        self.expect_positive("vocab_size", "context_length", "num_layers", "num_heads", "hidden_size")
        self.expect_probability("dropout")


class GPTLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.bias
        self.dropout = config.dropout
        self.attention_norm = LayerNorm(size, eps=config.layer_norm_eps, bias=bias)
        self.attention = Attention(
            size,
            config.num_heads,
            fused=True,
            qkv_bias=bias,
            output_bias=bias,
            dropout=config.dropout,
            norm_eps=config.layer_norm_eps if config.qk_norm else None,
        )
        self.mlp_norm = LayerNorm(size, eps=config.layer_norm_eps, bias=bias)
        self.mlp = MLP(size, config.intermediate_size or 4 * size, bias=bias)

    def forward(
        self, branch: Tensor, x: Tensor | None, rotary: RotaryTables | None, step: KVStep | None, layer: int
    ) -> tuple[Tensor, Tensor]:
        """The layer at branch + x, each [B, T, hidden_size], as such a pair: what follows adds and normalises."""
        h, x = add_norm(self.attention_norm, branch, x)
        branch = functional.dropout(self.attention(h, rotary, step, layer), self.dropout, self.training)
        h, x = add_norm(self.mlp_norm, branch, x)
        return functional.dropout(self.mlp(h), self.dropout, self.training), x


class GPT(CausalLM):
    """Learned or rotary positions, layer norm before each block, fused query-key-value projection, GELU (tanh form)."""

    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        head_dim = config.hidden_size // config.num_heads
        self.rotary = None if config.rope_theta is None else Rotary(head_dim, base=config.rope_theta)
        self.positions = None if self.rotary else nn.Embedding(config.context_length, config.hidden_size)
        self.layers = nn.ModuleList(GPTLayer(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.bias)
        self.output = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize(self, config.num_layers, residual=("attention.output", "mlp.down"))

    def hidden(self, input_ids: Tensor, state: State | None = None, rows: Rows = None) -> Tensor:
        self.check_ids(input_ids)
        batch, count = input_ids.shape
        step = None
        if state is not None:
            assert isinstance(state, KVCache)
            step = state.step(batch, count, rows)
        x, tables, device = None, None, input_ids.device
        branch = self.embedding(input_ids)
        if self.rotary is not None:
            tables = RotaryTables.of(self.rotary, count, step, device)
        elif self.positions is not None:
            branch = branch + self.positions(torch.arange(count, device=device) if step is None else step.positions())
        branch = functional.dropout(branch, self.config.dropout, self.training)
        for index, layer in enumerate(self.layers):
            branch, x = self.run_layer(layer, branch, x, tables, step, index)
        if state is not None:
            state.advance(count, rows)
        return add_norm(self.norm, branch, x)[0]

    def make_state(self, rows: int, max_length: int | None = None, *, kv_dtype: torch.dtype | None = None) -> KVCache:
        """An empty KV cache; see `CausalLM.make_state`."""
        config = self.config
        return self._make_kv_cache(
            rows, max_length, kv_dtype, config.num_layers, config.num_heads, config.hidden_size // config.num_heads
        )
