from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

class Layout(Enum):
    time_major = ...
    batch_first = ...
    one_step = ...

def forward(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    hx: Sequence[Tensor | None],
    reset_state: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    h_mask: Tensor | None,
    zoneout: Sequence[float],
    seed: int | None,
    recompute: bool,
    sequence: bool,
    every_state: bool,
    save: bool,
    threads: int,
) -> list[Tensor | None]: ...
def express(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor | None],
    weights: Sequence[Tensor | None] | Mapping[str, Tensor | None],
    names: list[str] | None,
    bias: bool,
    projected: bool,
    layout: Layout,
    lengths: Tensor | None,
    grad: bool,
    threads: int,
) -> Any: ...
def express_backward(
    cell: str,
    tensors: Sequence[Tensor | None],
    layout: Layout,
    saved: Tensor,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    threads: int,
) -> tuple[Tensor | None, ...] | None: ...
def backward(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    hx: Sequence[Tensor | None],
    reset_state: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    h_mask: Tensor | None,
    zoneout: Sequence[float],
    seed: int | None,
    recompute: bool,
    saved: Tensor,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    threads: int,
) -> tuple[Tensor | None, ...]: ...
def saved_per_token(cell: str, hidden: int, output: int, projected: bool, recompute: bool) -> int: ...
def probe_multiply_adds(dtype: str, seconds: float) -> float | None: ...
def probe_read(bytes: int, seconds: float) -> float: ...
def set_batch_invariant(enabled: bool) -> bool: ...
def is_batch_invariant() -> bool: ...
def threads_left_out() -> int: ...
def meeting_cost() -> float | None: ...
def assume_meeting_cost(nanoseconds: float) -> None: ...
def isa() -> str: ...
def multiplies_bfloat16() -> bool: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
