"""The CUDA kernels without a GPU: builds the module over the emulator, and gives the engine that runs on it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
from support import Target

from fusedrnn import engines
from fusedrnn.engines.cuda import CudaEngine

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "emulator" / str(sys.implementation.cache_tag)


@cache
def module() -> ModuleType:
    """``_cuda_emulated``, built again where its sources changed."""
    tools = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    configure = [
        *("cmake", "-S", str(HERE / "emulator"), "-B", str(BUILD), "-G", "Ninja"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        done = subprocess.run(command, env=tools, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    (library,) = BUILD.glob("_cuda_emulated*.so")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    return emulated


@contextmanager
def cuda_engine_on_cpu_tensors() -> Iterator[CudaEngine]:
    """Inside the block the engine ``cuda`` is the emulated one."""
    before, emulated = engines.ENGINES["cuda"], CudaEngine(module(), "cpu")
    engines.ENGINES["cuda"] = emulated
    try:
        yield emulated
    finally:
        engines.ENGINES["cuda"] = before
        module().schedule()
        module().fault()
        module().set_device()


@dataclass(frozen=True)
class Emulated(Target):
    """The CUDA engine on the CPU's tensors."""

    @property
    def device(self) -> str:
        return "cpu"

    @contextmanager
    def running(self) -> Iterator[None]:
        with cuda_engine_on_cpu_tensors(), super().running():
            yield


TARGET = Emulated("cuda")
