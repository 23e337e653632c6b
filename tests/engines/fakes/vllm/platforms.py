from types import SimpleNamespace

current_platform = SimpleNamespace(is_rocm=lambda: False)
