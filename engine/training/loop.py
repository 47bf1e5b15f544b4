"""The training loop. Touches the host only to log: the loss stays on the device between two logged steps."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..config import Settings
from ..cpu import RunQueue
from ..data.loading import BadPictureLog, Batch
from ..errors import RankError, UserError
from .evaluation import Evaluation
from .metrics import MetricsLog, Progress
from .optim import Schedule
from .pace import Pace
from .prefetch import Feed
from .timeline import Phase, by_phase, timeline
from .zero import ZeroEngine, reduce_sum


class StopRequest:
    """While entered, remembers SIGTERM or SIGINT; one that comes `PATIENCE` later ends the process at once.

    Launchers pass on a signal that the rank has already had itself, so a quick repetition is the same request.
    """

    PATIENCE = 30.0  # seconds

    def __init__(self) -> None:
        self.received = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._since > self.PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.received:
            self.received, self._since = True, time.monotonic()


@dataclass
class Loop:
    """Everything a run trains with.

    `evaluate()` (None without held-out pictures) and `save(step)` are called on every rank. The loop ends at
    `end_step`, or after a stop was requested: of one rank at the next step, of any of several at the next logged one.
    """

    engine: ZeroEngine
    feed: Feed
    schedule: Schedule
    settings: Settings
    log: MetricsLog | None
    progress: Progress
    bad_pictures: BadPictureLog
    stop: StopRequest
    evaluate: Callable[[], Evaluation | None]
    save: Callable[[int], None]
    steps_per_epoch: int
    flops_per_picture: float
    peak_flops: float | None
    paces: list[Pace] = field(default_factory=list)
    """Of the steps before the first log line, and of all later ones together."""

    def run(self, start_step: int, end_step: int) -> int:
        """Train from `start_step` steps done to `end_step`; returns the steps done."""
        train = self.settings.train
        interval = Interval(self.engine.runtime.device)
        for step in range(start_step, end_step):
            self.train_step(step, interval)
            done = step + 1
            stopping = False
            alone = self.engine.runtime.world_size == 1  # several ranks hear of a stop where they exchange anyway
            if done % train.log_every == 0 or done == end_step or (alone and self.stop.received):
                stopping = self.report(done, interval)
                interval = Interval(self.engine.runtime.device)
            else:
                self.progress.step(done)
            if train.eval_every and done % train.eval_every == 0 and done != end_step:
                evaluation = self.evaluate()
                if evaluation is not None:
                    self.report_evaluation(done, evaluation)
                interval.restart()
            if stopping:
                self.save(done)
                return done
            if done % train.save_every == 0 and done != end_step:
                self.save(done)
                interval.restart()
        return end_step

    def train_step(self, step: int, interval: "Interval") -> None:
        """One optimizer step; `step` counts from 0."""
        engine, seed, enter = self.engine, self.settings.train.seed, interval.timeline.enter
        self.schedule.apply(engine.param_groups, step)
        for _ in range(engine.accumulation):
            try:
                batch, token_ids = self.feed.take(enter)
                self.bad_pictures.add(batch)
            except UserError as error:
                raise RankError(str(error)) from None
            enter(Phase.FORWARD)
            loss, accuracy = engine(batch.patch_view, batch.masked_positions, token_ids, batch.sample_ids, seed)
            self.feed.begin_next(enter)  # before DeepSpeed waits for the device, at the end of a backward pass
            enter(Phase.BACKWARD)
            engine.backward(loss)
            enter(Phase.OPTIMIZER)
            engine.step()
            enter(Phase.REST)
            interval.add(batch, loss, accuracy)

    def report(self, done: int, interval: "Interval") -> bool:
        """Read the interval's figures from the device, say them, and tell whether a rank was asked to stop."""
        engine, train = self.engine, self.settings.train
        figures, rank_waits = interval.figures(engine, self.bad_pictures.count, self.stop.received)
        seconds = interval.seconds()
        pace = replace(interval.pace(), rank_waits=rank_waits)
        self.paces = [*self.paces[:1], sum(self.paces[1:], pace)]
        pictures_per_s = interval.steps(engine.accumulation) * train.global_batch / max(seconds, 1e-9)
        row: dict[str, Any] = {
            "step": done,
            "epoch": done / self.steps_per_epoch,
            "loss": figures["loss"],
            "mlm_acc": figures["mlm_acc"],
            "lr": self.schedule.lr(done - 1),
            "weight_decay": self.schedule.weight_decay(done - 1),
            "grad_norm": figures["grad_norm"],
            "skipped": int(figures["skipped"]),
            "bad_pictures": int(figures["bad_pictures"]),
            "images_per_s": pictures_per_s,
            "data_wait": pace.share(Phase.DATA),
            "data_per_s": pace.made_per_s(self.settings.data.workers),
        }
        if self.peak_flops is not None:
            row["mfu"] = pictures_per_s * self.flops_per_picture / (self.peak_flops * engine.runtime.world_size)
        if self.log is not None:
            self.log.write(row)
        self.progress.update(done, summary(row))
        if figures["skipped_in_a_row"] >= train.max_skipped:
            raise UserError(
                f"the gradient was not finite {int(figures['skipped_in_a_row'])} steps in a row, up to step {done} "
                f"(train.max_skipped = {train.max_skipped}); start again in another --output_dir with a "
                f"lower optim.lr, a longer warm-up, optim.clip_grad, or train.precision fp32."
            )
        return figures["stop"] > 0

    def pace(self) -> Pace | None:
        """Of this session but the steps before its first log line, in which all is done for the first time; or None."""
        return self.paces[1] if len(self.paces) > 1 else None

    def close(self) -> None:
        self.progress.close()
        if self.log is not None:
            self.log.close()
        self.feed.close()

    def report_evaluation(self, done: int, evaluation: Evaluation) -> None:
        """Say and keep held-out figures."""
        if self.log is not None:
            self.log.write(
                {
                    "step": done,
                    "val_loss": evaluation.loss,
                    "val_mlm_acc": evaluation.accuracy,
                    "token_entropy": evaluation.token_entropy,
                    "commonest_share": evaluation.commonest_share,
                }
            )
        self.progress.say(
            f"step {done}: held-out loss {evaluation.loss:.3f} (token entropy {evaluation.token_entropy:.3f}), "
            f"accuracy {evaluation.accuracy:.1%} (commonest token {evaluation.commonest_share:.1%})"
        )


class Interval:
    """Sums between two logged steps, kept on the device, and where the time went."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, device=device)
        self.passes = 0
        self.timeline = timeline(device)
        self.restart()

    def restart(self) -> None:
        """Leave out of the speed what was not training."""
        self.timed_from = self.passes
        self.taken = Pace()
        self.timeline.restart()
        self.began, self.processor_began, self.queue = time.monotonic(), time.process_time(), RunQueue()

    def add(self, batch: Batch, loss: Tensor, accuracy: Tensor) -> None:
        self.sums += torch.stack([loss.detach(), accuracy]).float()
        self.taken = self.taken.taking(batch)
        self.passes += 1

    def pace(self) -> Pace:
        """Speed of this rank and where its time went; read only where the host waits for the device anyway."""
        processor_seconds = time.process_time() - self.processor_began
        return replace(
            self.taken,
            phases=by_phase(self.timeline.seconds()),
            processor_seconds=processor_seconds,
            queued_seconds=self.queue.seconds(),
        )

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def steps(self, accumulation: int) -> float:
        return (self.passes - self.timed_from) / accumulation

    def figures(self, engine: ZeroEngine, bad_pictures: int, stop: bool) -> tuple[dict[str, float], tuple[float, ...]]:
        """Figures of all ranks together and the seconds each waited for pictures, in one reduction and transfer."""
        device, runtime = self.sums.device, engine.runtime
        mean = self.sums / (self.passes * runtime.world_size)
        waits = [0.0] * runtime.world_size
        waits[runtime.rank] = by_phase(self.timeline.seconds())[Phase.DATA]
        per_rank = torch.tensor([bad_pictures, stop, *waits], dtype=torch.float32, device=device)
        summed = reduce_sum(torch.cat([mean, per_rank]))
        same = [torch.as_tensor(value, device=device).float() for value in (engine.grad_norm(), *engine.skipped())]
        names = ("loss", "mlm_acc", "bad_pictures", "stop", "grad_norm", "skipped", "skipped_in_a_row")
        values = torch.cat([summed, torch.stack(same)]).tolist()
        end = 4 + runtime.world_size
        return dict(zip(names, values[:4] + values[end:], strict=True)), tuple(values[4:end])


def summary(row: dict[str, Any]) -> str:
    """A logged row in a line."""
    parts = [
        f"loss {row['loss']:.3f}",
        f"mlm_acc {row['mlm_acc']:.1%}",
        f"lr {row['lr']:.1e}",
        f"{row['images_per_s']:.0f} pictures/s",
        f"waits {row['data_wait']:.0%}",
    ]
    if "mfu" in row:
        parts.append(f"mfu {row['mfu']:.1%}")
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']}")
    return "  ".join(parts)
