"""The discrete VAE: DALL-E's sizes, encoding and decoding."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_beit.engine.tokenizer.dvae import DiscreteVAE, map_pixels, unmap_pixels
from fused_beit.kernels.nearest_code import reference


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.fixture
def small():
    torch.manual_seed(0)
    return DiscreteVAE(vocab_size=37, width=8, groups=3, blocks_per_group=2).eval()


def pictures(count=3, side=16, seed=0):
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def logits(model, pixels):
    return model.encoder(map_pixels(pixels.float() / 255))


def test_the_encoder_in_the_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = DiscreteVAE(vocab_size=8192, width=256, groups=4, blocks_per_group=2)
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 53_786_240
    assert model.stride == 8


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_a_token_covers_two_to_the_groups_less_one_pixels(groups):
    model = DiscreteVAE(vocab_size=5, width=4, groups=groups, blocks_per_group=1)
    ids = model.encode(pictures(2, 16))
    grid = 16 // 2 ** (groups - 1)
    assert ids.shape == (2, grid**2)
    assert model.decode(ids.view(2, grid, grid)).shape == (2, 3, 16, 16)


def test_codes_are_the_largest_logits_row_by_row(small):
    pixels = pictures()
    assert torch.equal(small.encode(pixels), logits(small, pixels).argmax(1).flatten(1))
    assert small.encode(pixels).unique().numel() > 1


def test_bytes_are_taken_for_shares_of_255(small):
    pixels = pictures()
    assert torch.equal(small.prepare(pixels), map_pixels(pixels / 255))
    assert torch.equal(small.encode(pixels), small.encode(pixels / 255))


def test_channels_last_gives_the_same_codes(small):
    expected = small.encode(pictures())
    small.to(memory_format=torch.channels_last)
    assert torch.equal(small.encode(pictures().contiguous(memory_format=torch.channels_last)), expected)


def test_bf16_weights_give_the_codes_of_their_own_features_scored_in_fp32(small):
    small.bfloat16()
    pixels = pictures()
    features = small.encoder.features(small.prepare(pixels))
    assert features.dtype == torch.bfloat16
    last = small.encoder.output
    scores = F.conv2d(features.float(), last.weight.float(), last.bias.float())
    assert torch.equal(small.encode(pixels), scores.argmax(1).flatten(1))


def test_autocast_narrows_features_and_codes_but_not_the_scores(small):
    pixels = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        features = small.encoder.features(small.prepare(pixels))
        ids = small.encode(pixels)
    last = small.encoder.output
    scores = F.conv2d(features.float(), last.weight.bfloat16().float(), last.bias)
    assert features.dtype == torch.bfloat16
    assert torch.equal(ids, scores.argmax(1).flatten(1))


def test_encoding_never_holds_the_logits(monkeypatch):
    monkeypatch.setattr(reference, "MAX_SCORES", 1 << 12)
    model = DiscreteVAE(vocab_size=512, width=4, groups=1, blocks_per_group=1)
    with LargestTensor() as seen:
        model.encode(pictures(2, 16))
    assert seen.numel < 2 * 16 * 16 * 512


def test_encoding_needs_no_gradient(small):
    with torch.enable_grad():
        assert not small.encode(pictures()).requires_grad
    assert all(parameter.grad is None for parameter in small.parameters())


def test_decoding_codes_is_the_decoder_on_one_hot_codes(small):
    ids = torch.arange(2 * 4 * 4).view(2, 4, 4) % 37
    one_hot = F.one_hot(ids, 37).permute(0, 3, 1, 2).float()
    expected = unmap_pixels(torch.sigmoid(small.decoder(one_hot)[:, :3]))
    torch.testing.assert_close(small.decode(ids), expected)
    assert small.decode(ids).min() >= 0
    assert small.decode(ids).max() <= 1


def test_unmapping_undoes_mapping_and_cuts_to_zero_and_one():
    pixels = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert map_pixels(pixels)[[0, -1]].tolist() == [0.1, 0.9]
    torch.testing.assert_close(unmap_pixels(map_pixels(pixels)), pixels)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_without_a_decoder_decoding_says_why():
    model = DiscreteVAE(vocab_size=5, width=4, groups=2, blocks_per_group=1, output_channels=0)
    assert not model.has_decoder
    with pytest.raises(RuntimeError, match="no decoder"):
        model.decode(torch.zeros(1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(1, 3, 18, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_pictures_that_do_not_fit_are_refused_with_both_shapes(small, shape):
    with pytest.raises(ValueError, match=r"multiple of the stride 4.*got \["):
        small.encode(torch.zeros(shape))


def test_sizes_rebuild_the_same_architecture(small):
    again = DiscreteVAE(**small.sizes)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
