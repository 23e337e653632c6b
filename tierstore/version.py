"""The version of tierstore, read by setup.cfg without importing anything."""

VERSION = "0.1.0"
