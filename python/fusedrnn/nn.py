"""Drop-in replacements of torch.nn's recurrent modules.

Each is a subclass of torch.nn's module of the same name and inherits its constructor, parameters, state_dict,
initial weights, repr, checks and error messages. Only ``forward`` is ours, so any module of torch.nn can become one
of these, and back, by changing its class: see :func:`fusedrnn.convert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from . import dynamo, functional
from .along import States
from .cells import CELLS, MODES, Cell
from .dropouts import NO_DROPOUTS, Dropouts
from .route import express
from .saving import check_save
from .torch_state import NO_OPERATORS_THERE

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "StreamState"]


def _current(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The module's weights as they are now: parameters, or whatever replaced them (parametrizations, weight drop)."""
    try:
        return list(map(module._parameters.__getitem__, names))  # type: ignore[arg-type]
    except KeyError:
        return [getattr(module, name) for name in names]


class _Fused(torch.nn.Module):
    """What all our modules have."""

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script calls it
        raise RuntimeError(NO_OPERATORS_THERE.format("torch.jit.script"))


def _leaf(module: torch.nn.Module, input: Proxy, hx: Any, **options: Any) -> Any:
    """The call in the graph of torch.fx.symbolic_trace, which looks into every module but those of torch.nn itself."""
    tracer: Any = input.tracer
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    arguments = (input,) if hx is None else (input, hx)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, given)


class _Recurrent(_Fused, torch.nn.RNNBase):
    """``forward`` and options of our own for all of torch.nn's sequence modules.

    Args:
        learn_initial_state: whether the state that a sequence starts from, where the caller gives none, and a segment
            after a reset, is a parameter: ``initial_h`` (L*D, 1, R) and for an LSTM ``initial_c`` (L*D, 1, H), zeros
            at first.
        variational_dropout, recurrent_dropout, zoneout, weight_dropout: see :class:`fusedrnn.dropouts.Dropouts`, which
            holds them as the attribute ``dropouts``; ``zoneout`` is one number, or for an LSTM a pair for h and c.
        save: what forward keeps for backward: ``"all"``; ``"states"``, from which backward computes the gates again, in
            less memory and more time; ``"auto"``: the states if the gates exceed :class:`fusedrnn.save_budget`.

    Raises:
        ValueError: a probability outside [0, 1], a wrong number of rates of zoneout, an unknown ``save``.

    The other arguments are those of torch.nn's module of the same name.
    """

    def __init__(
        self,
        *args: Any,
        learn_initial_state: bool = False,
        variational_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        weight_dropout: float = 0.0,
        save: str = "all",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        dropouts = Dropouts(variational_dropout, recurrent_dropout, zoneout, weight_dropout)
        dropouts.zoneout_of(MODES[self.mode])
        check_save(save)
        # Modules that torch.nn made have none of these attributes either.
        if dropouts != NO_DROPOUTS:
            self.dropouts = dropouts
        if save != "all":
            self.save = save
        if learn_initial_state:
            self.learn_initial_state = True
            rows = self.num_layers * (2 if self.bidirectional else 1)
            widths = (self.proj_size or self.hidden_size, self.hidden_size)
            (like,) = _current(self, ["weight_ih_l0"])
            for name, width in zip(MODES[self.mode].states, widths, strict=False):
                self.register_parameter(f"initial_{name}", torch.nn.Parameter(like.new_zeros(rows, 1, width)))

    def reset_parameters(self) -> None:
        """Draw the weights anew, as torch.nn does; a learned initial state becomes zero."""
        super().reset_parameters()  # type: ignore[no-untyped-call]
        for state in learned_state(self) or ():
            torch.nn.init.zeros_(state)

    def extra_repr(self) -> str:
        own = ["learn_initial_state=True"] if learned_state(self) else []
        dropouts = _dropouts(self)
        own += [
            f"{field.name}{'' if field.name == 'zoneout' else '_dropout'}={value}"
            for field in fields(dropouts)
            if (value := getattr(dropouts, field.name)) != field.default
        ]
        own += [f"save={self.save!r}"] if "save" in self.__dict__ else []
        return ", ".join([super().extra_repr(), *own])

    def forward(
        self,
        input: Any,
        hx: Any = None,
        # By position too: torch's older ONNX exporter fills in every default so.
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
        return_states: bool = False,
    ) -> Any:
        """Run the network as torch.nn's module of the same name does, with the options along time of fusedrnn.

        Args:
            input: (T, B, I), (B, T, I) with ``batch_first``, unbatched (T, I), a PackedSequence, or a jagged nested
                tensor (B, j, I).
            hx: initial state (L*D, B, R), for an LSTM a pair with c (L*D, B, H); unbatched without B; None for the
                learned initial state or, without one, zeros.
            lengths, resets, return_states: see :func:`fusedrnn.functional.rnn`. A PackedSequence has neither lengths
                nor resets.
            reset_state: like ``hx``, or with B = 1; None as for ``hx``.

        Returns:
            output, laid out as the input with D*R features, the final state, shaped as ``hx``, and with
            ``return_states`` a :class:`fusedrnn.States`.

        Raises:
            ValueError, RuntimeError: whatever torch.nn's module raises for the same fault.
            TypeError, RuntimeError: see :func:`fusedrnn.functional.rnn`.
        """
        if isinstance(input, Proxy):
            along = {"lengths": lengths, "resets": resets, "reset_state": reset_state}
            return _leaf(self, input, hx, **along, return_states=return_states)
        cell, own = MODES[self.mode], self.__dict__
        names = self._flat_weights_names
        learned = learned_state(self) if "learn_initial_state" in own else None
        options: dict[str, Any] = {}
        if resets is not None or reset_state is not None or return_states:
            given: Any = None if reset_state is None else _states(cell, reset_state)
            if given is None and learned and resets is not None:
                unbatched = not isinstance(input, PackedSequence) and input.dim() == 2
                given = tuple(s[:, 0] for s in learned) if unbatched else learned
            options = {"resets": resets, "reset_state": given, "return_states": return_states}
            options["hx_given"] = hx is not None
        if learned and hx is None:
            hx = _for_batch(learned, input, self.batch_first)
        states = _states(cell, hx)
        if "dropouts" in own and (self.training or self.dropouts.zoneout):
            options["dropouts"] = self.dropouts
        if "save" in own and torch.is_grad_enabled():
            options["save"] = self.save
        if self.num_layers == 1 and not options:
            # Weights that are no parameters, but computed from some, go the long way.
            layout, projected = "batch_first" if self.batch_first else "time_major", self.proj_size > 0
            quick = express(cell, input, states, own["_parameters"], names, layout, self.bias, projected, lengths)
            if quick is not None:
                return quick
        weights = _current(self, names)
        if lengths is not None:
            options["lengths"] = lengths
        if isinstance(input, PackedSequence):
            return _forward_packed(self, cell, input, hx, weights, options)
        # While torch compiles, the operator's own checks do: Dynamo could not show what these raise.
        # Nested tensors may have no shape to look at; theirs are checked when they are padded.
        if not (input.is_nested or _looks_right(self, cell, input, hx, weights) or torch.compiler.is_compiling()):
            _check(self, cell, input, hx)
        output, last, every = functional.sequence(
            cell, input, states, weights, batch_first=self.batch_first, **_options(self), **options
        )
        final: Any = last[0] if len(last) == 1 else tuple(last)
        return (output, final) if every is None else (output, final, every)

    def stream(self, input: Tensor, state: Any = None, resets: Tensor | None = None) -> tuple[Tensor, StreamState]:
        """One step of inference, at what one call of a cell for each layer costs.

        No gradients, and no dropout, but zoneout's expectation. The steps of a sequence one after another give what
        ``forward`` gives at once in evaluation::

            state = None
            for x_t in sequence:
                y_t, state = rnn.stream(x_t, state)

        Args:
            input: (B, I) or unbatched (I).
            state: what the step before returned, or an ``hx`` as ``forward`` takes and returns it, or None for the
                learned initial state or, without one, zeros. It is not changed.
            resets: bool (B,) or (): rows that start from the learned initial state or zeros, not from ``state``.

        Returns:
            the output (B, R) or (R), and the state for the next step. As of a cell, the output is the state's own h of
            the last layer: do not change it in place.

        Raises:
            RuntimeError: the module is bidirectional; else as the cells.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.stream(input, state, resets)
        if self.bidirectional:
            raise RuntimeError(f"{type(self).__name__}.stream: the reverse direction begins at the sequence's end")
        cell, learned = MODES[self.mode], learned_state(self)
        zoneout = _dropouts(self).zoneout_of(cell) if "dropouts" in self.__dict__ else ()
        if not isinstance(state, StreamState):
            state = self._stream_state(cell, input, state, learned)
        elif len(state.layers) != self.num_layers:
            raise RuntimeError(f"Expected a state of {self.num_layers} layers, got one of {len(state.layers)}")
        layers = []
        for layer, of_layer in enumerate(state.layers):
            weights: list[Tensor | None] = [*_current(self, self._all_weights[layer])]
            if not self.bias:
                weights[2:2] = [None, None]
            fresh = None
            if resets is not None and learned is not None:
                fresh = tuple(s[layer, 0] if input.dim() == 1 else s[layer] for s in learned)
            new = functional.cell_step(cell, input, of_layer, weights, resets, fresh, zoneout)
            layers.append(new)
            input = new[0]
        return input, StreamState(layers)

    def _stream_state(self, cell: Cell, input: Tensor, hx: Any, learned: tuple[Tensor, ...] | None) -> StreamState:
        states = _states(cell, hx)
        functional.check_states(cell, states)
        if hx is None and learned is not None:
            states = [s[:, 0] if input.dim() == 1 else s.expand(-1, len(input), -1) for s in learned]
        for name, s in zip(cell.states, states, strict=True):
            if s is not None and len(s) != self.num_layers:
                raise RuntimeError(f"Expected {name} of {self.num_layers} layers, got shape {tuple(s.shape)}")
        return StreamState([tuple(None if s is None else s[k] for s in states) for k in range(self.num_layers)])  # type: ignore[misc]


class StreamState:
    """The state of :meth:`LSTM.stream` between two steps.

    Attributes:
        layers: for each layer the states of its cell, (B, width) each, unbatched (width).
    """

    __slots__ = ("layers",)

    def __init__(self, layers: list[tuple[Tensor, ...]]) -> None:
        self.layers = layers

    def hx(self) -> Any:
        """The same as the modules' forward takes and returns it: (L, B, R), for an LSTM a pair with (L, B, H)."""
        states = tuple(torch.stack(values) for values in zip(*self.layers, strict=True))
        return states[0] if len(states) == 1 else states


def learned_state(module: torch.nn.Module) -> tuple[Tensor, ...] | None:
    """The parameters of the learned initial state; modules that were made by torch.nn have none."""
    if "learn_initial_state" not in module.__dict__:
        return None
    return tuple(getattr(module, f"initial_{name}") for name in MODES[module.mode].states)  # type: ignore[index]


def _dropouts(module: torch.nn.Module) -> Dropouts:
    """Those of the module; modules that were made by torch.nn have none."""
    dropouts: Dropouts = module.__dict__.get("dropouts", NO_DROPOUTS)
    return dropouts


def _for_batch(learned: tuple[Tensor, ...], input: Any, batch_first: bool) -> Any:
    """The learned initial state as the hx of a call."""
    if isinstance(input, PackedSequence):
        batch = int(input.batch_sizes[0])
    elif input.dim() == 2:
        return learned[0][:, 0] if len(learned) == 1 else tuple(state[:, 0] for state in learned)
    else:
        batch = input.shape[0 if batch_first or input.is_nested else 1]
    states = tuple(state.expand(-1, batch, -1) for state in learned)
    return states[0] if len(states) == 1 else states


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


def _looks_right(module: torch.nn.RNNBase, cell: Cell, input: Any, hx: Any, weights: list[Tensor]) -> bool:
    """A quick look that never errs in saying yes, and spares the usual call torch.nn's checks (20 us)."""
    if type(input) is not Tensor or input.is_nested or input.dim() != 3 or input.dtype != weights[0].dtype:
        return False
    *around, features = input.shape
    if features != module.input_size:
        return False
    if hx is None:
        return True
    several = len(cell.states) > 1
    if several and not isinstance(hx, tuple | list):
        return False
    states = hx if several else (hx,)
    rows = module.num_layers * (2 if module.bidirectional else 1), around[0 if module.batch_first else 1]
    widths = (module.proj_size or module.hidden_size, module.hidden_size)
    return len(states) == len(cell.states) and all(
        type(state) is Tensor and state.shape == (*rows, width) for state, width in zip(states, widths, strict=False)
    )


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
        which, got = "hx", f"{dims[0]}-D tensor"
        if several:
            which, got = "hx and cx", f"({dims[0]}-D, {dims[1]}-D) tensors"
        raise RuntimeError(f"For {kind} input, {which} should also be {want}-D but got {got}")
    if not batched:
        hx = tuple(h.unsqueeze(1) for h in hx) if several else hx.unsqueeze(1)
    module.check_forward_args(input, hx, None)


def _forward_packed(
    module: torch.nn.RNNBase,
    cell: Cell,
    packed: PackedSequence,
    hx: Any,
    weights: list[Tensor],
    options: dict[str, Any],
) -> Any:
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if options.get("lengths") is not None or options.get("resets") is not None:
        raise RuntimeError(
            f"{type(module).__name__}: a PackedSequence takes neither lengths nor resets: give the padded batch "
            "instead, which costs the same with lengths"
        )
    several = len(cell.states) > 1
    if hx is not None:
        hx = module.permute_hidden(hx, sorted_indices)
    if torch.compiler.is_compiling():
        pass  # batch_sizes has no values to check with
    elif hx is None:
        module.check_input(data, batch_sizes)
    else:
        module.check_forward_args(data, hx, batch_sizes)
    output, last, every = functional.sequence(
        cell, data, _states(cell, hx), weights, batch_sizes=batch_sizes, **_options(module), **options
    )

    def like(rows: Tensor) -> PackedSequence:
        return PackedSequence(rows, batch_sizes, sorted_indices, unsorted_indices)

    final: Any = tuple(last) if several else last[0]
    final = module.permute_hidden(final, unsorted_indices)
    if every is None:
        return like(output), final
    return like(output), final, States(*(None if rows is None else tuple(map(like, rows)) for rows in every))  # type: ignore[arg-type]


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

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> Tensor:
        """One step: input (B, I) or (I), hx (B, H) or (H) or None; returns the new h. Errors as torch.nn.RNNCell.

        Rows where ``resets``, bool (B,) or (), is true start from ``reset_state``, (B or 1, H) or (H), None for zeros.
        """
        if isinstance(input, Proxy):
            return _leaf(self, input, hx, resets=resets, reset_state=reset_state)  # type: ignore[no-any-return]
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        cell, weights = CELLS[f"rnn_{self.nonlinearity}"], _current(self, _CELL_WEIGHTS)
        fresh = None if reset_state is None else (reset_state,)
        return functional.cell_step(cell, input, (hx,), weights, resets, fresh)[0]


class LSTMCell(_Fused, torch.nn.LSTMCell):
    """torch.nn.LSTMCell, run by fusedrnn."""

    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step: input (B, I) or (I), hx a pair of (B, H) or (H); returns the new (h, c). Errors as torch.nn's.

        Rows where ``resets``, bool (B,) or (), is true start from ``reset_state``, a pair of (B or 1, H) or (H), None
        for zeros.
        """
        if isinstance(input, Proxy):
            return _leaf(self, input, hx, resets=resets, reset_state=reset_state)  # type: ignore[no-any-return]
        states = (None, None) if hx is None else hx
        h, c = functional.cell_step(CELLS["lstm"], input, states, _current(self, _CELL_WEIGHTS), resets, reset_state)
        return h, c


class GRUCell(_Fused, torch.nn.GRUCell):
    """torch.nn.GRUCell, run by fusedrnn."""

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> Tensor:
        """One step: input (B, I) or (I), hx (B, H) or (H) or None; returns the new h. Errors as torch.nn.GRUCell.

        Rows where ``resets``, bool (B,) or (), is true start from ``reset_state``, (B or 1, H) or (H), None for zeros.
        """
        if isinstance(input, Proxy):
            return _leaf(self, input, hx, resets=resets, reset_state=reset_state)  # type: ignore[no-any-return]
        fresh = None if reset_state is None else (reset_state,)
        return functional.cell_step(CELLS["gru"], input, (hx,), _current(self, _CELL_WEIGHTS), resets, fresh)[0]
