"""`refine` on eight devices, and in micro-batches, equals one device and one batch; also where its generator learns."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.commands.refine.run import refine
from bilevel_jax.runs.config.load import RefineConfig, load_config
from tests.commands.test_refine_generator import REINFORCE
from tests.commands.test_refine_ica import ICA

pytestmark = pytest.mark.slow

# momentum: adam's first steps are signs, which rounding turns
SMOOTH = ("--optimizer.name", "momentum", "--optimizer.learning-rate", "0.05", "--refine.rounds", "2")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""float32: sums in another order, through two rounds of training; most numbers agree to 1e-6."""
WAYS = {
    "offline": ("--refine.questions", "fixed"),
    "ica": ICA,
    "pooled": ("--refine.questions", "fixed", "--outer.steps", "2", "--outer.estimate", "pooled"),
    "folds": ("--refine.questions", "fixed", "--outer.steps", "2", "--outer.validation-folds", "2"),
    "reinforce": tuple(text for pair in REINFORCE.items() for text in pair),
}
LAYOUTS = {
    "devices": ("--mesh.data", "8"),
    "micro-batches": ("--train.gradient-accumulation-steps", "2"),
}


def run(made, out, *flags):
    result = refine(load_config(RefineConfig, made / "refine.yaml", [*SMOOTH, *flags, "--out", str(out)]))
    return result, pq.read_table(out / "responses.parquet").to_pydict()


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """A run of each way on one device."""
    folder = tmp_path_factory.mktemp("one")
    return {way: run(made, folder / way, *flags) for way, flags in WAYS.items()}


@pytest.mark.parametrize(
    "way, layout",
    [*((way, "devices") for way in WAYS), ("ica", "micro-batches"), ("reinforce", "micro-batches")],
)
def test_devices_and_micro_batches_change_no_number(way, layout, made, whole, tmp_path):
    result, responses = run(made, tmp_path / "run", *WAYS[way], *LAYOUTS[layout])
    expected_result, expected = whole[way]
    compare_columns(responses, expected)
    compare_numbers(result["records"], expected_result["records"])


def compare_numbers(result, expected, tolerance=TOLERANCE):
    numbers, expected_numbers = flatten(result), flatten(expected)
    assert numbers.keys() == expected_numbers.keys()
    for key, value in expected_numbers.items():
        np.testing.assert_allclose(numbers[key], value, **tolerance, err_msg=key)


def compare_columns(columns, expected, tolerance=TOLERANCE):
    assert list(columns) == list(expected) and expected["id"]
    for name, values in expected.items():
        if name == "model":  # a hash of its parameters, which rounding changes
            continue
        if isinstance(values[0], str | bool):
            assert columns[name] == values, name
        numbers, expected_numbers = flatten(columns[name]), flatten(values)
        assert numbers.keys() == expected_numbers.keys()
        np.testing.assert_allclose(list(numbers.values()), list(expected_numbers.values()), **tolerance, err_msg=name)


def flatten(value, name=""):
    """All numbers of a result, but for times, by where they stand."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif isinstance(value, bool) or not isinstance(value, int | float) or "seconds" in name:
        return {}
    else:
        return {name: value}
    return {key: number for at, one in items for key, number in flatten(one, f"{name}/{at}").items()}
