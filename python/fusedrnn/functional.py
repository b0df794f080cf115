"""Recurrent networks as functions of tensors: the modules of :mod:`fusedrnn.nn` without the module.

Shapes use T steps, B sequences, I input features, H hidden features, L layers, D directions (1 or 2) and R, the
width of the state h: the projection's size if there is one, else H. Weights come flat in the order of
torch.nn's ``_flat_weights``: for each layer, for each direction, weight_ih (G*H, I or D*R), weight_hh (G*H, R),
then with ``bias`` bias_ih (G*H) and bias_hh (G*H), then for a projected LSTM weight_hr (R, H). G and the order of
the gates are torch's: 1 for an RNN, 4 (i, f, g, o) for an LSTM, 3 (r, z, n) for a GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import along as along_time
from .along import PLAIN, Along, States
from .cells import CELLS, Cell
from .dropouts import NO_DROPOUTS, Dropouts
from .engines.base import WEIGHTS_PER_DIRECTION, Call, Outputs
from .route import express, run
from .saving import check_save, recomputes
from .torch_state import autocast_dtype


def _autocast_target(
    cell: Cell, low: torch.dtype, input: Tensor, hx: Sequence[Tensor | None], whole: bool
) -> torch.dtype:
    """The dtype that torch's own module would return under autocast to ``low``; ``whole``: a dense sequence, no cell.

    Autocast lowers the products only. The sum with the state, where there is one, raises the result again; and float64
    is left alone.
    """
    given = [h.dtype for h in hx if h is not None]
    state = given[0] if given else input.dtype
    if torch.float64 in (input.dtype, state):
        return torch.float64
    if cell.mode.startswith("RNN") or (cell.name == "lstm" and whole and torch.float16 not in (input.dtype, state)):
        return low
    return torch.promote_types(state, low)


def check_states(cell: Cell, hx: Sequence[Tensor | None]) -> None:
    """Raise if these are not as many states as the cell has."""
    if isinstance(hx, Tensor):
        raise TypeError(f"{cell.name}: hx must be a tuple of Tensors ({', '.join(cell.states)}), not Tensor")
    if len(hx) != len(cell.states):
        count = ("one hidden state", "two hidden states")[len(cell.states) - 1]
        raise RuntimeError(f"{cell.name} expects {count}, got {len(hx)}")


def network(
    cell: Cell,
    input: Tensor,
    hx: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    projected: bool = False,
    batch_sizes: Tensor | None = None,
    along: Along = PLAIN,
    dropouts: Dropouts = NO_DROPOUTS,
    save: str = "all",
) -> tuple[Tensor, list[Tensor], States | None]:
    """A stack of layers of any cell: what all the functions of this module do once their arguments are in order.

    Args:
        cell: the cell.
        input: (T, B, I), or (tokens, I) of a PackedSequence.
        hx: for each state of the cell (L*D, B, width), or None for zeros.
        weights: flat, as the module's docstring says.
        projected: whether ``weights`` include weight_hr.
        batch_sizes: of the PackedSequence.
        along: lengths, resets, and whether the states of every step are wanted.
        dropouts, save: see :func:`rnn`.

    Returns:
        output (T, B, D*R) or (tokens, D*R), for each state its final value (L*D, B, width), and the states of every
        step if they are wanted.

    Raises:
        RuntimeError: wrong shapes, dtypes, devices, or number of weights.
        ValueError: dropout outside [0, 1], no layers, or an unknown save.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    directions = 2 if bidirectional else 1
    each = (4 if bias else 2) + (1 if projected else 0)
    if len(weights) != num_layers * directions * each:
        raise RuntimeError(
            f"Expected {num_layers * directions * each} weights ({num_layers} layers, {directions} directions, "
            f"{each} each), got {len(weights)}"
        )
    check_states(cell, hx)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    options: _Options = None
    if dropouts is not NO_DROPOUTS or save != "all":
        check_save(save)
        options = dropouts, training, save
    groups = _in_groups_of_five(weights, bias, projected)
    between = dropout if training else 0.0
    low = autocast_dtype(input.device.type)
    if low is not None and input.is_floating_point():
        target = _autocast_target(cell, low, input, hx, whole=batch_sizes is None and not projected)
        with torch.autocast(input.device.type, enabled=False):
            input, hx, groups = input.to(target), [_to(h, target) for h in hx], tuple(_to(w, target) for w in groups)
            along = along_time.to(along, target)
            output, last, states = _layers(
                cell, input, hx, groups, num_layers, directions, between, batch_sizes, along, options
            )
            if projected and target != torch.float64:  # the projection is a product, so its result is low
                output, last = output.to(low), [last[0].to(low), *last[1:]]
                states = states and States(tuple(h.to(low) for h in states.h), states.c)
            return output, last, states
    return _layers(cell, input, hx, groups, num_layers, directions, between, batch_sizes, along, options)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _in_groups_of_five(weights: Sequence[Tensor | None], bias: bool, projected: bool) -> tuple[Tensor | None, ...]:
    """Flat weights with None in the places of the biases and projections that the layer does without."""
    if bias and projected:
        return tuple(weights)
    step = len(weights) if not weights else (4 if bias else 2) + (1 if projected else 0)
    groups: list[Tensor | None] = []
    for first in range(0, len(weights), step):
        group = weights[first : first + step]
        groups += group[:2]
        groups += group[2:4] if bias else (None, None)
        groups.append(group[-1] if projected else None)
    return tuple(groups)


#: Dropouts, whether they are active, and what to save; None for the usual: no dropouts, everything.
_Options = tuple[Dropouts, bool, str] | None


def _run(call: Call, options: _Options) -> Outputs:
    """Run a layer with these options."""
    if options is None:
        return run(call)
    dropouts, training, save = options
    if not torch.compiler.is_compiling():
        call.check()  # before masks are shaped after its tensors
    call.zoneout, call.recompute = dropouts.zoneout_of(call.cell), recomputes(save, call)
    if training:
        # Of a packed batch, torch.compile knows the number of rows by the states alone.
        rows = call.batch if call.hx[0] is None else call.hx[0].shape[1]
        call.h_mask = dropouts.of_h(call.input, (call.directions, rows, call.output_size))
        call.weights = dropouts.of_weights(call.weights, WEIGHTS_PER_DIRECTION)
        call.input = dropouts.of_input(call.input, call.batch_sizes)
        if call.zoneout:
            call.seed = torch.randint(2**63 - 1, (), device=call.input.device)
    return run(call)


def _layers(
    cell: Cell,
    input: Tensor,
    hx: Sequence[Tensor | None],
    weights: tuple[Tensor | None, ...],
    num_layers: int,
    directions: int,
    dropout: float,
    batch_sizes: Tensor | None,
    along: Along,
    options: _Options,
) -> tuple[Tensor, list[Tensor], States | None]:
    every = along.states and len(cell.states) > 1
    rest = batch_sizes, True, along.lengths, along.resets
    if num_layers == 1 and not along.states:
        output, *last = _run(Call(cell, input, tuple(hx), weights, *rest, along.reset_state), options)
        return output, last, None  # type: ignore[return-value]
    for name, state in zip(cell.states, hx, strict=True):
        if state is not None and (state.dim() != 3 or state.shape[0] != num_layers * directions):
            raise RuntimeError(
                f"Expected {name}_0 of shape ({num_layers * directions}, batch, features), got {tuple(state.shape)}"
            )
    final: list[list[Tensor]] = [[] for _ in cell.states]
    hidden: list[Tensor] = []
    cells: list[Tensor] = []
    each = directions * WEIGHTS_PER_DIRECTION
    for layer in range(num_layers):
        if layer and dropout:
            input = torch.nn.functional.dropout(input, dropout)
        of_layer = tuple(None if h is None else h[layer * directions : (layer + 1) * directions] for h in hx)
        reset_state = along_time.of_layer(along, layer, directions)
        of_weights = weights[layer * each : (layer + 1) * each]
        output, *last = _run(Call(cell, input, of_layer, of_weights, *rest, reset_state, every), options)
        input = output  # type: ignore[assignment]
        hidden.append(input)
        if every:
            cells.append(last.pop(0))  # type: ignore[arg-type]
        for values, value in zip(final, last, strict=True):
            values.append(value)  # type: ignore[arg-type]
    states = States(tuple(hidden), tuple(cells) if every else None) if along.states else None
    return input, [torch.cat(values) for values in final], states


def sequence(
    cell: Cell,
    input: Tensor,
    hx: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    *,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Sequence[Tensor | None] | None = None,
    return_states: bool = False,
    hx_given: bool | None = None,
    **options: Any,
) -> tuple[Tensor, list[Tensor], States | None]:
    """:func:`network` for input as users have it: unbatched, batch first, packed, or jagged.

    Args:
        hx_given: whether hx is the caller's, and so begins the first segment, resets or not; by default if it is there.

    Raises:
        ValueError: the input is neither 2D nor 3D.
        TypeError: lengths or resets are not tensors.
        RuntimeError: as ``network``, or a state's number of dimensions does not fit the input's, or options along time
            do not fit it.
    """
    check_states(cell, hx)
    if input.is_nested:
        return _jagged(
            cell, input, hx, weights, lengths, resets, reset_state=reset_state, return_states=return_states,
            hx_given=hx_given, **options,
        )  # fmt: skip

    def along(layout: str) -> Along:
        if lengths is None and resets is None and reset_state is None and not return_states:
            return PLAIN
        given = any(h is not None for h in hx) if hx_given is None else hx_given
        return along_time.checked(input, layout, lengths, resets, reset_state, return_states, given)

    if batch_sizes is not None:
        return network(cell, input, hx, weights, batch_sizes=batch_sizes, along=along("tokens"), **options)
    dims = input.dim()
    if dims not in (2, 3):
        raise ValueError(f"{cell.mode}: Expected input to be 2D or 3D, got {dims}D instead")
    for name, state in zip(cell.states, hx, strict=True):
        if state is not None and state.dim() != dims:
            raise RuntimeError(f"For {dims}-D input, {name}_0 should also be {dims}-D, got {state.dim()}-D")
    if dims == 2:
        with_batch = [None if h is None else h.unsqueeze(1) for h in hx]
        output, last, states = network(cell, input.unsqueeze(1), with_batch, weights, along=along("T"), **options)
        return output.squeeze(1), [h.squeeze(1) for h in last], _each(states, lambda t: t.squeeze(1))
    if not batch_first:
        return network(cell, input, hx, weights, along=along("TB"), **options)
    output, last, states = network(cell, input.transpose(0, 1), hx, weights, along=along("BT"), **options)
    return output.transpose(0, 1), last, _each(states, lambda t: t.transpose(0, 1))


def _each(states: States | None, change: Callable[[Tensor], Tensor]) -> States | None:
    if states is None:
        return None
    return States(*(None if values is None else tuple(map(change, values)) for values in states))  # type: ignore[arg-type]


def _jagged(
    cell: Cell,
    input: Tensor,
    hx: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    resets: Tensor | None,
    **options: Any,
) -> tuple[Tensor, list[Tensor], States | None]:
    """A jagged nested tensor (B, j, I), as a padded batch with lengths; the output is jagged again."""
    if lengths is not None:
        raise RuntimeError("a jagged input has lengths of its own: leave the argument out")
    padded, own = along_time.pad(input)
    if resets is not None:
        if not isinstance(resets, Tensor):
            raise TypeError(f"resets must be a Tensor, not {type(resets).__name__}")
        if not resets.is_nested:
            raise RuntimeError("resets of a jagged input must be jagged themselves, with the same offsets")
        resets, of_resets = along_time.pad(resets)
        if not torch.equal(of_resets, own):
            raise RuntimeError("resets must be as long as the input's sequences")
    options |= {"batch_first": True, "lengths": own, "resets": resets}
    output, last, states = sequence(cell, padded, hx, weights, **options)
    return along_time.unpad(output, input), last, _each(states, lambda t: along_time.unpad(t, input))


def cell_step(
    cell: Cell,
    input: Tensor,
    hx: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    resets: Tensor | None = None,
    reset_state: Sequence[Tensor | None] | None = None,
    zoneout: tuple[float, ...] = (),
) -> tuple[Tensor, ...]:
    """One step of one cell: what the ``*_cell`` functions do.

    Args:
        cell: the cell.
        input: (B, I) or unbatched (I).
        hx: for each state of the cell (B, H) or (H), or None for zeros.
        weights: weight_ih (G*H, I), weight_hh (G*H, R), bias_ih (G*H) or None, bias_hh (G*H) or None, and with a
            projection weight_hr (R, H).
        resets: bool (B,) or unbatched (): rows that start from ``reset_state``, not from hx.
        reset_state: for each state (B or 1, H), unbatched (H), or None for zeros.
        zoneout: for each state its rate, of which the expectation is taken; empty: none.

    Returns:
        for each state its new value, shaped as the state.

    Raises:
        ValueError: the input or a state is neither 1D nor 2D.
        TypeError: resets is not a tensor.
        RuntimeError: wrong shapes, dtypes or devices.
    """
    if resets is None and reset_state is None and not zoneout:
        quick: tuple[Tensor, ...] | None = express(
            cell, input, hx, weights, None, "one_step", projected=len(weights) == WEIGHTS_PER_DIRECTION
        )
        if quick is not None:
            return quick
    check_states(cell, hx)
    dims = input.dim()
    for name, tensor in (("input", input), *zip(cell.states, hx, strict=True)):
        if tensor is not None and tensor.dim() not in (1, 2):
            raise ValueError(f"{cell.mode} cell: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
        if tensor is not None and tensor.dim() != dims:
            raise RuntimeError(f"For {dims}-D input, {name} should also be {dims}-D, got {tensor.dim()}-D")
    if resets is not None:
        along_time.check_resets(resets, input.shape[:-1], input)
    added = (0, 1) if dims == 1 else (0,)

    def batched(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor[None, None] if dims == 1 else tensor[None]

    low = autocast_dtype(input.device.type)
    if low is not None and input.is_floating_point():
        low = _autocast_target(cell, low, input, hx, whole=False)
        with torch.autocast(input.device.type, enabled=False):
            lowered = [[_to(t, low) for t in tensors] for tensors in (hx, weights, reset_state or ())]
            return cell_step(cell, input.to(low), lowered[0], lowered[1], resets, lowered[2] or None, zoneout)
    five = (*weights, None)[:WEIGHTS_PER_DIRECTION]
    call = Call(cell, batched(input), tuple(map(batched, hx)), five, sequence=False, zoneout=zoneout)  # type: ignore[arg-type]
    if resets is not None or reset_state is not None:
        layout = "T" if dims == 1 else "B"
        states = along_time.reset_state_of_rows(reset_state, resets, input, input.shape[:-1], layout)
        call.resets = resets[None, None] if dims == 1 else resets[None]  # type: ignore[index]
        call.reset_state = tuple(None if s is None else s[None] for s in states)
    return tuple(state.squeeze(added) for state in run(call)[1:])  # type: ignore[union-attr]


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    return_states: bool = False,
    dropouts: Dropouts = NO_DROPOUTS,
    save: str = "all",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, States]:
    """Elman network (Elman 1990): ``h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``, or with relu.

    Args:
        input: (T, B, I); (B, T, I) with ``batch_first``; unbatched (T, I); (tokens, I) with ``batch_sizes``.
        hx: initial state (L*D, B, H), unbatched (L*D, H), None for zeros.
        weights: flat (see the module's docstring).
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether ``weights`` contain biases.
        num_layers: L.
        dropout: probability of zeroing an element of a layer's output, except the last's, while ``training``.
        training: whether dropout is active.
        bidirectional: whether D is 2.
        batch_first: whether batch comes before time in input and output.
        batch_sizes: of a PackedSequence, int64 on the CPU.
        lengths: steps of each sequence of a padded batch, integers (B,), in any order, from 0 to T. What the input
            holds behind a sequence's end is not read; the output is zero there, h_n is the state after the last step
            (in reverse after the first), which for length 0 is hx, and the reverse direction starts at the end.
            A jagged nested tensor (B, j, I) is accepted as input in the place of both; the output is jagged too.
        resets: bool, laid out as the input without its features: a new segment begins at these steps. The state
            before such a step is ``reset_state``, and no gradient crosses. At step 0 an hx that is given wins.
            In reverse a segment ends there: the state is reset between that step and the one before it.
        reset_state: like hx, or with B = 1 one for all sequences; None for zeros. Used only with ``resets``.
        return_states: whether to return the states of every step too.
        dropouts: of features, of h, of units and of weights (:class:`fusedrnn.dropouts.Dropouts`), while ``training``.
        save: what forward keeps for backward: ``"all"``; ``"states"``, from which backward computes the gates again,
            in less memory and more time; ``"auto"``: the states if the gates exceed :class:`fusedrnn.save_budget`.

    Returns:
        output (T, B, D*H), laid out as the input, h_n (L*D, B, H), and with ``return_states`` a :class:`States`.

    Raises:
        ValueError: unknown nonlinearity or save, dropout outside [0, 1], input neither 2D nor 3D.
        TypeError: lengths, resets or reset_state are not tensors.
        RuntimeError: wrong shapes, dtypes, devices, or number of weights; lengths outside [0, T].
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    output, (h_n,), states = sequence(
        CELLS[f"rnn_{nonlinearity}"],
        input,
        (hx,),
        weights,
        bias=bias,
        num_layers=num_layers,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        batch_first=batch_first,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=resets,
        reset_state=None if reset_state is None else (reset_state,),
        return_states=return_states,
        dropouts=dropouts,
        save=save,
    )
    return (output, h_n) if states is None else (output, h_n, states)


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    projected: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    return_states: bool = False,
    dropouts: Dropouts = NO_DROPOUTS,
    save: str = "all",
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], States]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000; projection: Sak et al. 2014).

    Args:
        hx: initial states h (L*D, B, R) and c (L*D, B, H), unbatched without B, None for zeros.
        projected: whether ``weights`` contain weight_hr, which maps o * tanh(c) from H to R.

    Returns:
        output (T, B, D*R), laid out as the input, and (h_n (L*D, B, R), c_n (L*D, B, H)).

    The other arguments and the errors are those of :func:`rnn`.
    """
    output, (h_n, c_n), states = sequence(
        CELLS["lstm"],
        input,
        (None, None) if hx is None else hx,
        weights,
        bias=bias,
        num_layers=num_layers,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        projected=projected,
        batch_first=batch_first,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=resets,
        reset_state=reset_state,
        return_states=return_states,
        dropouts=dropouts,
        save=save,
    )
    return (output, (h_n, c_n)) if states is None else (output, (h_n, c_n), states)


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    return_states: bool = False,
    dropouts: Dropouts = NO_DROPOUTS,
    save: str = "all",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, States]:
    """Gated recurrent unit (Cho et al. 2014), the reset gate applied after the recurrent product as in cuDNN.

    Arguments, results and errors are those of :func:`rnn`.
    """
    output, (h_n,), states = sequence(
        CELLS["gru"],
        input,
        (hx,),
        weights,
        bias=bias,
        num_layers=num_layers,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        batch_first=batch_first,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=resets,
        reset_state=None if reset_state is None else (reset_state,),
        return_states=return_states,
        dropouts=dropouts,
        save=save,
    )
    return (output, h_n) if states is None else (output, h_n, states)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> Tensor:
    """One step of :func:`rnn`: input (B, I) or (I), hx (B, H) or (H) or None; returns the new h.

    Rows where ``resets``, bool (B,) or (), is true start from ``reset_state``, shaped as hx or (1, H), None for zeros.

    Raises:
        ValueError: unknown nonlinearity, input or hx neither 1D nor 2D.
        RuntimeError: wrong shapes, dtypes or devices.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    fresh = None if reset_state is None else (reset_state,)
    return cell_step(CELLS[f"rnn_{nonlinearity}"], input, (hx,), weights, resets, fresh)[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`: input (B, I) or (I), hx a pair of (B, H) or (H), or None; returns the new (h, c).

    ``resets`` and ``reset_state``, a pair, as for :func:`rnn_cell`.

    Raises:
        ValueError: input or a state neither 1D nor 2D.
        RuntimeError: wrong shapes, dtypes or devices.
    """
    states = (None, None) if hx is None else hx
    h, c = cell_step(CELLS["lstm"], input, states, (weight_ih, weight_hh, bias_ih, bias_hh), resets, reset_state)
    return h, c


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> Tensor:
    """One step of :func:`gru`: input (B, I) or (I), hx (B, H) or (H) or None; returns the new h.

    ``resets`` and ``reset_state`` as for :func:`rnn_cell`.

    Raises:
        ValueError: input or hx neither 1D nor 2D.
        RuntimeError: wrong shapes, dtypes or devices.
    """
    fresh = None if reset_state is None else (reset_state,)
    return cell_step(CELLS["gru"], input, (hx,), (weight_ih, weight_hh, bias_ih, bias_hh), resets, fresh)[0]
