"""How this copy of fusedrnn was built, and why one of its compiled modules may be missing."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from types import ModuleType

#: The names under which CMake looks for a C++ compiler on Linux and macOS.
_COMPILERS = ("c++", "g++", "clang++")


def load(name: str) -> tuple[ModuleType | None, str]:
    """Import one of the compiled modules.

    Args:
        name: ``"_cpu"`` or ``"_cuda"``.

    Returns:
        the module and an empty text, or None and the reason why it cannot be had.
    """
    full_name = f"{__package__}.{name}"
    try:
        return import_module(full_name), ""
    except ModuleNotFoundError:
        return None, f"the compiled module is missing: {_why_not_built(name)}"
    except ImportError as error:
        return None, f"the compiled module cannot be loaded: {error}"


def built_with() -> str:
    """Compilers and GPU targets of this copy; empty if it was not compiled, or not by an installation."""
    record = _record()
    return "" if record is None else str(record.BUILT_WITH)


def commit() -> str | None:
    """The commit that this copy was built from, ``-dirty`` if files differed; None if the build did not know."""
    record = _record()
    return None if record is None else record.COMMIT or None


def _record() -> ModuleType | None:
    """What the build wrote about itself: CMake from build_record.py.in, or, where CMake failed, pyproject.toml."""
    try:
        return import_module(f"{__package__}._build_record")
    except ModuleNotFoundError:
        return None


def _why_not_built(name: str) -> str:
    record = _record()
    reason = "this copy of fusedrnn was never compiled" if record is None else record.NOT_BUILT.get(name)
    if reason is None:
        return "it was built, but is no longer there"
    wanted = (os.environ.get("CXX", ""), *_COMPILERS)
    if name == "_cpu" and not any(map(shutil.which, filter(None, wanted))):
        reason += f"; this machine has no C++ compiler: none of {', '.join(_COMPILERS)} is on PATH"
    return str(reason)
