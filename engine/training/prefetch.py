"""Batches on their way to where the model is: when the step asks for them, or on a GPU while the step before runs.

Ahead, a batch is copied in a stream of its own, and on request gets its tokens there. The host waits for neither: the
stream that computes does, before it reads. Memory is kept as long as it is read. Of pinned pictures, which come from
data workers, torch notes their copy in the stream that makes it and gives them to no other batch before it is done;
for pictures that are not pinned the host waits, but for their own stream alone. What is on the device was allocated in
that stream, so that `record_stream` must say who else reads it.
"""

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Prefetch
from ..data.loading import Batch
from ..tokenizer.dvae import DiscreteVAE
from .evaluation import tokens_of
from .timeline import Phase
from .zero import ZeroEngine

Enter = Callable[[Phase], None]
"""Says whose time it is from here on; see `Timeline.enter`."""


class Feed:
    """Batches on the device with their tokens, each made ready when it is asked for.

    Args:
        batches: of this rank, one a pass.
        engine: whose device and precision they are for.
        tokenizer: on that device.
    """

    tokens_ahead = False
    """Whether tokens are made beside a step, so that what a step waits for them is not their own time."""

    def __init__(self, batches: Generator[Batch], engine: ZeroEngine, tokenizer: DiscreteVAE) -> None:
        self.batches, self.engine, self.tokenizer = batches, engine, tokenizer

    def take(self, enter: Enter) -> tuple[Batch, Tensor]:
        """The next batch on the device and its token ids, int64 `[B, P]`.

        Raises:
            StopIteration: after the last one
            UserError, RuntimeError: what the loader raises
        """
        enter(Phase.DATA)
        batch = next(self.batches)
        enter(Phase.TRANSFER)
        batch = self.copy(batch)
        enter(Phase.TOKENIZER)
        return batch, tokens_of(self.engine, self.tokenizer, batch)

    def begin_next(self, enter: Enter) -> None:
        """Get the batch after this one under way, if that is to be: all of the forward pass is queued."""

    def copy(self, batch: Batch) -> Batch:
        return batch.to(self.engine.runtime.device, non_blocking=True)

    def close(self) -> None:
        self.batches.close()


class Coming(NamedTuple):
    """A batch under way to the device, and with which event it is there."""

    batch: Batch
    copied: torch.cuda.Event
    tokens: tuple[Tensor, torch.cuda.Event] | None
    """Its token ids in the same way; None where the step makes them."""


class FeedAhead(Feed):
    """The same on a GPU, the next batch under way while a step runs; `tokens`: with its tokens.

    The loader is asked before the backward pass, and the host waits there if no batch is ready; the time is that of
    `Phase.DATA` as far as the device ran dry in it. What the loader raises then is raised when the batch would be
    taken: by then the step before is done, logged and saved, as it is where nothing is ahead.
    """

    def __init__(self, batches: Generator[Batch], engine: ZeroEngine, tokenizer: DiscreteVAE, *, tokens: bool) -> None:
        super().__init__(batches, engine, tokenizer)
        self.tokens_ahead = tokens
        self._stream = torch.cuda.Stream(engine.runtime.device)
        self._stream.wait_stream(torch.cuda.current_stream())  # in which the tokenizer's weights came
        self._coming: Coming | Exception | None = None

    def take(self, enter: Enter) -> tuple[Batch, Tensor]:
        if self._coming is None:
            self.begin_next(enter)
        coming, self._coming = self._coming, None
        if isinstance(coming, Exception):
            raise coming
        assert coming is not None
        computing = torch.cuda.current_stream()
        enter(Phase.TRANSFER)
        computing.wait_event(coming.copied)
        for tensor in coming.batch.tensors:
            tensor.record_stream(computing)
        enter(Phase.TOKENIZER)
        if coming.tokens is None:
            return coming.batch, tokens_of(self.engine, self.tokenizer, coming.batch)
        token_ids, made = coming.tokens
        computing.wait_event(made)
        token_ids.record_stream(computing)
        return coming.batch, token_ids

    def begin_next(self, enter: Enter) -> None:
        enter(Phase.DATA)
        try:
            batch = next(self.batches)
        except Exception as error:
            self._coming = error
            return
        with torch.cuda.stream(self._stream):
            enter(Phase.TRANSFER)
            batch = self.copy(batch)
            copied = self._stream.record_event()
            tokens = None
            if self.tokens_ahead:
                enter(Phase.TOKENIZER)
                tokens = tokens_of(self.engine, self.tokenizer, batch), self._stream.record_event()
        self._coming = Coming(batch, copied, tokens)

    def close(self) -> None:
        self._coming = None
        super().close()


def feed(batches: Generator[Batch], engine: ZeroEngine, tokenizer: DiscreteVAE, prefetch: Prefetch) -> Feed:
    """Batches as `train.prefetch` has them on the engine's device; on a CPU nothing runs beside a step."""
    if engine.runtime.device.type == "cpu" or prefetch == "none":
        return Feed(batches, engine, tokenizer)
    return FeedAhead(batches, engine, tokenizer, tokens=prefetch == "tokens")
