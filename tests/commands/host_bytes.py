"""Bytes that one of two processes holds on its devices: a program of its own, started by test_estimate.py."""

import json
import sys
from pathlib import Path

import jax

from bilevel_jax.core.training import init_train_state
from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.config.schema import DistributedSection
from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.placement import replicate_unplaced
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.text import prepare_text_task


def count_own_bytes(tree) -> int:
    """Of the parts that lie on the devices of this process."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)


def measure(config: SelectConfig, folder: Path) -> dict[str, int]:
    """What `estimate` tells of one host, of arrays that are there."""
    task = prepare_text_task(
        config, splits.load_splits(config.data), folder, num_steps=config.train.max_steps, seeds=[0],
        proximal_strength=config.outer.proximal, target=config.target,
    )  # fmt: skip
    params = task.init_params(0)
    state = replicate_unplaced(task.mesh, init_train_state(task.optimizer, params))
    batch = task.training_stream(config.data.seed).batch(0)
    trees = {"parameters": (state.params, task.base_params), "optimizer": state.opt_state, "batch": batch}
    return {name: count_own_bytes(tree) for name, tree in trees.items()}


if __name__ == "__main__":  # coordinator, number, folder, config, flags
    number, folder = int(sys.argv[2]), Path(sys.argv[3])
    distributed.initialize_distributed(
        DistributedSection(coordinator_address=sys.argv[1], num_processes=2, process_id=number)
    )
    found = measure(load_config(SelectConfig, sys.argv[4], sys.argv[5:]), folder)
    (folder / f"host {number}.json").write_text(json.dumps(found))
