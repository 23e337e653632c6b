"""Triton kernels of the hbm tier: token ids to keys, keys to places, entries to values, all on the device.

Flows in: tensors of one device, and addresses of page-locked host memory. Flows out: what each launcher's docstring
says, written into buffers that the caller gives. No launch allocates, waits or looks at device data on the host, so
that all of them fit in a captured CUDA graph. Imported only by who uses a GPU; with TRITON_INTERPRET=1 set before
triton is first imported, the same kernels run on CPU tensors in Triton's interpreter. The NumPy references are beside
the CPU kernels' (kernels/reference*.py).
"""

# All at once: Triton decides when a kernel is defined whether it is interpreted,
# by an environment that may change later.
from . import await_answer, gather, keys, lookup, misses, probe, row_ids, rows, scatter
from .launching import INTERPRETED

__all__ = ["INTERPRETED", "await_answer", "gather", "keys", "lookup", "misses", "probe", "row_ids", "rows", "scatter"]
