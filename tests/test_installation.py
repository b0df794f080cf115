"""Installing without a C++ compiler gives the engines written in Python, and says what is missing and why."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from support import run_script

from fusedrnn import installation

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("CMakeLists.txt", "LICENSE", "README.md", "cmake", "csrc", "pyproject.toml", "python")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What the package is built from, in a folder of its own."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


def build(source, out, hook="build_wheel", **environment):
    """Run the build backend as pip does, on a machine without a compiler."""
    bare = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDACXX")}
    return subprocess.run(
        [sys.executable, "-c", f"from scikit_build_core.build import {hook}; {hook}({str(out)!r})"],
        cwd=source,
        env=bare | {"PATH": os.fspath(out)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(source, tmp_path):
    result = build(source, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "this wheel has no compiled kernels" in result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    script = """
        import sys
        sys.meta_path = [finder for finder in sys.meta_path if not hasattr(finder, "known_wheel_files")]
        import fusedrnn, torch
        print(fusedrnn.info())
        print(fusedrnn.explain(fusedrnn.GRU(3, 4), torch.randn(2, 1, 3)))
    """  # an editable install puts a finder before the path
    used = run_script(script, PYTHONPATH=str(tmp_path / "installed"), PATH=str(tmp_path), CXX="")
    assert used.stdout.count("the compiled module is missing: compiling it failed") >= 2, used.stdout + used.stderr
    assert "no C++ compiler: none of c++, g++, clang++ is on PATH" in used.stdout
    assert "engine numba: " in used.stdout


@pytest.mark.parametrize(
    ("hook", "environment"), [("build_editable", {}), ("build_wheel", {"FUSEDRNN_REQUIRE_COMPILED": "1"})]
)
def test_development_and_releases_do_not_fall_back(source, tmp_path, hook, environment):
    result = build(source, tmp_path, hook, **environment)
    assert result.returncode != 0
    assert "CMake configuration failed" in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.parametrize(
    ("wanted", "good", "said"),
    [
        ("AUTO", True, r"CUDA kernels: not built: the nvcc \S+ did not work"),
        ("OFF", True, r"CUDA kernels: not built: fusedrnn was built with FUSEDRNN_CUDA=OFF"),
        ("ON", False, r"FUSEDRNN_CUDA is ON, but the nvcc \S+ did not work"),
        ("maybe", False, r"FUSEDRNN_CUDA is 'maybe', expected AUTO, ON or OFF"),
    ],
)
def test_cuda_kernels_are_left_out_visibly(tmp_path, wanted, good, said):
    broken = shutil.which("false")
    result = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DFUSEDRNN_CUDA={wanted}"],
        env=os.environ | {"CUDACXX": broken, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    text = " ".join((result.stdout + result.stderr).split())  # CMake breaks long lines
    assert (result.returncode == 0) is good, text
    assert re.search(said, text), text


class TestLoad:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """An empty package in fusedrnn's place."""
        name = "package_of_a_test"
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(installation, "__package__", name)
        yield tmp_path / name
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[module]

    def record(self, package, not_built):
        (package / "_build_record.py").write_text(
            f"BUILT_WITH = 'GNU 12'\nCOMMIT = 'c0ffee'\nNOT_BUILT = {not_built!r}\n"
        )

    def test_there(self, package):
        (package / "_cpu.py").touch()
        module, reason = installation.load("_cpu")
        assert module is not None
        assert reason == ""

    def test_never_compiled(self, package):
        assert installation.load("_cuda") == (
            None,
            "the compiled module is missing: this copy of fusedrnn was never compiled",
        )
        assert installation.built_with() == ""
        assert installation.commit() is None

    def test_left_out(self, package):
        self.record(package, {"_cuda": "no nvcc"})
        assert installation.load("_cuda") == (None, "the compiled module is missing: no nvcc")
        assert installation.load("_cpu")[1].endswith("it was built, but is no longer there")
        assert installation.built_with() == "GNU 12"
        assert installation.commit() == "c0ffee"

    def test_unloadable(self, package):
        (package / f"_cpu{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
        module, reason = installation.load("_cpu")
        assert module is None
        assert reason.startswith("the compiled module cannot be loaded: ")
