"""What is a URL, what it may hold, and which library reads it."""

import builtins

import pytest

from bilevel_jax.storage import urls


@pytest.mark.parametrize(
    ("path", "is_url", "is_remote"),
    [
        ("s3://bucket/run", True, True),
        ("gs://bucket/run", True, True),
        ("memory://run", True, True),
        ("file:///data/run", True, False),
        ("/data/run", False, False),
        ("out/run", False, False),
        ("hub:name@split", False, False),
        ("builtin:cipher?copies=2", False, False),
        ("C:/data", False, False),
        (None, False, False),
    ],
)
def test_a_url_is_told_from_a_path(path, is_url, is_remote):
    assert (urls.is_url(path), bool(path and urls.is_remote(path))) == (is_url, is_remote)


@pytest.mark.parametrize(
    ("url", "secret", "words"),
    [
        ("s3://AKIA123:hush@bucket/run", "hush", "AWS_ACCESS_KEY_ID"),
        ("gs://hush@bucket/run", "hush", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("s3://AKIA123:hush/K7M@bucket/run", "hush", "AWS_ACCESS_KEY_ID"),
        ("s3://AKIA123:12/hush@bucket/run@train", "hush", "AWS_ACCESS_KEY_ID"),
        ("s3://AKIA123:hush?K7M@bucket/run", "hush", "AWS_ACCESS_KEY_ID"),
        ("s3://AKIA123:hush#K7M@bucket/run", "hush", "AWS_ACCESS_KEY_ID"),
        ("s3://[AKIA123:hush@bucket/run", "hush", "AWS_ACCESS_KEY_ID"),
        ("https://host/rows.jsonl?X-Amz-Signature=hush", "hush", "query"),
    ],
)
def test_a_url_with_credentials_is_refused_and_not_quoted(url, secret, words):
    with pytest.raises(ValueError, match=words) as error:
        urls.open_filesystem(url)
    assert secret not in str(error.value)


@pytest.mark.parametrize("url", ["s3://bucket/rows@train", "https://host:8080/rows@train", "s3://bucket/a:b/rows"])
def test_a_split_and_a_port_are_no_credentials(url):
    urls.check_url(url)


@pytest.mark.parametrize("url", ["s3://bucket/run/../../x", "memory://run/./x"])
def test_a_url_that_leads_out_of_its_folder_is_refused(url):
    with pytest.raises(ValueError, match=r"a part of this URL is \. or \.\."):
        urls.open_filesystem(url)


@pytest.mark.parametrize(("url", "extra"), [("s3://bucket/run", "s3"), ("gs://bucket/run", "gcs")])
def test_a_library_that_is_not_installed_is_named_with_its_extra(url, extra, monkeypatch):
    def refuse(protocol, **_):
        raise ImportError(f"Install the library of {protocol}")

    monkeypatch.setattr(urls.fsspec, "filesystem", refuse)
    urls._make_filesystem.cache_clear()
    with pytest.raises(ValueError, match=rf"pip install 'bilevel-jax\[{extra}\]'"):
        urls.open_filesystem(url)
    urls._make_filesystem.cache_clear()


def test_a_protocol_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match="s4:// is not known"):
        urls.open_filesystem("s4://bucket/run")


def test_a_file_on_another_machine_is_refused():
    with pytest.raises(ValueError, match="three slashes"):
        urls.strip_file_protocol("file://data/rows.jsonl")


def test_the_package_needs_none_of_the_libraries(monkeypatch):
    def refuse(name, *rest, **more):
        assert name.partition(".")[0] not in ("s3fs", "gcsfs", "botocore", "aiobotocore"), name
        return load(name, *rest, **more)

    load = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert urls.open_filesystem("memory://run")[1] == "/run"
