"""Folders of models, of adapters on their bases, and of runs."""

from pathlib import Path
from typing import NamedTuple

from bilevel_jax.lm.checkpoint.files import read_json_object
from bilevel_jax.lm.hub.downloads import CONFIG_FILES, find_model_files
from bilevel_jax.lm.hub.names import HubName, parse_model_name

ADAPTER_FILE = "adapter_config.json"
RUN_FOLDERS = ("model", "model-adapter")
"""Folders of a run that hold its model, the whole one first."""


class ModelFolder(NamedTuple):
    """The folders that a model is loaded from."""

    base: Path
    """A Hugging Face folder: of the whole model, or of what an adapter stands on."""
    adapter: Path | None
    """A PEFT folder; None for a whole model."""

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer: the adapter's where it has one."""
        has_own = self.adapter is not None and any(
            (self.adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
        )
        return self.adapter if has_own and self.adapter is not None else self.base

    @property
    def folders(self) -> list[Path]:
        """All of them."""
        return [self.base, *([self.adapter] if self.adapter else [])]


def find_model_folder(path: str | Path, base: str = "") -> ModelFolder:
    """The folders of the model that a path names.

    Args:
        path: a Hugging Face folder, a PEFT adapter folder, or the folder of a run, which holds model/ or
            model-adapter/; or the name of a model or an adapter on the hub, which is fetched.
        base: the folder of an adapter's base, or its name on the hub; empty: what its adapter_config.json names.

    Returns:
        The base and the adapter.

    Raises:
        FileNotFoundError: no such folder, or none that holds a model.
        ValueError: an adapter whose base is not known, or is no folder here and not on the hub.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = pathlib.Path(folder, "run", "model")
        ...     model.mkdir(parents=True)
        ...     _ = (model / "config.json").write_text("{}")
        ...     find_model_folder(model.parent).base == model
        True
    """
    folder = find_model_files(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder. Give a folder of a model, of an adapter or of a run"
            f"{', or a service as NAME@http://localhost:8000/v1' if '://' not in str(path) else ''}."
        )
    inside = _find_inside(folder)
    if inside is None:
        raise FileNotFoundError(
            f"{path}: no config.json of a model, no {ADAPTER_FILE}, and no folder model/ of a run. Give a folder "
            "that has one of them."
        )
    folder = inside
    if not (folder / ADAPTER_FILE).is_file():
        return ModelFolder(folder, None)
    name, hub_name = _name_base(folder, base)
    candidates = [Path(name), *([] if base else [folder / name])] if name else []
    if hub_name is not None:
        try:
            candidates = [find_model_files(str(hub_name))]
        except OSError as error:  # of the hub, in a sentence that names the base alone
            remedy = "Or name a folder that holds it in evaluate.base."
            raise type(error)(f"{folder}: an adapter, and its base {name!r} cannot be read. {error} {remedy}") from None
    found = next((candidate for candidate in candidates if (candidate / "config.json").is_file()), None)
    if found is None:
        named = f"its base is {name!r}, which is no folder of a model here" if name else "it names no base"
        raise ValueError(f"{folder}: an adapter, and {named}. Name the base's folder in evaluate.base.")
    return ModelFolder(found, folder)


def find_base_name(path: str | Path) -> str:
    """What the adapter that a path names says that it stands on: a folder, or a name on the hub with its prefix.

    Empty for a whole model, for what is no model, and for an adapter that names no base. Fetches no weights.
    """
    folder = _find_inside(find_model_files(path, CONFIG_FILES))
    if folder is None or not (folder / ADAPTER_FILE).is_file():
        return ""
    name, hub_name = _name_base(folder)
    return str(hub_name or name)


def _find_inside(folder: Path) -> Path | None:
    """The folder itself where it holds a model or an adapter, or what it holds of a run; None for neither."""
    if any((folder / name).is_file() for name in CONFIG_FILES):
        return folder
    return next((folder / name for name in RUN_FOLDERS if (folder / name).is_dir()), None)


def _name_base(folder: Path, base: str = "") -> tuple[str, HubName | None]:
    """(the base of an adapter as it is named, its name on the hub where that is no folder here)."""
    keys = read_json_object(folder / ADAPTER_FILE)
    name = base or keys.get("base_model_name_or_path") or ""
    is_here = name and (Path(name).is_dir() or (not base and (folder / name).is_dir()))
    hub_name = None if is_here else parse_model_name(name)
    if hub_name is not None and not base and keys.get("revision"):
        hub_name = hub_name.with_commit(keys["revision"])
    return name, hub_name
