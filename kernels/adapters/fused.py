"""What a fused module is: the module that it was, under a class made from its own, with another forward.

The class is exchanged, and nothing else: parameters, buffers, hooks, names and `isinstance` stay, so a state dict has
the same keys and tensors, and giving the class back gives the original forward back. A class made at run time cannot
be found by its name, so a pickle holds what the class is made from, and a process that loads it makes it again.

B pictures, N tokens, H heads, D channels of a head.
"""

import inspect
import math
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..impl import AUTO, Impl
from ..rel_pos_attention import expand_table, relative_position_index
from ..rel_pos_attention.bias import num_relative_positions


class Fusion(NamedTuple):
    """What fuse decided about one module."""

    impl: str
    window: tuple[int, int] | None = None
    """Of a table whose index is known, so that `expand_table` expands it; None where it is gathered by its index."""


class Fused(nn.Module):
    """Base of the forwards that stand for a library's own. A subclass says for which, and when it may.

    `fuse` asks the static methods about modules that anyone may have changed; what they raise becomes the reason for
    which that module is kept.
    """

    kind: ClassVar[str]
    source: ClassVar[str]
    """Module and name of the class whose forward this is."""
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    """The original's methods that this stands for."""
    may_use: ClassVar[str]
    """The attributes and functions in the code of those methods; another one is a version not known here."""
    must_use: ClassVar[str]
    """Those of them that are in every version."""
    not_called: ClassVar[tuple[str, ...]] = ()
    """Children that the fused forward does not call, so they must do nothing of their own."""

    has_heads: ClassVar[bool] = False
    """Whether it is attention, and not a bias alone."""

    template: ClassVar[type["Fused"]]
    original: ClassVar[type[nn.Module]]
    fusion: Fusion

    @staticmethod
    def head_dim_of(module: Any) -> int | None:
        """Channels of a head; None where it has no heads."""
        return None

    @staticmethod
    def dropout_of(module: Any) -> float:
        """The probability with which attention weights are dropped in training."""
        return 0.0

    @staticmethod
    def why_not(module: Any) -> str | None:
        """Why this one module cannot be served, beyond what holds for all; None when it can."""
        return None

    @staticmethod
    def window_of(module: Any) -> tuple[int, int] | None:
        """The window of its table where the index is the known one."""
        return None

    def refuse(self, why: str) -> NoReturn:
        raise RuntimeError(f"fused {self.kind}: {why}; unfuse(model) gives the original forward back")

    def check_served(self) -> None:
        """Raise RuntimeError where attention weights would be dropped, or where someone waits for them."""
        why = why_not_now(self.template, self)
        if why is not None:
            self.refuse(why)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; torch.fx records it as one node, whatever its tracer takes to be a leaf.

        So its forward may look at shapes, and what is checked there is checked in every run of the traced model.
        """
        proxies = [given for given in (*args, *kwargs.values(), _table_of(self)) if isinstance(given, Proxy)]
        if not proxies:
            return super().__call__(*args, **kwargs)
        tracer: Any = proxies[0].tracer

        def record(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, record, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.template, self.original), self.__getstate__()


_MADE: dict[tuple[type, type], type[Fused]] = {}


def fused_class(template: type[Fused], original: type[nn.Module]) -> type[Fused]:
    """The class of a fused module: the forward of `template`, all else of `original`. One for each pair."""
    if (template, original) not in _MADE:
        members = {"template": template, "original": original, "__module__": template.__module__}
        _MADE[template, original] = type(f"Fused{original.__name__}", (template, original), members)
    return _MADE[template, original]


def _blank(template: type[Fused], original: type[nn.Module]) -> nn.Module:
    """A module without its state, for pickle and copy."""
    why = why_other_forward(template, original)
    if why is not None:
        raise RuntimeError(f"a fused {template.kind} cannot be loaded with the installed version: {why}")
    made = fused_class(template, original)
    return made.__new__(made)


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def why_other_forward(template: type[Fused], original: type[nn.Module]) -> str | None:
    """Why `template` does not stand for this version of a class; None when it does, by the names in its code."""
    used: set[str] = set()
    for name in template.methods:
        method: Any = getattr(original, name, None)
        code = getattr(inspect.unwrap(method), "__code__", None)
        if code is None:
            return f"it has no method {name} written in Python"
        used.update(code.co_names)
    unknown = sorted(used - set(template.may_use.split()))
    if unknown:
        return f"its forward uses {', '.join(unknown)}, which the known versions do not"
    missing = sorted(set(template.must_use.split()) - used)
    return f"its forward does not use {', '.join(missing)}, as the known versions do" if missing else None


def why_not_now(template: type[Fused], module: Any) -> str | None:
    """Why a module cannot be served in the state that it is in: asked by `fuse`, and again in every forward."""
    for name in template.not_called:
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module) or type(child) not in NOTHING_OF_THEIR_OWN:
            return f"its {name} is a {qualified_name(type(child))}, which would not be called"
        if has_hooks(child):
            return f"a hook on its {name} would not be called"
        if "forward" in child.__dict__:
            return f"the forward that was put on its {name} would not be called"
    dropout = template.dropout_of(module)
    return f"attention dropout of {dropout} in training is not served" if dropout > 0 and module.training else None


NOTHING_OF_THEIR_OWN = (nn.Dropout, nn.Identity, nn.Softmax)
"""What a child that is not called may be: a subclass, or what was put around it, may do something more."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module would call something else too.

    DeepSpeed's hooks do not count: at ZeRO stage 3 every module gets some, to gather its parameters; these have none.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not hook.__module__.startswith("deepspeed.") for found in hooks for hook in found.values())


def _table_of(module: Any) -> Any:
    return getattr(module, "relative_position_bias_table", None)


def why_no_table(module: Any) -> str | None:
    """Why a module's table cannot be read; None where it can, and where the module has none."""
    table = _table_of(module)
    if table is None or isinstance(table, Tensor):
        return None
    return f"its relative_position_bias_table is a {qualified_name(type(table))}, and not a tensor"


def known_window(module: Any, cls_token: bool) -> tuple[int, int] | None:
    """The window of a module's table if its index buffer is `relative_position_index` of that window."""
    index = module.relative_position_index
    if index is None or index.is_meta:
        return None
    height, width = module.window_size
    expected = relative_position_index((height, width), cls_token)
    return (int(height), int(width)) if torch.equal(index.cpu().flatten(), expected.flatten()) else None


def dense_bias(module: Any, cls_token: bool) -> Tensor:
    """The bias [H, N, N] of a module with a table and an index buffer, [N, N] or flat."""
    table_RH, fusion = module.relative_position_bias_table, module.fusion
    window = fusion.window
    same = window is not None and window == tuple(module.window_size)
    if same and table_RH.shape[0] == num_relative_positions(window, cls_token):
        return expand_table(table_RH, window, cls_token, impl=table_impl(fusion.impl))
    # Another index, or the window was changed since; autograd sums the gradient as it does for the original.
    index = module.relative_position_index
    num_tokens = math.isqrt(index.numel())
    return table_RH[index.flatten()].unflatten(0, (num_tokens, num_tokens)).permute(2, 0, 1)


def table_impl(impl: str) -> str:
    """The implementation of expand_table that goes with one of attention."""
    return impl if impl == Impl.TRITON else AUTO


def bias_and_mask(module: Fused, added: Tensor | None, q_BHND: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What broadcasts to the scores [B, H, N, N], as a bias [H, N, N] or as a mask [1 or B, 1 or N, N].

    added: numbers to add, or bool with True for keys that count; a number that has a gradient is a bias, and finite
    """
    if added is None:
        return None, None
    if not isinstance(added, Tensor) or added.dim() > 4:
        found = list(added.shape) if isinstance(added, Tensor) else type(added).__name__
        module.refuse(f"a mask must be a tensor that broadcasts to [B, H, N, N], but is {found}")
    _, num_heads, num_tokens, _ = q_BHND.shape
    added = added[(None,) * (4 - added.dim())].expand(-1, -1, -1, num_tokens)
    if added.shape[1] == 1 and not added.requires_grad:
        return None, added[:, 0]
    if added.shape[0] == 1 and added.dtype != torch.bool:
        return added[0].expand(num_heads, num_tokens, num_tokens), None
    module.refuse(
        f"what is added to the scores must be the same for all pictures, or the same for all heads and without a "
        f"gradient, but it is {added.dtype} {list(added.shape)} with requires_grad={added.requires_grad}"
    )
