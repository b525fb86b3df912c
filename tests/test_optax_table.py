"""The table of optax's transformations names all of them and says what its command measures."""

import os
import re
import subprocess
import sys

import jax
import pytest

from tests import optax_table
from tests.optax_table import SECTIONS, TABLE

LINES = TABLE.read_text(encoding="utf-8").splitlines()
CODES = {code: name for section in SECTIONS.values() for name, codes in section.items() for code in codes}


def test_the_table_names_every_transformation():
    named = [name for section in SECTIONS.values() for name in section]
    assert sorted(named) == sorted(optax_table.exported_transformations()), "add to tests/optax_table.py, and run it"


def test_the_file_has_the_lines_of_the_table_in_order():
    found = [re.match(r"\| `(\w+)` \| `(.*?)` \|", line) for line in LINES if line.startswith("| `")]
    assert [(row[1], row[2]) for row in found] == [
        (name, code) for section in SECTIONS.values() for name, codes in section.items() for code in codes
    ]
    assert not [line for line in LINES if "WRONG" in line]


@pytest.mark.parametrize("code", ["optax.sgd(rate)", "optax.lion(rate)", "contrib.momo(rate)"])
def test_a_line_is_what_is_measured(code):
    with jax.enable_x64(True):
        row = optax_table.measure(CODES[code], code)
    assert optax_table.line_of(row) in LINES


@pytest.mark.slow
def test_the_file_is_what_the_command_makes():
    command = [sys.executable, "-W", "ignore", "-m", "tests.optax_table", "--check"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # it has its own
    done = subprocess.run(command, cwd=TABLE.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
