"""The numbers of a run as event files of TensorBoard."""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "tensorboard"
"""In the folder of a run; `tensorboard --logdir DIR` finds it."""
BINS = 30


def check_installed() -> None:
    """Raise ValueError where the package that writes event files is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError(
            "output.tensorboard is on, and tensorboardX is not installed: pip install 'bilevel-jax[tensorboard]', or "
            "set it to false."
        )


def make_tag(*names: str) -> str:
    """The names from the outermost on, as TensorBoard groups them; it allows no spaces."""
    return re.sub(r"[^\w./-]", "_", "/".join(names))


class EventWriter:
    """Writes scalars and histograms; its file is made by the first of them, so that a run without any has none.

    A run that is resumed adds a file. Steps that it takes again stand twice, with the same numbers. Where the file
    cannot be written, that is said once, and the run goes on without.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._writer: Any = None
        self._has_failed = False

    def add_scalars(self, numbers: Mapping[str, list[tuple[float, float]]]) -> None:
        """(step, value) of each name."""
        from tensorboardX import summary  # here, as it is an extra

        for name, points in numbers.items():
            for step, value in points:
                self._write(step, summary.scalar(name, value))

    def add_histogram(self, name: str, step: int, values: np.ndarray) -> None:
        """How often values are how large, in `BINS` equal bins between the least and the largest finite one."""
        from tensorboardX import summary

        finite = values[np.isfinite(values)]
        if finite.size:
            self._write(step, summary.histogram(name, finite, np.linspace(*_widened(finite), BINS + 1)))

    def flush(self) -> None:
        """Have all of it in the file."""
        if self._writer is not None:
            self._try(self._writer.flush)

    def close(self) -> None:
        """The run has ended, or stops here."""
        if self._writer is not None:
            self._try(self._writer.close)
        self._writer = None

    def _write(self, step: float, summary: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), step=int(step), summary=summary)
        self._try(lambda: self._open().write_event(event))

    def _open(self) -> Any:
        if self._writer is None:
            # without the thread of SummaryWriter, which an error would end and which a full queue would then wait for
            from tensorboardX.event_file_writer import EventsWriter

            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}")
        return self._writer

    def _try(self, work: Callable[[], Any]) -> None:
        if self._has_failed:
            return
        try:
            work()
        except OSError as error:
            self._has_failed = True
            self._say(f"{self._folder}: {error.strerror or error}: the run goes on without event files of TensorBoard.")


def _widened(values: np.ndarray) -> tuple[float, float]:
    """The least and the largest value; around equal ones a narrow range, as bins need a width."""
    low, high = float(values.min()), float(values.max())
    margin = 0.0 if high > low else max(abs(low), 1.0) * 1e-3
    return low - margin, high + margin
