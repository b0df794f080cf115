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
    """One direction of one layer: runs at construction and remembers what ``backward`` needs.

    Args:
        mask: (B, R), by which h is multiplied before W_hh, or None for ones.
        stays: for each state (T, B, width), the share of the state before in the one after a step, or None for zeros.
    """

    def __init__(
        self,
        cell: Cell,
        x: Array,
        lengths: Array,
        initial: Sequence[Array],
        weights: Weights,
        *,
        reverse: bool,
        mask: Array | None = None,
        stays: Sequence[Array] | None = None,
    ) -> None:
        steps, batch, _ = x.shape
        self.cell, self.x, self.weights = cell, x, weights
        self.mask = np.ones_like(initial[0]) if mask is None else mask
        self.stays = [np.zeros((steps, *state.shape)) for state in initial] if stays is None else stays
        self.final = [state.copy() for state in initial]
        self.steps = [np.zeros((steps, batch, state.shape[1])) for state in initial]
        self.output = self.steps[0]
        self.tape: list[tuple[int, Array, Array, Array, Any]] = []
        for t in reversed(range(steps)) if reverse else range(steps):
            rows = np.flatnonzero(lengths > t)
            old = [state[rows] for state in self.final]
            entering = old[0] * self.mask[rows]
            a, b = x[t, rows] @ weights.weight_ih.T, entering @ weights.weight_hh.T
            if weights.bias_ih is not None:
                a, b = a + weights.bias_ih, b + weights.bias_hh
            new, kept = cell.forward(a, b, old)
            hidden = new[0]
            if weights.weight_hr is not None:
                new[0] = hidden @ weights.weight_hr.T
            share = [s[t, rows] for s in self.stays]
            new = [k * before + (1 - k) * after for k, before, after in zip(share, old, new, strict=True)]
            for state, value in zip(self.final, new, strict=True):
                state[rows] = value
            for at_every_step, value in zip(self.steps, new, strict=True):
                at_every_step[t, rows] = value
            self.tape.append((t, rows, entering, hidden, kept))

    def backward(
        self, d_output: Array, d_final: Sequence[Array], d_others: Sequence[Array] = ()
    ) -> tuple[Array, list[Array], Weights]:
        """Gradients of the input, of the initial states, and of the weights.

        ``d_others`` are those of the states but h at every step, (T, B, H) each.
        """
        w = self.weights
        d_w = Weights(*(None if v is None else np.zeros_like(v) for v in w))
        d_x = np.zeros_like(self.x)
        d_states = [d.copy() for d in d_final]
        for t, rows, entering, hidden, kept in reversed(self.tape):
            d_new = [d[rows] for d in d_states]
            for k, d_step in enumerate([d_output, *d_others]):
                d_new[k] = d_new[k] + d_step[t, rows]
            share = [s[t, rows] for s in self.stays]
            d_past = [k * d for k, d in zip(share, d_new, strict=True)]
            d_new = [(1 - k) * d for k, d in zip(share, d_new, strict=True)]
            if w.weight_hr is not None:
                d_w.weight_hr[...] += d_new[0].T @ hidden
                d_new[0] = d_new[0] @ w.weight_hr
            d_a, d_b, d_old = self.cell.backward(kept, d_new)
            d_w.weight_ih[...] += d_a.T @ self.x[t, rows]
            d_w.weight_hh[...] += d_b.T @ entering
            if w.bias_ih is not None:
                d_w.bias_ih[...] += d_a.sum(0)
                d_w.bias_hh[...] += d_b.sum(0)
            d_x[t, rows] = d_a @ w.weight_ih
            # Only an LSTM is projected, and its old h enters through the gates alone: widths H and R never meet here.
            d_old[0] = d_b @ w.weight_hh * self.mask[rows] + (0 if w.weight_hr is not None else d_old[0])
            for d, value, past in zip(d_states, d_old, d_past, strict=True):
                d[rows] = value + past
        return d_x, d_states, d_w


class Segments:
    """One direction of one layer with resets: each segment of each row is a row of its own, in a batch of segments.

    A segment begins where a row does and where ``resets`` (T, B) is true. In the direction's order a row's first one
    starts from ``initial``, any other from ``reset_state``; a reset at the row's first step replaces the initial state
    forward, where it comes before that step, and in reverse nothing, as no step comes after it.
    """

    def __init__(
        self,
        cell: Cell,
        x: Array,
        lengths: Array,
        resets: Array,
        initial: Sequence[Array],
        reset_state: Sequence[Array],
        weights: Weights,
        *,
        reverse: bool,
        mask: Array | None = None,
        stays: Sequence[Array] | None = None,
    ) -> None:
        steps, batch, features = x.shape
        self.shape, self.pieces = x.shape, []
        for b in range(batch):
            cuts = [0, *(t for t in range(1, lengths[b]) if resets[t, b]), lengths[b]]
            count = len(cuts) - 1
            for k in range(count):
                first, last = (k == count - 1, k == 0) if reverse else (k == 0, k == count - 1)
                anew = not first or (not reverse and lengths[b] > 0 and resets[0, b])
                self.pieces.append((b, slice(cuts[k], cuts[k + 1]), anew, last))
        lengths_of_pieces = np.array([piece.stop - piece.start for _, piece, _, _ in self.pieces])
        rows = np.zeros((steps, len(self.pieces), features))
        starts = [np.zeros((len(self.pieces), state.shape[1])) for state in initial]
        for n, (b, piece, anew, _) in enumerate(self.pieces):
            rows[: lengths_of_pieces[n], n] = x[piece, b]
            for start, old, new in zip(starts, initial, reset_state, strict=True):
                start[n] = (new if anew else old)[b]
        of_rows = [b for b, _, _, _ in self.pieces]
        self.run = Direction(
            cell,
            rows,
            lengths_of_pieces,
            starts,
            weights,
            reverse=reverse,
            mask=None if mask is None else mask[of_rows],
            stays=None if stays is None else [self._split(s) for s in stays],
        )
        self.steps = [self._joined(values) for values in self.run.steps]
        self.output = self.steps[0]
        self.final = [np.zeros_like(state) for state in initial]
        for n, (b, _, _, last) in enumerate(self.pieces):
            if last:
                for whole, part in zip(self.final, self.run.final, strict=True):
                    whole[b] = part[n]

    def _joined(self, values: Array) -> Array:
        whole = np.zeros((*self.shape[:2], values.shape[2]))
        for n, (b, piece, _, _) in enumerate(self.pieces):
            whole[piece, b] = values[: piece.stop - piece.start, n]
        return whole

    def _split(self, values: Array) -> Array:
        parts = np.zeros((self.shape[0], len(self.pieces), values.shape[2]))
        for n, (b, piece, _, _) in enumerate(self.pieces):
            parts[: piece.stop - piece.start, n] = values[piece, b]
        return parts

    def backward(
        self, d_output: Array, d_final: Sequence[Array], d_others: Sequence[Array] = ()
    ) -> tuple[Array, list[Array], Weights]:
        """As of a Direction. ``d_reset_state`` then holds the gradients of the reset states."""
        ends = [np.array([d[b] * last for b, _, _, last in self.pieces]) for d in d_final]
        d_x, d_starts, d_w = self.run.backward(self._split(d_output), ends, [self._split(d) for d in d_others])
        d_initial = [np.zeros_like(d) for d in d_final]
        self.d_reset_state = [np.zeros_like(d) for d in d_final]
        for n, (b, _, anew, _) in enumerate(self.pieces):
            for whole, part in zip(self.d_reset_state if anew else d_initial, d_starts, strict=True):
                whole[b] += part[n]
        return self._joined(d_x), d_initial, d_w


class Network:
    """A stack of layers, run at construction.

    Args:
        cell: an entry of ``CELLS``.
        x: (T, B, I).
        lengths: (B,), or None where every row has T steps.
        initial: for each state of the cell (L*D, B, width), or None for zeros.
        weights: L*D entries, the directions of a layer side by side.
        directions: D.
        resets: (T, B), or None for none.
        reset_state: for each state (L*D, B, width), or None for zeros.
        mask: (L*D, B, R), by which h is multiplied before W_hh, or None for ones.
        stays: for each state (L*D, T, B, width), the share of the state before in the one after, or None for zeros.

    Attributes:
        output: (T, B, D*R).
        final: for each state (L*D, B, width).
        steps: for each layer and each state its values at every step (T, B, D*width).
        d_reset_state: after ``backward``, if there are resets: for each state (L*D, B, width).
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
        resets: Array | None = None,
        reset_state: Sequence[Array] | None = None,
        mask: Array | None = None,
        stays: Sequence[Array] | None = None,
    ) -> None:
        steps, batch, _ = x.shape
        lengths = np.full(batch, steps) if lengths is None else np.asarray(lengths)
        if initial is None:
            width = weights[0].weight_hh.shape[1]
            hidden = width if weights[0].weight_hr is None else weights[0].weight_hr.shape[1]
            widths = [width, *[hidden] * (len(cell.states) - 1)]
            initial = [np.zeros((len(weights), batch, w)) for w in widths]
        fresh = [np.zeros_like(state) for state in initial] if reset_state is None else reset_state

        def run(k: int, reverse: bool) -> Direction | Segments:
            start = [state[k] for state in initial]
            drops: dict[str, Any] = {
                "mask": None if mask is None else mask[k],
                "stays": None if stays is None else [s[k] for s in stays],
            }
            if resets is None:
                return Direction(cell, x, lengths, start, weights[k], reverse=reverse, **drops)
            return Segments(
                cell, x, lengths, resets, start, [s[k] for s in fresh], weights[k], reverse=reverse, **drops
            )

        self.layers: list[list[Direction | Segments]] = []
        for first in range(0, len(weights), directions):
            layer = [run(first + d, reverse=d == 1) for d in range(directions)]
            x = np.concatenate([of_direction.output for of_direction in layer], -1)
            self.layers.append(layer)
        self.steps = [
            [np.concatenate(values, -1) for values in zip(*(one.steps for one in layer), strict=True)]
            for layer in self.layers
        ]
        self.output = x
        runs = [run for layer in self.layers for run in layer]
        self.final = [np.stack(values) for values in zip(*(run.final for run in runs), strict=True)]

    def backward(
        self, d_output: Array, d_final: Sequence[Array], d_steps: Sequence[Sequence[Array]] = ()
    ) -> tuple[Array, list[Array], list[Weights]]:
        """Gradients of the input, of the initial states, and of the weights. ``d_steps`` are those of ``steps``."""
        self.d_reset_state = [np.zeros_like(state) for state in self.final]
        d_initial = [np.zeros_like(state) for state in self.final]
        d_weights: list[Weights] = []
        directions = len(self.layers[0])
        for index in reversed(range(len(self.layers))):
            d_x, of_layer = 0, []
            d_others: list[list[Array]] = [[] for _ in range(directions)]
            if d_steps:
                d_output = d_output + d_steps[index][0]
                d_others = (
                    list(zip(*(np.split(d, directions, -1) for d in d_steps[index][1:]), strict=True)) or d_others
                )
            for d, (run, d_out) in enumerate(zip(self.layers[index], np.split(d_output, directions, -1), strict=True)):
                k = index * directions + d
                from_run, d_states, d_w = run.backward(d_out, [s[k] for s in d_final], d_others[d])
                if isinstance(run, Segments):
                    for whole, part in zip(self.d_reset_state, run.d_reset_state, strict=True):
                        whole[k] = part
                d_x = d_x + from_run
                for whole, part in zip(d_initial, d_states, strict=True):
                    whole[k] = part
                of_layer.append(d_w)
            d_output, d_weights = d_x, of_layer + d_weights
        return d_output, d_initial, d_weights


def splitmix64(seed: int, n: Array) -> Array:
    """The n-th numbers of SplitMix64 after Steele, Lea and Flood (2014), from 0 on."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + (n.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def zoneout(
    rates: Sequence[float], seed: int | None, sizes: tuple[int, int, int, int], widths: Sequence[int]
) -> list[Array]:
    """For each state (D, T, B, width) the share of the state before, drawn or expected, for ``sizes`` D, T, B, H."""
    D, T, B, H = sizes
    shares = []
    for s, (rate, width) in enumerate(zip(rates, widths, strict=True)):
        place = ((s * D + np.arange(D)[:, None, None]) * T + np.arange(T)[:, None]) * B + np.arange(B)
        place = place[..., None] * H + np.arange(width)
        drawn = None if seed is None else (splitmix64(seed, place) >> np.uint64(40)) < rate * 2**24
        shares.append(np.full(place.shape, rate) if drawn is None else drawn.astype(float))
    return shares


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
