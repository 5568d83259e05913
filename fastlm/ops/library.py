"""Ops as torch.library custom ops: what torch.compile, torch.export and opcheck see.

Eager calls never come this way (a custom op costs tens of microseconds): a public function uses its custom op only
where `tracing()` is true.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastlm.kernels import cuda, native
from fastlm.ops.checks import describe
from fastlm.ops.registry import choosing, forced_backend

__all__ = [
    "autograd_by_reference",
    "autograd_in_custom_op",
    "cuda_why_not",
    "differentiable_once",
    "needs_grad",
    "opaque_kernel_why_not",
    "plain",
    "tracing",
    "triton_float_why_not",
    "triton_kernel",
    "triton_why_not",
    "undisturbed",
]

# A folder of that name on the path, such as tests/triton, would be a namespace without an origin.
_TRITON = getattr(find_spec("triton"), "origin", None) is not None
_FAKE = torch._C._TorchDispatchModeKey.FAKE


def tracing() -> bool:
    """Whether torch.compile or torch.export is tracing the caller, or new tensors are fake and have no memory."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is recording and any of these wants a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def opaque_kernel_why_not(
    module: native.NativeModule, *tensors: Tensor | None, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> str | None:
    """Why a native CPU kernel, of which torch sees nothing, can't stand for the op here; None where it can.

    `dtypes` are what the kernel takes.
    """
    if module.module is None:
        return module.error
    for tensor in tensors:
        if tensor is not None and not (
            tensor.dtype in dtypes and tensor.is_cpu and (type(tensor) is Parameter or type(tensor) is Tensor)
        ):
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"a {type(tensor).__name__} of {describe(tensor)}: the kernel takes plain {names} on the CPU"
    return _transform()


def cuda_why_not(*tensors: Tensor | None) -> str | None:
    """Why a kernel in CUDA C++, of which torch sees nothing, can't take these tensors; None where it can."""
    return cuda.why_not(*tensors) or _transform()


def triton_why_not(*tensors: Tensor | None) -> str | None:
    """Why a Triton kernel, of which autograd sees nothing, can't take these tensors; None where it can.

    They have to be on one CUDA (or ROCm) device. On a CPU kernels run in Triton's interpreter, thousands of times
    slower: for tests, where TRITON_INTERPRET=1 and `backend("triton")` ask for it.
    """
    device = next(t.device for t in tensors if t is not None)
    interpreted = device.type == "cpu" and forced_backend() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not _TRITON or (device.type != "cuda" and not interpreted):
        return _no_triton()
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            return f"tensors are on {device} and {tensor.device}"
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return f"a {type(tensor).__name__}: the kernel takes plain tensors"
    return _transform()


@cache
def _no_triton() -> str:
    """Asked in every call on a CPU: looking for a device is not for free."""
    if not _TRITON:
        return "triton is not installed (pip install fastlm[gpu])"
    return "the tensors are not on a CUDA device" if torch.cuda.is_available() else "there is no CUDA device"


def triton_float_why_not(*tensors: Tensor | None) -> str | None:
    """As `triton_why_not`, of kernels that take float32, float16 and bfloat16, one or several of them."""
    reason = triton_why_not(*tensors)
    for tensor in tensors if reason is None else ():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"a tensor is {tensor.dtype}; the kernel takes float32, float16 and bfloat16"
    return reason


def triton_kernel(module: str, name: str) -> Callable[..., Any]:
    """The launcher `name` of fastlm.kernels.triton.`module`, imported by its first call: triton is optional. It runs
    with the tensors' device as the current one, on which Triton launches whatever it is given."""
    launcher: Callable[..., Any] | None = None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(import_module(f"fastlm.kernels.triton.{module}"), name)
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            return launcher(*args, **kwargs)

    return run


def undisturbed() -> bool:
    """Whether this is plain inference: no gradients, nothing that traces or transforms, no backend forced."""
    return not torch.is_grad_enabled() and plain()


def plain() -> bool:
    """Whether nothing traces or transforms, and no backend is forced."""
    return not tracing() and choosing() and _transform() is None


def _transform() -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "inside a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    if torch._C._get_tracing_state() is not None:
        return "inside torch.jit.trace"
    return None


@contextmanager
def autograd_in_custom_op() -> Iterator[None]:
    """Records gradients inside the function of a custom op, where torch has switched autograd off."""
    keys = torch._C.DispatchKey
    off = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
        off = off - torch._C.DispatchKeySet(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off), torch.enable_grad():
        yield


def differentiable_once(op: str) -> None:
    """For the backward of an `autograd.Function` over a native kernel: refuses create_graph=True, under which its
    result would pass for a constant.

    Raises:
        RuntimeError: naming the op, and what has a second derivative.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: the native kernel has no second derivative; fastlm.backend('reference') has")


def autograd_by_reference(definition: Any, reference: Callable[..., Any], *, differentiable: Sequence[int]) -> None:
    """Gives the custom op `definition` a backward that differentiates `reference` at the same inputs.

    The forward saves its inputs alone; the backward recomputes. For ops whose backward has no kernel of its own.

    Args:
        definition: what `torch.library.custom_op` returned. Outputs: one tensor, or a tuple of tensors.
        reference: takes the same arguments; differentiable.
        differentiable: positions of the tensor arguments that have a gradient.
    """
    positions = tuple(differentiable)

    def vjp(args: Sequence[Any], grads: Sequence[Tensor | None], wanted: Sequence[int]) -> list[Tensor]:
        inputs = list(args)
        with torch.enable_grad():
            leaves = []
            for position in wanted:
                inputs[position] = inputs[position].detach().requires_grad_()
                leaves.append(inputs[position])
            outputs = reference(*inputs)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*[inputs[i] for i in ctx.tensors])
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        args = list(ctx.others)
        for position, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[position] = tensor
        wanted = [i for i in positions if ctx.needs_input_grad[i]]
        result: list[Tensor | None] = [None] * len(args)
        if wanted:
            for position, grad in zip(wanted, vjp(args, grads, wanted), strict=True):
                result[position] = grad
        return tuple(result) if len(result) > 1 else result[0]

    definition.register_autograd(backward, setup_context=setup)
