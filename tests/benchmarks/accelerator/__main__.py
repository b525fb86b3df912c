"""What this library costs on the accelerator that is here, in one command: a table, in the minutes that it is given.

    python -m tests.benchmarks.accelerator --minutes 8
    python -m tests.benchmarks.accelerator --small                       # tiny models, on a CPU, in minutes
    python -m tests.benchmarks.accelerator --only sweep replay --out out/h200

Nothing is downloaded: models are Llamas of 10, 100 and 1,000 million random weights, their texts random Markov chains.
What is measured is in the rows of --only; the README of tests/benchmarks says what each column means.

Cells are taken in the order of their importance, each in a process of its own on an accelerator, whose peak of memory
is that of a process. What a cell takes is predicted from those before it, and its memory by `bilevel-jax estimate`;
what does not fit is listed as not run, with the reason, and so is what runs out of memory. The folder holds

    results.jsonl   a line for each cell, on the disk as soon as it is measured
    table.md        the tables of all of them, written anew after each
    log.txt         what the processes print

so that a run that is killed keeps its rows. The same command with the same --out goes on where it stopped: cells that
were measured are kept, others tried again. A folder of another machine is refused.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bilevel_jax.runs.infra.journal import Journal
from bilevel_jax.runs.infra.run_dir import write_atomic
from tests.benchmarks.accelerator.cells import ROWS, Cell, Costs, list_cells
from tests.benchmarks.accelerator.table import Line, format_tables
from tests.benchmarks.accelerator.worker import Worker

RESULTS_FILE, TABLE_FILE, LOG_FILE = "results.jsonl", "table.md", "log.txt"
RESERVE_SECONDS = 5.0
"""Of the minutes: to end a process and to write the table."""
FIRST_RATE = 0.25
"""Share of the measured rate of float32 products that the first cell is taken to reach."""
PROGRAM_SECONDS = {"cpu": 10.0, "gpu": 8.0, "tpu": 8.0}
"""To compile a program, before it is known."""
START_SECONDS = {"cpu": 3.0, "gpu": 12.0, "tpu": 15.0}
"""To start a process with its device."""


class Stopped(Exception):
    """A signal asked for the end."""


class Run:
    """The cells of one folder: measures what is not there yet, and writes after each."""

    def __init__(self, folder: Path, minutes: float, small: bool, rows: Sequence[str]):
        self.folder, self.small, self.rows = folder, small, rows
        self.deadline = time.monotonic() + 60 * minutes - RESERVE_SECONDS
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder / RESULTS_FILE, fsync=True)
        self.lines: list[Line] = self.journal.read_new()
        self.worker: Worker | None = None

    def measure_all(self) -> None:
        """Measure the machine, and then cell after cell."""
        before = next((line for line in self.lines if line["row"] == "machine" and line["status"] == "measured"), None)
        machine = self.measure(Cell("machine", variant="small" if self.small else ""), None)
        if machine["status"] != "measured":
            raise SystemExit(f"the device could not be asked: {machine['why']} See {self.folder / LOG_FILE}.")
        values = machine["values"]
        if before and before["values"]["kind"] != values["kind"]:
            raise SystemExit(
                f"{self.folder} holds results of {before['values']['kind']}, and this is {values['kind']}: "
                "give another --out."
            )
        self.record(machine)
        platform = values["platform"]
        rate = FIRST_RATE * 1e12 * values["measured_tflops"]["highest"]
        costs = Costs(rate, PROGRAM_SECONDS.get(platform, 10.0), START_SECONDS.get(platform, 10.0))
        done = {line["name"] for line in self.lines if line["status"] == "measured"}
        for cell in list_cells(platform, self.small):
            if (self.rows and cell.row not in self.rows) or cell.name in done:
                continue
            self.try_cell(cell, platform, costs)

    def try_cell(self, cell: Cell, platform: str, costs: Costs) -> None:
        """Measure a cell if it fits into the time that is left, and record what came of it."""
        predicted, left = costs.predict(cell), self.deadline - time.monotonic()
        if predicted > left:
            why = f"time (predicted {predicted:.0f} s, {max(left, 0):.0f} s left)"
            self.record(_make_line(cell, {"status": "not run", "why": why}, 0.0, predicted))
            return
        line = self.measure(cell, predicted, fresh=platform != "cpu")
        if line["status"] == "measured":
            given = line["values"]
            costs.learn(cell, line["seconds"], given.get("working_seconds", 0), given.get("working_flops", 0))
        self.record(line)

    def measure(self, cell: Cell, predicted: float | None, *, fresh: bool = False) -> Line:
        """A cell's line; `fresh`: by a process of its own."""
        began = time.monotonic()
        platforms = "cpu" if cell.row == "bergson" else ""
        worker = self.worker
        if (
            fresh
            or worker is None
            or not worker.is_alive
            or (worker.flags, worker.platforms) != (cell.flags, platforms)
        ):
            self.stop_worker()
            self.worker = Worker(cell.flags, platforms, self.folder / LOG_FILE)
        assert self.worker is not None
        print(f"{cell.name} ...", end=" ", flush=True)
        answer = self.worker.measure(cell, self.deadline - began)
        if answer["status"] == "out of memory":
            self.stop_worker()  # what is left of it would be in the next one's way
        line = _make_line(cell, answer, time.monotonic() - began, predicted)
        print(f"{line['status']}{': ' + line['why'] if line['why'] else ''} ({line['seconds']:.0f} s)", flush=True)
        return line

    def record(self, line: Line) -> None:
        """Keep a line, on the disk and in the tables."""
        self.lines.append(line)
        self.journal.append(line)
        self.write_tables()

    def write_tables(self) -> None:
        """Write the tables of all lines."""
        try:
            tables = format_tables(self.lines)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            # a device may be lent for minutes: they are not lost for a table, which can be made of the lines later
            tables = f"The tables could not be made ({type(error).__name__}: {error}) of {RESULTS_FILE}.\n"
            print(tables, file=sys.stderr, flush=True)
        write_atomic(self.folder / TABLE_FILE, tables)

    def stop_worker(self) -> None:
        """End the process that measures."""
        if self.worker is not None:
            self.worker.stop()
            self.worker = None


def _make_line(cell: Cell, answer: Line, seconds: float, predicted: float | None) -> Line:
    return {
        "row": cell.row, "name": cell.name, "size": cell.size, "lora": cell.lora, "variant": cell.variant,
        "status": answer["status"], "why": answer.get("why", ""), "seconds": seconds, "predicted_seconds": predicted,
        "time": datetime.now().isoformat(timespec="seconds"), "values": answer.get("values", {}),
    }  # fmt: skip


def _raise_stopped(number: int, frame: Any) -> None:
    raise Stopped(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows of --only:\n" + "\n".join(f"  {name:<12}{what}" for name, what in ROWS.items()),
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it has ended (default 8)")
    parser.add_argument("--small", action="store_true", help="tiny models: to try the command, on a CPU")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=[], metavar="ROW", help="rows; default all")
    parser.add_argument("--out", type=Path, help="folder; default out/accelerator_DATE_TIME")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}: give a positive number.")
    folder = options.out or Path("out") / f"accelerator_{datetime.now():%Y%m%d_%H%M%S}"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)
    with tempfile.TemporaryDirectory() as cache:
        # the programs of `estimate` and of the runs are the same, and so are those of several cells
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        run = Run(folder, options.minutes, options.small, options.only)
        try:
            run.measure_all()
        except Stopped as stopped:
            run.write_tables()
            print(f"\n{stopped}: what was measured is in {folder}; the same command with --out {folder} goes on.")
            return 143
        finally:
            run.stop_worker()
    print(f"\n{format_tables(run.lines)}\nin {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
