"""The relative position table: its row order, its expansion, its gradient, and one bias for many layers."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fused_beit.kernels import Impl, ImplUnavailable, RelativePositionBias, relative_position_index, resolve
from fused_beit.kernels.rel_pos_attention.bias import expand_table, num_relative_positions, scatter_table
from fused_beit.kernels.testing import assert_no_worse_than_eager

WINDOWS = [(1, 1), (2, 2), (3, 2), (2, 5), (14, 14)]
SMALL_WINDOWS = [(1, 1), (3, 2), (2, 5), (1, 4), (4, 1)]
KERNEL_DTYPES = [torch.float64, torch.float32, torch.float16]  # the interpreter computes bf16 wrongly
IMPLS = [
    "reference",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: TRITON_INTERPRET=1"
        ),
    ),
]
TRITON = IMPLS[1:]


def table_of(window, cls_token=True, num_heads=2, dtype=torch.float64):
    return torch.randn(num_relative_positions(window, cls_token), num_heads).to(dtype).requires_grad_()


def num_tokens_of(window, cls_token=True):
    return window[0] * window[1] + cls_token


def scatter_by_index(grad, window, cls_token):
    """The definition, in float64."""
    index = relative_position_index(window, cls_token).flatten()
    rows = torch.zeros(num_relative_positions(window, cls_token), grad.shape[0], dtype=torch.float64)
    return rows.index_add(0, index, grad.double().flatten(1).t())


def index_by_loops(window, cls_token):
    height, width = window
    first = int(cls_token)
    num_rows = (2 * height - 1) * (2 * width - 1) + 3 * first
    index = torch.zeros(height * width + first, height * width + first, dtype=torch.int64)
    for query in range(height * width):
        for key in range(height * width):
            dy, dx = query // width - key // width, query % width - key % width
            index[query + first, key + first] = (dy + height - 1) * (2 * width - 1) + dx + width - 1
    if cls_token:
        index[0, 1:], index[1:, 0], index[0, 0] = num_rows - 3, num_rows - 2, num_rows - 1
    return index


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_index_equals_the_definition_written_as_loops(window, cls_token):
    assert torch.equal(relative_position_index(window, cls_token), index_by_loops(window, cls_token))


@pytest.mark.parametrize("window", WINDOWS)
def test_index_equals_that_of_transformers_beit(window):
    beit = pytest.importorskip("transformers.models.beit.modeling_beit")
    theirs = beit.BeitRelativePositionBias.generate_relative_position_index(window)
    assert torch.equal(relative_position_index(window), theirs)


@pytest.mark.parametrize(("window", "rows"), [((14, 14), 732), ((24, 24), 2212), ((32, 32), 3972), ((40, 40), 6244)])
def test_published_numbers_of_rows(window, rows):
    assert num_relative_positions(window) == rows
    assert RelativePositionBias(window, 1).relative_position_bias_table.shape == (rows, 1)


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", WINDOWS[:4])
def test_every_row_is_used(window, cls_token):
    index = relative_position_index(window, cls_token)
    assert index.unique().tolist() == list(range(num_relative_positions(window, cls_token)))


def test_starts_at_zero():
    assert torch.equal(RelativePositionBias((3, 2), 4)(), torch.zeros(4, 7, 7))


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_dense_bias_is_the_table_at_the_index_head_first(window, cls_token):
    module = RelativePositionBias(window, 3, cls_token)
    nn.init.normal_(module.relative_position_bias_table)
    index = relative_position_index(window, cls_token)
    assert torch.equal(module(), module.relative_position_bias_table[index].permute(2, 0, 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("window", "cls_token"), [((1, 1), False), ((1, 3), True), ((3, 2), True), ((2, 5), False)])
def test_every_row_of_the_dense_bias_is_aligned_and_followed_by_zeros(window, cls_token, dtype, impl):
    bias = expand_table(table_of(window, cls_token, 3, torch.float32), window, cls_token, dtype, impl).detach()
    num_tokens = num_tokens_of(window, cls_token)
    row = -(-num_tokens // 16) * 16
    assert (bias.shape, bias.stride()) == ((3, num_tokens, num_tokens), (num_tokens * row, row, 1))
    assert (bias.dtype, bias.data_ptr() % 16) == (dtype, 0)
    assert not bias.as_strided((3, num_tokens, row), bias.stride())[:, :, num_tokens:].any()


def test_a_dense_bias_in_bf16_is_the_table_rounded():
    table = table_of((3, 2), dtype=torch.float32)
    bias = expand_table(table, (3, 2), dtype=torch.bfloat16)
    assert bias.stride() == (7 * 16, 16, 1)
    assert torch.equal(bias, table[relative_position_index((3, 2))].permute(2, 0, 1).bfloat16())


def test_the_gradient_of_a_bf16_bias_is_summed_in_fp32():
    table, grad = table_of((4, 4), dtype=torch.float32), torch.randn(2, 17, 17).bfloat16()
    expand_table(table, (4, 4), dtype=torch.bfloat16).backward(grad)
    torch.testing.assert_close(table.grad.double(), scatter_by_index(grad, (4, 4), True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", TRITON)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", SMALL_WINDOWS)
def test_the_expansion_equals_the_reference_bit_for_bit(window, cls_token, dtype, impl):
    table = table_of(window, cls_token, dtype=torch.float32)
    expected = expand_table(table, window, cls_token, dtype, "reference")
    assert torch.equal(expand_table(table, window, cls_token, dtype, impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", SMALL_WINDOWS)
def test_the_scatter_is_the_sum_over_the_pairs_of_each_row(window, cls_token, impl):
    num_tokens = num_tokens_of(window, cls_token)
    grad = torch.randn(2, num_tokens, num_tokens, dtype=torch.float64)
    found = scatter_table(grad, window, cls_token, impl=impl)
    torch.testing.assert_close(found, scatter_by_index(grad, window, cls_token), rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", TRITON)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:])
@pytest.mark.parametrize("cls_token", [True, False])
def test_the_scatter_is_no_worse_than_eager(cls_token, dtype, impl):
    num_tokens = num_tokens_of((3, 5), cls_token)
    grad = torch.randn(2, num_tokens, num_tokens).to(dtype)
    eager, found = (scatter_table(grad, (3, 5), cls_token, impl=which) for which in ("reference", impl))
    assert_no_worse_than_eager("scatter", found, eager, scatter_by_index(grad, (3, 5), cls_token))


@pytest.mark.parametrize("impl", TRITON)
@pytest.mark.parametrize("cls_token", [True, False])
def test_windows_of_several_blocks_are_expanded_and_scattered_whole(cls_token, impl, monkeypatch):
    from fused_beit.kernels.rel_pos_attention import table_kernels

    for config, smaller in (
        (table_kernels.EXPAND_CONFIG, {"BLOCK_H": 2, "BLOCK_N": 4}),
        (table_kernels.SCATTER_CONFIG, {"BLOCK_H": 2, "BLOCK_PAIRS": 2}),
    ):
        for name, value in smaller.items():
            monkeypatch.setitem(config, name, value)
    window, num_tokens = (3, 2), num_tokens_of((3, 2), cls_token)
    table = table_of(window, cls_token, num_heads=3)
    assert torch.equal(expand_table(table, window, cls_token, impl=impl), expand_table(table, window, cls_token))
    grad = torch.randn(3, num_tokens, num_tokens, dtype=torch.float64)
    found = scatter_table(grad, window, cls_token, impl=impl)
    torch.testing.assert_close(found, scatter_by_index(grad, window, cls_token), rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_of_any_strides_is_scattered(impl):
    grad = torch.randn(7, 7, 2, dtype=torch.float64)
    for strided in (grad.permute(2, 1, 0), grad[:1, :1, :].permute(2, 0, 1).expand(2, 7, 7)):
        found = scatter_table(strided, (2, 3), impl=impl)
        torch.testing.assert_close(found, scatter_by_index(strided, (2, 3), True), rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_table_of_any_strides_is_expanded(impl):
    table = torch.randn(3, num_relative_positions((2, 3)) * 2)[:, ::2].t()
    assert torch.equal(expand_table(table, (2, 3), impl=impl), expand_table(table.contiguous(), (2, 3)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", [(1, 1), (2, 3)])
def test_gradients_pass_gradcheck(window, cls_token, impl):
    table = table_of(window, cls_token)
    fast = impl == "triton"  # the interpreter is slow
    assert torch.autograd.gradcheck(lambda t: expand_table(t, window, cls_token, impl=impl), table, fast_mode=fast)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_scatter_equals_the_gradient_of_the_expansion_bit_for_bit(impl):
    table, grad = table_of((3, 4), dtype=torch.float32), torch.randn(2, 13, 13)
    expand_table(table, (3, 4), impl=impl).backward(grad)
    assert torch.equal(table.grad, scatter_table(grad, (3, 4), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_two_gradients_are_equal_bit_for_bit(impl):
    grad = torch.randn(2, 13, 13)
    assert torch.equal(scatter_table(grad, (3, 4), impl=impl), scatter_table(grad.clone(), (3, 4), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives_pass_gradgradcheck(impl):
    table = table_of((2, 3), dtype=torch.float64).requires_grad_()
    weight = torch.randn(7, 7, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda table: (expand_table(table, (2, 3), impl=impl) * weight) ** 3, table, fast_mode=True
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_passes_opcheck(impl):
    ops, arguments = torch.ops.fused_beit, ((2, 2), True, torch.float32)
    table, grad = table_of((2, 2), dtype=torch.float32), torch.randn(2, 5, 5)
    torch.library.opcheck(ops.expand_table.default, (table, *arguments, impl))
    torch.library.opcheck(ops.scatter_table.default, (grad, *arguments, impl))
    if impl == "triton":
        torch.library.opcheck(ops.expand_table_triton.default, (table, *arguments))
        torch.library.opcheck(ops.scatter_table_triton.default, (grad, *arguments))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("operator", ["expand_table", "scatter_table"])
def test_auto_is_the_reference_everywhere(operator, device):
    assert resolve(operator, "auto", device).impl is Impl.REFERENCE


def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(ImplUnavailable, match="impl='triton' was asked for, but"):
        expand_table(table_of((2, 2), dtype=torch.bfloat16), (2, 2), impl="triton")
    with pytest.raises(ImplUnavailable, match="impl='triton' was asked for, but"):
        scatter_table(torch.zeros(2, 5, 5, dtype=torch.bfloat16), (2, 2), impl="triton")


def test_a_table_of_another_window_is_refused():
    with pytest.raises(ValueError, match=r"table must have shape \[12, H\], but has \[9, 2\]"):
        expand_table(torch.zeros(9, 2), (2, 2))


def test_a_gradient_of_another_window_is_refused():
    with pytest.raises(ValueError, match=r"grad must have shape \[H, 5, 5\], but has \[2, 4, 4\]"):
        scatter_table(torch.zeros(2, 4, 4), (2, 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_bias_that_is_not_floating_point_is_refused(dtype):
    with pytest.raises(TypeError, match=f"dtype must be a floating-point one, but is {dtype}"):
        expand_table(table_of((2, 2)), (2, 2), dtype=dtype)


AHEAD_OF_TIME = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_beit.kernels.rel_pos_attention import table_kernels as tk

for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for kernel, config, dtypes in (
        (tk.table_expand_kernel, tk.EXPAND_CONFIG, ("*fp32", "*bf16")),
        (tk.table_scatter_kernel, tk.SCATTER_CONFIG, ("*fp32", "*fp32")),
        (tk.table_scatter_kernel, tk.SCATTER_CONFIG, ("*bf16", "*fp32")),
    ):
        sizes = {"NUM_TOKENS": 197, "WINDOW_H": 14, "WINDOW_W": 14, "HAS_CLS": True, **config}
        constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
        options = {name: value for name, value in config.items() if name not in constants}
        kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
        kinds |= zip(kernel.arg_names, dtypes)
        built = triton.compile(ASTSource(kernel, kinds, constants), target=target, options=options)
        code = built.asm["ptx" if "ptx" in built.asm else "amdgcn"]
        assert not [line for line in code.splitlines() if "atom" in line or "red.global" in line]
"""


def test_the_kernels_compile_ahead_of_time_without_atomics():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", AHEAD_OF_TIME]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_the_kernels_in_bf16_on_a_gpu():
    table = table_of((14, 14), num_heads=12, dtype=torch.float32).cuda()
    expected = expand_table(table, (14, 14), dtype=torch.bfloat16, impl="reference")
    assert torch.equal(expand_table(table, (14, 14), dtype=torch.bfloat16, impl="triton"), expected)
    grad = torch.randn(12, 197, 197)
    eager, found, again = (scatter_table(grad.cuda(), (14, 14), impl=i) for i in ("reference", "triton", "triton"))
    assert torch.equal(found, again)
    assert_no_worse_than_eager("scatter", found.cpu(), eager.cpu(), scatter_by_index(grad, (14, 14), True))


def test_the_state_dict_is_the_table_alone():
    assert list(RelativePositionBias((2, 2), 1).state_dict()) == ["relative_position_bias_table"]


def test_works_where_deterministic_algorithms_are_demanded():
    module = RelativePositionBias((2, 2), 2)
    torch.use_deterministic_algorithms(True)
    try:
        module().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert module.relative_position_bias_table.grad.sum() == 2 * 5 * 5


def test_compiles_without_a_graph_break():
    module = RelativePositionBias((2, 2), 2)
    torch.nn.init.normal_(module.relative_position_bias_table)
    torch.compiler.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(), module())


@pytest.mark.parametrize(("window", "num_heads"), [((0, 2), 1), ((2,), 1), ((2, 2), 0)])
def test_an_impossible_window_is_refused(window, num_heads):
    with pytest.raises(ValueError, match="whole numbers of at least 1, but got"):
        RelativePositionBias(window, num_heads)
