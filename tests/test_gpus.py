"""What ``info`` says of GPUs, with stand-ins for the GPU and for the engine's plans."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fusedrnn
from fusedrnn.cells import CELLS
from fusedrnn.engines.cuda import CudaEngine
from fusedrnn.gpus import describe_gpus, describe_paths


class Engine:
    """Plans as narrow ones do on one CTA, wider ones on many; backward gives up the grid earlier; f64 has one path."""

    exchange = "counter"

    def plan(self, device, cell, arithmetic, time, batch, width, directions, backward):
        widest = 512 if backward else 1024
        name = "per_step" if width > widest or arithmetic == "f64" else "one_cta" if width <= 64 else "grid"
        path, exchange = SimpleNamespace(name=name), SimpleNamespace(name=self.exchange)
        return SimpleNamespace(native=SimpleNamespace(path=path, exchange=exchange))


@pytest.fixture
def a_gpu(monkeypatch):
    gpu = SimpleNamespace(name="Stand-in", major=9, minor=0, multi_processor_count=132, total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)


def test_paths():
    rows = describe_paths(Engine(), 0)
    assert rows["lstm bf16 forward"] == "one cta to H 64, grid to H 1024, then per step"
    assert rows["gru f32 backward"] == "one cta to H 64, grid to H 512, then per step"
    assert rows["lstm f64 forward"] == "per step"
    assert len(rows) == 10 * len(CELLS)


def test_paths_name_an_exchange_other_than_the_usual(monkeypatch):
    monkeypatch.setattr(Engine, "exchange", "flags")
    rows = describe_paths(Engine(), 0)
    assert rows["lstm bf16 forward"] == "one cta to H 64, grid with flags to H 1024, then per step"


def test_gpus(a_gpu):
    rows = describe_gpus()
    assert rows["GPU 1"] == "Stand-in, compute capability 9.0, 132 multiprocessors, 128 GiB"
    assert list(rows) == ["CUDA", "GPU 0", "GPU 1"]


def test_info_lists_them(a_gpu):
    text = str(fusedrnn.info())
    assert "GPU 0 " in text
    assert "Stand-in, compute capability 9.0" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu():
    assert describe_gpus() == {}
    assert fusedrnn.info().paths == {}


class TestWhyThereAreNoKernels:
    def why(self, runtime, driver):
        module = SimpleNamespace(device_count=lambda: 0, versions=lambda: (runtime, driver))
        return CudaEngine(module).available()

    def test_no_gpu(self):
        assert self.why(13000, 0) == self.why(12080, 13000) == "no GPU"

    def test_old_driver(self):
        assert "driver is for CUDA 12, the kernels were built with CUDA 13" in self.why(13000, 12080)
