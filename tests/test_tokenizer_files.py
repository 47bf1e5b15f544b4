"""Tokenizer files: our own, DALL-E's published layout, and what is refused."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from fused_beit.engine.errors import UserError
from fused_beit.engine.tokenizer import files
from fused_beit.engine.tokenizer.dvae import DiscreteVAE, map_pixels
from fused_beit.engine.tokenizer.files import identity, load_tokenizer, read_recipe, save_tokenizer

WIDTH, GROUPS, BLOCKS, VOCAB = 8, 4, 2, 19


def published_state(part, seed=0):
    """A state dict of DALL-E's layout, spelled out from its published module tree."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def conv(name, n_in, n_out, side):
        state[f"{name}.w"] = torch.randn(n_out, n_in, side, side, generator=generator) / (n_in * side**2) ** 0.5
        state[f"{name}.b"] = torch.randn(n_out, generator=generator) / 10

    if part == "encoder":
        before, widths, sides = WIDTH, [1, 2, 4, 8], (3, 3, 3, 1)
        conv("blocks.input", 3, WIDTH, 7)
        conv("blocks.output.conv", 8 * WIDTH, VOCAB, 1)
    else:
        before, widths, sides = WIDTH // 2, [8, 4, 2, 1], (1, 3, 3, 3)
        conv("blocks.input", VOCAB, WIDTH // 2, 1)
        conv("blocks.output.conv", WIDTH, 6, 1)
    for group, factor in enumerate(widths, 1):
        width = factor * WIDTH
        for block in range(1, BLOCKS + 1):
            name = f"blocks.group_{group}.block_{block}"
            if before != width:
                conv(f"{name}.id_path", before, width, 1)
            channels = [before, width // 4, width // 4, width // 4, width]
            for i in range(4):
                conv(f"{name}.res_path.conv_{i + 1}", channels[i], channels[i + 1], sides[i])
            before = width
    return state


def run_published(state, x, between):
    """What DALL-E's module computes from that state; `between` halves or doubles the picture between groups."""

    def conv(name, x):
        weight = state[f"{name}.w"]
        return F.conv2d(x, weight, state[f"{name}.b"], padding=weight.shape[-1] // 2)

    x = conv("blocks.input", x)
    for group in range(1, GROUPS + 1):
        for block in range(1, BLOCKS + 1):
            name = f"blocks.group_{group}.block_{block}"
            branch = x
            for i in range(1, 5):
                branch = conv(f"{name}.res_path.conv_{i}", branch.relu())
            x = (conv(f"{name}.id_path", x) if f"{name}.id_path.w" in state else x) + branch / (GROUPS * BLOCKS) ** 2
        if group < GROUPS:
            x = between(x)
    return conv("blocks.output.conv", x.relu())


def halve(x):
    return F.max_pool2d(x, 2)


def double(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def write(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DiscreteVAE(vocab_size=11, width=8, groups=2, blocks_per_group=1, output_channels=3)


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "ran")


# --- our own files ---


def test_a_saved_tokenizer_comes_back_the_same_frozen_and_in_evaluation_mode(model, pixels, tmp_path):
    save_tokenizer(model, tmp_path / "t.safetensors")
    loaded = load_tokenizer(tmp_path / "t.safetensors")
    assert loaded.sizes == model.sizes
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded.encode(pixels), model.encode(pixels))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_folder_stands_for_the_tokenizer_in_it(model, tmp_path):
    save_tokenizer(model, tmp_path / "new" / "tokenizer.safetensors")
    assert identity(load_tokenizer(tmp_path / "new")) == identity(model)


def test_memory_format_and_bf16_do_not_keep_a_tokenizer_from_being_saved(model, tmp_path):
    model.to(memory_format=torch.channels_last).bfloat16()
    save_tokenizer(model, tmp_path / "t.safetensors")
    loaded = load_tokenizer(tmp_path / "t.safetensors")
    assert torch.equal(loaded.encoder.input.weight, model.encoder.input.weight.float())


def test_identity_names_the_weights(model, tmp_path):
    save_tokenizer(model, tmp_path / "t.safetensors", recipe="other metadata")
    assert identity(load_tokenizer(tmp_path / "t.safetensors")) == identity(model)
    before = identity(model)
    with torch.no_grad():
        model.encoder.output.bias[0] += 1
    assert identity(model) != before


def test_the_recipe_is_kept(model, tmp_path):
    save_tokenizer(model, tmp_path / "with.safetensors", recipe="abc")
    save_tokenizer(model, tmp_path / "without.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no tokenizer")
    names = ("with", "without", "damaged", "missing")
    assert [read_recipe(tmp_path / f"{name}.safetensors") for name in names] == ["abc", None, None, None]


@pytest.mark.parametrize("fails", ["save_file", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_earlier_file(model, tmp_path, monkeypatch, fails):
    path = tmp_path / "t.safetensors"
    save_tokenizer(model, path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with torch.no_grad():
        model.encoder.output.bias += 1
    monkeypatch.setattr(f"{files.__name__}.{fails}" if "." not in fails else fails, fail)
    with pytest.raises(OSError, match="disk full"):
        save_tokenizer(model, path)
    assert path.read_bytes() == before


def test_a_flipped_bit_is_found(model, tmp_path):
    path = tmp_path / "t.safetensors"
    save_tokenizer(model, path)
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="not as it was written"):
        load_tokenizer(path)


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_file_cut_short_is_called_damaged(model, tmp_path, length):
    path = tmp_path / "t.safetensors"
    save_tokenizer(model, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "change", [{"sizes": '{"width": 8}'}, {"sizes": "no json"}, {"sizes": None}, {"sha256": None}], ids=str
)
def test_metadata_that_does_not_fit_the_weights_is_called_damaged(model, tmp_path, change):
    path = tmp_path / "t.safetensors"
    save_tokenizer(model, path)
    metadata = {name: value for name, value in (files.read_metadata(path) | change).items() if value is not None}
    save_file(load_file(path), path, metadata)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(path)


def test_another_format_version_is_named(model, tmp_path):
    path = tmp_path / "t.safetensors"
    save_tokenizer(model, path)
    save_file(load_file(path), path, files.read_metadata(path) | {"version": "7"})
    with pytest.raises(UserError, match="format version 7"):
        load_tokenizer(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.pt does not exist"):
        load_tokenizer(tmp_path / "nothing.pt")


# --- DALL-E's layout ---


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_a_published_encoder_computes_what_the_published_module_does(tmp_path, pixels, suffix):
    state = published_state("encoder")
    loaded = load_tokenizer(write(state, tmp_path / f"encoder{suffix}"))
    assert (loaded.vocab_size, loaded.stride, loaded.has_decoder) == (VOCAB, 8, False)
    expected = run_published(state, map_pixels(pixels), halve)
    torch.testing.assert_close(loaded.encoder(map_pixels(pixels)), expected)
    assert torch.equal(loaded.encode(pixels), expected.argmax(1).flatten(1))


def test_a_folder_with_both_published_parts_decodes_as_the_published_module_does(tmp_path):
    write(published_state("encoder"), tmp_path / "encoder.pt")
    decoder = published_state("decoder", seed=1)
    write(decoder, tmp_path / "decoder.safetensors")
    loaded = load_tokenizer(tmp_path)
    codes = F.one_hot(torch.arange(8).view(2, 2, 2), VOCAB).permute(0, 3, 1, 2).float()
    assert loaded.has_decoder
    torch.testing.assert_close(loaded.decoder(codes), run_published(decoder, codes, double))


def test_half_precision_weights_are_read_as_fp32(tmp_path):
    state = {name: value.half() for name, value in published_state("encoder").items()}
    loaded = load_tokenizer(write(state, tmp_path / "encoder.pt"))
    assert torch.equal(loaded.encoder.input.weight, state["blocks.input.w"].float())


@pytest.mark.parametrize("name", ["encoder.pkl", "encoder.pt"])
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, name, save):
    target = tmp_path / "evidence"
    path = tmp_path / name
    save({"blocks.input.w": Hostile(target)}, path)
    with pytest.raises(UserError):
        load_tokenizer(path)
    assert not target.exists()
    pickle.loads(pickle.dumps(Hostile(target)))  # it would have run
    assert target.exists()


def test_a_pickled_module_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 7)), tmp_path / "encoder.pkl")
    with pytest.raises(UserError, match=r"dall_e.*\.state_dict\(\), 'encoder\.pt'\)"):
        load_tokenizer(tmp_path / "encoder.pkl")


def without_a_name(state):
    del state["blocks.group_2.block_1.id_path.w"]


def with_an_unknown_name(state):
    state["blocks.group_2.block_1.extra.w"] = torch.zeros(1)


def with_another_shape(state):
    state["blocks.group_3.block_2.res_path.conv_4.b"] = torch.zeros(3)


def with_a_nan(state):
    state["blocks.output.conv.b"][0] = torch.nan


@pytest.mark.parametrize(
    "spoil, said",
    [
        (without_a_name, r"group_2\.block_1\.id_path\.w is missing"),
        (with_an_unknown_name, r"group_2\.block_1\.extra\.w is unknown"),
        (with_another_shape, r"res_path\.conv_4\.b has shape \[3\], and \[32\] was expected"),
        (with_a_nan, r"output\.conv\.b holds values that are not finite"),
    ],
)
def test_a_spoilt_state_is_refused_with_the_name(tmp_path, spoil, said):
    state = published_state("encoder")
    spoil(state)
    with pytest.raises(UserError, match=said):
        load_tokenizer(write(state, tmp_path / "encoder.pt"))


@pytest.mark.parametrize(
    "state, said",
    [
        ({"cls_token": torch.zeros(1)}, r"not DALL-E's encoder.*begins with cls_token"),
        ({}, "not DALL-E's encoder"),
        ([torch.zeros(1)], "no state dict"),
        ({"epoch": 3}, "no state dict"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, state, said):
    torch.save(state, tmp_path / "encoder.pt")
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path / "encoder.pt")


def test_a_decoder_is_not_taken_for_an_encoder(tmp_path):
    with pytest.raises(UserError, match=r"as the decoder has; give the encoder's"):
        load_tokenizer(write(published_state("decoder"), tmp_path / "decoder.pt"))


def test_an_empty_folder_is_refused_with_what_it_should_hold(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.safetensors.*encoder\.safetensors or encoder\.pt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.pkl", "notes.txt"])
@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b'{"epoch": 3}', b"\x89PNG\r\n"])
def test_a_text_or_a_picture_is_not_taken_for_a_pickled_module(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"is no file of torch\.save") as caught:
        load_tokenizer(tmp_path / name)
    assert repr(content[:16]) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80 half a pickle", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "encoder.pt").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path / "encoder.pt")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(published_state("encoder"), tmp_path / "encoder.pt")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match=r"encoder\.pt cannot be read \(Permission denied\)"):
        load_tokenizer(path)
