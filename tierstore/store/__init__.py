"""The open store: tables, the engine beneath them, and what was opened for it."""
