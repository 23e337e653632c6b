#!/usr/bin/env bash
# A plug-in of SGLang replaces a class by HookRegistry. Names that somebody imported before are rebound too: in every
# module that is loaded, the plug-in's own among them.
#
# Likely guess: a module that kept the class under a name of its own, `Stock = engine.Embedding`, still has the
# engine's class afterwards, to call it or to compare with it.
# Seen: that name is the replacement too; only what no module names directly, such as a tuple's part, is left alone.
#
# Exits with 0 if it is still so, and with 1 if the behaviour changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23

cat > "$folder/look.py" <<'PYTHON'
import sys
import types
from importlib.metadata import distribution, version
from importlib.util import module_from_spec, spec_from_file_location

# The registry alone: importing all of SGLang takes torch and kernels.
path = distribution("sglang").locate_file("sglang/srt/plugins/hook_registry.py")
spec = spec_from_file_location("hook_registry", path)
hooks = sys.modules["hook_registry"] = module_from_spec(spec)
spec.loader.exec_module(hooks)

engine, plugin = types.ModuleType("engine"), types.ModuleType("plugin")
sys.modules |= {"engine": engine, "plugin": plugin}


class Embedding:
    pass


class Replacement:
    pass


engine.Embedding = plugin.Stock = Embedding
plugin.kept = (Embedding,)
hooks.HookRegistry.register("engine.Embedding", Replacement, hooks.HookType.REPLACE)
hooks.HookRegistry.apply_hooks()

print(f"sglang {version('sglang')}, Python {sys.version.split()[0]}")
print("engine.Embedding is replaced; before that, a plug-in kept it as plugin.Stock and inside of a tuple")
print("  likely guess: plugin.Stock is the engine's Embedding")
print(f"  seen:         plugin.Stock is {plugin.Stock.__name__}, the tuple has {plugin.kept[0].__name__}")
sys.exit(0 if plugin.Stock is engine.Embedding and plugin.kept[0] is not engine.Embedding else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
