"""What a step of the real engine holds, allocates and sends, beside what the formulas say of the same step."""

import json
from pathlib import Path
from typing import Any

import torch
from allocations import held_storages, peak_bytes
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_beit.engine.config import Settings
from fused_beit.engine.models import MaskedImageModel
from fused_beit.engine.tokenizer.flops import TokenizerSize
from fused_beit.engine.training import memory, zero, zero_memory

IMAGE_SIZE, MASKED, VOCAB = 64, 20, 1000
BUCKET = 500_000
"""Numbers in a bucket: less than the model has, so that several are needed."""
NO_TOKENIZER = TokenizerSize(VOCAB, 4, 1, 1)
"""The engine's model alone is run here; a tokenizer too small to count stands for it."""


def deepspeed_json(folder: Path, stage: int, *, offload: bool) -> Path:
    zero_optimization: dict[str, Any] = {"stage": stage}
    if stage:
        zero_optimization |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": BUCKET}
    if stage == 3:
        zero_optimization |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    if offload:
        zero_optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if stage == 3:
            zero_optimization["offload_param"] = {"device": "cpu", "pin_memory": False}
    path = folder / f"zero{stage}{offload}{zero.dist.get_rank() if zero.dist.is_initialized() else 0}.json"
    path.write_text(json.dumps({"zero_optimization": zero_optimization, "zero_force_ds_cpu_optimizer": False}))
    return path


def measure(
    folder: Path,
    world_size: int,
    *,
    stage: int,
    accumulation: int,
    micro_batch: int,
    bf16: bool,
    offload: bool,
    recompute: str = "none",
) -> dict[str, float]:
    """Bytes held between steps, at most in a step, and sent in a step; measured, and by formula.

    On a CPU what is offloaded is counted too.
    """
    settings = Settings.model_validate(
        {
            "model": {"width": 256, "depth": 4, "num_heads": 4, "patch_size": 8},
            "data": {"image_size": IMAGE_SIZE},
            "mask": {"num_patches": MASKED},
            "train": {
                "global_batch": micro_batch * world_size * accumulation,
                "micro_batch": micro_batch,
                "recompute": recompute,
                "threads": 1,
            },
            "zero": {"config": deepspeed_json(folder, stage, offload=offload)},
        }
    )
    runtime = zero.start(settings)
    before = held_storages().keys()
    torch.manual_seed(0)
    model = MaskedImageModel(settings.model, IMAGE_SIZE, VOCAB, normalize="inception")
    model.encoder.recompute(settings.train.recompute)
    engine = zero.ZeroEngine(model, settings, runtime, bf16=bf16)
    batch = (
        torch.zeros(micro_batch, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8),
        torch.arange(MASKED).repeat(micro_batch, 1),
        torch.zeros(micro_batch, settings.num_patches, dtype=torch.int64),
        torch.arange(micro_batch),
    )

    def step() -> None:
        for _ in range(accumulation):
            loss, _ = engine(*batch, 0)
            engine.backward(loss)
            engine.step()

    step()
    held = sum(count for address, count in held_storages().items() if address not in before)
    step_peak = peak_bytes(step)
    with Sent() as sent:
        step()

    run = memory.Pass(micro_batch, bf16, VOCAB, "plain", NO_TOKENIZER, 8)
    config = zero.deepspeed_config(settings, world_size, bf16=bf16)
    state = zero_memory.state_memory(settings, VOCAB, config, world_size=world_size)
    # The buckets of stages 1 and 2 are there within a step alone.
    between = sum(count for name, count in state.held.items() if stage == 3 or name != "buckets")
    predicted = memory.rank_memory(settings, run, config, world_size=world_size)
    return {
        "held": held,
        "held by formula": between + state.host,
        "peak": held + step_peak,
        "peak by formula": predicted.total + predicted.host,
        "sent": sent.bytes,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
    }


class Sent(TorchDispatchMode):
    """While entered, adds up what a rank sends through collectives, if each is a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func.overloadpacket.__name__ != "barrier":
            times, position = RINGS[func.overloadpacket.__name__]
            ranks = distributed.get_world_size()
            whole = sum(leaf.nbytes for leaf in tree_leaves(args[position]) if isinstance(leaf, torch.Tensor))
            self.bytes += times * whole * (ranks - 1) / ranks
        return func(*args, **(kwargs or {}))


# Collectives of torch: how often a ring passes the whole tensor on, and which argument that tensor is.
RINGS = {
    "allreduce_": (2, 0),
    "allgather_": (1, 0),
    "_allgather_base_": (1, 0),
    "allgather_into_tensor_coalesced_": (1, 0),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_": (1, 1),
    "broadcast_": (1, 0),
    "reduce_": (1, 0),
}
