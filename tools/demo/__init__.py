"""The demo: a synthetic checkpoint through every flow, each row checked."""
