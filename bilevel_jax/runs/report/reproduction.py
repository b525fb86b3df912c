"""Estimated and measured usage of a run, and how to repeat it."""

import shlex
from pathlib import Path
from typing import Any

from bilevel_jax.runs.budget.usage import compare_usage
from bilevel_jax.runs.report.html import Column, Table, bold_cell, format_versions, make_table
from bilevel_jax.runs.report.numbers import MISSING
from bilevel_jax.runs.report.results import RunResults


def describe_reproduction(run: RunResults, command: str, precision: str) -> dict[str, Any]:
    """The values of the template `reproduction.html`: commands, environment, columns, settings and usage."""
    environment, (program, *arguments) = run.environment, run.environment["command"]
    kinds = environment["devices"]
    devices = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    columns = {name: meaning for name, meaning in run.column_meanings.items() if name in run.columns}
    return {
        "command": command,
        "started": shlex.join(["bilevel-jax" if _is_console_script(program) else program, *arguments]),
        "facts": {
            "commit": environment["commit"] or f"{MISSING} (not a git checkout)",
            "config hash": run.result["config_hash"],
            "device": f"{devices} ({environment['backend']}), processes: {environment['processes']}",
            "precision": precision,
            "platform": f"Python {environment['python']}, {environment['platform']}",
            "packages": format_versions(environment["packages"]),
        },
        "columns": make_table(
            Column("column", [bold_cell(name) for name in columns]),
            Column("meaning", list(columns.values())),
            css_class="facts",
        ),
        "config_text": run.config_text,
        "usage": usage_table(run),
    }


def usage_table(run: RunResults) -> Table | None:
    """Estimated and measured usage of the run; None where nothing was measured."""
    if "measured" not in run.result:
        return None
    lines = compare_usage(run.result["estimate"], run.result["measured"])
    names, expected, measured, notes = zip(*lines, strict=True)
    return make_table(
        Column("what", names), Column("estimated", expected), Column("measured", measured), Column("", notes)
    )


def _is_console_script(program: str) -> bool:
    return Path(program).name in ("bilevel-jax", "cli.py", "__main__.py")
