"""What bounds a run's speed, from its times; and those times: nothing between two marks is lost."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fused_beit.engine.cpu import RunQueue
from fused_beit.engine.training import loop, timeline
from fused_beit.engine.training.bottleneck import Circumstances, bottleneck
from fused_beit.engine.training.pace import Made, Pace
from fused_beit.engine.training.timeline import Part, Phase, StreamTimeline, Timeline, by_phase

CPU = Circumstances(workers=2, cores=16, threads=None, bf16_untried=False, trains_tokenizer=False)


def pace(pictures=1000, made=None, **seconds):
    """Seconds by the name of the phase; by default two workers that could make 500 pictures a second together."""
    phases = {phase: seconds.get(phase.value, 0.0) for phase in Phase}
    return Pace(pictures, phases, {0: Made(500, 2.0, 2.0), 1: Made(500, 2.0, 2.0)} if made is None else made)


def test_a_starved_run_names_the_workers_rate_the_steps_and_how_many_it_takes():
    said = bottleneck(pace(data=1.0, forward=0.5, backward=0.5), CPU)
    assert said == (
        "Waits 50% of the time for pictures: 2 workers make 500/s, the rest of the step could take 1,000/s; "
        "raise --data.workers to 4."
    )


def test_where_there_are_too_few_cores_smaller_pictures_are_advised():
    few = Circumstances(workers=2, cores=3, threads=None, bf16_untried=False, trains_tokenizer=False)
    said = bottleneck(pace(data=1.0, forward=1.0), few)
    assert "4 workers and there are 3 cores" in said
    assert "data.image_size" in said
    assert said.endswith("set --data.workers to 3.")


def test_a_tokenizer_that_works_beside_the_steps_is_said_to_be_in_their_times():
    times = pace(forward=0.5, backward=0.5)
    assert "take 100% of the time, with the tokenizer's work beside them" in bottleneck(
        times, replace(CPU, tokens_ahead=True)
    )
    assert "tokenizer" not in bottleneck(times, CPU)


def test_workers_that_wait_for_storage_are_told_from_those_that_compute():
    waiting = {0: Made(500, 2.0, 0.2), 1: Made(500, 2.0, 0.2)}
    said = bottleneck(pace(data=1.0, forward=1.0, made=waiting), CPU)
    assert "90% of a worker's time is not spent computing" in said
    assert "faster storage" in said


def test_one_slow_worker_among_others_is_named():
    made = {0: Made(300, 1.0, 1.0, 3), 1: Made(300, 1.0, 1.0, 3), 2: Made(300, 3.0, 3.0, 3)}
    said = bottleneck(pace(data=1.0, forward=1.0, made=made), replace(CPU, workers=3))
    assert "3 workers make 300/s" in said
    assert "worker 2 takes 3.0 times as long as the others" in said


@pytest.mark.parametrize(
    "made",
    [
        {0: Made(300, 1.0, 1.0, 3), 1: Made(300, 1.0, 1.0, 3), 2: Made(200, 2.0, 2.0, 2)},
        {0: Made(400, 1.0, 1.0, 4), 1: Made(400, 3.0, 3.0, 4)},
    ],
    ids=["too few batches of one", "none of one"],
)
def test_no_worker_is_accused_before_each_made_some_batches(made):
    said = bottleneck(pace(data=1.0, forward=1.0, made=made), replace(CPU, workers=3))
    assert "times as long" not in said
    assert "3 workers make 600/s" in said, "all pictures over all seconds, three times"


def test_workers_that_made_no_batch_yet_are_counted_and_the_others_rate_is_theirs():
    """Two of eight were seen, at 250/s each: eight make 2,000/s, and for 3,000/s it takes twelve."""
    times = pace(3000, made={0: Made(500, 2.0, 2.0, 1), 1: Made(500, 2.0, 2.0, 1)}, data=1.0, forward=1.0)
    said = bottleneck(times, replace(CPU, workers=8))
    assert "8 workers make 2,000/s" in said
    assert said.endswith("raise --data.workers to 12.")


def test_pictures_made_fast_enough_that_come_late_are_not_called_too_few():
    fast = {0: Made(500, 0.5, 0.5), 1: Made(500, 0.5, 0.5)}
    assert "far longer to make or to hand over" in bottleneck(pace(data=1.0, forward=1.0, made=fast), CPU)


def test_without_workers_the_training_process_is_named():
    none = Circumstances(workers=0, cores=4, threads=None, bf16_untried=False, trains_tokenizer=False)
    said = bottleneck(pace(data=1.0, forward=1.0, made={0: Made(1000, 1.0, 1.0)}), none)
    assert "the training process itself makes 1,000/s" in said
    assert said.endswith("raise --data.workers to 1.")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ({"forward": 0.3, "backward": 0.4, "tokenizer": 0.25}, ["Bound by the model", "take 70%", "the tokenizer 25%"]),
        ({"forward": 0.2, "tokenizer": 0.75}, ["Bound by the tokenizer", "a smaller tokenizer costs less"]),
        ({"forward": 0.2, "optimizer": 0.75}, ["Bound by the optimizer", "--train.global_batch"]),
        ({"forward": 0.2, "rest": 0.75}, ["between the steps", "--train.log_every"]),
        ({"forward": 0.2, "transfer": 0.75}, ["Bound by the way to the device"]),
    ],
)
def test_a_run_that_is_not_starved_says_what_bounds_it(seconds, words):
    said = bottleneck(pace(**seconds, data=0.05), CPU)
    for word in [*words, "waiting for pictures 5%", "2 workers make 500/s"]:
        assert word in said


def test_another_rank_that_waits_for_pictures_is_named_though_this_one_does_not():
    first = replace(pace(data=0.02, forward=0.3, backward=0.68), rank_waits=(0.02, 0.0, 0.05, 0.4))
    later = replace(pace(data=0.02, forward=0.3, backward=0.68), rank_waits=(0.02, 0.1, 0.15, 0.4))
    said = bottleneck(first + later, CPU)
    assert said.startswith("Waits for rank 3, which waits 40% of the time for pictures, where rank 0 waits 2%")
    even = replace(first, rank_waits=(0.02, 0.03, 0.03, 0.02))
    assert bottleneck(even, CPU).startswith("Bound by the model")


def test_every_ranks_wait_for_pictures_comes_with_the_log_line_in_its_one_reduction(clock, monkeypatch):
    """Rank 1 of three, beside stand-ins for what the two others add; three bad pictures, and one asks to stop."""
    reductions = []

    def reduce_sum(values):
        reductions.append(values)
        return values + torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0, 0.0, 0.25])

    monkeypatch.setattr(loop, "reduce_sum", reduce_sum)
    runtime = SimpleNamespace(rank=1, world_size=3)
    engine = SimpleNamespace(runtime=runtime, grad_norm=lambda: 0.5, skipped=lambda: (2, 1))
    interval = loop.Interval(torch.device("cpu"))
    interval.passes = 1
    walk(interval.timeline, clock, [((Phase.DATA,), 1.5), ((Phase.FORWARD,), 2.0)])
    figures, rank_waits = interval.figures(engine, 1, False)
    assert rank_waits == (3.0, 1.5, 0.25)
    expected = {"loss": 1.0, "mlm_acc": 0.5, "bad_pictures": 3.0, "stop": 1.0}
    assert figures == expected | {"grad_norm": 0.5, "skipped": 2.0, "skipped_in_a_row": 1.0}
    assert len(reductions) == 1


def test_communication_is_no_longer_the_models_when_it_is_known():
    times = pace(forward=0.3, backward=0.7)
    assert "Bound by the model" in bottleneck(times, CPU)
    assert "Bound by communication" in bottleneck(times, CPU, communication=0.6)


def test_bf16_is_advised_only_where_it_was_not_tried_and_is_fast():
    untried = Circumstances(workers=2, cores=2, threads=None, bf16_untried=True, trains_tokenizer=False)
    assert "bf16" in bottleneck(pace(forward=1.0), untried)
    assert "bf16" not in bottleneck(pace(forward=1.0), CPU)


@pytest.mark.parametrize(("queued", "crowded"), [(0.6, True), (0.1, False)])
def test_threads_that_waited_for_a_core_are_told_so_before_any_other_advice(queued, crowded):
    times = replace(pace(forward=1.0), processor_seconds=0.9, queued_seconds=queued)
    said = bottleneck(times, replace(CPU, threads=2))
    assert ("; its threads waited 40% of their time for a core, so look first at" in said) == crowded
    assert said.endswith("a faster device, more ranks or a smaller model is what makes it faster.")
    assert "core" not in bottleneck(times, CPU), "a GPU trains: the host's threads say nothing"


def test_threads_that_wait_for_each_other_on_a_free_machine_are_not_called_crowded():
    times = replace(pace(forward=1.0), processor_seconds=1.0)
    assert "core" not in bottleneck(times, replace(CPU, threads=2)), "half of the processors were not asked for"


def threads(folder, **nanoseconds):
    """As Linux tells of the threads of a process: nanoseconds that each ran and waited, and how often."""
    for name, (ran, waited) in nanoseconds.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "schedstat").write_text(f"{ran} {waited} 7\n")


def test_the_wait_for_a_core_is_that_of_all_threads_since_the_beginning(tmp_path):
    threads(tmp_path, one=(10**9, 5 * 10**9), gone=(10**9, 10**9))
    queue = RunQueue(tmp_path)
    threads(tmp_path, one=(2 * 10**9, 6 * 10**9), new=(10**9, 5 * 10**8))
    (tmp_path / "gone" / "schedstat").unlink()
    assert queue.seconds() == 1.5


def test_where_the_system_does_not_tell_of_waits_there_are_none(tmp_path):
    threads(tmp_path, one=("", ""))
    assert RunQueue(tmp_path).seconds() == 0
    assert RunQueue(tmp_path / "missing").seconds() == 0


def test_a_session_without_steps_says_so():
    assert bottleneck(Pace(), CPU) == "No step was timed."


@pytest.fixture
def clock(monkeypatch):
    """A clock to set: `clock[0]` is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: now[0])
    return now


def walk(line, clock, seconds):
    """Each phase and part for so many seconds."""
    for key, duration in seconds:
        line.enter(*key) if isinstance(key, tuple) else line.enter_part(key)
        clock[0] += duration


STEP = [((Phase.DATA,), 1.0), ((Phase.FORWARD,), 2.0), (Part.MLP, 3.0), (Part.OTHER, 4.0), ((Phase.REST,), 5.0)]


def test_every_moment_belongs_to_one_phase_and_part(clock):
    line = Timeline()
    walk(line, clock, STEP)
    walk(line, clock, STEP)
    seconds = line.seconds()
    assert {key: value for key, value in seconds.items() if value} == {
        (Phase.DATA, Part.OTHER): 2.0,
        (Phase.FORWARD, Part.OTHER): 12.0,
        (Phase.FORWARD, Part.MLP): 6.0,
        (Phase.REST, Part.OTHER): 10.0,
    }
    assert by_phase(seconds)[Phase.FORWARD] == 18.0
    assert sum(seconds.values()) == clock[0]


def test_restarting_forgets_what_was(clock):
    line = Timeline()
    walk(line, clock, STEP)
    line.restart()
    clock[0] += 1.0
    assert line.seconds() == {(Phase.REST, Part.OTHER): 1.0}


class Stream:
    """Stand-in for a GPU's stream, with a clock of its own."""

    def __init__(self, now):
        self.now = now


@pytest.fixture
def streams(clock, monkeypatch):
    """Streams that were entered, the current one last; the first is on the test's clock."""
    entered = [Stream(clock)]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            self.at = (stream or entered[-1]).now[0]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

        def synchronize(self):
            pass

    monkeypatch.setattr(timeline.torch.cuda, "Event", Event)
    monkeypatch.setattr(timeline.torch.cuda, "current_stream", lambda: entered[-1])
    return entered


def test_a_gpus_timeline_gives_the_same_from_its_events(clock, streams):
    line = StreamTimeline()
    walk(line, clock, STEP)
    once = {(Phase.DATA, Part.OTHER): 1.0, (Phase.FORWARD, Part.OTHER): 6.0}
    once |= {(Phase.FORWARD, Part.MLP): 3.0, (Phase.REST, Part.OTHER): 5.0}
    assert {key: value for key, value in line.seconds().items() if value} == once
    walk(line, clock, STEP)
    assert {key: value for key, value in line.seconds().items() if value} == {key: 2 * v for key, v in once.items()}


def test_marks_that_are_set_inside_another_stream_lie_in_the_one_that_computes(clock, streams):
    """As where DeepSpeed starts a collective in its own stream, which is behind the one that computes."""
    line = StreamTimeline()
    line.enter(Phase.BACKWARD)
    clock[0] += 2.0
    streams.append(Stream([-5.0]))
    line.enter_part(Part.COMMUNICATION)
    clock[0] += 1.0
    line.enter_part(Part.OTHER)
    streams.pop()
    clock[0] += 3.0
    seconds = {key: value for key, value in line.seconds().items() if value}
    assert seconds == {(Phase.BACKWARD, Part.OTHER): 5.0, (Phase.BACKWARD, Part.COMMUNICATION): 1.0}
