"""The daemon: one process of a host owns the dram tier in shared memory; others attach to it over a Unix socket."""
