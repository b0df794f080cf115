"""Check a wheel before it is released: what it holds, what it needs, how large it is. ``check_wheel.py WHEEL...``"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

#: Bytes.
_LARGEST = 25e6
#: The names that libraries of libc and libstdc++ go by; a dynamic linker is needed by whoever needs libc.
_ALLOWED = ("ld-linux", "libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++")
#: For which GPUs a wheel with CUDA kernels has them; every other one from the first on compiles the PTX.
_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "PTX of compute_80")


def needed(library: bytes) -> list[str]:
    """The shared libraries that an ELF file asks for."""
    sections = ELFFile(io.BytesIO(library)).iter_sections()
    dynamic = [section for section in sections if isinstance(section, DynamicSection)]
    return [tag.needed for section in dynamic for tag in section.iter_tags("DT_NEEDED")]


def built_with(archive: zipfile.ZipFile) -> str:
    """Compilers and GPU targets, as the build wrote them down; empty if it did not."""
    name = "fusedrnn/_build_record.py"
    record = archive.read(name).decode() if name in archive.namelist() else ""
    return next((line.split('"')[1] for line in record.splitlines() if line.startswith("BUILT_WITH")), "")


def faults(wheel: Path) -> Iterator[str]:
    """What is wrong with a wheel, in words."""
    size = wheel.stat().st_size
    if size > _LARGEST:
        yield f"it has {size / 1e6:.1f} MB, more than {_LARGEST / 1e6:.0f}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [name for name in names if ".so" in PurePosixPath(name).suffixes]
        if not any(PurePosixPath(name).name.startswith("_cpu.") for name in libraries):
            yield "it has no compiled module _cpu"
        if any(PurePosixPath(name).name.startswith("_cuda.") for name in libraries):
            missing = set(_TARGETS).difference(re.split(", | for ", built_with(archive)))
            if missing:
                yield f"its CUDA kernels lack {', '.join(sorted(missing))}"
        for name in libraries:
            if PurePosixPath(name).parent.name != "fusedrnn":
                yield f"it bundles {name}"
            for library in needed(archive.read(name)):
                if library.split(".so")[0].split("-x86")[0].split("-aarch64")[0] not in _ALLOWED:
                    yield f"{name} needs {library}"


def main(wheels: list[str]) -> int:
    """Check wheels and say what was found; exit status 1 if any has a fault."""
    found = 0
    for name in wheels:
        wheel = Path(name)
        problems = list(faults(wheel))
        found += len(problems)
        with zipfile.ZipFile(wheel) as archive:
            modules = sorted(Path(n).name.split(".")[0] for n in archive.namelist() if n.endswith(".so"))
            compilers = built_with(archive)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {' '.join(modules)}; {compilers}")
        for problem in problems:
            print(f"  FAULT: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
