"""fastlm: language models that run fast on the machine you have.

    import fastlm

    lm = fastlm.load("smollm2-135m")
    print(lm.generate("The capital of France is", max_new_tokens=8, temperature=0))

`fastlm.ops` has the operators, `fastlm.nn` drop-in modules, `fastlm.training.Trainer` the training loop;
`fastlm.accelerate(model)` puts fastlm's modules into any torch model, `fastlm.generate` its generation loop into those
of transformers; `fastlm.backend(name)` forces an implementation and `fastlm.explain(op, ...)` says which one a call
would use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm.generation import LanguageModel, SamplingParams, load
    from fastlm.integrations.torch_modules import accelerate, restore
    from fastlm.integrations.transformers import generate
    from fastlm.ops.registry import backend, explain

__version__ = "0.1.0"

__all__ = [
    "LanguageModel",
    "SamplingParams",
    "__version__",
    "accelerate",
    "backend",
    "explain",
    "generate",
    "load",
    "restore",
]

# Loaded when first used, so that `import fastlm` (and `fastlm --help`) does not wait for all of it.
_LAZY = {
    "LanguageModel": "fastlm.generation",
    "SamplingParams": "fastlm.generation",
    "load": "fastlm.generation",
    "accelerate": "fastlm.integrations.torch_modules",
    "restore": "fastlm.integrations.torch_modules",
    "generate": "fastlm.integrations.transformers",
    "backend": "fastlm.ops.registry",
    "explain": "fastlm.ops.registry",
}
_SUBMODULES = frozenset(
    {"checkpoints", "data", "evaluation", "generation", "integrations", "models", "nn", "ops", "training"}
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"fastlm.{name}")
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBMODULES})
