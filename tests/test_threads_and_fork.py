"""Several threads, processes and tasks at once, and the same results each time."""

from __future__ import annotations

import asyncio
import os
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import CELLS, TARGETS, Case, assert_equal, backward, call_of, run_script, threads
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn import _cpu

#: Enough work for the engines to share it among threads.
SHAPE = {"T": 20, "B": 24, "I": 64, "H": 64}


def used_engine():
    (decision,) = fusedrnn.explain(fusedrnn.GRU(2, 3), torch.randn(4, 1, 2)).decisions
    return decision.engine


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_same_bits_each_time(target, cell, count):
    module = Case(target=target, cell=cell, directions=2, **SHAPE).module()
    call = call_of(module, SHAPE["T"], SHAPE["B"], requires_grad=True)
    with target.running(), threads(count):
        first, *others = (backward(module, *call) for _ in range(3))
    for other in others:
        assert_equal(other, first)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_any_number_of_threads(target, cell):
    module = Case(target=target, cell=cell, dtype=torch.float64, directions=2, **SHAPE).module()
    call = call_of(module, SHAPE["T"], SHAPE["B"], requires_grad=True)
    results = []
    for count in (1, 2, 3, 7):
        with target.running(), threads(count):
            results.append(backward(module, *call))
    for result in results[1:]:
        assert_close(result, results[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "sizes", [(40, 1, 64, 128, 2), (20, 3, 96, 100, 2), (20, 8, 64, 64, 1), (20, 8, 64, 64, 2), (5, 20, 32, 320, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", [target for target in TARGETS if target.engine == "cpu"], ids=str)
def test_the_same_bits_whatever_meetings_cost(target, cell, dtype, sizes, packed):
    """The division of the work goes by it, and whether results go past the caches."""
    T, B, I, H, directions = sizes
    projected = cell == "lstm" and H == 100
    module = Case(target=target, cell=cell, dtype=dtype, directions=directions, projected=projected, I=I, H=H).module()
    input, states = call_of(module, T, B, requires_grad=True)
    if packed:
        input = pack_padded_sequence(input, 1 + torch.arange(B) * T // B, enforce_sorted=False)
    results = []
    try:
        for nanoseconds in (1, 210, 1e6):
            _cpu.assume_meeting_cost(nanoseconds)
            with target.running(), threads(2):
                results.append(backward(module, input, states))
    finally:
        _cpu.assume_meeting_cost(0)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("sizes", [(1, 300, 64), (1, 64, 128), (2, 300, 64), (3, 300, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", [target for target in TARGETS if target.engine == "cpu"], ids=str)
def test_few_rows_round_alike_at_any_number_of_threads(target, cell, dtype, sizes):
    """A thread may be left out at any time, and how wide panels are goes by how many there are."""
    B, I, H = sizes
    module = Case(target=target, cell=cell, dtype=dtype, I=I, H=H).module()
    input, states = call_of(module, 60, B)
    results = []
    try:
        _cpu.assume_meeting_cost(1)
        for count in (1, 2, 3):
            with target.running(), threads(count), torch.no_grad():
                results.append(module(input, states)[0])
    finally:
        _cpu.assume_meeting_cost(0)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_four_threads_at_once(target, cell):
    """One module shared by all, each with its own input; the rows differ so that buffers of one do not fit another."""
    module = Case(target=target, cell=cell, dtype=torch.float64, directions=2, **SHAPE).module()
    calls = [call_of(module, SHAPE["T"], 4 + 3 * k, requires_grad=True) for k in range(8)]

    def work(call):
        with fusedrnn.engine(target.engine):
            return backward(module, *call)

    with target.running(), threads(2):
        expected = [work(call) for call in calls]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                assert_close(list(pool.map(work, calls)), expected)


class TestChoiceIsLocal:
    def test_to_the_thread(self):
        automatic = used_engine()
        with ThreadPoolExecutor(1) as pool, fusedrnn.engine("reference"):
            assert pool.submit(used_engine).result() == automatic
            assert used_engine() == "reference"

    def test_to_the_task(self):
        async def use(name):
            with fusedrnn.engine(name):
                await asyncio.sleep(0)
                return used_engine()

        async def both():
            return await asyncio.gather(use("reference"), use("torch"))

        assert asyncio.run(both()) == ["reference", "torch"]

    def test_after_a_call_that_failed(self):
        automatic = used_engine()
        module = fusedrnn.GRU(2, 3)
        with pytest.raises(RuntimeError, match="input"), fusedrnn.engine("reference"):
            module(torch.randn(4, 1, 5))
        assert used_engine() == automatic

    def test_after_a_backward_that_failed(self):
        automatic = used_engine()
        module = fusedrnn.GRU(2, 3)
        with fusedrnn.engine("reference"):
            output, _ = module(torch.randn(4, 1, 2))
        with torch.no_grad():
            module.weight_hh_l0.add_(1)
        with pytest.raises(RuntimeError, match="inplace operation"):
            output.sum().backward()
        assert used_engine() == automatic


#: What the scripts below run: modules of each kind, on two threads, with small sizes.
WORK = """
    import os, signal, traceback
    import fusedrnn, torch

    torch.manual_seed(0)
    torch.set_num_threads(2)
    modules = [fusedrnn.RNN(32, 32), fusedrnn.LSTM(32, 32), fusedrnn.GRU(32, 32)]
    x = torch.randn(20, 16, 32)

    def work(engine="cpu"):
        results = []
        for module in modules:
            module.zero_grad()
            with fusedrnn.engine(engine):
                output, _ = module(x)
            output.mean().backward()
            results += [output.detach(), *(p.grad.clone() for p in module.parameters())]
        return results

    def check(got, expected):
        torch.testing.assert_close(got, expected)

    def in_child(function):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a child that hangs dies of it, and its status tells
            try:
                function()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"the child's status is {status}"
"""


def assert_passes(script, **environment):
    result = run_script(textwrap.dedent(WORK) + textwrap.dedent(script), **environment)
    assert result.returncode == 0, result.stderr


def test_fewer_threads_than_asked_for():
    """Where OpenMP gives less than torch.set_num_threads promises."""
    assert_passes("check(work(), work('reference'))", OMP_THREAD_LIMIT="1")


def test_the_same_bits_with_fewer_threads():
    """As where a thread is left out because its core is busy: the work is divided as for all of them."""
    script = """
        import hashlib

        print(hashlib.sha256(b"".join(result.numpy().tobytes() for result in work())).hexdigest())
    """
    script = textwrap.dedent(WORK) + textwrap.dedent(script)
    one, two = (run_script(script, OMP_THREAD_LIMIT=limit) for limit in ("1", "2"))
    assert one.stdout, one.stderr
    assert one.stdout == two.stdout


class TestFork:
    """In a child nothing may touch the OpenMP threads that its parent had: torch's own products, and so the other
    engines, would wait for them for ever. (DataLoader's workers set torch to one thread, which avoids it.)"""

    def test_child_before_the_parent_computed(self):
        assert_passes("""
            in_child(lambda: check(work(), work("reference")))
            work()
        """)

    def test_child_after_the_parent_computed(self):
        """Twice, and the parent computes on as before."""
        assert_passes("""
            expected = work()
            in_child(lambda: check(work(), expected))
            check(work(), expected)
            in_child(lambda: check(work(), expected))
        """)

    def test_child_of_a_child(self):
        assert_passes("""
            expected = work()

            def child():
                in_child(lambda: check(work(), expected))
                check(work(), expected)

            in_child(child)
        """)

    def test_child_after_threads_of_the_parent_computed(self):
        assert_passes("""
            from concurrent.futures import ThreadPoolExecutor

            expected = work()
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda module: module(x), modules))
            in_child(lambda: check(work(), expected))
        """)

    @pytest.mark.parametrize("name", ["cpu", "numba"])
    def test_workers_of_a_data_loader(self, name):
        script = """
            class Features(torch.utils.data.Dataset):
                def __len__(self):
                    return 6

                def __getitem__(self, k):
                    output, _ = modules[k % 3](x[:, k : k + 4])
                    output.sum().backward()
                    return output.detach()

            dataset = Features()
            expected = [dataset[k] for k in range(6)]
            loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, timeout=60)
            for _ in range(2):
                check(list(loader), expected)
        """
        assert_passes(script, FUSEDRNN_ENGINE=name)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no list of threads")
def test_threads_may_run_wherever_they_might_before():
    """One that wakes on its caller's core is moved off it, by a change of its affinity that must not last."""

    def affinities():
        return {thread: os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}

    module, x = fusedrnn.LSTM(64, 64), torch.randn(20, 24, 64)
    with threads(2):
        module(x)
        before = affinities()
        for _ in range(20):
            time.sleep(0.02)
            module(x)
        after = affinities()
    assert {thread: after[thread] for thread in before} == before


@pytest.mark.skipif(TARGETS[0].engine != "cpu", reason="about the C++ engine's memory")
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not say how much memory is used")
def test_ragged_batches_want_little_more_memory_of_many_threads():
    script = """
        import torch, fusedrnn

        def peak():
            (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
            return int(line.split()[1]) / 1024

        module, x = fusedrnn.LSTM(8, 8).requires_grad_(False), torch.randn(6, 20000, 8)
        lengths = torch.randint(0, 7, (20000,))
        torch.set_num_threads(64)
        module(x[:, :64])
        before = peak()
        module(x, lengths=lengths)
        print(peak() - before)
    """
    result = run_script(textwrap.dedent(script))
    # 40 MB, of which the results are 4; 160 if each thread has room for all rows.
    assert float(result.stdout) < 80, result.stdout + result.stderr


@pytest.mark.skipif(TARGETS[0].engine != "cpu", reason="only the C++ engine measures it")
def test_explain_tells_what_meetings_of_threads_cost():
    module, input = fusedrnn.GRU(64, 256), torch.randn(20, 1, 64)
    patience = time.monotonic() + 20  # it takes calls that follow each other for 15 ms, on two cores
    with threads(2), torch.no_grad():
        while time.monotonic() < patience:
            module(input)
            (decision,) = fusedrnn.explain(module, input).decisions
            if "ns to meet" in str(decision):
                return
    if _cpu.threads_left_out():
        pytest.skip("another process keeps a core busy")
    pytest.fail("no call measured it")
