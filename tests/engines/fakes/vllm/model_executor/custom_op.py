# ruff: noqa: ARG004 - parameters are what these files are for
from torch import nn

op_registry_oot = {}


class PluggableLayer(nn.Module):
    def __new__(cls, *arguments, **named):
        return super().__new__(op_registry_oot.get(cls.__name__, cls))

    @classmethod
    def register_oot(cls, layer_class, name):
        assert name not in op_registry_oot, f"Duplicate layer name: {name}"
        op_registry_oot[name] = layer_class
