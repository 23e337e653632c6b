"""Benchmark: do lookups hide behind a model's own work?"""
