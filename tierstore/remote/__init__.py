"""Lookups by gRPC, both ends: a server for any `Store`, and a client that is one."""
