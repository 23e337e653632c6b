"""The extension module only; everything else is in setup.cfg.

The extension is optional: where no C++ compiler is found, the NumPy reference serves, with a warning.
"""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

SOURCES = ["kernels/cpu/module.cpp", "kernels/cpu/crc32c.cpp", "kernels/cpu/pages.cpp"]
HEADERS = ["kernels/cpu/crc32c.h", "kernels/cpu/pages.h"]

extension = Pybind11Extension(
    "tierstore.kernels._cpu",
    SOURCES,
    depends=HEADERS,
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
    optional=True,
)
setup(ext_modules=[extension])
