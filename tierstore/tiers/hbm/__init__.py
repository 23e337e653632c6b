"""The hbm tier: the top of a placement in a GPU's memory, per process and GPU. Loads torch and triton: imported when it
is used.

`device`: the GPU, or the interpreter in its place, and page-locked memory · `table`, `tier`: indexes and entries on it
· `change`: which entries lie there, epochs · `lookup`: a table's lookups from the device, misses by mailbox · `engine`:
lookups from the host · `opening`: all of it, opened.
"""
