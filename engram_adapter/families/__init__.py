"""The registry of model families: one file each, which holds all that is known of it. To add a family, add it here.

Input: none. Output: `read_model` and `plain_source`, with every family of this folder registered. Errors: none.
"""

from __future__ import annotations

from ..family import FAMILIES, Family, register
from ..models import Model, plain_source, read_model
from . import deepseek_v41, engram, longcat, qwen4_exp

__all__ = ["FAMILIES", "Family", "Model", "plain_source", "read_model", "register"]

for _module in (deepseek_v41, qwen4_exp, longcat, engram):  # in the order in which a config.json is tried
    register(_module.FAMILY)
