"""DeepSpeed: process group, ZeRO engine, sharded checkpoints. The only module that imports deepspeed."""

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import Settings
from ..cpu import keep_freed_memory
from ..errors import UserError
from . import checkpoint
from .deepspeed_json import batch_plan, resolve_json, resolve_stage
from .optim import GuardedAdamW, parameter_groups

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns and guesses

import deepspeed
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils.tensor_fragment import fragment_address

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # after which a rank gives up on one that failed alone
FIRST_RANK_TIMEOUT = timedelta(hours=6)  # while rank 0 trains a tokenizer, or checks the sums of large checkpoints

# What DeepSpeed's own files hold besides tensors and plain values.
DEEPSPEED_TYPES = [LossScaler, fragment_address]


@dataclass(frozen=True)
class Runtime:
    """Where this process runs."""

    rank: int
    world_size: int
    local_world_size: int
    """Ranks on this machine."""
    device: torch.device
    threads: int
    """CPU threads of this process."""


def start(settings: Settings) -> Runtime:
    """Join the process group, started by `deepspeed`, `torchrun` or nothing at all, and choose device and threads."""
    quiet_deepspeed()
    if dist.is_initialized():
        return runtime(settings)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    else:
        # Its shared-memory op serves inference only, costs a compiler and leaks memory in /dev/shm.
        setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    if "RANK" not in os.environ:  # no launcher: a group of one needs neither address nor port
        backend = get_accelerator().communication_backend_name()
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    try:
        deepspeed.init_distributed(timeout=COLLECTIVE_TIMEOUT, verbose=False)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the ranks cannot meet at {address} ({str(error).splitlines()[0]}); where another run has that port, give "
            f"this one its own, `deepspeed --master_port PORT`."
        ) from None
    return runtime(settings)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def runtime(settings: Settings) -> Runtime:
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    threads = settings.train.threads or max(1, len(os.sched_getaffinity(0)) // local_world_size)
    torch.set_num_threads(threads)
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    return Runtime(dist.get_rank(), dist.get_world_size(), local_world_size, device, threads)


def quiet_deepspeed() -> None:
    """Let DeepSpeed speak of errors only; the run's header says the rest."""
    warnings.filterwarnings("ignore", r"`torch.distributed.*` is deprecated", FutureWarning)
    if "DS_LOG_LEVEL" not in os.environ:
        for name in ("DeepSpeed", "deepspeed"):
            logging.getLogger(name).setLevel(logging.ERROR)


def stop() -> None:
    """Leave the process group together; ranks that end one by one may abort at exit."""
    if dist.is_initialized():
        dist.barrier()
        patient_group.cache_clear()
        dist.destroy_process_group()


def barrier() -> None:
    dist.barrier()


def reduce_sum(values: Tensor) -> Tensor:
    """Sum of `values` over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def on_first_rank(action: Callable[[], T]) -> T:
    """Do something on rank 0 alone; its result, or its `UserError`, reaches every rank."""
    box: list[Any] = [None, None]
    group = patient_group() if dist.get_world_size() > 1 else None
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except UserError as error:
            box[1] = str(error)
    if group is not None:
        torch.distributed.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise UserError(box[1])
    result: T = box[0]
    return result


@functools.cache
def patient_group() -> torch.distributed.ProcessGroup | None:
    """All ranks, to wait in until rank 0 has done something long."""
    return torch.distributed.new_group(timeout=FIRST_RANK_TIMEOUT)


def from_all_ranks(value: Tensor) -> list[Tensor]:
    """Equally shaped CPU tensors of all ranks, in rank order."""
    device = get_accelerator().current_device_name() if torch.cuda.is_available() else "cpu"
    gathered = [torch.empty_like(value, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, value.to(device))
    return [tensor.cpu() for tensor in gathered]


# Methods of `collectives()` through which DeepSpeed and `reduce_sum` exchange tensors in a step.
COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor",
    "all_gather", "all_gather_coalesced", "all_to_all_single",
)  # fmt: skip


def collectives() -> Any:
    """DeepSpeed's communication backend, whose methods all its collectives call."""
    return importlib.import_module("deepspeed.comm.comm").cdb


def union(found: dict[str, str]) -> dict[str, str]:
    """The dictionaries of all ranks in one."""
    gathered: list[Any] = [found]
    if dist.get_world_size() > 1:
        gathered = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(gathered, found)
    return {name: value for part in gathered for name, value in part.items()}


def deepspeed_config(settings: Settings, world_size: int, *, bf16: bool) -> dict[str, Any]:
    """The configuration that DeepSpeed gets, checked.

    Raises:
        UserError: for a key or value that ours or DeepSpeed's checks refuse.
    """
    stage = resolve_stage(settings, world_size)
    micro_batch, accumulation = batch_plan(settings, world_size)
    config = resolve_json(
        settings, stage=stage, micro_batch=micro_batch, accumulation=accumulation, world_size=world_size, bf16=bf16
    )
    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValidationError as errors:
        first = errors.errors(include_url=False)[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise UserError(f"zero.config: DeepSpeed refuses {name} = {first['input']!r}: {first['msg']}.") from None
    return config


def without_enums(value: Any) -> Any:
    """A state with the values of its enums in their places: Python 3.11.0 to 3.11.3 pickle an enum as code to run."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: without_enums(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_enums(inner) for inner in value)
    return value


class CheckedCheckpointEngine(TorchCheckpointEngine):
    """Writes DeepSpeed's files durably and loads them without unpickling code."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        state_dict = without_enums(state_dict)
        checkpoint.replace_durably(Path(path), lambda temporary: torch.save(state_dict, temporary))

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(DEEPSPEED_TYPES):
            return torch.load(path, map_location=map_location, weights_only=True)


class ZeroEngine:
    """A model under DeepSpeed, with the optimizer its ZeRO stage needs.

    Args:
        model: module whose forward returns `(loss, accuracy)`.
        settings: the run's settings.
        runtime: where this process runs.
        bf16: run the forward pass under bf16 autocast.
    """

    def __init__(self, model: nn.Module, settings: Settings, runtime: Runtime, *, bf16: bool):
        self.stage = resolve_stage(settings, runtime.world_size)
        self.bf16 = bf16
        self.compiled = settings.train.compile
        self.runtime = runtime
        self.micro_batch, self.accumulation = batch_plan(settings, runtime.world_size)
        config = deepspeed_config(settings, runtime.world_size, bf16=bf16)
        optim = settings.optim
        groups = parameter_groups(model.to(runtime.device), optim.weight_decay)
        adamw: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
        optimizer: torch.optim.Optimizer
        if self.stage == 0:
            optimizer = GuardedAdamW(groups, optim.clip_grad, **adamw)
        else:
            optimizer = torch.optim.AdamW(groups, fused=True, **adamw)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if self.stage == 0 and runtime.world_size == 1:
            self.engine.enable_backward_allreduce = False  # it would copy all gradients there and back to change none
        if self.compiled and self.stage == 3:
            keep_hooks_from_compiler(model)
        self.engine.checkpoint_engine = CheckedCheckpointEngine()
        self._skipped_in_a_row = self._most_in_a_row = 0

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)

    def autocast(self) -> torch.autocast:
        """The precision of training, for forward passes beside it."""
        return torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=self.bf16)

    def backward(self, loss: Tensor) -> None:
        entered = len(FWD_MODULE_STACK)
        self.engine.backward(loss)
        # What is computed again ends as soon as it may, within modules that stage 3 would count as entered for ever.
        del FWD_MODULE_STACK[entered:]

    def step(self) -> None:
        """Count a forward pass; at the last one of an optimizer step, update the weights."""
        boundary = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        if boundary and self.stage > 0:
            self._skipped_in_a_row = 0 if self.engine.was_step_applied() else self._skipped_in_a_row + 1
            self._most_in_a_row = max(self._most_in_a_row, self._skipped_in_a_row)

    def grad_norm(self) -> Tensor | float:
        """Norm of the last gradient before clipping; on the device at stage 0."""
        if isinstance(self.optimizer, GuardedAdamW):
            return self.optimizer.grad_norm
        return self.engine.get_global_grad_norm() or 0.0

    def skipped(self) -> Tensor | tuple[float, float]:
        """Steps skipped for a gradient that was not finite: in all, and the most in a row."""
        if isinstance(self.optimizer, GuardedAdamW):
            return self.optimizer.skipped[:2]
        return float(self.engine.skipped_steps), float(self._most_in_a_row)

    def save(self, checkpoints: Path, step: int, state: dict[str, Any], facts: dict[str, Any]) -> Path:
        """Write a complete checkpoint; every rank calls this.

        Args:
            checkpoints: folder of all checkpoints.
            step: optimizer steps done.
            state: tensors and plain values to find again on load.
            facts: plain values for the manifest, readable without torch.
        """
        tag = checkpoint.tag_of(step)
        folder = checkpoints / tag
        if self.runtime.rank == 0:
            checkpoint.discard(folder)
        dist.barrier()
        self.engine.save_checkpoint(str(checkpoints), tag=tag, client_state={"run": state}, save_latest=False)
        weights = self.full_state_dict()
        dist.barrier()
        if self.runtime.rank == 0:
            checkpoint.replace_durably(folder / "model.safetensors", lambda path: save_file(weights, path))
            shape = {"world_size": self.runtime.world_size, "stage": self.stage}
            checkpoint.seal(folder, {"step": step, **shape, **facts})
        dist.barrier()
        return folder

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from a checkpoint that `checkpoint.read_manifest` found sound; returns its `state`."""
        path, state = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise UserError(f"{folder} could not be loaded by DeepSpeed; resume from another checkpoint.")
        return dict(state["run"])

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights in fp32 on the host of rank 0 (empty on other ranks); every rank calls this."""
        parameters = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            if self.runtime.rank != 0:
                return {}
            return {
                name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).clone()
                for name, tensor in self.module.state_dict().items()
            }


def keep_hooks_from_compiler(model: nn.Module) -> None:
    """Have torch.compile run the hooks by which stage 3 gathers weights as they are.

    Compiled, they are so anew for each module and mode, until torch warns that it gives up on them.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                hooks[key] = torch.compiler.disable(hook)


def refuse_other_shape(manifest: dict[str, Any], *, folder: Path, world_size: int, stage: int) -> None:
    """Raise `UserError` when DeepSpeed cannot read this checkpoint's shards here."""
    saved_world, saved_stage = manifest["world_size"], manifest["stage"]
    same_layout = saved_stage == stage or {saved_stage, stage} == {1, 2}
    if saved_stage > 0 and saved_world != world_size:
        raise UserError(
            f"{folder} was written by {saved_world} rank(s) at ZeRO stage {saved_stage} and this run has {world_size}; "
            f"resume with {saved_world} rank(s)."
        )
    if not same_layout:
        raise UserError(
            f"{folder} was written at ZeRO stage {saved_stage} and this run has stage {stage}; "
            f"resume with --zero.stage {saved_stage}."
        )
