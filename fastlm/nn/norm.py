"""torch's normalisation modules over fastlm's ops: the same constructors, parameters and state_dicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm.nn.hooks import untouched
from fastlm.ops import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = ["LayerNorm", "RMSNorm", "add_norm"]


def _last(input: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """`input` with its normalised dimensions, given by `shape`, as one."""
    if tuple(input.shape[-len(shape) :]) != tuple(shape):
        raise ValueError(f"{name}: input has shape {list(input.shape)}, expected [..., {', '.join(map(str, shape))}]")
    return input.flatten(-len(shape)) if len(shape) > 1 else input


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm`, computed by `fastlm.ops.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises the last dimensions of input [..., *normalized_shape]."""
        if input.shape[-1:] == self.normalized_shape:
            return layer_norm(input, self.weight, self.bias, eps=self.eps)
        x = _last(input, self.normalized_shape, "LayerNorm")
        return layer_norm(x, _flat(self.weight), _flat(self.bias), eps=self.eps).view(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm`, computed by `fastlm.ops.rms_norm`. As there, eps None means the input dtype's epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimensions of input [..., *normalized_shape]."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if x.shape[-1:] == self.normalized_shape:
            return rms_norm(x, self.weight, eps=eps)
        return rms_norm(_last(x, self.normalized_shape, "RMSNorm"), _flat(self.weight), eps=eps).view(x.shape)


def add_norm(norm: nn.Module, input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of input + residual, and that sum; without a residual, of input alone.

    One op for both where `norm` is one of ours that nothing has replaced or hooks into.
    """
    if residual is None:
        return norm(input), input
    if type(norm) in (LayerNorm, RMSNorm) and input.shape[-1:] == norm.normalized_shape and untouched(norm):
        if isinstance(norm, LayerNorm):
            return add_layer_norm(input, residual, norm.weight, norm.bias, eps=norm.eps)
        assert isinstance(norm, RMSNorm)
        if norm.eps is not None:
            return add_rms_norm(input, residual, norm.weight, eps=norm.eps)
    total = input + residual
    return norm(total), total
