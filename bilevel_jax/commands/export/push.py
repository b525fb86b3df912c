"""An export, or the model of a run, pushed to a repository on the hub."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from bilevel_jax.commands.export.card import (
    code_span,
    describe_measurements,
    describe_run,
    escape_cell,
    list_hub_sources,
    markdown_table,
    read_run_config,
    read_run_result,
)
from bilevel_jax.lm.checkpoint.files import read_json_object
from bilevel_jax.lm.checkpoint.folders import ADAPTER_FILE
from bilevel_jax.lm.hub.names import HubName
from bilevel_jax.lm.hub.uploads import check_login, check_repository_name, push_files
from bilevel_jax.runs.config.load import ExportConfig
from bilevel_jax.runs.config.local_paths import hide_local_paths
from bilevel_jax.runs.config.schema import ExportSection
from bilevel_jax.runs.infra import seals
from bilevel_jax.storage import copies, urls

CARD_FILE = "README.md"


def check_push(settings: ExportSection, run: Path | None) -> None:
    """Raise an error for what could not be pushed, before anything is written."""
    repositories: dict[str, str] = {"dataset": settings.push_to_hub, "model": settings.push_model_to_hub}
    for kind, repository in repositories.items():
        if repository:
            check_repository_name(repository)
            check_login(HubName("dataset" if kind == "dataset" else "model", repository))
    if settings.push_model_to_hub:
        if run is None:
            raise ValueError("export.push_model_to_hub pushes the model of a run: give the folder of one.")
        find_pushed_model(run)


def find_pushed_model(run: Path) -> Path:
    """The folder of a run's adapter where its base has a name on the hub, else that of its whole model."""
    adapter, model = run / "model-adapter", run / "model"
    if (adapter / ADAPTER_FILE).is_file() and read_json_object(adapter / ADAPTER_FILE).get("base_model_name_or_path"):
        return adapter
    if (model / "config.json").is_file():
        return model
    if (adapter / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{adapter}: an adapter whose base has no name on the hub, so nobody could load it. Run it again with "
            "output.model = full or both, which writes the whole model, too."
        )
    raise FileNotFoundError(f"{run}: no model of a finished run to push. Finish it with --resume.")


def push_export(folder: Path, config: ExportConfig, run: Path | None) -> str:
    """Push what was exported into a folder; where it is, in a sentence."""
    files = {path: folder / path for path in _list_files(folder)}
    source = {"what": "examples", **_describe_source(config, run)}
    return _push("dataset", config.export.push_to_hub, files, source, config.export)


def push_model(run: Path, config: ExportConfig, command: str) -> str:
    """Push a run's model with a card; where it is, in a sentence. Raises seals.DamagedFileError for another model."""
    folder = find_pushed_model(run)
    files: dict[str, Path | bytes] = {path: folder / path for path in list_model_files(folder)}
    card = format_model_card(run, folder, config.export.push_model_to_hub, command)
    source = {"what": "adapter" if (folder / ADAPTER_FILE).is_file() else "model", **_describe_source(config, run)}
    return _push("model", config.export.push_model_to_hub, {**files, CARD_FILE: card.encode()}, source, config.export)


def list_model_files(folder: Path) -> list[str]:
    """The files of a run's model, relative to its folder: all that the run wrote, whole, and no others.

    Raises seals.DamagedFileError for one that is missing or changed, ValueError for one that the run did not write.
    """
    seals.check(folder)
    place = seals.find_run(folder)
    prefix = f"{place.name}/" if place is not None else ""
    written = [name.removeprefix(prefix) for name in place.names if name.startswith(prefix)] if place else []
    if not written:
        raise ValueError(f"{folder}: no run says what it wrote there, so nobody can tell whether the model is whole.")
    if others := sorted({*_list_files(folder)} - {*written}):
        raise ValueError(
            f"{folder} holds {', '.join(others[:5])}{' and more' if len(others) > 5 else ''}, which the run did not "
            "write, so it is not pushed as the run's model. Move it elsewhere."
        )
    return sorted(written)


def _describe_source(config: ExportConfig, run: Path | None) -> dict[str, str]:
    """What rows or a model are made from: a run, or data with weights."""
    if run is None:
        text = repr((config.data, config.weights))  # has paths of this machine
        return {"config hash": hashlib.sha256(text.encode()).hexdigest()[:12]}
    shown = copies.show(str(run))
    name = (Path(shown) if urls.is_url(shown) else run.resolve()).name
    return {"run": name, "config hash": read_run_result(run).get("config_hash", "")}


def format_model_card(run: Path, folder: Path, repository: str, command: str) -> str:
    """README.md of a model: front matter for the hub, how to load it, how it was trained, what was measured."""
    config, result = read_run_config(run), read_run_result(run)
    is_adapter = (folder / ADAPTER_FILE).is_file()
    models, data_sets = list_hub_sources(config)
    head: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bilevel-jax"],
    }
    if models:
        head |= {"base_model": models, "base_model_relation": "adapter" if is_adapter else "finetune"}
    if data_sets:
        head["datasets"] = data_sets
    kind = "adapter (LoRA)" if is_adapter else "model"
    learned = "weights that `bilevel-jax select` learned from a validation set" if "outer" in config else (
        "given weights, by `bilevel-jax train`")  # fmt: skip
    use = (
        "from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained"
        if is_adapter
        else "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained"
    )
    facts = [(key, escape_cell(value)) for key, value in describe_run(run)]
    facts += [("command", code_span(command))] if command else []
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {escape_cell(repository.split('/')[-1])}",
        f"A {kind} that was fine-tuned on examples with {learned}.",
        "**Licence:** not stated. The terms of the base model and of the training examples hold for it; name them "
        "before you share it.",
        f"## Use\n\n```python\n{use}({repository!r})\n```",
        "## How it was made\n\n" + markdown_table(("", ""), facts),
        *describe_measurements(config, result),
    ]
    return hide_local_paths("\n\n".join(parts) + "\n", config)


def _push(
    kind: Literal["model", "dataset"],
    repository: str,
    files: Mapping[str, Path | bytes],
    source: Mapping[str, str],
    settings: ExportSection,
) -> str:
    version = sys.modules["bilevel_jax"].__version__  # of the code that runs, also where it is not installed
    pushed = push_files(
        kind,
        repository,
        files,
        made_by=f"bilevel-jax {version} export",
        source=source,
        message=f"bilevel-jax {version} export",
        private=settings.private,
        replace=settings.replace,
    )
    seen_by = "private" if pushed.is_private else "public"
    return f"pushed the {pushed.name.noun} {pushed.name.repo}, commit {pushed.name.revision} ({seen_by}): {pushed.url}"


def _list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
