"""The daemon: one copy of the tiers for every process of a host, and what operators see of it.

`host` keeps the tiers in shared memory, `server` says who may have them, `attached` is a client's end, `learning` makes
the tiers follow what clients ask for; `remote_*` answer processes that cannot map memory; `metrics` and `events` show
what happens.
"""
