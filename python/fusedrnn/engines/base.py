"""What an engine is asked for (a :class:`Call`) and what it must offer (an :class:`Engine`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..cells import Cell

#: A direction's weights in a :class:`Call`: weight_ih (G*H, I), weight_hh (G*H, R), bias_ih (G*H),
#: bias_hh (G*H), weight_hr (R, H); None where the layer has none. R is H without a projection.
WEIGHTS_PER_DIRECTION = 5


#: How many tensors ``Call.along`` gives.
ALONG = 5

#: In the place of an input that is not there.
NO_TENSOR = torch.empty(0)


@dataclass(slots=True)
class Call:
    """One layer of a recurrent network, in one direction or both, over a whole sequence.

    Attributes:
        cell: which cell.
        input: (T, B, I) with any strides, or packed (tokens, I) when ``batch_sizes`` is given.
        hx: for each of the cell's states the initial value, (D, B, width), or None for zeros.
        weights: ``WEIGHTS_PER_DIRECTION`` entries for each of the D directions.
        batch_sizes: of a PackedSequence: int64 on the CPU, rows active at each step, never rising.
        sequence: whether the output of every step is wanted; without it the output is None.
        lengths: of a padded batch: int64 (B,), steps of each row, from 0 to T, in any order. On the CPU, or where the
            input is; there nobody has checked the values, and those outside count as 0 or T. What the input holds
            behind a row's end is not read; there the output is zero. h_n and c_n are those after the row's last step,
            in reverse its first.
        resets: bool (T, B) on the input's device, or packed (tokens,): where a new segment begins. Forward the state
            before that step is ``reset_state``; in reverse the one between that step and the step before it.
        reset_state: for each of the cell's states (D, B, width), or None for zeros; empty: all are zeros.
        every_state: whether the states but h are wanted at every step.
        h_mask: factors (D, B, R) of h on its way into the recurrent products, or None for ones; not differentiated.
        zoneout: for each state how likely a unit keeps at a step the value it had, or nothing.
        seed: int64 (), from which zoneout draws its lots (:func:`fusedrnn.dropouts.stays`); without it, in evaluation,
            the mean of both values takes their place. Unit j of row b at step t has, of direction d of D and state s,
            the lot of place ``(((s * D + d) * T + t) * B + b) * H + j``.
        recompute: whether forward should keep the states alone, and backward compute the gates again.
    """

    cell: Cell
    input: Tensor
    hx: tuple[Tensor | None, ...]
    weights: tuple[Tensor | None, ...]
    batch_sizes: Tensor | None = None
    sequence: bool = True
    lengths: Tensor | None = None
    resets: Tensor | None = None
    reset_state: tuple[Tensor | None, ...] = ()
    every_state: bool = False
    h_mask: Tensor | None = None
    zoneout: tuple[float, ...] = ()
    seed: Tensor | None = None
    recompute: bool = False

    @property
    def directions(self) -> int:
        return len(self.weights) // WEIGHTS_PER_DIRECTION

    @property
    def time(self) -> int:
        return self.input.shape[0] if self.batch_sizes is None else self.batch_sizes.shape[0]

    @property
    def batch(self) -> int:
        return self.input.shape[1] if self.batch_sizes is None else int(self.batch_sizes[0])

    @property
    def tokens(self) -> int:
        """Rows of the input, all steps of all sequences together."""
        return self.input.shape[0] if self.batch_sizes is not None else self.input.shape[0] * self.input.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.weights[0].shape[0] // len(self.cell.gates)  # type: ignore[union-attr]

    @property
    def output_size(self) -> int:
        """Width R of the state h: the projection's if there is one, else the hidden size."""
        return self.weights[1].shape[1]  # type: ignore[union-attr]

    def widths(self) -> tuple[int, ...]:
        """Width of each state: R for h, H for the others."""
        return (self.output_size, *[self.hidden_size] * (len(self.cell.states) - 1))

    def option_along_time(self) -> str | None:
        """The first option that stock torch does not have, if any is used."""
        options = {"lengths": self.lengths, "resets": self.resets, "every state": self.every_state or None}
        options |= {"recurrent dropout": self.h_mask, "zoneout": True if self.zoneout else None}
        return next((name for name, given in options.items() if given is not None), None)

    def of_direction(self, direction: int) -> tuple[Tensor | None, ...]:
        """The five weights of one direction."""
        first = direction * WEIGHTS_PER_DIRECTION
        return self.weights[first : first + WEIGHTS_PER_DIRECTION]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything a gradient may be asked for: input, hx, weights, reset_state."""
        return (self.input, *self.hx, *self.weights, *self.reset_state)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Call:
        """The same call on other tensors, given in the order of :meth:`tensors`."""
        first = 1 + len(self.cell.states)
        last = len(tensors) - len(self.reset_state)
        return self._but(tensors[0], tuple(tensors[1:first]), tuple(tensors[first:last]), tuple(tensors[last:]))  # type: ignore[arg-type]

    def without_tensors(self) -> Call:
        """What remains of the call when autograd keeps the tensors; ``with_tensors`` restores it."""
        return self._but(NO_TENSOR, (), (), (None,) * len(self.reset_state))

    def _but(
        self,
        input: Tensor,
        hx: tuple[Tensor | None, ...],
        weights: tuple[Tensor | None, ...],
        reset_state: tuple[Tensor | None, ...],
    ) -> Call:
        """The call with these tensors. Written out, because dataclasses.replace takes several times as long."""
        of_sequence = self.batch_sizes, self.sequence, self.lengths, self.resets
        masks = self.h_mask, self.zoneout, self.seed
        return Call(self.cell, input, hx, weights, *of_sequence, reset_state, self.every_state, *masks, self.recompute)

    def along(self) -> tuple[Tensor | None, ...]:
        """The tensors that no gradient is asked for: batch_sizes, lengths, resets, h_mask, seed."""
        return self.batch_sizes, self.lengths, self.resets, self.h_mask, self.seed

    def with_along(self, tensors: Sequence[Tensor | None]) -> Call:
        """The same call with other tensors in the places of :meth:`along`."""
        batch_sizes, lengths, resets, h_mask, seed = tensors
        of_layer = self.cell, self.input, self.hx, self.weights
        of_sequence = batch_sizes, self.sequence, lengths, resets
        masks = h_mask, self.zoneout, seed
        return Call(*of_layer, *of_sequence, self.reset_state, self.every_state, *masks, self.recompute)

    @property
    def outputs(self) -> int:
        """How many results there are, the output that may be None among them."""
        states = len(self.cell.states)
        return 1 + states + (states - 1 if self.every_state else 0)

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with every floating-point tensor converted."""
        call = self.with_tensors([None if t is None else t.to(dtype) for t in self.tensors()])
        if call.h_mask is not None:
            call.h_mask = call.h_mask.to(dtype)
        return call

    def on(self, device: str) -> Call:
        """The same call with every tensor on a device."""
        return self.with_tensors([None if t is None else t.to(device) for t in self.tensors()])

    def check(self, batch: int | torch.SymInt | None = None) -> None:
        """Check every shape, dtype and device.

        Args:
            batch: the number of sequences where the values of ``batch_sizes`` cannot be read, as they have no memory.

        Raises:
            RuntimeError: names the tensor, what it is and what was expected.
        """
        input_, gates = self.input, len(self.cell.gates)
        if self.batch_sizes is None:
            if input_.dim() != 3:
                raise RuntimeError(f"input must have 3 dimensions (time, batch, feature), got {input_.dim()}")
        else:
            self._check_batch_sizes(values=batch is None)
        if self.time == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        for name, weight in zip(("weight_ih", "weight_hh"), self.weights, strict=False):
            if weight is None or weight.dim() != 2:
                raise RuntimeError(f"{name} must be a matrix")
        hidden, features = self.weights[1].shape[0] // gates, input_.shape[-1]  # type: ignore[union-attr]
        for direction in range(self.directions):
            weights = self.of_direction(direction)
            projected = weights[4] is not None
            if projected and "c" not in self.cell.states:
                raise RuntimeError("proj_size argument is only supported for LSTM, not RNN or GRU")
            if weights[0] is not None and weights[0].dim() == 2 and weights[0].shape[1] != features:
                raise RuntimeError(
                    f"input has inconsistent input_size: got {features} features, but weight_ih of shape "
                    f"{tuple(weights[0].shape)} expects {weights[0].shape[1]}"
                )
            output = weights[4].shape[0] if projected else hidden  # type: ignore[union-attr]
            expected = {
                "weight_ih": (gates * hidden, features),
                "weight_hh": (gates * hidden, output),
                "bias_ih": (gates * hidden,),
                "bias_hh": (gates * hidden,),
                "weight_hr": (output, hidden),
            }
            for (name, shape), weight in zip(expected.items(), weights, strict=True):
                if weight is not None:
                    self._check_tensor(name, weight, shape)
            if (weights[2] is None) != (weights[3] is None):
                raise RuntimeError("bias_ih and bias_hh must be given together")
        values = batch is None
        batch = self.batch if batch is None else batch
        for name, state, width in zip(self.cell.states, self.hx, self.widths(), strict=True):
            if state is not None:
                self._check_tensor(f"{name}_0", state, (self.directions, batch, width))
        for name, state, width in zip(self.cell.states, self.reset_state, self.widths(), strict=False):
            if state is not None:
                self._check_tensor(f"{name} of reset_state", state, (self.directions, batch, width))
        if self.h_mask is not None:
            self._check_tensor("h_mask", self.h_mask, (self.directions, batch, self.output_size))
        if self.zoneout and len(self.zoneout) != len(self.cell.states):
            raise RuntimeError(f"Expected {len(self.cell.states)} rates of zoneout, got {len(self.zoneout)}")
        self._check_lengths(batch, values)
        if self.resets is not None:
            shape = tuple(self.input.shape[:-1])
            if self.resets.dtype != torch.bool or tuple(self.resets.shape) != shape:
                raise RuntimeError(
                    f"Expected resets of shape {shape} and dtype torch.bool, got {tuple(self.resets.shape)} and "
                    f"{self.resets.dtype}"
                )
            self._check_device("resets", self.resets)

    def _check_lengths(self, batch: int | torch.SymInt, values: bool) -> None:
        lengths = self.lengths
        if lengths is None:
            return
        if self.batch_sizes is not None:
            raise RuntimeError("a packed batch has batch_sizes, not lengths")
        if lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
            raise RuntimeError(
                f"Expected lengths of shape ({batch},) and dtype torch.int64, got {tuple(lengths.shape)} and "
                f"{lengths.dtype}"
            )
        if lengths.device.type != "cpu":
            self._check_device("lengths", lengths)
        elif values and lengths.numel() and not (int(lengths.min()) >= 0 and int(lengths.max()) <= self.time):
            raise RuntimeError(f"lengths must be from 0 to the {self.time} steps of the input, got {lengths.tolist()}")

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.input.device:
            raise RuntimeError(f"input is on {self.input.device}, but {name} on {tensor.device}")

    def _check_batch_sizes(self, values: bool) -> None:
        sizes = self.batch_sizes
        assert sizes is not None
        if sizes.device.type != "cpu" or sizes.dtype != torch.int64 or sizes.dim() != 1:
            raise RuntimeError(
                "batch_sizes should always be on CPU, one-dimensional, int64, but got them on "
                f"{sizes.device}, {sizes.dim()}-dimensional, {sizes.dtype}"
            )
        if self.input.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions (tokens, feature), got {self.input.dim()}")
        if not values:
            return
        if len(sizes) and (int(sizes[-1]) < 1 or bool((sizes[1:] > sizes[:-1]).any())):
            raise RuntimeError("batch_sizes must be positive and must not rise along time")
        if int(sizes.sum()) != self.input.shape[0]:
            raise RuntimeError(f"batch_sizes add up to {int(sizes.sum())}, but input has {self.input.shape[0]} rows")

    def _check_tensor(self, name: str, tensor: Tensor, shape: tuple[int | torch.SymInt, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"Expected {name} of shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != self.input.dtype:
            raise RuntimeError(f"{name} has dtype {tensor.dtype}, but input has {self.input.dtype}")
        if tensor.device != self.input.device:
            raise RuntimeError(
                f"Input and parameter tensors are not at the same device: input is on {self.input.device}, "
                f"{name} on {tensor.device}"
            )


#: ``(output or None, *states of every step, *final states)``: output (T, B, D*R) or (tokens, D*R); if the call has
#: ``every_state``, for each state but h the values that enter the next step, (T, B, D*H) or (tokens, D*H); final states
#: (D, B, width).
Outputs = tuple[Tensor | None, ...]
#: What an engine keeps for its own backward. Nobody else looks inside.
Saved = tuple[Tensor, ...]


class Engine(Protocol):
    """Something that can run a :class:`Call`.

    A ``traceable`` engine is made of torch operations: autograd, torch.func and dispatch modes see
    through it, so it needs no ``backward``. The others work on plain tensors only, and the call they get
    is in a dtype of ``dtypes``: another floating-point type is converted for them (``computes_in``).
    """

    name: str
    traceable: bool
    recomputes: bool  # whether it heeds ``Call.recompute``

    def available(self) -> str | None:
        """None if the engine can run on this machine, else the reason why not."""

    def supports(self, call: Call) -> str | None:
        """None if the engine can run the call, else the reason why not."""

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to which tensors of ``dtype`` are converted before the engine sees them."""

    def describe(self, call: Call) -> str:
        """One line for ``explain``: which kernel, instruction set, threads."""

    def forward(self, call: Call, save: bool) -> tuple[Outputs, Saved]:
        """Run the layer; with ``save`` keep what ``backward`` needs."""

    def saved_shapes(self, call: Call) -> tuple[tuple[int, ...], ...]:
        """The shapes of what ``forward`` saves, in the dtype that the engine computes in.

        torch.compile must know them before anything runs, from tensors without memory. An engine that returns none
        has ``forward`` run again for ``backward`` there.
        """

    def backward(
        self, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Gradients in the order of ``call.tensors()``, None where ``needs`` is false.

        ``grads`` are those of the outputs, None for zeros. ``saved`` may be used again: it is not changed.
        """
