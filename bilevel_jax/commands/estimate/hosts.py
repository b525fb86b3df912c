"""What each host of a run on several hosts reads and holds."""

import math
from dataclasses import fields
from typing import Any

import jax
import numpy as np

from bilevel_jax.commands.estimate.abstract_run import AbstractRun
from bilevel_jax.commands.estimate.peak import plan_run_checkpoints
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.runs.config.load import TrainConfig
from bilevel_jax.runs.config.schema import EstimateSection
from bilevel_jax.runs.engine.trajectory_store import bytes_per_device
from bilevel_jax.runs.infra.inputs import list_input_files
from bilevel_jax.runs.tasks.text import TokenizedData


def check_hosts(options: EstimateSection, num_devices: int) -> None:
    """Refuse a number of hosts that the devices cannot be spread over evenly."""
    if num_devices % options.hosts:
        raise ValueError(
            f"estimate.hosts = {options.hosts}: {num_devices} devices do not spread evenly over so many hosts. Set "
            "estimate.devices to a multiple of it."
        )


def describe_hosts(
    config: Any, abstract_run: AbstractRun, text: TokenizedData, options: EstimateSection, peak: float
) -> dict[str, Any]:
    """Bytes of one host: on its devices, read from files, and in its own memory; nothing else of a process is counted.

    `peak` is that of one device. Arrays on devices are exact: every device of the mesh holds as much. In the host's
    memory are the tokens of all rows, states that outer.offload puts there and, where a model is written, what every
    process gathers for it. Files that are not here have no size: None.
    """
    task, shapes = abstract_run.task, abstract_run.shapes
    per_host = task.mesh.size // options.hosts
    files = list_input_files(config)
    rows = task.layout.num_micro_batches * task.layout.rows
    length = task.layout.length if options.train_examples else 0
    memory = {"tokens of all rows": sum(_corpus_bytes(corpus, length) for corpus in text.corpora.values())}
    run = abstract_run.config
    if not isinstance(run, TrainConfig) and run.outer.offload == "host":
        snapshots = plan_run_checkpoints(abstract_run, options).snapshots
        memory["states of outer.offload"] = per_host * snapshots * bytes_per_device(shapes.state)
    if abstract_run.writes_model:
        has_base = not (isinstance(run, TrainConfig) and run.output.model == "adapter")
        memory["whole model, for its file"] = sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves((shapes.params, task.base_params if has_base else None))
        )
    weights = [file for file in files.get("model.name_or_path", ()) if file.suffix == ".safetensors"]
    data = [file for key, paths in files.items() if key.startswith("data.") for file in paths]
    return {
        "count": options.hosts,
        "devices": per_host,
        "rows of a step": rows // options.hosts,
        "on its devices": {
            "parameters": per_host * (bytes_per_device(shapes.params) + bytes_per_device(task.base_params)),
            "optimizer": per_host * bytes_per_device(shapes.state.opt_state),
            "batch": per_host * bytes_per_device(shapes.batch),
            "at the peak": per_host * peak,
        },
        "files that it reads": {
            "weights of the model": sum(file.stat().st_size for file in weights) if weights else None,
            "data": sum(file.stat().st_size for file in data) if data else None,
        },
        "in its memory": memory,
    }


def _corpus_bytes(corpus: Corpus, length: int) -> int:
    """Bytes of a corpus; `length`: of each of its sequences, where the corpus stands for rows that are absent."""
    arrays = [value for field in fields(corpus) if isinstance(value := getattr(corpus, field.name), np.ndarray)]
    if not length:
        return sum(array.nbytes for array in arrays)
    per_token = sum(array.itemsize for array in arrays if len(array) == len(corpus.ids))
    return per_token * length * (len(corpus.offsets) - 1) + corpus.offsets.nbytes
