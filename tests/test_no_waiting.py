"""No step between two log lines waits for the device: read in the source, and watched in whole runs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_run import make_tokenizer, small_settings
from waiting import MAY_WAIT, no_waiting, watched

from fused_beit.engine.training.loop import Loop
from fused_beit.engine.training.pretraining import pretrain

FOLDERS = ("engine/training", "engine/models", "engine/tokenizer", "kernels")

# Calls by which values come to the host, or whose result has a shape that only values tell.
METHODS = {
    *("item", "cpu", "tolist", "numpy", "nonzero", "is_nonzero", "argwhere", "masked_select", "unique"),
    *("unique_consecutive", "bincount", "repeat_interleave", "synchronize"),
}
REDUCTIONS = {"any", "all", "min", "max", "sum", "mean", "argmax", "argmin", "count_nonzero", "isfinite", "norm"}

# What may wait, and why; "*": all of a file or folder. Nothing of it is called in a step but `waiting.MAY_WAIT`.
AFTER_THE_RUN = "once a run, for a person or a file"
ONCE = "once an evaluation"
ON_DISK = "writing or checking a file"
ALLOWED = {
    ("engine/training/loop.py", "Interval.figures"): "the log line: one transfer for all figures",
    ("engine/training/timeline.py", "StreamTimeline.seconds"): "at the log line, after its transfer",
    ("engine/training/evaluation.py", "evaluate"): ONCE,
    ("engine/training/evaluation.py", "fill_pictures"): AFTER_THE_RUN,
    ("engine/training/evaluation.py", "to_pictures"): AFTER_THE_RUN,
    ("engine/training/report", "*"): "numpy and plain numbers: it imports no torch",
    ("engine/training/zero.py", "from_all_ranks"): "once a checkpoint",
    ("engine/training/zero.py", "ZeroEngine.full_state_dict"): "once a checkpoint",
    ("engine/training/profiling/measure.py", "Steps.take"): "after the profiled steps, as a log line does",
    ("engine/training/profiling/measure.py", "Product.once"): "no step: it times a product",
    ("engine/tokenizer/files.py", "saved_state"): ON_DISK,
    ("engine/tokenizer/files.py", "digest"): ON_DISK,
    ("engine/tokenizer/published.py", "load_published"): ON_DISK,
    ("engine/tokenizer/quality.py", "*"): AFTER_THE_RUN,
    ("engine/tokenizer/training.py", "fit"): "the log line of a tokenizer's training",
    ("kernels/adapters/fused.py", "known_window"): "when fuse() looks at a model",
    ("kernels/adapters/transformers.py", "BeitBias.why_not"): "when fuse() looks at a model",
    ("kernels/masked_tokens/positions.py", "masked_positions_from_bool"): "where it is given no num_slots",
    ("kernels/rel_pos_attention/interpolation.py", "_spline_matrix"): "when a table is brought to another size",
    ("kernels/testing.py", "assert_no_worse_than_eager"): "tests and benchmarks",
    **MAY_WAIT,
}


def waits(text: str) -> Iterator[tuple[str, str]]:
    """Places in a module that may wait for the device, as (qualified name of the function, source)."""

    def visit(node: ast.AST, scope: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(node, ast.AnnAssign | ast.arg) and child is node.annotation:
                continue
            if isinstance(node, ast.FunctionDef) and child is node.returns:
                continue
            named = isinstance(child, ast.FunctionDef | ast.ClassDef)
            inner = (*scope, child.name) if named else scope
            if (isinstance(child, ast.Call) and brings_values(child)) or asks_a_tensor(child) or by_mask(child):
                yield ".".join(inner), ast.unparse(child)
            yield from visit(child, inner)

    yield from visit(ast.parse(text), ())


def brings_values(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    to_cpu = name == "to" and any(isinstance(a, ast.Constant) and a.value == "cpu" for a in given)
    where = name == "where" and len(call.args) == 1 and not call.keywords
    converts = isinstance(call.func, ast.Name) and call.func.id in ("int", "float", "bool")
    return name in METHODS or to_cpu or where or (converts and any(map(is_reduction, call.args)))


def is_reduction(node: ast.AST) -> bool:
    """Whether a tensor may be reduced here; what `math` is given is a number already."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    of_numbers = isinstance(node.func.value, ast.Name) and node.func.value.id == "math"
    return node.func.attr in REDUCTIONS and not of_numbers


def asks_a_tensor(node: ast.AST) -> bool:
    """`if x.any():` and the like, anywhere in the condition."""
    return isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert) and any(map(is_reduction, ast.walk(node.test)))


def by_mask(node: ast.AST) -> bool:
    """`x[x > 0]`, `x[~kept]`, `x[bool_mask]`; a shape in angular brackets of a type is none."""
    if not isinstance(node, ast.Subscript):
        return False
    indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return any(
        isinstance(index, ast.Compare)
        or (isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.Invert))
        or (isinstance(index, ast.BinOp) and isinstance(index.op, ast.BitAnd))
        or (isinstance(index, ast.Name | ast.Attribute) and "mask" in getattr(index, "id", getattr(index, "attr", "")))
        for index in indices
    )


def allowed(path: str, function: str) -> tuple[str, str] | None:
    """The entry of `ALLOWED` that covers a function."""
    parents = [str(parent) for parent in Path(path).parents]
    covering = [(path, function), *((whole, "*") for whole in (path, *parents))]
    return next((entry for entry in covering if entry in ALLOWED), None)


def test_nothing_in_a_steps_way_waits_for_the_device(root):
    found, used = {}, set()
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        name = str(path.relative_to(root))
        for function, source in waits(path.read_text()):
            entry = allowed(name, function)
            if entry is None:
                found.setdefault((name, function), []).append(source)
            used.add(entry)
    assert found == {}
    assert set(ALLOWED) - used == set(), "allowed, but there is nothing there any more"


@pytest.mark.parametrize(
    "line",
    [
        "loss.item()",
        "x.cpu()",
        "x.to('cpu')",
        "x.to(device='cpu')",
        "x.detach().tolist()",
        "torch.nonzero(x)",
        "torch.where(x)",
        "torch.cuda.synchronize()",
        "x[x > 0]",
        "x[:, ~kept]",
        "x[a & b]",
        "x[bool_masked_pos]",
        "x[batch.mask] = 0",
        "float(x.sum())",
        "y = 1 if x.any() else 2",
        "y = 1 if not x.any() else 2",
        "if a and x.any():\n        pass",
        "assert x.sum() > 0",
        "while (x > 0).all():\n        pass",
    ],
)
def test_a_wait_in_the_source_is_noticed(line):
    assert [name for name, _ in waits(f"class A:\n  def f(self):\n      {line}")][:1] == ["A.f"]


@pytest.mark.parametrize(
    "line",
    [
        "x[1:, None]",
        "x[index]",
        "x.to(device)",
        "torch.where(x > 0, x, 0)",
        "int(side)",
        "assert math.isfinite(x)",
        "y: dict[str, A | None] = {}",
    ],
)
def test_what_does_not_wait_is_let_be(line):
    assert list(waits(f"def f(x: list[A | None]) -> tuple[A | None]:\n    {line}")) == []


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1).nonzero(),
        lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
        lambda x: torch.equal(x, x),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.tensor([1, 2])),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.long().bincount(),
    ],
)
def test_a_wait_in_running_code_is_noticed(waiting):
    with pytest.raises(AssertionError, match="the host waits"), no_waiting():
        waiting(torch.ones(2))


@pytest.fixture
def run(tmp_path):
    """A run of six steps of two passes, with a log line after the third and the last."""

    def run(**changes):
        tokenizer = make_tokenizer(tmp_path / "tokenizer.safetensors")
        how = {"train__log_every": 3, "train__micro_batch": 4, "zero__stage": 0, **changes}
        assert pretrain(small_settings(tmp_path / "run", tokenizer, **how))

    return run


@pytest.fixture
def watch(monkeypatch):
    """Watch whole loops: everything from the first step to the last, what is between the steps too."""

    def watch():
        seen = []
        whole, report = Loop.run, Loop.report

        def watched_run(self, *args):
            with watched() as waits:
                seen.append(waits)
                return whole(self, *args)

        def meant_report(self, *args):
            seen[-1].allowed = True
            try:
                return report(self, *args)
            finally:
                seen[-1].allowed = False

        monkeypatch.setattr(Loop, "run", watched_run)
        monkeypatch.setattr(Loop, "report", meant_report)
        return seen

    return watch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("workers", [0, 1])
def test_no_step_between_two_log_lines_waits_for_the_device(run, watch, workers, precision):
    """Loading, the way to the device, tokenizer, forward, backward, optimizer, and what is between the steps."""
    seen = watch()
    run(data__workers=workers, train__precision=precision)
    (waits,) = seen
    assert waits.found == []
    assert waits.meant.count("tolist") == 2, "one transfer a log line"


@pytest.mark.parametrize("where", ["tokenizer", "add"])
def test_a_wait_planted_in_the_step_is_noticed(run, watch, monkeypatch, where):
    from fused_beit.engine.training import loop, prefetch

    if where == "tokenizer":
        tokens_of = prefetch.tokens_of
        monkeypatch.setattr(prefetch, "tokens_of", lambda *args: tokens_of(*args)[torch.ones(4, dtype=torch.bool)])
    else:
        add = loop.Interval.add
        monkeypatch.setattr(loop.Interval, "add", lambda self, b, loss, acc: add(self, b, loss * loss.item(), acc))
    seen = watch()
    run()
    assert ("index by a mask" if where == "tokenizer" else "item") in seen[0].found


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", ["none", "pictures", "tokens"])
def test_no_step_between_two_log_lines_waits_for_the_gpu(run, monkeypatch, prefetch):
    """The driver's own word, where there is one."""
    step = Loop.train_step

    def watched_step(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "train_step", watched_step)
    run(data__workers=1, train__prefetch=prefetch)
