"""The public ops: one file each, with its signature, checks, autograd, and the list of implementations."""

from fastlm.ops.attention import attention
from fastlm.ops.attention_decode import attention_decode
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.layer_norm import layer_norm
from fastlm.ops.linear import linear
from fastlm.ops.quantized import QuantizedTensor
from fastlm.ops.registry import Explanation, backend, explain
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rotary import rotary

__all__ = [
    "Explanation",
    "QuantizedTensor",
    "attention",
    "attention_decode",
    "backend",
    "cross_entropy",
    "explain",
    "layer_norm",
    "linear",
    "rms_norm",
    "rotary",
]
