"""The hbm tier: the top of a placement in a GPU's memory, per process and GPU. Loads torch and triton: imported only if
used.

`opening`: the tier above an engine · `engine`: lookups from the host · `open_lookups`: the device lookups of an engine
· `lookup`: a table's lookups from the device, divided into `launches`, `mailbox`, `known_reads`, `stream_order` and
`times` · `tier`, `table`: entries and indexes on the device · `change`: which entries lie there, epochs · `pairs`: sets
of entries · `device`: the GPU, or the interpreter in its place, and page-locked memory.
"""
