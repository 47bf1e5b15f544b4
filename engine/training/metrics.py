"""What a run says while it trains: one JSON object a logged step, TensorBoard, a progress bar or plain lines."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoint import replace_durably


class MetricsLog:
    """`metrics.jsonl`, and TensorBoard's events when it is installed.

    Args:
        folder: output folder of the run.
        start_step: optimizer steps already done; rows beyond it, of a run that was killed later, are dropped.
    """

    def __init__(self, folder: Path, start_step: int):
        self.path = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(self.path) if row["step"] <= start_step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        replace_durably(self.path, lambda path: path.write_text(text))
        self.file = self.path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.tensorboard = None
        else:
            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; `row["step"]` is the number of steps done. Values that are not finite become null."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()
        if self.tensorboard is not None:
            for key, value in clean.items():
                if key != "step" and isinstance(value, int | float):
                    self.tensorboard.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Progress:
    """A bar on a terminal, a line every `every` seconds elsewhere; silent where `enabled` is false.

    `step` counts; `update` counts and says the figures. Before the first figures a line says how long it will take.
    """

    def __init__(self, total: int, start: int, *, enabled: bool = True, every: float = 10.0):
        self.total, self.start, self.done = total, start, start
        self.enabled, self.every = enabled, every
        self.began = self.spoke = time.monotonic()
        self.first_line = True
        on_terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if on_terminal else None

    def step(self, step: int) -> None:
        """Show that `step` steps are done, whose figures nobody has read yet."""
        if self.bar is not None:
            self.bar.update(step - self.done)
        self.done = step
        if self.first_line and time.monotonic() - self.spoke >= self.every and step < self.total:
            self.line("")

    def update(self, step: int, text: str) -> None:
        """Show that `step` steps are done, and their figures."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.done)
        self.done = step
        if time.monotonic() - self.spoke >= self.every or step == self.total:
            self.line(f"{text}  ")

    def line(self, text: str) -> None:
        """Print how far it is, where there is no bar."""
        self.spoke, self.first_line = time.monotonic(), False
        if self.enabled and self.bar is None:
            left = (self.spoke - self.began) / max(self.done - self.start, 1) * (self.total - self.done)
            print(f"step {self.done}/{self.total}  {text}{duration(left)} left", flush=True)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.enabled:
            tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def seconds(self) -> float:
        """Time since the first step began."""
        return time.monotonic() - self.began

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 5 s` or `2 h 7 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
