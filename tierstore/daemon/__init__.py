"""The daemon: one copy of the tiers for every process of a host, and what operators see of it.

`daemon` puts the parts together. `host` makes what is shared: `shared_tiers` is the memory, `epochs` and `versions`
change what lies there, `clients` and `attachments` say who reads it. `learning` makes the tiers follow what clients ask
for. `server` runs the socket. `record` is what operators see; `stat` and `metrics` show it.
"""
