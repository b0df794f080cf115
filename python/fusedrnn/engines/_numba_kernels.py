"""A recurrent layer in Numba: for each cell its gate arithmetic, and around any of them two time loops.

Read a cell first, say ``lstm_forward`` and ``lstm_backward``, then ``forward`` and ``backward`` in ``_time_loops``.
Only the recurrence is here. All that can be computed for the whole sequence at once, the products with
``weight_ih`` before the loop and the gradients of the weights after it, the engine leaves to torch.

The rows of all sequences stand one after another, step by step: the tokens of a PackedSequence. A dense (T, B, I)
input has T * B tokens, a padded one is packed by the engine. ``sizes[t]`` rows are active at step t; as the sequences
are sorted by length these are always the first ones. Both directions use the same step numbers, the second walks them
from the end.

Loops over single elements are written out: compiled they are as fast as slices, and they compile several times
faster.

Arrays are C-contiguous, so that one compiled kernel serves every call of a dtype. One that a call has no use for
(the output when nobody wants it, a projection, a mask) is given without rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numba.extending import register_jitable
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

# "contract" allows fused multiply-add and nothing else: NaN and infinity keep their meaning and sums their order.
# The error model of NumPy divides without looking for zero, which would cost a branch in every sigmoid.
_OPTIONS: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}


def _part_of_kernel(function: _Function) -> _Function:
    """To be compiled with the kernels that call it.

    Not by njit: a kernel that closes over njit's object is cached under the identity of that object, and so is
    compiled anew in every process. A plain function is known by its name.
    """
    return register_jitable(**_OPTIONS)(function)  # type: ignore[no-any-return]


def _kernel(function: _Function) -> _Function:
    """Compiled at the first call with arrays of a dtype, and kept on disk for the next process."""
    try:
        return njit(cache=True, nogil=True, **_OPTIONS)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return njit(nogil=True, **_OPTIONS)(function)  # type: ignore[no-any-return]


# Activations. Literals are doubles, so these compute in double precision, whatever the arrays hold.
# That costs little beside the recurrent product, and makes one polynomial serve both dtypes.

_INVERSE_FACTORIALS = tuple(1 / math.factorial(k) for k in range(13, 0, -1))
_LOG2_E = 1 / math.log(2)
# ln 2 in two parts; the first ends in zeros, so that n * _LN2_HIGH is exact.
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42fefa3800p-1"), float.fromhex("0x1.ef35793c76730p-45")
# Adding it rounds a number to an integer, which then stands in the lowest bits of the sum.
_ROUND = 1.5 * 2.0**52
_EXPONENT_BIAS, _MANTISSA_BITS = 1023, 52
_LARGEST = 709.0  # beyond it, either way, 2^n leaves the range of a double


@_part_of_kernel
def expm1(x: float) -> float:
    """exp(x) - 1 to full relative precision, several times faster than the C library's as it has no branches.

    With x = n ln 2 + r, |r| <= ln 2 / 2, it is 2^n (exp(r) - 1) + (2^n - 1), and exp(r) - 1 its Taylor series.
    """
    rounded = x * _LOG2_E + _ROUND
    n = rounded - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = 0.0
    for coefficient in _INVERSE_FACTORIALS:
        series = series * r + coefficient
    power = np.int64((np.float64(rounded).view(np.int64) + _EXPONENT_BIAS) << _MANTISSA_BITS).view(np.float64)
    result: float = power * (series * r) + (power - 1.0)
    result = math.inf if x > _LARGEST else result  # these comparisons let NaN pass
    return -1.0 if x < -_LARGEST else result


@_part_of_kernel
def sigmoid(x: float) -> float:
    return 1.0 / (2.0 + expm1(-x))


@_part_of_kernel
def tanh(x: float) -> float:
    e = expm1(2.0 * (20.0 if x > 20.0 else x))  # from there on it is 1, but infinity / infinity is not
    return e / (e + 2.0)


# The cells: one token, forward and backward, the gates in torch's order. Each is a loop over units that the compiler
# turns into vector instructions; it would not if the loop stood outside, where a cell's rows of all tokens interleave.
#
# forward   x (G, H)      W_ih x_t + b_ih
#           s (G, H)      W_hh h_{t-1} + b_hh
#           h, c (H)      the states at t-1, to be made those at t; c is empty if the cell has none
#           kept (K, H)   to be filled with what backward needs; last the state that the next step reads besides s
# backward  kept (K, H)   as forward left it
#           before (H)    the last of kept, one step earlier
#           dh, dc (H)    gradients of the states at t, to be made those of the states at t-1, except through s
#           dx, ds (G, H) to be filled with the gradients of x and s; the same memory if the cell reads only their sum


@_part_of_kernel
def rnn_tanh_forward(x: Array, s: Array, h: Array, c: Array, kept: Array) -> None:
    for j in range(h.size):
        h[j] = tanh(x[0, j] + s[0, j])
        kept[0, j] = h[j]


@_part_of_kernel
def rnn_tanh_backward(kept: Array, before: Array, dh: Array, dc: Array, dx: Array, ds: Array) -> None:
    for j in range(dh.size):
        h = kept[0, j]
        ds[0, j] = dh[j] * (1.0 - h * h)
        dh[j] = 0.0


@_part_of_kernel
def rnn_relu_forward(x: Array, s: Array, h: Array, c: Array, kept: Array) -> None:
    for j in range(h.size):
        sum_ = x[0, j] + s[0, j]
        h[j] = 0.0 if sum_ <= 0.0 else sum_  # written so that NaN stays
        kept[0, j] = h[j]


@_part_of_kernel
def rnn_relu_backward(kept: Array, before: Array, dh: Array, dc: Array, dx: Array, ds: Array) -> None:
    for j in range(dh.size):
        ds[0, j] = 0.0 if kept[0, j] <= 0.0 else dh[j]
        dh[j] = 0.0


@_part_of_kernel
def lstm_forward(x: Array, s: Array, h: Array, c: Array, kept: Array) -> None:
    for j in range(h.size):
        i = sigmoid(x[0, j] + s[0, j])
        f = sigmoid(x[1, j] + s[1, j])
        g = tanh(x[2, j] + s[2, j])
        o = sigmoid(x[3, j] + s[3, j])
        c[j] = f * c[j] + i * g
        h[j] = o * tanh(c[j])
        kept[0, j], kept[1, j], kept[2, j], kept[3, j], kept[4, j] = i, f, g, o, c[j]


@_part_of_kernel
def lstm_backward(kept: Array, before: Array, dh: Array, dc: Array, dx: Array, ds: Array) -> None:
    for j in range(dh.size):
        i, f, g, o, tanh_c = kept[0, j], kept[1, j], kept[2, j], kept[3, j], tanh(kept[4, j])
        total = dc[j] + dh[j] * o * (1.0 - tanh_c * tanh_c)
        ds[0, j] = total * g * i * (1.0 - i)
        ds[1, j] = total * before[j] * f * (1.0 - f)
        ds[2, j] = total * i * (1.0 - g * g)
        ds[3, j] = dh[j] * tanh_c * o * (1.0 - o)
        dc[j] = total * f
        dh[j] = 0.0


def lstm_hidden(kept: Tensor) -> Tensor:
    return kept[:, 3] * kept[:, 4].tanh()


@_part_of_kernel
def gru_forward(x: Array, s: Array, h: Array, c: Array, kept: Array) -> None:
    for j in range(h.size):
        r = sigmoid(x[0, j] + s[0, j])
        z = sigmoid(x[1, j] + s[1, j])
        n = tanh(x[2, j] + r * s[2, j])
        h[j] = n + z * (h[j] - n)
        kept[0, j], kept[1, j], kept[2, j], kept[3, j], kept[4, j] = r, z, n, s[2, j], h[j]


@_part_of_kernel
def gru_backward(kept: Array, before: Array, dh: Array, dc: Array, dx: Array, ds: Array) -> None:
    for j in range(dh.size):
        r, z, n, recurrent = kept[0, j], kept[1, j], kept[2, j], kept[3, j]
        dn = dh[j] * (1.0 - z) * (1.0 - n * n)
        dr = dn * recurrent * r * (1.0 - r)
        dz = dh[j] * (before[j] - n) * z * (1.0 - z)
        dx[0, j], dx[1, j], dx[2, j] = dr, dz, dn
        ds[0, j], ds[1, j], ds[2, j] = dr, dz, dn * r
        dh[j] = dh[j] * z


def last_kept(kept: Tensor) -> Tensor:
    return kept[:, -1]


# The loops.


@_part_of_kernel
def add_product(a: Array, w: Array, out: Array) -> None:
    """out += a @ w, for a (rows, K), w (K, N), out (rows, N).

    The innermost loop runs along w's rows and out's, which the compiler turns into vector instructions. Four rows
    of w at a time, because each pass loads and stores out; rows of a inside, because these four stay in the cache.
    """
    for k in range(0, w.shape[0] - 3, 4):
        for b in range(a.shape[0]):
            a0, a1, a2, a3 = a[b, k], a[b, k + 1], a[b, k + 2], a[b, k + 3]
            for j in range(w.shape[1]):
                out[b, j] += a0 * w[k, j] + a1 * w[k + 1, j] + a2 * w[k + 2, j] + a3 * w[k + 3, j]
    for k in range(w.shape[0] // 4 * 4, w.shape[0]):
        for b in range(a.shape[0]):
            a0 = a[b, k]
            for j in range(w.shape[1]):
                out[b, j] += a0 * w[k, j]


@_part_of_kernel
def is_reset(sizes: Array, starts: Array, resets: Array, t: int, b: int) -> bool:
    """Whether row b has a step t and a segment begins with it."""
    return resets.size > 0 and t < len(sizes) and b < sizes[t] and resets[starts[t] + b]


# Zoneout, see ``fusedrnn.dropouts.stays``: the same numbers, and the same place for each unit's lot.

_STEP, _FIRST, _SECOND = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@_part_of_kernel
def stays(rate: float, seed: Array, place: int) -> float:
    """How much of the state before stays, from 0 to 1; ``seed`` (1), uint64, or empty if it is the expectation."""
    if seed.size == 0:
        return rate
    x = seed[0] + (np.uint64(place) + np.uint64(1)) * _STEP
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return 1.0 if np.int64((x ^ (x >> np.uint64(31))) >> np.uint64(40)) < rate * 2.0**24 else 0.0


@_part_of_kernel
def zone_out(rate: float, seed: Array, place: int, before: Array, after: Array) -> None:
    """Give some units of a state that the cell has computed the value that they had; theirs are the lots of ``place``
    and what follows.
    """
    for j in range(after.size):
        share = stays(rate, seed, place + j)
        if share == 1.0:  # whatever the cell has computed, be it NaN
            after[j] = before[j]
        elif share > 0.0:
            after[j] = share * before[j] + (1.0 - share) * after[j]


@_part_of_kernel
def divide_gradient(rate: float, seed: Array, place: int, gradient: Array, past: Array) -> None:
    """Of the gradient of a state after zoneout, what goes past the cell; the rest is that of what it computed."""
    for j in range(gradient.size):
        share = stays(rate, seed, place + j)
        past[j] = share * gradient[j]
        gradient[j] = (1.0 - share) * gradient[j]


@_kernel
def one_step_earlier(
    direction: int,
    sizes: Array,
    starts: Array,
    resets: Array,
    values: Array,
    initial: Array,
    fresh: Array,
    mask: Array,
) -> Array:
    """For each token what ``values`` (tokens, width) hold one step earlier in the direction's order.

    Forward, every row active now was active at the step before. In reverse, where the step before is t + 1, rows
    join as their sequences' last steps come. A row that was not active comes from ``initial`` (B, width), and one that
    ``resets`` (tokens, or none) cuts off from the step before from ``fresh`` (B, width). All are multiplied with
    ``mask`` (B, width, or no rows).
    """
    earlier = np.empty_like(values)
    for t in range(len(sizes)):
        rows, first = sizes[t], starts[t]
        before = t + 1 if direction == 1 else t - 1
        active, past = 0, 0
        if 0 <= before < len(sizes):
            active, past = min(rows, sizes[before]), starts[before]
        cut = t + 1 if direction == 1 else t
        for b in range(rows):
            begins = is_reset(sizes, starts, resets, cut, b)
            for j in range(values.shape[1]):
                if begins:
                    earlier[first + b, j] = fresh[b, j]
                else:
                    earlier[first + b, j] = values[past + b, j] if b < active else initial[b, j]
                if mask.shape[0] > 0:
                    earlier[first + b, j] *= mask[b, j]
    return earlier


def _time_loops(
    gates_forward: Callable[..., None], gates_backward: Callable[..., None]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two time loops around one cell."""

    @_kernel
    def forward(
        direction: int,
        sizes: Array,  # (T), rows of each step
        starts: Array,  # (T), the first token of each step
        resets: Array,  # (tokens), whether a segment begins with each, or empty
        fresh_h: Array,  # (B, R), the state with which it begins
        fresh_c: Array,  # (B, H), or (B, 0)
        x: Array,  # (tokens, G, H)
        w_hh: Array,  # (R, G*H), transposed for add_product
        b_hh: Array,  # (G*H)
        w_hr: Array,  # (H, R), transposed, or no rows
        mask: Array,  # (B, R), factors of h on its way into the products with w_hh, or no rows
        rates: Array,  # of zoneout of each state, or empty
        seed: Array,  # (1) of its lots, or empty
        order: Array,  # (B), where each row's lots lie
        h: Array,  # (B, R), the initial state, to be made the final one
        c: Array,  # (B, H) likewise, or (B, 0)
        output: Array,  # (tokens, D, R), to be filled, or no rows
        every_c: Array,  # (tokens, D, H), to be filled, or no rows
        kept: Array,  # (tokens, K, H), to be filled; without save one row to write over
        zoned_h: Array,  # (tokens, R), h after zoneout, to be filled, or no rows
        zoned_c: Array,  # (tokens, H) likewise, or (tokens, 0)
        save: bool,
    ) -> None:
        T, (B, R), (_, G, H), D = len(sizes), h.shape, x.shape, output.shape[1]
        projected, masked, zoned_out = w_hr.shape[0] > 0, mask.shape[0] > 0, rates.size > 0
        # The cell works on h in place. A projection stands between: the cell's result is then not yet h.
        unprojected = np.empty((B, H), h.dtype) if projected else h
        s = np.empty((B, G * H), h.dtype)
        s_of_gate = s.reshape((B, G, H))
        entering = np.empty((B, R), h.dtype) if masked else h
        h_before, c_before = np.empty_like(h), np.empty_like(c)  # for zoneout
        for step in range(T):
            t = T - 1 - step if direction == 1 else step
            rows, first = sizes[t], starts[t]
            cut = t + 1 if direction == 1 else t
            for b in range(rows):
                if is_reset(sizes, starts, resets, cut, b):
                    for r in range(R):
                        h[b, r] = fresh_h[b, r]
                    for j in range(c.shape[1]):
                        c[b, j] = fresh_c[b, j]
                for k in range(G * H):
                    s[b, k] = b_hh[k]
                if masked:
                    for r in range(R):
                        entering[b, r] = h[b, r] * mask[b, r]
                if zoned_out:
                    for r in range(R):
                        h_before[b, r] = h[b, r]
                    for j in range(c.shape[1]):
                        c_before[b, j] = c[b, j]
            add_product(entering[:rows], w_hh, s[:rows])
            for b in range(rows):
                token = first + b
                x_row, s_row, h_row, c_row = x[token], s_of_gate[b], unprojected[b], c[b]
                kept_row = kept[token if save else 0]
                gates_forward(x_row, s_row, h_row, c_row, kept_row)
            if projected:
                for b in range(rows):
                    for r in range(R):
                        h[b, r] = 0.0
                add_product(unprojected[:rows], w_hr, h[:rows])
            if zoned_out:
                for b in range(rows):
                    place = ((direction * T + t) * B + order[b]) * H
                    zone_out(rates[0], seed, place, h_before[b], h[b])
                    if rates.size > 1:
                        zone_out(rates[1], seed, place + D * T * B * H, c_before[b], c[b])
            if zoned_h.shape[0] > 0:
                for b in range(rows):
                    for r in range(R):
                        zoned_h[first + b, r] = h[b, r]
                    for j in range(c.shape[1]):
                        zoned_c[first + b, j] = c[b, j]
            # Rows that are not active keep their state: the final one forward, the initial one in reverse.
            if output.shape[0] > 0:
                for b in range(rows):
                    for r in range(R):
                        output[first + b, direction, r] = h[b, r]
            if every_c.shape[0] > 0:
                for b in range(rows):
                    for j in range(H):
                        every_c[first + b, direction, j] = c[b, j]

    @_kernel
    def backward(
        direction: int,
        sizes: Array,  # (T), rows of each step
        starts: Array,  # (T), the first token of each step
        resets: Array,  # (tokens) or empty
        dfresh_h: Array,  # (B, R), to which the gradient of the state of the resets is added
        dfresh_c: Array,  # (B, H) likewise, or (B, 0)
        kept: Array,  # (tokens, K, H) from forward
        before: Array,  # (tokens, H), the state that the cell read one step earlier
        w_hh: Array,  # (G*H, R)
        w_hr: Array,  # (R, H) or no rows
        mask: Array,  # as in forward
        rates: Array,
        seed: Array,
        order: Array,
        doutput: Array,  # (tokens, D, R) or no rows
        devery_c: Array,  # (tokens, D, H) or no rows
        dh: Array,  # (B, R), the gradient of the final state, to be made the initial one's
        dc: Array,  # (B, H) likewise, or (B, 0)
        dx: Array,  # (tokens, G, H), to be filled with the gradients of x
        ds: Array,  # (tokens, G, H), to be filled with the gradients of s; may be dx
        dh_projected: Array,  # (tokens, R), to be filled with the gradients of the projection's result, or no rows
    ) -> None:
        T, (B, R), (tokens, G, H), D = len(sizes), dh.shape, ds.shape, doutput.shape[1]
        projected, masked, zoned_out = w_hr.shape[0] > 0, mask.shape[0] > 0, rates.size > 0
        dh_unprojected = np.empty((B, H), dh.dtype) if projected else dh
        dh_past, dc_past = np.empty_like(dh), np.empty_like(dc)  # what zoneout lets pass by the cell
        product = np.empty((B, R), dh.dtype) if masked else dh
        ds_of_row = ds.reshape((tokens, G * H))
        for step in range(T):
            t = step if direction == 1 else T - 1 - step
            rows, first = sizes[t], starts[t]
            if doutput.shape[0] > 0:
                for b in range(rows):
                    for r in range(R):
                        dh[b, r] += doutput[first + b, direction, r]
            if devery_c.shape[0] > 0:
                for b in range(rows):
                    for j in range(H):
                        dc[b, j] += devery_c[first + b, direction, j]
            if zoned_out:
                for b in range(rows):
                    place = ((direction * T + t) * B + order[b]) * H
                    divide_gradient(rates[0], seed, place, dh[b], dh_past[b])
                    if rates.size > 1:
                        divide_gradient(rates[1], seed, place + D * T * B * H, dc[b], dc_past[b])
            if projected:
                for b in range(rows):
                    for j in range(H):
                        dh_unprojected[b, j] = 0.0
                add_product(dh[:rows], w_hr, dh_unprojected[:rows])
                for b in range(rows):
                    for r in range(R):
                        dh_projected[first + b, r] = dh[b, r]
                        dh[b, r] = 0.0
            for b in range(rows):
                token = first + b
                kept_row, before_row, dh_row, dc_row = kept[token], before[token], dh_unprojected[b], dc[b]
                dx_row, ds_row = dx[token], ds[token]
                gates_backward(kept_row, before_row, dh_row, dc_row, dx_row, ds_row)
            if masked:
                for b in range(rows):
                    for r in range(R):
                        product[b, r] = 0.0
            add_product(ds_of_row[first : first + rows], w_hh, product[:rows])
            for b in range(rows):
                if masked:
                    for r in range(R):
                        dh[b, r] += product[b, r] * mask[b, r]
                if zoned_out:
                    for r in range(R):
                        dh[b, r] += dh_past[b, r]
                    for j in range(dc.shape[1]):
                        dc[b, j] += dc_past[b, j]
            cut = t + 1 if direction == 1 else t
            for b in range(rows):
                if is_reset(sizes, starts, resets, cut, b):
                    for r in range(R):
                        dfresh_h[b, r] += dh[b, r]
                        dh[b, r] = 0.0
                    for j in range(dc.shape[1]):
                        dfresh_c[b, j] += dc[b, j]
                        dc[b, j] = 0.0

    return forward, backward


@dataclass(frozen=True)
class Kernels:
    """A cell as the engine needs it.

    Attributes:
        forward: the time loop.
        backward: the time loop of the gradients.
        keeps: K, the values per unit and token that forward keeps for backward.
        hidden: from what was kept (tokens, K, H) the cell's h (tokens, H), before a projection.
        sums_gates: whether the cell reads only the sum of x and s, so that their gradients are one array.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    keeps: int
    hidden: Callable[[Tensor], Tensor]
    sums_gates: bool


KERNELS = {
    "rnn_tanh": Kernels(*_time_loops(rnn_tanh_forward, rnn_tanh_backward), 1, last_kept, sums_gates=True),
    "rnn_relu": Kernels(*_time_loops(rnn_relu_forward, rnn_relu_backward), 1, last_kept, sums_gates=True),
    "lstm": Kernels(*_time_loops(lstm_forward, lstm_backward), 5, lstm_hidden, sums_gates=True),
    "gru": Kernels(*_time_loops(gru_forward, gru_backward), 5, last_kept, sums_gates=False),
}
