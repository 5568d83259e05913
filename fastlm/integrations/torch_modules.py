"""`fastlm.accelerate(model)` and `fastlm.restore(model)`: fastlm's modules in the place of torch's, in any model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from fastlm import nn as ours
from fastlm.nn.linear import QuantizedLinear
from fastlm.ops.quantized import QuantizedTensor
from fastlm.reference.quantized import KINDS

__all__ = ["Report", "accelerate", "restore"]

# The same attributes and parameters: such a module becomes the other by taking its class.
_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: ours.LSTM,
    nn.GRU: ours.GRU,
    nn.RNN: ours.RNN,
    nn.LSTMCell: ours.LSTMCell,
    nn.GRUCell: ours.GRUCell,
    nn.RNNCell: ours.RNNCell,
}
_ORIGINALS = {twin: original for original, twin in _TWINS.items()}
_KEY = "_fastlm_original"


@dataclass
class Report:
    """What was swapped and what was not.

    Attributes:
        swapped: names of modules and what became of them, as "torch.nn.LSTM -> fastlm.nn.LSTM".
        kept: names of modules that might have been swapped, and why they were not.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, kept {len(self.kept)}"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"  {name or '(the model)'}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, recurrent: bool = True, linear: str | None = None) -> Report:
    """Puts fastlm's modules in the place of torch's, in `model` itself.

    Recurrent modules keep their identity, parameters, hooks and state_dict; they only take the class of their twin, so
    optimisers and references to them stay right. Linear layers, where asked for, are replaced by frozen quantised ones
    for inference on the CPU; they keep the original for `restore`, at the price of its memory.

    Args:
        model: any module.
        recurrent: swap LSTM, GRU, RNN and their cells.
        linear: the kind to quantise linear layers to ("Q8_0", "Q4_0", "Q4_1", "F16", "BF16"), or None.

    Returns:
        What was swapped, and what could have been but was not, with the reason. Print it.

    Raises:
        ValueError: `linear` is not a kind.
    """
    if linear is not None and linear not in KINDS:
        raise ValueError(f"linear: {linear!r} is not one of {', '.join(KINDS)}, or None")
    report = Report()
    for name, module in list(model.named_modules()):
        if recurrent and issubclass(type(module), tuple(_TWINS)):
            _swap_class(name, module, report)
        elif linear is not None and isinstance(module, nn.Linear):
            _quantise(model, name, module, linear, report)
    return report


def restore(model: nn.Module) -> Report:
    """Undoes `accelerate`: torch's modules are back, with the parameters as they are now.

    A quantised linear layer's original comes back as it was when it was replaced, its weights not being trained in
    between.
    """
    report = Report()
    for name, module in list(model.named_modules()):
        original = _ORIGINALS.get(type(module))
        if original is not None and module.__dict__.get(_KEY):
            del module.__dict__[_KEY]
            module.__class__ = original
            report.swapped[name] = f"{_title(type(module), 'torch')}, restored"
        elif isinstance(module, QuantizedLinear) and _KEY in module.__dict__:
            model.set_submodule(name, module.__dict__[_KEY])
            report.swapped[name] = "torch.nn.Linear, restored"
    return report


def _title(kind: type, package: str) -> str:
    return f"{package}.nn.{kind.__name__}"


def _swap_class(name: str, module: nn.Module, report: Report) -> None:
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        report.kept[name] = "parametrized, which has given it a class of its own"
    elif kind not in _TWINS:
        report.kept[name] = f"a {kind.__module__}.{kind.__qualname__}, whose own behaviour would be lost"
    else:
        module.__class__ = _TWINS[kind]
        module.__dict__[_KEY] = True
        report.swapped[name] = f"{_title(kind, 'torch')} -> {_title(kind, 'fastlm')}"


def _quantise(model: nn.Module, name: str, module: nn.Linear, kind: str, report: Report) -> None:
    if type(module) not in (nn.Linear, ours.Linear):
        report.kept[name] = f"a {type(module).__qualname__}, whose own behaviour would be lost"
    elif not name:
        report.kept[name] = "the model itself, which nothing holds that could hold another in its place"
    elif module.weight.device.type != "cpu":
        report.kept[name] = f"on {module.weight.device}; quantised products run on the CPU"
    elif module.in_features % 32 and KINDS[kind].dtype is None:
        report.kept[name] = f"{module.in_features} inputs, which are no whole number of blocks of 32"
    else:
        with torch.no_grad():
            weight = QuantizedTensor.quantize(module.weight.detach(), kind)
        bias = None if module.bias is None else module.bias.detach()
        swapped = QuantizedLinear(weight, bias).train(module.training)
        swapped.__dict__[_KEY] = module  # past nn.Module, so that it is no submodule and not in the state_dict
        model.set_submodule(name, swapped)
        report.swapped[name] = f"torch.nn.Linear -> {kind}, {weight.nbytes / 1e6:.1f} MB"
