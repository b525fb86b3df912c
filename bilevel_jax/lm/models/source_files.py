"""Files of a model folder that training does not change."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel_jax.lm.checkpoint.files import CONFIG_FILE, UNCHANGED_FILES
from bilevel_jax.lm.hub.downloads import SMALL_FILES, find_model_files
from bilevel_jax.lm.hub.names import HubName, parse_model_name

TRANSFORMERS_5_KEYS = ("backend", "is_local", "local_files_only")
"""What transformers 5 adds to tokenizer_config.json: how this process loaded the tokenizer."""


def read_source_files(folder: str | Path) -> dict[str, bytes]:
    """The files of a Hugging Face folder that a model trained from it carries along, and its config.json.

    Args:
        folder: of the model that training starts from, or its name on the hub.

    Returns:
        Name in the folder -> contents, for `save_model`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
        ...     _ = (Path(folder) / "optimizer.pt").write_text("")
        ...     read_source_files(folder)
        {'generation_config.json': b'{"eos_token_id": [0, 2]}'}
    """
    folder = find_model_files(folder, SMALL_FILES)
    paths = {path for pattern in (CONFIG_FILE, *UNCHANGED_FILES) for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}


def write_unchanged_files(folder: Path, source_files: Mapping[str, bytes]) -> None:
    """Write all but config.json, byte for byte."""
    for name, contents in source_files.items():
        if name != CONFIG_FILE:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(contents)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """A tokenizer of transformers as files that its versions 4 and 5 both load, without a trace of this machine."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in TRANSFORMERS_5_KEYS}
    if settings.get("tokenizer_class") == "TokenizersBackend":  # its name in transformers 4, which 5 knows as well
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def find_hub_name(folder: str | Path) -> HubName | None:
    """The name on the Hugging Face hub, with its commit, of a model: given as such, or a folder in the hub's cache.

    None for any other folder than `models--OWNER--NAME/snapshots/COMMIT`: no file in it says reliably what it is called
    (`_name_or_path` in a config.json names what that model was trained from), and its place on this machine helps
    nobody else.
    """
    if name := parse_model_name(folder):
        return name
    folder = Path(folder).absolute()
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return HubName("model", repository.removeprefix("models--").replace("--", "/"), folder.name)
