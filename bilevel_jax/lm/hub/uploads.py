"""Files pushed to a repository on the hub in one commit.

A pushed repository holds `bilevel_jax.json`, which says what was pushed and lists the files with their hashes. What it
does not list, or lists with another hash, is somebody's own, and so is all that was made from something else: it is not
overwritten unless that is asked for, and then its earlier state stays in the history of the repository.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bilevel_jax.lm.hub.downloads import quiet_unless_watched
from bilevel_jax.lm.hub.errors import LOG_IN, explain_errors, mark_explained, repository_url
from bilevel_jax.lm.hub.names import HubName

MANIFEST_FILE = "bilevel_jax.json"


class Pushed(NamedTuple):
    """What was pushed."""

    name: HubName
    """With the commit."""
    url: str
    is_private: bool


def push_files(
    kind: Literal["model", "dataset"],
    repository: str,
    files: Mapping[str, Path | bytes],
    *,
    made_by: str,
    source: Mapping[str, str],
    message: str,
    private: bool,
    replace: bool,
) -> Pushed:
    """Make one commit with some files, in a repository that is made if it is not there.

    Files of an earlier push that are not among the new ones are removed; what others have put there stays.

    Args:
        kind: of the repository.
        repository: owner/name.
        files: path in the repository -> content, or the file here that has it.
        made_by: program and version, for the list of files.
        source: what the files are made from, in words; files of a push from another source are those of others.
        message: of the commit.
        private: who may see a repository that is made; an existing one must be private. False: everybody may see it,
            unless an existing one is private.
        replace: overwrite files that no push of this source made.

    Returns:
        The name with the commit, and the page.

    Raises:
        PermissionError: nobody is logged in, or the token may not write there.
        FileExistsError: files of others would be overwritten.
        ValueError: the repository is public, and `private` is asked for.
        OSError: any other answer of the hub, in one sentence.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_repository_name(repository)
    name = HubName(kind, repository)
    api = HfApi()
    files = {**files, MANIFEST_FILE: _format_manifest(files, made_by, source)}
    with explain_errors(name, is_push=True), quiet_unless_watched():
        check_login(name)
        if not api.repo_exists(repository, repo_type=kind):
            _create(api, name, private)
        info = api.repo_info(repository, repo_type=kind)
        if private and not info.private:
            raise mark_explained(
                ValueError(
                    f"{repository_url(name)} is public, and a private repository is asked for, which is the default. "
                    "Make it private there, choose another name, or publish with --export.no-private."
                )
            )
        there = {file.path: file for file in api.list_repo_tree(repository, repo_type=kind, recursive=True)
                 if hasattr(file, "size") and hasattr(file, "blob_id")}  # fmt: skip
        own, other_source = _find_own(api, name, there, source)
        if other_source is not None and not replace:
            described = ", ".join(f"{key} {value}" for key, value in other_source.items()) or "not named"
            raise mark_explained(
                FileExistsError(
                    f"{repository_url(name)} holds what was made from something else ({described}): nothing is "
                    "overwritten. Choose another name, or set export.replace (the repository's history keeps what is "
                    "there)."
                )
            )
        foreign = sorted(path for path in files if path in there and path not in own)
        if foreign and not replace:
            raise mark_explained(
                FileExistsError(
                    f"{repository_url(name)} holds {', '.join(foreign[:5])}{' and more' if len(foreign) > 5 else ''}, "
                    "which no export of bilevel-jax made, or which was changed since: nothing is overwritten. Choose "
                    "another name, or set export.replace (the repository's history keeps what is there)."
                )
            )
        stale = sorted(own - set(files))
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
        operations += [CommitOperationDelete(path) for path in stale]
        commit = api.create_commit(
            repository, operations, repo_type=kind, commit_message=message, parent_commit=info.sha
        )
    return Pushed(name.with_commit(commit.oid), repository_url(name), bool(info.private))


def check_repository_name(repository: str) -> None:
    """Raise ValueError for what is no owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        is_valid = repository.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"{repository!r} is no name of a repository: it is owner/name, of letters, digits, '-', '_' and '.'."
        )


def check_login(name: HubName) -> None:
    """Raise an error where nobody is logged in, or offline."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise mark_explained(
            ConnectionError(f"{name.repo}: HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.")
        )
    if get_token() is None:
        raise mark_explained(PermissionError(f"{name.repo}: nobody is logged in, so nothing can be pushed: {LOG_IN}."))


def _create(api: Any, name: HubName, private: bool) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(name.repo, repo_type=name.kind, private=private)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise mark_explained(
            PermissionError(
                f"{name.repo}: the token may not make a repository there: {LOG_IN} with one that may write, and name "
                "an owner that is you or an organization of yours."
            )
        ) from None


def _find_own(
    api: Any, name: HubName, there: Mapping[str, Any], source: Mapping[str, str]
) -> tuple[set[str], Mapping[str, str] | None]:
    """(the files of a repository that an earlier push made and nobody has changed, its source if that is another)."""
    if MANIFEST_FILE not in there:
        return set(), None
    path = api.hf_hub_download(name.repo, MANIFEST_FILE, repo_type=name.kind)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        own = {MANIFEST_FILE} | {
            path
            for path, hashes in manifest["files"].items()
            if path in there and _read_hash(there[path]) in (hashes["sha256"], hashes["git"])
        }
        earlier = dict(manifest.get("source", {}))
        return own, None if earlier == dict(source) else earlier
    except (ValueError, KeyError, TypeError, AttributeError):
        return set(), None  # somebody's own file of this name


def _read_hash(file: Any) -> str:
    return file.lfs.sha256 if file.lfs is not None else file.blob_id


def _format_manifest(files: Mapping[str, Path | bytes], made_by: str, source: Mapping[str, str]) -> bytes:
    hashes = {path: _hash_file(content) for path, content in sorted(files.items())}
    document = {"made_by": made_by, "source": dict(source), "files": hashes}
    return (json.dumps(document, indent=1) + "\n").encode()


def _hash_file(content: Path | bytes) -> dict[str, str]:
    """As the hub names large files (SHA-256) and small ones (as git does)."""
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    large, small = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        while chunk := file.read(1 << 24):
            large.update(chunk)
            small.update(chunk)
    return {"sha256": large.hexdigest(), "git": small.hexdigest()}
