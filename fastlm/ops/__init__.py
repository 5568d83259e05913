"""The public ops: one file each, with its signature, checks, autograd, and the list of implementations."""

from fastlm.ops.activation import gelu, swiglu
from fastlm.ops.add_norm import add_layer_norm, add_rms_norm
from fastlm.ops.attention import attention, attention_lse
from fastlm.ops.attention_decode import attention_decode
from fastlm.ops.attention_packed import packed_attention
from fastlm.ops.attention_paged import attention_paged
from fastlm.ops.attention_varlen import attention_varlen
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.feed_forward import feed_forward
from fastlm.ops.greedy import greedy
from fastlm.ops.gru import gru, gru_cell
from fastlm.ops.kv_cache import kv_append, offset
from fastlm.ops.layer_norm import layer_norm
from fastlm.ops.linear import linear, linear_group
from fastlm.ops.lstm import lstm, lstm_cell
from fastlm.ops.quantized import QuantizedTensor
from fastlm.ops.recurrent_variants import gru_variant, lstm_variant
from fastlm.ops.registry import Explanation, backend, explain
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rnn import rnn, rnn_cell
from fastlm.ops.rotary import rotary
from fastlm.ops.sample import sample

__all__ = [
    "Explanation",
    "QuantizedTensor",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_lse",
    "attention_paged",
    "attention_varlen",
    "backend",
    "cross_entropy",
    "explain",
    "feed_forward",
    "gelu",
    "greedy",
    "gru",
    "gru_cell",
    "gru_variant",
    "kv_append",
    "layer_norm",
    "linear",
    "linear_group",
    "lstm",
    "lstm_cell",
    "lstm_variant",
    "offset",
    "packed_attention",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "rotary",
    "sample",
    "swiglu",
]
