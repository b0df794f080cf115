"""What a call leaves for the next: weights packed without gradients, whose changes are noticed, and memory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import run_script, threads

import fusedrnn

T, I, H = 12, 19, 37

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def make(kind: str = "LSTM", **options: object) -> tuple[torch.nn.RNNBase, torch.nn.RNNBase]:
    """Ours, and torch's with the same weights' memory."""
    ours = getattr(fusedrnn, kind)(I, H, **options)
    theirs = getattr(torch.nn, kind)(I, H, **options)
    for name, weight in ours.named_parameters():
        setattr(theirs, name, weight)
    return ours, theirs


@torch.no_grad()
def check(pair: tuple[torch.nn.RNNBase, torch.nn.RNNBase], B: int = 2) -> None:
    ours, theirs = pair
    x = torch.randn(T, B, I)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_each_weight_alone(kind):
    """A single weight of each row and column of each matrix."""
    pair = make(kind)
    check(pair)
    for weight in pair[0].parameters():
        matrix = weight.detach().view(len(weight), -1)
        for k in range(max(matrix.shape)):
            matrix[k % matrix.shape[0], k % matrix.shape[1]] += 5
            check(pair)
            matrix[k % matrix.shape[0], k % matrix.shape[1]] -= 5


def by_numpy(weight):
    weight.detach().numpy()[...] *= -1


def by_data(weight):
    weight.data.mul_(-1)


def by_swapped_values(weight):
    weight.data[[0, 1]] = weight.data[[1, 0]]


def by_one_bit(weight):
    """The sign of a weight: the least that an integer sum would overlook."""
    weight.detach().numpy().view(np.uint32)[3, 5] ^= np.uint32(1 << 31)


def by_two_bits(distance):
    """The sign of a weight, and a bit `distance` bytes behind it that could make up for it: see fingerprint, gemm.h."""

    def change(weight):
        halves = weight.detach().numpy().reshape(-1).view(np.uint32)
        halves[5] ^= np.uint32(1 << 31)
        halves[4 + distance // 4] ^= np.uint32(1 << 28)

    change.__name__ = f"by_two_bits_{distance}"
    return change


def by_other_memory(weight):
    weight.data = -weight.data


@pytest.mark.parametrize(
    "change",
    [
        *(by_numpy, by_data, by_swapped_values, by_one_bit, by_other_memory),
        *map(by_two_bits, (64, 128, 256, 512)),  # a vector, or one of each chain
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"proj_size": 7}, {"num_layers": 2, "bidirectional": True}], ids=str
)
def test_changes_that_no_version_counts(change, options):
    pair = make(**options)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        check(pair)
        change(getattr(pair[0], name))
        if change is by_other_memory:
            setattr(pair[1], name, getattr(pair[0], name))
        check(pair)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@torch.no_grad()
def test_both_of_two_copies_change(kind):
    """So many recurrent weights, and steps, that on some processors even and odd steps have a copy each."""
    ours, theirs = getattr(fusedrnn, kind)(I, 128), getattr(torch.nn, kind)(I, 128)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(70, 2, I)
    for _ in range(3):
        for module in (ours, theirs):
            module.weight_hh_l0.data[::3, ::5] *= -1
        with threads(1):
            torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-4, atol=1e-5)


def test_by_the_optimizer():
    pair = make()
    optimizer = torch.optim.SGD(pair[0].parameters(), 0.5)
    for _ in range(5):
        check(pair)
        pair[0](torch.randn(T, 2, I))[0].square().sum().backward()
        optimizer.step()


def test_other_batches_and_threads():
    """They pack in panels of other widths."""
    pair = make("GRU")
    for count in (1, 2, 3, 1):
        with threads(count):
            for B in (1, 2, 3, 5, 8, 20, 70, 1, 2):
                check(pair, B)


def test_other_dtypes_in_the_same_memory():
    pair = make()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        for module in pair:
            module.to(dtype)
        x = torch.randn(T, 2, I, dtype=dtype)
        with torch.no_grad():
            precision = 0.02 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(pair[0](x)[0], pair[1](x)[0], rtol=10 * precision, atol=precision)


@pytest.mark.parametrize("hidden", [16, 37, 64])
def test_with_and_without_a_projection_as_wide(hidden):
    """Two layers that share their matrices but for one."""
    w_ih, w_hh, w_hr = torch.randn(4 * hidden, 8), torch.randn(4 * hidden, hidden), torch.randn(hidden, hidden)
    x = torch.randn(10, 1, 8)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        plain = fusedrnn.functional.lstm(x, None, [w_ih, w_hh], bias=False)[0]
        projected = fusedrnn.functional.lstm(x, None, [w_ih, w_hh, w_hr], bias=False, projected=True)[0]
        return plain, projected

    with torch.no_grad():
        first = run()
        for _ in range(5):
            torch.testing.assert_close(run(), first, rtol=0, atol=0)


def test_bitwise_the_same_with_and_without():
    """The first call packs, the second finds, one with gradients keeps nothing."""
    ours, _ = make("GRU", bidirectional=True)
    x = torch.randn(T, 2, I)
    with torch.no_grad():
        first, second = ours(x)[0], ours(x)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(ours(x)[0].detach(), first, rtol=1e-6, atol=1e-6)


def test_several_at_once():
    """One call has the kept panels, the others pack for themselves."""
    pairs = [make("GRU"), make("LSTM")]

    def work(k: int) -> None:
        for _ in range(50):
            check(pairs[k % 2], 1 + k)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_more_than_are_kept():
    """So many layers that those used last take the place of the first."""
    pairs = [make(hidden) for hidden in ("GRU", "LSTM", "RNN") for _ in range(30)]
    for _ in range(2):
        for pair in pairs:
            check(pair)


def test_results_do_not_share_memory():
    """Memory of results serves later calls, but not while anyone holds a view of it."""
    module, x = fusedrnn.GRU(16, 128), torch.randn(300, 4, 16)
    with torch.no_grad():
        held = [(module(x * k)[0], (x * k)) for k in range(4)]
        held += [(module(x * k)[0][10:], x * k) for k in range(4)]
        assert len({output.data_ptr() for output, _ in held}) == 8
        for output, given in held:
            assert torch.equal(output, module(given)[0][-len(output) :])
        del held
        first = module(x)[0].clone()
        assert torch.equal(module(x)[0], first)


@pytest.mark.parametrize("megabytes", ["0", "1"])
def test_the_limit(megabytes):
    script = run_script(
        """
        import torch, fusedrnn
        ours, theirs = fusedrnn.GRU(300, 300), torch.nn.GRU(300, 300)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(20, 1, 300)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-4, atol=1e-5)
        """,
        FUSEDRNN_KEPT_MB=megabytes,
    )
    assert script.returncode == 0, script.stderr


def test_weights_that_a_thread_changes_and_restores_during_calls():
    module = fusedrnn.LSTM(512, 512).requires_grad_(False)
    original = [p.clone() for p in module.parameters()]
    x = torch.randn(6, 1, 512)
    want = module(x)[0]
    for _ in range(15):
        stop = threading.Event()

        def serve(stop=stop):
            while not stop.is_set():
                module(x)

        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(20):
            for parameter in module.parameters():
                parameter.mul_(-1.5)
            for parameter, value in zip(module.parameters(), original, strict=True):
                parameter.copy_(value)
        stop.set()
        thread.join()
        # What calls return meanwhile is anybody's guess, but they may keep nothing of it.
        torch.testing.assert_close(module(x)[0], want)
