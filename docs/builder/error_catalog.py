def reference() -> str:
    return "to come"
