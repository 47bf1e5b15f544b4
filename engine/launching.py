"""The command that starts a pre-training, or goes on with one, as a shell is given it."""

import shlex
from collections.abc import Sequence

from .command_line import options_of
from .config import Settings


def launch_command(options: Sequence[str], *, ranks: int, ranks_a_machine: int) -> str:
    """`pretrain.py` with these options, in so many ranks; HOSTS, a file, is to be filled in for several machines."""
    launcher = f"deepspeed --num_gpus {ranks}" if ranks <= ranks_a_machine else "deepspeed --hostfile HOSTS"
    launcher = "python" if ranks == 1 else launcher
    return f"{launcher} engine/pretrain.py {shlex.join(options)}"


def resume_command(settings: Settings, done: int, *, ranks: int, ranks_a_machine: int) -> str:
    """The command that goes on with a run from its newest checkpoint, of `done` steps, with as many ranks."""
    train = settings.train
    if train.stop_at_step is not None and train.stop_at_step <= done:  # which would end the next session at once
        settings = settings.model_copy(update={"train": train.model_copy(update={"stop_at_step": None})})
    options = [*options_of(settings), "--resume", "auto"]
    return launch_command(options, ranks=ranks, ranks_a_machine=ranks_a_machine)
