"""Plug-ins that serve an engine's n-gram rows from a store: one folder an engine, and what they share.

Input: the engine's row ids. Output: stored bytes; the engine keeps hashing and dequantizing. Errors: one named error at
start (`gate.EngineMismatchError`) if the rows would not be those of the checkpoint that the engine loads.

`settings`: what the user sets · `gate`: engine versions and signatures · `tables`: the store's table held against the
engine's · `rows`: rows started early and taken later · `device_rows`: rows looked up in the forward ·
`quiet_stores`: stores while an engine captures graphs. Importing this imports no engine and no torch.
"""
