"""Bytes at rest: what a page, the catalog and a checkpoint look like. Every layout here has its table in FORMAT.md."""
