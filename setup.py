"""The extension module only; everything else is in setup.cfg. It is required: tierstore does not run without it.

pybind11's headers take longer to compile than any file of bindings, so the `*_module.cpp` files are compiled together,
as a few larger files. Files are compiled side by side, one per core. -O0 in CXXFLAGS stays, for a quick trial of the
build; any other level there gives way to ours.
"""

import os
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

OPTIMIZED = [] if "-O0" in os.environ.get("CXXFLAGS", "").split() else ["-O3"]
# The same bits on every processor: no multiply-add that the source does not name; nobody reads errno or traps.
FLOATS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NUM_BINDINGS = 2  # files that all bindings are put together in: for two cores, and none reads the headers in vain


def bindings() -> list[str]:
    """Writes files that include the `*_module.cpp` files, of about equal length; returns their paths."""
    parts: list[list[Path]] = [[] for _ in range(NUM_BINDINGS)]
    for path in sorted(Path("kernels/cpu").glob("*module.cpp"), key=lambda path: (-path.stat().st_size, path.name)):
        min(parts, key=lambda part: sum(each.stat().st_size for each in part)).append(path)
    folder = Path("build/bindings")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, part in enumerate(parts):
        text = "".join(f'#include "{path.name}"\n' for path in sorted(part))
        written.append(folder / f"bindings_{number}.cpp")
        if not written[-1].exists() or written[-1].read_text() != text:
            written[-1].write_text(text)
    return [str(path) for path in written]


extension = Pybind11Extension(
    "tierstore.kernels._cpu",
    [*bindings(), *sorted(path for path in glob("kernels/cpu/*.cpp") if not path.endswith("module.cpp"))],
    include_dirs=["kernels/cpu"],
    depends=sorted([*glob("kernels/cpu/*.h"), *glob("kernels/cpu/*module.cpp")]),
    cxx_std=17,
    extra_compile_args=[*OPTIMIZED, *FLOATS, "-Wall", "-Wextra"],
)
with ParallelCompile(default=len(os.sched_getaffinity(0))):
    setup(ext_modules=[extension])
