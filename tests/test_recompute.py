"""Activations computed again: the same bits from less memory, only where gradients are wanted, at every ZeRO stage."""

import importlib
import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from small_run import losses, make_tokenizer, small_settings
from waiting import no_waiting

from fused_beit.engine.config import ModelSettings, Settings
from fused_beit.engine.models import MaskedImageModel
from fused_beit.engine.training import zero
from fused_beit.engine.training.evaluation import evaluate
from fused_beit.engine.training.pretraining import open_run, pretrain

DEPTH, VOCAB = 3, 9
SHAPE = ModelSettings(patch_size=4, width=16, depth=DEPTH, num_heads=2, drop_path=0.2)
POSITIONS = torch.tensor([[0, 5, 9, -1], [3, 7, -1, -1]])
MODELS = [{}, {"rel_pos_bias": "per_layer"}, {"rel_pos_bias": "none", "layer_scale": 0.0, "drop_path": 0.0}]
AGAIN = ["mlp", "block"]


def model_and_batch(recompute="none", **settings):
    """A small model with weights of ordinary size, and what its forward takes."""
    torch.manual_seed(0)
    model = MaskedImageModel(SHAPE.model_copy(update=settings), 16, VOCAB, normalize="inception")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.encoder.recompute(recompute)
    pictures, tokens = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.randint(0, VOCAB, (2, 16))
    return model, (pictures, POSITIONS, tokens, torch.arange(2), 1)


def loss_and_gradients(recompute, bf16, run=lambda model: model, **settings):
    model, batch = model_and_batch(recompute, **settings)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = run(model)(*batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def calls(model):
    """How often each kind of module was called, counted from now on."""
    counted = Counter()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _inputs: counted.update([type(module).__name__]))
    return counted


@pytest.mark.parametrize("settings", MODELS, ids=str)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", AGAIN)
def test_loss_and_gradients_are_the_same_bits(recompute, bf16, settings):
    expected, found = (loss_and_gradients(what, bf16, **settings) for what in ("none", recompute))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("recompute", "mlps", "attentions", "blocks"),
    [("none", DEPTH, DEPTH, DEPTH), ("mlp", 2 * DEPTH, DEPTH, DEPTH), ("block", 2 * DEPTH, 2 * DEPTH, 2 * DEPTH)],
)
def test_what_is_asked_for_is_called_again_in_the_backward_pass_and_nothing_else(recompute, mlps, attentions, blocks):
    model, batch = model_and_batch(recompute)
    counted = calls(model)
    loss = model(*batch).loss
    assert (counted["Mlp"], counted["Attention"], counted["Block"]) == (DEPTH, DEPTH, DEPTH)
    loss.backward()
    assert (counted["Mlp"], counted["Attention"], counted["Block"]) == (mlps, attentions, blocks)
    assert (counted["RelativePositionBias"], counted["TokenHead"], counted["PatchEmbed"]) == (1, 1, 1)


@pytest.mark.parametrize("recompute", AGAIN)
def test_without_gradients_nothing_is_called_again(recompute):
    model, batch = model_and_batch(recompute)
    counted = calls(model)
    with torch.no_grad():
        model.eval()(*batch)
    assert (counted["Mlp"], counted["Block"]) == (DEPTH, DEPTH)


@pytest.mark.parametrize("recompute", AGAIN)
def test_a_pass_that_computes_again_never_waits_for_the_device(recompute):
    model, batch = model_and_batch(recompute)
    with no_waiting():
        model(*batch).loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", AGAIN)
def test_it_compiles_with_the_model(recompute):
    torch.compiler.reset()
    expected = loss_and_gradients("none", bf16=False)
    found = loss_and_gradients(
        recompute, bf16=False, run=lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A DeepSpeed file for stage 3 that shards small weights too."""
    path = tmp_path_factory.mktemp("sharded") / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    return path


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        (0, "bf16"),
        (3, "fp32"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "fp32"), (2, "bf16"), (3, "bf16"))),
    ],
)
def test_runs_end_with_the_same_losses_and_weights(tmp_path, tokenizer, sharded, stage, precision):
    how = {"train__precision": precision, "train__micro_batch": 4, "train__max_steps": 4, "train__eval_every": 2}
    how |= {"zero__config": sharded} if stage == 3 else {"zero__stage": stage}
    found = {}
    for recompute in ("none", *AGAIN):
        folder = tmp_path / recompute
        assert pretrain(small_settings(folder, tokenizer, train__recompute=recompute, **how))
        found[recompute] = losses(folder), load_file(folder / "model.safetensors")
    expected_losses, expected = found["none"]
    for recompute in AGAIN:
        assert found[recompute][0] == expected_losses
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found[recompute][1].items())


@pytest.mark.parametrize("recompute", AGAIN)
def test_at_stage_3_deepspeed_leaves_every_module_that_it_is_in(sharded, recompute):
    """A recomputation that stopped as soon as it may would leave some on DeepSpeed's stack for ever."""
    entered = importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK
    settings = Settings.model_validate({"train": {"global_batch": 2, "threads": 1}, "zero": {"config": sharded}})
    model, batch = model_and_batch(recompute)
    engine = zero.ZeroEngine(model, settings, zero.start(settings), bf16=False)
    before = list(entered)
    for _ in range(2):
        engine.backward(engine(*batch).loss)
        engine.step()
    assert entered == before


def test_a_run_says_that_it_computes_again_and_counts_the_models_work_alone(tmp_path, tokenizer, capsys):
    said, flops, counted = {}, {}, {}
    for recompute in ("none", "block"):
        settings = small_settings(tmp_path / recompute, tokenizer, train__recompute=recompute)
        with open_run(settings, rehearsal=True) as run:
            counted[recompute] = calls(run.engine.module)
            evaluate(run.engine, run.tokenizer, run.val_batches(run.pictures.val, 8, 0, 1))
            flops[recompute] = run.flops
        said[recompute] = capsys.readouterr().out
    assert (
        "  recomputed       in the backward pass, all of each block but its inputs; neither FLOPs nor mfu"
        in said["block"]
    )
    assert "  recomputed  " not in said["none"]
    assert flops["block"] == flops["none"]
    assert counted["block"] == counted["none"], "an evaluation repeats nothing"
