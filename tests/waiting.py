"""Watches a piece of code for the host waiting for the device, on any machine, a CPU alone included.

Two nets, for each has holes. Operators that the dispatcher sees: values or shapes that the host must know. Methods of
tensors that bring values to the host: on a CPU `tolist` and `cpu` reach no dispatcher. What both cannot see there, a
copy to "cpu" by `to`, `tests/test_no_waiting.py` looks for in the source.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Where the host may wait in a step all the same: the end of a file's path and a function's name -> why.
MAY_WAIT = {
    ("kernels/validation.py", "_check_positions"): "looks at values on a CPU alone, where there is nothing to wait for",
    ("kernels/validation.py", "_check_num_masked"): "the same",
}
LIBRARIES = {
    ("torch/utils/data/dataloader.py", "__init__"): "the seed of the workers, once a run, which is on the host anyway",
}

OPERATORS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "nonzero_static"),
    *("masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
METHODS = {
    *("cpu", "item", "tolist", "numpy", "__array__"),
    *("__bool__", "__int__", "__float__", "__index__", "__complex__"),
}


@dataclass
class Waits:
    """What was found: the names of operators and methods."""

    allowed: bool = False
    """Set where waiting is meant, as at a log line; what waits there is counted apart."""
    found: list[str] = field(default_factory=list)
    meant: list[str] = field(default_factory=list)

    def note(self, name: str) -> None:
        if not in_allowed_function():
            (self.meant if self.allowed else self.found).append(name)


class WatchOperators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in OPERATORS or by_mask:
            self.waits.note(f"{name} by a mask" if by_mask else name)
        return func(*args, **(kwargs or {}))


class WatchMethods(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[Waits]:
    """Note every wait inside the `with` block."""
    waits = Waits()
    with WatchOperators(waits), WatchMethods(waits):
        yield waits


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail, at the end of the `with` block, when anything inside it waited."""
    with watched() as waits:
        yield
    assert not waits.found, f"the host waits for the device in {', '.join(sorted(set(waits.found)))}"


def in_allowed_function() -> bool:
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if any(code.co_name == name and code.co_filename.endswith(path) for path, name in (*MAY_WAIT, *LIBRARIES)):
            return True
        frame = frame.f_back
    return False
