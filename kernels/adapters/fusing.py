"""fuse(model): the attention of a model that exists already, done by this library; and unfuse(model)."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..impl import AUTO, Impl, Resolved, resolve
from ..rel_pos_attention.plan import HEAD_DIM_STEP, LARGEST_HEAD_DIM
from .fused import Fused, Fusion, fused_class, qualified_name, table_impl, why_other_forward
from .timm import TIMM
from .transformers import TRANSFORMERS

TEMPLATES = {template.source: template for template in (*TIMM, *TRANSFORMERS)}


@dataclass
class FuseReport:
    """What `fuse` replaced, and what not and why. Its text is made to be printed."""

    resolved: dict[str, Resolved]
    """What `impl` means on each of the model's device types."""
    replaced: list[tuple[str, str]] = field(default_factory=list)
    """Names of modules, and what they are."""
    kept: list[tuple[str, str, str]] = field(default_factory=list)
    """Names of modules that were left as they are, their classes, and why."""

    def __str__(self) -> str:
        lines = [f"impl on {device}: {found.impl.value} ({found.reason})" for device, found in self.resolved.items()]
        for kind in dict.fromkeys(kind for _, kind in self.replaced):
            lines.append(f"replaced {_named([name for name, found in self.replaced if found == kind])}: {kind}")
        for group in dict.fromkeys(entry[1:] for entry in self.kept):
            cls, why = group
            lines.append(f"kept {_named([entry[0] for entry in self.kept if entry[1:] == group])}: {cls}, {why}")
        return "\n".join(lines)


def _named(names: list[str]) -> str:
    names = [name or "the model itself" for name in names]
    return names[0] if len(names) == 1 else f"{len(names)}, {names[0]} to {names[-1]}"


def fuse(model: nn.Module, *, impl: str | Impl = AUTO) -> FuseReport:
    """Do the attention of a model by this library's operators, in place, and say what was replaced.

    Served are the classes in docs/kernels.md, of timm and transformers, as far as they compute exactly
    softmax(scale * q k^T + bias + mask) v; all else of the model stays as it is. Parameters, state dict, hooks and
    `isinstance` stay too, and the model can be copied, pickled and compiled. Fuse before torch.compile.

    impl: as for `rel_pos_attention`; it holds for all replaced modules. A second call may name another one.

    A replaced module raises RuntimeError, with the reason, for what it cannot serve exactly: attention dropout in
    training, output_attentions=True, a causal or head mask, a mask that differs by both picture and head.
    Raises ImplUnavailable where `impl` cannot run on the model's devices, ValueError where nothing can be replaced;
    the model is then unchanged.
    """
    request = str(impl)
    devices = sorted({tensor.device.type for tensor in (*model.parameters(), *model.buffers())} - {"meta"})
    report = FuseReport({device: resolve("rel_pos_attention", request, device) for device in devices})
    places: list[str | None] = [*devices] or [None]  # None for a model on the meta device
    for place in places:
        resolve("attention", request, place)
        resolve("expand_table", table_impl(request), place)

    chosen: list[tuple[Any, type[Fused]]] = []
    for name, module in model.named_modules():
        cls = type(module).original if isinstance(module, Fused) else type(module)
        template = TEMPLATES.get(qualified_name(cls))
        why = _why_not(module, cls, template, report)
        if why is not None:
            if isinstance(module, Fused):
                why = f"{why}; it stays as it was fused before, with impl={module.fusion.impl!r}"
            report.kept.append((name, qualified_name(cls), why))
        elif template is not None:
            report.replaced.append((name, template.kind))
            chosen.append((module, template))
    if not any(template.head_dim_of(module) for module, template in chosen):
        raise ValueError(_nothing(report))
    for module, template in chosen:
        module.fusion = Fusion(request, template.window_of(module))
        if not isinstance(module, Fused):
            module.__class__ = fused_class(template, type(module))
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Give every module that `fuse` replaced its own class and forward back, in place. -> the model"""
    for module in model.modules():
        if isinstance(module, Fused):
            _check_own_class(module)
            del module.fusion
            object.__setattr__(module, "__class__", type(module).original)
    return model


def _check_own_class(module: Fused) -> None:
    if "original" not in type(module).__dict__:
        raise RuntimeError(
            f"the class of a fused {module.kind} was changed since, to {qualified_name(type(module))}; undo that first"
        )


def _why_not(module: Any, cls: type, template: type[Fused] | None, report: FuseReport) -> str | None:
    """Why a module is left as it is; None for one that can be replaced, and for one that is no attention."""
    if template is None:
        for base in cls.__mro__[1:]:
            if qualified_name(base) in TEMPLATES:
                return f"a subclass of {qualified_name(base)}, whose forward may be another"
        return "not a class that is known here" if cls.__name__.endswith("Attention") else None
    if isinstance(module, Fused):
        _check_own_class(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the module itself"
    why = why_other_forward(template, cls) or template.why_not(module)
    if why is not None:
        return why
    for child in template.not_called:
        found = getattr(module, child)
        if found._forward_hooks or found._forward_pre_hooks:
            return f"a hook on its {child} would not be called"
    dropout = template.dropout_of(module)
    if dropout > 0 and module.training:
        return f"attention dropout of {dropout} in training is not served"
    head_dim = template.head_dim_of(module)
    uses_triton = any(found.impl is Impl.TRITON for found in report.resolved.values())
    if uses_triton and head_dim is not None and (head_dim % HEAD_DIM_STEP or head_dim > LARGEST_HEAD_DIM):
        return (
            f"impl='triton' takes heads of a multiple of {HEAD_DIM_STEP} channels, at most {LARGEST_HEAD_DIM}, and "
            f"they have {head_dim}"
        )
    return None


def _nothing(report: FuseReport) -> str:
    found = "".join(f"\n  {name}: {cls}, {why}" for name, cls, why in report.kept) or " no attention that is known here"
    served = "".join(f"\n  {source}" for source in TEMPLATES)
    return f"fuse: nothing was replaced; found:{found}\nserved are, and not their subclasses:{served}"
