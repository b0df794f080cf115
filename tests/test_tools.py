"""The tools of the Makefile: the check of a wheel, and the GPU's target."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parent.parent / "tools"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_record(cuda):
    return {"fusedrnn___build_record.py": f'# Written by CMake.\nBUILT_WITH = "GNU 12.2.0, {cuda}"\nCOMMIT = "0"\n'}


ALL_GPUS = build_record("CUDA 13.0 for sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120, PTX of compute_80")


class TestWheel:
    @pytest.fixture
    def check(self, tmp_path, monkeypatch, capsys):
        """Check a wheel of these files; each library needs what it contains."""
        pytest.importorskip("elftools", reason="comes with auditwheel")
        tool = load("check_wheel")
        monkeypatch.setattr(tool, "needed", lambda library: library.decode().split())

        def check(**files):
            with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
                for name, text in files.items():
                    archive.writestr(name.replace("__", "/").replace("_SO", ".cpython-311-x86_64-linux-gnu.so"), text)
            status = tool.main([str(tmp_path / "a.whl")])
            return status, capsys.readouterr().out

        return check

    def test_good(self, check):
        cpu = "libstdc++.so.6 libgcc_s.so.1 libc.so.6 ld-linux-x86-64.so.2"
        files = {"fusedrnn___cpu_SO": cpu, "fusedrnn___cuda_SO": "libc.so.6 libm.so.6", "fusedrnn__nn": "", **ALL_GPUS}
        status, out = check(**files)
        assert status == 0, out
        assert "0.0 MB, _cpu _cuda" in out

    @pytest.mark.parametrize(
        ("files", "fault"),
        [
            ({"fusedrnn__nn": ""}, "it has no compiled module _cpu"),
            ({"fusedrnn___cpu_SO": "libgomp.so.1"}, "needs libgomp.so.1"),
            ({"fusedrnn___cpu_SO": "", "fusedrnn___cuda_SO": "libcudart.so.13", **ALL_GPUS}, "needs libcudart.so.13"),
            (
                {"fusedrnn___cpu_SO": "", "fusedrnn___cuda_SO": "", **build_record("CUDA 13.0 for sm_90a, sm_100")},
                "its CUDA kernels lack PTX of compute_80, sm_120, sm_80, sm_86, sm_89",
            ),
            ({"fusedrnn___cpu_SO": "libtorch.so"}, "needs libtorch.so"),
            (
                {"fusedrnn___cpu_SO": "", "fusedrnn.libs__libgomp-a34b3233.so.1.0.0": ""},
                "it bundles fusedrnn.libs/libgomp-a34b3233.so.1.0.0",
            ),
        ],
    )
    def test_faults(self, check, files, fault):
        status, out = check(**files)
        assert status == 1
        assert out.count("FAULT") == 1
        assert fault in out

    def test_size(self, check, monkeypatch):
        status, out = check(fusedrnn___cpu_SO=" " * 25_100_000)
        assert status == 1
        assert "it has 25.1 MB, more than 25" in out

    def test_reads_a_real_library(self):
        pytest.importorskip("elftools", reason="comes with auditwheel")
        _cpu = pytest.importorskip("fusedrnn._cpu")
        assert any(name.startswith("libc.") for name in load("check_wheel").needed(Path(_cpu.__file__).read_bytes()))


class TestTarget:
    @pytest.fixture
    def target(self, monkeypatch):
        def target(*capability):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capability))
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
            return load("gpu_target").target()

        return target

    def test_target(self, target):
        assert [target(8, 0), target(8, 9), target(9, 0), target(12, 0)] == [
            "80-real",
            "89-real",
            "90a-real",
            "120-real",
        ]

    def test_none(self, target):
        with pytest.raises(RuntimeError, match=r"no GPU: torch .* finds no CUDA device on this machine"):
            target()

    def test_too_old(self, target):
        with pytest.raises(RuntimeError, match=r"A GPU has compute capability 7.5, the kernels need 8.0 or newer"):
            target(7, 5)
