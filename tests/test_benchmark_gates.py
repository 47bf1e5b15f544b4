"""What the benchmarks of the engine check before they time: each gate lets the right thing pass and nothing else."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from benchmark_modules import benchmark
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_beit.engine.config import ModelSettings

rounds, spread, train_step = (benchmark(name) for name in ("rounds", "spread", "train_step"))
SHAPE = train_step.Shape(
    ModelSettings(width=48, depth=1, num_heads=3, drop_path=0.0), image_size=64, vocab_size=64, batch=2, num_masked=6
)


@pytest.fixture(scope="module")
def case():
    return train_step.Case("tiny", SHAPE, torch.float32)


@pytest.fixture(scope="module")
def references(case):
    return train_step.References(case)


def plain_step(case, change: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None):
    """Our model's reference trained as a peer is; `change` spoils its optimizer."""
    providers = benchmark("train_step_providers")
    model = train_step.our_model(case.shape, "reference")
    step = providers.peer(
        case,
        model,
        lambda called: called(case.pixels, case.masked_positions, case.token_ids).loss,
        lambda model: model.logits(case.pixels, case.masked_positions).flatten(0, 1),
        str,
        compiled=False,
    )
    change(step.optimizer)
    return step


HELD = pytest.mark.parametrize("peer", [False, True], ids=["ours", "a peer"])


@HELD
def test_a_right_step_passes(case, references, peer):
    errors = references.check("plain", plain_step(case).outputs(), peer=peer)
    assert max(errors.values()) < 1e-3
    assert {"logits", "loss", "gradient of head", "change of head", "moment of final norm"} <= errors.keys()


@HELD
@pytest.mark.parametrize(
    "key", ["logits", "loss", "gradient of positions", "change of head", "moment of mask token", "change of final norm"]
)
def test_a_step_with_one_wrong_result_is_refused(case, references, key, peer):
    outputs = plain_step(case).outputs()
    outputs[key] = outputs[key] * 1.01
    with pytest.raises(AssertionError, match="plain: "):
        references.check("plain", outputs, peer=peer)


@pytest.mark.parametrize("key", ["logits", "gradient of positions", "gradient of head"])
def test_a_peer_may_round_otherwise_than_eager_torch_and_ours_may_not(case, references, key):
    exact, eager = references.exact[key], references.eager[key]
    outputs = plain_step(case).outputs() | {key: (exact + 20 * (eager - exact)).float()}
    errors = references.check("plain", outputs, peer=True)
    assert errors[key] == pytest.approx(20 * rounds.relative_error(eager, exact), rel=0.1)
    with pytest.raises(AssertionError, match=f"plain: {key}: error .* exceeds"):
        references.check("plain", outputs)


@pytest.mark.parametrize("found", [float("nan"), 0.0, -1.0])
def test_a_peer_that_did_other_work_is_told_by_how_much(case, references, found):
    outputs = plain_step(case).outputs()
    outputs["gradient of head"] = found * outputs["gradient of head"]
    with pytest.raises(AssertionError, match=r"gradient of head: error .* exceeds 3.45e-04, half of the digits"):
        references.check("plain", outputs, peer=True)


def decay_all(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.05


def decay_none(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0


def raise_lr(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 1.01


@HELD
@pytest.mark.parametrize("change", [decay_all, decay_none, raise_lr])
def test_a_step_with_other_settings_of_its_optimizer_is_refused(case, references, change, peer):
    with pytest.raises(AssertionError, match="plain: change of "):
        references.check("plain", plain_step(case, change).outputs(), peer=peer)


@HELD
def test_a_step_that_does_not_clip_is_refused(case, references, monkeypatch, peer):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: None)
    with pytest.raises(AssertionError, match="is clipped to 1 of its gradient"):
        references.check("plain", plain_step(case).outputs(), peer=peer)


def test_the_references_are_the_same_a_few_pictures_at_a_time(case, monkeypatch):
    model = train_step.our_model(case.shape, "reference").double()
    whole = train_step.passes(model, train_step.Case("float64", SHAPE, torch.float64))
    monkeypatch.setattr(train_step, "PICTURES_AT_ONCE", 1)
    model.zero_grad()
    parts = train_step.passes(model, train_step.Case("float64", SHAPE, torch.float64))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-10, atol=1e-14, msg=key)


COMPILED = """
import sys, torch
sys.path.insert(0, {root!r})
from benchmarks import train_step, train_step_providers
from fused_beit.engine.config import ModelSettings

shape = train_step.Shape(ModelSettings(width=48, depth=1, num_heads=3, drop_path=0.0), 64, 64, 2, 6)
case = train_step.Case("tiny", shape, torch.float32)
step = train_step_providers.COMPILED["fused_beit, compiled"](case)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "nothing was compiled"
train_step.References(case).check("compiled", step.outputs())
"""


@pytest.mark.slow
def test_our_compiled_step_computes_our_step(root):
    # In a process of its own: it starts DeepSpeed's process group, and the compiler's.
    command = [sys.executable, "-c", COMPILED.format(root=str(root))]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else it starts a process for every core
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert shown.returncode == 0, shown.stderr[-3000:]


@pytest.mark.peers
def test_timm_computes_our_step(case, references):
    pytest.importorskip("timm", reason="needs timm, of the environment that `make peers` makes")
    providers = benchmark("train_step_providers")
    references.check("timm", providers.timm(case).outputs(), peer=True)


def test_the_spread_of_ratios_is_that_within_the_rounds():
    rows = [
        rounds.Row("case", "ours", seconds=[1.0, 2.0, 4.0]),
        rounds.Row("case", "peer", seconds=[2.0, 6.0, 4.0], ratio=2.0, over="ours"),
        rounds.Row("case", "gone", absent="not installed"),
    ]
    spread.add_spread(rows)
    assert rows[1].facts == {"ratio_q1": 1.5, "ratio_q3": 2.5}
    assert rows[0].facts == rows[2].facts == {}


class Hungry:
    """Work that is out of memory from its `calls`-th run on."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self) -> None:
        self.calls -= 1
        if self.calls <= 0:
            raise torch.OutOfMemoryError("tried to allocate what there is not")


@pytest.mark.parametrize(("calls", "when"), [(1, "at once"), (2, "when warm"), (4, "in the second round")])
def test_a_provider_out_of_memory_while_it_is_timed_costs_nobody_else_a_time(calls, when):
    runs = {"first": lambda: None, "hungry": Hungry(calls), "last": lambda: None}
    first, hungry, last = rounds.time_in_turn("case", runs, rounds=3)
    assert hungry.absent == "out of memory while it was timed: tried to allocate what there is not", when
    assert hungry.seconds == []
    assert len(first.seconds) == len(last.seconds) == 3
    assert last.ratio > 0


def test_without_the_memory_for_the_first_provider_there_are_times_and_no_ratio_to_it():
    hungry, other, last = rounds.time_in_turn(
        "case", {"first": Hungry(4), "other": lambda: None, "last": lambda: None}, rounds=3
    )
    assert hungry.absent
    assert len(other.seconds) == len(last.seconds) == 3
    assert other.ratio is last.ratio is None
    hungry, other, last = rounds.time_in_turn(
        "case", {"first": Hungry(1), "other": lambda: None, "last": lambda: None}, rounds=3
    )
    assert hungry.absent
    assert (other.ratio, last.over) == (None, "other")
    (alone,) = rounds.time_in_turn("case", {"first": Hungry(1)}, rounds=3)
    assert alone.absent


def test_a_gate_whose_other_side_has_no_time_fails():
    ours, other = rounds.Row("case", "auto", seconds=[1.0]), rounds.Row("case", "written", seconds=[0.5])
    rounds.hold_ratios([ours, other], "auto", "written")
    rounds.hold_ratios([ours], "auto", "written")  # the other was not asked for
    with pytest.raises(AssertionError, match="times as long as written"):
        rounds.hold_ratios([ours, other], "auto", "written", slower=1.5)
    for gone in (rounds.Row("case", "written", absent="refused"), rounds.Row("case", "written", failed="refused")):
        with pytest.raises(AssertionError, match="written has no time, so that nothing holds ours: refused"):
            rounds.hold_ratios([ours, gone], "auto", "written")


@pytest.mark.parametrize(
    ("error", "where"), [(TypeError("one argument too many"), "failed"), (RuntimeError("no kernel"), "absent")]
)
def test_a_peer_that_is_called_wrongly_has_failed_and_is_not_absent(error, where):
    measuring, providers = benchmark("measuring"), benchmark("providers")
    operator = benchmark("operators").OPERATORS["nearest_code"]

    def make(inputs):
        raise error

    peer = providers.Provider(providers.PEER, "a peer", make)
    found = measuring.check_providers(operator.smoke[0], {"peer": peer}, torch.device("cpu"))
    assert str(error) in getattr(found, where)["peer"]
    assert len(found.failed) + len(found.absent) == 1


def test_the_empty_graph_of_an_empty_run_is_no_error(monkeypatch):
    class Graph:
        def replay(self):
            return "replayed"

    @contextlib.contextmanager
    def capture(graph, pool):
        yield
        warnings.warn("The CUDA Graph is empty.", UserWarning, stacklevel=1)

    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": object,
        "Stream": mock.Mock,
        "current_stream": mock.Mock,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    replayed = benchmark("timers").replay(lambda: None)
    assert replayed() == "replayed"


def test_host_and_device_are_told_apart(monkeypatch):
    """Kernels as torch's profiler gives them, beside an operator of the host's; microseconds."""
    timers = benchmark("timers")
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    rows = [("short", cuda, 30, 3), ("aten::mm", cpu, 900, 1), ("long", cuda, 500, 2)]
    found = [
        mock.Mock(key=k, device_type=d, device_time_total=t, count=c, is_user_annotation=False) for k, d, t, c in rows
    ]
    found += [mock.Mock(key="step", device_type=cuda, device_time_total=800, count=1, is_user_annotation=True)]
    profiled = mock.MagicMock()
    profiled.__enter__.return_value.key_averages.return_value = found
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profiled)
    monkeypatch.setattr(timers, "LONGEST_KERNELS", 1)
    told = timers.host_and_device(lambda: time.sleep(0.01), torch.device("cuda"))
    assert told.pop("host_s") >= 0.01
    assert told == {"device_s": pytest.approx(530e-6), "num_kernels": 5, "kernels": {"long": [2, pytest.approx(5e-4)]}}


@pytest.mark.gpu
def test_a_gpus_kernels_are_counted_and_timed():
    timers, device = benchmark("timers"), torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    told = timers.host_and_device(lambda: a @ a, device)
    assert told["num_kernels"] >= 1
    assert told["device_s"] == pytest.approx(timers.device_timer(device)(lambda: a @ a), rel=0.5)
    assert 0 < told["host_s"] < told["device_s"]


@pytest.mark.parametrize(
    ("times", "by"),
    [
        ({"a": 95e-6, "b": 105e-6, "c": 5e-3}, "CUDA graph between events"),
        ({"a": 105e-6, "b": 110e-6, "c": 5e-3}, "events"),
    ],
    ids=["short", "long"],
)
def test_all_that_is_compared_is_timed_in_the_same_way(monkeypatch, times, by):
    timers = benchmark("timers")
    runs = {name: mock.Mock(name=name) for name in times}
    seconds = {run: times[name] for name, run in runs.items()}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(L2_cache_size=8))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(timers, "OtherData", mock.Mock())
    # The first measurement of each is ten times off, as one of a cold run may be.
    measured = mock.Mock(
        side_effect=lambda run: seconds[run] * (10 if measured.call_args_list.count(((run,),)) == 1 else 1)
    )
    monkeypatch.setattr(timers.EventTimer, "between_events", lambda timer, run: measured(run))
    monkeypatch.setattr(timers, "replay", lambda run: run)
    timer = timers.EventTimer(runs.values())
    for run in runs.values():
        timer(run)
    assert {timers.timed_by(timer, run) for run in runs.values()} == {by}


class Writes(TorchDispatchMode):
    """Notes how many bytes each operation of torch writes to tensors that it is given or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.written += [tensor.nbytes for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        return result


def test_a_cache_is_emptied_by_reading_and_all_is_read():
    data = benchmark("timers").OtherData(4096, device="cpu")
    data.values[-1] = 1.0
    with Writes() as writes:
        data.read()
    assert writes.written == [4], "it leaves dirty lines, which are written back in the time of the run that follows"
    assert data.values.nbytes == 4096
    assert data.largest == 1.0


@pytest.mark.parametrize("replayed", [False, True], ids=["events", "CUDA graph"])
def test_nothing_stands_between_the_emptied_cache_and_the_run_but_the_first_event(monkeypatch, replayed):
    timers = benchmark("timers")
    happened: list[str] = []

    def note(what: str, result: object = None) -> Callable[..., object]:
        return lambda *args, **kwargs: (happened.append(what), result)[1]

    event = mock.Mock(record=note("event"), query=lambda: False, elapsed_time=lambda end: 1.0)
    stand_ins = {
        "get_device_properties": lambda device: mock.Mock(L2_cache_size=8),
        "current_device": lambda: 0,
        "is_available": lambda: False,
        "synchronize": lambda: None,
        "_sleep": note("sleep"),
        "Event": lambda enable_timing: event,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    sizes = []
    monkeypatch.setattr(timers, "OtherData", lambda size: (sizes.append(size), mock.Mock(read=note("read")))[1])
    monkeypatch.setattr(timers, "replay", lambda run: note("replay") if replayed else None)
    timer = timers.EventTimer()
    monkeypatch.setattr(timer, "REPLAYED", 1.0 if replayed else 0.0)
    timer(timers.Staged(note("prepare"), note("run")))
    assert happened[-5:] == ["sleep", "read", "event", "replay" if replayed else "run", "event"]
    assert sizes == [16], "twice the cache"


def test_ids_of_worse_codes_are_refused():
    check_ids = benchmark("bench_tokenizer").check_ids
    exact = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eager, best = exact.float(), exact.argmax(-1)
    assert check_ids("right", best, eager, exact) == {"same_ids": 1.0}
    with pytest.raises(AssertionError, match="worse than the best"):
        check_ids("wrong", (best + 1) % 16, eager, exact)


def test_a_tie_within_rounding_may_go_either_way():
    exact = torch.tensor([[[1.0, 1.0 + 1e-9, 0.0]]], dtype=torch.float64)
    found = benchmark("bench_tokenizer").check_ids("tie", torch.tensor([[0]]), exact.float() + 1e-7, exact)
    assert found == {"same_ids": 0.0}


class OurViewsAsPeer:
    """Stands in for torchvision: our own views of a box, moved by some pixels."""

    def __init__(self, pictures, moved: float) -> None:
        self.pictures, self.moved = pictures, moved
        self.made = benchmark("bench_pictures").TwoViews(pictures.data, pictures.token_size)

    def load(self, index):
        return self.pictures.source.load(index)

    def views(self, image, box, *, flip):
        left = box.left + self.moved if box.left + box.width + self.moved <= image.width else box.left - self.moved
        crop = benchmark("bench_pictures").Crop(max(0, left), box.top, box.width, box.height, flip=flip)
        return self.made.render(image, crop)


@pytest.fixture
def pictures(tmp_path):
    module = benchmark("bench_pictures")
    return module.Pictures(tmp_path, module.SIZES["smoke"], (100, 75))


def work_and_rest(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    time.sleep(60)


def test_a_timed_part_begins_when_no_worker_is_at_work():
    module = benchmark("bench_pictures")
    process = multiprocessing.get_context("fork").Process(target=work_and_rest, args=(0.5,), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside torch's threads
        process.start()
    try:
        with pytest.raises(RuntimeError, match="still at work"):
            module.wait_for_workers(rest=0.05, limit=0.01)
        module.wait_for_workers(rest=0.2)
        assert module.seconds_of_workers() >= 0.45
    finally:
        process.kill()
        process.join()


def test_views_of_the_same_box_pass_and_those_of_another_are_refused(pictures):
    check = benchmark("bench_pictures").check_same_views
    check(pictures, OurViewsAsPeer(pictures, moved=0))
    with pytest.raises(AssertionError, match="grey levels off"):
        check(pictures, OurViewsAsPeer(pictures, moved=8))


@pytest.mark.peers
def test_torchvision_draws_our_boxes_and_makes_our_views(pictures):
    pytest.importorskip("torchvision", reason="needs torchvision, of the environment that `make peers` makes")
    module = benchmark("bench_pictures")
    peer = module.TorchvisionPictures(pictures.paths, pictures.data, pictures.token_size)
    module.check_same_views(pictures, peer)
    module.check_same_boxes(pictures, peer)
    peer.crop.scale = (0.3, 1.0)
    with pytest.raises(AssertionError, match="boxes differ"):
        module.check_same_boxes(pictures, peer)


def test_the_gap_of_two_samples_is_that_of_their_distribution_functions():
    largest_gap = benchmark("bench_pictures").largest_gap
    sample = np.arange(10).tolist()
    assert largest_gap(sample, sample) == 0
    assert largest_gap(sample, [value + 5 for value in sample]) == pytest.approx(0.5)


def test_a_checkpoint_that_is_not_found_again_bit_for_bit_is_refused():
    check = benchmark("bench_checkpoint").assert_same
    state = {"model": {"a": torch.ones(3)}, "optimizer": {"groups": [{"lr": 1.0}], "state": [torch.zeros(2)]}}
    check("right", benchmark("bench_checkpoint").copy_of(state), state)
    other = benchmark("bench_checkpoint").copy_of(state)
    other["optimizer"]["state"][0][1] = 1e-30
    with pytest.raises(AssertionError, match=r"state\.optimizer\.state\.0 is not what was saved"):
        check("wrong", other, state)


def test_times_of_imports_are_read_from_what_python_prints():
    read = benchmark("bench_start_up").import_seconds
    said = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       120 |    1500000 |   torch\n"
        "import time:        10 |         10 | torch.nothing\n"
        "import time:       300 |     250000 | deepspeed\n"
        "some warning\n"
    )
    assert read(said) == {"import_torch_s": 1.5, "import_deepspeed_s": 0.25}
    with pytest.raises(AssertionError, match="imports not seen"):
        read("nothing")


def test_a_profile_that_fails_takes_no_time_away(monkeypatch):
    timing = benchmark("train_step_timing")
    monkeypatch.setattr(timing, "host_and_device", mock.Mock(side_effect=RuntimeError("CUPTI is busy\nmore")))
    assert timing.apart(mock.Mock()) == {"not_profiled": "RuntimeError: CUPTI is busy"}


@pytest.mark.parametrize(("factor", "refused"), [(1.0, False), (1 + 1e-5, True), (float("nan"), True)])
def test_a_mean_loss_is_held_to_the_roundings_of_its_logits(factor, refused):
    token_loss = benchmark("token_loss")
    case = token_loss.LossCase("tiny", 48, 192, 1024, dtype=torch.float32)
    references = case.references(case.inputs(torch.device("cpu")))
    found = case.plain(references.inputs).results()
    found = found | {"loss": factor * found["loss"]}
    with pytest.raises(AssertionError, match="ours: the loss is off by") if refused else contextlib.nullcontext():
        references.check("ours", found, "")
