"""Print the CUDA target of this machine's GPU, such as ``90a-real``; fail with a message where there is none.

For ``make gpu-check`` and ``make gpu-bench``, which build the kernels for one GPU only.
"""

from __future__ import annotations

import sys

import torch

_OLDEST = (8, 0)


def target() -> str:
    """The target of the current GPU in CMake's words.

    Raises:
        RuntimeError: torch finds no GPU, or one that the kernels do not support.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(f"no GPU: torch {torch.__version__} finds no CUDA device on this machine")
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        name = torch.cuda.get_device_name()
        raise RuntimeError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
        )
    # Hopper's own instructions are in 90a only.
    return f"{capability[0]}{capability[1]}{'a' if capability == (9, 0) else ''}-real"


if __name__ == "__main__":
    try:
        print(target())
    except RuntimeError as error:
        sys.exit(str(error))
