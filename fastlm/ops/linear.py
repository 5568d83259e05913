"""y = x W^T + b with dense or block-quantised weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from fastlm.kernels import native
from fastlm.kernels.cpu import linear as kernel
from fastlm.ops.checks import describe, expect_shape
from fastlm.ops.library import (
    autograd_by_reference,
    needs_grad,
    tracing,
    triton_float_why_not,
    triton_kernel,
    triton_why_not,
)
from fastlm.ops.linear_float import float_apart, float_linear, float_linear_why_not
from fastlm.ops.linear_mixed import is_mixed, mixed_linear
from fastlm.ops.quantized import QuantizedTensor
from fastlm.ops.registry import Implementation, Op, always, choosing, forced_backend
from fastlm.reference import linear as reference
from fastlm.reference.quantized import KINDS, planes

__all__ = ["linear", "linear_group"]

COMPUTE = ("fast", "exact")

FEW_ROWS = 12
"""Up to so many rows of input the native kernel multiplies floats: each weight is read once and the memory bus is the
limit. Beyond, torch's matrix product does more arithmetic per weight and wins, the weight's expansion included.
Integer products are quicker than either for any number of rows."""

EXPANDED = 1 << 20
"""Weights expanded to float32 at a time for a matrix product: 4 MB, which stays in the cache."""

_CODES = {kind.dtype: kind.code for kind in KINDS.values() if kind.dtype is not None}
_INTEGER_KINDS = frozenset(kind.name for kind in KINDS.values() if kind.dtype is None)
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def _integer(weight: Tensor | QuantizedTensor, compute: str) -> bool:
    return compute == "fast" and isinstance(weight, QuantizedTensor) and weight.kind in _INTEGER_KINDS


def _by_tiles(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None) -> Tensor | None:
    """The weight for `float_linear`, where that is quickest."""
    if not input.is_cpu or (input.dim() == 3 and input.shape[1] <= reference.FEW_TOKENS):
        return None
    if isinstance(weight, QuantizedTensor):
        dtype = KINDS[weight.kind].dtype
        if dtype is None or weight.layout != "blocks" or weight.shape[1] == 0:
            return None
        if weight.data.storage_offset() % dtype.itemsize:  # in a file whose parts are not aligned
            return None
        weight = weight.data.view(dtype)
    return weight if float_linear_why_not(input, weight, bias) is None else None


def _cpu_run(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> Tensor:
    if (dense := _by_tiles(input, weight, bias)) is not None:
        return float_linear(input, dense, bias)
    return _cpu_group(input, [weight], [bias], compute)[0]


def _cpu_group(
    input: Tensor, weights: Sequence[Tensor | QuantizedTensor], biases: Sequence[Tensor | None], compute: str
) -> list[Tensor]:
    rounding = 0
    calls = []
    for weight, bias in zip(weights, biases, strict=True):
        if not isinstance(weight, QuantizedTensor):
            calls.append((weight, _CODES[weight.dtype], weight.shape[0], bias))
        elif _integer(weight, compute):
            rounding = kernel.rounding_for(reference.rounding_bits(input.shape))
            calls.append((weight.interleaved(), weight.code, weight.shape[0], bias))
        else:
            calls.append((weight.data, weight.code, weight.shape[0], bias))
    return kernel.linear(input, calls, rounding=rounding)


def _cpu_why_not(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> str | None:
    if native.CPU.module is None:
        return native.CPU.error
    dense = None if isinstance(weight, QuantizedTensor) else weight
    if not (input.is_cpu and weight.is_cpu):
        return f"input is on {input.device}, weight on {weight.device}"
    if _by_tiles(input, weight, bias) is not None:
        return None
    if isinstance(weight, QuantizedTensor) and weight.layout != "blocks":
        return "the weight's bytes lie as GPUs read them"
    if input.dtype not in _NARROW:
        return f"input is {input.dtype}"
    for tensor in (input, dense, bias):
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return f"a {type(tensor).__name__}: the kernel reads the memory of plain tensors"
    if dense is not None and (dense.dtype not in _NARROW or not dense.is_contiguous()):
        return f"weight is {dense.dtype}{'' if dense.is_contiguous() else ', not contiguous'}"
    if needs_grad(input, bias, dense):
        return "a gradient is wanted"
    # [B, T, K] with a small T is a step of decoding, where the size of the batch must not change a row's result.
    if _integer(weight, compute) or (input.dim() == 3 and input.shape[1] <= reference.FEW_TOKENS):
        return None
    rows = input.numel() // max(input.shape[-1], 1)
    if rows > FEW_ROWS and forced_backend() != "cpu":
        tiles = "" if dense is None else f"; {float_linear_why_not(input, dense, bias)}"
        return f"{rows} rows: a matrix product is quicker beyond {FEW_ROWS}{tiles}"
    return None


def apart(weight: Tensor | QuantizedTensor, tokens: int, compute: str) -> bool:
    """Whether `linear` gives each sequence of an input [B, tokens, K] the bits that it would have alone.

    torch's matrix products do not: with more rows they may sum in another order.
    """
    if native.CPU.module is None or not weight.is_cpu or not choosing():
        return False
    dtype = KINDS[weight.kind].dtype if isinstance(weight, QuantizedTensor) else weight.dtype
    if tokens <= reference.FEW_TOKENS:
        return dtype is None or dtype in _NARROW
    return _integer(weight, compute) or (
        dtype in _NARROW and float_apart(tokens, weight.shape[0], weight.shape[1], dtype)
    )


def _triton_run(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> Tensor:
    if not isinstance(weight, QuantizedTensor) or weight.kind not in _INTEGER_KINDS:
        return _torch_run(input, weight, bias, compute)
    result: Tensor = _TRITON(input, *planes(weight.data, weight.kind), bias, weight.kind)
    return result


def _triton_why_not(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> str | None:
    if not isinstance(weight, QuantizedTensor) or weight.kind not in _INTEGER_KINDS:
        if forced_backend() == "triton":  # so that a whole model can run there
            return _torch_why_not(input, weight, bias, compute)
        return "the weight is of plain floats: torch's matrix product reads it at full speed"
    if needs_grad(input, bias):
        return "a gradient is wanted"
    reason = triton_float_why_not(input, bias) or triton_why_not(input, weight.data)
    if reason is None and weight.layout != "planes":
        return "the weight's bytes lie as in files: QuantizedTensor.to(device) puts them in order"
    return reason


def _torch_run(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        dtype = KINDS[weight.kind].dtype
        if dtype is None:
            return _by_blocks(input, weight, bias)
        weight = weight.data.view(dtype)
    if weight.dtype != input.dtype or (_emulated(weight) and not needs_grad(input, weight, bias)):
        return _by_blocks(input, weight, bias)
    return functional.linear(input, weight, None if bias is None else bias.to(input.dtype))


def _torch_why_not(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> str | None:
    dense = None if isinstance(weight, QuantizedTensor) else weight
    if input.device != weight.device:
        return f"input is on {input.device}, weight on {weight.device}"
    if dense is not None and dense.dtype == input.dtype and (bias is None or bias.dtype == input.dtype):
        return None
    if input.dtype not in _NARROW or (dense is not None and dense.dtype not in _NARROW):
        return f"input is {input.dtype}, weight {'quantised' if dense is None else dense.dtype}"
    if needs_grad(input, bias, dense):
        return "a gradient is wanted"
    return None


def _by_blocks(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None) -> Tensor:
    """A float32 matrix product with some rows of the weight at a time, expanded just before."""
    outputs, columns = weight.shape
    x = input.reshape(-1, columns).float()
    y = x.new_empty(x.shape[0], outputs)
    step = max(1, EXPANDED // max(columns, 1))
    for first in range(0, outputs, step):
        last = min(first + step, outputs)
        dense = weight.expand_rows(first, last) if isinstance(weight, QuantizedTensor) else weight[first:last].float()
        torch.mm(x, dense.T, out=y[:, first:last])
    if bias is not None:
        y += bias
    return y.view(*input.shape[:-1], outputs).to(input.dtype)


def _emulated(weight: Tensor) -> bool:
    """Whether torch computes in this dtype on the CPU without hardware for it, hundreds of times slower."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    name = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is None or not supported()


def _reference_run(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        return reference.quantized_linear(input, weight.relaid("blocks").data, weight.kind, bias, compute)
    return reference.linear(input, weight, bias)


_TRITON = triton_kernel("quantized_linear", "linear")
LINEAR = Op(
    "linear",
    [
        Implementation("cpu", _cpu_run, _cpu_why_not),
        Implementation("triton", _triton_run, _triton_why_not),
        Implementation("torch", _torch_run, _torch_why_not),
        Implementation("reference", _reference_run, always),
    ],
)


@torch.library.custom_op("fastlm::linear", mutates_args=())
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return LINEAR(input, weight, bias, "exact").clone()


@_linear.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


autograd_by_reference(_linear, reference.linear, differentiable=(0, 1, 2))


@torch.library.custom_op("fastlm::quantized_linear", mutates_args=())
def _quantized_linear(
    input: Tensor, data: Tensor, kind: str, columns: int, layout: str, bias: Tensor | None, compute: str
) -> Tensor:
    weight = QuantizedTensor(data, kind, (data.shape[0], columns), layout)
    return LINEAR(input, weight, bias, compute).clone()


@_quantized_linear.register_fake
def _(input: Tensor, data: Tensor, kind: str, columns: int, layout: str, bias: Tensor | None, compute: str) -> Tensor:
    return input.new_empty(*input.shape[:-1], data.shape[0])


def _quantized_reference(
    input: Tensor, data: Tensor, kind: str, columns: int, layout: str, bias: Tensor | None, compute: str
) -> Tensor:
    return _reference_run(input, QuantizedTensor(data, kind, (data.shape[0], columns), layout), bias, compute)


autograd_by_reference(_quantized_linear, _quantized_reference, differentiable=(0, 5))


def linear(
    input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None = None, *, compute: str = "fast"
) -> Tensor:
    """y = x W^T + b over the last dimension.

    Gradients flow to `input` and `bias`, and to a dense `weight`; a quantised weight is frozen.

    Args:
        input: [..., K], any floating dtype.
        weight: [N, K], dense or quantised. Its dtype may differ from the input's.
        bias: [N] or None.
        compute: for the Q kinds. "exact" multiplies the input with the dequantised weights and sums in float32.
            "fast" may round the input for integer products: to 15 bits by blocks of 32 for up to 16 tokens of a
            sequence (next to nothing is lost), to 8 bits by blocks of 16 for more (`fastlm.reference.linear`), or to
            15 as well where the processor multiplies tiles of bytes (AMX): as fast there.

    Returns:
        [..., N] in the input's dtype.

    Raises:
        ValueError: a shape does not fit, the input is not floating, or `compute` is unknown.
    """
    _check(input, weight, bias, compute)
    if tracing():
        if isinstance(weight, QuantizedTensor):
            columns = weight.shape[1]
            return _quantized_linear(input, weight.data, weight.kind, columns, weight.layout, bias, compute)
        return _linear(input, weight, bias)
    if not isinstance(weight, QuantizedTensor) and is_mixed(input, weight, bias):
        return mixed_linear(input, weight, bias)
    return LINEAR(input, weight, bias, compute)


def linear_group(
    input: Tensor,
    weights: Sequence[Tensor | QuantizedTensor],
    biases: Sequence[Tensor | None],
    *,
    compute: str = "fast",
) -> list[Tensor]:
    """What `linear` gives for each weight and bias, to the bit; on a CPU in one pass over up to 4 weights.

    The input is rounded once, and threads meet once.
    """
    for weight, bias in zip(weights, biases, strict=True):
        _check(input, weight, bias, compute)
    together = len(weights) <= 4 and not tracing() and choosing()
    pairs = list(zip(weights, biases, strict=True))
    if together and all(
        _cpu_why_not(input, w, b, compute) is None and _by_tiles(input, w, b) is None for w, b in pairs
    ):
        return _cpu_group(input, weights, biases, compute)
    return [linear(input, w, b, compute=compute) for w, b in pairs]


def _check(input: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, compute: str) -> None:
    shape = weight.shape
    if len(shape) != 2:
        raise ValueError(f"linear: weight is {list(shape)}, expected [outputs, inputs]")
    if input.dim() == 0 or input.shape[-1] != shape[1] or not input.is_floating_point():
        raise ValueError(
            f"linear: input is {describe(input)}, expected floats [..., {shape[1]}] for a weight of {list(shape)}"
        )
    if bias is not None:
        expect_shape("linear", "bias", bias, (shape[0],))
    if compute not in COMPUTE:
        raise ValueError(f"linear: compute is {compute!r}, expected 'fast' or 'exact'")
