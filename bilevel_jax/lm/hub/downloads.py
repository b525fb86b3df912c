"""Commits and files of repositories on the hub, or in its cache.

All of it goes through huggingface_hub, which keeps what it fetched (HF_HOME), logs in (HF_TOKEN), asks another server
(HF_ENDPOINT) and, with HF_HUB_OFFLINE=1, reads its cache alone. No code of a repository is run: of a model
config.json, tokenizer and safetensors files are fetched, and nothing else.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bilevel_jax.lm.checkpoint.files import CONFIG_FILE, UNCHANGED_FILES
from bilevel_jax.lm.hub.errors import explain_errors
from bilevel_jax.lm.hub.names import HubName, parse_model_name

ADAPTER_CONFIG_FILE = "adapter_config.json"
CONFIG_FILES = (CONFIG_FILE, ADAPTER_CONFIG_FILE)
SMALL_FILES = (*CONFIG_FILES, *UNCHANGED_FILES)
"""All that is read of a model but its numbers."""
ALL_FILES = (*SMALL_FILES, "model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors*")

_commits: dict[tuple[str, str, str], str] = {}
"""(kind, repository, revision) -> commit, asked once in a process: what it reads later is what it read first."""
_folders: dict[tuple[str, str, tuple[str, ...]], Path] = {}


def find_model_files(folder: str | os.PathLike[str], files: tuple[str, ...] = ALL_FILES) -> Path:
    """The folder here with some files of a model, fetched first where a name on the hub is given.

    Args:
        folder: a folder, or a name as `parse_model_name` reads it.
        files: patterns of the names of the files that are needed.

    Returns:
        `folder` itself, or the folder of the commit in the hub's cache.

    Raises:
        OSError: with one sentence, see `explain_errors`.
    """
    name = parse_model_name(folder)
    if name is None:
        return Path(folder)
    commit = resolve_commit(name)
    key = (name.repo, commit, files)
    if key not in _folders:
        import huggingface_hub

        with explain_errors(name), quiet_unless_watched():
            _folders[key] = Path(
                huggingface_hub.snapshot_download(name.repo, revision=commit, allow_patterns=list(files))
            )
    return _folders[key]


def find_dataset_file(name: HubName) -> Path:
    """The file here that a name of a file in a data set means."""
    import huggingface_hub

    commit = resolve_commit(name)
    with explain_errors(name), quiet_unless_watched():
        return Path(huggingface_hub.hf_hub_download(name.repo, name.file, repo_type="dataset", revision=commit))


def resolve_commit(name: HubName) -> str:
    """The commit hash that the revision of a name means: asked once, so that all of a process reads one commit.

    Offline it is the one that the cache knows by the revision, and also, with a warning, where the hub does not answer.
    """
    if name.is_pinned:
        return name.revision
    key = (name.kind, name.repo, name.revision)
    if key not in _commits:
        with explain_errors(name), quiet_unless_watched():
            _commits[key] = _ask_commit(name)
    return _commits[key]


def keep_commit(name: HubName, commit: str) -> None:
    """Have the revision of a name mean a commit in this process."""
    _commits[name.kind, name.repo, name.revision] = commit


def _ask_commit(name: HubName) -> str:
    """What the hub says, or, where it cannot be asked, the cache."""
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    def find_cached(is_offline: bool) -> str:
        """The commit in the cache's folder of a revision, which is brought there unless `is_offline`."""
        files = CONFIG_FILES if name.kind == "model" else ("README.md",)
        folder = snapshot_download(
            name.repo, repo_type=name.kind, revision=revision, allow_patterns=list(files), local_files_only=is_offline
        )
        return Path(folder).name

    revision = name.revision or None
    if constants.HF_HUB_OFFLINE:
        return find_cached(is_offline=True)
    try:
        info = HfApi().repo_info(
            name.repo, repo_type=name.kind, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except errors.RevisionNotFoundError:
        raise
    except Exception as error:
        try:
            commit = find_cached(is_offline=True)
        except OSError:
            raise error from None  # the hub's answer says more than that nothing is here
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"status {status}" if status else type(error).__name__
        warnings.warn(
            f"{name}: the hub did not answer ({reason}); the cache's commit {commit} is read, which may be an old one.",
            stacklevel=2,
        )
        return commit
    find_cached(is_offline=False)  # so that the cache knows the revision when the hub cannot be asked
    return str(info.sha)


NOISY_LOGGERS = (
    "huggingface_hub._snapshot_download", "huggingface_hub.utils._http", "datasets.load",
    "datasets.packaged_modules.cache.cache",
)  # fmt: skip
"""Of messages that say in other words, or by several lines, what `explain_errors` says in one sentence."""


@contextlib.contextmanager
def quiet_unless_watched() -> Iterator[None]:
    """Progress bars of downloads where somebody sees them, and no log messages."""
    from huggingface_hub import utils

    datasets: Any = sys.modules.get("datasets")  # which takes a second to import, and no model needs
    bars = [module for module in (utils, datasets) if module and not module.are_progress_bars_disabled()]
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for module in bars if not sys.stderr.isatty() else ():
            module.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module in bars:
            module.enable_progress_bars()
