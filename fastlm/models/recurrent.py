"""Recurrent language models, regularised as AWD-LSTM (Merity et al., 2017, https://arxiv.org/abs/1708.02182)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlm import ops
from fastlm.models.base import CausalLM, ModelConfig, State
from fastlm.nn.linear import Linear
from fastlm.nn.recurrent import GRU, LSTM, RNN
from fastlm.nn.state import RecurrentState, Rows

__all__ = ["CELLS", "LSTMLM", "RNNLM", "RecurrentConfig"]

CELLS = ("lstm", "gru", "tanh", "relu")


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(ModelConfig):
    """Sizes and dropouts of a recurrent language model; it has no context length.

    With tied embeddings the last layer is as wide as the embedding. All but `embedding_dropout` and `weight_dropout`
    are locked: one mask for all time steps (Gal & Ghahramani, 2016, https://arxiv.org/abs/1512.05287).

    Attributes:
        cell: "lstm", "gru", "tanh" or "relu".
        embedding_dropout: drops whole words from the vocabulary.
        input_dropout: on the embeddings, before the first layer.
        hidden_dropout: between layers.
        output_dropout: after the last layer.
        weight_dropout: on the hidden-to-hidden weights.
    """

    architecture = "recurrent"
    context_length: None = None
    embedding_size: int = 400
    hidden_size: int = 1150
    num_layers: int = 3
    cell: str = "lstm"
    tie_embeddings: bool = True
    embedding_dropout: float = 0.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    weight_dropout: float = 0.0

    def __post_init__(self) -> None:
        self.expect_positive("vocab_size", "embedding_size", "hidden_size", "num_layers")
        self.expect_probability("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout")
        self.expect_probability("weight_dropout")
        if self.cell not in CELLS:
            raise ValueError(f"RecurrentConfig: cell is {self.cell!r}, expected one of {', '.join(CELLS)}")

    @property
    def layer_sizes(self) -> list[int]:
        """The width of each layer's output."""
        last = self.embedding_size if self.tie_embeddings else self.hidden_size
        return [self.hidden_size] * (self.num_layers - 1) + [last]


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of x [T, B, size] with the same mask at every time step."""
    if not training or p == 0.0:
        return x
    return x * functional.dropout(torch.ones_like(x[:1]), p, training)


class RNNLM(CausalLM):
    """Embedding, recurrent layers, projection to the vocabulary; carries its state from call to call if given one."""

    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        sizes = config.layer_sizes
        inputs = [config.embedding_size, *sizes[:-1]]
        self.layers = nn.ModuleList(_make_layer(config.cell, i, h) for i, h in zip(inputs, sizes, strict=True))
        if config.tie_embeddings:
            self.output = None
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.output = Linear(config.hidden_size, config.vocab_size)
            nn.init.uniform_(self.output.weight, -0.1, 0.1)
            nn.init.zeros_(self.output.bias)

    @property
    def head_bias(self) -> Tensor | None:
        return self.bias if self.output is None else self.output.bias

    def hidden(self, input_ids: Tensor, state: State | None = None, rows: Rows = None) -> Tensor:
        self.check_ids(input_ids)
        config, training = self.config, self.training
        batch, count = input_ids.shape
        if state is None:
            state = self.make_state(batch)
        assert isinstance(state, RecurrentState)
        if batch != (state.rows if rows is None else len(rows)):
            raise ValueError(f"input_ids: a batch of {batch} for a state of {state.rows} rows, rows={rows}")
        # Time leads from here on: the layers' own order, in which a step's batch is contiguous.
        x = self._embed(input_ids.t())
        x = locked_dropout(x, config.input_dropout, training)
        for index, layer in enumerate(self.layers):
            h, c = state.read(index, rows)
            x, h, c = self._run(layer, x, h, c)
            state.write(index, h, c, rows)
            last = index == config.num_layers - 1
            x = locked_dropout(x, config.output_dropout if last else config.hidden_dropout, training)
        state.advance(count, rows)
        return x.transpose(0, 1)

    def _embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        p = self.config.embedding_dropout
        if self.training and p > 0.0:
            mask = functional.dropout(torch.ones(self.config.vocab_size, 1, dtype=x.dtype, device=x.device), p)
            x = x * mask[ids]
        return x

    def _run(self, layer: nn.Module, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer over x [T, B, I]: the outputs [T, B, H] and the last h and c [B, H]."""
        cell = self.config.cell
        weights: list[Any] = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
        if self.training and self.config.weight_dropout > 0.0:
            weights[1] = functional.dropout(weights[1], self.config.weight_dropout)
        if x.shape[0] == 1:
            if cell == "lstm":
                assert c is not None
                h, c = ops.lstm_cell(x[0], (h, c), *weights)
            elif cell == "gru":
                h = ops.gru_cell(x[0], h, *weights)
            else:
                h = ops.rnn_cell(x[0], h, *weights, nonlinearity=cell)
            return h[None], h, c
        if cell == "lstm":
            assert c is not None
            y, (h_n, c_n) = ops.lstm(x, (h[None], c[None]), weights)
            return y, h_n[0], c_n[0]
        if cell == "gru":
            y, h_n = ops.gru(x, h[None], weights)
        else:
            y, h_n = ops.rnn(x, h[None], weights, nonlinearity=cell)
        return y, h_n[0], None

    def make_state(
        self, rows: int, max_length: int | None = None, *, kv_dtype: torch.dtype | None = None
    ) -> RecurrentState:
        """The zero state; it holds any length. ValueError: a `kv_dtype`, for there are no keys and values."""
        if kv_dtype is not None:
            raise ValueError(f"kv_dtype: {kv_dtype}, but a recurrent model has no KV cache")
        config = self.config
        return RecurrentState.allocate(
            rows, config.layer_sizes, cells=config.cell == "lstm", dtype=self.dtype, device=self.device
        )


class LSTMLM(RNNLM):
    """RNNLM of LSTM cells. ValueError: the configuration has another cell."""

    def __init__(self, config: RecurrentConfig) -> None:
        if config.cell != "lstm":
            raise ValueError(f"LSTMLM: cell is {config.cell!r}, expected 'lstm'")
        super().__init__(config)


def _make_layer(cell: str, input_size: int, hidden_size: int) -> nn.Module:
    if cell == "lstm":
        return LSTM(input_size, hidden_size)
    if cell == "gru":
        return GRU(input_size, hidden_size)
    return RNN(input_size, hidden_size, nonlinearity=cell)
