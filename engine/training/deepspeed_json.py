"""Reading and completing a DeepSpeed JSON: one owner per setting. Does not import deepspeed.

The JSON owns what only DeepSpeed knows (buckets, overlap, offload details). Batch, accumulation, clipping, precision,
optimizer and schedule belong to `Settings`, which are filled in here.
"""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from ..config import Settings
from ..errors import UserError

DEEPSPEED_OWNS = frozenset(
    {
        "aio",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensorboard",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)

# Key of the JSON -> the setting of ours that owns it.
SETTINGS_OWN = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optim.clip_grad",
    "torch_autocast": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "optimizer": "optim.*",
    "scheduler": "optim.*",
}


def resolve_json(
    settings: Settings, *, stage: int, micro_batch: int, accumulation: int, world_size: int, bf16: bool
) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a run.

    Args:
        settings: the run's settings.
        stage: ZeRO stage, as `resolve_stage` gives it.
        micro_batch: pictures in one forward pass of a rank.
        accumulation: forward passes of a rank in an optimizer step.
        world_size: number of ranks.
        bf16: whether the forward pass runs under bf16 autocast.

    Raises:
        UserError: for an unknown key, or one that a setting of ours owns with another value.
    """
    config, source = read_json(settings, stage)
    ours: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # The empty list keeps gradients in fp32 between ranks, so that sharding does not change them.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "gradient_clipping": settings.optim.clip_grad or 0.0,
    }
    for key, value in config.items():
        if key in SETTINGS_OWN and value not in ("auto", ours.get(key)):
            raise UserError(
                f"{source} sets {key} = {json.dumps(value)}, but {SETTINGS_OWN[key]} of the run owns it; "
                f"remove {key} from the JSON and set {SETTINGS_OWN[key]}."
            )
    if stage == 0:  # the guarded optimizer clips, see optim.py
        ours["gradient_clipping"] = 0.0
    config["zero_optimization"] = config.get("zero_optimization", {}) | {"stage": stage}
    defaults = {"zero_allow_untested_optimizer": True, "steps_per_print": None}
    return defaults | config | ours


def resolve_stage(settings: Settings, world_size: int) -> int:
    """The ZeRO stage: `zero.stage`, or what `zero.config` says, or 0 for one rank and 1 for more.

    Raises:
        UserError: when both are given and differ.
    """
    if settings.zero.config is None:
        if settings.zero.stage is not None:
            return settings.zero.stage
        return 1 if world_size > 1 or settings.zero.offload else 0
    config, source = read_json(settings, 0)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if settings.zero.stage not in (None, stage):
        raise UserError(
            f"zero.stage = {settings.zero.stage}, but zero_optimization.stage in {source} is {stage}; "
            f"make them equal or leave zero.stage out."
        )
    if stage not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage in {source} is {stage!r}; allowed are 0, 1, 2 and 3.")
    if settings.zero.offload:
        raise UserError(
            f"zero.offload is for the built-in DeepSpeed configurations; put offload_optimizer into {source} instead."
        )
    return int(stage)


def batch_plan(settings: Settings, world_size: int) -> tuple[int, int]:
    """Pictures in a forward pass of one rank, and forward passes in an optimizer step.

    Raises:
        UserError: when the global batch cannot be divided so.
    """
    total = settings.train.global_batch
    if total % world_size:
        near = total // world_size * world_size or world_size
        raise UserError(
            f"train.global_batch = {total} cannot be divided among {world_size} ranks; "
            f"set it to a multiple of {world_size}, such as {near}."
        )
    share = total // world_size
    micro_batch = settings.train.micro_batch or share
    if share % micro_batch:
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - micro_batch))
        raise UserError(
            f"train.micro_batch = {micro_batch} does not divide the {share} pictures each of {world_size} rank(s) has "
            f"of train.global_batch = {total}; set it to a divisor of {share}, such as {nearest}."
        )
    return micro_batch, share // micro_batch


def read_json(settings: Settings, stage: int) -> tuple[dict[str, Any], str]:
    """The user's JSON or the built-in one of the stage, with the name errors call it by."""
    if settings.zero.config is not None:
        source = str(settings.zero.config)
        try:
            text = Path(source).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"zero.config = {source} cannot be read ({error}); give a DeepSpeed JSON.") from None
    else:
        source = f"zero{stage}{'_offload' if settings.zero.offload else ''}.json"
        text = (resources.files("fused_beit.ds_configs") / source).read_text()
    try:
        config = json.loads(text, object_pairs_hook=lambda pairs: without_duplicates(pairs, source))
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{source} must hold one JSON object; see ds_configs/ for examples.")
    known = DEEPSPEED_OWNS | SETTINGS_OWN.keys()
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}."
            raise UserError(f"{source} has the unknown top-level key {key!r}, which DeepSpeed would ignore; {hint}")
    if not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"zero_optimization in {source} must be an object; see ds_configs/ for examples.")
    check_zero(config.get("zero_optimization", {}), source)
    return config, source


def check_zero(zero: dict[str, Any], source: str) -> None:
    """Raise `UserError` for values of `zero_optimization` that cannot be counted with."""
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size"):
        size = zero.get(key, 0)
        if isinstance(size, bool) or not isinstance(size, int | float) or size < 0 or size % 1:
            raise UserError(
                f"zero_optimization.{key} in {source} is {json.dumps(size)}; give a whole number of 0 or more, "
                f"such as 50000000."
            )
    for key in ("offload_optimizer", "offload_param"):
        value = zero.get(key)
        if value is not None and not isinstance(value, dict):
            raise UserError(
                f"zero_optimization.{key} in {source} is {json.dumps(value)}; give an object such as "
                f'{{"device": "cpu"}}, or leave it out.'
            )


def without_duplicates(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise UserError(f"{source} gives {key!r} twice; keep one.")
        values[key] = value
    return values
