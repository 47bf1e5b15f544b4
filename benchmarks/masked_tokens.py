"""The four operators of masked pictures, to be timed.

B pictures, P patches, M masked and V visible ones of each, D channels. Bytes: each row of D numbers that must be read
or written, once in each direction; positions and what is per channel are left out. What peers need beside the
positions, such as a mask, is made before and not timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_beit.kernels import embed_tokens, gather_masked, keep_visible, restore_tokens
from fused_beit.kernels.testing import (
    embed_tokens_inputs,
    gather_masked_inputs,
    keep_visible_inputs,
    restore_tokens_inputs,
)

from .cases import BACKWARD, BOTH, FORWARD, Case, Function, Inputs, Work, work_by
from .providers import COMPILED, OURS_FIRST, PEER, REFERENCE, Operator, Provider

EPS = 1e-6


@dataclass(frozen=True)
class MaskedCase(Case):
    """`num_slots` patches of each picture are masked, for keep_visible and restore_tokens visible."""

    batch: int
    num_patches: int
    width: int
    num_slots: int

    letters = {"B": "batch", "P": "num_patches", "D": "width", "M": "num_slots"}  # noqa: RUF012

    def rows(self, direction: str) -> int:
        """Rows of D numbers read and written."""
        raise NotImplementedError

    def bytes(self, direction: str) -> int:
        if direction == BOTH:
            return self.bytes(FORWARD) + self.bytes(BACKWARD)
        return self.rows(direction) * self.width * self.dtype.itemsize

    def made(self, make: Callable[..., dict[str, Tensor | None]], device: torch.device) -> dict[str, Tensor]:
        made = make(self.batch, self.num_patches, self.width, self.num_slots, dtype=self.dtype, device=device)
        return {name: tensor for name, tensor in made.items() if tensor is not None}


class EmbedCase(MaskedCase):
    """[B, P, D] -> [B, P+1, D] with CLS, mask tokens and positions."""

    operator = "embed_tokens"

    def rows(self, direction: str) -> int:
        """Forward: patches that are not masked, all tokens, positions. Backward: the same gradients, and zeros."""
        patches, tokens = self.batch * self.num_patches, self.batch * (self.num_patches + 1)
        unmasked = patches - self.batch * self.num_slots
        return (unmasked if direction == FORWARD else patches) + tokens + self.num_patches + 1

    def flops(self, direction: str) -> int:
        """One addition an element; in the backward sums over pictures, and over masked patches."""
        passes = {FORWARD: 1, BACKWARD: 1, BOTH: 2}[direction]
        masked = 0 if direction == FORWARD else self.num_slots
        return (passes * (self.num_patches + 1) + masked) * self.batch * self.width

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        return self.made(embed_tokens_inputs, device)

    def call(self, impl: str) -> Function:
        return partial(embed_tokens, impl=impl)


class GatherCase(MaskedCase):
    """[B, P+1, D] -> [B*M, D]: masked rows through LayerNorm."""

    operator = "gather_masked"

    def rows(self, direction: str) -> int:
        """Forward: masked rows in and out. Backward: their gradients and themselves, and a gradient of every token."""
        masked = self.batch * self.num_slots
        return 2 * masked if direction == FORWARD else 2 * masked + self.batch * (self.num_patches + 1)

    def flops(self, direction: str) -> int:
        """LayerNorm's additions and multiplications."""
        return {FORWARD: 7, BACKWARD: 14, BOTH: 21}[direction] * self.batch * self.num_slots * self.width

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        made = gather_masked_inputs(
            self.batch, self.num_patches + 1, self.width, self.num_slots, dtype=self.dtype, device=device
        )
        return {name: tensor for name, tensor in made.items() if tensor is not None}

    def call(self, impl: str) -> Function:
        return partial(gather_masked, eps=EPS, impl=impl)


@dataclass(frozen=True)
class VisibleCase(MaskedCase):
    letters = {"B": "batch", "P": "num_patches", "D": "width", "V": "num_slots"}  # noqa: RUF012

    def flops(self, direction: str) -> int:
        """One addition for each row that gets a position; in the backward sums over pictures."""
        return {FORWARD: 1, BACKWARD: 1, BOTH: 2}[direction] * self.rows_with_position() * self.width

    def rows_with_position(self) -> int:
        raise NotImplementedError


class KeepCase(VisibleCase):
    """[B, P, D] -> [B, V+1, D]: CLS and the visible patches, positions added."""

    operator = "keep_visible"

    def rows_with_position(self) -> int:
        return self.batch * (self.num_slots + 1)

    def rows(self, direction: str) -> int:
        """Forward: visible patches in, visible tokens out, positions. Backward: their gradients, and zeros."""
        visible, tokens = self.batch * self.num_slots, self.batch * (self.num_slots + 1)
        return (visible if direction == FORWARD else self.batch * self.num_patches) + tokens + self.num_patches + 1

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        return self.made(keep_visible_inputs, device)

    def call(self, impl: str) -> Function:
        return partial(keep_visible, impl=impl)


class RestoreCase(VisibleCase):
    """[B, V+1, D] -> [B, P+1, D]: visible patches in their places, mask tokens elsewhere, positions added."""

    operator = "restore_tokens"

    def rows_with_position(self) -> int:
        return self.batch * (self.num_patches + 1)

    def rows(self, direction: str) -> int:
        """Visible tokens, all tokens and positions; in the backward their gradients."""
        return self.batch * (self.num_slots + 1) + self.batch * (self.num_patches + 1) + self.num_patches + 1

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        return self.made(restore_tokens_inputs, device)

    def call(self, impl: str) -> Function:
        return partial(restore_tokens, num_patches=self.num_patches, impl=impl)


def mask_of(positions_BM: Tensor, num_patches: int) -> Tensor:
    """bool [B, P], as BEiT's published code takes it."""
    masked_BP = torch.zeros(len(positions_BM), num_patches, dtype=torch.bool, device=positions_BM.device)
    return masked_BP.scatter(1, positions_BM, True)


def order_to_restore(visible_positions_BV: Tensor, num_patches: int) -> Tensor:
    """int64 [B, P], as MAE's published code takes it: the place of each patch behind the visible ones."""
    hidden_BP = mask_of(visible_positions_BV, num_patches).logical_not()
    rest = hidden_BP.nonzero()[:, 1].reshape(len(visible_positions_BV), -1)
    return torch.cat([visible_positions_BV, rest], dim=1).argsort(dim=1)


def embed_by_mask(inputs: Inputs) -> Work:
    """Mask tokens by multiplication with the mask, CLS concatenated, positions added, as BEiT's published code does."""
    mask_BP1 = mask_of(inputs.tensors["masked_positions"], inputs.case.num_patches)[:, :, None]

    def embed(
        patches: Tensor, mask_token: Tensor, cls_token: Tensor, pos_embed: Tensor, masked_positions: Tensor
    ) -> Tensor:
        weight = mask_BP1.type_as(mask_token)
        patches = patches * (1 - weight) + mask_token * weight
        return torch.cat([cls_token.expand(len(patches), 1, -1), patches], dim=1) + pos_embed

    return work_by(inputs, embed)


def gather_after_norm(inputs: Inputs) -> Work:
    """LayerNorm of all tokens, then the masked ones by a boolean mask, as BEiT's published code does."""
    positions_BM = inputs.tensors["masked_positions"]
    mask_BP = mask_of(positions_BM, inputs.case.num_patches)
    # A mask gives the patches in ascending order and not in that of the positions.
    first = torch.arange(len(positions_BM), device=positions_BM.device)[:, None] * positions_BM.shape[1]
    places = (positions_BM.argsort(dim=1).argsort(dim=1) + first).flatten()

    def gather(x: Tensor, masked_positions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)[:, 1:][mask_BP]

    work = work_by(inputs, gather)
    order = torch.empty_like(places)
    order[places] = torch.arange(len(places), device=places.device)
    grad_out = work.grad_out

    def in_order(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return found | {"output": found["output"][places]}

    return replace(work, arrange=in_order, grad_out=kept(lambda number, output: grad_out(number, output)[order]))


def kept(make: Callable[[int, Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
    """Gradients made once, so that making them is not timed."""
    made: dict[int, Tensor] = {}

    def get(number: int, output: Tensor) -> Tensor:
        if number not in made:
            made[number] = make(number, output)
        return made[number]

    return get


def keep_by_gather(inputs: Inputs) -> Work:
    """Positions added to all patches, then the visible ones gathered, as MAE's published code does."""

    def keep(patches: Tensor, cls_token: Tensor, pos_embed: Tensor, visible_positions: Tensor) -> Tensor:
        patches = patches + pos_embed[1:]
        index = visible_positions[:, :, None].expand(-1, -1, patches.shape[2])
        visible = torch.gather(patches, dim=1, index=index)
        return torch.cat([(cls_token + pos_embed[0]).expand(len(patches), 1, -1), visible], dim=1)

    return work_by(inputs, keep)


def restore_by_order(inputs: Inputs) -> Work:
    """Mask tokens behind the visible ones, gathered into place, as MAE's published code does."""
    num_patches = inputs.case.num_patches
    restore_BP = order_to_restore(inputs.tensors["visible_positions"], num_patches)

    def restore(x: Tensor, mask_token: Tensor, pos_embed: Tensor, visible_positions: Tensor) -> Tensor:
        hidden = mask_token.expand(len(x), num_patches + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = torch.gather(patches, dim=1, index=restore_BP[:, :, None].expand(-1, -1, x.shape[2]))
        return torch.cat([x[:, :1], patches], dim=1) + pos_embed

    return work_by(inputs, restore)


def operator(case: type[MaskedCase], written_out: str, peer: Provider, num_slots: int) -> Operator:
    """Base, large and small cases of one of the four."""
    base = case("base", 128, 196, 768, num_slots)
    cpu = case("cpu", 8, 196, 768, num_slots, dtype=torch.float32)
    return Operator(
        case.operator,
        {**OURS_FIRST, written_out: peer, **REFERENCE, **COMPILED},
        (base, replace(base, name="large", width=1024)),
        (cpu,),
        (case("tiny", 2, 9, 16, 3), case("tiny-fp32", 16, 49, 384, 19, dtype=torch.float32)),
        (replace(base, batch=2, num_patches=9, width=48, num_slots=4, dtype=torch.float16, rehearsal=True),),
        written_out,
    )


BEIT, MAE = 75, 49  # masked patches of BEiT, visible ones of MAE
OPERATORS = (
    operator(EmbedCase, "by-mask", Provider(PEER, "multiplied with a mask, as BEiT's code", embed_by_mask), BEIT),
    operator(GatherCase, "after-norm", Provider(PEER, "all normed, then chosen, as BEiT's", gather_after_norm), BEIT),
    operator(KeepCase, "by-gather", Provider(PEER, "all with positions, then gathered, as MAE's", keep_by_gather), MAE),
    operator(RestoreCase, "by-order", Provider(PEER, "concatenated and gathered, as MAE's", restore_by_order), MAE),
)
