"""A finished run that is resumed changes nothing: all that it writes follows from what it has stored."""

import pytest

from tests.commands.run_table import RUNS, files, start, table_inputs  # noqa: F401

FAST = ("train, streaming",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_finished_run_that_is_resumed_changes_no_byte(table_inputs, tmp_path, name):  # noqa: F811
    start(table_inputs, name, tmp_path / "run")
    whole = files(tmp_path / "run")
    assert "result.json" in whole and "report.html" in whole
    start(table_inputs, name, tmp_path / "run", "--resume")
    again = files(tmp_path / "run")
    assert sorted(again) == sorted(whole)
    assert [file for file in whole if whole[file] != again[file]] == []
