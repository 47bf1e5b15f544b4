"""The next batch under way while a step runs: who queues what where, and that no result, figure or error changes.

Streams and events of a GPU are stand-ins here: they note what is queued in them, and their work is done at once.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from small_run import losses, make_tokenizer, small_settings, train_rows

from fused_beit.engine.data.loading import BadFile, Batch, Making
from fused_beit.engine.errors import RankError, UserError
from fused_beit.engine.training import pretraining, zero
from fused_beit.engine.training.metrics import read_metrics
from fused_beit.engine.training.prefetch import Feed, FeedAhead, feed
from fused_beit.engine.training.pretraining import open_run, pretrain
from fused_beit.engine.training.timeline import Phase

TIMES = {"images_per_s", "data_wait", "data_per_s", "mfu"}
AHEAD = pytest.mark.parametrize("tokens", [False, True], ids=["pictures", "tokens"])


class Stream:
    """Stand-in for a GPU's stream: a list of what was queued in it."""

    def __init__(self):
        self.queued = []

    def record_event(self):
        self.queued.append("event")
        return SimpleNamespace(after=list(self.queued))

    def wait_event(self, event):
        self.queued.append(f"wait for {event.after[-2]}")

    def wait_stream(self, other):
        self.queued.append("wait for all before")


@pytest.fixture
def streams(monkeypatch):
    """The one that computes, and once there is one, the feed's; copies and tokens are noted in the current one."""
    made = [Stream()]
    entered = [made[0]]

    def new_stream(device):
        made.append(Stream())
        return made[-1]

    @contextmanager
    def inside(stream):
        entered.append(stream)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: entered[-1])
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: stream.queued.append("keep"))
    copy = Batch.to

    def noted_copy(batch, *where, **how):
        entered[-1].queued.append(f"copy {int(batch.sample_ids[0])}")
        return copy(batch, *where, **how)

    monkeypatch.setattr(Batch, "to", noted_copy)
    made[0].encode = lambda views: entered[-1].queued.append(f"tokens {int(views[0, 0, 0, 0])}") or views
    return made


def batch_of(number):
    pixels = torch.full((1, 3, 2, 2), number, dtype=torch.uint8)
    return Batch(pixels, pixels, torch.zeros(1, 1), torch.tensor([number]), [], Making(0, 0.0, 0.0))


ENGINE = SimpleNamespace(runtime=SimpleNamespace(device=torch.device("cpu")), autocast=nullcontext)


def ahead_of(streams, batches, tokens):
    tokenizer = SimpleNamespace(encode=streams[0].encode)
    return FeedAhead(iter(batches), ENGINE, tokenizer, tokens=tokens)


def steps_of(one, streams, count, enter=lambda phase: None):
    """So many steps of a loop; returns the numbers of their batches."""
    taken = []
    for number in range(count):
        batch, token_ids = one.take(enter)
        assert token_ids[0, 0, 0, 0] == batch.sample_ids[0]
        taken.append(int(batch.sample_ids[0]))
        streams[0].queued.append(f"forward {number}")
        one.begin_next(enter)
        streams[0].queued.append(f"backward {number}")
    return taken


def test_pictures_are_copied_beside_and_waited_for_before_they_are_read(streams):
    one = ahead_of(streams, map(batch_of, range(2)), tokens=False)
    assert steps_of(one, streams, 2) == [0, 1]
    computing, beside = (stream.queued for stream in streams)
    assert beside == ["wait for all before", "copy 0", "event", "copy 1", "event"]
    keep = ["keep"] * 4
    first = ["wait for copy 0", *keep, "tokens 0", "forward 0", "backward 0"]
    assert computing == [*first, "wait for copy 1", *keep, "tokens 1", "forward 1", "backward 1"]


def test_tokens_are_made_beside_and_waited_for_before_they_are_read(streams):
    one = ahead_of(streams, map(batch_of, range(2)), tokens=True)
    assert steps_of(one, streams, 2) == [0, 1]
    computing, beside = (stream.queued for stream in streams)
    each = [["copy 0", "event", "tokens 0", "event"], ["copy 1", "event", "tokens 1", "event"]]
    assert beside == ["wait for all before", *each[0], *each[1]]
    keep = ["keep"] * 4
    first = ["wait for copy 0", *keep, "wait for tokens 0", "keep", "forward 0", "backward 0"]
    assert computing == [*first, "wait for copy 1", *keep, "wait for tokens 1", "keep", "forward 1", "backward 1"]


@AHEAD
def test_the_wait_for_a_batch_is_told_apart_from_the_step(streams, tokens):
    """Marks lie in the stream that computes, so that a phase has what that stream waited for."""
    phases = []

    def loader():
        for number in range(2):
            phases.append("loader")
            yield batch_of(number)

    steps_of(ahead_of(streams, loader(), tokens), streams, 1, lambda phase: phases.append(phase))
    under_way = [Phase.DATA, "loader", Phase.TRANSFER, *([Phase.TOKENIZER] if tokens else [])]
    assert phases == [*under_way, Phase.TRANSFER, Phase.TOKENIZER, *under_way]


@AHEAD
def test_what_the_loader_raises_comes_when_its_batch_would_be_taken(streams, tokens):
    def loader():
        yield batch_of(0)
        raise UserError("no more pictures")

    one = ahead_of(streams, loader(), tokens)
    assert steps_of(one, streams, 1) == [0]
    with pytest.raises(UserError, match="no more pictures"):
        one.take(lambda phase: None)


@AHEAD
def test_after_the_last_batch_there_is_none_under_way(streams, tokens):
    one = ahead_of(streams, map(batch_of, range(3)), tokens)
    assert steps_of(one, streams, 3) == [0, 1, 2]
    assert [entry for entry in streams[1].queued if entry.startswith("copy")] == ["copy 0", "copy 1", "copy 2"]
    with pytest.raises(StopIteration):
        one.take(lambda phase: None)


@pytest.mark.parametrize("prefetch", ["none", "pictures", "tokens"])
def test_on_a_cpu_nothing_is_ahead(prefetch):
    numbers = []
    loader = (numbers.append(number) or batch_of(number) for number in range(2))
    one = feed(loader, ENGINE, SimpleNamespace(encode=lambda views: views), prefetch)
    assert type(one) is Feed
    assert not one.tokens_ahead
    one.take(lambda phase: None)
    one.begin_next(lambda phase: None)
    assert numbers == [0]


def test_a_gpu_gets_what_the_setting_says(streams):
    on_gpu = SimpleNamespace(runtime=SimpleNamespace(device=torch.device("cuda")))
    none, pictures, tokens = (feed(iter([]), on_gpu, None, name) for name in ("none", "pictures", "tokens"))
    assert type(none) is Feed
    assert (type(pictures), pictures.tokens_ahead) == (FeedAhead, False)
    assert (type(tokens), tokens.tokens_ahead) == (FeedAhead, True)


# Whole runs, the GPU's feed put in the place of a CPU's.


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer.safetensors")


@pytest.fixture
def fed(streams, monkeypatch):
    """Let runs be fed ahead; returns the streams, with the backward passes noted in the feed's."""

    def fed(tokens):
        monkeypatch.setattr(pretraining, "feed", lambda *of: FeedAhead(*of[:3], tokens=tokens))
        backward = zero.ZeroEngine.backward
        monkeypatch.setattr(
            zero.ZeroEngine,
            "backward",
            lambda engine, loss: streams[-1].queued.append("backward") or backward(engine, loss),
        )
        return streams

    return fed


@AHEAD
@pytest.mark.parametrize("passes", [1, 2])
def test_each_pass_has_the_next_batch_queued_before_its_backward(tmp_path, tokenizer, fed, tokens, passes):
    streams = fed(tokens)
    how = {"data__val_share": 0, "train__max_steps": 3, "train__micro_batch": 8 // passes}
    assert pretrain(small_settings(tmp_path / "run", tokenizer, **how))
    order = [entry.split()[0] for entry in streams[1].queued if entry.split()[0] in ("copy", "backward")]
    assert order == ["copy", *["copy", "backward"] * (3 * passes - 1), "backward"]


@AHEAD
def test_a_run_that_is_fed_ahead_has_the_same_losses_and_figures(tmp_path, tokenizer, fed, tokens):
    how = {"train__micro_batch": 4, "train__eval_every": 2, "train__save_every": 3}
    assert pretrain(small_settings(tmp_path / "plain", tokenizer, **how))
    fed(tokens)
    assert pretrain(small_settings(tmp_path / "ahead", tokenizer, **how))
    plain, ahead = (
        [{name: row[name] for name in row.keys() - TIMES} for row in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("plain", "ahead")
    )
    assert ahead == plain
    assert any("val_loss" in row for row in plain)


@pytest.mark.parametrize("prefetch", ["none", "tokens"])
def test_the_setting_may_change_where_a_run_goes_on(tmp_path, tokenizer, prefetch):
    assert pretrain(small_settings(tmp_path / "whole", tokenizer))
    assert pretrain(small_settings(tmp_path / "halves", tokenizer, train__stop_at_step=3))
    assert pretrain(small_settings(tmp_path / "halves", tokenizer, resume="auto", train__prefetch=prefetch))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


def test_a_stop_with_a_batch_under_way_loses_nothing(tmp_path, tokenizer, fed):
    assert pretrain(small_settings(tmp_path / "whole", tokenizer))
    fed(tokens=True)
    with open_run(small_settings(tmp_path / "halves", tokenizer)) as run:
        run.loop.stop.received = True
        done = run.loop.run(0, run.end_step)
        assert not run.finish(done)
    assert done == 1
    assert pretrain(small_settings(tmp_path / "halves", tokenizer, resume="auto"))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_a_failing_loader_ends_a_run_after_the_steps_before_are_logged_and_saved(
    tmp_path, tokenizer, fed, monkeypatch, ahead
):
    whole = pretraining.train_loader

    def failing(*args, **how):
        batches = whole(*args, **how)
        for number in range(3):
            bad = [BadFile(f"{number}.jpg", "the file is empty")]
            yield next(batches)._replace(bad=bad)
        raise UserError("21 pictures drawn one after the other could not be read")

    monkeypatch.setattr(pretraining, "train_loader", failing)
    if ahead:
        fed(tokens=True)
    how = {"train__save_every": 3, "data__max_bad_share": 1}
    with pytest.raises(RankError, match="21 pictures drawn"):
        pretrain(small_settings(tmp_path / "run", tokenizer, **how))
    assert [row["bad_pictures"] for row in train_rows(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_too_many_bad_pictures_end_a_run_at_the_batch_that_has_them(tmp_path, tokenizer, fed, monkeypatch, ahead):
    whole = pretraining.train_loader

    def one_bad(*args, **how):
        for number, batch in enumerate(whole(*args, **how)):
            yield batch._replace(bad=[BadFile("a.jpg", "the file is empty")]) if number == 2 else batch

    monkeypatch.setattr(pretraining, "train_loader", one_bad)
    if ahead:
        fed(tokens=False)
    with pytest.raises(RankError, match="1 of 25 pictures read could not be decoded"):
        pretrain(small_settings(tmp_path / "run", tokenizer, data__max_bad_share=0))
    assert len(train_rows(tmp_path / "run")) == 2
