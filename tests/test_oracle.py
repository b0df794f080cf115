"""The oracle itself, checked by central finite differences, and the sampler of the kernel tests."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import oracle
import pytest
from pairwise import pairwise


def random_weights(rng, cell, sizes, *, bias, projection, directions):
    """Weights of layers whose inputs have the ``sizes``' features but the last, which is H."""
    *inputs, hidden = sizes
    gates = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}[cell]
    width = projection or hidden
    return [
        oracle.Weights(
            rng.normal(size=(gates * hidden, features)),
            rng.normal(size=(gates * hidden, width)),
            rng.normal(size=gates * hidden) if bias else None,
            rng.normal(size=gates * hidden) if bias else None,
            rng.normal(size=(projection, hidden)) if projection else None,
        )
        for features in inputs
        for _ in range(directions)
    ]


@pytest.mark.parametrize("lengths", [None, [2, 3, 1]], ids=["dense", "lengths"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("cell", "projection"), [*((cell, 0) for cell in oracle.CELLS), ("lstm", 2)])
def test_gradients_are_the_slopes(cell, projection, bias, lengths):
    rng = np.random.default_rng(0)
    T, B, I, H, D = 3, 3, 2, 3, 2
    width = projection or H
    x = rng.normal(size=(T, B, I))
    weights = random_weights(rng, cell, (I, D * width, H), bias=bias, projection=projection, directions=D)
    widths = [width, H][: len(oracle.CELLS[cell].states)]
    initial = [rng.normal(size=(2 * D, B, w)) for w in widths]
    d_output, d_final = rng.normal(size=(T, B, D * width)), [rng.normal(size=s.shape) for s in initial]

    def loss():
        run = oracle.Network(oracle.CELLS[cell], x, lengths, initial, weights, directions=D)
        return (run.output * d_output).sum() + sum((s * d).sum() for s, d in zip(run.final, d_final, strict=True))

    run = oracle.Network(oracle.CELLS[cell], x, lengths, initial, weights, directions=D)
    d_x, d_initial, d_weights = run.backward(d_output, d_final)
    variables = [x, *initial, *(v for w in weights for v in w if v is not None)]
    grads = [d_x, *d_initial, *(v for w in d_weights for v in w if v is not None)]
    step = 1e-6
    for variable, grad in zip(variables, grads, strict=True):
        slopes = np.empty_like(variable)
        for k in np.ndindex(variable.shape):
            value = variable[k]
            variable[k] = value + step
            above = loss()
            variable[k] = value - step
            below = loss()
            variable[k] = value
            slopes[k] = (above - below) / (2 * step)
        # The error of a central difference: the rounding of the loss over the step, here some 1e-9.
        np.testing.assert_allclose(grad, slopes, rtol=1e-6, atol=1e-7)


def test_no_initial_states_are_zeros():
    rng = np.random.default_rng(0)
    weights = random_weights(rng, "lstm", (3, 4), bias=True, projection=2, directions=1)
    x = rng.normal(size=(5, 2, 3))
    zeros = [np.zeros((1, 2, 2)), np.zeros((1, 2, 4))]
    implied, given = (oracle.Network(oracle.CELLS["lstm"], x, None, initial, weights) for initial in (None, zeros))
    np.testing.assert_array_equal(implied.output, given.output)


def test_pack_and_unpack():
    padded = np.arange(12.0).reshape(3, 2, 2)
    padded[2, 1] = 0
    data, sizes = oracle.pack(padded, np.array([3, 2]))
    assert sizes.tolist() == [2, 2, 1]
    assert data.shape == (5, 2)
    np.testing.assert_array_equal(oracle.unpack(data, sizes), padded)


def test_pairwise_holds_every_allowed_pair_and_no_forbidden_one():
    options = {"a": range(5), "b": "xyz", "c": (True, False), "d": (None, 1)}
    forbidden = {"a": 3, "b": "y"}
    cases = list(pairwise(options, [forbidden]))
    seen = {frozenset(pair) for case in cases for pair in combinations(case.items(), 2)}
    wanted = {frozenset({(m, u), (n, v)}) for m, n in combinations(options, 2) for u in options[m] for v in options[n]}
    assert seen == wanted - {frozenset(forbidden.items())}
    assert len(cases) < 25
    assert cases == list(pairwise(options, [forbidden]))
