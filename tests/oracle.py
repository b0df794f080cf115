"""Recurrent networks in float64 NumPy, forward and backward written by hand: what every engine is compared with.

It shares no code with the package and knows nothing of torch. Shapes use T steps, B rows, I features, H hidden
units, R the width of the state h (the projection's, else H), L layers, D directions. A batch is padded: row b of an
input (T, B, I) has ``lengths[b]`` steps, what lies behind them is ignored, and the output there is zero.
Gates are in torch's order: i f g o for an LSTM, r z n for a GRU whose reset gate acts after the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Weights(NamedTuple):
    """The weights of one layer in one direction, or their gradients, in torch's order. None where there are none."""

    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None = None
    bias_hh: Array | None = None
    weight_hr: Array | None = None


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class Tanh:
    """h = tanh(a + b). Here and below a = W_ih x + b_ih and b = W_hh h_{t-1} + b_hh."""

    states = ("h",)

    def forward(self, a: Array, b: Array, states: Sequence[Array]) -> tuple[list[Array], Any]:
        h = np.tanh(a + b)
        return [h], h

    def backward(self, h: Any, grads: Sequence[Array]) -> tuple[Array, Array, list[Array]]:
        """Gradients of a, of b, and of the previous states where they enter the cell beside b."""
        d = grads[0] * (1 - h * h)
        return d, d, [np.zeros_like(h)]


class Relu:
    """h = max(a + b, 0). Within ``blur`` of its kink the slope is 0 or 1 by chance, as rounding may make it."""

    states = ("h",)

    def __init__(self, blur: float = 0.0, seed: int = 0) -> None:
        self.blur, self.random = blur, np.random.default_rng(seed)

    def forward(self, a: Array, b: Array, states: Sequence[Array]) -> tuple[list[Array], Any]:
        total = a + b
        return [np.maximum(total, 0)], total > self.blur * self.random.choice([-1, 1], total.shape)

    def backward(self, slope: Any, grads: Sequence[Array]) -> tuple[Array, Array, list[Array]]:
        d = grads[0] * slope
        return d, d, [np.zeros_like(d)]


class Lstm:
    """c = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c)."""

    states = ("h", "c")

    def forward(self, a: Array, b: Array, states: Sequence[Array]) -> tuple[list[Array], Any]:
        i, f, g, o = np.split(a + b, 4, -1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        c = f * states[1] + i * g
        return [o * np.tanh(c), c], (i, f, g, o, states[1], c)

    def backward(self, kept: Any, grads: Sequence[Array]) -> tuple[Array, Array, list[Array]]:
        i, f, g, o, old_c, c = kept
        d_h, d_c = grads
        d_c = d_c + d_h * o * (1 - np.tanh(c) ** 2)
        d = np.concatenate(
            [
                d_c * g * i * (1 - i),
                d_c * old_c * f * (1 - f),
                d_c * i * (1 - g * g),
                d_h * np.tanh(c) * o * (1 - o),
            ],
            -1,
        )
        return d, d, [np.zeros_like(d_h), d_c * f]


class Gru:
    """n = tanh(a_n + sigmoid(r) b_n), h = (1 - sigmoid(z)) n + sigmoid(z) h_{t-1}."""

    states = ("h",)

    def forward(self, a: Array, b: Array, states: Sequence[Array]) -> tuple[list[Array], Any]:
        (a_r, a_z, a_n), (b_r, b_z, b_n) = np.split(a, 3, -1), np.split(b, 3, -1)
        r, z = sigmoid(a_r + b_r), sigmoid(a_z + b_z)
        n = np.tanh(a_n + r * b_n)
        return [(1 - z) * n + z * states[0]], (r, z, n, b_n, states[0])

    def backward(self, kept: Any, grads: Sequence[Array]) -> tuple[Array, Array, list[Array]]:
        r, z, n, b_n, old = kept
        d_h = grads[0]
        d_n = d_h * (1 - z) * (1 - n * n)
        d_z = d_h * (old - n) * z * (1 - z)
        d_r = d_n * b_n * r * (1 - r)
        return np.concatenate([d_r, d_z, d_n], -1), np.concatenate([d_r, d_z, d_n * r], -1), [d_h * z]


Cell = Tanh | Relu | Lstm | Gru
CELLS: dict[str, Cell] = {"rnn_tanh": Tanh(), "rnn_relu": Relu(), "lstm": Lstm(), "gru": Gru()}


class Direction:
    """One direction of one layer: runs at construction and remembers what ``backward`` needs."""

    def __init__(
        self, cell: Cell, x: Array, lengths: Array, initial: Sequence[Array], weights: Weights, *, reverse: bool
    ) -> None:
        steps, batch, _ = x.shape
        self.cell, self.x, self.weights = cell, x, weights
        self.final = [state.copy() for state in initial]
        self.output = np.zeros((steps, batch, initial[0].shape[1]))
        self.tape: list[tuple[int, Array, Array, Array, Any]] = []
        for t in reversed(range(steps)) if reverse else range(steps):
            rows = np.flatnonzero(lengths > t)
            old = [state[rows] for state in self.final]
            a, b = x[t, rows] @ weights.weight_ih.T, old[0] @ weights.weight_hh.T
            if weights.bias_ih is not None:
                a, b = a + weights.bias_ih, b + weights.bias_hh
            new, kept = cell.forward(a, b, old)
            hidden = new[0]
            if weights.weight_hr is not None:
                new[0] = hidden @ weights.weight_hr.T
            for state, value in zip(self.final, new, strict=True):
                state[rows] = value
            self.output[t, rows] = new[0]
            self.tape.append((t, rows, old[0], hidden, kept))

    def backward(self, d_output: Array, d_final: Sequence[Array]) -> tuple[Array, list[Array], Weights]:
        """Gradients of the input, of the initial states, and of the weights."""
        w = self.weights
        d_w = Weights(*(None if v is None else np.zeros_like(v) for v in w))
        d_x = np.zeros_like(self.x)
        d_states = [d.copy() for d in d_final]
        for t, rows, old_h, hidden, kept in reversed(self.tape):
            d_new = [d[rows] for d in d_states]
            d_new[0] = d_new[0] + d_output[t, rows]
            if w.weight_hr is not None:
                d_w.weight_hr[...] += d_new[0].T @ hidden
                d_new[0] = d_new[0] @ w.weight_hr
            d_a, d_b, d_old = self.cell.backward(kept, d_new)
            d_w.weight_ih[...] += d_a.T @ self.x[t, rows]
            d_w.weight_hh[...] += d_b.T @ old_h
            if w.bias_ih is not None:
                d_w.bias_ih[...] += d_a.sum(0)
                d_w.bias_hh[...] += d_b.sum(0)
            d_x[t, rows] = d_a @ w.weight_ih
            # Only an LSTM is projected, and its old h enters through the gates alone: widths H and R never meet here.
            d_old[0] = d_b @ w.weight_hh + (0 if w.weight_hr is not None else d_old[0])
            for d, value in zip(d_states, d_old, strict=True):
                d[rows] = value
        return d_x, d_states, d_w


class Network:
    """A stack of layers, run at construction.

    Args:
        cell: an entry of ``CELLS``.
        x: (T, B, I).
        lengths: (B,), or None where every row has T steps.
        initial: for each state of the cell (L*D, B, width), or None for zeros.
        weights: L*D entries, the directions of a layer side by side.
        directions: D.

    Attributes:
        output: (T, B, D*R).
        final: for each state (L*D, B, width).
    """

    def __init__(
        self,
        cell: Cell,
        x: Array,
        lengths: Array | None,
        initial: Sequence[Array] | None,
        weights: Sequence[Weights],
        *,
        directions: int = 1,
    ) -> None:
        steps, batch, _ = x.shape
        lengths = np.full(batch, steps) if lengths is None else np.asarray(lengths)
        if initial is None:
            width = weights[0].weight_hh.shape[1]
            hidden = width if weights[0].weight_hr is None else weights[0].weight_hr.shape[1]
            widths = [width, *[hidden] * (len(cell.states) - 1)]
            initial = [np.zeros((len(weights), batch, w)) for w in widths]
        self.layers: list[list[Direction]] = []
        for first in range(0, len(weights), directions):
            layer = [
                Direction(cell, x, lengths, [s[first + d] for s in initial], weights[first + d], reverse=d == 1)
                for d in range(directions)
            ]
            x = np.concatenate([run.output for run in layer], -1)
            self.layers.append(layer)
        self.output = x
        runs = [run for layer in self.layers for run in layer]
        self.final = [np.stack(values) for values in zip(*(run.final for run in runs), strict=True)]

    def backward(self, d_output: Array, d_final: Sequence[Array]) -> tuple[Array, list[Array], list[Weights]]:
        """Gradients of the input, of the initial states, and of the weights."""
        d_initial = [np.zeros_like(state) for state in self.final]
        d_weights: list[Weights] = []
        directions = len(self.layers[0])
        for index in reversed(range(len(self.layers))):
            d_x, of_layer = 0, []
            for d, (run, d_out) in enumerate(zip(self.layers[index], np.split(d_output, directions, -1), strict=True)):
                k = index * directions + d
                from_run, d_states, d_w = run.backward(d_out, [s[k] for s in d_final])
                d_x = d_x + from_run
                for whole, part in zip(d_initial, d_states, strict=True):
                    whole[k] = part
                of_layer.append(d_w)
            d_output, d_weights = d_x, of_layer + d_weights
        return d_output, d_initial, d_weights


def pack(padded: Array, lengths: Array) -> tuple[Array, Array]:
    """A padded batch whose lengths do not rise, as the data and batch sizes of a PackedSequence."""
    sizes = np.array([(lengths > t).sum() for t in range(lengths.max())])
    return np.concatenate([padded[t, :size] for t, size in enumerate(sizes)]), sizes


def unpack(data: Array, sizes: Array) -> Array:
    """The padded batch (T, B, features) of a packed one, zero behind each row's end."""
    padded = np.zeros((len(sizes), sizes[0], data.shape[1]))
    first = 0
    for t, size in enumerate(sizes):
        padded[t, :size] = data[first : first + size]
        first += size
    return padded
