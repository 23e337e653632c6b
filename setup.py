"""The extension module only; everything else is in setup.cfg.

The extension is optional: where no C++ compiler is found, the NumPy reference serves, with a warning.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

extension = Pybind11Extension(
    "tierstore.kernels._cpu",
    sorted(glob("kernels/cpu/*.cpp")),
    depends=sorted(glob("kernels/cpu/*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
    optional=True,
)
setup(ext_modules=[extension])
