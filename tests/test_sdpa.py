"""Where attention by torch's scaled_dot_product_attention keeps clear of two faults of its kernels on CUDA."""

import pytest
import torch

from fused_beit.kernels.rel_pos_attention import sdpa
from fused_beit.kernels.rel_pos_attention.sdpa import cudnn_may_give_nan, lacks_logsumexp, without_cudnn


def heads(num_tokens=64, learned=""):
    """q, k, v of so many tokens, of which these need a gradient."""
    return [torch.zeros(1, 1, num_tokens, 8, requires_grad=name in learned) for name in "qkv"]


def bias(num_tokens=64, learned=False):
    return torch.zeros(1, 1, num_tokens, num_tokens, requires_grad=learned)


@pytest.mark.parametrize(
    ("num_tokens", "may"), [(64, True), (192, True), (50, False), (63, False), (65, False), (128, False), (197, False)]
)
def test_cudnn_is_left_out_where_the_last_tile_of_128_keys_holds_64(num_tokens, may):
    assert cudnn_may_give_nan(*heads(num_tokens, "qkv")) == may
    assert cudnn_may_give_nan(*heads(num_tokens, "k")) == may


def test_cudnn_may_serve_what_has_no_backward():
    assert not cudnn_may_give_nan(*heads(64))
    with torch.no_grad():
        assert not cudnn_may_give_nan(*heads(64, "qkv"))


def test_only_a_bias_that_learns_alone_lacks_its_logsumexp():
    assert lacks_logsumexp(*heads(), bias(learned=True))
    assert not lacks_logsumexp(*heads(learned="v"), bias(learned=True))
    assert not lacks_logsumexp(*heads(), bias())
    with torch.no_grad():
        assert not lacks_logsumexp(*heads(), bias(learned=True))


def test_a_query_followed_for_the_sake_of_the_bias_changes_no_bit_and_gets_no_gradient():
    inputs = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    grads = []
    for follow in (False, True):
        q, k, v = inputs
        learned = torch.ones(1, 2, 5, 5).requires_grad_()
        query = sdpa._FollowedWith.apply(q, learned) if follow else q
        assert query.requires_grad == follow
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=learned)
        grads.append(torch.autograd.grad(out.square().sum(), learned)[0])
        assert q.grad is None
    assert torch.equal(*grads)


@pytest.mark.parametrize("allowed", [True, False])
def test_what_was_allowed_before_is_allowed_again(allowed):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        with pytest.raises(KeyError), without_cudnn():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
