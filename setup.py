"""The extension module only; everything else is in setup.cfg.

The extension is optional: where no C++ compiler is found, the NumPy reference serves, with a warning.
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

SOURCES = sorted(str(path) for path in Path("kernels/cpu").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("kernels/cpu").glob("*.h"))

extension = Pybind11Extension(
    "tierstore.kernels._cpu",
    SOURCES,
    depends=HEADERS,
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
    optional=True,
)
setup(ext_modules=[extension])
