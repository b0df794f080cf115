"""Drop-in replacements of torch.nn's recurrent modules.

Each is a subclass of torch.nn's module of the same name and inherits its constructor, parameters, state_dict,
initial weights, repr, checks and error messages. Only ``forward`` is ours, so any module of torch.nn can become one
of these, and back, by changing its class: see :func:`fusedrnn.convert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dynamo, functional
from .cells import CELLS, MODES, Cell
from .torch_state import NO_OPERATORS_THERE

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


def _current(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The module's weights as they are now: parameters, or whatever replaced them (parametrizations, weight drop)."""
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]  # type: ignore[misc]
    except KeyError:
        return [getattr(module, name) for name in names]


class _Fused(torch.nn.Module):
    """What all our modules have."""

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script calls it
        raise RuntimeError(NO_OPERATORS_THERE.format("torch.jit.script"))


class _Recurrent(_Fused, torch.nn.RNNBase):
    """``forward`` for all of torch.nn's sequence modules."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the network as torch.nn's module of the same name does.

        Args:
            input: (T, B, I), (B, T, I) with ``batch_first``, unbatched (T, I), or a PackedSequence.
            hx: initial state (L*D, B, R), for an LSTM a pair with c (L*D, B, H); unbatched without B; None for zeros.

        Returns:
            output, laid out as the input with D*R features, and the final state, shaped as ``hx``.

        Raises:
            ValueError, RuntimeError: whatever torch.nn's module raises for the same fault.
        """
        cell = MODES[self.mode]
        weights = _current(self, self._flat_weights_names)
        states = _states(cell, hx)
        if self.num_layers == 1:
            layout = "batch_first" if self.batch_first else "time_major"
            quick = functional.express(cell, input, states, weights, layout, self.bias, self.proj_size > 0)
            if quick is not None:
                return quick[0], quick[1] if len(quick) == 2 else quick[1:]
        if isinstance(input, PackedSequence):
            return _forward_packed(self, cell, input, hx, weights)
        # While torch compiles, the operator's own checks do: Dynamo could not show what these raise.
        if not _looks_right(self, input, hx, weights) and not torch.compiler.is_compiling():
            _check(self, cell, input, hx)
        output, last = functional.sequence(cell, input, states, weights, batch_first=self.batch_first, **_options(self))
        return output, last[0] if len(last) == 1 else tuple(last)


def _options(module: torch.nn.RNNBase) -> dict[str, Any]:
    return {
        "bias": module.bias,
        "num_layers": module.num_layers,
        "dropout": module.dropout,
        "training": module.training,
        "bidirectional": module.bidirectional,
        "projected": module.proj_size > 0,
    }


def _states(cell: Cell, hx: Any) -> Sequence[Tensor | None]:
    if len(cell.states) == 1:
        return (hx,)
    return (None,) * len(cell.states) if hx is None else hx


def _looks_right(module: torch.nn.RNNBase, input: Tensor, hx: Any, weights: list[Tensor]) -> bool:
    """A quick look that never errs in saying yes, and spares the usual call torch.nn's checks (20 us)."""
    shape = input.shape
    return hx is None and len(shape) == 3 and shape[2] == module.input_size and input.dtype == weights[0].dtype


def _check(module: torch.nn.RNNBase, cell: Cell, input: Tensor, hx: Any) -> None:
    """Raise what torch.nn raises: its own checks, in its order."""
    module._update_flat_weights()  # torch.func.functional_call exchanges weights behind the list that checks read
    if input.dim() not in (2, 3):
        raise ValueError(f"{type(module).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batched = input.dim() == 3
    if not batched:
        input = input.unsqueeze(0 if module.batch_first else 1)
    if hx is None:
        module.check_input(input, None)
        return
    several = len(cell.states) > 1
    dims = [hx[0].dim(), hx[1].dim()] if several else [hx.dim()]
    if any(d != (3 if batched else 2) for d in dims):
        kind, want = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
        got = ", ".join(f"{d}-D" for d in dims)
        raise RuntimeError(f"For {kind} input, hx should also be {want}-D but got ({got}) tensors")
    if not batched:
        hx = tuple(h.unsqueeze(1) for h in hx) if several else hx.unsqueeze(1)
    module.check_forward_args(input, hx, None)


def _forward_packed(
    module: torch.nn.RNNBase, cell: Cell, packed: PackedSequence, hx: Any, weights: list[Tensor]
) -> Any:
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    several = len(cell.states) > 1
    if hx is not None:
        hx = module.permute_hidden(hx, sorted_indices)
    if torch.compiler.is_compiling():
        pass  # batch_sizes has no values to check with
    elif hx is None:
        module.check_input(data, batch_sizes)
    else:
        module.check_forward_args(data, hx, batch_sizes)
    output, last = functional.sequence(
        cell, data, _states(cell, hx), weights, batch_sizes=batch_sizes, **_options(module)
    )
    final: Any = tuple(last) if several else last[0]
    return (
        PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices),
        module.permute_hidden(final, unsorted_indices),
    )


class RNN(_Recurrent, torch.nn.RNN):
    """torch.nn.RNN, run by fusedrnn."""


class LSTM(_Recurrent, torch.nn.LSTM):
    """torch.nn.LSTM, run by fusedrnn."""


class GRU(_Recurrent, torch.nn.GRU):
    """torch.nn.GRU, run by fusedrnn."""


def _is_ours(module: torch.nn.Module) -> bool:
    """Whether the module, or inside ``fusedrnn.patch`` its base, runs our forward."""
    return any(vars(kind).get("forward") is _Recurrent.forward for kind in type(module).__mro__)


dynamo.allow(_is_ours)


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class RNNCell(_Fused, torch.nn.RNNCell):
    """torch.nn.RNNCell, run by fusedrnn."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: input (B, I) or (I), hx (B, H) or (H) or None; returns the new h. Errors as torch.nn.RNNCell."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return functional.cell_step(CELLS[f"rnn_{self.nonlinearity}"], input, (hx,), _current(self, _CELL_WEIGHTS))[0]


class LSTMCell(_Fused, torch.nn.LSTMCell):
    """torch.nn.LSTMCell, run by fusedrnn."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step: input (B, I) or (I), hx a pair of (B, H) or (H); returns the new (h, c). Errors as torch.nn's."""
        states = (None, None) if hx is None else hx
        h, c = functional.cell_step(CELLS["lstm"], input, states, _current(self, _CELL_WEIGHTS))
        return h, c


class GRUCell(_Fused, torch.nn.GRUCell):
    """torch.nn.GRUCell, run by fusedrnn."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: input (B, I) or (I), hx (B, H) or (H) or None; returns the new h. Errors as torch.nn.GRUCell."""
        return functional.cell_step(CELLS["gru"], input, (hx,), _current(self, _CELL_WEIGHTS))[0]
