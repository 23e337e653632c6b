"""A stand-in for vLLM 0.32 and 0.33: the names, files and parameters that tierstore's plug-in relies on, no more.

Input: none. Output: classes that do what the plug-in sees of the engine's. Errors: none. `make engines` runs the
plug-in in the real package.
"""

__version__ = "0.33.0"
