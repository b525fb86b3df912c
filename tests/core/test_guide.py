"""The guide's code runs, from top to bottom, and the tests that it names exist."""

import re
from pathlib import Path

import jax
import pytest

GUIDE = Path(__file__).resolve().parents[2] / "bilevel_jax" / "core" / "GUIDE.md"
SOLVE = Path(__file__).resolve().parent / "solve"
TEXT = GUIDE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_code_runs():
    names: dict = {}
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):  # as a reader's JAX is
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)):
            exec(compile(block, f"GUIDE.md, block {number}", "exec"), names)
    assert names["solution"].params["in"].shape == (5, 8)


def test_every_line_of_what_composes_names_a_test():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT)
    assert len(named) >= 20
    missing = [
        f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in (SOLVE / file).read_text(encoding="utf-8")
    ]
    assert missing == []
