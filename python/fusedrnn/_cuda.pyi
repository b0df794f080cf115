from collections.abc import Sequence
from enum import Enum
from typing import TypedDict

class Arithmetic(Enum):
    f32 = ...
    tf32 = ...
    bf16 = ...
    f16 = ...
    f64 = ...

class Path(Enum):
    automatic = ...
    one_cta = ...
    grid = ...
    per_step = ...

class Sizes:
    def __init__(
        self, cell: str, arithmetic: Arithmetic, backward: bool, T: int, B: int, H: int, directions: int
    ) -> None: ...

class Plan:
    path: Path
    row_groups: int
    k_groups: int
    units: int
    unit_blocks: int
    slice: int
    slices: int
    directions_at_once: int
    shared_blocks: int
    shared_bytes: int
    scratch_bytes: int

class CellFacts(TypedDict):
    gates: int
    states: int
    slots: int
    kept: int
    input_slot: list[int]

class Device(TypedDict):
    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    cooperative: bool

def plan(
    sizes: Sizes, device: int, path: Path = ..., row_groups: int = 0, k_groups: int = 0, slice: int = 0
) -> Plan: ...
def forward(
    *,
    sizes: Sizes,
    plan: Plan,
    device: int,
    stream: int,
    scratch: int,
    tokens: int,
    starts: int,
    lengths: int,
    resets: int,
    h_mask: int,
    zoneout: Sequence[float],
    seed: int,
    gates_x: int,
    w_hh: Sequence[int],
    w_stride: int,
    b_hh: Sequence[int],
    initial: Sequence[int],
    output: int,
    output_step: int,
    output_row: int,
    final: Sequence[int],
    kept: int,
    cells: int,
    computed: int,
) -> None: ...
def backward(
    *,
    sizes: Sizes,
    plan: Plan,
    device: int,
    stream: int,
    scratch: int,
    tokens: int,
    starts: int,
    lengths: int,
    resets: int,
    h_mask: int,
    zoneout: Sequence[float],
    seed: int,
    w_hh_t: Sequence[int],
    w_stride: int,
    initial: Sequence[int],
    output: int,
    output_step: int,
    output_row: int,
    kept: int,
    cells: int,
    computed: int,
    d_output: int,
    d_output_step: int,
    d_output_row: int,
    d_final: Sequence[int],
    d_slots: int,
    d_initial: Sequence[int],
) -> None: ...
def cell_facts(name: str) -> CellFacts: ...
def device_count() -> int: ...
def device(device: int) -> Device: ...
def versions() -> tuple[int, int]: ...
