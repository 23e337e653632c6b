"""Records as they lie in memory and in files: NumPy types of what C++ structs are (kernels/cpu).

Input: nothing. Output: types; FORMAT.md draws those that are in files. Errors: none.
"""

import numpy as np

# The end of a page (pages.h).
TRAILER = np.dtype([("page_number", "<u8"), ("version", "<u4"), ("checksum", "<u4")])

# The end of a placed entry's record (entry_index.h).
RECORD_TRAILER = np.dtype([("key", "<i8"), ("order_index", "<u4"), ("checksum", "<u4")])

# A bucket of an index of placed entries, and which buckets of an area are each order's (entry_index.h). `places`:
# numbers of records.
INDEX_BUCKET = np.dtype([("keys", "<i8", 5), ("places", "<u4", 5), ("displaced", "<u4")])
INDEX_HEAD = np.dtype([("bucket_start", "<u4", 16), ("num_buckets", "<u4", 16)])

# One access to a key that a client reports, or 2 ** (source_and_weight >> 3) accesses (reports.h).
REPORT = np.dtype([("key", "<i8"), ("table", "<u2"), ("order", "u1"), ("source_and_weight", "u1")], align=True)
