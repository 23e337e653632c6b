"""Stands in for Mooncake's package where that is not installed: see `store`."""
