"""fuse(model) on timm's BEiT, Swin and ViT: what it computes, keeps, and refuses. Run by `make test-peers`."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from fused_models import (
    assert_fused_is_as_exact,
    output_of,
    outputs_and_grads,
    pictures,
    randomised,
)
from timm_models import SMALL, SMALL_VIT, beit, inputs, made, swin, vit
from torch import nn

from fused_beit.kernels import fuse, unfuse
from fused_beit.kernels.testing import assert_no_worse_than_eager

timm = pytest.importorskip("timm", reason="timm cannot be imported here; `make test-peers` runs this where it can")

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_gradients_are_those_of_the_model(name, impl):
    model = made(name)
    assert_fused_is_as_exact(model, inputs(model), impl)


@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_gradients_are_those_of_the_model_with_the_triton_kernels(name):
    model = made(name, window_size=3, img_size=48) if "swin" in name else made(name)
    assert_fused_is_as_exact(model, inputs(model), "triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("beit_base_patch16_224", "timm BEiT attention", 12),
        ("beitv2_base_patch16_224", "timm BEiT attention", 12),
        ("swin_tiny_patch4_window7_224", "timm Swin window attention", 12),
        ("vit_base_patch16_224", "timm ViT attention", 12),
    ],
)
def test_a_model_of_full_size_is_served(name, kind, count):
    model = randomised(timm.create_model(name, pretrained=False))
    given = {"x": pictures(224, 1)}
    with torch.no_grad():
        eager = output_of(model, given)
        exact = output_of(model.double(), {"x": given["x"].double()})
        report = fuse(model.float())
        actual = output_of(model, given)
    assert [found for _, found in report.replaced] == [kind] * count
    assert report.kept == []
    assert_no_worse_than_eager(name, actual, eager, exact)


@pytest.mark.parametrize("fused_attn", [True, False])
@pytest.mark.parametrize("make", [beit, swin, vit])
def test_both_of_its_own_paths_are_the_same_operator(make, fused_attn):
    model = make()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_attn
    assert_fused_is_as_exact(model, inputs(model), "reference")


FORMS = {
    "a shared table": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "a shared table and one a layer": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True},
    "no table": {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
    "no bias of queries and values": {"qkv_bias": False},
    "no layer scale and SwiGLU": {"init_values": None, "swiglu_mlp": True, "scale_mlp": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_beit_is_served(form):
    model = beit(**FORMS[form])
    assert_fused_is_as_exact(model, inputs(model), "reference")


def test_a_bias_added_apart_from_the_product_is_served():
    model = beit()
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    assert_fused_is_as_exact(model, inputs(model), "reference")


def test_shifted_windows_of_several_pictures_take_their_own_masks():
    model = swin(img_size=112)  # 28 x 28 patches: 16 windows of a picture, 7 of them with a mask
    block = model.layers[0].blocks[1]
    assert block.attn_mask.shape == (16, 49, 49)
    assert (block.attn_mask != 0).flatten(1).any(1).sum() == 7
    given = inputs(model, batch=3)
    expected = output_of(model, given)
    fuse(model, impl="reference")
    torch.testing.assert_close(output_of(model, given), expected)
    block.attn_mask.zero_()
    assert not torch.allclose(output_of(model, given), expected, atol=1e-3)


def test_a_window_that_is_not_square_is_served():
    model = swin(window_size=(7, 2))
    assert_fused_is_as_exact(model, inputs(model), "reference")


def gated_vit():
    from timm.layers.attention import Attention

    class Block(nn.Sequential):
        patch_embed = type("PatchEmbed", (), {"img_size": (16, 16)})

        def forward(self, x):
            return super().forward(x.flatten(2).transpose(1, 2)[:, :20])

    attention = Attention(
        32, num_heads=2, attn_head_dim=8, dim_out=12, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm
    )
    return randomised(Block(nn.Linear(3, 32), attention))


@pytest.mark.parametrize("make", [lambda: vit(qk_norm=True), gated_vit], ids=["qk_norm", "gate, norm, head size"])
def test_norms_and_gates_of_a_vit_are_kept(make):
    model = make()
    assert_fused_is_as_exact(model, inputs(model), "reference")


@pytest.mark.parametrize("make", [beit, swin, vit, lambda: vit(qk_norm=True)], ids=["beit", "swin", "vit", "qk_norm"])
def test_under_bf16_autocast_the_output_is_no_worse(make):
    model = make()
    given = inputs(model)
    with torch.no_grad():
        exact = output_of(copy.deepcopy(model).double(), {"x": given["x"].double()})
        with torch.autocast("cpu", torch.bfloat16):
            eager = output_of(model, given)
            fuse(model, impl="reference")
            actual = output_of(model, given)
    assert_no_worse_than_eager("output", actual, eager, exact)


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(2, 1, 10, 10) > 0.3,
        torch.randn(2, 1, 10, 10),
        torch.randn(10, 10),
        torch.randn(1, 2, 10, 10),
    ],
    ids=["bool a picture", "a picture", "shared", "a head"],
)
def test_masks_of_a_vit_are_served(mask):
    attention = vit().blocks[0].attn.double()
    mask = mask if mask.dtype == torch.bool else mask.double()
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    expected = attention(x, attn_mask=mask)
    assert not torch.allclose(attention(x), expected)
    fuse(attention, impl="reference")
    torch.testing.assert_close(attention(x, attn_mask=mask), expected)


@pytest.mark.parametrize("make", [beit, swin, vit, lambda: beit(use_shared_rel_pos_bias=True)])
def test_unfuse_gives_the_same_bits_and_the_state_dict_the_same_tensors(make):
    model = make()
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    before = outputs_and_grads(model, inputs(model))
    fuse(model, impl="reference")
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    output_of(model, inputs(model))
    after = outputs_and_grads(unfuse(model), inputs(model))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_pickle_is_loaded_in_a_fresh_process(tmp_path):
    model = swin()
    fuse(model)
    torch.save((model, inputs(model)["x"], output_of(model, inputs(model))), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert type(model.layers[0].blocks[0].attn).__name__ == 'FusedWindowAttention'\n"
        "torch.testing.assert_close(model(x), expected)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "model.pt"]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize("make", [beit, swin, vit])
def test_a_fused_model_compiles_without_a_graph_break(make):
    torch.compiler.reset()
    model = make()
    fuse(model, impl="reference")
    expected = outputs_and_grads(model, inputs(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs(model))
    torch.testing.assert_close(output, expected["output"])
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    names = [name for name in expected if name != "output"]
    grads = torch.autograd.grad(output, [model.get_parameter(name.removeprefix("grad ")) for name in names], cotangent)
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the way timm resizes a table
def test_a_table_resized_after_fusing_is_used_at_its_new_size():
    model, resized = swin(), swin()
    fuse(model, impl="reference")
    for found in (model, resized):
        found.set_input_size((64, 64), window_size=(4, 4))
    torch.testing.assert_close(model(pictures(64)), resized(pictures(64)))


def test_an_index_of_another_order_is_gathered_as_it_is():
    model = beit()
    for block in model.blocks:
        block.attn.relative_position_index.copy_(block.attn.relative_position_index.flip(0))
    assert fuse(copy.deepcopy(model)).kept == []
    assert_fused_is_as_exact(model, inputs(model), "reference")


def test_a_known_index_is_expanded_and_not_gathered():
    model = beit(use_shared_rel_pos_bias=True)
    fuse(model)
    assert [model.rel_pos_bias.fusion.window, model.blocks[0].attn.fusion.window] == [(3, 3), (3, 3)]
    windows = swin()
    fuse(windows)
    assert windows.layers[0].blocks[0].attn.fusion.window == (7, 7)


@pytest.mark.parametrize("make", [beit, swin, vit])
def test_attention_dropout_is_refused_in_training_alone(make):
    model = make(attn_drop_rate=0.1)
    with pytest.raises(ValueError, match=r"attention dropout of 0\.1 in training"):
        fuse(model.train())
    fuse(model.eval())
    output_of(model, inputs(model))
    with pytest.raises(RuntimeError, match=r"attention dropout of 0\.1 in training is not served; unfuse"):
        model.train()(**inputs(model))


TRACED = [beit, lambda: beit(use_shared_rel_pos_bias=True), swin, vit]
TRACED_IDS = ["beit", "beit, a shared table", "swin", "vit"]


@pytest.mark.parametrize("make", TRACED, ids=TRACED_IDS)
def test_fx_records_a_fused_module_as_one_node(make):
    model = make()
    report = fuse(model)
    expected = outputs_and_grads(model, inputs(model))
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert {name for name, _ in report.replaced} <= set(called)
    actual = outputs_and_grads(traced, inputs(model))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision, of nodes that differ in training
@pytest.mark.parametrize("make", TRACED, ids=TRACED_IDS)
def test_features_are_extracted_from_a_fused_model(make):
    model = make()
    names = [name for name, module in model.named_modules() if hasattr(module, "attn_drop")]
    expected = timm.models.create_feature_extractor(model, names)(**inputs(model))
    fuse(model, impl="reference")
    actual = timm.models.create_feature_extractor(model, names)(**inputs(model))
    torch.testing.assert_close(actual, expected)


def test_a_traced_model_still_refuses_and_is_unfused():
    model = vit(attn_drop_rate=0.1)
    expected = output_of(model, inputs(model))
    fuse(model)
    traced = torch.fx.symbolic_trace(model)
    with pytest.raises(RuntimeError, match="attention dropout"):
        traced.train()(**inputs(model))
    assert torch.equal(output_of(unfuse(traced).eval(), inputs(model)), expected)


@pytest.mark.parametrize("make", [beit, swin, vit])
def test_arguments_keep_their_names(make):
    model = make()
    attention = next(module for module in model.modules() if hasattr(module, "attn_drop"))
    names = list(inspect.signature(attention.forward).parameters)
    fuse(model)
    assert list(inspect.signature(attention.forward).parameters) == names


def test_a_causal_vit_is_refused():
    attention = vit().blocks[0].attn
    fuse(attention)
    with pytest.raises(RuntimeError, match="is_causal=True is not served"):
        attention(torch.randn(1, 5, 32), is_causal=True)


def test_another_scale_is_left_alone():
    model = vit()
    model.blocks[0].attn.scale = 1.0
    assert fuse(model).kept[0][2].startswith("its scale is 1.0")


@pytest.mark.parametrize("make", [beit, swin, vit])
def test_a_fused_model_runs_without_storage(make):
    with torch.device("meta"):
        model = make()
    fuse(model)
    assert model(torch.empty(2, 3, *model.patch_embed.img_size, device="meta")).shape == (2, 5)


def test_a_model_without_storage_is_served_once_it_has_one():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=5, **SMALL_VIT)
    assert len(fuse(model).replaced) == 2
    model.load_state_dict(vit().state_dict(), assign=True)
    torch.testing.assert_close(model.eval()(pictures(48)), vit()(pictures(48)))
