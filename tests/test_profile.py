"""A step taken apart: each part gets its own time, the parts are all of it, and training pays nothing for it."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from small_run import make_tokenizer, small_argv, small_settings

from fused_beit.engine.data.digits import Digits
from fused_beit.engine.data.pictures import Pictures
from fused_beit.engine.errors import UserError
from fused_beit.engine.models import encoder, mim
from fused_beit.engine.training import pretraining, profiling, zero
from fused_beit.engine.training.bottleneck import Circumstances
from fused_beit.engine.training.loop import Interval
from fused_beit.engine.training.pretraining import open_run, pretrain
from fused_beit.engine.training.profiling import measure
from fused_beit.engine.training.profiling.measure import LEAST_STEPS, device_idle, idle_share, plan
from fused_beit.engine.training.profiling.parts import marked
from fused_beit.engine.training.profiling.table import rows
from fused_beit.engine.training.timeline import Part, Phase

PLANTED = 0.02  # seconds; a whole step of the small model takes less
STEPS = {"train__max_steps": LEAST_STEPS}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors")


@pytest.fixture
def opened(tmp_path, tokenizer):
    """Open a small run to measure; sub-folder `run`."""

    @contextmanager
    def opened(**changes):
        with open_run(small_settings(tmp_path / "run", tokenizer, **(STEPS | changes)), rehearsal=True) as run:
            yield run

    return opened


@pytest.fixture
def short_rounds(monkeypatch):
    """A profile of few steps."""
    monkeypatch.setattr(measure, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(measure, "PRODUCT_SIDE", {"cpu": 64, "cuda": 64})


class Slow(torch.autograd.Function):
    """The same values, late, in both directions."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(PLANTED)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * PLANTED)
        return gradient.clone()


def slowed(owner, monkeypatch, name="forward"):
    """Let a module's method begin with `Slow`."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, x, *args, **kwargs: original(self, Slow.apply(x), *args, **kwargs))


def seconds_of_a_step(run):
    """By phase and part, of the second step."""
    interval = Interval(run.runtime.device)
    run.loop.train_step(0, interval)
    with marked(run.engine, interval.timeline):
        interval.restart()
        run.loop.train_step(1, interval)
        return interval.timeline.seconds()


@pytest.mark.parametrize(
    ("owner", "part", "times"),
    [
        (encoder.PatchEmbed, Part.EMBED, 1),
        (encoder.Attention, Part.ATTENTION, 2),
        (encoder.Mlp, Part.MLP, 2),
        (encoder.ResidualNorm, Part.NORMS, 4),
        (encoder.FinalNorm, Part.NORMS, 1),
        (mim.TokenHead, Part.HEAD, 1),
    ],
)
def test_a_slow_part_is_found_in_forward_and_backward(opened, monkeypatch, owner, part, times):
    """Planted in each of two blocks; pixels have no gradient, so a slow embedding is slow forward alone."""
    slowed(owner, monkeypatch)
    with opened() as run:
        seconds = seconds_of_a_step(run)
    backward = 0 if part == Part.EMBED else 2
    found = seconds[Phase.FORWARD, part], seconds.get((Phase.BACKWARD, part), 0.0)
    assert found[0] >= times * PLANTED
    assert found[1] >= times * backward * PLANTED


@pytest.mark.parametrize(
    ("recompute", "owner", "part"),
    [("mlp", encoder.Mlp, Part.MLP), ("block", encoder.Mlp, Part.MLP), ("block", encoder.Attention, Part.ATTENTION)],
)
def test_what_is_computed_again_is_its_parts_backward(opened, monkeypatch, recompute, owner, part):
    slowed(owner, monkeypatch)
    with opened(train__recompute=recompute) as run:
        seconds = seconds_of_a_step(run)
    blocks, backward, again = 2, 2, 1
    assert blocks * PLANTED <= seconds[Phase.FORWARD, part] < blocks * (1 + again) * PLANTED
    assert seconds[Phase.BACKWARD, part] >= blocks * (backward + again) * PLANTED


def test_what_comes_after_the_graph_is_not_its_last_parts(opened, monkeypatch):
    backward = zero.ZeroEngine.backward
    monkeypatch.setattr(zero.ZeroEngine, "backward", lambda *args: (backward(*args), time.sleep(PLANTED)))
    with opened() as run:
        seconds = seconds_of_a_step(run)
    assert seconds[Phase.BACKWARD, Part.OTHER] >= PLANTED


def test_a_slow_collective_is_communication_wherever_it_happens(opened):
    with opened(zero__stage=1) as run:
        backend = zero.collectives()
        all_reduce = backend.all_reduce

        def late(*args, **kwargs):
            time.sleep(PLANTED)
            return all_reduce(*args, **kwargs)

        with mock.patch.object(backend, "all_reduce", late):
            seconds = seconds_of_a_step(run)
    assert sum(value for key, value in seconds.items() if key[1] == Part.COMMUNICATION) >= PLANTED


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_without_marks_in_backward_no_mark_is_set_while_autograd_runs(opened, monkeypatch, recompute):
    """On a GPU that is another thread, from which DeepSpeed starts collectives and modules are called again too."""
    set_in = set()
    with opened(zero__stage=1, train__recompute=recompute) as run:
        interval = Interval(run.runtime.device)
        enter_part = interval.timeline.enter_part

        def noted(part):
            set_in.add((interval.timeline.phase, part))
            return enter_part(part)

        monkeypatch.setattr(interval.timeline, "enter_part", noted)
        with marked(run.engine, interval.timeline, backward=False):
            run.loop.train_step(0, interval)
    assert (Phase.FORWARD, Part.MLP) in set_in
    assert not {key for key in set_in if key[0] == Phase.BACKWARD or key[1] == Part.COMMUNICATION}


def test_marks_change_no_loss_and_leave_nothing_behind(opened):
    def losses(run, marks):
        interval = Interval(run.runtime.device)
        found = []
        for step in range(4):
            before = interval.sums.clone()
            if marks:
                with marked(run.engine, interval.timeline):
                    run.loop.train_step(step, interval)
            else:
                run.loop.train_step(step, interval)
            found.append((interval.sums - before).tolist())
        return found

    with opened() as run:
        plain = losses(run, marks=False)
    with opened(overwrite=True) as run:
        modules = list(run.engine.module.modules())
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
        assert losses(run, marks=True) == plain
        assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules] == hooks
        assert "backward" not in vars(run.engine)
        assert "all_reduce" not in vars(zero.collectives())


def test_the_parts_are_the_whole_step_and_flops_stand_where_they_are_known(opened, short_rounds, tmp_path, monkeypatch):
    slowed(encoder.Mlp, monkeypatch)  # most of a step, however busy the machine is
    with opened() as run:
        profile = profiling.profile(run, tmp_path / "run" / "trace.json")
        flops = run.flops
    parts = {row.name: row for row in rows(profile)}
    assert sum(row.seconds for row in parts.values()) == pytest.approx(profile.step_seconds)
    assert {name for name, row in parts.items() if row.flops} == {"tokenizer", "embed", "attention", "MLP", "head"}
    assert sum(row.flops for name, row in parts.items() if row.flops and name != "tokenizer") == pytest.approx(
        8 * flops
    )
    assert parts["rest"].seconds < profile.step_seconds / 2, "most of a step has a name"
    assert profile.marked.steps == profile.plain.steps == 3
    table = profiling.table(profile)
    for name in parts:
        assert name in table
    names = {event["name"] for event in json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]}
    assert {"data", "tokenizer", "forward: attention", "backward: mlp", "optimizer"} <= names


def test_tokens_made_beside_a_step_have_no_rate():
    """On a GPU; what the step waits for them is not the time that they take."""
    circumstances = Circumstances(1, 1, None, bf16_untried=False, trains_tokenizer=False)
    stretch = measure.Stretch(1, {(Phase.TOKENIZER, Part.OTHER): 0.5, (Phase.FORWARD, Part.MLP): 0.5})
    one = measure.Profile(
        stretch, stretch, {"tokenizer": 1e9, "mlp": 1e9}, 1e9, 0.0,
        on_cpu=False, circumstances=circumstances, facts={},
    )  # fmt: skip
    ahead = dataclasses.replace(one, circumstances=dataclasses.replace(circumstances, tokens_ahead=True))
    assert {row.name: row.flops_per_s for row in rows(one) if row.flops} == {"tokenizer": 2e9, "MLP": 2e9}
    assert {row.name: row.flops_per_s for row in rows(ahead) if row.flops} == {"MLP": 2e9}
    assert "their row is what a step waited for them" in profiling.table(ahead)
    assert "their row is what a step waited for them" not in profiling.table(one)


@pytest.mark.parametrize(
    ("dtype", "fast", "side"),
    [(torch.bfloat16, False, measure.IMITATED_SIDE), (torch.bfloat16, True, 512), (torch.float32, False, 512)],
)
def test_the_product_is_smaller_where_bf16_is_imitated(monkeypatch, dtype, fast, side):
    monkeypatch.setattr(measure, "has_bf16", lambda: fast)
    monkeypatch.setattr(measure, "PRODUCT_SIDE", {"cpu": 512})
    monkeypatch.setattr(measure.Product, "once", lambda self: 1.0)
    product = measure.Product(torch.device("cpu"), dtype)
    product.measure()
    assert product.left.shape == product.right.shape == (side, side)
    assert product.flops_per_s == 2.0 * side**3


SLOW_SOURCES = """
import time
from torch.utils.data import get_worker_info
from fused_beit.engine.data.folder import Subset

class Slow(Subset):
    def load(self, index, needed=None):
        time.sleep(0.04)
        return super().load(index, needed)

class OneSlow(Subset):
    def load(self, index, needed=None):
        time.sleep(0.2 if get_worker_info().id == 1 else 0.0)
        return super().load(index, needed)
"""


@pytest.fixture
def starve(tmp_path, monkeypatch):
    """Let pictures come from a source of `SLOW_SOURCES`, a module, for workers import what they are sent."""
    (tmp_path / "slow_sources.py").write_text(SLOW_SOURCES)
    monkeypatch.syspath_prepend(tmp_path)
    slow_sources = importlib.import_module("slow_sources")

    def starve(kind):
        source = getattr(slow_sources, kind)(Digits("train"), range(1500))
        monkeypatch.setattr(pretraining, "open_pictures", lambda *args: Pictures(source, None, "digits"))

    yield starve
    del sys.modules["slow_sources"]


def test_a_starved_loader_is_named_by_the_profile_and_by_the_runs_end(
    starve, opened, short_rounds, tmp_path, tokenizer, capsys
):
    starve("Slow")
    with opened(data__workers=1) as run:
        said = profiling.sentence(profiling.profile(run, tmp_path / "run" / "trace.json"))
    assert pretrain(small_settings(tmp_path / "trained", tokenizer, data__workers=1))
    end = capsys.readouterr().out
    (line,) = [line for line in end.splitlines() if line.startswith("Waits ")]
    for sentence in (said, line):
        made = re.match(r"Waits \d+% of the time for pictures: 1 worker makes ([\d.]+)/s, the rest", sentence)[1]
        assert 0 < float(made) < 1 / 0.04, "a picture takes 0.04 s and what a digit takes"
        assert "raise --data.workers to" in sentence
    assert line.replace("'", "&#x27;") in (tmp_path / "trained" / "report.html").read_text()


def test_one_slow_worker_of_two_is_named(starve, tmp_path, tokenizer, capsys):
    starve("OneSlow")
    how = {"data__workers": 2, "train__global_batch": 4, "train__max_steps": 10}
    assert pretrain(small_settings(tmp_path / "run", tokenizer, **how))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Waits ")]
    assert "worker 1 takes" in line
    assert "times as long as the others" in line


def test_a_run_that_is_not_starved_says_what_bounds_it(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "PLANTED", 0.1)
    slowed(encoder.Mlp, monkeypatch)
    assert pretrain(small_settings(tmp_path / "run", tokenizer, train__global_batch=2))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Bound by ")]
    assert line.startswith("Bound by the model: forward and backward take ")


def test_without_a_tokenizer_an_untrained_one_of_its_shape_stands_for_it(tmp_path, tokenizer, capsys):
    argv = small_argv(tmp_path / "run", tokenizer, tokenizer__width=8, tokenizer__train_steps=10**9)
    at = argv.index("--tokenizer.path")
    from fused_beit.engine.command_line import parse

    with open_run(parse(argv[:at] + argv[at + 2 :], description=""), rehearsal=True) as run:
        assert run.tokenizer.width == 8
        assert not run.tokenizer.training
        assert not any(parameter.requires_grad for parameter in run.tokenizer.parameters())
    assert "an untrained one stands for it" in capsys.readouterr().out


def test_a_profile_leaves_the_folder_of_a_run_alone(opened, tmp_path, tokenizer):
    assert pretrain(small_settings(tmp_path / "run", tokenizer, train__max_steps=1))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    for overwrite in ([], [True]):
        changes = {"overwrite": True} if overwrite else {}
        with pytest.raises(UserError, match="holds a run; give another --output_dir"), opened(**changes):
            pass
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before


def test_a_used_folder_is_refused(opened, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty \(it holds notes\.txt\); add --overwrite"), opened():
        pass


def test_a_run_too_short_to_profile_is_refused(opened, tmp_path):
    with opened(train__max_steps=LEAST_STEPS - 1) as run, pytest.raises(UserError, match=f"at least {LEAST_STEPS}"):
        profiling.profile(run, tmp_path / "trace.json")


@pytest.mark.parametrize(
    ("step_seconds", "length", "expected"),
    [(60.0, 10_000, (3, 1)), (0.5, 10_000, (10, 2)), (0.01, 10_000, (10, 10)), (0.01, 11, (3, 1)), (2.0, 30, (7, 1))],
)
def test_as_many_steps_are_taken_as_time_and_the_run_allow(step_seconds, length, expected):
    rounds, count = plan(step_seconds, length)
    assert (rounds, count) == expected
    assert measure.WARM_STEPS + 2 * rounds * count + measure.TRACED_STEPS <= length


def test_time_that_no_kernel_covers_is_idle():
    assert idle_share([]) == 0
    assert idle_share([(0, 4), (2, 6), (8, 10)]) == pytest.approx(0.2)
    assert idle_share([(8, 10), (0, 10), (1, 2)]) == 0


@pytest.mark.parametrize(
    ("name", "annotation"),
    [("forward: mlp", True), ("Stream Wait Event", False), ("Event Sync", False), ("Context Sync", False)],
)
def test_a_named_range_and_a_wait_on_the_gpu_are_no_work(name, annotation):
    """Stand-ins for a trace's events: two kernels with a pause between them, and something over all of it."""

    def event(name, start, end, device=torch.autograd.DeviceType.CUDA, annotation=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)

    kernels = [event("gemm", 0, 2), event("gemm", 8, 10), event("aten::mm", 0, 10, torch.autograd.DeviceType.CPU)]
    assert device_idle(kernels) == pytest.approx(0.6)
    assert device_idle([*kernels, event(name, 0, 10, annotation=annotation)]) == pytest.approx(0.6)


def test_the_script_prints_the_table_and_leaves_its_files(root, tmp_path, tokenizer):
    argv = small_argv(tmp_path / "out", tokenizer, **STEPS)
    command = [sys.executable, root / "engine" / "profile_step.py", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "attention" in done.stdout
    assert {"profile.html", "profile.json", "trace.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    page = (tmp_path / "out" / "profile.html").read_text()
    assert "<svg" in page
    assert not any(word in page for word in ("http:", "https:", "<script", "<link"))
    figures = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert figures["sentence"] in done.stdout
    assert done.stderr == ""
    again = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr == "error: --resume auto has no effect on a profile, which trains nothing; leave it out.\n"
