"""What a pass computes and moves, operator by operator, counted in one that runs on tensors without memory.

Below autograd and autocast torch calls its operators one by one. Each is noted with its FLOPs and with the bytes of the
tensors that it reads and writes, each tensor once. The tensors are fake ones on the CPU; the operators are those of a
GPU, as `pretending` has it. Two small batches and at most three blocks are counted: all else lies on straight lines.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fused_beit.kernels import Impl, resolve
from fused_beit.kernels._triton.target import pretending

from ..config import ModelSettings, Recompute
from ..models.encoder import impl_besides_attention
from ..models.mim import MaskedImageModel
from ..tokenizer.dvae import DiscreteVAE
from ..tokenizer.flops import TokenizerSize

ARCH = "sm_90"
"""What is counted is the same for any."""
IDLE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "_unsafe_view",
    "scalar_tensor", "promote_types", "check_positions",
}  # fmt: skip
"""Operators that start nothing on a GPU, besides views."""


LINEARS = ("qkv", "proj", "fc1", "fc2", "lm_head")
NORMS = ("norm", "norm1", "norm2")
RECOMPUTED = "computed again"
"""Line of the budget of what `train.recompute` repeats."""


class Operators(NamedTuple):
    """Operators of one module that do the same sort of work."""

    part: str
    """Line of the budget."""
    kind: str
    """"product", "convolution", "attention" (fused), or "" where only memory is moved."""
    backward: bool
    half: bool
    """Whether they multiply in half precision."""
    own: bool
    """Whether they are this project's kernels, started through Python."""
    starts: float
    """How many there are."""
    flops: float
    bytes: float


class PassShape(NamedTuple):
    """What a pass of the model depends on, besides the number of its images."""

    model: ModelSettings
    image_size: int
    num_masked: int
    vocab_size: int
    impl: str
    """As `train.impl` asks for it."""
    bf16: bool
    compiled: bool = False
    """Whether the blocks are compiled."""


class _Noted(NamedTuple):
    """An operator as it was called. `reads` and `writes`: bytes of its tensors, by storage."""

    name: str
    own: bool
    module: str
    backward: bool
    half: bool
    weight: bool
    """Whether the result has the shape of a weight or a bias."""
    flops: float
    reads: dict[int, float]
    writes: dict[int, float]

    @property
    def bytes(self) -> float:
        return sum(self.reads.values()) + sum(self.writes.values()) + self.again

    @property
    def again(self) -> float:
        """Read a second time: the gradients of a norm's weights are sums over rows, made by a kernel of their own."""
        return sum(self.reads.values()) if self.name == "native_layer_norm_backward" else 0.0


def _attention_flops(qkv: Tensor, products: int) -> int:
    """FLOPs of so many products of [N, N] and [N, D] for each head: qkv [B, N, 3, H, D]."""
    num_images, num_tokens, _, num_heads, head_dim = qkv.shape
    return products * 2 * num_images * num_heads * num_tokens**2 * head_dim


def _torch_flops(count: Callable[..., int], args: Sequence[Any], out: Any) -> int:
    return count(*args, out_val=out)


_own = torch.ops.fused_beit
FLOPS: dict[Any, Callable[[Sequence[Any], Any], int]] = {
    **{packet: partial(_torch_flops, count) for packet, count in flop_registry.items()},
    _own.attention_fwd: lambda args, out: _attention_flops(args[0], 2),
    _own.attention_bwd: lambda args, out: _attention_flops(args[1], 5),
    _own.token_loss_fwd: lambda args, out: 6 * args[0].numel() * args[1].shape[0],  # the logits, both gradients
    _own.nearest_code_fwd: lambda args, out: 2 * args[0].numel() * args[1].shape[0],
}
BESIDES: dict[Any, Callable[[Sequence[Any], Any], float]] = {
    # cuDNN's convolution has no bias: torch adds it afterwards.
    torch.ops.aten.convolution: lambda args, out: 0.0 if args[2] is None else 2.0 * _num_bytes(out),
    # Logits are read and overwritten by their gradient, which is read for that of the bias.
    _own.token_loss_fwd: lambda args, out: 3.0 * args[0].shape[0] * args[1].shape[0] * args[0].element_size(),
}
"""Bytes that an operator with products moves in kernels beside them."""


def _num_bytes(tensor: Tensor) -> float:
    """Those that are there: a tensor that is expanded is read once."""
    count = float(tensor.element_size())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


class _Notes(TorchDispatchMode):
    """Notes the operators of one pass, each with the module that it belongs to, in both directions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: list[_Noted] = []
        self.backward = False
        self._open = [""]
        self._numbers, self._modules = [0], [""]
        """Of the first node that autograd made since a module was entered or left, and which that was."""
        self._storages: list[Any] = []
        """Kept, so that no two have one address."""
        self._last = ""
        self._weights = {weight.flatten(1).shape for weight in model.parameters() if weight.dim() > 1}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, name: str) -> None:
        self._open.append(name)
        self._note_module()

    def _leave(self) -> None:
        self._open.pop()
        self._note_module()

    def _note_module(self) -> None:
        if not self.backward:
            self._numbers.append(torch.autograd._get_sequence_nr())
            self._modules.append(self._open[-1])

    def _module(self) -> str:
        """A node of autograd belongs to the module that was running when it was made; leaves have no number."""
        node = torch._C._current_autograd_node() if self.backward else None
        if len(self._open) > 1 or not self.backward:
            return self._open[-1]
        if node is None:  # gradients of one tensor are added up after the node that made the last of them
            return self._last
        number = node._sequence_nr()
        return self._last if number >= 2**63 else self._modules[bisect_right(self._numbers, number) - 1]

    def _by_storage(self, leaves: Any) -> dict[int, float]:
        sizes: dict[int, float] = {}
        seen = set()
        for tensor in tree_leaves(leaves):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages.append(storage)
                part = (storage._cdata, tensor.storage_offset(), tensor.shape)
                if part not in seen:
                    seen.add(part)
                    sizes[storage._cdata] = sizes.get(storage._cdata, 0.0) + _num_bytes(tensor)
        return sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        if func.is_view or name in IDLE or func.namespace not in ("aten", "fused_beit"):
            return out
        self._last = self._module()
        reads, writes = self._by_storage((args, kwargs)), self._by_storage(out)
        if name == "copy_":
            reads = self._by_storage(args[1])
        flops = float(FLOPS[packet](args, out)) if packet in FLOPS else 0.0
        half = any(isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 for leaf in tree_leaves(args))
        own = func.namespace == "fused_beit"
        weight = isinstance(out, Tensor) and (out.dim() == 1 or out.shape in self._weights)
        noted = _Noted(name, own, self._last, self.backward, half, weight, flops, reads, writes)
        self.found.append(noted)
        if packet in BESIDES and (moved := BESIDES[packet](args, out)):
            self.found.append(noted._replace(name="", own=False, flops=0.0, reads={0: moved}, writes={}))
        return out


def counted_impl(impl: str) -> Impl:
    """By which attention `train.impl` is counted: xformers and FlexAttention by torch's, which is fused as they are."""
    asked = resolve("rel_pos_attention", "auto", "cuda").impl if impl == "auto" else Impl(impl)
    return asked if asked in (Impl.REFERENCE, Impl.TRITON) else Impl.SDPA


def _note_pass(shape: PassShape, num_images: int) -> list[_Noted]:
    """The operators of a forward and a backward pass."""
    with torch.device("meta"):
        model = MaskedImageModel(
            shape.model, shape.image_size, shape.vocab_size, normalize="inception", impl=counted_impl(shape.impl).value
        )
    num_patches = model.encoder.grid**2
    with FakeTensorMode(allow_non_fake_inputs=True), pretending(ARCH):
        model.to_empty(device="cpu")
        images = torch.empty(num_images, 3, shape.image_size, shape.image_size, dtype=torch.uint8)
        positions = torch.empty(num_images, shape.num_masked, dtype=torch.int64)
        token_ids = torch.empty(num_images, num_patches, dtype=torch.int64)
        with _Notes(model) as notes:
            with torch.autocast("cpu", torch.bfloat16, enabled=shape.bf16):
                loss = model(images, positions, token_ids, torch.empty(num_images, dtype=torch.int64), 0).loss
            notes.backward = True
            loss.backward()
    return notes.found


def _part(noted: _Noted) -> str:
    """The line of the budget that an operator of the model belongs to."""
    name, module = noted.name, noted.module
    leaf = module.rpartition(".")[2]
    if noted.flops and "attention" not in name:
        return "products, backward" if noted.backward else "products, forward"
    if "gelu" in name:
        return "GELU"
    if leaf in LINEARS and name == "sum":
        return "gradients of the linears' biases"
    if leaf in LINEARS and name == "_to_copy" and noted.weight:
        return "gradients to fp32" if noted.backward else "weights to bf16"
    if ".attn" in module or "rel_pos_bias" in module:
        return "attention"
    if leaf in NORMS or module.startswith("encoder.blocks"):
        return "residual and norm"
    return "head and loss" if module == "lm_head" else "images, patches, paths"


def _kind(noted: _Noted) -> str:
    if not noted.flops:
        return ""
    if "attention" in noted.name:
        return "attention"
    return "convolution" if "convolution" in noted.name else "product"


def _unit(noted: _Noted) -> tuple[str, bool] | None:
    """Operators of one unit that follow each other become one kernel if blocks are compiled; None: not this one."""
    in_blocks = noted.module.startswith("encoder.blocks.") or noted.module == "encoder.norm"
    if noted.flops or noted.own or not in_blocks:
        return None
    return ".".join(noted.module.split(".")[:3]), noted.backward


def _compiled(found: Sequence[_Noted]) -> Iterator[tuple[_Noted, float]]:
    """Kernels and their bytes with blocks compiled: between two products, or kernels of our own, one pass over memory.

    It reads each tensor from outside once and writes what is used later. A sum over rows is a pass of its own, which
    makes what it sums again. That is what torch's Inductor does at best: assumed, not read from its code.
    """
    last_read = {storage: at for at, noted in enumerate(found) for storage in noted.reads}
    end = 0
    for unit, group in groupby(found, key=_unit):
        run = list(group)
        end += len(run)
        if unit is None:
            yield from ((noted, noted.bytes) for noted in run)
            continue
        moved: dict[int, float] = {}
        made: dict[int, float] = {}
        for noted in run:
            moved |= {storage: size for storage, size in noted.reads.items() if storage not in {*moved, *made}}
            made |= {storage: size for storage, size in noted.writes.items() if storage not in moved}
        moved |= {storage: size for storage, size in made.items() if last_read.get(storage, end) >= end}
        yield max(run, key=lambda noted: noted.bytes), sum(moved.values())
        for noted in run:
            again = noted.again
            if noted.name == "sum":
                again = sum(size for storage, size in noted.reads.items() if storage in made)
            if again:
                yield noted, again


def _gathered(
    kernels: Iterable[tuple[_Noted, float]], part: Callable[[_Noted], str], *, depth: int, recompute: Recompute
) -> list[Operators]:
    """Added up by module and sort. Of more than three blocks the second stands for all but the first and the last."""
    found: dict[tuple[Any, ...], list[float]] = {}

    def add(noted: _Noted, moved: float, part: str, *, backward: bool) -> None:
        times = depth - 2 if depth > 3 and noted.module.startswith("encoder.blocks.1.") else 1
        key = (noted.module, part, _kind(noted), backward, noted.half, noted.own)
        sums = found.setdefault(key, [0.0, 0.0, 0.0])
        for at, value in enumerate((1, noted.flops, moved)):
            sums[at] += times * value

    for noted, moved in kernels:
        add(noted, moved, part(noted), backward=noted.backward)
        if not noted.backward and _is_recomputed(noted, recompute):
            add(noted, moved, RECOMPUTED, backward=True)
    return [Operators(*key[1:], *sums) for key, sums in found.items()]


def _is_recomputed(noted: _Noted, recompute: Recompute) -> bool:
    """Whether the backward pass computes it again: all that comes before the last tensor that it needs."""
    module = noted.module
    if recompute == "mlp":
        return ".mlp" in module and not (module.endswith("fc2") and noted.flops > 0)
    first_norm = "encoder.blocks.0.norm1"  # made before the blocks
    return (
        recompute == "block"
        and (module.startswith("encoder.blocks.") or module == "encoder.norm")
        and module != first_norm
    )


def _on_a_line(
    num_images: int, first: tuple[int, list[Operators]], second: tuple[int, list[Operators]]
) -> Iterator[Operators]:
    """Of so many images, through what two batches have."""
    (at_first, some), (at_second, more) = first, second
    along = (num_images - at_first) / (at_second - at_first)
    for one, other in zip(some, more, strict=True):
        sums = (a + along * (b - a) for a, b in zip(one[-3:], other[-3:], strict=True))
        yield Operators(*one[:-3], *sums)


@lru_cache(maxsize=32)
def _kernels(shape: PassShape, num_images: int) -> list[tuple[_Noted, float]]:
    """What a pass starts, and the bytes that each moves."""
    found = _note_pass(shape, num_images)
    return list(_compiled(found)) if shape.compiled else [(noted, noted.bytes) for noted in found]


@lru_cache(maxsize=256)
def pass_operators(shape: PassShape, num_images: int, recompute: Recompute = "none") -> list[Operators]:
    """The operators of a forward and a backward pass, the optimizer's excepted.

    Raises ImplUnavailable where the implementation does not take the model's shape.
    """
    depth = shape.model.depth
    shape = shape._replace(model=shape.model.model_copy(update={"depth": min(depth, 3)}))
    counts = [(size, _gathered(_kernels(shape, size), _part, depth=depth, recompute=recompute)) for size in (2, 3)]
    return list(_on_a_line(num_images, *counts))


@lru_cache(maxsize=16)
def _count_tokens(tokenizer: TokenizerSize, token_side: int, num_images: int, impl: str, bf16: bool) -> list[Operators]:
    with torch.device("meta"):
        model = DiscreteVAE(*tokenizer, output_channels=0)
    model.impl = impl
    with FakeTensorMode(allow_non_fake_inputs=True), pretending(ARCH):
        model.to_empty(device="cpu")
        images = torch.empty(num_images, 3, token_side, token_side, dtype=torch.uint8)
        with _Notes(model) as notes, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model.encode(images)
    kernels = ((noted, noted.bytes) for noted in notes.found)
    part = "tokens, {}".format
    return _gathered(kernels, lambda noted: part("products" if noted.flops else "besides"), depth=1, recompute="none")


@lru_cache(maxsize=256)
def token_operators(
    tokenizer: TokenizerSize, token_side: int, num_images: int, *, impl: str, bf16: bool
) -> list[Operators]:
    """The operators that make the tokens of a batch; `impl` as `train.impl` asks for it."""
    with pretending(ARCH):
        dtype = torch.bfloat16 if bf16 else torch.float32
        impl = resolve("nearest_code", impl_besides_attention(impl), "cuda", dtype).impl.value
    sizes = (16, 32)  # so many that the chunks of nearest_code are about in proportion
    counts = [(size, _count_tokens(tokenizer, token_side, size, impl, bf16)) for size in sizes]
    return list(_on_a_line(num_images, *counts))
