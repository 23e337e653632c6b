"""Benchmark: other stores on the same keys, side by side."""
