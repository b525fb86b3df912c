"""Numbers and labels of the rows of a builtin task."""

from collections.abc import Mapping

import numpy as np

from bilevel_jax.lm.data.batches import permute_indices


def check_not_negative(values: Mapping[str, float]) -> None:
    """Raise ValueError that names the first of some arguments of a task that is below 0."""
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name}={value}: must not be negative.")


def check_rows(sizes: Mapping[str, int], limit: int, *, corrupted: float, noise: float) -> None:
    """Raise ValueError for numbers of rows of a task that are none or too many, or shares of `train` beyond all."""
    if not 0 < sum(sizes.values()) <= limit:
        raise ValueError(f"{dict(sizes)}: together they must be 1 to {limit}.")
    if round(corrupted * sizes["train"]) + round(noise * sizes["train"]) > sizes["train"]:
        raise ValueError(f"corrupted={corrupted}, noise={noise}: shares of the rows are wanted, of at most 1 together.")


def draw_labels(count: int, *, num_wrong: int, num_random: int, seed: int) -> list[str]:
    """Labels of so many rows, in an order that is drawn: wrong, noise, and the others clean."""
    ordered = ["wrong"] * num_wrong + ["noise"] * num_random + ["clean"] * (count - num_wrong - num_random)
    return [ordered[i] for i in permute_indices(np.arange(count), max(count, 1), seed, 2)]
