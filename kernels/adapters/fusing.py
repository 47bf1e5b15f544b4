"""fuse(model): the attention of a model that exists already, done by this library; and unfuse(model)."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..impl import AUTO, Impl, ImplUnavailable, Resolved, resolve
from ..rel_pos_attention.plan import HEAD_DIM_STEP, LARGEST_HEAD_DIM
from .fused import Fused, Fusion, fused_class, qualified_name, table_impl, why_not_now, why_other_forward
from .seen import attention_seen
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
    training, output_attentions=True, a causal or head mask, a mask that differs by both picture and head, a hook on a
    child that is not called.
    Raises ImplUnavailable where `impl` cannot run on the model's devices, ValueError where nothing can be replaced;
    the model is then unchanged.
    """
    request = str(impl)
    report = FuseReport(_resolved(model, request))
    unknown = attention_seen(model, known=_is_known_attention)
    chosen: list[tuple[Any, type[Fused], Fusion]] = []
    for name, module in model.named_modules():
        cls = _own_class(module)
        template = TEMPLATES.get(qualified_name(cls))
        if template is None:
            if name in unknown:
                report.kept.append((name, qualified_name(cls), _why_unknown(cls)))
            continue
        decided = _decided(module, cls, template, report, request)
        if isinstance(decided, Fusion):
            report.replaced.append((name, template.kind))
            chosen.append((module, template, decided))
        else:
            if isinstance(module, Fused):
                decided = f"{decided}; it stays as it was fused before, with impl={module.fusion.impl!r}"
            report.kept.append((name, qualified_name(cls), decided))
    if not any(template.has_heads for _, template, _ in chosen):
        raise ValueError(_nothing(model, report))
    for module, template, fusion in chosen:
        module.fusion = fusion
        if not isinstance(module, Fused):
            module.__class__ = fused_class(template, type(module))
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Give every module that `fuse` replaced its own class and forward back, in place. -> the model

    Raises RuntimeError where the class of one was changed since; the model is then unchanged.
    """
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    for module in fused:
        why = _why_other_class(module)
        if why is not None:
            raise RuntimeError(f"fused {module.kind}: {why}")
    for module in fused:
        del module.fusion
        object.__setattr__(module, "__class__", type(module).original)
    return model


def _own_class(module: nn.Module) -> type:
    return type(module).original if isinstance(module, Fused) else type(module)


def _is_known_attention(module: nn.Module) -> bool:
    template = TEMPLATES.get(qualified_name(_own_class(module)))
    return template is not None and template.has_heads


def _why_other_class(module: nn.Module) -> str | None:
    """Why a fused module cannot be given another class; None where nobody else gave it one."""
    if not isinstance(module, Fused) or "original" in type(module).__dict__:
        return None
    return f"its class was changed since it was fused, to {qualified_name(type(module))}; undo that first"


def _resolved(model: nn.Module, request: str) -> dict[str, Resolved]:
    """What `request` means for attention on each device type of the model."""
    needed = {"rel_pos_attention": request, "attention": request, "expand_table": table_impl(request)}
    for operator, wanted in needed.items():
        resolve(operator, wanted, None)  # an unknown name is refused whatever the device
    devices = sorted({tensor.device.type for tensor in (*model.parameters(), *model.buffers())} - {"meta"})
    for device in devices:
        try:
            for operator, wanted in needed.items():
                resolve(operator, wanted, device)
        except ImplUnavailable as error:
            raise ImplUnavailable(
                f"{error}. The model is on {device}: where it is to run elsewhere, move it first, then fuse it"
            ) from error
    return {device: resolve("rel_pos_attention", request, device) for device in devices}


def _decided(module: Any, cls: type, template: type[Fused], report: FuseReport, request: str) -> Fusion | str:
    """How one module is fused, or why it is kept."""
    try:
        why = _why_not(module, cls, template, report)
        return Fusion(request, template.window_of(module)) if why is None else why
    except Exception as error:  # anyone may have changed the module, and an odd one must not stop the others
        return f"it is not as its class makes it ({type(error).__name__}: {error})"


def _why_not(module: Any, cls: type, template: type[Fused], report: FuseReport) -> str | None:
    """Why a module is left as it is; None for one that can be replaced."""
    replaced = [method for method in template.methods if method in module.__dict__]
    if replaced:
        return f"its {replaced[0]} was replaced on the module itself"
    why = _why_other_class(module) or why_other_forward(template, cls) or template.why_not(module)
    why = why or why_not_now(template, module)
    if why is not None:
        return why
    head_dim = template.head_dim_of(module)
    uses_triton = any(found.impl is Impl.TRITON for found in report.resolved.values())
    if uses_triton and head_dim is not None and (head_dim % HEAD_DIM_STEP or head_dim > LARGEST_HEAD_DIM):
        return (
            f"impl='triton' takes heads of a multiple of {HEAD_DIM_STEP} channels, at most {LARGEST_HEAD_DIM}, and "
            f"they have {head_dim}"
        )
    return None


def _why_unknown(cls: type) -> str:
    for base in cls.__mro__[1:]:
        if qualified_name(base) in TEMPLATES:
            return f"a subclass of {qualified_name(base)}, whose forward may be another"
    return "not a class that is known here"


def _nothing(model: nn.Module, report: FuseReport) -> str:
    found = "".join(f"\n  {name or 'the model itself'}: {cls}, {why}" for name, cls, why in report.kept)
    if not found:
        classes = dict.fromkeys(qualified_name(type(module)) for module in model.modules())
        found = f" no attention among {', '.join(classes)}"
    served = "".join(f"\n  {source}" for source in TEMPLATES)
    return f"fuse: nothing was replaced; found:{found}\nserved are, and not their subclasses:{served}"
