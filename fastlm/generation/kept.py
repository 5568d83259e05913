"""The engine of the last text, kept for the next: its recorded steps, and its draft's, need not be recorded again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.nn.modules import module as hooks

from fastlm.generation.engine import Engine
from fastlm.kernels import native
from fastlm.models.base import CausalLM
from fastlm.ops.quantized import QuantizedTensor
from fastlm.ops.registry import choosing

__all__ = ["Kept"]

_LENGTHS = 256  # a state has room for a multiple of so many tokens, so that it fits texts of about its own length
_MOST_BYTES = 256 << 20  # of a cache that is kept

State = tuple[list[Any], list[Any]]


class Kept:
    """Room for one engine. It serves again where model, options and everything that its recordings go by are the same.

    A copy of it, pickled or not, is empty.
    """

    def __init__(self) -> None:
        self._held: tuple[Engine, State, tuple[Any, ...]] | None = None
        self._lent: tuple[State, tuple[Any, ...]] = ([], []), ()
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
        held, self._held = self._held, None
        self.used += 1
        options = frozenset(stop_ids), kv_dtype, capture, native.num_threads(), torch.get_default_dtype()
        state = _state(model, draft_model)
        if held is not None and choosing():
            engine, was, with_options = held
            if with_options == options and _same(was, state) and engine.holds(rows, max_length):
                self._lent = state, options
                return engine
        context = model.config.context_length
        roomy = -(-max_length // _LENGTHS) * _LENGTHS
        self._lent = state, options
        return Engine(
            model,
            rows=rows,
            max_length=roomy if context is None else min(roomy, context),
            stop_ids=stop_ids,
            capture=capture,
            kv_dtype=kv_dtype,
            draft_model=draft_model,
        )

    def give(self, engine: Engine) -> None:
        """Takes back what was lent last, all its requests having ended."""
        if choosing() and engine.state_bytes <= _MOST_BYTES:
            self._held = (engine, *self._lent)


def _state(*models: CausalLM | None) -> State:
    """What a recording of these models goes by: objects that must be the very same, and values that must be equal."""
    objects: list[Any] = [*models]
    values: list[Any] = [len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)]
    for model in models:
        if model is None:
            continue
        for module in model.modules():
            objects += [module, *(held for held in vars(module).values() if isinstance(held, QuantizedTensor))]
            values += [len(module._forward_hooks), len(module._forward_pre_hooks), module.training]
        for tensor in (*model.parameters(), *model.buffers()):
            objects.append(tensor)
            values += [tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version]
    return objects, values


def _same(one: State, other: State) -> bool:
    same = len(one[0]) == len(other[0]) and all(a is b for a, b in zip(one[0], other[0], strict=True))
    return same and one[1] == other[1]
