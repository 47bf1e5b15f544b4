"""Our engine in this process, without a launcher: DeepSpeed's process group of one, started once."""

import atexit
import functools

import torch

from fused_beit.engine.config import Settings, TrainSettings
from fused_beit.engine.training import zero


@functools.cache
def runtime() -> zero.Runtime:
    """Where the engine runs; the number of threads stays as it is.

    On a CPU the C library then keeps freed memory (engine/cpu.py), for every provider of this process alike: it cannot
    do so for one alone.
    """
    started = zero.start(Settings(train=TrainSettings(threads=torch.get_num_threads())))
    atexit.register(zero.stop)
    return started
