"""The compiled kernels, kernels/cpu: what must be fast. Every name of `_cpu` is here; `_cpu.pyi` documents each one.

Imports nothing of tierstore's. kernels/reference*.py do the same in NumPy: tests compare with them, nothing else does.

Input: NumPy arrays, checked for shape, type and bounds. Functions release the interpreter lock if they work for long,
and any thread may call them.
Output: what `_cpu.pyi` says, often written into arrays that the caller gives.
Errors: `ValueError` and `TypeError` for arguments that do not fit. `ImportError`: the extension is missing, or this
package is imported by its bare name.
"""

if __name__ != "tierstore.kernels":
    raise ImportError(
        f"this package is tierstore.kernels, and was imported as {__name__}: write 'from tierstore import kernels'; "
        f"under two names its compiled part would be loaded twice. If transformers imported it, which looks for the "
        f"Hub's package of that name, start Python in another folder than the clone, or as python -P"
    )

try:
    from ._cpu import *  # noqa: F403 (its stub lists all names)
except ImportError as error:
    raise ImportError(
        f"tierstore's compiled extension, tierstore.kernels._cpu, cannot be loaded ({error}). It is built when "
        f"tierstore is installed: install gcc, then run 'pip install --force-reinstall .' in the clone. On a machine "
        f"without a compiler, install a wheel that 'make wheel' built on another one: pip install dist/*.whl"
    ) from error

from .records import INDEX_BUCKET as INDEX_BUCKET
from .records import INDEX_HEAD as INDEX_HEAD
from .records import RECORD_TRAILER as RECORD_TRAILER
from .records import REPORT as REPORT
from .records import TRAILER as TRAILER
