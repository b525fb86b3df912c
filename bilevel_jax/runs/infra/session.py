"""A running command, its log, progress, signals and finished jobs."""

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from bilevel_jax.runs import tensorboard
from bilevel_jax.runs.config.load import check_same_config, config_to_yaml
from bilevel_jax.runs.infra import distributed, identity, inputs, run_dir, seals
from bilevel_jax.runs.infra.journal import JsonLog, list_numbers
from bilevel_jax.runs.infra.progress import PROGRESS_FILE, ProgressFile, make_progress_bar
from bilevel_jax.runs.terminal import make_console
from bilevel_jax.storage import copies, lease, objects, urls
from bilevel_jax.storage.objects import StorageError

SYNC_SECONDS = 1.0
"""Seconds, about, between two meetings of several processes about signals and saves."""
FINISHED_JOBS_FILE = "done.json"
SHARED_MARK = ".shared"
"""An empty file beside the folder of a run that is published at a URL: who sees it, sees the folder."""
EXPECTED_USAGE_JOB = "expected"
"""The finished job that a run begins with; no work."""
START_FILES = (
    run_dir.CONFIG_FILE, identity.ENVIRONMENT_FILE, identity.TOKENS_FILE, inputs.INPUTS_FILE, run_dir.LOCK_FILE,
    inputs.HUB_FILE, seals.SEALS_FILE,
)  # fmt: skip
"""What a run writes before it works."""

_start_signal = 0
"""The signal that came before the session was open."""


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT); it has saved, and `--resume` goes on."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}; everything is saved. Go on with --resume.")


class Session:
    """A run in progress. `advance` counts work; `run_once` remembers the results of finished jobs across a resume."""

    def __init__(self, folder: Path, log: JsonLog, bar: Progress, save_seconds: float, *, has_events: bool = False):
        self.folder: Path = folder
        self.log: JsonLog | EventLog | PartLog = log
        self.has_events = has_events
        """Whether the run writes event files of TensorBoard."""
        self._bar, self._task = bar, bar.add_task("starting", total=None)
        self._progress_file = ProgressFile(folder / PROGRESS_FILE) if distributed.is_first_process() else None
        self._save_seconds, self._last_save = save_seconds, time.monotonic()
        self._received_signal = _start_signal
        self._agreed_signal = 0
        """The signal that all processes have agreed on; without others the one that came."""
        self._calls_per_sync, self._calls_since_sync, self._last_sync = 1, 0, time.monotonic()
        self._finished_jobs_path = folder / "checkpoints" / FINISHED_JOBS_FILE
        self._finished_jobs: dict[str, Any] = distributed.share_from_first(self._read_finished_jobs())
        self.work_done, self._restored_work = 0.0, 0.0
        self._counted_jobs: set[str] = set()
        """Those whose work is in `work_done`."""
        self._open_jobs: list[list[str]] = []
        """Of each job that is being computed those that were counted within it, from the outermost."""

    def _read_finished_jobs(self) -> dict[str, Any]:
        jobs: dict[str, Any] = {}

        def read() -> None:
            if self._finished_jobs_path.exists():
                jobs.update(run_dir.read_json(self._finished_jobs_path))

        distributed.run_on_first_process(read)  # whose error is that of all
        return jobs

    def set_phase(self, description: str, total: float | None = None) -> None:
        """Name what is being done; `total` is the work of the whole run, in training steps."""
        self._bar.update(self._task, description=description, total=total)  # None leaves the total as it is
        self._write_progress()

    def advance(self, amount: float = 1.0) -> None:
        """Count work, in training steps (a forward and a backward pass)."""
        self.work_done += amount
        self._bar.update(self._task, completed=self.work_done)
        self._write_progress()

    def restore_work(self, amount: float) -> None:
        """Count work that an earlier process of this run did: it says nothing of the speed of this one."""
        self._restored_work += amount
        self.advance(amount)

    def _write_progress(self) -> None:
        if self._progress_file is not None:
            task = self._bar.tasks[self._task]
            self._progress_file.update(task.description, self.work_done, task.total, self._restored_work)

    def close(self) -> None:
        """The run has ended, or stops here."""
        try:
            self.log.close()
        finally:
            if self._progress_file is not None:
                self._progress_file.remove()

    def print_line(self, line: str) -> None:
        """One line for the person who watches."""
        if distributed.is_first_process():
            _print_line(self._bar.console, line)

    def write_histogram(self, name: str, step: int, fetch: Callable[[], np.ndarray]) -> None:
        """A histogram for TensorBoard, where it is on; `fetch`, which all processes then call, gives the values."""
        if self.has_events:
            self.log.write_histogram(name, step, fetch())

    def should_save(self) -> bool:
        """Whether to save now: a signal came, or the last save is long ago."""
        return self._sync_signals() or bool(self._agreed_signal)

    def mark_saved(self) -> None:
        """Note a save, and stop if a signal asked for it."""
        self.log.sync()
        self._last_save = time.monotonic()
        if not distributed.is_multiprocess():
            self._agreed_signal = self._received_signal
        self._stop_if_agreed()

    def check_signals(self, *, at_once: bool = False) -> None:
        """Stop here if a signal asked for it; for work that is cheaper to repeat than to save.

        With `at_once` several processes meet at this very call. Inside `distributed.run_on_first_process` only the
        first is there, and stops by its own signal: its caller has all of them call this `at_once` afterwards.
        """
        if distributed.is_alone_at_work():
            if self._received_signal:
                raise Interrupted(self._received_signal)
            return
        self._sync_signals(at_once)
        self._stop_if_agreed()

    def _stop_if_agreed(self) -> None:
        if self._agreed_signal:
            distributed.agree_to_stop()
            raise Interrupted(self._agreed_signal)

    def _sync_signals(self, at_once: bool = False) -> bool:
        """Whether the last save is long ago, by the first process's clock; takes note of a signal to any of them.

        Several processes meet about once a second, always at the same call: between two meetings nothing is asked.
        """
        save_due = time.monotonic() - self._last_save > self._save_seconds
        if not distributed.is_multiprocess():
            self._agreed_signal = self._received_signal
            return save_due
        self._calls_since_sync += 1
        if not at_once and self._calls_since_sync < self._calls_per_sync:
            return False
        now = time.monotonic()
        calls_per_sync = max(
            1, min(10_000, int(self._calls_since_sync * SYNC_SECONDS / max(now - self._last_sync, 1e-3)))
        )
        all_values = distributed.allgather_values([self._received_signal, save_due, calls_per_sync])
        self._agreed_signal, self._calls_per_sync, self._calls_since_sync, self._last_sync = (
            int(all_values[:, 0].max()),
            int(all_values[0, 2]),
            0,
            now,
        )
        return bool(all_values[0, 1])

    def run_once(self, key: str, compute: Callable[[], Any], is_kept: bool = True) -> Any:
        """The JSON value of a job: computed now, or read if an earlier run of this folder finished it.

        A job that wrote a file, too, is done again where the file is not kept. Of several processes all compute; the
        first one says whether it is done, and its value is that of all. The work of a job counts once, also where a
        later job asks for it again, or another that it was within is read.
        """
        if not distributed.broadcast_from_first(key in self._finished_jobs and is_kept):
            work_before, start_time = self.work_done, time.monotonic()
            self._open_jobs.append([])
            try:
                value = distributed.share_from_first(compute())
            finally:
                inner = self._open_jobs.pop()
            job = {"value": value, "work": self.work_done - work_before, "seconds": time.monotonic() - start_time}
            self._finished_jobs[key] = job | ({"inner": inner} if inner else {})
            run_dir.write_atomic(self._finished_jobs_path, seals.format_json(self._finished_jobs))
            self.check_signals()
        else:
            inner = self._finished_jobs[key].get("inner", [])
            if key not in self._counted_jobs:
                self.restore_work(self._finished_jobs[key]["work"])
        if self._open_jobs:
            self._open_jobs[-1] += [name for name in (key, *inner) if name not in self._counted_jobs]
        self._counted_jobs |= {key, *inner}
        return self._finished_jobs[key]["value"]

    def job_cost(self, prefix: str) -> tuple[float, float]:
        """(training steps, seconds) of the finished jobs whose key begins with `prefix`."""
        jobs = [job for key, job in self._finished_jobs.items() if key.startswith(prefix)]
        return sum(job["work"] for job in jobs), sum(job["seconds"] for job in jobs)

    def part_session(self, name: str) -> "Session":
        """The same run seen from a part of it: own checkpoints, its name in the log and in the bar, silent otherwise.

        Work, signals and saves are those of the whole; finished jobs are remembered by the whole alone.
        """
        return PartSession(self, name)

    def handle_signal(self, number: int, frame: Any) -> None:
        """The signal handler: finish the step, save, then raise `Interrupted`. A second signal stops at once."""
        if self._received_signal:
            objects.stop_trying()
            raise KeyboardInterrupt
        self._received_signal = number
        self.print_line(f"{signal.Signals(number).name}: finishing the step, then saving")


class PartSession(Session):
    """The session of a part of a run; see `Session.part_session`."""

    def __init__(self, parent: Session, name: str):
        self.folder, self.log = parent.folder / "parts" / name, PartLog(parent.log, name)
        self.has_events = parent.has_events
        self._parent, self._name = parent, name
        checkpoints = self.folder / "checkpoints"
        distributed.run_on_first_process(lambda: checkpoints.mkdir(parents=True, exist_ok=True))

    @property
    def work_done(self) -> float:  # type: ignore[override]
        """Of the whole."""
        return self._parent.work_done

    def set_phase(self, description: str, total: float | None = None) -> None:
        """As of the whole, with the part's name."""
        self._parent.set_phase(f"{self._name}: {description}")

    def advance(self, amount: float = 1.0) -> None:
        """Counts for the whole."""
        self._parent.advance(amount)

    def restore_work(self, amount: float) -> None:
        """Counts for the whole."""
        self._parent.restore_work(amount)

    def print_line(self, line: str) -> None:
        """Nothing: the log has it."""

    def should_save(self) -> bool:
        """As of the whole."""
        return self._parent.should_save()

    def mark_saved(self) -> None:
        """As of the whole."""
        self._parent.mark_saved()

    def check_signals(self, *, at_once: bool = False) -> None:
        """As of the whole."""
        self._parent.check_signals(at_once=at_once)


class EventLog:
    """A log whose numbers are also written as event files of TensorBoard, by the first process."""

    def __init__(self, log: JsonLog, folder: Path, say: Callable[[str], None]):
        self._log, self._folder = log, folder
        self._events = tensorboard.EventWriter(folder, say=say) if distributed.is_first_process() else None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; its numbers have the tag PART/EVENT/NAME."""
        self._log.write(record)
        if self._events is not None:
            place = [str(record[key]) for key in ("part", "event") if key in record]
            numbers: dict[str, list[tuple[float, float]]] = {}
            for name, step, value in list_numbers(record):
                numbers.setdefault(tensorboard.make_tag(*place, name), []).append((step, value))
            self._events.add_scalars(numbers)

    def write_histogram(self, name: str, step: int, values: np.ndarray) -> None:
        """A histogram; the log has none."""
        if self._events is not None:
            self._events.add_histogram(tensorboard.make_tag(name), step, values)

    def sync(self) -> None:
        """Put the log on the disk."""
        self._log.sync()
        if self._events is not None:
            self._events.flush()
            self._publish()

    def close(self) -> None:
        """Put all of it on the disk."""
        self._log.close()
        if self._events is not None:
            self._events.close()
            self._publish()

    def _publish(self) -> None:
        for file in sorted(self._folder.glob("*")):
            copies.publish_later(file)


class PartLog:
    """A log whose records say which part of the run wrote them."""

    def __init__(self, log: "JsonLog | EventLog | PartLog", name: str):
        self._log, self._name = log, name

    def write(self, record: dict[str, Any]) -> None:
        """Append one record with the part's name."""
        self._log.write({"part": self._name, **record})

    def write_histogram(self, name: str, step: int, values: np.ndarray) -> None:
        """As of the whole, with the part's name."""
        self._log.write_histogram(f"{self._name}/{name}", step, values)

    def sync(self) -> None:
        """Put the log on the disk, and note how far it goes."""
        self._log.sync()

    def close(self) -> None:
        """The whole closes it."""


@contextlib.contextmanager
def open_run_dir(config: Any) -> Iterator[Path]:
    """The folder of a command's run, locked: made new, or, to resume, that of a run with the same config and files.

    From here on a signal is noticed, and config.yaml is there: a run that is stopped while it prepares its data and
    model, or that meets a full disk, is resumed as any other. One that fails otherwise before it has done any work
    leaves no folder behind. One that comes to its end is sealed by manifest.json; nothing in its folder is written
    after that.

    Raises FileExistsError for a folder that holds a run, RuntimeError for one in use, ValueError for another config or
    other data, or another model, and for a file of the run, or of another run that it reads, that is not as it was
    written; and `Interrupted` for a signal before the session is open.
    """
    recorded = inputs.name_by_urls(config)
    if distributed.is_multiprocess():
        distributed.require_agreement("the run", identity.list_shared_values(recorded))
    if config.output.tensorboard:
        tensorboard.check_installed()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_catch_signals_at_start())
        stack.enter_context(copies.shown_errors())
        copy, folder = _choose_folder(config.output.dir, stack)
        existing = [path for path in (folder, *folder.parents) if path.exists()]
        is_new = False

        def claim_folder() -> None:
            nonlocal is_new
            inputs.check_inputs_whole(config)
            if copy is not None:
                _claim_url(copy, config.output.resume, stack)
            run_dir.create_run_dir(folder, config.output.resume)
            stack.enter_context(run_dir.lock_run_dir(folder))
            is_new = not config.output.resume
            stack.callback(seals.release, folder)
            run_dir.sweep_leftovers(folder)
            if config.output.resume:
                run_dir.check_files(folder)
                check_same_config(recorded, folder / run_dir.CONFIG_FILE)
                inputs.check_inputs_unchanged(config, folder)
                if changes := identity.check_environment(config, folder):
                    _print_line(
                        make_console(stderr=True),
                        f"resumed with what changes no number beyond rounding: {'; '.join(changes)}",
                    )
                seals.hold(folder)
            else:
                seals.begin(folder)
                inputs.record_hub_names(config, folder)
                run_dir.write_atomic(folder / run_dir.CONFIG_FILE, config_to_yaml(recorded))

        try:
            distributed.run_on_first_process(claim_folder)
            yield folder
            distributed.run_on_first_process(lambda: run_dir.write_manifest(folder))
        except Exception as error:
            disk_full = run_dir.disk_full_error(folder, error) is not None
            is_resumable = (disk_full and (folder / run_dir.CONFIG_FILE).is_file()) or isinstance(error, Interrupted)
            if is_new and not is_resumable:  # new in the first process alone, which writes
                _remove_failed_start(folder, existing)
                if copy is not None and not folder.exists() and not isinstance(error, StorageError):
                    copy.remove_all()
                if disk_full:
                    text = f"the disk is full: {folder} holds no run yet. Free space, then start it again."
                    raise OSError(text) from error
            raise


def _choose_folder(url: str, stack: contextlib.ExitStack) -> tuple[copies.WorkingCopy | None, Path]:
    """(what publishes the run's folder, where it is at a URL, in the first process; the folder of this machine)."""
    if not urls.is_remote(url):
        return None, Path(urls.strip_file_protocol(url))
    copy = None

    def make_folder() -> str:
        nonlocal copy
        copy = copies.WorkingCopy(url)
        copy.root.with_name(SHARED_MARK).touch()
        return str(copy.root)

    root = Path(distributed.share_text("the folder of the run", make_folder))
    is_seen = distributed.allgather_values([root.with_name(SHARED_MARK).is_file()])[:, 0]
    if not is_seen.all():
        distributed.agree_to_stop()
        raise ValueError(
            f"output.dir = {url}: a run works in a folder before it is published, and process {int(is_seen.argmin())} "
            f"does not see {root.parent} of process 0. Set TMPDIR to a folder that all of them see."
        )
    if copy is None:
        stack.enter_context(copies.follow(root, url))
    return copy, root


def _claim_url(copy: copies.WorkingCopy, resume: bool, stack: contextlib.ExitStack) -> None:
    """Hold the URL of a run until the stack is left, and have what it has of the run on this machine."""
    run_dir.check_run_names(copy.url, copy.list_names(), resume)
    console = make_console(stderr=True)
    owner = stack.enter_context(lease.hold(copy.store, lambda text: _print_line(console, text)))
    run_dir.check_run_names(copy.url, copy.list_names(), resume)  # again: the one who held it may have written
    stack.callback(copy.close)
    if resume:
        copy.download(owner, run_dir.find_unfinished)
    copy.open(owner)


@contextlib.contextmanager
def _catch_signals_at_start() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `Interrupted`, until the session opens and lets the step that is made end first."""

    def handle_signal(number: int, frame: Any) -> None:
        global _start_signal
        if _start_signal:
            objects.stop_trying()
            raise KeyboardInterrupt
        _start_signal = number  # a library may pass over the exception: the session asks, too
        raise Interrupted(number)

    global _start_signal
    _start_signal = 0
    objects.try_again()
    with _signal_handler(handle_signal):
        try:
            yield
        finally:
            _start_signal = 0


@contextlib.contextmanager
def _signal_handler(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Have `handler` take SIGTERM and SIGINT; Python lets the main thread alone do so, others stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old_handlers = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old_handler in old_handlers.items():
            signal.signal(number, old_handler)


def _remove_failed_start(folder: Path, existing: list[Path]) -> None:
    """Remove the folder of a run that failed before it had done any work, and its parents that were made for it.

    What is not known to be of no worth stays, and the folder with it.
    """

    def is_worthless(path: Path) -> bool:
        name = path.relative_to(folder).parts[0]
        if name in START_FILES or name == run_dir.INPUT_FOLDER or path.stat().st_size == 0:
            return True
        if path == folder / "checkpoints" / FINISHED_JOBS_FILE:
            return set(json.loads(path.read_text("utf-8"))) <= {EXPECTED_USAGE_JOB}
        return False

    if not all(map(is_worthless, (path for path in folder.rglob("*") if not path.is_dir()))):
        return
    for entry in folder.iterdir():
        if entry.name != run_dir.LOCK_FILE:  # last, so that no other run takes the folder in between
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (folder / run_dir.LOCK_FILE).unlink(missing_ok=True)
    for path in (folder, *folder.parents):
        if path in existing or any(path.iterdir()):
            break
        path.rmdir()


@contextlib.contextmanager
def start_session(config: Any, folder: Path) -> Iterator[Session]:
    """Write the environment and the input files of the run, and open its session."""
    output = config.output
    if output.resume:
        distributed.run_on_first_process(lambda: run_dir.reopen_run(folder))
    distributed.run_on_first_process(lambda: identity.record_environment(folder))
    distributed.run_on_first_process(lambda: inputs.record_inputs(config, folder))
    with open_session(
        folder, progress=output.progress, save_seconds=60 * output.save_minutes, has_events=output.tensorboard
    ) as run_session:
        for record in inputs.read_hub_records(folder):
            run_session.print_line(f"{record.key}: {record.asked} is read as {record.name}")
        yield run_session


@contextlib.contextmanager
def open_session(folder: Path, *, progress: bool, save_seconds: float, has_events: bool = False) -> Iterator[Session]:
    """Open a run: catch signals, show the bar; close all of it whatever happens."""
    distributed.run_on_first_process(lambda: (folder / "checkpoints").mkdir(exist_ok=True))
    bar = make_progress_bar(progress and distributed.is_first_process())
    log: Any = JsonLog(folder / seals.LOG_FILE)
    if has_events:
        log = EventLog(log, folder / tensorboard.FOLDER, say=partial(_print_line, bar.console))
    run_session = Session(folder, log, bar, save_seconds, has_events=has_events)
    distributed.wait_for_all_processes()  # all have read which jobs are finished, before one notes another
    try:
        with _signal_handler(run_session.handle_signal), bar:
            yield run_session
    finally:
        run_session.close()


def _print_line(console: Any, line: str) -> None:
    console.print(copies.show(line), markup=False, highlight=False, soft_wrap=True)
