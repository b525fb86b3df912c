"""What every verb needs while it works: its folder and log, a progress bar with an ETA, and a way to stop and go on."""

import contextlib
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bilevel_jax.runs import config as configs
from bilevel_jax.runs import files, inputs, processes

DISTRIBUTED = ("select", "train")
"""The verbs that several processes can run."""
PERIOD = 1.0
"""Seconds, about, between two meetings of several processes about signals and saves."""


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT); it has saved, and `--resume` goes on."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}; everything is saved. Go on with --resume.")


class Session:
    """A run at work. `advance` counts work and notices signals; `once` remembers finished jobs across a resume."""

    def __init__(self, folder: Path, log: files.JsonLog, bar: Progress, save_seconds: float):
        self.folder: Path = folder
        self.log: files.JsonLog | Marked = log
        self._bar, self._task = bar, bar.add_task("starting", total=None)
        self._save_seconds, self._saved = save_seconds, time.monotonic()
        self._signal = 0
        self._asked = 0
        """The signal that all processes have agreed on; without others the one that came."""
        self._wait, self._calls, self._met = 1, 0, time.monotonic()
        self._done_path = folder / "checkpoints" / "done.json"
        self._done: dict[str, Any] = json.loads(self._done_path.read_text()) if self._done_path.exists() else {}
        self.work = 0.0

    def phase(self, words: str, total: float | None = None) -> None:
        """Name what is being done; `total` is the work of the whole run, in training steps."""
        self._bar.update(self._task, description=words, total=total)  # None leaves the total as it is

    def advance(self, amount: float = 1.0) -> None:
        """Count work, in training steps (a forward and a backward pass)."""
        self.work += amount
        self._bar.update(self._task, completed=self.work)

    def say(self, line: str) -> None:
        """One line for the person who watches."""
        if processes.first():
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def due(self) -> bool:
        """Whether to save now: a signal came, or the last save is long ago."""
        return self._agree() or bool(self._asked)

    def saved(self) -> None:
        """Note a save, and stop if a signal asked for it."""
        self._saved = time.monotonic()
        if not processes.several():
            self._asked = self._signal
        if self._asked:
            raise Interrupted(self._asked)

    def check(self) -> None:
        """Stop here if a signal asked for it; for work that is cheaper to repeat than to save."""
        self._agree()
        if self._asked:
            raise Interrupted(self._asked)

    def _agree(self) -> bool:
        """Whether the last save is long ago, by the first process's clock; takes note of a signal to any of them.

        Several processes meet about once a second, always at the same call: between two meetings nothing is asked.
        """
        late = time.monotonic() - self._saved > self._save_seconds
        if not processes.several():
            self._asked = self._signal
            return late
        self._calls += 1
        if self._calls < self._wait:
            return False
        now = time.monotonic()
        pace = max(1, min(10_000, int(self._calls * PERIOD / max(now - self._met, 1e-3))))
        said = processes.table([self._signal, late, pace])
        self._asked, self._wait, self._calls, self._met = int(said[:, 0].max()), int(said[0, 2]), 0, now
        return bool(said[0, 1])

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The JSON value of a job, made now or, if a run before this one finished it, remembered."""
        if key not in self._done:
            before, started = self.work, time.monotonic()
            value = make()
            self._done[key] = {"value": value, "work": self.work - before, "seconds": time.monotonic() - started}
            files.write_atomic(self._done_path, json.dumps(self._done))
            self.check()
        else:
            self.advance(self._done[key]["work"])
        return self._done[key]["value"]

    def cost(self, prefix: str) -> tuple[float, float]:
        """(training steps, seconds) of the finished jobs whose key begins with `prefix`."""
        jobs = [job for key, job in self._done.items() if key.startswith(prefix)]
        return sum(job["work"] for job in jobs), sum(job["seconds"] for job in jobs)

    def within(self, name: str) -> "Session":
        """The same run seen from a part of it: own checkpoints, its name in the log and in the bar, silent otherwise.

        Work, signals and saves are those of the whole; finished jobs are remembered by the whole alone.
        """
        return Part(self, name)

    def stop(self, number: int, frame: Any) -> None:
        """The signal handler: finish the step, save, then raise `Interrupted`. A second signal stops at once."""
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
        self.say(f"{signal.Signals(number).name}: finishing the step, then saving")


class Part(Session):
    """See `Session.within`."""

    def __init__(self, whole: Session, name: str):
        self.folder, self.log = whole.folder / "parts" / name, Marked(whole.log, name)
        self._whole, self._name = whole, name
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)

    @property
    def work(self) -> float:  # type: ignore[override]
        """Of the whole."""
        return self._whole.work

    def phase(self, words: str, total: float | None = None) -> None:
        """As of the whole, with the part's name."""
        self._whole.phase(f"{self._name}: {words}")

    def advance(self, amount: float = 1.0) -> None:
        """Counts for the whole."""
        self._whole.advance(amount)

    def say(self, line: str) -> None:
        """Nothing: the log has it."""

    def due(self) -> bool:
        """As of the whole."""
        return self._whole.due()

    def saved(self) -> None:
        """As of the whole."""
        self._whole.saved()

    def check(self) -> None:
        """As of the whole."""
        self._whole.check()


class Marked:
    """A log whose records say which part of the run wrote them."""

    def __init__(self, log: "files.JsonLog | Marked", name: str):
        self._log, self._name = log, name

    def write(self, record: dict[str, Any]) -> None:
        """Append one record with the part's name."""
        self._log.write({"part": self._name, **record})

    def close(self) -> None:
        """The whole closes it."""


@contextlib.contextmanager
def run_folder(config: Any) -> Iterator[Path]:
    """The folder of a verb's run, locked: made new, or, to resume, that of a run with the same config and files.

    Raises FileExistsError for a folder that holds a run, RuntimeError for one in use, ValueError for another config or
    other data, or another model.
    """
    verb, folder = configs.VERBS[type(config)], Path(config.output.dir)
    if processes.several() and verb not in DISTRIBUTED:
        raise ValueError(
            f"{verb} runs in one process, on all devices of one machine; in several there are {', '.join(DISTRIBUTED)}."
        )
    with contextlib.ExitStack() as held:

        def take() -> None:
            files.new_run_folder(folder, config.output.resume)
            held.enter_context(files.lock(folder))
            if config.output.resume:
                configs.refuse_another(config, folder / files.RESOLVED)
                inputs.refuse_changed(config, folder)

        processes.by_first(take)
        yield folder


@contextlib.contextmanager
def started(config: Any, folder: Path) -> Iterator[Session]:
    """Write what the run was told and where it runs, and open it."""
    output = config.output
    files.write_atomic(folder / files.RESOLVED, configs.resolved(config))
    files.write_atomic(folder / "environment.json", json.dumps(environment(), indent=1))
    processes.by_first(lambda: inputs.record(config, folder))
    with session(folder, progress=output.progress, save_seconds=60 * output.save_minutes) as work:
        yield work


@contextlib.contextmanager
def session(folder: Path, *, progress: bool, save_seconds: float) -> Iterator[Session]:
    """Open a run: catch signals, show the bar; close all of it whatever happens."""
    processes.by_first(lambda: (folder / "checkpoints").mkdir(exist_ok=True))
    bar = progress_bar(progress and processes.first())
    log = files.JsonLog(folder / "log.jsonl", None)
    work = Session(folder, log, bar, save_seconds)
    before = {number: signal.signal(number, work.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with bar:
            yield work
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        log.close()


def progress_bar(shown: bool) -> Progress:
    """A bar with the time that is left, gone when its work is done."""
    console = Console(stderr=True, force_jupyter=False)  # a notebook gets lines, too, not an HTML box for each
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
        console=console, disable=not shown, transient=True,
    )  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, devices and commit: what another person needs to see the same numbers."""
    packages = (
        "bilevel-jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
        "datasets",
        "numpy",
    )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "commit": commit.stdout.strip() or None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
