"""Benchmark: this build against another checkout, in turn."""
