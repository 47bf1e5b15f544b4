"""The memory formula against every tensor that a real pass saves and every allocation of a real step."""

import gc
import json
import sys

import pytest
import torch
from allocations import peak_bytes, saved_bytes
from measured_step import NO_TOKENIZER, measure
from two_ranks import on_two_ranks

from fused_beit.engine.config import Settings
from fused_beit.engine.cpu import has_bf16
from fused_beit.engine.models import MaskedImageModel
from fused_beit.engine.tokenizer.dvae import DiscreteVAE
from fused_beit.engine.tokenizer.flops import DALLE, TokenizerSize, encoding_memory
from fused_beit.engine.training import memory

# name: pictures, side, masked patches, vocabulary, model
SHAPES = {
    "shared": (4, 64, 20, 128, {"width": 64, "depth": 3, "num_heads": 2, "patch_size": 8}),
    "plain": (
        8, 32, 26, 32,
        {"width": 64, "depth": 4, "num_heads": 4, "patch_size": 4, "abs_pos_embed": True, "layer_scale": 0.0,
         "drop_path": 0.0},
    ),
    "large vocabulary": (2, 96, 14, 8192, {"width": 192, "depth": 2, "num_heads": 3}),
    "per layer": (2, 96, 14, 50, {"width": 96, "depth": 2, "num_heads": 3, "rel_pos_bias": "per_layer"}),
    "narrow MLP": (
        3, 64, 14, 50,
        {"width": 96, "depth": 6, "num_heads": 3, "patch_size": 8, "mlp_ratio": 2.0, "rel_pos_bias": "none"},
    ),
    "long": (4, 128, 60, 64, {"width": 64, "depth": 3, "num_heads": 4, "patch_size": 8}),
}  # fmt: skip
# Each shape as it is, and in those where it makes a difference of its own, with what is computed again.
PASSES = pytest.mark.parametrize(
    ("shape", "recompute"),
    [
        *((shape, "none") for shape in SHAPES),
        *(
            pytest.param(shape, recompute, marks=[] if shape in ("shared", "narrow MLP") else pytest.mark.slow)
            for shape in SHAPES
            for recompute in ("mlp", "block")
        ),
    ],
)


class OnePass:
    """A real model and batch of a shape, and what the formula is told of it."""

    def __init__(self, shape, bf16, impl="reference", recompute="none"):
        pictures, side, masked, vocab_size, model = SHAPES[shape]
        self.settings = Settings.model_validate(
            {
                "model": model,
                "data": {"image_size": side},
                "mask": {"num_patches": masked},
                "train": {"recompute": recompute},
            }
        )
        self.bf16 = bf16
        self.model = MaskedImageModel(self.settings.model, side, vocab_size, normalize="inception", impl=impl)
        self.model.encoder.recompute(recompute)
        self.batch = (
            torch.zeros(pictures, 3, side, side, dtype=torch.uint8),
            torch.arange(masked).repeat(pictures, 1),
            torch.zeros(pictures, self.settings.num_patches, dtype=torch.int64),
            torch.arange(pictures),
        )
        operators = memory.operators_of(impl, "cpu")
        self.run = memory.Pass(pictures, bf16, vocab_size, operators, NO_TOKENIZER, 8)

    def forward(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.model(*self.batch, 0).loss

    def step(self):
        self.forward().backward()

    def saved(self):
        return memory.saved_activations(self.settings, self.run) + memory.bf16_weights(self.settings, self.run, 0)

    def shared_bias(self):
        """Bytes of the dense bias that all blocks are called with."""
        table = self.model.encoder.rel_pos_bias
        bias = () if table is None else table.shared(torch.bfloat16 if self.bf16 else torch.float32)
        return sum(tensor.untyped_storage().nbytes() for tensor in bias if tensor is not None)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@PASSES
def test_saved_activations_are_those_that_autograd_saves(shape, bf16, recompute):
    one = OnePass(shape, bf16, recompute=recompute)
    saved = saved_bytes(one.forward, [*one.model.parameters(), *one.model.buffers()])
    if recompute == "block":  # an input of the block that torch keeps by reference, for it is in a tuple
        saved += one.shared_bias()
    # Half a per cent: masks, indices and DropPath's factors are left out of the formula, and nothing else.
    assert one.saved() == pytest.approx(saved, rel=0.005)


def test_autocast_does_not_reach_the_softmax_of_attention(monkeypatch):
    """A GPU's autocast would make it in fp32 and keep each score twice; so its bytes are those of a CPU."""
    one, seen = OnePass("shared", bf16=True), []
    softmax = torch.Tensor.softmax

    def watched(scores, dim):
        seen.append((torch.is_autocast_enabled("cpu"), scores.dtype))
        return softmax(scores, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    one.forward()
    assert seen == [(False, torch.bfloat16)] * one.settings.model.depth


# On a CPU, of all that is fused, this project's kernels alone run, in Triton's interpreter.
BY_TRITON = pytest.mark.parametrize("shape", ["large vocabulary", pytest.param("shared", marks=pytest.mark.slow)])


def more_in_fp32(one):
    """In fp32 attention keeps two numbers a row, not one, and the bias once for all blocks, not one for each."""
    model, tokens = one.settings.model, one.settings.num_patches + 1
    rows = one.run.micro_batch * model.num_heads * tokens
    return 4 * model.depth * rows - (model.depth - 1) * memory.rounded_bias(one.settings, one.run)


@BY_TRITON
def test_by_triton_no_scores_and_no_logits_are_saved(shape):
    pytest.importorskip("triton")
    one = OnePass(shape, bf16=False, impl="triton")
    saved = saved_bytes(one.forward, [*one.model.parameters(), *one.model.buffers()])
    assert one.saved() + more_in_fp32(one) == pytest.approx(saved, rel=0.005)


@pytest.mark.slow
@BY_TRITON
def test_by_triton_a_pass_needs_what_was_saved_and_the_working_tensors(shape):
    pytest.importorskip("triton")
    one = OnePass(shape, bf16=False, impl="triton")

    def step():
        loss = one.forward()
        gc.collect()  # the interpreter's own references to the last kernel's arguments, which a GPU's launcher lacks
        loss.backward()

    step()  # gradients are there from the second on
    expected = one.saved() + more_in_fp32(one) + memory.working_tensors(one.settings, one.run, 0)
    assert expected == pytest.approx(peak_bytes(step), rel=0.05)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@PASSES
def test_a_pass_needs_what_was_saved_and_the_working_tensors(shape, bf16, recompute):
    one = OnePass(shape, bf16, recompute=recompute)
    one.step()  # gradients are there from the second on
    expected = one.saved() + memory.working_tensors(one.settings, one.run, 0)
    # A twentieth: single tensors of [B, N, D] within an operator's backward are not modelled, and weigh most in models
    # as small as these.
    assert expected == pytest.approx(peak_bytes(one.step), rel=0.05)


def rank_of(prefetch, device_type="cuda"):
    """A rank that trains BEiT-base, 64 pictures a pass, with DALL-E's tokenizer."""
    settings = Settings.model_validate({"train": {"global_batch": 64}, "zero": {"stage": 0}})
    ahead = memory.prefetched(prefetch, device_type)
    run = memory.Pass(64, True, 8192, "fused attention", DALLE, 112, ahead)
    config = {"zero_optimization": {"stage": 0}, "gradient_accumulation_steps": 1}
    return memory.rank_memory(settings, run, config, world_size=1)


def test_a_batch_that_comes_ahead_is_there_beside_the_one_of_the_step():
    views, numbers = 3 * (224**2 + 112**2), 75 + 196 + 1
    plain, pictures = rank_of("none"), rank_of("pictures")
    assert plain.parts["batch"] == 64 * (views + 8 * numbers)
    assert pictures.parts == {**plain.parts, "batch": 2 * plain.parts["batch"]}


def test_tokens_that_are_made_ahead_need_their_memory_beside_the_backward_pass():
    pictures, tokens = rank_of("pictures"), rank_of("tokens")
    assert pictures.moment == tokens.moment == "the backward pass starts"
    ahead = {"tokens of the next batch": encoding_memory(DALLE, 112, 64, bf16=True)}
    assert tokens.parts == pictures.parts | ahead


@pytest.mark.parametrize("prefetch", ["pictures", "tokens"])
def test_a_cpu_holds_nothing_of_the_next_batch(prefetch):
    assert rank_of(prefetch, "cpu") == rank_of("none", "cpu")


imitated = pytest.mark.skipif(not has_bf16(), reason="this processor imitates bf16, in buffers that no other needs")


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=imitated)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(64, 32, 3, 1), (512, 16, 4, 1), (256, 32, 3, 2)], ids=str)
def test_tokens_need_what_the_first_group_holds(size, bf16):
    tokenizer = DiscreteVAE(*size, output_channels=0).requires_grad_(False)
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)

    def encode():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            tokenizer.encode(pictures)

    encode()
    expected = encoding_memory(TokenizerSize(*size), 64, 2, bf16=bf16)
    # A convolution's small tensors are left out.
    assert expected == pytest.approx(peak_bytes(encode), rel=0.02)


@pytest.mark.parametrize(
    ("stage", "recompute"),
    [
        (1, "none"),
        (1, "block"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "none"), (3, "none"), (0, "mlp"), (3, "block"))),
    ],
)
def test_one_rank_holds_and_needs_what_the_formula_says(tmp_path, stage, recompute):
    case = {"stage": stage, "accumulation": 2, "micro_batch": 2, "bf16": False, "offload": False}
    case["recompute"] = recompute
    check(measure(tmp_path, 1, **case), case)


def check(measured, case):
    tolerance = HELD_WITH_OFFLOAD if case["offload"] else HELD
    assert measured["held by formula"] == pytest.approx(measured["held"], rel=tolerance), case
    assert measured["peak by formula"] == pytest.approx(measured["peak"], rel=PEAK), case


# The batch and small tensors of DeepSpeed's own are held too; and with offload, which passes gradients through buffers
# that this counts within the step, a twentieth.
HELD, HELD_WITH_OFFLOAD = 0.01, 0.05
# Not all gradients that have come are there when the last activations are, as the formula supposes. For a model on a
# GPU it is to be within 15 %.
PEAK = 0.08

CASES = [
    {"stage": stage, "accumulation": accumulation, "micro_batch": 4, "bf16": bf16, "offload": offload}
    for stage, accumulation, bf16, offload in (
        (0, 1, False, False),
        (0, 2, True, False),
        (1, 1, False, False),
        (1, 2, True, False),
        (2, 2, True, False),
        (3, 1, True, False),
        (1, 1, False, True),
        (3, 2, True, True),
    )
]
CASES += [
    {"stage": stage, "accumulation": 2, "micro_batch": size, "bf16": bf16, "offload": False, "recompute": recompute}
    for stage, size, bf16, recompute in (
        (0, 4, True, "mlp"),
        (1, 16, False, "mlp"),
        (1, 16, True, "block"),
        (2, 16, False, "block"),
        (3, 4, True, "mlp"),
        (3, 4, False, "block"),
    )
]
RUNS = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from fused_beit.engine.training import zero
from measured_step import measure
folder = pathlib.Path(sys.argv[2])
found = [measure(folder, 2, **case) for case in json.loads(sys.argv[3])]
rank = zero.dist.get_rank()
(folder / f"measured{rank}.json").write_text(json.dumps(found))
zero.stop()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, root):
    """What each of two ranks measured, for every case."""
    folder = tmp_path_factory.mktemp("measured")
    on_two_ranks([sys.executable, "-c", RUNS, str(root / "tests"), str(folder), json.dumps(CASES)], timeout=900)
    return [json.loads((folder / f"measured{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_two_ranks_hold_and_need_what_the_formula_says(two_ranks, number):
    fuller = max((rank[number] for rank in two_ranks), key=lambda measured: measured["peak"])
    check(fuller, CASES[number])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_two_ranks_send_what_the_formula_says(two_ranks, number):
    from fused_beit.engine.planning.step_time import traffic

    measured, case = two_ranks[0][number], CASES[number]
    sent = traffic(measured["parameters"], stage=case["stage"], world_size=2, accumulation=case["accumulation"])
    # A hundredth: norms, flags and the padding of buckets.
    assert sent.total == pytest.approx(measured["sent"], rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize("micro_batch", [16, 64])
def test_a_gpu_needs_what_the_formula_says(tmp_path, micro_batch, impl):
    """BEiT-base's step under bf16 autocast, by each of `memory.Operators`."""
    from fused_beit.engine.training import zero

    settings = Settings.model_validate(
        {"train": {"global_batch": micro_batch}, "zero": {"stage": 0}, "mask": {"num_patches": 75}}
    )
    runtime = zero.start(settings)
    model = MaskedImageModel(settings.model, 224, 8192, normalize="inception", impl=impl)
    engine = zero.ZeroEngine(model, settings, runtime, bf16=True)
    batch = [
        tensor.to(runtime.device)
        for tensor in (
            torch.zeros(micro_batch, 3, 224, 224, dtype=torch.uint8),
            torch.arange(75).repeat(micro_batch, 1),
            torch.zeros(micro_batch, 196, dtype=torch.int64),
            torch.arange(micro_batch),
        )
    ]
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loss, _ = engine(*batch, 0)
        engine.backward(loss)
        engine.step()
    run = memory.Pass(micro_batch, True, 8192, memory.operators_of(impl, "cuda"), NO_TOKENIZER, 14)
    config = zero.deepspeed_config(settings, 1, bf16=True)
    expected = memory.rank_memory(settings, run, config, world_size=1).total
    assert expected == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
