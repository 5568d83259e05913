"""The public ops: one file each, with its signature, checks, autograd, and the list of implementations."""

from fastlm.ops.linear import linear
from fastlm.ops.quantized import QuantizedTensor
from fastlm.ops.registry import Explanation, backend, explain
from fastlm.ops.rms_norm import rms_norm

__all__ = ["Explanation", "QuantizedTensor", "backend", "explain", "linear", "rms_norm"]
