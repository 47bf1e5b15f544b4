"""Argument checks of the public operators: a wrong shape or dtype stops with what was expected and what came."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SERVED = "float64, float32, bfloat16 and float16 are served"


def check_shape(operator: str, name: str, tensor: Any, *expected: int | str) -> None:
    """Raise ValueError unless `tensor` has these sizes, TypeError unless it is a tensor.

    A string names a size that may be anything. Where dimensions of size 1 are all that is too much, as in a [1, 1, D]
    of other libraries, the message says which index takes them away.
    """
    if isinstance(tensor, Tensor) and _fits(tensor.shape, expected):
        return
    wanted = ", ".join(str(want) for want in expected)
    if not isinstance(tensor, Tensor):
        found = "None" if tensor is None else f"a {type(tensor).__name__}"
        raise TypeError(f"{operator}: {name} must be a tensor [{wanted}], but is {found}")
    raise ValueError(
        f"{operator}: {name} must have shape [{wanted}], but has {list(tensor.shape)}"
        f"{_index_that_fits(name, tensor.shape, expected)}"
    )


def _fits(shape: Sequence[int], expected: Sequence[int | str]) -> bool:
    if len(shape) != len(expected):
        return False
    return all(isinstance(want, str) or size == want for size, want in zip(shape, expected, strict=True))


def _index_that_fits(name: str, shape: Sequence[int], expected: Sequence[int | str]) -> str:
    """What to say where leaving out dimensions of size 1 would give the shape expected; else nothing."""
    ones = [dim for dim, size in enumerate(shape) if size == 1]
    for left_out in itertools.combinations(ones, max(0, len(shape) - len(expected))):
        kept = [dim for dim in range(len(shape)) if dim not in left_out]
        if left_out and _fits([shape[dim] for dim in kept], expected):
            index = ", ".join("0" if dim in left_out else ":" for dim in range(left_out[-1] + 1))
            return f"; give {name}[{index}]"
    return ""


def check_number(operator: str, remedy: str = "", **values: Any) -> None:
    """Raise TypeError for a tensor or a text where a number is meant: a tensor would get no gradient.

    remedy: what to do instead
    """
    for name, value in values.items():
        if isinstance(value, Tensor):
            remedy = remedy or f"{name}.item() is one, and waits for the device"
            raise TypeError(f"{operator}: {name} must be a Python number, but is a tensor; {remedy}")
        if isinstance(value, str):
            raise TypeError(f"{operator}: {name} must be a number, but is {value!r}")


def check_float(operator: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor given is of a floating-point dtype that the operators compute with."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise TypeError(f"{operator}: {name} must be a floating-point tensor, but is {tensor.dtype}; {SERVED}")


def check_float_dtype(operator: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless `dtype` is a floating-point one that the operators compute with."""
    if dtype not in FLOATING:
        raise TypeError(f"{operator}: dtype must be a floating-point one, but is {dtype}; {SERVED}")


def check_int64(operator: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor given is int64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.int64:
            raise TypeError(f"{operator}: {name} must be torch.int64, but is {tensor.dtype}")


def check_positions(operator: str, name: str, positions: Tensor, num_patches: int) -> None:
    """Raise TypeError for positions that are not int64, ValueError for wrong values.

    Wrong are places outside -1..num_patches-1 and a patch that a picture lists twice. They are looked for on a CPU
    alone, and outside of torch.compile: elsewhere it would have to wait for the device.
    """
    if positions.dtype == torch.bool:
        mask = "~mask" if name == "visible_positions" else "mask"
        raise TypeError(
            f"{operator}: {name} must be torch.int64, but is torch.bool; masked_positions_from_bool({mask}) makes them "
            f"of a mask that is True for masked patches"
        )
    check_int64(operator, **{name: positions})
    if positions.device.type == "cpu" and not torch.compiler.is_compiling():
        torch.ops.fused_beit.check_positions(operator, name, positions, num_patches)


def _check_positions(operator: str, name: str, positions: Tensor, num_patches: int) -> None:
    if positions.numel() == 0:
        return
    ordered = positions.sort(dim=1).values
    lowest, highest = int(ordered[:, 0].min()), int(ordered[:, -1].max())
    if lowest < -1 or highest >= num_patches:
        wrong = lowest if lowest < -1 else highest
        raise ValueError(f"{operator}: {name} must be -1 or in 0..{num_patches - 1}, but one is {wrong}")
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        picture, slot = (int(index) for index in twice.nonzero()[0])
        patch = int(ordered[picture, slot])
        raise ValueError(f"{operator}: {name} must list a patch once, but lists {patch} of picture {picture} twice")


def check_num_masked(operator: str, mask: Tensor, num_slots: int) -> None:
    """Raise ValueError for a picture of a mask [B, P] with more patches than slots; on a CPU, as above."""
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        torch.ops.fused_beit.check_num_masked(operator, mask, num_slots)


def _check_num_masked(operator: str, mask: Tensor, num_slots: int) -> None:
    too_many = mask.sum(1) > num_slots
    if too_many.any():
        picture = int(too_many.nonzero()[0])
        count = int(mask[picture].sum())
        raise ValueError(f"{operator}: num_slots is {num_slots}, but picture {picture} has {count} masked patches")


# Operators, so that tensors without values (fake ones) pass them unread.
for _check, _name, _schema in (
    (_check_positions, "check_positions", "(str operator, str name, Tensor positions, int num_patches) -> ()"),
    (_check_num_masked, "check_num_masked", "(str operator, Tensor mask, int num_slots) -> ()"),
):
    if not hasattr(torch.ops.fused_beit, _name):  # once only, as in impl.py
        torch.library.define(f"fused_beit::{_name}", _schema)
        torch.library.impl(f"fused_beit::{_name}", "cpu", _check)
        torch.library.register_fake(f"fused_beit::{_name}", lambda *_: None)


def check_same_device(operator: str, first_name: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor given is on the device of `first`."""
    device = first.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{operator}: {name} must be on {device} as {first_name} is, but is on {tensor.device}")


def check_determinism(operator: str, deterministic: bool) -> None:
    """Heed torch.use_deterministic_algorithms: raise RuntimeError, or warn, as it says, unless `deterministic`."""
    if deterministic or not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f"{operator}: deterministic=False was asked for, but torch.use_deterministic_algorithms is on; "
        f"leave deterministic=True"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=3)
