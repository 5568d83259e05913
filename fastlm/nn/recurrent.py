"""LSTM, GRU, RNN and their cells: torch's modules with fastlm's ops inside.

Constructors, parameter names, initialisation, state_dicts, inputs and outputs are those of the class of the same name
in `torch.nn`. What torch refuses is refused with torch's own error.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastlm import ops
from fastlm.ops.lstm import streaming_step

__all__ = ["GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell"]


class _Sequence(torch.nn.RNNBase):
    """A module over sequences.

    Derived from RNNBase rather than from `torch.nn.LSTM` and the like, since torch.compile refuses instances of those.
    """

    _torch: ClassVar[type[torch.nn.RNNBase]]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As `torch.nn`'s: (input, hx=None) -> (output, state); a PackedSequence for input gives one for output."""
        try:
            if isinstance(input, PackedSequence):
                return self._packed(input, hx)
            return self._padded(input, hx)
        except ValueError:
            self._torch.forward(self, input, hx)  # raises torch's error, where torch refuses too
            raise

    def _padded(self, input: Tensor, hx: Any) -> Any:
        batch_dim = 0 if self.batch_first else 1
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            states = self._zeros(input, input.shape[batch_dim])
        else:
            states = self._states(hx)
            if not batched:
                states = tuple(s.unsqueeze(1) for s in states)
        output, states = self._run(input, states, None)
        if not batched:
            return output.squeeze(batch_dim), self._hx(tuple(s.squeeze(1) for s in states))
        return output, self._hx(states)

    def _packed(self, input: PackedSequence, hx: Any) -> Any:
        data, batch_sizes, order, restore = input
        if hx is None:
            # The first of the batch sizes too, but a traced graph can't look into a tensor.
            states = self._zeros(data, int(batch_sizes[0]) if order is None else order.shape[0])
        else:
            states = self._states(hx)
            if order is not None:
                states = tuple(s.index_select(1, order) for s in states)
        output, states = self._run(data, states, batch_sizes)
        if restore is not None:
            states = tuple(s.index_select(1, restore) for s in states)
        return PackedSequence(output, batch_sizes, order, restore), self._hx(states)

    def _weights(self) -> list[Tensor]:
        names = self._flat_weights_names
        try:
            parameters = self._parameters
            return [parameters[name] for name in names]  # type: ignore[misc]
        except KeyError:  # a parametrization, or a plain tensor in a parameter's place
            return [getattr(self, name) for name in names]

    def _zeros(self, input: Tensor, batch: int) -> tuple[Tensor, ...]:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        return (input.new_zeros(layers, batch, self.hidden_size),)

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        return (hx,)

    def _hx(self, states: tuple[Tensor, ...]) -> Any:
        return states[0]

    def _run(
        self, input: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise NotImplementedError


class _Variant(_Sequence):
    """A module with layer normalisation, recurrent dropout and zoneout."""

    # Of modules that were torch's and became one of these (`fastlm.accelerate`), or were pickled without variants.
    layer_norm: bool = False
    recurrent_dropout: float = 0.0
    zoneout: Any = 0.0

    def _set_variants(self, layer_norm: bool, recurrent_dropout: float, zoneout: Any, device: Any, dtype: Any) -> None:
        self.layer_norm = layer_norm
        self.recurrent_dropout = recurrent_dropout
        self.zoneout = zoneout
        probabilities = zoneout if isinstance(zoneout, tuple) else (zoneout,)
        states = 2 if self.mode == "LSTM" else 1
        if len(probabilities) != states or (states == 1 and isinstance(zoneout, tuple)):
            expected = "a probability or a pair of them" if states == 2 else "a probability"
            raise ValueError(f"{self.mode}: zoneout is {zoneout}, expected {expected}")
        for name, p in (("recurrent_dropout", recurrent_dropout), *(("zoneout", p) for p in probabilities)):
            if not 0 <= p <= 1:
                raise ValueError(f"{self.mode}: {name} is {p}, expected a probability")
        if layer_norm:
            self._add_norms(device, dtype)

    def _norm_sizes(self) -> dict[str, int]:
        """The parameters of layer normalisation, in their order."""
        size = {"LSTM": 4, "GRU": 3}[self.mode] * self.hidden_size
        return {"weight_ln_ih": size, "weight_ln_hh": size}

    def _add_norms(self, device: Any, dtype: Any) -> None:
        """The parameters of layer normalisation, each layer's and direction's after its others."""
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            for name, size in self._norm_sizes().items():
                self.register_parameter(
                    name + suffix, torch.nn.Parameter(torch.empty(size, device=device, dtype=dtype))
                )
                names.append(name + suffix)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self._reset_norms()

    def reset_parameters(self) -> None:
        """As torch's; gains of layer normalisation are ones, and biases zeros."""
        super().reset_parameters()
        self._reset_norms()

    def _reset_norms(self) -> None:
        for name, parameter in self.named_parameters():
            if "_ln_" in name:
                torch.nn.init.constant_(parameter, float(name.startswith("weight")))

    def flatten_parameters(self) -> None:
        """As torch's: for cuDNN, which knows no layer normalisation."""
        if not self.layer_norm:
            super().flatten_parameters()

    def extra_repr(self) -> str:
        """As torch's, and the variants."""
        shown = super().extra_repr()
        for name in ("layer_norm", "recurrent_dropout", "zoneout"):
            if getattr(self, name) != getattr(type(self), name):
                shown += f", {name}={getattr(self, name)}"
        return shown


class LSTM(_Variant):
    """`torch.nn.LSTM` over `fastlm.ops.lstm`: the same constructor, parameters, inputs, outputs and errors.

    Three variants besides, formulas and papers in `ops.lstm`, which combine with all else and with each other:

    Args:
        layer_norm: normalises W_ih x, W_hh h and c on its way to h. Each layer and direction then has the gains
            `weight_ln_ih_l0`, `weight_ln_hh_l0` [4H] and `weight_ln_c_l0` [H], ones at first, and with `bias`
            `bias_ln_c_l0` [H], zeros.
        recurrent_dropout: in training, probability of zeroing an element of h before W_hh; one mask for each sequence.
        zoneout: probability with which an element of h and of c stays as it was, or a pair of them, for h and for c; in
            evaluation the new states are the expectation.

    Raises:
        ValueError: `recurrent_dropout` or `zoneout` is no probability.
    """

    _torch = torch.nn.LSTM
    zoneout: tuple[float, float] = (0.0, 0.0)
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype,
        )  # fmt: skip
        pair = (zoneout, zoneout) if isinstance(zoneout, (int, float)) else zoneout
        self._set_variants(layer_norm, recurrent_dropout, pair, device, dtype)

    def _norm_sizes(self) -> dict[str, int]:
        sizes = super()._norm_sizes() | {"weight_ln_c": self.hidden_size}
        return sizes | ({"bias_ln_c": self.hidden_size} if self.bias else {})

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As `torch.nn.LSTM`'s."""
        if (
            hx is not None
            and not torch.is_grad_enabled()
            and isinstance(input, Tensor)
            and self.num_layers == 1
            and not (
                self.bidirectional or self.proj_size or self.layer_norm or (self.training and self.recurrent_dropout)
            )
            and self.zoneout == (0.0, 0.0)
        ):
            found = streaming_step(input, hx, self._weights(), self.batch_first)
            if found is not None:
                return found
        return super().forward(input, hx)

    def _zeros(self, input: Tensor, batch: int) -> tuple[Tensor, ...]:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        c = input.new_zeros(layers, batch, self.hidden_size)
        return (input.new_zeros(layers, batch, self.proj_size) if self.proj_size else c), c

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        return hx[0], hx[1]

    def _hx(self, states: tuple[Tensor, ...]) -> Any:
        return states

    def _run(
        self, input: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return ops.lstm(
            input,
            states,  # type: ignore[arg-type]
            self._weights(),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            proj_size=self.proj_size,
            bias=self.bias,
            batch_sizes=batch_sizes,
            layer_norm=self.layer_norm,
            recurrent_dropout=self.recurrent_dropout,
            zoneout=self.zoneout,
        )


class GRU(_Variant):
    """`torch.nn.GRU` over `fastlm.ops.gru`: the same constructor, parameters, inputs, outputs and errors.

    Three variants besides, formulas and papers in `ops.gru`, which combine with all else and with each other:

    Args:
        layer_norm: normalises W_ih x and W_hh h. Each layer and direction then has the gains `weight_ln_ih_l0` and
            `weight_ln_hh_l0` [3H], ones at first.
        recurrent_dropout: in training, probability of zeroing an element of h before W_hh; one mask for each sequence.
        zoneout: probability with which an element of h stays as it was; in evaluation h is the expectation.

    Raises:
        ValueError: `recurrent_dropout` or `zoneout` is no probability.
    """

    _torch = torch.nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype
        )
        self._set_variants(layer_norm, recurrent_dropout, zoneout, device, dtype)

    def _run(
        self, input: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, h_n = ops.gru(
            input,
            states[0],
            self._weights(),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            bias=self.bias,
            batch_sizes=batch_sizes,
            layer_norm=self.layer_norm,
            recurrent_dropout=self.recurrent_dropout,
            zoneout=self.zoneout,
        )
        return output, (h_n,)


class RNN(_Sequence):
    """`torch.nn.RNN` over `fastlm.ops.rnn`: the same constructor, parameters, inputs, outputs and errors."""

    _torch = torch.nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, device, dtype,
        )  # fmt: skip

    def _run(
        self, input: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, h_n = ops.rnn(
            input,
            states[0],
            self._weights(),
            num_layers=self.num_layers,
            nonlinearity=self.nonlinearity,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            bias=self.bias,
            batch_sizes=batch_sizes,
        )
        return output, (h_n,)


class LSTMCell(torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` over `fastlm.ops.lstm_cell`."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """As `torch.nn.LSTMCell`'s: input [B, I] or [I], hx of two [B, H] or [H] -> the next (h, c)."""
        try:
            if input.dim() == 1:
                batched = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
                h, c = self._step(input.unsqueeze(0), batched)
                return h.squeeze(0), c.squeeze(0)
            return self._step(input, hx)
        except ValueError:
            super().forward(input, hx)  # raises torch's error, where torch refuses too
            raise

    def _step(self, input: Tensor, hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if hx is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            hx = (zeros, zeros)
        return ops.lstm_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class _HiddenCell:
    """The forward that the cells with one state share; beside a cell class of torch."""

    hidden_size: int

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """As `torch.nn`'s: input [B, I] or [I], hx [B, H] or [H] -> the next hx."""
        try:
            if input.dim() == 1:
                h = None if hx is None else hx.unsqueeze(0)
                return self._step(input.unsqueeze(0), h).squeeze(0)
            return self._step(input, hx)
        except ValueError:
            super().forward(input, hx)  # type: ignore[misc]  # raises torch's error, where torch refuses too
            raise

    def _step(self, input: Tensor, hx: Tensor | None) -> Tensor:
        return self._cell(input, input.new_zeros(input.shape[0], self.hidden_size) if hx is None else hx)

    def _cell(self, input: Tensor, hx: Tensor) -> Tensor:
        raise NotImplementedError


class GRUCell(_HiddenCell, torch.nn.GRUCell):
    """`torch.nn.GRUCell` over `fastlm.ops.gru_cell`."""

    def _cell(self, input: Tensor, hx: Tensor) -> Tensor:
        return ops.gru_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class RNNCell(_HiddenCell, torch.nn.RNNCell):
    """`torch.nn.RNNCell` over `fastlm.ops.rnn_cell`."""

    def _cell(self, input: Tensor, hx: Tensor) -> Tensor:
        biases = (self.bias_ih, self.bias_hh)
        return ops.rnn_cell(input, hx, self.weight_ih, self.weight_hh, *biases, nonlinearity=self.nonlinearity)
