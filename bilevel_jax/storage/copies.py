"""Local copies of files and folders that lie behind URLs."""

import atexit
import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bilevel_jax.storage import lease, urls
from bilevel_jax.storage.objects import ObjectStore, StorageError, open_store, status_of, try_again

JOURNAL_SECONDS = 10.0
"""Seconds after which a line of a journal is on the server, at most."""
CONFIG_FILE = "config.yaml"
"""What tells the folder of a run from others that have a manifest."""
RUN_MARKS = ("manifest.json", "seals.jsonl")
"""What the folder of a run holds, and what its files are checked by."""
WORK_FOLDERS = ("checkpoints", "parts")
"""Folders of a run that only the run itself reads."""

_working_copies: dict[Path, "WorkingCopy"] = {}
"""The folders of this machine that are published elsewhere."""
_followed: set[Path] = set()
"""The folders of this machine that another process publishes."""
_fetched: dict[str, Path] = {}
"""URL -> the copy that was made of it."""
_shown_places: dict[str, str] = {}
"""Folder of this machine -> the URL that stands for it in what people read."""


class WorkingCopy:
    """A folder of this machine in which a run works, and whose files are published below a URL.

    A file is published when it has its name, whole: the server sees the writes in the order in which the disk sees
    them, so a run that is killed leaves there what it would leave on a disk. Of a folder that counts once a manifest is
    in it, the manifest is published last. Journals, which grow line by line, are published whole within
    JOURNAL_SECONDS, and before any other file, which may rely on their lines.
    """

    def __init__(self, url: str):
        self.url, self.store = url.rstrip("/"), ObjectStore(url)
        self.root = make_local_folder(self.url)
        self._lease: lease.Lease | None = None
        self._journals: set[Path] = set()
        self._journals_lock = threading.Lock()  # short: who appends a line waits for no upload
        self._order, self._ended = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._publish_journals_often, name="journals", daemon=True)

    def open(self, owner: lease.Lease) -> None:
        """Publish from here on what is written in the folder, as the one who holds the URL."""
        self._lease = owner
        _working_copies[self.root] = self
        self._thread.start()

    def close(self) -> None:
        """Publish what is left of the journals; what is written later stays on this machine, until the program ends."""
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()
        try:
            if self._lease is not None:
                self.publish_journals()
        finally:
            self._lease = None
            _working_copies.pop(self.root, None)
            _fetched[self.url] = self.root

    def list_names(self) -> list[str]:
        """The names in the folder on the server, but for those of the lock."""
        return [name for name in self.store.list_names() if not lease.LOCK_NAME.fullmatch(name)]

    def download(self, owner: lease.Lease, find_unfinished: Callable[[Iterable[str]], set[str]]) -> None:
        """Make the folder hold what the server has; what has not been finished is removed there, by its owner."""
        names = {name for name in self.store.list_all() if not lease.LOCK_NAME.fullmatch(name)}
        unfinished = find_unfinished(names)
        self.store.remove(unfinished, owner.check)
        self.store.download_all({name: self.root / name for name in names - unfinished})

    def publish(self, path: Path) -> None:
        """Have the server hold what a file holds now."""
        with self._order:
            self.publish_journals()
            self._upload(path)

    def publish_folder(self, folder: Path, last: str = "") -> None:
        """Have the server hold what a folder holds now, the file `last` after the others, and nothing else there."""
        name = self._name(folder)
        files = {f"{name}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}
        final = files.pop(f"{name}/{last}", None) if last else None
        self.publish_journals()
        self.store.upload_all(files, self._check)
        if final is not None:
            self.store.upload(final, f"{name}/{last}", self._check)
        self.store.remove(set(self.store.list_all(name)) - {*files, f"{name}/{last}"}, self._check)

    def publish_later(self, journal: Path) -> None:
        """Have the server hold a journal within JOURNAL_SECONDS, and before any other file that is published."""
        with self._journals_lock:
            self._journals.add(journal)

    def publish_journals(self) -> None:
        """Have the server hold all lines of all journals."""
        with self._order:
            with self._journals_lock:
                journals, self._journals = self._journals, set()
            try:
                for journal in sorted(journals):
                    if journal.is_file():
                        self._upload(journal)
            except BaseException:
                with self._journals_lock:
                    self._journals |= journals
                raise

    def remove(self, path: Path) -> None:
        """Remove a file from the server."""
        with self._order:
            with self._journals_lock:
                self._journals.discard(path)
            self.publish_journals()
            self.store.remove([self._name(path)], self._check)

    def remove_folder(self, folder: Path, first: str = "") -> None:
        """Remove a folder from the server; the file `first`, without which it does not count, before the others."""
        with self._journals_lock:
            self._journals = {journal for journal in self._journals if not journal.is_relative_to(folder)}
        self.publish_journals()
        names = list(self.store.list_all(self._name(folder)))
        head = [name for name in names if first and name.rpartition("/")[2] == first]
        self.store.remove(head, self._check)
        self.store.remove(set(names) - set(head), self._check)

    def remove_all(self) -> None:
        """Remove the folder from the server, the lock aside."""
        names = [name for name in self.store.list_all() if not lease.LOCK_NAME.fullmatch(name)]
        self.store.remove(names, self._check)

    def _upload(self, path: Path) -> None:
        self.store.upload(path, self._name(path), self._check)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _check(self) -> None:
        if self._lease is None:
            raise RuntimeError(f"{self.url} is not held by this process, which would write to it.")
        self._lease.check()

    def _publish_journals_often(self) -> None:
        while not self._ended.wait(JOURNAL_SECONDS):
            with contextlib.suppress(OSError, RuntimeError):  # the next write says it, where the work is
                self.publish_journals()


# ---- what is written on this machine, and where it is published


def find_working_copy(path: Path) -> tuple[WorkingCopy, Path] | None:
    """(the working copy in which a path lies, the path by the name that it has there); None for any other path."""
    if not _working_copies:
        return None
    absolute = Path(os.path.abspath(path))
    return next(((copy, absolute) for root, copy in _working_copies.items() if absolute.is_relative_to(root)), None)


@contextlib.contextmanager
def follow(root: Path, url: str) -> Iterator[None]:
    """Inside, another process publishes a folder of this machine at a URL."""
    _followed.add(root)
    _shown_places[str(root)] = url
    try:
        yield
    finally:
        _followed.discard(root)
        _fetched[url.rstrip("/")] = root


def is_published(path: Path) -> bool:
    """Whether a path lies in a folder that this or another process publishes."""
    absolute = Path(os.path.abspath(path))
    return any(absolute.is_relative_to(root) for root in {*_working_copies, *_followed})


def publish(path: Path) -> None:
    """Publish a file that now has its name; nothing where it lies in no working copy."""
    if found := find_working_copy(path):
        found[0].publish(found[1])


def publish_folder(folder: Path, last: str = "") -> None:
    """As `publish`, all files of a folder, and `last` after the others."""
    if found := find_working_copy(folder):
        found[0].publish_folder(found[1], last)


def publish_later(journal: Path) -> None:
    """As `publish`, of a file that grows line by line: soon, and not for every line."""
    if found := find_working_copy(journal):
        found[0].publish_later(found[1])


def remove(path: Path) -> None:
    """Remove a file where it was published."""
    if found := find_working_copy(path):
        found[0].remove(found[1])


def remove_folder(folder: Path, first: str = "") -> None:
    """As `remove`, a folder."""
    if found := find_working_copy(folder):
        found[0].remove_folder(found[1], first)


# ---- input


def local_path(path: str) -> Path:
    """The path of this machine under which a file or a folder can be read: of a URL a copy, made once.

    Of a file in the folder of a run, what the run's files are checked by is copied, too; of such a folder itself all
    but checkpoints.

    Raises:
        FileNotFoundError: where there is nothing at the URL.
        StorageError: where the server does not give it.
    """
    if not urls.is_url(path):
        return Path(path)
    if not urls.is_remote(path):
        return Path(urls.strip_file_protocol(path))
    url = path.rstrip("/")
    if url not in _fetched:
        _fetched[url] = _fetch(url)
    return _fetched[url]


def copy_if_url(value: Any) -> Any:
    """The path of a copy, of a URL; any other value as it is."""
    return str(local_path(value)) if urls.is_url(value) else value


def check_free(url: str) -> None:
    """Raise FileExistsError where something lies at a URL."""
    if names := open_store(url.rstrip("/")).list_names():
        raise FileExistsError(
            f"{url} is there already ({names[0]}), and is never overwritten: choose another with --out."
        )


def publish_new_folder(folder: Path, url: str, last: str) -> None:
    """Write what a finished folder of this machine holds to a URL, the file `last` after the others."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    final, store = files.pop(last), open_store(url.rstrip("/"))
    store.upload_all(files)
    store.upload(final, last)


def forget_copies() -> None:
    """Have `local_path` make its copies anew: what lies at a URL may be another file by now."""
    _fetched.clear()
    open_store.cache_clear()  # a server that was away may be there again
    try_again()


def _fetch(url: str) -> Path:
    is_bucket = "/" not in url.partition("://")[2]  # a whole one, which lies in nothing
    parent_url, name = (url, "") if is_bucket else url.rpartition("/")[::2]
    parent_store, store = open_store(parent_url), open_store(url)
    run_url = _find_run_url(url)
    place = make_local_folder(run_url or parent_url)
    place.mkdir()
    root = place / url.removeprefix(run_url).lstrip("/") if run_url else place / name
    if run_url and run_url != url:
        run = open_store(run_url)
        run.download_all({mark: place / mark for mark in RUN_MARKS if _is_seen(run, mark)})
    if not is_bucket and run_url != url and parent_store.exists(name):
        parent_store.download(name, root)
        return root
    files = store.list_all()
    if not files:
        raise FileNotFoundError(f"{url}: there is nothing of this name.")
    is_run = run_url == url
    store.download_all(
        {
            file: root / file
            for file in files
            if not lease.LOCK_NAME.fullmatch(file) and not (is_run and file.partition("/")[0] in WORK_FOLDERS)
        }
    )
    return root


def _find_run_url(url: str) -> str:
    """The URL of the run in whose folder a URL lies, or which it is; "" for none."""
    start = url.index("://") + 3
    parts = url[start:].split("/")
    for length in range(len(parts), 0, -1):
        candidate = url[:start] + "/".join(parts[:length])
        store = open_store(candidate)
        if _is_seen(store, CONFIG_FILE) and any(_is_seen(store, mark) for mark in RUN_MARKS):
            return candidate
    return ""


def _is_seen(store: ObjectStore, name: str) -> bool:
    """Whether there is an object; a server that lists nothing for this user answers 403 where there is none."""
    try:
        return store.exists(name)
    except StorageError as error:
        if status_of(error) == 403 or isinstance(error.__cause__, PermissionError):
            return False
        raise


def make_local_folder(url: str) -> Path:
    """A folder of this machine, to be made, for a copy of what lies at a URL; it is removed when the program ends."""
    parent = Path(tempfile.mkdtemp(prefix="bilevel-jax-")).resolve()
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = parent / urls.last_name(url)
    _shown_places[str(folder)] = url
    return folder


# ---- what people read


def show(text: str) -> str:
    """A text with the URL in place of each folder of this machine that holds a copy of it."""
    for folder, url in _shown_places.items():
        text = text.replace(folder, url)
    return text


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    """Inside, an error names URLs and not the copies of this machine."""
    try:
        yield
    except BaseException as error:
        error.args = tuple(show(part) if isinstance(part, str) else part for part in error.args)
        if isinstance(error, OSError) and isinstance(error.filename, str):
            error.filename = show(error.filename)
        raise
