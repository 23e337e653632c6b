"""Benchmark: a daemon's clients, local and remote, also while its tiers change."""
