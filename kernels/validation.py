"""Argument checks of the public operators: a wrong shape or dtype stops with what was expected and what came."""

import warnings

import torch
from torch import Tensor


def check_shape(operator: str, name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raise ValueError unless `tensor` has these sizes; a string names a size that may be anything."""
    fits = tensor.dim() == len(expected)
    if fits:
        for size, want in zip(tensor.shape, expected, strict=True):
            if not isinstance(want, str) and size != want:
                fits = False
    if not fits:
        wanted = ", ".join(str(want) for want in expected)
        raise ValueError(f"{operator}: {name} must have shape [{wanted}], but has {list(tensor.shape)}")


def check_float(operator: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor given is of a floating-point dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} must be a floating-point tensor, but is {tensor.dtype}")


def check_int64(operator: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor given is int64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.int64:
            raise TypeError(f"{operator}: {name} must be torch.int64, but is {tensor.dtype}")


def check_positions(operator: str, name: str, positions: Tensor, num_patches: int) -> None:
    """Raise ValueError for places outside -1..num_patches-1 and for a patch that a picture lists twice.

    On a CPU alone, and outside of torch.compile: elsewhere it would have to wait for the device.
    """
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


# An operator, so that tensors without values (fake ones) pass it unread.
if not hasattr(torch.ops.fused_beit, "check_positions"):  # once only, as in impl.py
    torch.library.define(
        "fused_beit::check_positions", "(str operator, str name, Tensor positions, int num_patches) -> ()"
    )
    torch.library.impl("fused_beit::check_positions", "cpu", _check_positions)
    torch.library.register_fake("fused_beit::check_positions", lambda *_: None)


def check_same_device(operator: str, first_name: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor given is on the device of `first`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{operator}: {name} must be on {first.device} as {first_name} is, but is on {tensor.device}"
            )


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
