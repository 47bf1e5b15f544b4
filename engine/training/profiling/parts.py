"""Marks around the parts of a model, put there from outside and taken away again: the model knows nothing of them.

Forward, a hook before and after each module that is a part; the innermost counts. Backward, a hook before each node of
the graph: autograd numbers its nodes as the forward pass makes them, so a node belongs to the part that was running
when its number was given. What the backward pass computes again (`train.recompute`) runs those modules, and so counts
to their parts, backward. Collectives are parts wherever they are called.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from fused_beit.kernels import RelativePositionBias

from ...models.encoder import Attention, Block, Encoder, FinalNorm, Mlp, ResidualNorm
from ...models.mim import MaskedImageModel, TokenHead
from .. import zero
from ..timeline import Part, Phase, Timeline

PARTS: dict[type[nn.Module], Part] = {
    MaskedImageModel: Part.EMBED,  # what is not in a module of its own: pixels normalised, paths drawn, targets picked
    Encoder: Part.EMBED,  # and here: mask tokens, CLS and positions; PatchEmbed needs no mark of its own
    RelativePositionBias: Part.ATTENTION,
    Attention: Part.ATTENTION,
    Mlp: Part.MLP,
    Block: Part.NORMS,  # what is in none of its modules: the masked rows of the residual stream, in the last one
    ResidualNorm: Part.NORMS,
    nn.LayerNorm: Part.NORMS,
    FinalNorm: Part.NORMS,
    TokenHead: Part.HEAD,
}


class Node(Protocol):
    """What autograd's nodes have."""

    next_functions: tuple[tuple["Node | None", int], ...]

    def _sequence_nr(self) -> int: ...

    def register_prehook(self, hook: Callable[[Any], None]) -> Any: ...


class Marks:
    """Marks of one model on one timeline; `backward`: also while autograd runs."""

    def __init__(self, timeline: Timeline, *, backward: bool) -> None:
        self.timeline = timeline
        self.backward = backward
        self._outside: list[Part] = []
        self._numbers: list[int] = []
        """Of the first node that autograd made in each part that was entered, in order."""
        self._entered: list[Part] = []
        self._ends_with_graph = False

    def begin(self, part: Part) -> None:
        self._outside.append(self._enter(part))

    def end(self) -> None:
        self._enter(self._outside.pop())

    def _enter(self, part: Part) -> Part:
        if self.timeline.phase == Phase.FORWARD:
            self._numbers.append(torch.autograd._get_sequence_nr())
            self._entered.append(part)
        return self.timeline.enter_part(part)

    def on_module(self, module: nn.Module, part: Part) -> list[RemovableHandle]:
        """Mark a module's forward; returns what takes the marks away."""

        def before(module: nn.Module, args: Any) -> None:
            if self.backward or self.timeline.phase != Phase.BACKWARD:
                self.begin(part)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self.backward or self.timeline.phase != Phase.BACKWARD:
                self.end()

        # Ahead of ZeRO's own hooks, so that what they do for a module counts to it.
        return [
            module.register_forward_pre_hook(before, prepend=True),
            module.register_forward_hook(after, always_call=True),
        ]

    def on_graph(self, loss: Tensor) -> None:
        """Mark the nodes of the graph that leads to `loss`, which is walked once, now."""
        self.timeline.enter_part(Part.MARKING)
        seen: set[Node] = set()
        waiting: list[Node] = [loss.grad_fn] if loss.grad_fn is not None else []  # type: ignore[list-item]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            part = self.part_of(node._sequence_nr())
            if part is not None:
                node.register_prehook(partial(self._before_node, part))
            waiting += [after for after, _ in node.next_functions if after is not None]
        self._numbers.clear()
        self._entered.clear()
        self._ends_with_graph = False
        self.timeline.enter_part(Part.OTHER)

    def part_of(self, number: int) -> Part | None:
        """The part in which the forward pass made node `number`; None for leaves, which go with the node before."""
        at = bisect_right(self._numbers, number) - 1
        return None if number >= 2**63 or at < 0 else self._entered[at]

    def _before_node(self, part: Part, gradients: Any) -> None:
        if not self._ends_with_graph:  # what DeepSpeed does after the last node is not that node's
            self._ends_with_graph = True
            Variable._execution_engine.queue_callback(self._after_graph)
        self.timeline.enter_part(part)

    def _after_graph(self) -> None:
        self.timeline.enter_part(Part.OTHER)


@contextmanager
def marked(engine: zero.ZeroEngine, timeline: Timeline, *, backward: bool = True) -> Iterator[None]:
    """Tell parts apart on `timeline` in the steps that `engine` does inside the `with` block.

    backward: also in what autograd runs, on a GPU in a thread of its own: the graph's nodes, modules that are called
              again, and the collectives, most of which DeepSpeed starts from there.
    """
    marks = Marks(timeline, backward=backward)
    with ExitStack() as stack:
        for module in engine.module.modules():
            if type(module) in PARTS:
                for handle in marks.on_module(module, PARTS[type(module)]):
                    stack.callback(handle.remove)
        if backward:
            original = engine.backward

            @wraps(original)
            def backward_of(loss: Tensor) -> None:
                marks.on_graph(loss)
                original(loss)

            stack.enter_context(replaced(engine, "backward", backward_of))
            collectives = zero.collectives()
            for name in filter(partial(hasattr, collectives), zero.COLLECTIVES):
                stack.enter_context(replaced(collectives, name, communicating(marks, getattr(collectives, name))))
        yield


def communicating(marks: Marks, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, marked as communication; of a collective that runs in the background, its start and the wait for it."""

    @wraps(call)
    def marked_call(*args: Any, **kwargs: Any) -> Any:
        before = marks.timeline.enter_part(Part.COMMUNICATION)
        try:
            result = call(*args, **kwargs)
        finally:
            marks.timeline.enter_part(before)
        return MarkedWork(marks, result) if hasattr(result, "wait") else result

    return marked_call


class MarkedWork:
    """A collective under way, with its wait marked."""

    def __init__(self, marks: Marks, work: Any) -> None:
        self._work = work
        self.wait = communicating(marks, work.wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the `with` block; its class is left alone."""
    own = vars(owner)
    before = own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
