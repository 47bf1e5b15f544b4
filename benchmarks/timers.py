"""How one run is timed, on a CPU by the clock and on a GPU between two events; and the memory that it takes."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
Timer = Callable[[Run], float]


class Staged:
    """Work whose first part, `prepare`, is not timed: a backward after its forward."""

    def __init__(self, first: Callable[[], Any], then: Callable[[Any], Any]) -> None:
        self.first, self.then = first, then
        self.ready: Any = None

    def prepare(self) -> None:
        self.ready = self.first()

    def __call__(self) -> Any:
        ready, self.ready = self.ready, None
        return self.then(ready)


def prepare(run: Run) -> None:
    """The part of a run that is not timed, if it has one."""
    if isinstance(run, Staged):
        run.prepare()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_once(run: Run) -> None:
    prepare(run)
    run()
    synchronize()


def wall_seconds(run: Run) -> float:
    """Seconds of one run by the clock, the device's work included."""
    prepare(run)
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


class EventTimer:
    """Seconds that the GPU takes for a run, with cold caches, and without a wait for the host.

    A kernel of some 50 us takes longer to be called from Python than to run. So the GPU is first made to sleep, long
    enough for the host to have queued all of the run when the first event passes; where it was not long enough, the run
    is repeated with twice the sleep. Between the sleep and the first event other data is read into the L2 cache, all of
    it: what was written before then leaves the cache unmeasured, and nothing waits there to be written back.

    Short work is captured as a CUDA graph and replayed, so that there are no gaps between its kernels either. Runs that
    are compared are timed in the same way: where the fastest of them takes less than `REPLAYED`, all are captured that
    can be.

    Args:
        compared: runs that will be compared. A run that is not among them is compared with none.
    """

    SHORTEST, LONGEST = 3e-4, 2e-2
    CYCLES = 2e9  # a second; at slower clocks the sleep is only longer
    REPLAYED = 1e-4

    def __init__(self, compared: Iterable[Run] = ()) -> None:
        self.compared = list(compared)
        self.other_data = OtherData(2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
        self.sleeps: dict[Run, float] = {}
        self.waits_for_host: set[Run] = set()
        """Runs whose time holds waits for the host, however long the sleep."""
        self.replays: dict[Run, Run | None] = {}
        """Replay of a run, or None where they are long enough or it cannot be captured."""

    def __call__(self, run: Run) -> float:
        if run not in self.replays:
            self.decide(self.compared if run in self.compared else [run])
        return self.between_events(self.replays[run] or run)

    def decide(self, runs: Iterable[Run]) -> None:
        """Capture all of these that can be, if the fastest is short; its time is the median of three, when warm."""
        medians = {}
        for run in runs:
            self.replays[run] = None
            try:
                run_once(run)
                medians[run] = statistics.median(self.between_events(run) for _ in range(3))
            except torch.OutOfMemoryError:
                continue  # raised again, where it is told, when this run is timed
        if min(medians.values(), default=self.REPLAYED) < self.REPLAYED:
            for run in medians:
                self.replays[run] = replay(run)

    def waits(self, run: Run) -> bool:
        """Whether the times of a run hold waits for the host."""
        return (self.replays.get(run) or run) in self.waits_for_host

    def between_events(self, run: Run) -> float:
        while True:
            sleep = self.sleeps.setdefault(run, self.SHORTEST)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            prepare(run)
            torch.cuda.synchronize()
            torch.cuda._sleep(int(sleep * self.CYCLES))
            self.other_data.read()
            start.record()
            run()
            end.record()
            late = start.query()  # the GPU is past the sleep and may have waited
            torch.cuda.synchronize()
            if not late or run in self.waits_for_host:
                return start.elapsed_time(end) / 1e3
            if sleep >= self.LONGEST:
                self.waits_for_host.add(run)
                self.sleeps[run] = self.SHORTEST
            else:
                self.sleeps[run] = 2 * sleep


class OtherData:
    """What takes the place of a run's data in the cache.

    It is read, not written: as many dirty lines as the cache holds would be written back while the run that follows is
    timed, and take 12 to 17 us of an H100's memory (counted).
    """

    def __init__(self, size: int, device: str = "cuda") -> None:
        self.values = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self.largest = torch.zeros((), dtype=torch.float32, device=device)

    def read(self) -> None:
        """All of it, in eager torch, which leaves nothing out though nobody looks at the result: one number."""
        torch.amax(self.values, dim=0, out=self.largest)


def replay(run: Run) -> Run | None:
    """The run as a CUDA graph, its `prepare` as another in the same memory; None where it cannot be captured."""
    pool = torch.cuda.graph_pool_handle()

    def captured(work: Run) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of an empty graph, as that of nothing is, whose time is asked
            with torch.cuda.graph(graph, pool=pool):
                result = work()
        return graph, result

    other, current = torch.cuda.Stream(), torch.cuda.current_stream()
    try:
        # What a first run allocates or compiles must not happen in a capture.
        other.wait_stream(current)
        with torch.cuda.stream(other):
            for _ in range(2):
                prepare(run)
                run()
        current.wait_stream(other)
        if not isinstance(run, Staged):
            graph, _ = captured(run)
            return graph.replay
        first, ready = captured(run.first)
        then, _ = captured(lambda: run.then(ready))
        return Staged(first.replay, lambda nothing: then.replay())
    except RuntimeError:
        torch.cuda.set_stream(current)  # a capture that ends in an error may leave its own behind
        torch.cuda.synchronize()  # raises where the device is broken for all that would follow
        return None


def timed_by(timer: Timer, run: Run) -> str:
    """How a run was timed, for the results."""
    if isinstance(timer, EventTimer):
        return "CUDA graph between events" if timer.replays.get(run) else "events"
    return "clock"


def device_timer(device: torch.device, compared: Iterable[Run] = ()) -> Timer:
    """A timer for work on this device; `compared` are timed in the same way."""
    return EventTimer(compared) if device.type == "cuda" else wall_seconds


def memory(run: Run, device: torch.device) -> dict[str, int]:
    """Bytes that a run takes at its peak above what is there before it, and without its own results; {} on a CPU.

    What `prepare` makes, such as what a forward saves for its backward, counts as there before it.
    """
    if device.type != "cuda":
        run_once(run)
        return {}
    prepare(run)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"peak_bytes": peak, "extra_bytes": peak - sum(tensor.nbytes for tensor in tensors_in(result))}


LONGEST_KERNELS = 15


def host_and_device(run: Run, device: torch.device) -> dict[str, Any]:
    """What the host and the device each take for a run, which the longer of the two bounds; {} on a CPU.

    host_s:      seconds until the host has queued all of it, median of five; it waits where the queue is full
    device_s:    seconds of all kernels together, as CUPTI sees them in one run
    num_kernels: how many they are, copies among them
    kernels:     name -> [how often, seconds in all] of the longest
    """
    if device.type != "cuda":
        return {}
    queued = []
    for _ in range(5):
        prepare(run)
        synchronize()
        start = time.perf_counter()
        run()
        queued.append(time.perf_counter() - start)
    prepare(run)
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        run()
        synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [
        event for event in profiled.key_averages() if event.device_type == on_device and not event.is_user_annotation
    ]
    events.sort(key=lambda event: event.device_time_total, reverse=True)
    longest = {event.key: [event.count, event.device_time_total / 1e6] for event in events[:LONGEST_KERNELS]}
    return {
        "host_s": statistics.median(queued),
        "device_s": sum(event.device_time_total for event in events) / 1e6,
        "num_kernels": sum(event.count for event in events),
        "kernels": longest,
    }


def tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_in(part)] if isinstance(result, (tuple, list)) else []
