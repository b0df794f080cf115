"""The kinds of dropout that recurrent networks use, and the lots that zoneout draws."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import dropout

from .cells import Cell


@dataclass(frozen=True)
class Dropouts:
    """Probabilities from 0 to 1 of what a recurrent network may drop while it trains.

    Attributes:
        variational: of dropping a feature of each layer's input, for a whole sequence (Gal and Ghahramani 2016).
        recurrent: of dropping a feature of h, for a whole sequence, on its way into the recurrent products (the same).
        zoneout: of a unit keeping the h and the c that it had, at each step; one number for both, or for an LSTM a pair
            (Krueger et al. 2017). In evaluation its expectation takes the place of the lots.
        weight: of dropping an element of weight_hh, for a whole call (Merity et al. 2018).

    What is not dropped is divided by the probability that it stays, but for zoneout.

    Raises:
        ValueError: a probability outside [0, 1].
        TypeError: one is no number, or of zoneout no tuple of numbers either.
    """

    variational: float = 0.0
    recurrent: float = 0.0
    zoneout: float | tuple[float, ...] = 0.0
    weight: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            name = field.name if field.name == "zoneout" else f"{field.name} dropout"
            rates = value if field.name == "zoneout" and isinstance(value, tuple) else (value,)
            if not all(isinstance(p, Real) for p in rates):
                raise TypeError(f"{name} must be a number{' or a tuple' * (field.name == 'zoneout')}, got {value!r}")
            if not all(0 <= p <= 1 for p in rates):
                raise ValueError(f"{name} must be in [0, 1], got {value}")

    def zoneout_of(self, cell: Cell) -> tuple[float, ...]:
        """The rate of each of the cell's states, or nothing without zoneout.

        Raises:
            ValueError: there are as many rates as neither one nor the states.
        """
        states = len(cell.states)
        rates = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout,) * states
        if len(rates) != states:
            raise ValueError(f"zoneout of {cell.mode} needs one rate, or one for each of {', '.join(cell.states)}")
        return tuple(map(float, rates)) if any(rates) else ()

    def of_input(self, input: Tensor, batch_sizes: Tensor | None) -> Tensor:
        """A layer's input (T, B, I), or (tokens, I) if packed, without what is dropped of it."""
        if not self.variational:
            return input
        if batch_sizes is None:
            return input * dropout(input.new_ones(input.shape[1:]), self.variational)
        sizes = batch_sizes.to(input.device)
        rows = torch.arange(len(input), device=input.device)
        rows = rows - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes, output_size=len(input))
        return input * dropout(input.new_ones(int(batch_sizes[0]), input.shape[-1]), self.variational)[rows]

    def of_h(self, input: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
        """The factors (D, B, R) of h on its way into the recurrent products."""
        return dropout(input.new_ones(shape), self.recurrent) if self.recurrent else None

    def of_weights(self, weights: tuple[Tensor | None, ...], each: int) -> tuple[Tensor | None, ...]:
        """A layer's weights, ``each`` to a direction, weight_hh the second, without what is dropped of it."""
        if not self.weight:
            return weights
        return tuple(dropout(w, self.weight) if k % each == 1 and w is not None else w for k, w in enumerate(weights))


NO_DROPOUTS = Dropouts()

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return value - (1 << 64) if value >> 63 else value


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def stays(rate: float, seed: Tensor, place: Tensor) -> Tensor:
    """Whether zoneout leaves the state before in each of these places: the lots that the kernels draw, in torch.

    They are numbers of SplitMix64 (Steele et al. 2014), which computes its n-th number from n, so that nobody need keep
    them. Products of int64 wrap around; shifts extend the sign, which is taken off.
    """

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & (_MASK >> bits)

    x = seed + (place + 1) * _STEP
    x = (x ^ shifted(x, 30)) * _FIRST
    x = (x ^ shifted(x, 27)) * _SECOND
    return shifted(x ^ shifted(x, 31), 40) < rate * 2**24
