"""Work in a process of its own, which may crash, hang or break the device without taking the rest of a run with it."""

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Event = dict[str, Any]
OUT_OF_TIME = "was out of time"


class Journal:
    """A file of events, one JSON object a line, that a process writes as it goes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **event: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def events(self) -> list[Event]:
        """What was written; less a last line that was cut off."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in lines]


class Ended(NamedTuple):
    """The events of a process, and how it ended where it did not end well: "was silent for 120 s"."""

    events: list[Event]
    badly: str

    @property
    def doing(self) -> str:
        """What it last said that it does."""
        return next((event["doing"] for event in reversed(self.events) if "doing" in event), "")


def supervise(
    target: Callable[..., None], *arguments: Any, journal: Path, silence: float, until: float, preload: str = "torch"
) -> Ended:
    """Run target(*arguments, Journal(journal)) in a new process.

    silence: seconds after which a process that has added no event is killed
    until:   time.monotonic() after which it is killed in any case
    preload: module that is imported once for all processes
    """
    # Forked from a process that has never used the device, so that each begins with a new device and imports nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    journal.unlink(missing_ok=True)
    journal.touch()
    process = context.Process(target=target, args=(*arguments, Journal(journal)))
    process.start()
    badly, size, heard = "", 0, time.monotonic()
    while process.is_alive():
        process.join(0.05)
        now = time.monotonic()
        if (grown := journal.stat().st_size) != size:
            size, heard = grown, now
        if now - heard > silence:
            badly = f"was silent for {silence:.0f} s"
        elif now > until:
            badly = OUT_OF_TIME
        if badly:
            process.kill()
            process.join()
    code = process.exitcode
    if code and not badly:
        badly = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    return Ended(Journal(journal).events(), badly)
