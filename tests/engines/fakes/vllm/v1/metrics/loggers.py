from abc import ABC


class StatLoggerBase(ABC):  # noqa: B024
    pass
