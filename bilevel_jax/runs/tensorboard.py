"""The numbers of a run as event files of TensorBoard."""

import importlib.util
import re
from collections.abc import Mapping
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

    A run that is resumed adds a file. Steps that it takes again stand twice, with the same numbers.
    """

    FLUSH_SECONDS = 10
    """Until what was written is in the file, at most."""

    def __init__(self, folder: Path):
        self._folder, self._writer = folder, None

    def add_scalars(self, numbers: Mapping[str, list[tuple[float, float]]]) -> None:
        """(step, value) of each name."""
        for name, points in numbers.items():
            for step, value in points:
                self._open().add_scalar(name, value, int(step))

    def add_histogram(self, name: str, step: int, values: np.ndarray) -> None:
        """How often values are how large, in `BINS` equal bins between the least and the largest finite one."""
        finite = values[np.isfinite(values)]
        if finite.size:
            self._open().add_histogram(name, finite, step, bins=np.linspace(*_widened(finite), BINS + 1))

    def flush(self) -> None:
        """Have all of it in the file."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """The run has ended, or stops here."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        if self._writer is None:
            import tensorboardX  # here, as it is an extra

            self._writer = tensorboardX.SummaryWriter(str(self._folder), flush_secs=self.FLUSH_SECONDS)
        return self._writer


def _widened(values: np.ndarray) -> tuple[float, float]:
    """The least and the largest value; around equal ones a narrow range, as bins need a width."""
    low, high = float(values.min()), float(values.max())
    margin = 0.0 if high > low else max(abs(low), 1.0) * 1e-3
    return low - margin, high + margin
