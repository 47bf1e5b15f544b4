"""What is timed: a case of an operator with its bytes and FLOPs, its inputs, and what results are held to.

A case of one operator says in one place what it costs, what it is fed and who specifies its results; building, checking
and timing its providers is the same for all of them, in `measuring`.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .rounds import Outputs, check
from .timers import Run, Staged

FORWARD, BOTH, BACKWARD = DIRECTIONS = ("forward", "forward and backward", "backward")

Function = Callable[..., Any]
"""Of the tensors of a case by name, as the operator takes them; gives what the operator gives."""


@dataclass(frozen=True)
class Case(ABC):
    """A size of an operator."""

    name: str
    dtype: torch.dtype = field(default=torch.bfloat16, kw_only=True)
    rehearsal: bool = field(default=False, kw_only=True)
    """Whether Triton's interpreter may stand in for a GPU, whose times mean nothing."""

    operator: ClassVar[str]
    """Its name in `fused_beit.kernels.operators()`."""
    outputs: ClassVar[tuple[str, ...]] = ("output",)
    directions: ClassVar[tuple[str, ...]] = DIRECTIONS
    constant: ClassVar[tuple[str, ...]] = ()
    """Tensors that get no gradient though they are floating point."""
    variants: ClassVar[dict[str, Any]] = {}
    """Variant of the specification -> which `outputs` and `leaves` it has."""
    letters: ClassVar[dict[str, str]]
    """Letter of a size in tables and plots -> its field or property."""

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by their letters."""
        return {letter: getattr(self, name) for letter, name in self.letters.items()}

    def __str__(self) -> str:
        sizes = ", ".join(f"{letter} {size}" for letter, size in self.shape.items())
        return f"{self.operator} {self.name}: {sizes}, {str(self.dtype).removeprefix('torch.')}"

    @abstractmethod
    def flops(self, direction: str) -> int:
        """FLOPs that the work demands, whatever a provider does: 2 a multiply-add."""

    @abstractmethod
    def bytes(self, direction: str) -> int:
        """Bytes that must move, each tensor once in each of the two directions."""

    def floor(self, direction: str, limits: Mapping[str, Any]) -> float:
        """Seconds that the machine's limits allow at best; forward and backward are two passes, each with its floor."""
        if direction == BOTH:
            return self.floor(FORWARD, limits) + self.floor(BACKWARD, limits)
        flops_per_s = limits["flops_per_s_in"].get(str(self.dtype).removeprefix("torch."), limits["flops_per_s"])
        return max(self.bytes(direction) / limits["bytes_per_s"], self.flops(direction) / flops_per_s)

    @abstractmethod
    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of the operator by name."""

    @abstractmethod
    def call(self, impl: str) -> Function:
        """The public operator by one of its implementations, as a function of the tensors alone."""

    def specification(self, variant: str) -> Function:
        """What results are held to. `variant` names other work than the case's, which bounds do; "" is the case's."""
        assert not variant, f"{self.operator} has no variant {variant!r}"
        return self.call("reference")

    def arranged(self, found: Outputs, inputs: "Inputs") -> Outputs:
        """Results in the form in which they are compared."""
        return found

    def inputs(self, device: torch.device) -> "Inputs":
        return Inputs(self, device)

    def plain(self, inputs: Any) -> "Work":
        """The work of the specification."""
        return work_by(inputs, self.specification(""))

    def references(self, inputs: Any) -> Any:
        """What providers are held to: an object with `inputs`, `pictures` and `check`, as `References` below."""
        return References(inputs)


class Inputs:
    """Tensors of a case, made once for all providers; those that get a gradient are leaves."""

    def __init__(self, case: Case, device: torch.device, tensors: dict[str, Tensor] | None = None) -> None:
        self.case, self.device = case, device
        self.tensors = case.tensors(device) if tensors is None else tensors
        """Arguments of the operator by name."""
        self.leaves = {
            name: tensor.requires_grad_()
            for name, tensor in self.tensors.items()
            if BOTH in case.directions and tensor.is_floating_point() and name not in case.constant
        }
        self._grad_outs: dict[tuple[Any, ...], Tensor] = {}

    def double(self) -> "Inputs":
        """The same numbers in float64."""
        tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        return Inputs(self.case, self.device, wide)

    def grad_out(self, number: int, output: Tensor) -> Tensor:
        """The gradient that output `number` gets: the same random numbers, exact in the case's dtype, for everyone."""
        key = (number, output.shape, output.dtype)
        if key not in self._grad_outs:
            generator = torch.Generator().manual_seed(100 + number)
            values = torch.randn(output.shape, generator=generator).to(output.device, self.case.dtype)
            self._grad_outs[key] = values.to(output.dtype)
        return self._grad_outs[key]


@dataclass(frozen=True)
class Work:
    """One provider's work on the inputs of a case."""

    case: Case
    call: Callable[[], Any]
    """Gives a tensor, or several in the order of `outputs`."""
    outputs: tuple[str, ...]
    leaves: dict[str, Tensor]
    """What gets a gradient, by name."""
    grad_out: Callable[[int, Tensor], Tensor]
    """The gradient of an output, by its number."""
    arrange: Callable[[Outputs], Outputs] = dict
    """Brings results into the form of the reference."""
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Holds while it runs, forward and backward."""
    plan: str = ""
    """Kernels and tiles, where they are ours."""

    def forward(self) -> Any:
        with self.around():
            return self.call()

    def backward(self, output: Any) -> tuple[Tensor | None, ...]:
        with self.around():
            return self._grads(output)

    def _grads(self, output: Any, *, allow_unused: bool = False) -> tuple[Tensor | None, ...]:
        ends = [(o, self.grad_out(i, o)) for i, o in enumerate(as_tuple(output)) if o.requires_grad]
        outputs, grads = zip(*ends, strict=True)
        return torch.autograd.grad(outputs, tuple(self.leaves.values()), grads, allow_unused=allow_unused)

    def both(self) -> tuple[Any, tuple[Tensor | None, ...]]:
        output = self.forward()
        return output, self.backward(output)

    def alone(self) -> Any:
        """The forward where no gradient will be asked for."""
        with torch.no_grad():
            return self.forward()

    def run(self, direction: str) -> Run:
        """A new run, to be timed."""
        if direction == BACKWARD:
            return Staged(self.forward, self.backward)
        if direction == BOTH:
            return lambda: self.both()
        # Some operators make their gradients in the forward, so that it is timed as in evaluation.
        return (lambda: self.forward()) if BACKWARD in self.case.directions else (lambda: self.alone())

    def results(self) -> Outputs:
        """All that is checked, in the shapes of the reference."""
        output, grads = self.both() if self.leaves else (self.forward(), ())
        found = {name: part.detach() for name, part in zip(self.outputs, as_tuple(output), strict=True)}
        found |= {f"grad {name}": grad for name, grad in zip(self.leaves, grads, strict=True)}
        return self.arrange(found)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def work_by(
    inputs: Inputs,
    function: Function,
    *,
    outputs: tuple[str, ...] | None = None,
    leaves: tuple[str, ...] | None = None,
    **options: Any,
) -> Work:
    """The work of calling `function` with the tensors of a case.

    outputs, leaves: names of what it gives and of what it has gradients for, where they are not the case's
    """
    case = inputs.case
    named = {name: inputs.leaves[name] for name in (inputs.leaves if leaves is None else leaves)}
    return Work(
        case,
        lambda: function(**inputs.tensors),
        case.outputs if outputs is None else outputs,
        named,
        inputs.grad_out,
        arrange=lambda found: case.arranged(found, inputs),
        **options,
    )


class References:
    """Outputs and gradients of eager torch in the dtype of the inputs, and of the same in float64."""

    pictures: int | None = None
    """How many pictures the results are checked on, where they are not all."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.found: dict[str, tuple[Outputs, Outputs]] = {}

    def check(self, name: str, found: Outputs, variant: str) -> dict[str, float]:
        """The relative errors of what a provider found. Raises AssertionError where one breaks the house's rule."""
        if variant not in self.found:
            specified = self.inputs.case.specification(variant)
            parts = {"outputs": None, "leaves": None} | self.inputs.case.variants.get(variant, {})
            eager, exact = (work_by(inputs, specified, **parts) for inputs in (self.inputs, self.inputs.double()))
            self.found[variant] = eager.results(), exact.results()
        eager, exact = self.found[variant]
        assert found.keys() == exact.keys(), f"{name} gives {', '.join(found)}, and not {', '.join(exact)}"
        return self.compare(name, found, alike(eager, found), exact)

    def compare(self, name: str, found: Outputs, eager: Outputs, exact: Outputs) -> dict[str, float]:
        """The relative errors. Raises AssertionError where one breaks the house's rule."""
        return check(name, found, eager, exact, self.inputs.case.dtype)


def alike(eager: Outputs, found: Outputs) -> Outputs:
    """Eager torch's results in the dtypes of what a provider found: it is held to what eager torch has in there."""
    return {key: eager[key].to(found[key].dtype) for key in found}
