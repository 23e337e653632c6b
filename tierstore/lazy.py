"""Properties that are computed at first use, and kept.

Input: a method without arguments. Output: a property. Errors: those of the method.

Why not `functools.cached_property`: until Python 3.12 it takes a lock, one for all instances. A thread that forks while
another thread computes leaves that lock taken in the child for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class lazy(Generic[T]):
    """Like `functools.cached_property`, without a lock. Two threads may compute the value twice, to the same result."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> lazy[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> lazy[T] | T:
        if instance is None:
            return self
        value: T = self._compute(instance)
        instance.__dict__[self._name] = value  # from now on found before this descriptor
        return value
