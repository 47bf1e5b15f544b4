"""What a rank's memory holds whatever the pictures of a pass: weights, gradients, optimizer and DeepSpeed's buffers.

n parameters, R ranks, b numbers in a bucket. The formulas are those of DeepSpeed 0.19.8; tests/test_memory.py holds
them to what a step of the engine allocates on one and two ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Settings
from ..models.encoder import hidden_width
from ..models.flops import parameter_count

FP32 = 4
BUCKET = 500_000_000
"""DeepSpeed's own, where its configuration gives none: numbers reduced at a time."""
PREFETCH_BUCKET = 50_000_000
SUB_GROUP = 1_000_000_000
"""Numbers that DeepSpeed updates at a time at stage 3."""


@dataclass(frozen=True)
class StateMemory:
    """Bytes of weights, gradients and the optimizer's state: what does not depend on the pictures of a pass."""

    held: Mapping[str, float]
    """At any moment of a step."""
    summed: float
    """Gradients of the passes before, from the second pass of a step on."""
    early: float
    """Gradients that are there as soon as the backward pass starts."""
    gathered: float
    """Weights of other ranks, from the forward pass to the end of the backward pass."""
    reduced: Mapping[str, float]
    """While gradients are reduced and weights updated, in place of `summed` and `early`."""
    host: float
    """In the host's memory."""


def offloads(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed keeps the optimizer's state on the host."""
    return (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"


def state_memory(settings: Settings, vocab_size: int, config: Mapping[str, Any], *, world_size: int) -> StateMemory:
    """Bytes of weights, gradients, optimizer and DeepSpeed's buffers at a ZeRO stage.

    AdamW keeps two fp32 moments; weights and gradients are fp32 too, under autocast as well. ZeRO (Rajbhandari et al.
    2020, section 5) divides the moments by R at stage 1, the gradients at 2 and the weights at 3; DeepSpeed keeps an
    fp32 copy of the part of the weights that a rank updates. Buckets are allocated in full, however small the model:
    two at stages 1 and 2, where one is filled while the other is reduced, one at 3.

        stage   weights   fp32 copy   moments   buckets   gradients of passes before   as the backward starts
        0       4n        -           8n        -         4n                           -
        1       4n        4n/R        8n/R      8b        4n                           4n/R
        2       4n        4n/R        8n/R      8b        4n/R                         4n/R
        3       4n/R      4n/R        8n/R      4b        4n/R, at any time            -

    The last column is of the rank that has the last blocks; at stage 2 it is there in any pass, for DeepSpeed's
    gradients of a pass are in reference cycles, which go only when Python collects garbage. To reduce gradients, stage
    0 of several ranks copies all of them into one buffer, 1 and 2 a bucket at a time; to update weights, stage 3 copies
    a rank's part of the gradients. At stage 3 all weights of these models, and the next bucket of them, stay gathered
    until the end of the backward pass: stage3_max_live_parameters is 1e9.

    Of a JSON, the stage, offload and the sizes of buckets are read. Stages 1 and 2 are counted with overlap_comm and
    contiguous_gradients, as in ds_configs/, stage 3 with DeepSpeed's own stage3_max_live_parameters and
    stage3_max_reuse_distance, and offload at stage 3 with that of the weights too; a JSON that sets them otherwise
    takes another amount: less without overlap_comm, or where fewer weights stay gathered.

    Offload moves copy and moments to the host, and a rank's gradients: there it keeps them beside a buffer for the new
    weights, and a sum of them from the second pass of a step on; at stage 3 the weights' own part too. At 1 and 2, a
    gradient of the largest size passes through a buffer on either side.
    """
    zero = config["zero_optimization"]
    stage, accumulates = int(zero["stage"]), int(config["gradient_accumulation_steps"]) > 1
    parameters = parameter_count(settings.model, settings.data.image_size, vocab_size)
    whole, part = float(FP32 * parameters), FP32 * parameters / world_size
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    on_host = offloads(config)
    if stage == 0:
        held = {"weights": whole, "optimizer state": 2 * whole}
        reduced = {"gradients": whole}
        if world_size > 1:
            reduced["buckets"] = float(FP32 * min(parameters, BUCKET))
        return StateMemory(held, whole if accumulates else 0.0, 0.0, 0.0, reduced, 0.0)
    if stage == 3:
        held = {"buckets": float(FP32 * bucket)}
        if not on_host:
            held |= {"weights": part, "optimizer state": 3 * part, "gradients": part}
        prefetched = min(int(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)), parameters)
        gathered = whole + FP32 * prefetched if world_size > 1 or on_host else 0.0
        reduced = {} if on_host else {"working tensors": min(part, float(FP32 * SUB_GROUP))}
        return StateMemory(held, 0.0, 0.0, gathered, reduced, 6 * part if on_host else 0.0)
    held = {"weights": whole, "buckets": 2.0 * FP32 * bucket}
    own = host = 0.0
    if on_host:
        model = settings.model
        sizes = (3 * model.width, hidden_width(model), vocab_size, 3 * model.patch_size**2)
        largest = float(FP32 * model.width * max(sizes))
        held["buckets"] += largest
        host = (6 if accumulates else 5) * part + largest
    else:
        held["optimizer state"] = 3 * part
        own = part
    summed = 0.0
    if accumulates:
        summed = whole if stage == 1 else own
    reduced = {"gradients": summed + own, "working tensors": float(FP32 * min(bucket, parameters))}
    return StateMemory(held, summed, own, 0.0, reduced, host)
