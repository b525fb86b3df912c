"""URLs of files and folders, and the file systems that read them."""

import functools
import re
import urllib.parse
from pathlib import Path
from typing import Any

import fsspec
import fsspec.core

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra of this package that installs what reads it."""
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or the role of the machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud auth, or the service account of the machine",
}
"""Extra's protocol -> where its library looks for credentials."""
_URL = re.compile(r"(?!hf://)[A-Za-z][A-Za-z0-9+.-]*://")
"""A name on the Hugging Face hub (hf://) is none: it is read by its commit, in bilevel_jax/lm/hub."""
_PORT = re.compile(r"^[A-Za-z0-9.-]*:[0-9]{1,5}(?=/)")
"""Host and port at the beginning of what stands behind ://, where a bucket has no port; an @ behind names a split."""


def is_url(path: Any) -> bool:
    """Whether a string is a URL, such as s3://bucket/folder, rather than a path of this machine.

    Example:
        >>> is_url("s3://bucket/run"), is_url("out/run"), is_url("hub:name@split")
        (True, False, False)
    """
    return isinstance(path, str) and _URL.match(path) is not None


def is_remote(path: Any) -> bool:
    """Whether a string is a URL of something that is not a file of this machine."""
    return is_url(path) and not path.lower().startswith("file://")


def strip_file_protocol(path: str) -> str:
    """The path that a file:// URL names; any other string as it is.

    Example:
        >>> strip_file_protocol("file:///data/a%20b.jsonl"), strip_file_protocol("a.jsonl")
        ('/data/a b.jsonl', 'a.jsonl')
    """
    if not path.lower().startswith("file://"):
        return path
    check_url(path)
    parts = urllib.parse.urlsplit(path)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{path}: a file on the machine {parts.netloc!r}. Write file:///FOLDER, with three slashes.")
    return urllib.parse.unquote(parts.path)


def check_url(url: str) -> None:
    """Raise ValueError for a URL that holds credentials, which a config and a log would store; it is not quoted.

    A key may have a slash, so the text before the last @ is looked at, too, and not the host alone. Raises ValueError
    also for a path that leads out of its folder.
    """
    protocol, _, rest = url.partition("://")
    before, _, behind = rest.rpartition("@")
    if ":" in (before if protocol.lower() in EXTRAS else _PORT.sub("", before)) or "@" in re.split("[/?#]", rest)[0]:
        raise ValueError(
            f"{protocol}://{behind}: a user or a key stands before the @ of this URL, and a run stores its config. "
            "Take it out, and give credentials where the library looks for them: "
            f"{_describe_credentials(protocol.lower())}."
        )
    parts = urllib.parse.urlsplit(url)
    place = f"{protocol}://{parts.netloc}{parts.path}"
    if parts.query:
        raise ValueError(
            f"{place}: a query stands behind the ? of this URL, which may hold a signature or a key, and a run stores "
            "its config. Take it out, or download the file."
        )
    if {".", ".."} & set(parts.path.split("/")):
        raise ValueError(f"{place}: a part of this URL is . or .., which leads out of its folder. Write it without.")


def _describe_credentials(protocol: str) -> str:
    for known, text in CREDENTIALS.items():
        if EXTRAS.get(protocol) == EXTRAS[known]:
            return text
    return "its environment variables or its configuration file"


def credentials_hint(url: str) -> str:
    """Where the library that reads a URL looks for credentials."""
    return _describe_credentials(urllib.parse.urlsplit(url).scheme)


def open_filesystem(url: str) -> tuple[Any, str]:
    """(the fsspec file system of a URL, the URL's path in it). Nothing is asked of the server yet.

    Endpoints and credentials come from the environment, as the library reads it: for S3 AWS_ENDPOINT_URL, AWS_PROFILE
    and so on.

    Raises:
        ValueError: for a protocol that is not known, credentials in the URL, and a library that is not installed.
    """
    check_url(url)
    protocol = url.partition("://")[0].lower()
    try:
        filesystem = _make_filesystem(protocol)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install 'bilevel-jax[{extra}]'" if extra else "Install it"
        text = f"{url}: reading {protocol}:// needs a library that is not here ({error}). {remedy}."
        raise ValueError(text) from None
    except ValueError:
        raise ValueError(
            f"{url}: the protocol {protocol}:// is not known. Use s3://, gs://, file:// or a path of this machine."
        ) from None
    return filesystem, filesystem._strip_protocol(url)


@functools.cache
def _make_filesystem(protocol: str) -> Any:
    options: dict[str, Any] = {"use_listings_cache": False}
    if EXTRAS.get(protocol) == "s3":
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}  # objects.py retries, and says so
    filesystem = fsspec.filesystem(protocol, **options)
    if EXTRAS.get(protocol) == "s3":
        filesystem.retries = 1
    return filesystem


def split_dataset_url(url: str) -> tuple[str, str]:
    """(the URL of a folder of `datasets`, "@" and the split that is asked for, or "").

    Example:
        >>> split_dataset_url("s3://bucket/rows@train"), split_dataset_url("s3://bucket/rows@2.jsonl")
        (('s3://bucket/rows', '@train'), ('s3://bucket/rows@2.jsonl', ''))
    """
    match = re.fullmatch(r"(.*)(@[^@./]+)", url)
    return (match[1], match[2]) if match else (url, "")


def join_url(url: str, name: str) -> str:
    """The URL of a name below another URL; "" is the URL itself.

    Example:
        >>> join_url("s3://bucket/run/", "model/config.json")
        's3://bucket/run/model/config.json'
    """
    return f"{url.rstrip('/')}/{name}" if name else url.rstrip("/")


def last_name(url: str) -> str:
    """The last part of a URL's path, which may be that of a local copy."""
    return Path(urllib.parse.urlsplit(url).path.rstrip("/")).name or urllib.parse.urlsplit(url).netloc or "copy"
