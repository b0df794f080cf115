"""What forward keeps for backward: all the gates, or the states alone, from which backward computes the gates again."""

from __future__ import annotations

from contextvars import ContextVar

from .engines.base import Call
from .torch_state import constant_while_compiling

_budget: ContextVar[int] = ContextVar("fusedrnn_save_budget", default=2**30)

SAVE = ("all", "states", "auto")


class save_budget:  # noqa: N801 (used as a function)
    """How many bytes of gates a layer with ``save="auto"`` keeps for backward; where it would keep more, none.

    ``fusedrnn.save_budget(2**28)`` holds from then on in the current thread or asynchronous task;
    ``with fusedrnn.save_budget(2**28):`` until the end of the block. At first it is 2^30.

    What torch.compile compiles keeps the budget that held when it did.

    Args:
        bytes: of one layer, both directions together.

    Raises:
        ValueError: bytes is negative.
    """

    def __init__(self, bytes: int) -> None:
        if not bytes >= 0:
            raise ValueError(f"save_budget must be a number of bytes, at least 0, got {bytes}")
        self._token = _budget.set(bytes)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _budget.reset(self._token)


def check_save(save: str) -> None:
    """Raise ValueError if it is not one of ``SAVE``."""
    if save not in SAVE:
        raise ValueError(f"save must be one of {', '.join(map(repr, SAVE))}, got {save!r}")


@constant_while_compiling
def _current_budget() -> int:
    return _budget.get()


def recomputes(save: str, call: Call) -> bool:
    """Whether backward of the call should compute the gates again."""
    if save != "auto":
        return save == "states"
    gates = call.tokens * call.directions * len(call.cell.gates) * call.hidden_size
    return bool(gates * call.input.element_size() > _current_budget())
