"""The public operators under torch.fx: a call on what stands for a tensor is recorded as one call."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, cast

import torch.fx

P = ParamSpec("P")
R = TypeVar("R")


def fx_leaf(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which symbolic tracing records as one call_function node, in whatever module it is called.

    torch.fx.wrap does so only for calls by a global name of the module that says it. Here it is the arguments that
    decide, so that models of other people trace without a word about it.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        proxy = _first_proxy((*args, *kwargs.values()))
        if proxy is None:
            return function(*args, **kwargs)
        return cast(R, proxy.tracer.create_proxy("call_function", call, args, kwargs))

    return call


def _first_proxy(values: Iterable[Any]) -> torch.fx.Proxy | None:
    for value in values:
        if isinstance(value, torch.fx.Proxy):
            return value
        if isinstance(value, tuple):  # a SharedBias, or a window
            found = _first_proxy(value)
            if found is not None:
                return found
    return None
