"""fuse(model) on transformers' BEiT, Swin and those written like ViT: what it computes, keeps, and refuses."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from fused_models import (
    LowRank,
    assert_dead_rows_are_those_of_the_model,
    assert_fused_is_as_exact,
    output_of,
    outputs_and_grads,
    pictures,
    randomised,
)

from fused_beit.kernels import FuseReport, Impl, ImplUnavailable, fuse, unfuse
from fused_beit.kernels.rel_pos_attention.op import PACKED

transformers = pytest.importorskip("transformers")

SIZE = 32  # 4 x 4 patches of 8, and a CLS token
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": 8,
    "attn_implementation": "sdpa",  # the eager one rounds float64 scores to fp32
}
DINOV2 = {name: value for name, value in SHAPE.items() if name != "intermediate_size"} | {"qkv_bias": False}
SWIN = {
    "image_size": 16,
    "patch_size": 2,  # 8 x 8 patches: four windows, and shifted ones with their masks
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "attn_implementation": "sdpa",
}


# Without a bias of the keys, whose gradient is nothing but rounding.
FAMILIES = {
    "beit, a table a layer": lambda: transformers.BeitModel(beit(use_relative_position_bias=True)),
    "beit, a shared table": lambda: transformers.BeitModel(beit(use_shared_relative_position_bias=True)),
    "beit, both": lambda: transformers.BeitModel(
        beit(use_relative_position_bias=True, use_shared_relative_position_bias=True)
    ),
    "beit, no table": lambda: transformers.BeitModel(beit(use_absolute_position_embeddings=True)),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SHAPE, qkv_bias=False)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**SHAPE, qkv_bias=False)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2)),
    "dinov2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=2)
    ),
}


def of_the_same_source(name, head="Model", **settings):
    """A family whose attention has the text of ViT's, where the installed transformers is as new."""

    def make():
        if not hasattr(transformers, f"{name}{head}"):
            pytest.skip(f"transformers {transformers.__version__} has no {name}{head}")
        config = getattr(transformers, f"{name}Config")(**(SHAPE | {"qkv_bias": False} | settings))
        return getattr(transformers, f"{name}{head}")(config)

    return make


FAMILIES |= {
    "vit mae": of_the_same_source("ViTMAE", mask_ratio=0.5),
    "vit msn": of_the_same_source("ViTMSN"),
    "i-jepa": of_the_same_source("IJepa"),
    "ast": of_the_same_source("AST", num_mel_bins=16, max_length=24, frequency_stride=8, time_stride=8),
    "vivit": of_the_same_source("Vivit", image_size=16, num_frames=4, tubelet_size=(2, 8, 8)),
    "pixio": of_the_same_source("Pixio", n_cls_tokens=2),
    "tips v2": of_the_same_source("Tipsv2Vision"),
    "rf-detr": of_the_same_source("RfDetrDinov2", "Backbone", num_windows=2, out_indices=[2]),
    "lw-detr": of_the_same_source("LwDetrViT", "Backbone", pretrain_image_size=SIZE, num_windows=4, out_indices=[2]),
    "swin": lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN, qkv_bias=False)),
}
OTHER_INPUTS = {
    "swin": {"pixel_values": pictures(16)},
    "vit mae": {"pixel_values": pictures(SIZE), "noise": torch.rand(2, 16, generator=torch.Generator().manual_seed(4))},
    "ast": {"input_values": pictures(24)[:, 0, :, :16]},
    "vivit": {"pixel_values": torch.stack([pictures(16, 4), pictures(16, 4).flip(0)])},
}


def beit(**settings):
    defaults = {"layer_scale_init_value": 0.1, "drop_path_rate": 0.0, "use_mean_pooling": False}
    return transformers.BeitConfig(**(SHAPE | defaults | settings))


def beit_model(**settings):
    return randomised(transformers.BeitModel(beit(use_relative_position_bias=True, **settings)))


def inputs(size: int = SIZE):
    return {"pixel_values": pictures(size)}


def inputs_of(family: str):
    return OTHER_INPUTS.get(family, inputs())


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_model(family, impl):
    assert_fused_is_as_exact(randomised(FAMILIES[family]()), inputs_of(family), impl)


@pytest.mark.parametrize(
    "family",
    ["beit, a table a layer", "beit, a shared table", "vit", "vit mae", pytest.param("swin", marks=pytest.mark.slow)],
)
def test_outputs_and_gradients_are_those_of_the_model_with_the_triton_kernels(family):
    assert_fused_is_as_exact(randomised(FAMILIES[family]()), inputs_of(family), "triton")


@pytest.mark.parametrize(
    "head", ["BeitForMaskedImageModeling", "BeitForImageClassification", "BeitForSemanticSegmentation", "BeitBackbone"]
)
def test_a_model_with_a_head_is_served(head):
    settings = {"vocab_size": 7, "num_labels": 3, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
    config = beit(use_relative_position_bias=True, use_mask_token=True, **settings)
    model = randomised(getattr(transformers, head)(config)).double()
    given = {"pixel_values": pictures(SIZE).double()}
    expected = output_of(model, given)
    report = fuse(model)
    assert [kind for _, kind in report.replaced].count("transformers BEiT attention") == 4
    torch.testing.assert_close(output_of(model, given), expected)


def test_every_parameter_of_the_state_dict_stays_the_same_tensor():
    model = beit_model()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    fuse(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert beit_model().load_state_dict(model.state_dict()).missing_keys == []


def test_modules_keep_their_type_for_isinstance():
    model = beit_model()
    expected = [type(module) for module in model.modules()]
    fuse(model)
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), expected, strict=True))


def test_unfuse_gives_the_same_bits_as_before():
    model = beit_model()
    attributes = [sorted(module.__dict__) for module in model.modules()]
    before = outputs_and_grads(model, inputs())
    fuse(model, impl="reference")
    assert not torch.equal(output_of(model, inputs()), before["output"])  # it did compute something else
    assert unfuse(model) is model
    after = outputs_and_grads(model, inputs())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert attributes == [sorted(module.__dict__) for module in model.modules()]


def test_fusing_twice_changes_nothing_and_another_impl_takes_over():
    model = beit_model()
    first = fuse(model, impl="reference")
    output, classes = output_of(model, inputs()), [type(module) for module in model.modules()]
    assert fuse(model, impl="reference").replaced == first.replaced
    assert torch.equal(output_of(model, inputs()), output)
    assert [type(module) for module in model.modules()] == classes
    fuse(model, impl="sdpa")
    assert model.layers[0].attention.fusion.impl == "sdpa"


def test_a_copy_is_fused_too_and_shares_nothing():
    model = beit_model()
    fuse(model)
    copied = copy.deepcopy(model)
    assert torch.equal(output_of(copied, inputs()), output_of(model, inputs()))
    unfuse(model)
    assert type(copied.layers[0].attention) is not type(model.layers[0].attention)
    assert copied.layers[0].attention.q_proj.weight is not model.layers[0].attention.q_proj.weight


def test_a_pickle_is_loaded_in_a_fresh_process(tmp_path):
    model = beit_model()
    fuse(model, impl="reference")
    torch.save((model, inputs(), output_of(model, inputs())), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, inputs, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "from fused_beit.kernels import fuse, unfuse\n"
        "assert type(model.layers[0].attention).__name__ == 'FusedBeitAttention'\n"
        "assert torch.equal(model(**inputs)[0], expected)\n"
        "assert type(unfuse(model).layers[0].attention).__name__ == 'BeitAttention'\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "model.pt"]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stderr


def test_a_fused_model_compiles_without_a_graph_break():
    torch.compiler.reset()
    model = beit_model()
    fuse(model, impl="reference")
    expected = outputs_and_grads(model, inputs())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs())[0]
    torch.testing.assert_close(output, expected["output"])
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    table = model.layers[0].relative_position_bias.relative_position_bias_table
    (grad,) = torch.autograd.grad(output, table, cotangent)
    expected_grad = expected["grad layers.0.relative_position_bias.relative_position_bias_table"]
    torch.testing.assert_close(grad, expected_grad)


def test_hooks_stay():
    model, seen = beit_model(), []
    model.layers[0].attention.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    fuse(model)
    output_of(model, inputs())
    assert seen == [(2, 17, 16)]


def test_a_picture_of_another_size_has_its_table_resized_by_the_original():
    model = beit_model()
    expected = output_of(model, inputs(48))
    fuse(model, impl="sdpa")
    torch.testing.assert_close(output_of(model, inputs(48)), expected)


def test_a_mask_of_padding_is_served():
    model = randomised(FAMILIES["vit"]())
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[0, 5:] = 0
    masked = inputs() | {"attention_mask": mask}
    assert not torch.allclose(output_of(model, masked), output_of(model, inputs()))
    assert_fused_is_as_exact(model, masked, "reference")


@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
def test_a_query_without_a_key_in_a_mask_of_each_head_gives_what_it_gave(impl):
    attention = randomised(FAMILIES["vit"]()).layers[0].attention
    assert_dead_rows_are_those_of_the_model(attention, "attention_mask", impl)


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_what_was_put_around_a_projection_is_called(name):
    model = beit_model()
    for layer in model.layers:
        setattr(layer.attention, name, LowRank(getattr(layer.attention, name)))
    assert_fused_is_as_exact(randomised(model), inputs(), "reference")


def test_the_shifted_windows_of_swin_take_their_own_masks():
    model = randomised(FAMILIES["swin"]()).double()
    layer, seen = model.encoder.layers[0].blocks[1], []
    layer.attention.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    given = {"pixel_values": pictures(16).double()}
    expected = output_of(model, given)
    report = fuse(model, impl="reference")
    torch.testing.assert_close(output_of(model, given), expected)
    assert seen[1].shape == (4, 16, 16) and seen[1].any()
    assert report.kept == []
    assert layer.attention.relative_position_bias.fusion.window == (4, 4)
    layer.get_attn_mask = lambda *_, **__: None
    assert not torch.allclose(output_of(model, given), expected, atol=1e-3)


def test_unfuse_gives_swin_the_same_bits_as_before():
    model = randomised(FAMILIES["swin"]())
    before = outputs_and_grads(model, inputs_of("swin"))
    fuse(model, impl="sdpa")
    after = outputs_and_grads(unfuse(model), inputs_of("swin"))
    assert all(torch.equal(after[name], before[name]) for name in before)


def without_a_config(layer):
    layer.attention.config = None


def with_a_learned_scale(layer):
    layer.attention.scaling = torch.nn.Parameter(torch.tensor(0.3))


def with_no_causal_flag(layer):
    del layer.attention.is_causal


def with_a_dropout_that_is_no_number(layer):
    layer.attention.attention_dropout = None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_a_config, "it is not as its class makes it (AttributeError: 'NoneType' object has no attribute"),
        (with_a_learned_scale, "its scaling is a Parameter, where a number is known"),
        (with_no_causal_flag, "it is not as its class makes it (AttributeError"),
        (with_a_dropout_that_is_no_number, "it is not as its class makes it (TypeError"),
    ],
)
def test_an_odd_layer_is_kept_and_does_not_stop_the_others(change, why):
    model = beit_model()
    change(model.layers[0])
    report = fuse(model)
    assert [name for name, _, _ in report.kept] == ["layers.0.attention"]
    assert report.kept[0][2].startswith(why)
    assert "layers.1.attention" in [name for name, _ in report.replaced]


def test_a_fused_module_whose_class_was_changed_is_kept_and_the_model_is_not_half_unfused():
    model = beit_model()
    fuse(model)
    attention = model.layers[1].attention
    attention.__class__ = type("Wrapped", (type(attention),), {})
    assert fuse(model).kept[0][0] == "layers.1.attention"
    with pytest.raises(RuntimeError, match="its class was changed since it was fused"):
        unfuse(model)
    assert type(model.layers[0].attention).__name__ == "FusedBeitAttention"


def test_a_table_of_another_size_put_in_after_fusing_is_resized_by_the_original():
    model = beit_model()
    bias = model.layers[0].relative_position_bias
    fuse(model)
    rows = torch.randn(bias.relative_position_bias_table.shape[0] + 5, 2)
    bias.relative_position_bias_table = torch.nn.Parameter(rows)
    actual = bias((4, 4))
    assert torch.equal(actual, unfuse(bias)((4, 4)))


def refused(model, why, **arguments):
    with pytest.raises(RuntimeError, match=why):
        model(**inputs(), **arguments)


def test_what_cannot_be_served_is_refused_where_it_is_asked_for():
    model = beit_model()
    fuse(model)
    refused(model, "output_attentions is not served", output_attentions=True)
    refused(model, "head_mask is not served", head_mask=torch.ones(2))
    refused(model, r"same for all pictures.*\[2, 2, 17, 17\]", attention_mask=torch.arange(34).view(2, 17) % 2)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    refused(model, "its config asks for it")


def test_attention_dropout_is_refused_in_training_alone():
    model = beit_model(attention_probs_dropout_prob=0.1)
    with pytest.raises(ValueError, match=r"attention dropout of 0\.1 in training"):
        fuse(model.train())
    fuse(model.eval())
    output_of(model, inputs())
    refused(model.train(), r"attention dropout of 0\.1 in training")


def test_an_unknown_impl_is_refused_at_once():
    model = beit_model()
    with pytest.raises(ImplUnavailable, match="no implementation has that name"):
        fuse(model, impl="fast")
    assert type(model.layers[0].attention).__name__ == "BeitAttention"


def test_a_head_size_that_the_kernels_do_not_take_is_named():
    model = beit_model(num_attention_heads=4)
    with pytest.raises(ValueError, match="multiple of 8 channels, at most 128, and they have 4"):
        fuse(model, impl="triton")
    assert type(model.layers[0].relative_position_bias).__name__ == "BeitRelativePositionBias"
    fuse(model, impl="sdpa")
    with pytest.raises(ValueError, match="they have 4; it stays as it was fused before, with impl='sdpa'"):
        fuse(model, impl="triton")


def test_a_subclass_is_left_alone_and_reported():
    attention = type(beit_model().layers[0].attention)
    model = beit_model()
    model.layers[1].attention.__class__ = type("MyAttention", (attention,), {})
    report = fuse(model)
    (name, _, why) = report.kept[0]
    assert name == "layers.1.attention"
    assert why.startswith("a subclass of transformers.models.beit.modeling_beit.BeitAttention")


def test_a_version_with_another_forward_is_left_alone_and_reported(monkeypatch):
    model = beit_model()

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return self.gate(hidden_states), None

    monkeypatch.setattr(type(model.layers[0].attention), "forward", forward)
    with pytest.raises(ValueError, match="its forward uses gate, which the known versions do not"):
        fuse(model)


def test_a_forward_replaced_on_the_module_is_left_alone_and_reported():
    model = beit_model()
    model.layers[0].attention.forward = model.layers[1].attention.forward
    assert fuse(model).kept[0][::2] == ("layers.0.attention", "its forward was replaced on the module itself")


def test_an_attention_function_of_another_library_is_left_alone():
    model = beit_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="its attention is 'flex_attention', where 'eager' and 'sdpa' are known"):
        fuse(model)


def test_the_table_of_a_window_that_is_not_square_stays_with_the_original():
    model = beit_model(image_size=(32, 16))
    given = {"pixel_values": pictures(32)[..., :16]}
    expected = output_of(model, given)
    report = fuse(model, impl="sdpa")
    assert {why for _, _, why in report.kept} == {
        "its window is 4 x 2, and the original permutes the table of one that is not square"
    }
    torch.testing.assert_close(output_of(model, given), expected)


def test_a_device_that_the_implementation_does_not_run_on_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(PACKED.requirements, Impl.TRITON, lambda device: "it needs a GPU")
    with pytest.raises(ImplUnavailable, match=r"it needs a GPU\. The model is on cpu: .* move it first, then fuse it"):
        fuse(beit_model(), impl="triton")


def test_of_attention_in_attention_the_one_that_computes_is_named():
    with torch.device("meta"):
        model = transformers.YolosModel(transformers.YolosConfig(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"layer\.1\..*YolosSelfAttention, not a class that is known here") as raised:
        fuse(model)
    assert "YolosAttention" not in str(raised.value)


def test_attention_without_the_word_in_its_name_is_named():
    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    with pytest.raises(ValueError, match=r"0: .*Mixer, not a class that is known here"):
        fuse(torch.nn.Sequential(Mixer()))


def test_a_model_without_attention_is_told_what_it_is_made_of():
    with pytest.raises(ValueError, match=r"found: no attention among torch.*Sequential, torch.*Linear\n"):
        fuse(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_a_model_with_nothing_to_replace_is_told_what_is_served():
    model = torch.nn.TransformerEncoderLayer(16, 2)
    with pytest.raises(ValueError, match=r"self_attn: torch\.nn.*not a class that is known here") as raised:
        fuse(model)
    assert "timm.models.beit.Attention" in str(raised.value)


def test_the_report_says_what_became_of_what():
    report = fuse(beit_model())
    assert isinstance(report, FuseReport)
    lines = str(report).splitlines()
    assert lines[0].startswith("impl on cpu: reference (")
    assert lines[1:] == [
        "replaced 2, layers.0.attention to layers.1.attention: transformers BEiT attention",
        "replaced 2, layers.0.relative_position_bias to layers.1.relative_position_bias: transformers BEiT bias",
    ]


def test_neither_library_is_imported_before_a_model_brings_it():
    code = "import sys, fused_beit.kernels; assert not {'timm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_pickling_within_a_process_keeps_the_class():
    attention = beit_model().layers[0].attention
    fuse(attention)
    assert type(pickle.loads(pickle.dumps(attention))) is type(attention)
