"""The local client of a daemon: the same `Store`, over the tiers that the daemon shares."""
