"""Names of models and data sets on the Hugging Face hub.

    a model             OWNER/NAME[@REVISION], also as hub:OWNER/NAME[@REVISION] and hf://OWNER/NAME[@REVISION]
    a data set          hub:OWNER/NAME[@REVISION][:CONFIG]@SPLIT
    one of its files    hf://datasets/OWNER/NAME[@REVISION]/PATH

A revision is a branch, a tag or a commit; without one it is the default branch. A name whose revision is a whole commit
hash says which bytes it means, today and later: `with_commit` makes it of any other.
"""

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

PREFIX, URL_PREFIX, DATASET_URL_PREFIX = "hub:", "hf://", "hf://datasets/"
DATASET_FORM = f"{PREFIX}name@split, with a configuration {PREFIX}name:config@split, of a revision of it "
DATASET_FORM += f"{PREFIX}name@revision:config@split"
REPO = r"[A-Za-z0-9][\w.-]*"


class HubName(NamedTuple):
    """What a name says."""

    kind: Literal["model", "dataset"]
    repo: str
    """owner/name."""
    revision: str = ""
    """Branch, tag or commit; empty: the default branch."""
    config: str = ""
    split: str = ""
    file: str = ""
    """Path of one file in the data set."""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, so that the name means the same bytes at any time."""
        return re.fullmatch("[0-9a-f]{40}", self.revision) is not None

    @property
    def noun(self) -> str:
        """What it is, in words."""
        return "model" if self.kind == "model" else "data set"

    def with_commit(self, commit: str) -> "HubName":
        """The same of one commit."""
        return self._replace(revision=commit)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        if self.file:
            return f"{DATASET_URL_PREFIX}{self.repo}{revision.replace('/', '%2F')}/{self.file}"
        config = f":{self.config}" if self.config else ""
        split = f"@{self.split}" if self.split else ""
        return f"{PREFIX}{self.repo}{revision}{config}{split}"


def parse_model_name(text: str | os.PathLike[str]) -> HubName | None:
    """The name on the hub that stands where a folder of a model may stand; None for a path.

    owner/name without a prefix is a path where there is such a file or folder, or a folder `owner`.

    Raises:
        ValueError: behind a prefix stands no name of a model.

    Example:
        >>> parse_model_name("karpathy/tinyllamas@main").revision, parse_model_name("out/run/model")
        ('main', None)
    """
    text = os.fspath(text)
    rest = text.removeprefix(PREFIX).removeprefix(URL_PREFIX)
    # `Path` makes one slash of two
    rest = rest.removeprefix("hf:/") if text.startswith("hf:/") else rest
    has_prefix = rest != text
    match = re.fullmatch(rf"({REPO}(?:/{REPO})?)(?:@([^\s@:]+))?", rest)
    if has_prefix:
        if not match or rest.startswith("datasets/"):
            raise ValueError(
                f"{text}: a model on the hub is written owner/name or owner/name@revision, with or without "
                f"{PREFIX} or {URL_PREFIX} before it."
            )
        return HubName("model", match[1], match[2] or "")
    if not match or "/" not in match[1] or "//" in text:
        return None
    if os.path.lexists(text) or Path(text).parts[0] == text or os.path.isdir(Path(text).parts[0]):
        return None
    return HubName("model", match[1], match[2] or "")


def parse_dataset_name(path: str) -> HubName | None:
    """The name on the hub that a path of data is; None for any other path.

    Raises:
        ValueError: behind hub: or hf:// stands no name of a data set.

    Example:
        >>> str(parse_dataset_name("hub:openai/gsm8k@v1:main@train[:9]"))
        'hub:openai/gsm8k@v1:main@train[:9]'
    """
    if path.startswith(PREFIX):
        match = re.fullmatch(rf"hub:({REPO}(?:/{REPO})?)(?:@([^\s:@]+))?(?::([^:@]+))?@(.+)", path)
        if not match or "@" in match[4]:
            raise ValueError(f"{path}: a hub data set is written {DATASET_FORM}.")
        repo, revision, config, split = match.groups()
        return HubName("dataset", repo, revision or "", config or "", split)
    if path.startswith(URL_PREFIX):
        match = re.fullmatch(rf"{DATASET_URL_PREFIX}({REPO}/{REPO})(?:@(refs/[^/]+/[^/@]+|[^/@]+))?/(.+)", path)
        if not match or ".." in match[3].split("/"):
            raise ValueError(
                f"{path}: a file of a hub data set is written {DATASET_URL_PREFIX}owner/name/file.jsonl, or "
                f"{DATASET_URL_PREFIX}owner/name@revision/file.jsonl; all of a split, {PREFIX}owner/name@split."
            )
        return HubName("dataset", match[1], (match[2] or "").replace("%2F", "/"), file=match[3])
    return None
