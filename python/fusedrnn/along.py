"""What a call may say along time, as users write it and as the engines take it: lengths, resets, jagged batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .torch_state import unusual_mode

_debugging: ContextVar[bool] = ContextVar("fusedrnn_debugging", default=False)


class debug:  # noqa: N801 (used as a function)
    """Whether to check what only a GPU knows, which waits for it: that lengths there are from 0 to T.

    Without it such lengths are clamped. ``fusedrnn.debug(True)`` holds from then on in the current thread or
    asynchronous task; ``with fusedrnn.debug(True):`` until the end of the block.
    """

    def __init__(self, enabled: bool) -> None:
        self._token = _debugging.set(enabled)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _debugging.reset(self._token)


class States(NamedTuple):
    """The states of every step, for each layer, laid out as the output.

    Attributes:
        h: of each layer (T, B, D*R), before the dropout between layers.
        c: of each layer (T, B, D*H), None for cells without one.
    """

    h: tuple[Tensor, ...]
    c: tuple[Tensor, ...] | None


@dataclass
class Along:
    """Options along time in the layout of the engines, see :class:`fusedrnn.engines.base.Call`.

    Attributes:
        lengths: (B,).
        resets: (T, B), or (tokens,) of a packed batch.
        reset_state: for each state (L*D, B, width) or None for zeros; empty: all are zeros.
        states: whether the states of every step are wanted.
    """

    lengths: Tensor | None = None
    resets: Tensor | None = None
    reset_state: tuple[Tensor | None, ...] = ()
    states: bool = False


PLAIN = Along()


def checked(
    input: Tensor,
    layout: str,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_state: Sequence[Tensor | None] | None,
    return_states: bool,
    hx_given: bool,
) -> Along:
    """The options of a call, checked, time first.

    Args:
        input: as the user gave it.
        layout: its dimensions but the features, in order: ``"TB"``, ``"BT"``, ``"T"``, or ``"tokens"`` if packed.
        lengths: integers (B,), or () for layout T, on any device.
        resets: bool, shaped as the input without its features.
        reset_state: for each state (L*D, B or 1, width), (L*D, width) for layout T, or None for zeros.
        return_states: whether the states of every step are wanted.
        hx_given: whether the caller has given the initial state, which then begins the first segment.

    Raises:
        TypeError: lengths or resets are not tensors.
        RuntimeError: wrong shapes, dtypes, devices, lengths outside [0, T], or a reset_state without resets.
    """
    shape = tuple(input.shape[:-1])
    if lengths is not None:
        if layout == "tokens":
            raise RuntimeError("lengths are for a padded batch, and the input is packed: it has batch_sizes")
        lengths = _checked_lengths(
            lengths, shape[layout.index("T")], () if layout == "T" else (shape[layout.index("B")],), input
        )
    if resets is not None:
        check_resets(resets, shape, input)
        if layout == "T":
            resets = resets[:, None]
        elif layout == "BT":
            resets = resets.transpose(0, 1)
        if hx_given:
            if layout == "tokens":
                raise RuntimeError("resets of a packed batch need hx=None: pad it and give lengths instead")
            resets = torch.cat([torch.zeros_like(resets[:1]), resets[1:]])
    states = reset_state_of_rows(reset_state, resets, input, shape, layout)
    return Along(lengths, resets, states, return_states)


def reset_state_of_rows(
    reset_state: Sequence[Tensor | None] | None,
    resets: Tensor | None,
    input: Tensor,
    shape: Sequence[int],
    layout: str,
) -> tuple[Tensor | None, ...]:
    """For each state one of each row; shapes that do not fit are left for the layer's own check."""
    if reset_state is None:
        return ()
    if resets is None:
        raise RuntimeError("reset_state is given without resets, which say where it is used")
    if isinstance(reset_state, Tensor) or not all(s is None or isinstance(s, Tensor) for s in reset_state):
        raise TypeError("reset_state must be like hx: a tensor, or for an LSTM a tuple of two")
    if layout == "T":
        return tuple(None if s is None else s.unsqueeze(-2) for s in reset_state)
    if layout == "tokens":
        raise RuntimeError("reset_state is for a padded batch, and the input is packed")
    batch = shape[layout.index("B")]
    return tuple(
        s if s is None or s.dim() < 2 or s.shape[-2] != 1 else s.expand(*s.shape[:-2], batch, s.shape[-1])
        for s in reset_state
    )


def check_resets(resets: Tensor, shape: Sequence[int], input: Tensor) -> None:
    """Raise if ``resets`` is not a Boolean of this shape beside the input."""
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets must be a Tensor, not {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise RuntimeError(f"resets must be of dtype torch.bool, got {resets.dtype}")
    if tuple(resets.shape) != tuple(shape):
        raise RuntimeError(
            f"Expected resets of shape {tuple(shape)}, that of the input without its features, got "
            f"{tuple(resets.shape)}"
        )
    if resets.device != input.device:
        raise RuntimeError(f"input is on {input.device}, but resets on {resets.device}")


def _checked_lengths(lengths: Tensor, steps: int, shape: tuple[int, ...], input: Tensor) -> Tensor:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a Tensor, not {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise RuntimeError(f"lengths must be integers, got {lengths.dtype}")
    if tuple(lengths.shape) != shape:
        raise RuntimeError(f"Expected lengths of shape {shape}, one for each sequence, got {tuple(lengths.shape)}")
    if lengths.is_meta and not input.is_meta:
        raise RuntimeError(f"input is on {input.device}, but lengths on {lengths.device}, where they have no values")
    lengths = lengths.reshape(-1).to(torch.int64)
    readable = lengths.is_cpu or input.is_cpu or _debugging.get()
    if readable and unusual_mode() is None and type(lengths) is Tensor and lengths.numel():
        shortest, longest = (int(end) for end in lengths.aminmax())
        if shortest < 0 or longest > steps:
            raise RuntimeError(
                f"lengths must be from 0 to the {steps} steps of the input, got {shortest if shortest < 0 else longest}"
            )
    return lengths if lengths.device == input.device else lengths.to(input.device)


def pad(jagged: Any) -> tuple[Tensor, Tensor]:
    """A jagged nested tensor (B, j, *) as a padded one (B, T, *) and its lengths (B,).

    Raises:
        RuntimeError: it is not jagged in its second dimension alone, with its rows side by side.
    """
    if jagged.layout != torch.jagged or getattr(jagged, "_ragged_idx", 1) != 1 or jagged.lengths() is not None:
        raise RuntimeError("a nested tensor must be of layout torch.jagged, jagged in dimension 1, without holes")
    lengths: Tensor = jagged.offsets().diff()
    values = jagged.values()
    if int(lengths.sum()) != len(values):
        raise RuntimeError(f"the offsets of a nested tensor must span its {len(values)} rows, got {int(lengths.sum())}")
    there = _there(lengths, max(1, int(lengths.max()) if len(lengths) else 1))
    padded = values.new_zeros((*there.shape, *values.shape[1:]))
    return padded.index_put((there,), values), lengths


def unpad(padded: Tensor, like: Any) -> Tensor:
    """The other way, with the offsets of ``like``."""
    lengths = like.offsets().diff()
    return torch.nested.nested_tensor_from_jagged(padded[_there(lengths, padded.shape[1])], like.offsets())


def _there(lengths: Tensor, steps: int) -> Tensor:
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def of_layer(along: Along, layer: int, directions: int) -> tuple[Tensor | None, ...]:
    """The reset states of one layer."""
    return tuple(None if s is None else s[layer * directions : (layer + 1) * directions] for s in along.reset_state)


def to(along: Along, dtype: torch.dtype) -> Along:
    """With the reset states in a dtype."""
    return replace(along, reset_state=tuple(None if s is None else s.to(dtype) for s in along.reset_state))
