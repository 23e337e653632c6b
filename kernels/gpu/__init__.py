"""Triton kernels of the hbm tier: token ids to keys, keys to places, entries to values, all on the device.

Input: tensors of one device, and addresses of page-locked host memory. Output: what each launcher's docstring states,
written into buffers of the caller. Errors: `ValueError` for tensors that do not fit, before anything is launched. No
launch allocates, waits, or looks at device data on the host, so that all of them fit in a captured CUDA graph.

A place is the number of an entry among the device's sources: slots first, then records. Imported only if a GPU is used.
With TRITON_INTERPRET=1 set before triton is first imported, the same kernels run on CPU tensors in Triton's
interpreter. The NumPy references lie beside the CPU kernels' (kernels/reference*.py).
"""

# All at once: Triton decides when a kernel is defined whether it is interpreted,
# by an environment that may change later.
from . import await_answer, gather, keys, lookup, misses, probe, put_rows, row_ids, rows, scatter, token_keys
from .launching import INTERPRETED

__all__ = [
    "INTERPRETED",
    "await_answer",
    "gather",
    "keys",
    "lookup",
    "misses",
    "probe",
    "put_rows",
    "row_ids",
    "rows",
    "scatter",
    "token_keys",
]
