"""What the typed result of a run and its tables have in common."""

import re

import numpy as np
import pyarrow.parquet as pq

from bilevel_jax.commands import read_result


def check_columns(folder, file, columns):
    """The result of a finished run, whose arrays equal the columns of a table, row by row; and the table.

    columns: array of the result -> column, or (array, key) for an array in a dict.
    """
    result, table = read_result(folder), pq.read_table(folder / file)
    assert result.folder == folder and result.report == folder / "report.html" and result.report.is_file()
    assert result.config.output.dir == str(folder)
    for name, column in columns.items():
        array = getattr(result, name) if isinstance(name, str) else getattr(result, name[0])[name[1]]
        assert isinstance(array, np.ndarray) and array.flags.owndata
        expected = table[column].to_pylist()
        assert array.tolist() == expected or np.array_equal(array, np.array(expected, float), equal_nan=True), name
    shown = re.sub(r"\n {6,}", "\n", repr(result))  # as far as the longest name of a line
    assert result.summary in shown and str(result.report) in shown
    return result, table
