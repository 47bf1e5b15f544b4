"""Which implementation of an operator runs: one enum, one table for each operator, one resolver.

`auto` becomes an implementation by device and dtype, with a reason that can be printed, and is never refused. A request
by name is kept or refused; it never turns into another implementation.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import torch

AUTO = "auto"


class Impl(StrEnum):
    """The ways an operator may be implemented. `auto` is a request, not an implementation."""

    REFERENCE = "reference"
    SDPA = "sdpa"
    XFORMERS = "xformers"
    FLEX = "flex"
    TRITON = "triton"


class Resolved(NamedTuple):
    """What a request became, and why, in words for a log."""

    impl: Impl
    reason: str


class ImplUnavailable(RuntimeError):
    """An implementation was asked for by name that the operator does not have, or that cannot run here."""


ON_CPU = Resolved(Impl.REFERENCE, "triton needs a GPU")
NOT_TIMED = {"cpu": ON_CPU, "cuda": Resolved(Impl.REFERENCE, "triton was not measured on a GPU yet")}
"""What `auto` means for an operator whose kernels nobody has timed."""
A_STEP_IS_NO_FASTER = "on an H100 triton is faster alone, but a training step by it is not yet"
NO_FASTER_YET = {"cpu": ON_CPU, "cuda": Resolved(Impl.REFERENCE, A_STEP_IS_NO_FASTER)}
"""What it means for one whose kernels are faster than the reference, by so little that a step does not show it."""


class Operator:
    """The implementations of one operator, and which of them `auto` means on each device type.

    Registers torch.ops.fused_beit.<name>, whose body is the implementation that its last argument names. The body is
    composed of torch's operators, so autograd, autocast, fake tensors and torch.compile see through it.

    schema:          "name(Tensor x, ..., str impl) -> Tensor"
    implementations: functions of the schema's arguments in order, less `impl`; they raise ImplUnavailable themselves
                     where they cannot run
    auto:            device type ("cpu", "cuda") -> what `auto` becomes there; the reference everywhere else
    why_not:         function of device and dtype: why `auto` is the reference there after all, or None
    requirements:    functions of a device: why an implementation cannot run there, or None
    """

    def __init__(
        self,
        schema: str,
        implementations: Mapping[Impl, Callable[..., Any]],
        auto: Mapping[str, Resolved] | None = None,
        requirements: Mapping[Impl, Callable[[torch.device], str | None]] | None = None,
        why_not: Callable[[torch.device, torch.dtype | None], str | None] = lambda device, dtype: None,
    ) -> None:
        name = schema.partition("(")[0]
        self.name = name
        self.implementations = dict(implementations)
        self.auto = dict(auto or {})
        self.requirements = dict(requirements or {})
        self.why_not = why_not
        for resolved in self.auto.values():
            if resolved.impl not in self.implementations:
                raise ValueError(f"{name}: auto names {resolved.impl!s}, which it does not have")
        _OPERATORS[name] = self
        # Once only: with the root of a checkout on sys.path, a library that looks for a package named `kernels` imports
        # this folder a second time under that name.
        if not hasattr(torch.ops.fused_beit, name):
            torch.library.define(f"fused_beit::{name}", schema.removeprefix(name))
            torch.library.impl(f"fused_beit::{name}", "CompositeImplicitAutograd", self._run)

    def resolve(self, request: str, device: torch.device | None, dtype: torch.dtype | None = None) -> Resolved:
        """What a request means; whether what it names can run is asked where it does, or by `resolve` below.

        dtype: that of the work, where `auto` may depend on it
        """
        if request == AUTO:
            return self._automatic(device, dtype)
        for impl in self.implementations:
            if impl == request:
                return Resolved(impl, "asked for")
        have = ", ".join(self.implementations)
        if request in [impl.value for impl in Impl]:
            why = "this version has no such implementation of it"
        else:
            why = f"no implementation has that name (known names: {AUTO}, {', '.join(Impl)})"
        raise ImplUnavailable(f"{self.name}: impl={str(request)!r} was asked for, but {why}; available: {AUTO}, {have}")

    def _automatic(self, device: torch.device | None, dtype: torch.dtype | None) -> Resolved:
        if device is None or device.type not in self.auto:
            if len(self.implementations) == 1:
                return Resolved(Impl.REFERENCE, "the only implementation in this version")
            return Resolved(Impl.REFERENCE, f"nothing else was chosen for {device.type if device else 'no device'}")
        why_not = self.why_not(device, dtype)
        return Resolved(Impl.REFERENCE, why_not) if why_not else self.auto[device.type]

    def _run(self, *args: Any) -> Any:
        *arguments, impl = args
        first = arguments[0]
        return self.implementations[self.resolve(impl, first.device, first.dtype).impl](*arguments)


_OPERATORS: dict[str, Operator] = {}


def operators() -> tuple[str, ...]:
    """Names of all operators, sorted."""
    return tuple(sorted(_OPERATORS))


def resolve(
    operator: str, request: str | Impl, device: torch.device | str | None, dtype: torch.dtype | None = None
) -> Resolved:
    """What `impl=request` means for `operator` on `device`, and why.

    device: None asks only whether there is such an implementation, for code that does not know yet where it will run
    dtype:  that of the work; what `auto` becomes may depend on it

    Raises ImplUnavailable when an implementation asked for by name does not exist or cannot run on such a device here,
    ValueError for an unknown operator.
    """
    if operator not in _OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; expected one of {', '.join(operators())}")
    found = _OPERATORS[operator]
    device = None if device is None else torch.device(device)
    resolved = found.resolve(request, device, dtype)
    requirement = found.requirements.get(resolved.impl)
    why = None if requirement is None or device is None else requirement(device)
    if why is not None:
        raise ImplUnavailable(refusal(operator, resolved.impl, why))
    if resolved.impl is Impl.TRITON and device is not None and device.type == "cpu":
        return resolved._replace(reason=f"{resolved.reason}; its kernels run in Triton's interpreter here")
    return resolved


def refusal(operator: str, impl: Impl, why: str) -> str:
    """The sentence in which an implementation is refused."""
    return f"{operator}: impl={impl.value!r} was asked for, but {why}"
