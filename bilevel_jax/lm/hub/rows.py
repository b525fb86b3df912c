"""Rows of a data set on the hub, of one commit."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bilevel_jax.lm.hub.downloads import quiet_unless_watched, resolve_commit
from bilevel_jax.lm.hub.errors import explain_errors, mark_explained
from bilevel_jax.lm.hub.names import HubName


def read_dataset_rows(name: HubName, *, streaming: bool) -> Iterator[Any]:
    """The rows of a split, of the commit that the name means and of no other.

    `datasets` by itself reads any version that it finds in its cache where the hub cannot be reached, and a folder here
    that has the name; both are looked at and refused.

    Args:
        name: with a split; of `datasets`, so that slices such as train[:9] are known where nothing is streamed.
        streaming: whether rows are read over the network as they are asked for, in place of fetching all files first.

    Raises:
        OSError: with one sentence, see `explain_errors`.
        ValueError: no such configuration or split; files that `datasets` cannot read.
    """
    import datasets  # noqa: F401 (before its progress bars are turned off)

    commit = resolve_commit(name)
    pinned = name.with_commit(commit)
    with explain_errors(pinned), quiet_unless_watched():
        builder = _open_cached(pinned) or _open_on_hub(pinned)
        if not streaming:
            builder.download_and_prepare()
        _check_split(pinned, builder)
        rows = (builder.as_streaming_dataset if streaming else builder.as_dataset)(split=name.split)
    with explain_errors(pinned):
        yield from rows


def _open_on_hub(name: HubName) -> Any:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    if os.path.isdir(name.repo):
        raise mark_explained(
            ValueError(
                f"{name}: a folder {name.repo} is here, which `datasets` would read in its place. Name its files, or "
                "start in another folder."
            )
        )
    _check_config(name)
    builder = datasets.load_dataset_builder(name.repo, name.config or None, revision=name.revision)
    if builder.hash != name.revision or isinstance(builder, Cache):
        raise ConnectionError("another commit or configuration is in the cache")
    return builder


def _open_cached(name: HubName) -> Any:
    """The data set as `datasets` stored it from this very commit; None where it did not."""
    from datasets.packaged_modules.cache.cache import Cache

    config = name.config or _default_config(name)
    builder: Any = Cache(repo_id=name.repo, dataset_name=name.repo.split("/")[-1], config_name=config,
                         version="0.0.0", hash=name.revision)  # fmt: skip
    return builder if Path(builder.cache_dir).is_dir() else None


def _list_configs(name: HubName) -> Any:
    """The configurations that the card of a data set names."""
    import huggingface_hub
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = huggingface_hub.hf_hub_download(name.repo, "README.md", repo_type="dataset", revision=name.revision)
    except EntryNotFoundError:
        return MetadataConfigs()
    card = huggingface_hub.DatasetCard.load(path, ignore_metadata_errors=True)
    return MetadataConfigs.from_dataset_card_data(card.data)


def _default_config(name: HubName) -> str:
    configs = _list_configs(name)
    return configs.get_default_config_name() or (next(iter(configs)) if len(configs) == 1 else "default")


def _check_config(name: HubName) -> None:
    configs = _list_configs(name)
    if not configs or (not name.config and (len(configs) == 1 or configs.get_default_config_name())):
        return
    if name.config in configs:
        return
    near = difflib.get_close_matches(name.config, configs, n=1)
    hint = f"; nearest: {near[0]!r}" if near else ""
    fault = f"no configuration {name.config!r}" if name.config else "several configurations, and none named"
    raise mark_explained(
        ValueError(
            f"{name}: {fault}{hint}; there are {', '.join(sorted(configs))}. Write {name._replace(config='NAME')}."
        )
    )


def _check_split(name: HubName, builder: Any) -> None:
    """Raise ValueError for a split that the data set does not have."""
    splits = list(builder.info.splits or builder.config.data_files or ())
    base = name.split.partition("[")[0]
    if splits and "+" not in name.split and base not in splits and base != "all":
        near = difflib.get_close_matches(base, splits, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise mark_explained(
            ValueError(
                f"{name}: no split {base!r}{hint}; there are {', '.join(splits)}. A revision stands before the split: "
                f"hub:{name.repo}@REVISION@{splits[0]}."
            )
        )
