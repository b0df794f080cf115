"""The benchmark of a GPU, with the CPU in its place: what to measure, shards, taking up again, records and tables."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

import fusedrnn.__main__
from fusedrnn.bench import gpu, grid, tables
from fusedrnn.bench.contestants import CONTESTANTS, FUSEDRNN, TORCH
from fusedrnn.bench.results import Results
from fusedrnn.torch_state import tf32_in_rnns

CELLS = (
    grid.GpuCell("lstm", "training", "bf16", "256x1x64x64"),
    grid.GpuCell("gru", "inference", "tf32", "256x8x64x64"),
    grid.GpuCell("rnn_tanh", "inference", "fp32", "256x1x128x128"),
)
FACTS = {"gpu": "Stand-in 1", "driver": "13.0", "cudnn": 9}


class StandIn:
    """A clock that says one second and three by turns, without calling anything, and a count of captured calls."""

    def __init__(self):
        self.captured, self.calls = 0, 0

    def clock(self, call, count):
        self.calls += 1
        return 1.0 if self.calls % 2 else 3.0

    def capture(self, run):
        self.captured += 1
        return run

    def device(self, **facts):
        return gpu.Device(torch.device("cpu"), self.clock, self.capture, FACTS | facts, peak_width=8)


@pytest.fixture
def run(tmp_path):
    """Measure cells into a file; returns what it printed."""

    def run(cells=CELLS, good=True, device=None, **options):
        text = io.StringIO()
        wanted = gpu.GpuOptions(cells, budget=0.0, **options)
        console = Console(file=text, width=200)
        assert gpu.run(console, wanted, device or StandIn().device(), tmp_path / "gpu.json") is good
        return text.getvalue()

    return run


@pytest.fixture
def stored(tmp_path):
    return lambda: Results.load(tmp_path / "gpu.json")


class TestGrid:
    def test_is_what_was_promised(self):
        sizes = {(s.T, s.B, s.I, s.H) for s in grid.GPU_SHAPES.values()}
        widths, batches = (64, 128, 256, 512, 768, 1024, 1536, 2048), (1, 8, 16, 32, 64, 128, 256)
        assert sizes == {(256, B, H, H) for H in widths for B in batches}
        assert len(gpu.GRID) == len(set(gpu.GRID)) == len(sizes) * 3 * 2 * 4
        assert not grid.GPU_SHAPES.keys() & grid.SHAPES.keys()

    def test_telling_cells(self):
        assert len(set(grid.TELLING)) == 12
        assert set(grid.TELLING) <= set(gpu.GRID)
        for names in ("cell", "mode", "precision"):
            assert {getattr(c, names) for c in grid.TELLING} == {getattr(c, names) for c in gpu.GRID}

    @pytest.mark.parametrize("count", [1, 3, 7, 5000])
    def test_shards_are_a_partition(self, count):
        shards = [gpu.shard_of(gpu.GRID, index, count) for index in range(1, count + 1)]
        assert sorted(gpu.GRID.index(cell) for shard in shards for cell in shard) == list(range(len(gpu.GRID)))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1

    @pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", ""])
    def test_bad_shards(self, text, capsys):
        with pytest.raises(SystemExit):
            fusedrnn.__main__.main(["bench-gpu", "--shard", text])
        assert "expected I/N with 1 <= I <= N" in capsys.readouterr().err


def test_measures_launched_and_replayed(run, stored):
    stand_in = StandIn()
    with tf32_in_rnns(True):  # whatever it is, it must be put back
        run(device=stand_in.device())
        assert torch.backends.cudnn.rnn.fp32_precision == "tf32"
    results = stored()
    assert {(m.cell, m.mode, m.dtype, m.shape) for m in results.grid} == {dataclasses.astuple(c) for c in CELLS}
    assert [m.replay for m in results.grid] == [False, True] * len(CELLS)
    assert stand_in.captured == len(CELLS) * len(CONTESTANTS)
    for m in results.grid:
        assert set(m.ms) == {FUSEDRNN, TORCH}
        assert m.engine == "cpu"
        assert "C++ kernels" in m.kernel
        assert m.errors == {}
        assert m.threads is None
        assert m.floor > 256 * 0.45e-3
        assert m.per_step(m.ms[TORCH]) == 1e3 * m.ms[TORCH] / 256
    assert results.machine["gpu"] == "Stand-in 1"
    assert set(results.machine["peak"]) == set(grid.PRECISIONS)


def test_goes_on_where_it_stopped(run, stored):
    assert "1 cells left" not in run(CELLS[:1])
    first = stored().grid
    text = run()
    assert "3 cells asked for, 2 of them not measured yet" in text
    assert "left for want of time" not in text
    assert len(stored().grid) == 2 * len(CELLS)
    assert [m for m in stored().grid if m.shape == CELLS[0].shape and m.cell == "lstm"] == first
    assert "3 cells asked for, 0 of them" in run()
    assert "1 cells asked for, 1 of them" in run(CELLS[:1], fresh=True)
    assert len(stored().grid) == 2


def test_shards_end_in_the_same_order(run, stored):
    run(CELLS[2:])
    run(CELLS[:2])
    assert [(m.cell, m.replay) for m in stored().grid] == [
        (cell, replay) for cell in ("lstm", "gru", "rnn_tanh") for replay in (False, True)
    ]


def test_stops_in_time(run, stored):
    text = run(minutes=-1.0)
    assert "3 cells left for want of time: run the same command again" in text
    assert stored().grid == []


def test_saves_when_interrupted(run, stored, monkeypatch):
    measure, seen = gpu.measure, []

    def interrupted(cell, *args):
        if seen:
            raise KeyboardInterrupt
        seen.append(cell)
        return measure(cell, *args)

    monkeypatch.setattr(gpu, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(stored().grid) == 2


@pytest.mark.parametrize("fact", ["gpu", "torch"])
def test_does_not_mix_machines(run, fact):
    run(CELLS[:1])
    with pytest.raises(RuntimeError, match=f"holds results of {fact} .* this is another: measure anew"):
        run(device=StandIn().device(**{fact: "another"}))


@pytest.mark.parametrize("culprit", [FUSEDRNN, TORCH])
def test_a_contestant_that_cannot_run_is_recorded(run, stored, monkeypatch, culprit):
    def refuse(task):
        raise RuntimeError("CUDA error: out of memory\nand much more")

    monkeypatch.setitem(CONTESTANTS, culprit, refuse)
    text = run(CELLS[:1], good=False)
    (m, replayed) = stored().grid
    assert m.errors == replayed.errors == {culprit: "RuntimeError: CUDA error: out of memory"}
    assert m.ratio is None
    assert culprit not in m.ms
    assert "WRONG" in text
    assert "RuntimeError: CUDA error: out of memory" in text


def test_wrong_results_are_not_timed(run, stored, monkeypatch):
    right = CONTESTANTS[FUSEDRNN]
    monkeypatch.setitem(CONTESTANTS, FUSEDRNN, lambda task: lambda: [2 * t for t in right(task)()])
    assert "fusedrnn is off by 1.0e+00 from torch.nn" in run(CELLS[1:2], good=False)
    (m, _) = stored().grid
    assert FUSEDRNN not in m.ms
    assert m.disagreement[FUSEDRNN] == pytest.approx(1.0)


def test_report(run, stored, tmp_path):
    text = run()
    assert "gru inference, tf32 graph" in text
    report = (tmp_path / "gpu.md").read_text()
    assert report == tables.gpu_report(stored())
    assert report.startswith("# Stand-in 1\n")
    assert "## lstm training, bf16\n" in report
    heading = "| shape | fusedrnn | torch.nn | ratio | fusedrnn graph | torch.nn graph | ratio graph | floor | kernel |"
    assert report.count(heading) == len(CELLS)
    (line,) = [line for line in report.splitlines() if line.startswith("| 256x8x64x64 |")]
    m, replayed = (m for m in stored().grid if m.shape == "256x8x64x64")
    numbers = [m.ms[FUSEDRNN], m.ms[TORCH], m.ratio, replayed.ms[FUSEDRNN], replayed.ms[TORCH], replayed.ratio, m.floor]
    shown = [f"{n:.2f}" if k in (2, 5) else f"{m.per_step(n):.2f}" for k, n in enumerate(numbers)]
    assert line.split(" | ")[1:8] == shown
    assert {p.name for p in tmp_path.glob("*.png")} == {"gpu-training.png", "gpu-inference.png"}
    record = (tmp_path / "gpu.json").read_text()
    assert len(json.loads(record)["grid"]) == 2 * len(CELLS)
    assert sum(line.startswith('  {"cell"') for line in record.splitlines()) == 2 * len(CELLS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(capsys):
    assert fusedrnn.__main__.main(["bench-gpu"]) == 2
    assert "no GPU: torch" in capsys.readouterr().err
