"""Benchmarks and checks of the GPU's kernels and tier."""
