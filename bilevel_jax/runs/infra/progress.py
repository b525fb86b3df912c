"""The progress bar of a run, in a terminal and in a notebook."""

import io
import time
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bilevel_jax.runs.terminal import in_notebook, make_console


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
