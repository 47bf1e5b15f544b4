"""Choosing an implementation, importing without the optional ones, and the rule by which kernels are judged."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from fused_beit.kernels import Impl, ImplUnavailable, operators, resolve
from fused_beit.kernels._triton import target
from fused_beit.kernels.impl import Operator, Resolved
from fused_beit.kernels.nearest_code.op import OPERATOR as NEAREST_CODE
from fused_beit.kernels.testing import assert_no_worse_than_eager, assert_parity, rel_pos_attention_inputs

OPERATORS = (
    "attention",
    "embed_tokens",
    "expand_table",
    "gather_masked",
    "keep_visible",
    "nearest_code",
    "rel_pos_attention",
    "residual_add",
    "residual_norm",
    "restore_tokens",
    "scatter_table",
    "token_loss",
)


def test_all_operators_are_known():
    assert operators() == OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_registered_with_a_str_impl(name):
    arguments = getattr(torch.ops.fused_beit, name).default._schema.arguments
    assert (arguments[-1].name, str(arguments[-1].type)) == ("impl", "str")


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "meta"])
@pytest.mark.parametrize("name", OPERATORS)
def test_auto_resolves_to_an_implementation_with_a_reason(name, device):
    resolved = resolve(name, "auto", device)
    assert isinstance(resolved.impl, Impl)
    assert resolved.reason


def test_auto_attention_is_the_reference_but_sdpa_on_cuda():
    assert resolve("rel_pos_attention", "auto", "cpu").impl is Impl.REFERENCE
    assert resolve("rel_pos_attention", "auto", "cuda").impl is Impl.SDPA
    assert "on an H100" in resolve("rel_pos_attention", "auto", "cuda").reason
    assert resolve("rel_pos_attention", "auto", "xpu").impl is Impl.REFERENCE


def test_auto_searches_codes_by_triton_on_cuda_and_names_the_figure():
    with target.pretending("sm_90"):
        resolved = resolve("nearest_code", "auto", "cuda")
    assert resolved.impl is Impl.TRITON
    assert "1.3 ms, eager torch 17.6" in resolved.reason
    assert resolve("nearest_code", "auto", "cpu").impl is Impl.REFERENCE


@pytest.mark.parametrize(
    ("there", "dtype", "why"),
    [
        ({"installed": False}, None, "triton is not installed"),
        ({"installed": True, "interpreted": True}, None, "Triton's interpreter, which TRITON_INTERPRET=1 asks for"),
        ({"installed": True, "interpreted": False}, torch.float64, "triton was measured in half precision alone"),
        ({"pretended": "sm_90"}, torch.float32, "triton was measured in half precision alone"),
        ({"pretended": "sm_80"}, torch.bfloat16, "triton was measured on sm_90 alone, and this is sm_80"),
        ({"pretended": "gfx942"}, torch.bfloat16, "triton was measured on sm_90 alone, and this is gfx942"),
    ],
    ids=["no triton", "interpreter", "float64", "float32", "sm_80", "AMD"],
)
def test_auto_is_the_reference_where_triton_was_not_measured_or_could_not_run_compiled(monkeypatch, there, dtype, why):
    for name, value in there.items():
        monkeypatch.setattr(target, name, value if name == "pretended" else lambda value=value: value)
    resolved = NEAREST_CODE.resolve("auto", torch.device("cuda"), dtype)
    assert resolved.impl is Impl.REFERENCE
    assert why in resolved.reason


@pytest.mark.parametrize("request_", [Impl.SDPA, "sdpa"])
def test_a_request_by_name_is_kept(request_):
    assert resolve("rel_pos_attention", request_, "cpu").impl is Impl.SDPA


def test_a_missing_implementation_is_refused_with_what_there_is():
    with pytest.raises(ImplUnavailable, match=r"token_loss: impl='xformers'.*available: auto, reference"):
        resolve("token_loss", Impl.XFORMERS, "cpu")


def test_an_implementation_that_cannot_run_here_is_refused_with_the_reason():
    with pytest.raises(ImplUnavailable, match=r"rel_pos_attention: impl='xformers' was asked for, but xformers"):
        resolve("rel_pos_attention", Impl.XFORMERS, "cpu")


def test_without_a_device_only_the_name_is_asked():
    assert resolve("rel_pos_attention", Impl.XFORMERS, None).impl is Impl.XFORMERS
    with pytest.raises(ImplUnavailable, match="token_loss"):
        resolve("token_loss", Impl.XFORMERS, None)


def test_a_misspelt_implementation_is_refused_with_the_known_names():
    with pytest.raises(
        ImplUnavailable, match=r"impl='tritn'.*known names: auto, reference, sdpa, xformers, flex, trit"
    ):
        resolve("token_loss", "tritn", "cpu")


def test_an_unknown_operator_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'convolution'.*embed_tokens"):
        resolve("convolution", "auto", "cpu")


def test_auto_cannot_name_what_an_operator_does_not_have():
    with pytest.raises(ValueError, match="no_such_operator: auto names triton"):
        Operator("no_such_operator() -> ()", {Impl.REFERENCE: len}, auto={"cpu": Resolved(Impl.TRITON, "")})
    assert "no_such_operator" not in operators()


def test_import_needs_neither_triton_nor_xformers():
    program = """
import sys
sys.modules["triton"] = sys.modules["xformers"] = None
import torch, fused_beit.kernels as kernels
qkv = torch.randn(1, 5, 3, 2, 4)
print(kernels.rel_pos_attention(qkv, None).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[1, 5, 8]" in done.stdout


def test_a_second_import_under_the_folders_own_name_does_no_harm(root):
    program = f"""
import sys
sys.path.insert(0, {str(root)!r})
import kernels, torch, fused_beit.kernels
assert kernels is not fused_beit.kernels
print(fused_beit.kernels.rel_pos_attention(torch.randn(1, 5, 3, 2, 4), None, impl=fused_beit.kernels.Impl.SDPA).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[1, 5, 8]" in done.stdout


def test_triton_is_refused_on_a_gpu_older_than_its_kernels(monkeypatch):
    monkeypatch.setattr(target, "interpreted", lambda: False)
    monkeypatch.setattr(target, "_arch_of_gpu", lambda index: "sm_75")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ImplUnavailable, match="GPUs from sm_80 on, and this one is sm_75"):
        resolve("rel_pos_attention", "triton", "cuda")


def test_rule_allows_twice_eager_torchs_error_and_one_rounding_and_no_more():
    exact = torch.tensor([1.0, 4.0], dtype=torch.float64)
    eager = torch.tensor([1.0, 4.5])
    eps = torch.finfo(torch.float32).eps
    assert_no_worse_than_eager("x", torch.tensor([0.0, 5.0]), eager, exact)
    assert_no_worse_than_eager("x", torch.tensor([1.0, 4 + 4 * eps]), exact.float(), exact)
    with pytest.raises(AssertionError, match=r"x: error 1\.100e\+00 .*5\.000e-01.*worst at \(1,\): got 5\.0999"):
        assert_no_worse_than_eager("x", torch.tensor([0.0, 5.1]), eager, exact)
    with pytest.raises(AssertionError, match="eager torch's error"):
        assert_no_worse_than_eager("x", torch.tensor([1.0, 4 + 8 * eps]), exact.float(), exact)


def test_rule_refuses_a_nan_and_another_shape_or_dtype():
    exact = torch.ones(2, 3, dtype=torch.float64)
    broken = torch.ones(2, 3)
    broken[1, 2] = torch.nan
    with pytest.raises(AssertionError, match=r"worst at \(1, 2\): got nan"):
        assert_no_worse_than_eager("x", broken, exact.float(), exact)
    with pytest.raises(AssertionError, match="expected shape"):
        assert_no_worse_than_eager("x", torch.ones(3, 2), exact.float(), exact)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_no_worse_than_eager("x", torch.ones(2, 3).bfloat16(), exact.float(), exact)


def test_parity_finds_a_wrong_gradient_behind_a_right_output():
    def right(qkv, bias):
        return qkv.sum((1, 2, 4)) + bias.sum((1, 2))

    def wrong(qkv, bias):
        return qkv.sum((1, 2, 4)) + bias.detach().sum((1, 2)) + 0 * bias.sum()

    inputs = rel_pos_attention_inputs(2, 3, 2, 4)
    assert_parity(right, right, inputs)
    with pytest.raises(AssertionError, match="grad bias"):
        assert_parity(wrong, right, inputs)


@pytest.fixture
def versions(monkeypatch):
    """Say which versions of packages are installed; None: it is not."""

    def say(**installed):
        def version(name):
            if installed[name] is None:
                raise metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(target, "why_not_interpreted", target.why_not_interpreted.__wrapped__)

    return say


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.4.0"), ("3.6.0+git1", "2.10"), ("3.6.2", "3.0")])
def test_an_interpreter_that_fails_beside_its_numpy_is_refused_with_both_versions(versions, monkeypatch, triton, numpy):
    versions(triton=triton, numpy=numpy)
    monkeypatch.setattr(target, "interpreted", lambda: True)
    why = f"the interpreter of Triton {triton} fails beside NumPy {numpy}; it needs triton>=3.7 or numpy<2.4"
    assert target.why_unavailable(torch.device("cpu"), torch.float32) == why


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.3.5"), ("3.7.0", "2.5.2"), ("3.10.0", "2.4.0")])
def test_any_other_interpreter_is_taken(versions, triton, numpy):
    versions(triton=triton, numpy=numpy)
    assert target.why_not_interpreted() is None


def test_an_interpreter_without_numpy_is_refused(versions):
    versions(triton="3.9.0", numpy=None)
    assert target.why_not_interpreted() == "Triton's interpreter needs numpy, which is not installed"


def test_compiled_kernels_do_not_ask_for_numpy(versions, monkeypatch):
    versions(triton="3.6.0", numpy="2.5.2")
    monkeypatch.setattr(target, "interpreted", lambda: False)
    monkeypatch.setattr(target, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert target.why_unavailable(torch.device("cuda"), torch.bfloat16) is None
