"""Triton kernels with a fault planted in their source: the tests of the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """A copy of `module` in `folder` in whose source each (old, new) is replaced; old has to occur.

    A file, for Triton reads its functions' source from there.
    """
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    for old, new in changes:
        assert old in source, f"{old!r} is not in {module.__name__} any more"
        source = source.replace(old, new)
    path = folder / f"mutant_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = copy
    spec.loader.exec_module(copy)
    return copy
