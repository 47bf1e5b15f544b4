"""Every tensor that autograd saves, and every allocation of work on the CPU: what memory is really needed."""

import gc
from collections.abc import Callable, Iterable, Iterator

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward: Callable[[], object], apart_from: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that `forward` saves for the backward pass, those of `apart_from` excepted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes at a time that `work` has allocated and not freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = peak = 0
    for _, count in sorted(allocations(recorded)):
        held += count
        peak = max(peak, held)
    return peak


def allocations(recorded: profile) -> Iterator[tuple[int, int]]:
    """Time and bytes of each allocation, negative for what is freed."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = list(recorded.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size


def held_storages() -> dict[int, int]:
    """Bytes of every storage that a tensor, or a gradient, refers to now, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):  # not one without memory, as a compilation leaves
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.untyped_storage().nbytes():
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found
