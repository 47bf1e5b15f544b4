"""Masked image modelling: what counts, what does not, and that no step waits for the device."""

import pytest
import torch
from waiting import no_waiting

from fused_beit.engine.config import ModelSettings
from fused_beit.engine.models import MaskedImageModel
from fused_beit.engine.models.encoder import impl_besides_attention
from fused_beit.kernels import Impl, ImplUnavailable, operators, resolve
from fused_beit.kernels.impl import Operator

SHAPE = ModelSettings(patch_size=4, width=16, depth=2, num_heads=2, drop_path=0.2)
VOCAB = 9
PADDED = torch.tensor([[0, 5, 9, -1], [3, 7, -1, -1]])


def model_and_batch(impl="auto", **settings):
    """A small model with weights of ordinary size, pictures of 16 patches and their visual tokens."""
    torch.manual_seed(0)
    model = MaskedImageModel(SHAPE.model_copy(update=settings), 16, VOCAB, normalize="inception", impl=impl)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model, torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.randint(0, VOCAB, (2, 16))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("inception", [0.5] * 3, [0.5] * 3), ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])],
)
def test_pixels_are_normalised_channel_by_channel(name, mean, std):
    model = MaskedImageModel(SHAPE, 16, VOCAB, normalize=name)
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    torch.testing.assert_close(model.normalize(pictures), (pictures / 255 - mean) / std, rtol=0, atol=2e-6)


def test_loss_and_accuracy_are_those_of_the_logits_at_the_masked_patches():
    model, pictures, tokens = model_and_batch()
    model.eval()
    logits = model.logits(pictures, PADDED)
    assert logits.shape == (2, 4, VOCAB)
    filled = PADDED >= 0
    targets = torch.tensor([*tokens[0, [0, 5, 9]], *tokens[1, [3, 7]]])
    output = model(pictures, PADDED, tokens)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits[filled], targets))
    assert output.accuracy == (logits[filled].argmax(-1) == targets).float().mean()
    assert not output.accuracy.requires_grad


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("settings", [{}, {"drop_path": 0.0}, {"layer_scale": 0.0}, {"depth": 1}], ids=str)
def test_empty_slots_change_neither_loss_nor_accuracy_nor_gradients(settings, train):
    def step(positions):
        model, pictures, tokens = model_and_batch(**settings)
        output = model.train(train)(pictures, positions, tokens, torch.tensor([3, 4]), 5)
        output.loss.backward()
        return [*output, *(parameter.grad for parameter in model.parameters())]

    positions = torch.tensor([[0, 5], [3, 7]])
    padded = torch.tensor([[-1, 0, 5, -1], [3, -1, 7, -1]])
    for a, b in zip(step(positions), step(padded), strict=True):
        torch.testing.assert_close(a, b)


def test_a_picture_with_empty_slots_alone_counts_in_nothing():
    model, pictures, tokens = model_and_batch()
    model.eval()
    both = model(pictures, torch.tensor([[0, 5], [-1, -1]]), tokens)
    first = model(pictures[:1], torch.tensor([[0, 5]]), tokens[:1])
    torch.testing.assert_close(both, first)


def test_masked_patches_are_hidden_and_the_others_seen():
    model, pictures, tokens = model_and_batch()
    model.eval()
    positions = torch.tensor([[0], [0]])
    loss = model(pictures, positions, tokens).loss
    hidden, seen = pictures.clone(), pictures.clone()
    hidden[:, :, :4, :4] = 0
    seen[:, :, :4, 4:8] = 0
    assert torch.equal(model(hidden, positions, tokens).loss, loss)
    assert not torch.equal(model(seen, positions, tokens).loss, loss)


def test_tokens_of_patches_that_are_not_masked_do_not_matter():
    model, pictures, tokens = model_and_batch()
    other = (tokens + 1) % VOCAB
    other[:, 2] = tokens[:, 2]
    positions = torch.tensor([[2], [2]])
    assert torch.equal(model(pictures, positions, tokens).loss, model(pictures, positions, other).loss)


@pytest.mark.parametrize("settings", [{}, {"rel_pos_bias": "per_layer"}, {"rel_pos_bias": "none", "layer_scale": 0.0}])
def test_every_parameter_gets_a_gradient(settings):
    model, pictures, tokens = model_and_batch(**settings, abs_pos_embed=True)
    model(pictures, PADDED, tokens).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_batch_is_learned_by_heart():
    model, pictures, tokens = model_and_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(pictures, PADDED, tokens).loss.backward()
        optimizer.step()
    output = model(pictures, PADDED, tokens)
    assert output.loss < 0.1
    assert output.accuracy == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"rel_pos_bias": "per_layer", "abs_pos_embed": True}])
def test_forward_and_backward_never_wait_for_the_device(settings, precision):
    model, pictures, tokens = model_and_batch(**settings)
    sample_ids = torch.arange(2)
    with no_waiting():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(pictures, PADDED, tokens, sample_ids, 1)
        output.loss.backward()


@pytest.mark.gpu
def test_forward_and_backward_never_wait_for_the_gpu():
    model, *batch = model_and_batch()
    model.cuda()
    pictures, tokens, positions, sample_ids = (tensor.cuda() for tensor in (*batch, PADDED, torch.arange(2)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(pictures, positions, tokens, sample_ids, 1)
        output.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_under_bf16_autocast_are_fp32_and_point_the_same_way():
    def gradients(precision: str) -> torch.Tensor:
        model, pictures, tokens = model_and_batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(pictures, PADDED, tokens)
        assert output.loss.dtype == torch.float32
        output.loss.backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact, rounded = gradients("fp32"), gradients("bf16")
    # One rounding to bf16 at each of the products on a path: patches, 4 a block (2 in attention), head.
    num_roundings = 2 + 6 * SHAPE.depth
    assert (exact - rounded).norm() <= num_roundings * torch.finfo(torch.bfloat16).eps * exact.norm()
    assert not torch.equal(exact, rounded)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_compiles_as_one_graph(precision):
    model, pictures, tokens = model_and_batch()
    arguments = pictures, PADDED, tokens, torch.arange(2), 3
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = model(*arguments).loss
        loss = torch.compile(model, fullgraph=True)(*arguments).loss
    loss.backward()
    tolerance = {"fp32": 1e-5, "bf16": torch.finfo(torch.bfloat16).eps}[precision]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)


EVERY_WAY = [{}, {"rel_pos_bias": "per_layer", "layer_scale": 0.0}, {"rel_pos_bias": "none", "abs_pos_embed": True}]


@pytest.mark.parametrize("settings", EVERY_WAY, ids=str)
def test_loss_and_every_gradient_by_triton_are_those_of_the_reference(settings):
    def step(impl):
        model, pictures, tokens = model_and_batch(impl, **settings)
        output = model.double()(pictures, PADDED, tokens, torch.tensor([3, 4]), 5)  # one path of these is dropped
        output.loss.backward()
        return {"loss": output.loss, "accuracy": output.accuracy} | {n: p.grad for n, p in model.named_parameters()}

    expected = step("reference")
    for name, found in step("triton").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12, msg=lambda why, name=name: name + why)


def test_no_operator_of_a_step_by_triton_runs_anything_else(monkeypatch):
    def step():
        model, pictures, tokens = model_and_batch("triton", depth=1)
        model(pictures, PADDED, tokens, torch.tensor([3, 4]), 5).loss.backward()
        model.eval().encoder(model.normalize(pictures))  # whole pictures, which end in residual_add

    asked = []

    def note(operator, request, *where):
        asked.append((operator.name, str(request)))
        return resolve_it(operator, request, *where)

    resolve_it = Operator.resolve
    monkeypatch.setattr(Operator, "resolve", note)
    step()
    assert {request for _, request in asked} == {"triton"}
    in_a_step = {"rel_pos_attention", "expand_table", "residual_norm", "residual_add", "embed_tokens", "token_loss"}
    assert in_a_step | {"gather_masked"} <= {name for name, _ in asked}


@pytest.mark.parametrize("impl", Impl)
def test_what_only_attention_has_leaves_the_other_operators_at_auto(impl):
    def has(operator):
        try:
            return bool(resolve(operator, impl, None))
        except ImplUnavailable:
            return False

    others = set(operators()) - {"attention", "rel_pos_attention"}
    assert impl_besides_attention(impl) == (impl if all(map(has, others)) else "auto")
