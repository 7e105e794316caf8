"""One description, two methods: how a function that returns a Call becomes a verb of both clients.

Where the object that has the verb waits for its answers, the method returns the answer; where it awaits them, an
awaitable of it. The type checker sees both, with the parameters of the function.
"""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from jhansi_runtime.client.calls import Call
from jhansi_runtime.client.connection import AsyncConnection, Connection

__all__ = ["AsyncSender", "Sender", "Verb", "VerbOfId"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Sender:
    """Whatever waits for its answers."""

    connection: Connection


class AsyncSender:
    """Whatever awaits its answers."""

    connection: AsyncConnection


class Verb(Generic[_P, _T]):
    """A method that sends the call which the function describes."""

    def __init__(self, describe: Callable[_P, Call[_T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: Sender, owner: type) -> Callable[_P, _T]: ...
    @overload
    def __get__(self, instance: AsyncSender, owner: type) -> Callable[_P, Coroutine[Any, Any, _T]]: ...
    def __get__(self, instance: Sender | AsyncSender | None, owner: type) -> object:
        return self if instance is None else _method(instance, self._describe)


class VerbOfId(Generic[_P, _T]):
    """The same, where the function is first given the `id` of the object."""

    def __init__(self, describe: Callable[Concatenate[str, _P], Call[_T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: Sender, owner: type) -> Callable[_P, _T]: ...
    @overload
    def __get__(self, instance: AsyncSender, owner: type) -> Callable[_P, Coroutine[Any, Any, _T]]: ...
    def __get__(self, instance: Any, owner: type) -> object:
        return self if instance is None else _method(instance, partial(self._describe, instance.id))


def _method(instance: Sender | AsyncSender, describe: Callable[..., Call[Any]]) -> Callable[..., Any]:
    def method(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - typed where the verb is looked up
        return instance.connection.perform(describe(*arguments, **options))

    method.__doc__ = describe.__doc__
    return method
