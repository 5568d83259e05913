"""Modules over fastlm's ops; those with a counterpart in torch.nn have its parameters and state_dicts."""

from fastlm.nn.attention import Attention
from fastlm.nn.embedding import QuantizedEmbedding
from fastlm.nn.linear import Linear, QuantizedLinear
from fastlm.nn.mlp import MLP, SwiGLU
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fastlm.nn.rotary import Rotary
from fastlm.nn.state import KVCache, RecurrentState

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "RNN",
    "Attention",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "RNNCell",
    "RecurrentState",
    "Rotary",
    "SwiGLU",
]
