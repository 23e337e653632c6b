"""Decisions, pure: numbers come in, choices go out. Nothing here reads a file, a clock or a generator of its own."""
