"""The engine of the last text, kept for the next: its recorded steps, and its draft's, need not be recorded again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastlm.generation.engine import Engine
from fastlm.kernels import native
from fastlm.models.base import CausalLM
from fastlm.nn.hooks import untouched
from fastlm.ops.quantized import QuantizedTensor
from fastlm.ops.registry import choosing

__all__ = ["Kept"]

_LENGTHS = 256  # a state has room for a multiple of so many tokens, so that it fits texts of about its own length
_MOST_BYTES = 256 << 20  # of a cache that is kept
_MOST_ROWS = 8  # of an engine that is kept: it has logits and options of every number of rows that ran together

State = tuple[list[Any], list[Any]]


class Kept:
    """Room for one engine. It serves again where model, options and everything that its recordings go by are the same.

    A copy of it, pickled or not, is empty.
    """

    def __init__(self) -> None:
        self._held: Engine | None = None
        self._made_for: WeakKeyDictionary[Engine, tuple[State, tuple[Any, ...]]] = WeakKeyDictionary()
        self.used = 0  # times that an engine was lent

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def take(
        self,
        model: CausalLM,
        *,
        rows: int,
        max_length: int,
        stop_ids: Collection[int] = (),
        kv_dtype: torch.dtype | None = None,
        draft_model: CausalLM | None = None,
        capture: bool = True,
    ) -> Engine:
        """An engine with nothing to do, for `rows` requests of up to `max_length` tokens; arguments as of `Engine`."""
        engine, self._held = self._held, None
        self.used += 1
        options = frozenset(stop_ids), kv_dtype, capture, native.num_threads(), torch.get_default_dtype()
        state = _state(model, draft_model)
        if engine is not None and state is not None and choosing():
            was, with_options = self._made_for[engine]
            if with_options == options and _same(was, state) and engine.holds(rows, max_length):
                return engine
        engine = None  # before there is another
        context = model.config.context_length
        roomy = -(-max_length // _LENGTHS) * _LENGTHS
        made = Engine(
            model,
            rows=rows,
            max_length=roomy if context is None else min(roomy, context),
            stop_ids=stop_ids,
            capture=capture,
            kv_dtype=kv_dtype,
            draft_model=draft_model,
        )
        if state is not None and rows <= _MOST_ROWS:
            self._made_for[made] = state, options
        return made

    def give(self, engine: Engine) -> None:
        """Takes back what was lent, all its requests having ended."""
        wanted = engine in self._made_for and engine.reusable and engine.state_bytes <= _MOST_BYTES
        if wanted and choosing():
            self._held = engine


def _state(*models: CausalLM | None) -> State | None:
    """What a recording of these models goes by: objects that must be the very same, and values that must be equal.

    None where something hooks into them, which may do anything.
    """
    objects: list[Any] = [*models]
    values: list[Any] = []
    for model in models:
        if model is None:
            continue
        modules = _modules(model)
        if not untouched(*modules):
            return None
        for module in modules:
            objects.append(module)
            for value in vars(module).values():
                if isinstance(value, dict):  # most are: hooks, and what is looked at below
                    continue
                if isinstance(value, (bool, int, float, str, type(None))):
                    values.append(value)
                elif isinstance(value, QuantizedTensor):
                    objects.append(value)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                objects.append(tensor)
                if tensor is not None:
                    values += [tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version]
    return objects, values


def _modules(model: nn.Module) -> list[nn.Module]:
    """As `model.modules()`, in another order and in less time, which every text waits for."""
    found: dict[int, nn.Module] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            left += module._modules.values()
    return list(found.values())


def _same(one: State, other: State) -> bool:
    same = len(one[0]) == len(other[0]) and all(a is b for a, b in zip(one[0], other[0], strict=True))
    return same and one[1] == other[1]
