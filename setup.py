"""The extension module only; everything else is in setup.cfg.

The extension is optional: where no C++ compiler is found, the NumPy reference serves, with a warning. Files are
compiled side by side, one a core. -O0 in CXXFLAGS stands, for what only tries the build out;
any other level there gives way to -O3.
"""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

OPTIMIZED = [] if "-O0" in os.environ.get("CXXFLAGS", "").split() else ["-O3"]

extension = Pybind11Extension(
    "tierstore.kernels._cpu",
    sorted(glob("kernels/cpu/*.cpp")),
    depends=sorted(glob("kernels/cpu/*.h")),
    cxx_std=17,
    extra_compile_args=[*OPTIMIZED, "-Wall", "-Wextra"],
    optional=True,
)
with ParallelCompile(default=len(os.sched_getaffinity(0))):
    setup(ext_modules=[extension])
