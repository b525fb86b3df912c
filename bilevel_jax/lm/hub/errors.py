"""Errors of the hub in one sentence; never with a token."""

import contextlib
import difflib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from bilevel_jax.lm.hub.names import HubName

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Numbers of errors of the operating system, which has words for them."""
LOG_IN = "log in (`hf auth login`, or HF_TOKEN)"


@contextlib.contextmanager
def explain_errors(name: HubName, *, is_push: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub, datasets and the network raise into a FileNotFoundError, OSError or ValueError.

    Args:
        name: what was asked for.
        is_push: whether something is written, and not read.

    Raises:
        PermissionError: gated, or a token that is not accepted.
        FileNotFoundError: no such repository, revision or file, or none that may be seen.
        ConnectionError: no network, or offline and not in the cache.
        OSError: any other answer of the hub.
        ValueError: a data set that only code of its own can read.
    """
    try:
        yield
    except Exception as error:
        is_of_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        if type(error).__module__.startswith("bilevel_jax") or _is_explained(error) or is_of_disk:
            raise
        found = _find_error(name, error, is_push)
        raise mark_explained(type(found)(redact(str(found)))) from None


def redact(text: str) -> str:
    """A text without what a URL or a header in it may hold of secrets: the token, names and passwords, queries."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "***")
    text = re.sub(r"(?i)(bearer) +[^\s'\"]+", r"\1 ***", text)
    text = re.sub(r"(?<=://)[^/\s'\"?#]*@", "", text)
    return re.sub(r"(://[^\s'\"<>?]*)\?[^\s'\"<>]*", r"\1?***", text)


def _is_explained(error: Exception) -> bool:
    return getattr(error, "is_explained", False)


def mark_explained(error: Exception) -> Exception:
    """The error, which `explain_errors` lets pass as it is."""
    error.is_explained = True  # type: ignore[attr-defined]
    return error


def _find_error(name: HubName, error: Exception, is_push: bool) -> Exception:
    """The error to raise for what a library raised."""
    from huggingface_hub import constants, errors, get_token

    causes = list(_list_causes(error))

    def find(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if any("Dataset scripts are no longer supported" in str(cause) for cause in causes):
        return ValueError(
            f"{name}: this data set is read by a program of its own ({name.repo.split('/')[-1]}.py), and code from "
            "the hub is never run. Name its files (hf://datasets/owner/name/file.parquet), or the copy that the hub "
            f"makes: {name._replace(revision='refs/convert/parquet')}."
        )
    if find(errors.GatedRepoError):
        return PermissionError(
            f"{name}: the {name.noun} is gated: accept its terms at {repository_url(name)}, then {LOG_IN}."
        )
    if find(errors.RevisionNotFoundError):
        hint = _suggest_revisions(name)
        return FileNotFoundError(
            f"{name}: {name.repo} is on the hub and has no revision {name.revision!r}. {hint}Name a branch, a tag or a "
            "commit hash that is there."
        )
    if find(errors.RepositoryNotFoundError):
        private = (
            "if it is private, ask for access for the account of your token"
            if get_token() is not None
            else f"{LOG_IN} if it is private"
        )
        return FileNotFoundError(
            f"{name}: no {name.noun} {name.repo} on the hub{_describe_path(name)}. {_suggest_names(name)}Look at its "
            f"spelling, or {private}."
        )
    entry = find(errors.EntryNotFoundError)
    if entry is not None and not isinstance(entry, errors.LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{name}: {name.repo} is on the hub and has no such file{_suggest_files(name)}. Name one of its files."
        )
    if constants.HF_HUB_OFFLINE:
        return ConnectionError(
            f"{name}: not in the cache ({_cache_folder()}){_describe_path(name)}, and HF_HUB_OFFLINE forbids to ask "
            "the hub. Run once with a network, or copy the cache to this machine."
        )
    status = getattr(getattr(find(errors.HfHubHTTPError), "response", None), "status_code", None)
    if status in (401, 403):
        return PermissionError(
            f"{name}: the hub does not accept the token (status {status}): {LOG_IN} with one that may use {name.repo}."
        )
    if status == 429:
        return OSError(f"{name}: the hub answers that there were too many requests (429). {LOG_IN.capitalize()}, or "
                       "wait some minutes.")  # fmt: skip
    if status == 412:
        return OSError(f"{name}: somebody else pushed at the same time, and nothing was overwritten. Push again.")
    if status is not None:
        return OSError(f"{name}: the hub answered with status {status}. Try again later; see {repository_url(name)}.")
    if find(ConnectionError, TimeoutError, errors.LocalEntryNotFoundError) or any(
        type(cause).__name__ in NETWORK_ERRORS for cause in causes
    ):
        if is_push:
            return ConnectionError(
                f"{name}: the hub at {_endpoint()} cannot be reached, so nothing was pushed. Look at the network and "
                "HF_ENDPOINT."
            )
        return ConnectionError(
            f"{name}: not in the cache ({_cache_folder()}){_describe_path(name)}, and the hub at {_endpoint()} cannot "
            "be reached. Look at the network and HF_ENDPOINT, or fetch it where there is one and copy the cache."
        )
    text = redact(" ".join(str(error).split()))[:300].rstrip(".")  # before the cut, which may leave half a secret
    action = "pushed" if is_push else "read"
    return ValueError(f"{name}: the {name.noun} cannot be {action} ({type(error).__name__}: {text}).")


NETWORK_ERRORS = (
    "ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "ProxyError", "NetworkError",
    "PoolTimeout", "WriteError", "IncompleteSnapshotError",
)  # fmt: skip
"""Classes of the HTTP libraries that huggingface_hub has used."""


def repository_url(name: HubName) -> str:
    """The page of a repository."""
    return f"{_endpoint()}/{'datasets/' if name.kind == 'dataset' else ''}{name.repo}"


def _endpoint() -> str:
    from huggingface_hub import constants

    return redact(constants.ENDPOINT)


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _describe_path(name: HubName) -> str:
    """That a name without a prefix is no folder here."""
    return ", and no folder of this name here" if name.kind == "model" else ""


def _suggest_names(name: HubName) -> str:
    """A sentence on the nearest repositories of the same owner; empty where there is none, or they cannot be asked."""
    from huggingface_hub import HfApi

    owner = name.repo.split("/")[0]
    with contextlib.suppress(Exception):
        api = HfApi()
        listed = api.list_models if name.kind == "model" else api.list_datasets
        found = [one.id for one in listed(author=owner, limit=200)]
        if near := difflib.get_close_matches(name.repo, found, n=3, cutoff=0.6):
            return f"Nearest: {', '.join(near)}. "
        other = "dataset" if name.kind == "model" else "model"
        if api.repo_exists(name.repo, repo_type=other):
            return f"There is a {'data set' if other == 'dataset' else other} of this name. "
    return ""


def _suggest_revisions(name: HubName) -> str:
    """A sentence on the branches and tags; empty where they cannot be asked."""
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):
        refs = HfApi().list_repo_refs(name.repo, repo_type=name.kind)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        near = difflib.get_close_matches(name.revision, names, n=3, cutoff=0.5) or names[:5]
        return f"Branches and tags: {', '.join(near)}. "
    return ""


def _suggest_files(name: HubName) -> str:
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):
        files = HfApi().list_repo_files(name.repo, revision=name.revision or None, repo_type=name.kind)
        near = difflib.get_close_matches(name.file, files, n=3, cutoff=0.5) or files[:5]
        return f"; nearest: {', '.join(near)}"
    return ""
