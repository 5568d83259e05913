"""What the readers of all formats share: the result, names and shapes against the model, weights into modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlm.checkpoints.errors import CheckpointError
from fastlm.models import CausalLM, ModelConfig, build
from fastlm.nn.embedding import QuantizedEmbedding
from fastlm.nn.linear import Linear, QuantizedLinear
from fastlm.ops.quantized import QuantizedTensor

if TYPE_CHECKING:
    from fastlm.data.tokenizer import Tokenizer

__all__ = ["Checkpoint", "Weight", "dense_weights", "expect_match", "install", "skeleton", "translate"]

Weight: TypeAlias = Tensor | QuantizedTensor

_KINDS = {torch.float16: "F16", torch.bfloat16: "BF16"}
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Checkpoint:
    """A model, in eval mode, with what came with it."""

    model: CausalLM
    tokenizer: Tokenizer | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def translate(name: str, modules: Mapping[str, str]) -> str:
    """A parameter's name in another naming: `modules` maps module names, with N for the layer's number."""
    module, _, parameter = name.rpartition(".")
    parts = module.split(".")
    number = parts[1] if parts[0] == "layers" else ""
    template = module.replace(f"layers.{number}.", "layers.N.", 1) if number else module
    return f"{modules[template].replace('N', number)}.{parameter}"


class _Uninitialized(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it fills nothing, yet its first random draw imports all of dynamo."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def skeleton(path: Path, make: Callable[[], ModelConfig]) -> CausalLM:
    """The model of the configuration that `make` returns, without memory for its weights.

    Raises:
        CheckpointError: the configuration describes no model that can be built.
    """
    try:
        with torch.device("meta"), _Uninitialized():
            return build(make())
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(path, f"describes no model: {error}") from error


def expect_match(path: Path, expected: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]]) -> None:
    """Raises CheckpointError unless `found` has exactly the tensors of `expected`, by name and shape."""
    problems = []
    for what, names in (("lacks", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
            problems.append(f"{what} {', '.join(sorted(names)[:_NAMED_AT_MOST])}{more}")
    wrong = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if list(found[name]) != list(expected[name])
    ]
    problems += wrong[:_NAMED_AT_MOST]
    if problems:
        raise CheckpointError(path, "tensors do not fit the configuration: " + "; ".join(problems))


def install(
    model: CausalLM,
    weights: Mapping[str, Weight],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    compute: str,
) -> CausalLM:
    """Puts weights, checked by `expect_match`, into a `skeleton`, and returns it in eval mode.

    With dtype None, matrices keep the precision they are stored in, in place: 16-bit and block formats become frozen
    quantised modules with float32 activations. Else every weight becomes a trainable parameter of that dtype.
    """
    for prefix, module in list(model.named_modules()):
        for name, _ in list(module.named_parameters(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            weight = weights[full]
            is_matrix = name == "weight" and isinstance(module, (nn.Linear, nn.Embedding))
            if dtype is None and is_matrix and isinstance(weight, Tensor) and weight.dtype in _KINDS:
                weight = as_quantized(weight)
            if dtype is None and is_matrix and isinstance(weight, QuantizedTensor):
                bias = None
                if getattr(module, "bias", None) is not None:
                    bias = _dense(weights[f"{prefix}.bias"], torch.float32)
                if isinstance(module, nn.Linear):
                    model.set_submodule(prefix, QuantizedLinear(weight, bias, compute))
                else:
                    model.set_submodule(prefix, QuantizedEmbedding(weight))
                break
            value = _dense(weight, dtype or torch.float32)
            setattr(module, name, nn.Parameter(value, requires_grad=dtype is not None))
    if model.output is None and isinstance(model.embedding, QuantizedEmbedding):
        model.output = QuantizedLinear(model.embedding.weight, model.head_bias, compute)
    return model.to(device).eval() if device is not None else model.eval()


def as_quantized(weight: Tensor) -> QuantizedTensor:
    """A 16-bit matrix as a QuantizedTensor over the same memory."""
    weight = weight.contiguous()
    return QuantizedTensor(weight.view(torch.uint8), _KINDS[weight.dtype], (weight.shape[0], weight.shape[1]))


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)


def dense_weights(model: CausalLM) -> dict[str, Tensor]:
    """Every weight by its name in the freshly built model, quantised ones expanded to float32."""
    found = dict(model.state_dict())
    for prefix, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            found[f"{prefix}.weight"] = module.weight.dequantize()
    if getattr(model.config, "tie_embeddings", False):
        found = {name: tensor for name, tensor in found.items() if not name.startswith("output.")}
    return found


def is_linear(model: CausalLM, name: str) -> bool:
    """Whether the parameter `name` is a linear layer's weight."""
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and isinstance(model.get_submodule(module), (Linear, QuantizedLinear))
