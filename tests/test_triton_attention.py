"""The Triton attention kernels, in Triton's interpreter: every family of them equals the reference."""

import pytest
import torch
from triton_families import FAMILIES, LARGE_FAMILIES, NEEDS_INTERPRETER, exact_products  # noqa: F401

from fused_beit.kernels import attention, attention_plan, rel_pos_attention
from fused_beit.kernels._triton.descriptors import align_rows
from fused_beit.kernels.rel_pos_attention import launch
from fused_beit.kernels.rel_pos_attention.plan import pinned
from fused_beit.kernels.testing import (
    assert_no_worse_than_eager,
    assert_parity,
    outputs_and_grads,
    rel_pos_attention_inputs,
)

pytestmark = NEEDS_INTERPRETER

# bf16 is not here: the interpreter computes it wrongly.
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """Each family of kernels in turn, for every call of the test."""
    with pinned(FAMILIES[request.param]):
        yield request.param


def ours(qkv, bias, **options):
    return rel_pos_attention(qkv, bias, impl="triton", **options)


def reference(qkv, bias, **options):
    return rel_pos_attention(qkv, bias, impl="reference", **options)


def masks_of(num_masks, num_tokens, num_rows, dtype=torch.float32):
    """Random numbers with a third of them -inf, but never a whole row."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.randn(num_masks, num_rows, num_tokens, generator=generator)
    closed = torch.rand(mask.shape, generator=generator) < 1 / 3
    closed.scatter_(-1, torch.randint(num_tokens, (num_masks, num_rows, 1), generator=generator), False)
    return mask.masked_fill(closed, float("-inf")).to(dtype)


def noise_of_grad_scores(grad_out_BHND, v_BHND):
    """Most by which grad_out v^T and the sum of grad_out * out, equal where one key has all the weight, may differ.

    Two sums of the same D products: each is off by at most D half units of what it sums, in the dtype of the sums. Then
    their difference is rounded to the dtype of v: by half a unit, or half the smallest number.
    """
    dtype = v_BHND.dtype
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    sums = (grad_out_BHND.double() * v_BHND.double()).abs().sum(-1)
    return rounded(v_BHND.shape[-1] * eps * sums, dtype)


def rounded(limit, dtype):
    """The limit of something, once that was rounded."""
    finfo = torch.finfo(dtype)
    return limit * (1 + finfo.eps) + finfo.smallest_normal * finfo.eps


def heads_of(tensor_BNE, num_heads):
    return tensor_BNE.unflatten(2, (num_heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "num_tokens", "num_heads"), [(3, 5, 2), (1, 49, 2), (3, 50, 1)])
def test_output_and_gradients_are_no_worse_than_eager_torch(family, batch, num_tokens, num_heads, dtype):
    assert_parity(ours, reference, rel_pos_attention_inputs(batch, num_tokens, num_heads, 16, dtype=dtype))


@pytest.mark.parametrize(
    ("family", "num_tokens", "dtype"),
    [
        ("pointer", 197, torch.float32),
        ("tma", 197, torch.float16),
        ("pointer", 257, torch.float16),
        ("tma", 257, torch.float32),
    ],
)
def test_pictures_of_hundreds_of_tokens_are_no_worse_than_eager_torch(family, num_tokens, dtype):
    with pinned(LARGE_FAMILIES[family]):
        assert_parity(ours, reference, rel_pos_attention_inputs(1, num_tokens, 1, 32, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_plan_of_this_machine_is_no_worse_than_eager_torch(dtype):
    assert_parity(ours, reference, rel_pos_attention_inputs(1, 197, 1, 64, dtype=dtype))


@pytest.mark.parametrize("head_dim", [8, 24, 72, 128])
def test_every_head_size_is_no_worse_than_eager_torch(head_dim):
    for plan in FAMILIES.values():
        with pinned(plan):
            assert_parity(ours, reference, rel_pos_attention_inputs(1, 33, 1, head_dim, dtype=torch.float16))


@pytest.mark.parametrize("num_tokens", [5, 49])
def test_float64_equals_the_reference(family, num_tokens):
    inputs = rel_pos_attention_inputs(2, num_tokens, 1, 16, dtype=torch.float64)
    expected = outputs_and_grads(reference, inputs)
    for name, tensor in outputs_and_grads(ours, inputs).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_token_alone_has_its_value_and_gradients_of_rounding_noise(family, dtype):
    """The gradients of q, k and bias are 0: grad_out v^T less the sum of grad_out * out, which are equal."""
    inputs = rel_pos_attention_inputs(3, 1, 2, 16, dtype=dtype)
    found = outputs_and_grads(ours, inputs)
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4)
    grad_q, grad_k, grad_v = found["grad qkv"].permute(2, 0, 3, 1, 4)
    grad_out = heads_of(torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0)).to(dtype), 2)
    assert torch.equal(heads_of(found["output 0"], 2), v)
    assert torch.equal(grad_v, grad_out)
    noise = noise_of_grad_scores(grad_out, v)
    assert (grad_q.double().abs() <= rounded(0.25 * noise[..., None] * k.double().abs(), dtype)).all()
    assert (grad_k.double().abs() <= rounded(0.25 * noise[..., None] * q.double().abs(), dtype)).all()
    assert (found["grad bias"][..., 0].double().abs() <= rounded(noise.sum(0), dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [5, 49])
def test_lse_is_no_worse_than_eager_torch_in_fp32(family, num_tokens, dtype):
    inputs = rel_pos_attention_inputs(2, num_tokens, 2, 16, dtype=dtype)
    _, lse = torch.ops.fused_beit.attention_fwd(inputs["qkv"], None, None, inputs["bias"], None, None, 0.25, True)

    def eager(dtype):
        q, k, _ = inputs["qkv"].to(dtype).permute(2, 0, 3, 1, 4)
        return (0.25 * q @ k.transpose(-2, -1) + inputs["bias"].to(dtype)).logsumexp(-1)

    if dtype.itemsize > 2:  # kept in two parts
        row_max, row_sum = lse.double().unbind(-1)
        lse = (row_max + row_sum.log()).to(dtype)
    assert_no_worse_than_eager("lse", lse, eager(torch.promote_types(dtype, torch.float32)), eager(torch.float64))


@pytest.mark.parametrize("far", [-1e9, -1e30, "lowest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_queries_whose_keys_are_all_hidden_by_a_far_number_attend_to_all_alike(family, dtype, far):
    mask = torch.zeros(1, 21, 21, dtype=dtype)
    mask[:, 3:19] = torch.finfo(dtype).min if far == "lowest" else far
    inputs = rel_pos_attention_inputs(2, 21, 1, 16, dtype=dtype)

    def attend(impl):
        return lambda qkv, bias: rel_pos_attention(qkv, bias, mask=mask.to(qkv.dtype), impl=impl)

    found, expected = (outputs_and_grads(attend(impl), inputs) for impl in ("triton", "reference"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(
    ("num_masks", "num_rows", "dtype"), [(1, 50, torch.float32), (3, 50, torch.float16), (3, 1, torch.float32)]
)
def test_with_masks_it_is_no_worse_than_eager_torch(family, num_masks, num_rows, dtype):
    mask = masks_of(num_masks, 50, num_rows, dtype)
    assert_parity(
        lambda qkv, bias: ours(qkv, bias, mask=mask),
        # The mask in float64 holds the same numbers.
        lambda qkv, bias: reference(qkv, bias, mask=mask.to(qkv.dtype)),
        rel_pos_attention_inputs(num_masks, 50, 1, 16, dtype=dtype),
    )


def test_a_mask_needs_no_bias(family):
    mask = masks_of(2, 21, 21)
    assert_parity(
        lambda qkv, bias: ours(qkv, bias, mask=mask),
        lambda qkv, bias: reference(qkv, bias, mask=mask.to(qkv.dtype)),
        rel_pos_attention_inputs(2, 21, 1, 16, bias=False),
    )


def test_a_mask_of_any_strides_is_read_right():
    mask = masks_of(1, 21, 21)[0]
    qkv = rel_pos_attention_inputs(1, 21, 1, 16)["qkv"]
    assert torch.equal(ours(qkv, None, mask=mask.t().contiguous().t()), ours(qkv, None, mask=mask))
    of_keys = masks_of(1, 42, 1)[0, 0, ::2]
    assert torch.equal(ours(qkv, None, mask=of_keys[None, None]), ours(qkv, None, mask=of_keys.clone()[None, None]))


def test_rows_whose_padding_would_lie_past_the_end_of_memory_are_copied():
    room = torch.randn(2, 37, 64, dtype=torch.float16)
    inside, at_the_end = room[..., 8:45], room[..., 24:61]  # 48 numbers of each are read
    assert align_rows(inside, torch.float16) is inside
    copy = align_rows(at_the_end, torch.float16)
    assert copy is not at_the_end
    assert torch.equal(copy, at_the_end)


def test_what_lies_between_the_rows_of_bias_and_mask_changes_nothing(family):
    inputs = rel_pos_attention_inputs(2, 37, 1, 16, dtype=torch.float16)
    mask = masks_of(1, 37, 37, torch.float16)
    expected = outputs_and_grads(lambda qkv: ours(qkv, inputs["bias"], mask=mask), {"qkv": inputs["qkv"]})

    def among_nan(tensor):
        room = tensor.new_full((1, 37, 48), float("nan"))
        room[..., :37] = tensor
        return room[..., :37]

    bias, mask = among_nan(inputs["bias"]), among_nan(mask)
    found = outputs_and_grads(lambda qkv: ours(qkv, bias, mask=mask), {"qkv": inputs["qkv"]})
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    leaf = bias.detach().requires_grad_()
    ours(inputs["qkv"], leaf, mask=mask).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_without_keys_gets_zeros_and_gives_no_gradient(family, dtype):
    mask = torch.ones(2, 37, 37, dtype=torch.bool)
    mask[0, 3] = False  # one query of one picture
    mask[1, :, :32] = False  # and a whole first tile of keys
    inputs = rel_pos_attention_inputs(2, 37, 1, 16, dtype=dtype)
    found = outputs_and_grads(lambda qkv, bias: ours(qkv, bias, mask=mask), inputs)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not found["output 0"][0, 3].any()
    assert not found["grad qkv"][0, 3, 0].any()
    assert not found["grad qkv"][1, :32, 1:].any()
    alone = outputs_and_grads(lambda qkv, bias: ours(qkv, bias, mask=mask[1]), inputs | {"qkv": inputs["qkv"][:1]})
    assert not alone["grad bias"][:, :, :32].any()


def test_a_picture_whose_keys_are_all_masked_leaves_the_bias_gradient_alone(family):
    inputs = rel_pos_attention_inputs(2, 21, 1, 16)
    mask = torch.stack([torch.ones(1, 21, dtype=torch.bool), torch.zeros(1, 21, dtype=torch.bool)])
    both = outputs_and_grads(lambda qkv, bias: ours(qkv, bias, mask=mask), inputs)
    one = outputs_and_grads(ours, inputs | {"qkv": inputs["qkv"][:1]})
    assert torch.equal(both["grad bias"], one["grad bias"])
    assert torch.equal(both["output 0"][:1], one["output 0"])
    assert not both["output 0"][1].any()
    assert not both["grad qkv"][1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_ten_thousands_stay_right(family, dtype):
    inputs = rel_pos_attention_inputs(1, 21, 1, 16, dtype=dtype)
    inputs["bias"] = inputs["bias"] * 1e4
    found = outputs_and_grads(ours, inputs)
    assert all(tensor.isfinite().all() for tensor in found.values())
    # Thousands apart, the largest takes all.
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4)
    winner = (0.25 * q.double() @ k.double().transpose(-2, -1) + inputs["bias"])[0, 0].argmax(-1)
    taken = v[:, :, winner]
    assert torch.equal(heads_of(found["output 0"], 1), taken)
    grad_out = heads_of(torch.randn(1, 21, 16, generator=torch.Generator().manual_seed(0)).to(dtype), 1)
    noise = noise_of_grad_scores(grad_out, taken)[0]
    assert (found["grad bias"].double().abs() <= rounded(noise[..., None], dtype)).all()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's word for scores that end as weights of 0
def test_a_tile_of_keys_at_the_end_of_fp32_is_no_nan(family):
    """As a bf16 mask of torch.finfo(dtype).min has them; bf16 is not for the interpreter, so the scale makes them."""
    q, k, v = rel_pos_attention_inputs(1, 37, 1, 16, dtype=torch.float16)["qkv"].permute(2, 0, 3, 1, 4)
    q, k = torch.ones_like(q), torch.zeros_like(k)
    k[:, :, :32] = -1
    out = attention(q, k, v, mask=torch.zeros(1, 1, 37), scale=2e37, impl="triton")  # scores of -3.2e38 and 0
    exact = v[:, :, 32:].double().mean(2, keepdim=True).expand(out.shape)
    assert_no_worse_than_eager("output", out, v[:, :, 32:].mean(2, keepdim=True).expand(out.shape), exact)


def test_a_bias_far_below_zero_is_no_mask(family):
    inputs = rel_pos_attention_inputs(1, 21, 1, 16, dtype=torch.float64)
    expected = outputs_and_grads(ours, inputs)
    shifted = outputs_and_grads(ours, inputs | {"bias": inputs["bias"] - 1e4})
    for name in expected:
        torch.testing.assert_close(shifted[name], expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_of_zeros_equals_none_bit_for_bit(family, dtype):
    inputs = rel_pos_attention_inputs(2, 21, 1, 16, dtype=dtype)
    zeros = outputs_and_grads(ours, inputs | {"bias": torch.zeros_like(inputs["bias"])})
    none = outputs_and_grads(ours, inputs | {"bias": None})
    assert all(torch.equal(none[name], zeros[name]) for name in none)


def test_the_scale_is_that_of_the_products_alone(family):
    inputs = rel_pos_attention_inputs(2, 21, 1, 16, dtype=torch.float64)
    scaled = outputs_and_grads(lambda qkv, bias: ours(qkv, bias, scale=0.7), inputs)
    factors = torch.tensor([0.7, 1.0, 1.0], dtype=torch.float64)[:, None, None]
    expected = outputs_and_grads(lambda qkv, bias: reference(qkv * factors, bias, scale=1.0), inputs)
    for name in expected:
        torch.testing.assert_close(scaled[name], expected[name], rtol=1e-12, atol=1e-12)


def test_a_bias_in_fp32_serves_half_precision_and_gets_its_gradient_in_fp32(family):
    inputs = rel_pos_attention_inputs(2, 37, 1, 16, dtype=torch.float16)
    inputs["bias"] = inputs["bias"].float()
    found = outputs_and_grads(ours, inputs)
    assert found["grad bias"].dtype == torch.float32
    assert_parity(ours, reference, inputs)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    names = []

    class Recorded:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(launch, name)

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in vars(launch).copy():
        if name.endswith("_kernel"):
            monkeypatch.setattr(launch, name, Recorded(name))
    return names


FORWARD, SUM = "attention_fwd_kernel", "bias_grad_sum_kernel"
BACKWARD_Q, BACKWARD_KV = "attention_bwd_q_kernel", "attention_bwd_kv_kernel"


def test_a_frozen_bias_costs_no_work(family, launched):
    inputs = rel_pos_attention_inputs(2, 37, 1, 16)
    qkv = inputs["qkv"].requires_grad_()
    ours(qkv, inputs["bias"]).sum().backward()
    assert inputs["bias"].grad is None
    assert launched == [FORWARD, BACKWARD_Q, BACKWARD_KV]


def test_the_gradient_of_the_bias_alone_equals_that_beside_others(family, launched):
    inputs = rel_pos_attention_inputs(2, 37, 1, 16, dtype=torch.float64)
    expected = outputs_and_grads(reference, inputs)["grad bias"]
    bias = inputs["bias"].requires_grad_()
    out = ours(inputs["qkv"], bias)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype))
    torch.testing.assert_close(bias.grad, expected, rtol=1e-12, atol=1e-12)
    assert launched == [FORWARD, BACKWARD_Q, BACKWARD_KV, SUM]


@pytest.mark.parametrize("asked", ["q", "k", "v", "qv"])
def test_only_the_gradients_asked_for_are_returned(family, asked):
    inputs = rel_pos_attention_inputs(1, 21, 1, 16, dtype=torch.float64)
    tensors = dict(zip("qkv", inputs["qkv"].permute(2, 0, 3, 1, 4).clone(), strict=True))
    for name in asked:
        tensors[name].requires_grad_()
    for impl in ("triton", "reference"):
        attention(*tensors.values(), inputs["bias"], impl=impl).pow(2).sum().backward()
        if impl == "triton":
            grads = {name: tensor.grad for name, tensor in tensors.items()}
            for tensor in tensors.values():
                tensor.grad = None
    for name, tensor in tensors.items():
        assert (grads[name] is None) == (name not in asked)
        torch.testing.assert_close(grads[name], tensor.grad, rtol=1e-12, atol=1e-12)


def test_the_plan_names_family_and_tiles():
    plan = attention_plan("sm_90", 64, torch.bfloat16)
    assert str(plan).startswith("sm_90, tma family: forward ")
    for name, tile in (("forward", plan.forward), ("backward of q", plan.backward_q), ("of k and v", plan.backward_kv)):
        assert f"{name} {tile.block_m}x{tile.block_n} by {tile.num_warps} warps" in str(plan)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120", "gfx942", "interpreter"])
def test_architectures_whose_products_take_registers_have_the_pointer_family(arch):
    plan = attention_plan(arch, 64, torch.bfloat16)
    assert not plan.tma
    assert str(plan).startswith(f"{arch}, pointer family: ")


@pytest.mark.parametrize("arch", ["sm_75", "h100", "90"])
def test_an_architecture_that_no_kernel_is_made_for_is_refused(arch):
    with pytest.raises(
        ValueError, match=f"arch must be sm_80 or later, as sm_90, or AMD's, as gfx942, but is '{arch}'"
    ):
        attention_plan(arch, 64, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [12, 200])
def test_heads_that_no_kernel_is_made_for_are_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim must be a multiple of 8, at most 128, but is {head_dim}"):
        attention_plan("sm_90", head_dim, torch.bfloat16)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_103"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_data_centre_gpus_from_sm_90_on_have_tma_for_half_precision(arch, dtype):
    assert attention_plan(arch, 64, dtype).tma == (dtype.itemsize == 2)
    assert not attention_plan(arch, 64, dtype, tma=False).tma


@pytest.mark.parametrize("tensor", ["none", "qkv", "grad_out"])
def test_tensors_that_descriptors_cannot_read_take_the_pointer_family(tensor, monkeypatch):
    plans = []
    monkeypatch.setattr(launch, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(launch, "attention_plan", lambda *a, **k: plans.append(attention_plan(*a, **k)) or plans[-1])
    qkv = rel_pos_attention_inputs(1, 67, 1, 16, dtype=torch.float16)["qkv"]
    grad_out = torch.ones(1, 67, 16, dtype=torch.float16)
    off_by_one = {"qkv": qkv, "grad_out": grad_out}
    if tensor != "none":
        whole = off_by_one[tensor]
        off_by_one[tensor] = torch.cat([whole.new_zeros(1), whole.flatten()])[1:].view(whole.shape)
    leaf = off_by_one["qkv"].requires_grad_()
    out = ours(leaf, None)
    (grad,) = torch.autograd.grad(out, leaf, off_by_one["grad_out"])
    assert [plan.tma for plan in plans] == [tensor != "qkv", tensor == "none"]
    eager = qkv.detach().requires_grad_()
    (eager_grad,) = torch.autograd.grad(reference(eager, None), eager, grad_out)
    exact = qkv.detach().double().requires_grad_()
    (exact_grad,) = torch.autograd.grad(reference(exact, None), exact, grad_out.double())
    assert_no_worse_than_eager("grad qkv", grad, eager_grad, exact_grad)
