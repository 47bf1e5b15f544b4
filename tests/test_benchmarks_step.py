"""The training step in the benchmarks: what is checked before it is timed, what is given up, and its targets."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmark_modules import benchmark

from fused_beit.engine.training import prefetch, zero

names, cases, timing, variations, train_step, providers, parts, targets = (
    benchmark(name)
    for name in (
        "step_names",
        "train_step_cases",
        "train_step_timing",
        "train_step_variations",
        "train_step",
        "train_step_providers",
        "parts",
        "targets",
    )
)
LIMITS = {"flops_per_s": 1e12}
Spoil = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def case():
    """Its tokens are a tokenizer's."""
    return cases.tokenized(cases.SMOKE["fp32"], cases.SMOKE_TOKENIZER)


@pytest.fixture(scope="module")
def references(case):
    return train_step.References(case)


@pytest.fixture(autouse=True)
def references_once(monkeypatch, references):
    """They are slow to make, and the same for every test."""
    monkeypatch.setattr(timing, "References", lambda case: references)


class Spoilt(train_step.Step):
    """A step with a result that `spoil` has changed."""

    spoil: Spoil

    def outputs(self):
        return self.spoil(super().outputs())


def spoilt(spoil: Spoil):
    made = type("Spoilt", (Spoilt,), {"spoil": staticmethod(spoil)})
    return lambda case: made(**vars(variations.no_deepspeed(case)))


def raising(error: BaseException):
    def make(case):
        raise error

    return make


@pytest.mark.parametrize(("key", "factor"), [("loss", 1.01), ("gradient of positions", 1.01), ("logits", float("nan"))])
def test_a_step_with_a_wrong_result_has_no_time_and_the_others_have(case, key, factor):
    wrong = spoilt(lambda found: found | {key: found[key] * factor})
    found = timing.check_steps(case, {"wrong": wrong, "right": variations.no_deepspeed})
    assert list(found.steps) == ["right"]
    assert found.failed["wrong"].startswith("wrong result: wrong: ")
    rows = {row.provider: row for row in timing.time_steps(found, label="tiny", rounds=2, limits=LIMITS)}
    assert rows["wrong"].failed == found.failed["wrong"]
    assert rows["wrong"].seconds == []
    right = rows["right"]
    assert right.facts["pictures_per_s"] == pytest.approx(2 / (sum(right.seconds) / 2))
    assert right.facts["mfu"] == pytest.approx(right.facts["gflop_per_s"] / 1e3)


def test_whoever_is_not_there_is_named_with_the_reason(case):
    rounds = benchmark("rounds")
    every = {
        "peer": raising(rounds.AbsentError("not installed")),
        "large": raising(torch.OutOfMemoryError("tried to allocate what there is not\nand more")),
        "defect": raising(RuntimeError("a kernel that does not compile")),
        "crashed": raising(SystemExit("tried again")),
        "late": raising(SystemExit("begun")),
    }
    told: list[str] = []
    found = timing.check_steps(
        case,
        every,
        told=told.append,
        broken={"crashed": "its process was ended by signal 9"},
        why_stop=lambda: "not reached" if len(told) == 3 else "",
    )
    assert told == ["peer", "large", "defect"]
    assert found.absent == {
        "peer": "not installed",
        "large": "out of memory: tried to allocate what there is not",
        "late": "not reached",
    }
    assert found.failed == {
        "defect": "refused: RuntimeError: a kernel that does not compile",
        "crashed": "its process was ended by signal 9",
    }
    rows = timing.time_steps(found, label="tiny", rounds=2, limits=LIMITS, seconds=1.0)
    assert {row.provider: row.absent or row.failed for row in rows} == found.absent | found.failed


def test_without_memory_for_the_references_nobody_is_tried(case, monkeypatch):
    monkeypatch.setattr(timing, "References", raising(torch.OutOfMemoryError("float64 needs much")))
    found = timing.check_steps(case, {"ours": raising(SystemExit("tried"))})
    assert found.absent == {"ours": "out of memory, already for its references: float64 needs much"}


@pytest.mark.parametrize("varied", [variations.tokenizer_in_the_loop, variations.tokenizer_beside])
def test_a_tokenizer_in_the_loop_or_beside_it_makes_tokens_in_every_step(case, references, monkeypatch, varied):
    step = varied(case)
    references.check("in the loop", step.outputs())
    calls = []
    tokenizer = train_step.frozen_tokenizer(case.shape.tokenizer)
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda views: calls.append(views.shape) or encode(views))
    for _ in range(3):
        step()
    assert calls == [(2, 3, 16, 16)] * 3
    assert case.token_ids.tolist() == encode(train_step.token_views(case.shape)).tolist()


def test_tokens_beside_a_step_are_begun_before_its_backward_pass_as_in_the_engine(case, monkeypatch):
    order = []

    class Noted(prefetch.Feed):
        def begin_next(self, enter):
            order.append("tokens")

    monkeypatch.setattr(variations, "feed", lambda *of: order.append(of[-1]) or Noted(*of[:3]))
    for name in ("backward", "step"):
        call = getattr(zero.ZeroEngine, name)
        monkeypatch.setattr(zero.ZeroEngine, name, lambda *of, name=name, call=call: order.append(name) or call(*of))
    variations.tokenizer_beside(case)()
    assert order == ["tokens", "tokens", "backward", "step"]


def test_tokens_are_made_in_the_precision_of_the_run_and_are_the_same_for_its_float64_reference(monkeypatch):
    shape = cases.tokenized(cases.SMOKE["bf16"], cases.SMOKE_TOKENIZER).shape
    tokenizer = train_step.frozen_tokenizer(shape.tokenizer)
    encode, in_bf16 = tokenizer.encode, []
    monkeypatch.setattr(
        tokenizer, "encode", lambda views: in_bf16.append(torch.is_autocast_enabled("cpu")) or encode(views)
    )
    kept = train_step.Case("float64", shape, torch.float64).token_ids
    made = variations.InTheLoop("bf16", shape, torch.bfloat16).token_ids
    assert in_bf16 == [True, True]
    assert made.tolist() == kept.tolist()
    assert not cases.tokenized(cases.SMOKE["fp32"], cases.SMOKE_TOKENIZER).shape.tokens_in_bf16


@pytest.mark.parametrize("varied", [variations.tokenizer_in_the_loop, variations.tokenizer_beside])
def test_a_tokenizer_with_worse_codes_is_refused(case, monkeypatch, varied):
    tokenizer = train_step.frozen_tokenizer(case.shape.tokenizer)
    right = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda views: (right(views) + 1) % 64)
    with pytest.raises(AssertionError, match="worse than the best"):
        varied(case)


@pytest.mark.parametrize("spoil", ["lr", "weight_decay", "clipping"])
def test_a_step_at_zero_1_is_held_to_the_same_as_every_other(case, references, spoil):
    step = variations.zero_1(case)
    assert step.optimizer.__class__.__module__.startswith("deepspeed.runtime.zero.")
    errors = references.check("ZeRO 1", step.outputs())
    assert {"gradient of final norm", "moment of final norm", "change of head"} <= errors.keys()

    wrong = variations.zero_1(case)
    if spoil == "clipping":
        wrong.optimizer.clip_grad = 0.0
    else:
        for group in wrong.optimizer.param_groups:
            group[spoil] = 2 * group[spoil]
    with pytest.raises(AssertionError, match="ZeRO 1: "):
        references.check("ZeRO 1", wrong.outputs())


def test_every_provider_is_in_a_group_and_every_case_is_timed():
    assert {name for group in names.GROUPS.values() for name in group} == cases.PROVIDERS.keys()
    assert {name for name, _ in names.ROUNDS} == cases.ON_GPU.keys()
    assert all(group[0] == names.OURS for group in names.GROUPS.values())
    on_gpu = {(one.name, one.group): one for one in cases.on_gpu()}
    assert list(on_gpu) == list(names.ROUNDS)
    varied = on_gpu[names.BASE, names.VARIED].case.shape
    assert (varied.tokenizer.side, varied.tokenizer.vocab_size, varied.tokenizer.width) == (112, 8192, 256)
    assert [(one.name, one.group) for one in cases.rehearsal()] == list(names.REHEARSED)


@pytest.mark.parametrize(
    ("fast", "imitated", "base"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_imitated_bf16_is_timed_on_base_only_where_asked_for(monkeypatch, fast, imitated, base):
    monkeypatch.setattr(cases, "has_bf16", lambda: fast)
    on_cpu = {one.name: one for one in cases.on_cpu(imitated=imitated)}
    assert on_cpu.keys() == cases.ON_CPU.keys()
    case = on_cpu["base-bf16"].case
    assert case.dtype == torch.bfloat16
    assert (case.shape == on_cpu["base-fp32"].case.shape) == base
    assert case.note.endswith("a small case") == (not base)


def test_the_plan_has_every_part_and_ends_in_eight_minutes():
    gpu = benchmark("gpu")
    whole = parts.every_part(rehearse=False)
    assert [part.key for part in whole if part.seconds] == list(parts.PLAN) == [part.key for part in whole][:15]
    assert whole[-1].key == (names.SUBJECT, "base-fp32", names.AS_THEY_ARE)
    assert [part.label for part in whole[:2]] == ["rel_pos_attention base", "train_step base-bf16, as they are"]
    assert 60 * parts.MINUTES + gpu.GRACE <= 480
    assert {(names.SUBJECT, *key) for key in names.REHEARSED} < parts.PLAN.keys()
    assert {part.key for part in parts.every_part(rehearse=True)} <= {part.key for part in whole}


def test_a_part_that_ends_early_leaves_its_time_to_those_after_it():
    chosen = parts.every_part(rehearse=False)
    ends = parts.time_is_up(chosen, 100.0, 60 * parts.MINUTES)
    first, second = chosen[0].seconds, chosen[1].seconds
    assert ends[:2] == pytest.approx([100 + parts.LIMITS + first, 100 + parts.LIMITS + first + second])
    assert ends[-1] == pytest.approx(100 + 60 * parts.MINUTES)
    assert parts.time_is_up(chosen, 0.0, 900.0) == pytest.approx([2 * (end - 100) for end in ends])
    late = [part for part in chosen if not part.seconds]
    assert parts.time_is_up(late, 0.0, 60.0) == pytest.approx([60.0] * len(late))


def timed(case: str, group: str, provider: str, ratio: float | None = None, **facts: Any) -> dict[str, Any]:
    over = {"ratio": ratio, "over": names.OURS if ratio else ""}
    key = {"operator": names.SUBJECT, "name": case, "direction": group, "provider": provider}
    return {**key, "median": 1.0, **over, **facts}


MEASURED = [
    timed(names.BASE, names.AS_THEY_ARE, names.OURS, mfu=0.55, peak_bytes=9e9, state_bytes=1e9),
    timed(names.BASE, names.AS_THEY_ARE, names.TIMM, 2.5, mfu=0.2, peak_bytes=20e9, state_bytes=5e9),
    timed(names.BASE, names.AS_THEY_ARE, "transformers, sdpa", 1.9, peak_bytes=15e9, state_bytes=1e9),
    timed(names.BASE, names.AS_THEY_ARE, "transformers, eager", 3.0),
    timed(names.BASE, names.COMPILED, names.OURS, mfu=0.9),
    timed(names.BASE, names.COMPILED, names.OURS_COMPILED, 0.8, mfu=0.62),
    timed(names.BASE, names.COMPILED, names.TIMM_COMPILED, 1.12),
    timed(names.BASE, names.COMPILED, names.TRANSFORMERS_COMPILED, 0.88),
    timed(names.BASE, names.VARIED, names.OURS),
    timed(names.BASE, names.VARIED, names.IN_THE_LOOP, 1.25),
    timed(names.BASE, names.VARIED, names.ZERO_1, 1.1),
    timed(names.BASE, names.VARIED, names.NO_DEEPSPEED, 0.99),
]
HELD = {
    "share of the matrix rate, base": (62.0, "held"),  # of the faster one: compiled
    "share of the matrix rate, large": (None, "not measured"),
    "timm over ours": (2.5, "held"),
    "transformers over ours": (1.9, "missed"),  # of its two ways the faster one
    "compiled timm over ours": (1.4, "held"),  # over the faster of ours
    "compiled transformers over ours": (1.1, "missed"),
    "speed kept with the tokenizer in the loop": (80.0, "held"),
    "DeepSpeed's own share at ZeRO 1": (10.0, "missed"),
    "peak memory over that of eager": (0.625, "missed"),  # all that ours holds, over the least that a peer holds
}


def test_the_targets_of_the_step_are_what_the_rows_say():
    found = {one["target"]: one for one in targets.verdicts(MEASURED)}
    for what, (value, verdict) in HELD.items():
        one = found[f"train_step: {what}"]
        assert (one["value"], one["verdict"]) == (value if value is None else pytest.approx(value), verdict), what
    assert {name for name in found if name.startswith("train_step: ")} == {f"train_step: {what}" for what in HELD}


def test_without_a_time_of_ours_nothing_is_over_it():
    rows = [row for row in MEASURED if row["provider"] != names.OURS]
    others = [row | {"over": "another"} for row in rows if row["over"]]
    found = {one["target"]: one["verdict"] for one in targets.verdicts(others)}
    shares = ("train_step: share of the matrix rate, base",)
    assert {verdict for name, verdict in found.items() if name not in shares} == {"not measured"}
