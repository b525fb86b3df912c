"""The progress bar of a run, and the file by which others follow it."""

import contextlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bilevel_jax.runs.terminal import in_notebook, make_console
from bilevel_jax.storage import copies

PROGRESS_FILE = "progress.json"


class ProgressFile:
    """progress.json in the folder of a run while it runs: what it does, how far it is and how long it will take.

    `bilevel-jax watch` reads it. It is written again every few seconds, holds nothing that the run needs, and is
    removed when the run ends; a run that was killed leaves it behind, with the time of its last sign of life.
    """

    SECONDS = 2.0
    """Between two writes."""

    def __init__(self, path: Path):
        self._path, self._phase = path, ""
        self._began = self._last_write = time.monotonic()

    def update(self, phase: str, done: float, total: float | None, restored: float) -> None:
        """Write it where the phase is new or it is time to; a disk that is full is no reason to stop.

        Work is in training steps, `restored` that of earlier processes, which says nothing of the speed.
        """
        now = time.monotonic()
        if phase == self._phase and now - self._last_write < self.SECONDS:
            return
        self._phase, self._last_write = phase, now
        seconds_left = None
        if total is not None and restored < done < total:
            seconds_left = (now - self._began) * (total - done) / (done - restored)
        state = {
            "phase": phase, "done": done, "total": total, "seconds": now - self._began, "seconds_left": seconds_left,
            "time": time.time(),
        }  # fmt: skip
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(state), encoding="utf-8")
            os.replace(part, self._path)
        copies.publish_later(self._path)

    def remove(self) -> None:
        """The run has ended."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            copies.remove(self._path)


def make_progress_bar(shown: bool) -> Progress:
    """A bar with the time that is left, gone when its work is done; in a notebook it is one output that is updated."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    if in_notebook():
        return NotebookProgress(*columns, console=make_console(), disable=not shown)
    return Progress(*columns, console=make_console(stderr=True), disable=not shown, transient=True)


class NotebookProgress(Progress):
    """A progress bar as one output of a notebook's cell, which is updated in place and empty at the end.

    Notebooks obey no cursor moves, so that a terminal's bar is not shown there, or again and again.
    """

    SECONDS = 0.5
    """Between two updates; each is a message to the browser, and stays in none."""
    WIDTH = 100

    def __init__(self, *columns: Any, **options: Any):
        super().__init__(*columns, auto_refresh=False, **options)
        self._output: Any = None
        self._last_update = 0.0

    def start(self) -> None:
        """Show the bar, unless it is disabled."""
        if not self.disable:
            from IPython.display import display

            self._output = display(self._render(), raw=True, display_id=True)

    def stop(self) -> None:
        """Leave an empty output."""
        if self._output is not None:
            self._output.update({"text/plain": ""}, raw=True)
            self._output = None

    def update(self, *arguments: Any, **changes: Any) -> None:
        """As of `rich.progress.Progress`."""
        super().update(*arguments, **changes)
        if self._output is not None and time.monotonic() - self._last_update > self.SECONDS:
            self._last_update = time.monotonic()
            self._output.update(self._render(), raw=True)

    def _render(self) -> dict[str, str]:
        file = io.StringIO()
        make_console(file=file, width=self.WIDTH, color_system=None).print(self.get_renderable())
        return {"text/plain": file.getvalue().rstrip()}
