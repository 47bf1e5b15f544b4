"""The next batch under way while a GPU computes: beside it, waited for, and without a change of any bit."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_run import losses, make_tokenizer, small_settings

from fused_beit.engine.data.loading import Batch, Making
from fused_beit.engine.tokenizer.files import load_tokenizer
from fused_beit.engine.training.prefetch import FeedAhead
from fused_beit.engine.training.pretraining import pretrain
from fused_beit.engine.training.zero import ZeroEngine

pytestmark = pytest.mark.gpu

SLEEP = 2_000_000_000  # cycles, about a second
ENGINE = SimpleNamespace(
    runtime=SimpleNamespace(device=torch.device("cuda")),
    autocast=lambda: torch.autocast("cuda", torch.bfloat16),
)


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer.safetensors")


def batch_of(number, pinned=True):
    pixels = torch.full((8, 3, 32, 32), number, dtype=torch.uint8)
    tensors = (pixels, pixels.clone(), torch.zeros(8, 26, dtype=torch.int64), torch.arange(8))
    return Batch(*(tensor.pin_memory() if pinned else tensor for tensor in tensors), [], Making(0, 0.0, 0.0))


def feed_of(tokenizer, count, *, tokens, pinned=True):
    batches = (batch_of(number + 1, pinned) for number in range(count))
    return FeedAhead(batches, ENGINE, load_tokenizer(tokenizer).cuda(), tokens=tokens)


def nothing(phase):
    pass


def mark(stream):
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("workers", [0, 1])
def test_losses_and_weights_are_the_same_bits_for_every_setting(tmp_path, tokenizer, stage, workers):
    how = {"train__impl": "reference", "train__max_steps": 12, "train__log_every": 4, "train__micro_batch": 4}
    how |= {"zero__stage": stage, "data__workers": workers}
    for name in ("none", "pictures", "tokens"):
        assert pretrain(small_settings(tmp_path / name, tokenizer, train__prefetch=name, **how))
        assert losses(tmp_path / name) == losses(tmp_path / "none")
        weights, expected = (load_file(tmp_path / run / "model.safetensors") for run in (name, "none"))
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("tokens", [False, True], ids=["pictures", "tokens"])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_batch_comes_while_the_gpu_computes(tokenizer, tokens, pinned):
    one = feed_of(tokenizer, 3, tokens=tokens, pinned=pinned)
    one.take(nothing)
    one.begin_next(nothing)  # what a first call loads and allocates
    one.take(nothing)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    computing = torch.cuda.current_stream().record_event()
    one.begin_next(nothing)
    one._stream.synchronize()
    assert not computing.query(), "the batch came only after what was computed"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_in_a_run_the_next_batch_is_there_before_the_backward_pass_ends(tmp_path, tokenizer, stage, monkeypatch):
    """At every ZeRO stage, though DeepSpeed waits for the device at the end of a backward pass."""
    there, ends, backward, begin_next = [], [], ZeroEngine.backward, FeedAhead.begin_next

    def slow_backward(engine, loss):
        torch.cuda._sleep(SLEEP // 10)
        backward(engine, loss)
        ends.append(mark(torch.cuda.current_stream()))

    def noted(feed, enter):
        begin_next(feed, enter)
        there.append(mark(feed._stream))

    monkeypatch.setattr(ZeroEngine, "backward", slow_backward)
    monkeypatch.setattr(FeedAhead, "begin_next", noted)
    how = {"train__max_steps": 4, "train__impl": "reference", "zero__stage": stage, "data__val_share": 0}
    assert pretrain(small_settings(tmp_path / "run", tokenizer, train__prefetch="pictures", **how))
    torch.cuda.synchronize()
    assert len(ends) == len(there) - 1 == 4  # the first batch was fetched for the first step itself
    assert all(batch.elapsed_time(end) > 0 for batch, end in zip(there[1:], ends, strict=True))


@pytest.mark.parametrize("tokens", [False, True], ids=["pictures", "tokens"])
def test_a_batch_is_waited_for_before_it_is_read(tokenizer, tokens):
    one = feed_of(tokenizer, 2, tokens=tokens)
    one.take(nothing)
    torch.cuda.synchronize()
    with torch.cuda.stream(one._stream):
        torch.cuda._sleep(SLEEP)
    one.begin_next(nothing)
    batch, token_ids = one.take(nothing)
    read = batch.patch_view.clone(), token_ids.clone()
    torch.cuda.synchronize()
    assert torch.equal(read[0].cpu(), batch_of(2).patch_view)
    with ENGINE.autocast():
        assert torch.equal(read[1], one.tokenizer.encode(batch_of(2).token_view.cuda()))


@pytest.mark.parametrize("tokens", [False, True], ids=["pictures", "tokens"])
def test_a_batchs_memory_is_not_used_again_before_it_is_read(tokenizer, tokens):
    one = feed_of(tokenizer, 6, tokens=tokens)
    expected, read = [], []
    for number in range(5):
        batch, token_ids = one.take(nothing)
        torch.cuda._sleep(SLEEP // 5)
        read.append((batch.patch_view.clone(), token_ids.clone()))
        del batch, token_ids
        one.begin_next(nothing)
        expected.append(batch_of(number + 1).patch_view)
    torch.cuda.synchronize()
    for (pixels, token_ids), given in zip(read, expected, strict=True):
        assert torch.equal(pixels.cpu(), given)
        with ENGINE.autocast():
            assert torch.equal(token_ids, one.tokenizer.encode(given.cuda()))
