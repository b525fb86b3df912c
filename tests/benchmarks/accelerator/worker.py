"""Processes that measure cells: one for each on an accelerator, whose peak of memory is that of a process."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from tests.benchmarks.accelerator.cells import Cell

ROOT = Path(__file__).resolve().parents[3]
MEMORY_SHARE = "0.9"
"""Of a GPU's memory, for XLA; its own default is .75. A variable that is set already stays."""


class Worker:
    """A process that measures one cell after another, until it is stopped or dies."""

    def __init__(self, flags: str, platforms: str, log: Path):
        environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        if platforms:
            environment["JAX_PLATFORMS"] = platforms
        self.flags, self.platforms = flags, platforms
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.accelerator.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True,
            )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """The cell's `status`, `why` and `values`; it is stopped where it takes longer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(cell) + "\n")
            self.process.stdin.flush()
            line = self._answers.get(timeout=max(0.0, seconds))
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            self.stop()
            return {"status": "not run", "why": f"time (stopped after {seconds:.0f} s)", "values": {}}
        if line:
            return json.loads(line)
        code = self.process.wait()
        why = f"its process ended with code {code}"
        if code == -9:
            return {"status": "out of memory", "why": f"{why}: the system killed it, most likely for memory"}
        return {"status": "failed", "why": f"{why}; see the log", "values": {}}

    @property
    def is_alive(self) -> bool:
        """Whether it can measure another cell."""
        return self.process.poll() is None

    def stop(self) -> None:
        """End it, so that its memory is free."""
        if self.is_alive:
            self.process.kill()
        self.process.wait()
        self._reader.join(5)
        if self._reader.is_alive():  # another process has the pipe, too
            return
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what nobody has read
                pipe.close()


def answer(cell: Cell) -> dict[str, Any]:
    """What came of a cell: measured, not run, out of memory, or failed."""
    from tests.benchmarks.accelerator import measure

    try:
        return {"status": "measured", "why": "", "values": measure.measure(cell)}
    except measure.NotRun as reason:
        return {"status": "not run", "why": str(reason), "values": {}}
    except Exception as error:  # noqa: BLE001 - a cell's failure is a line of the table
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        traceback.print_exc()  # to the log
        is_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        return {"status": "out of memory" if is_memory else "failed", "why": text, "values": {}}


def _serve() -> None:
    """Read cells, write answers; what libraries print goes to the log. Ends with the process that started it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    cells: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            cells.put(line)
        os._exit(1)  # the other end is gone, and nobody waits for what is measured

    threading.Thread(target=read, daemon=True).start()
    while True:
        print(json.dumps(answer(Cell(*json.loads(cells.get())))), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
