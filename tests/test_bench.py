"""The benchmark of the CPU: its processes, the machine's limits, records and tables. No test looks at a time."""

from __future__ import annotations

import io
import os
import signal
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

import fusedrnn.__main__
from fusedrnn.bench import cost, driver, grid, limits, memory, sequences, tables
from fusedrnn.bench.contestants import CONTESTANTS, FUSEDRNN, TORCH, make_task
from fusedrnn.bench.driver import Driver, Entry, WorkerError
from fusedrnn.bench.peers import CELL_LOOP, JAX, ONNXRUNTIME, PEERS, installed, rivals
from fusedrnn.bench.results import Finding, Group, Measurement, Results
from fusedrnn.engines import cpu

SMALL = grid.Shape(5, 3, 4, 6, grid.ODD)
STACKED = grid.Shape(5, 3, 4, 6, grid.ODD, layers=2, bidirectional=True)
PACKED = grid.Shape(5, 3, 4, 6, grid.ODD, shortest=2)
FLOAT32 = torch.float32


@pytest.fixture(scope="module")
def peers():
    """Everyone who can run here, on one thread each."""
    with Driver(installed()) as peers:
        yield peers


def race(peers, entries, tolerance=1e-4, **options):
    return peers.race(entries, threads=1, tolerance=tolerance, budget=0.0, **options)


class TestDriver:
    @pytest.mark.parametrize(
        ("cell", "mode", "shape"),
        [(*names, SMALL) for names in product(grid.CELLS, grid.MODES)]
        + [("lstm", "training", STACKED), ("gru", "inference", STACKED)],
    )
    def test_everyone_computes_the_same(self, peers, cell, mode, shape):
        outcome = race(peers, peers.entries(make_task(cell, shape, mode, FLOAT32)))
        assert set(outcome.errors) == set(outcome.refused), outcome.errors
        offered = [name for name in peers.contestants if name not in outcome.refused]
        assert set(CONTESTANTS) <= set(offered)
        assert list(outcome.timing.seconds) == offered
        assert outcome.timing.rounds >= 3
        assert max(outcome.differences.values()) < 1e-5

    def test_refusals(self, peers):
        outcome = race(peers, peers.entries(make_task("gru", PACKED, "inference", FLOAT32)))
        assert outcome.errors[CELL_LOOP] == f"{CELL_LOOP}: no packed input"
        assert set(outcome.refused) == set(peers.contestants) - set(CONTESTANTS)
        assert set(outcome.timing.seconds) == set(CONTESTANTS)

    def test_wrong_results_are_not_timed(self, peers):
        right = make_task("gru", SMALL, "training", FLOAT32)
        wrong = make_task("gru", SMALL, "training", FLOAT32)
        with torch.no_grad():
            wrong.module.weight_hh_l0.mul_(2)
        outcome = race(peers, {"wrong": Entry(FUSEDRNN, wrong), TORCH: Entry(TORCH, right)})
        assert list(outcome.timing.seconds) == [TORCH]
        assert outcome.differences["wrong"] > 1e-2
        assert outcome.faults() == {"wrong": f"off by {outcome.differences['wrong']:.0e}"}

    def test_a_crash_is_noted_and_the_next_race_has_a_new_process(self, peers):
        entries = peers.entries(make_task("lstm", SMALL, "inference", FLOAT32))
        os.kill(peers.handle(CELL_LOOP, 1).pid, signal.SIGKILL)
        outcome = race(peers, entries)
        assert outcome.errors == {CELL_LOOP: "crashed: SIGKILL"} | {n: outcome.errors[n] for n in outcome.refused}
        assert set(CONTESTANTS) <= set(outcome.timing.seconds)
        assert CELL_LOOP in race(peers, entries).timing.seconds

    def test_last_words(self):
        with Driver.fresh(TORCH, 1) as handle:
            with pytest.raises(WorkerError, match="AttributeError: 'Worker' object has no attribute 'nonsense'"):
                handle.ask("nonsense")
            handle.ask("drop")  # an error is not the end

    def test_a_hang_ends_the_process(self, monkeypatch):
        task = make_task("lstm", grid.SHAPES["100x32x512x512"], "training", FLOAT32)
        with Driver.fresh(TORCH, 1) as handle:
            handle.ask("load", "task", task)
            monkeypatch.setattr(driver, "_PATIENCE", 0.01)
            with pytest.raises(WorkerError, match="no answer in 0 s"):
                handle.ask("results", "task")
            assert not handle.alive

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_idle_processes_are_stopped_and_keep_to_their_cores(self, peers):
        handle = peers.handle(TORCH, 1)
        handle.ask("drop")
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{handle.pid}/status").read_text().splitlines())
        assert status["State"].startswith("T")
        assert os.sched_getaffinity(handle.pid) == set(driver.cores_for(1))


class TestLimits:
    RATES = limits.Rates(2, {"float32": 100e9, "bfloat16": 200e9}, {1 << 14: 200e9, 1 << 19: 90e9, 1 << 21: 100e9})

    def test_batches_are_arithmetic(self):
        shape = grid.SHAPES["100x32x512x512"]
        flops = 2 * 100 * 32 * 1024 * 4 * 512
        for mode, times in (("inference", 1), ("training", 3)):
            assert limits.cpu_floor("lstm", shape, mode, "float32", self.RATES) == pytest.approx(times * flops / 100e9)
            assert limits.cpu_floor("lstm", shape, mode, "bfloat16", self.RATES) == pytest.approx(times * flops / 200e9)

    @pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3), ("rnn_tanh", 1)])
    def test_a_single_sequence_reads_the_weights_at_every_step(self, cell, gates):
        shape = grid.SHAPES["100x1x256x256"]
        product, weights = 2 * 100 * 256 * gates * 256, gates * 256 * 256 * 4
        assert limits.cpu_floor(cell, shape, "inference", "float32", self.RATES) == pytest.approx(
            product / 100e9 + 100 * weights / 100e9
        )
        assert limits.cpu_floor(cell, shape, "training", "float32", self.RATES) == pytest.approx(
            4 * product / 100e9 + 2 * 100 * weights / 100e9
        )

    def test_bandwidth_is_that_of_the_level_where_the_share_fits(self):
        assert self.RATES.bandwidth(1 << 14) == 200e9
        assert self.RATES.bandwidth((1 << 14) + 1) == 100e9  # a larger size was read faster
        assert self.RATES.bandwidth(1 << 30) == 100e9

    def test_best_of(self):
        other = limits.Rates(2, {"float32": 110e9, "bfloat16": 1.0}, dict.fromkeys(self.RATES.read, 95e9))
        best = self.RATES.best_of(other)
        assert best.flops == {"float32": 110e9, "bfloat16": 200e9}
        assert list(best.read.values()) == [200e9, 95e9, 100e9]

    def test_measures(self):
        if cpu._cpu is None:
            assert limits.measure_rates([0], 0.0) is None
            return
        before = os.sched_getaffinity(0)
        rates = limits.measure_rates(driver.cores_for(2), 1e-3)
        assert os.sched_getaffinity(0) == before
        assert {"float32", "float64"} <= set(rates.flops)
        assert min(*rates.flops.values(), *rates.read.values()) > 1e8
        assert rates.peak("float16") == rates.flops["float32"]

    def test_bad_probes(self):
        module = pytest.importorskip("fusedrnn._cpu")
        with pytest.raises(ValueError, match="there is no probe for int8"):
            module.probe_multiply_adds("int8", 0.0)
        for size in (0, -4096, 100):
            with pytest.raises(ValueError, match="bytes is not a positive multiple of 4096"):
                module.probe_read(size, 0.0)


def measurement(shape="20x16x128x128", mode="training", threads=1, **changes):
    fields = {
        "cell": "gru", "shape": shape, "mode": mode, "threads": threads, "dtype": "float32", "engine": "cpu",
        "flops": 10**9, "ms": {FUSEDRNN: 2.0, TORCH: 4.0, JAX: 1.9}, "spread": {FUSEDRNN: 0.01, TORCH: 0.3, JAX: 0.1},
        "rounds": 5, "ratio": 2.0, "disagreement": {FUSEDRNN: 0.0, JAX: 0.0}, "elsewhere": 0.0, "floor": 1.0,
        "errors": {ONNXRUNTIME: "onnxruntime: no training"}, "refused": [ONNXRUNTIME],
        "ratios": {TORCH: [1.9, 2.0, 2.1], JAX: [0.9, 0.95, 0.96]},
    }  # fmt: skip
    return Measurement(**fields | changes)


def shown(renderable):
    text = io.StringIO()
    Console(file=text, width=140).print(renderable)
    return text.getvalue()


class TestTables:
    def test_a_lost_cell_says_so(self):
        m = measurement()
        assert (m.best_peer, m.peer_ratio, m.holds) == (JAX, 0.95, False)
        assert (m.percent(FUSEDRNN), m.percent(JAX), m.percent(ONNXRUNTIME)) == (50.0, pytest.approx(100 / 1.9), None)
        text = shown(tables.group_table(m.group, [m]))
        assert "0.95 jax <" in text
        assert "50 / 53" in text
        results = Results({"limits": {}}, {}, [m])
        assert "in 0 of 1 cells" in tables.verdict(results)
        assert "gru training, 1 thread, 20x16x128x128: jax is ahead, ratio 0.95" in tables.verdict(results)
        assert "50 / 53 / 25" in shown(tables.limit_means_table(results))

    def test_even_within_the_noise_holds(self):
        m = measurement(ratios={TORCH: [1.9, 2.0, 2.1], JAX: [0.98, 0.99, 1.2]})
        assert m.holds
        assert "<" not in shown(tables.group_table(m.group, [m]))

    def test_one_step_of_training_is_measured_against_the_eager_ones(self):
        assert measurement(shape="1x1x64x64").best_peer == TORCH
        assert measurement(shape="1x1x64x64", mode="inference").best_peer == JAX
        assert rivals(list(PEERS), 1, "training") == [name for name in PEERS if name not in (FUSEDRNN, JAX)]

    def test_faults_are_shown(self):
        m = measurement(
            ms={TORCH: 1.0}, spread={TORCH: 0.0}, ratio=None, ratios={}, disagreement={FUSEDRNN: 0.5},
            errors={JAX: "crashed: SIGSEGV, oh", ONNXRUNTIME: "onnxruntime: no training"},
        )  # fmt: skip
        text = shown(tables.group_table(m.group, [m]))
        assert "off by 5e-01" in text
        assert "SIGSEGV" in text
        assert m.holds is None

    def test_findings(self):
        row = Finding("overhead", "LSTM inference", {FUSEDRNN: 2.0, TORCH: 5.0}, "cpu", errors={JAX: "boom [x]"})
        text = shown(tables.findings_table("overhead", [row]))
        assert "2.50" in text
        assert "boom [x]" in text
        assert set(tables.SECTION_TITLES) == set(grid.SECTIONS) - {"grid"}


def bench(tmp_path, *options):
    out = tmp_path / "cpu.json"
    arguments = ["bench", "--cells", "rnn_tanh", "--modes", "inference", "--threads", "1", "--budget", "0"]
    assert fusedrnn.__main__.main([*arguments, "--peers", CELL_LOOP, "--out", str(out), *options]) == 0
    return Results.load(out)


def test_the_grid_as_a_command(tmp_path, capsys):
    results = bench(tmp_path, "--only", "grid", "--shapes", "1x1x64x64,20x16x128x128")
    assert [m.shape for m in results.grid] == ["1x1x64x64", "20x16x128x128"]
    for m in results.grid:
        assert set(m.ms) == {FUSEDRNN, TORCH, CELL_LOOP}
        assert m.errors == {}
        assert m.group == Group("rnn_tanh", "inference", 1)
        assert (m.floor is None) == (cpu._cpu is None)
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.json", "cpu.png", "cpu-peers.png", "cpu-limit.png"}
    assert "At least even with the best peer in" in capsys.readouterr().out
    assert fusedrnn.__main__.main(["bench", "--render", f"{tmp_path}/cpu.json", "--plot", f"{tmp_path}/speed.png"]) == 0
    assert "Percent of the machine's limit" in capsys.readouterr().out or cpu._cpu is None
    assert (tmp_path / "limit.png").exists()


def test_the_other_sections_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "_FRESH_PROCESSES", 1)
    monkeypatch.setattr(memory, "PEAK_SHAPES", ("20x16x128x128",))
    for name in ("_RESETS", "_PADDED"):
        monkeypatch.setattr(sequences, name, grid.Shape(20, 8, 16, 16, grid.ODD))
    only = [section for section in grid.SECTIONS if section not in ("grid", "overhead")]
    results = bench(tmp_path, "--only", ",".join(only), "--shapes", "20x16x128x128")
    found = {finding.section for finding in results.findings}
    assert found == set(only) - {"contention"}  # which takes two threads
    for finding in results.findings:
        assert {FUSEDRNN, TORCH} <= set(finding.values), finding
        assert set(finding.errors) == set(finding.refused)
    saved, peak = results.findings_of("memory")
    assert all(peak.values[name] > saved.values[name] / 2 > 0 for name in CONTESTANTS)
    assert fusedrnn.__main__.main(["bench", "--render", f"{tmp_path}/cpu.json"]) == 0
    assert "Time per real token of a packed batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["bench", "--budget", "-1"],
        ["bench", "--budget", "nan"],
        ["bench", "--threads", "0"],
        ["bench", "--threads", "two"],
        ["bench", "--out", "{tmp}"],
        ["bench", "--plot", "{tmp}/a_file/speed.png"],
        ["bench", "--render", "{tmp}/nowhere.json"],
        ["bench", "--render", "{tmp}/a_file"],
        ["bench-gpu", "--minutes", "soon"],
        ["demo", "--steps", "0"],
        ["demo", "--seed", f"{1 << 64}"],
        ["demo", "--out", "{tmp}"],
        ["demo", "--out", "{tmp}/demo.doc"],
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense(tmp_path, capsys, options):
    """They end before any work, in a line that repeats what was wrong."""
    (tmp_path / "a_file").write_text("[]")
    arguments = [option.format(tmp=tmp_path) for option in options]
    try:
        status = fusedrnn.__main__.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert arguments[-1] in capsys.readouterr().err
