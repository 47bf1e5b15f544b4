"""fuse(model) on timm's models that someone changed, and on those that it does not know. Run by `make test-peers`."""

import copy
import subprocess
import sys

import pytest
import torch
from fused_models import (
    LowRank,
    assert_dead_rows_are_those_of_the_model,
    assert_fused_is_as_exact,
    output_of,
    randomised,
)
from timm_models import beit, inputs, swin, vit
from torch import nn

from fused_beit.kernels import fuse, unfuse

timm = pytest.importorskip("timm", reason="timm cannot be imported here; `make test-peers` runs this where it can")

pytestmark = pytest.mark.peers


HOOKS = {
    "forward": lambda child: child.register_forward_hook(lambda *_: None),
    "forward, with kwargs": lambda child: child.register_forward_hook(lambda *_: None, with_kwargs=True),
    "forward, before": lambda child: child.register_forward_pre_hook(lambda *_: None),
    "backward": lambda child: child.register_full_backward_hook(lambda *_: None),
    "backward, before": lambda child: child.register_full_backward_pre_hook(lambda *_: None),
    "backward, of the old kind": lambda child: child.register_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("make", "child"), [(beit, "attn_drop"), (swin, "attn_drop"), (swin, "softmax"), (vit, "attn_drop")]
)
def test_a_hook_that_would_be_lost_is_respected_before_and_after(make, child, hook):
    model = make()
    first = next(module for module in model.modules() if hasattr(module, "attn_drop"))
    why = f"a hook on its {child} would not be called"
    handle = HOOKS[hook](getattr(first, child))
    assert [found for _, _, found in fuse(model).kept] == [why]
    handle.remove()
    assert fuse(model).kept == []
    output_of(model, inputs(model))
    handle = HOOKS[hook](getattr(first, child))
    with pytest.raises(RuntimeError, match=rf"{why}; unfuse\(model\) gives the original forward back"):
        output_of(model, inputs(model))
    handle.remove()
    output_of(model, inputs(model))


AT_STAGE_3 = """
import sys
import deepspeed, torch
from fused_beit.engine.config import Settings
from fused_beit.engine.training import zero
from fused_beit.kernels import fuse
sys.path.insert(0, sys.argv[1])
from timm_models import beit, inputs
settings = Settings.model_validate({"train": {"global_batch": 2}, "zero": {"stage": 3}})
zero.start(settings)
model = beit()
given = inputs(model)
expected = model(**given).sum().item()
fuse(model)
optimizer = torch.optim.AdamW(model.parameters())
config = zero.deepspeed_config(settings, 1, bf16=False)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
loss = engine(**given).sum()
engine.backward(loss)
engine.step()
assert abs(loss.item() - expected) < 1e-4 * abs(expected), (loss.item(), expected)
"""


@pytest.mark.slow
def test_a_fused_model_trains_at_zero_stage_3_which_puts_hooks_on_every_module(root):
    shown = subprocess.run(
        [sys.executable, "-c", AT_STAGE_3, root / "tests"], capture_output=True, text=True, timeout=300
    )
    assert shown.returncode == 0, shown.stderr


class Watcher(nn.Module):
    """What one puts in the place of a dropout to see attention weights."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, weights):
        self.seen += 1
        return weights


def test_a_child_that_does_something_of_its_own_is_respected_before_and_after():
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    model.blocks[0].attn.attn_drop = watcher = Watcher()
    report = fuse(model)
    (name, _, why) = report.kept[0]
    assert (name, why.endswith("Watcher, which would not be called")) == ("blocks.0.attn", True)
    output_of(model, inputs(model))
    model.blocks[1].attn.attn_drop = watcher
    with pytest.raises(RuntimeError, match=r"its attn_drop is a .*Watcher, which would not be called; unfuse"):
        output_of(model, inputs(model))
    output_of(unfuse(model), inputs(model))
    assert watcher.seen == 1 + 1 + 2  # the refused run came through the first block too


def test_a_hook_on_a_norm_that_does_nothing_is_called():
    model, seen = vit(), []
    expected = output_of(model, inputs(model))
    fuse(model)
    model.blocks[0].attn.q_norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(output_of(model, inputs(model)), expected)
    assert seen == [(2, 2, 10, 16)]


@pytest.mark.parametrize("make", [lambda: beit(qkv_bias=False), swin, vit], ids=["beit", "swin", "vit"])
def test_what_was_put_around_a_projection_is_called(make):
    model = make()
    for module in [module for module in model.modules() if hasattr(module, "attn_drop")]:
        module.qkv = LowRank(module.qkv)
    model = randomised(model)
    assert fuse(copy.deepcopy(model)).kept == []
    assert_fused_is_as_exact(model, inputs(model), "reference")


def wrap_both_linears(attention):
    attention.qkv, attention.proj = LowRank(attention.qkv), LowRank(attention.proj)


def replace(name, value):
    def change(attention):
        vars(attention)["_parameters"].pop(name, None)
        setattr(attention, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (wrap_both_linears, "neither a head_dim nor the sizes of its qkv or proj say how many channels a head has"),
        (replace("scale", nn.Parameter(torch.ones(2, 1, 1))), "its scale is a Parameter, and that of its head size"),
        (replace("num_heads", None), "it is not as its class makes it (TypeError: "),
        (replace("window_size", None), "it is not as its class makes it (TypeError: "),
        (replace("attn_drop", None), "its attn_drop is a builtins.NoneType, which would not be called"),
        (replace("softmax", nn.Sequential(nn.Softmax(-1))), "its softmax is a torch.nn.modules.container.Sequential"),
        (replace("_get_rel_pos_bias", lambda: 0), "its _get_rel_pos_bias was replaced on the module itself"),
        (replace("relative_position_bias_table", nn.Identity()), "its relative_position_bias_table is a torch.nn"),
    ],
)
def test_an_odd_block_is_kept_and_does_not_stop_the_others(change, why):
    model = swin()
    change(model.layers[0].blocks[1].attn)
    report = fuse(model)
    assert [name for name, _, _ in report.kept] == ["layers.0.blocks.1.attn"]
    assert report.kept[0][2].startswith(why)
    assert len(report.replaced) == 4


def test_an_attention_dropout_that_was_replaced_by_nothing_is_served():
    model = vit(attn_drop_rate=0.1)
    for block in model.blocks:
        block.attn.attn_drop = nn.Identity()
    assert fuse(model.train()).kept == []


@pytest.mark.parametrize("make", [beit, swin])
def test_a_table_with_more_rows_than_its_window_has_is_gathered(make):
    model = make()
    for module in [module for module in model.modules() if hasattr(module, "relative_position_bias_table")]:
        table = module.relative_position_bias_table
        module.relative_position_bias_table = nn.Parameter(torch.cat([table, table[:1]]).detach())
    assert_fused_is_as_exact(model, inputs(model), "reference")


@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
def test_a_query_without_a_key_in_a_mask_of_each_head_gives_what_it_gave(impl):
    assert_dead_rows_are_those_of_the_model(vit().blocks[0].attn, "attn_mask", impl)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("swinv2_tiny_window8_256", r"blocks\.0\.attn: .*swin_transformer_v2\.WindowAttention"),
        ("xcit_nano_12_p16_224", r"blocks\.0\.attn: .*xcit\.XCA,"),
        ("cait_xxs24_224", r"blocks\.0\.attn: .*TalkingHeadAttn,.*blocks_token_only\.0\.attn: .*ClassAttn,"),
        ("eva02_tiny_patch14_224", r"blocks\.0\.attn: .*EvaAttention,"),
        ("vit_base_patch16_rope_224", r"blocks\.0\.attn: .*AttentionRope|blocks\.0\.attn: .*EvaAttention,"),
    ],
)
def test_attention_that_is_not_known_is_named(name, seen):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    with pytest.raises(ValueError, match=rf"(?s){seen}.*not a class that is known here"):
        fuse(model)


def test_attention_that_pools_is_named_where_all_else_is_served():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_siglip_224", pretrained=False, depth=2)
    report = fuse(model)
    assert len(report.replaced) == 2
    assert [(name, cls.rpartition(".")[2]) for name, cls, _ in report.kept] == [("attn_pool", "AttentionPoolLatent")]


def test_the_shifted_windows_of_torchvision_are_named():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.swin_v2_t()
    with pytest.raises(ValueError, match=r"features\.1\.0\.attn: .*ShiftedWindowAttentionV2, not a class"):
        fuse(model)
