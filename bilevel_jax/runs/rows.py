"""The rows of a run: training rows, the three parts of the trusted rows, and what a person should know about them."""

from collections.abc import Callable
from typing import NamedTuple

from bilevel_jax.lm import data
from bilevel_jax.lm.data import Example
from bilevel_jax.runs.sections import DataSection

PARTS = ("fit", "select", "report")


class Rows(NamedTuple):
    """What was loaded, checked for copies across the parts."""

    train: list[Example]
    trusted: dict[str, list[Example]]
    """V_fit, V_select and V_report; all empty where no validation rows were given."""
    notes: list[str]
    """What loading found: layouts, duplicates, leaks."""


def load(rows: DataSection) -> Rows:
    """Read all files of `rows`; refuse or drop what stands in two places. Streamed training rows are not read here.

    Raises ValueError where trusted rows stand in two of their parts, or training rows among them.
    """
    options = reading(rows)
    dropped: list[str] = []
    train = [] if rows.streaming else data.load(rows.train, options, dropped=dropped.append)
    trusted = parts(rows, options, dropped.append)
    notes = ["training: rows are read as training goes" if rows.streaming else f"training: {data.summary(train)}"]
    notes += [f"V_{part}: {data.summary(part_rows)}" for part, part_rows in trusted.items() if part_rows]
    if dropped:
        notes.append(f"{len(dropped):,} rows were left out (data.empty = drop), the first: {dropped[0]}")
    for part, others in (("select", ("report",)), ("fit", ("select", "report"))):
        for other in others:
            if pairs := data.leaks(trusted[part], trusted[other]):
                raise ValueError(
                    f"{len(pairs)} trusted rows stand in both V_{part} and V_{other}, the first: {pairs[0][0].where} "
                    f"and {pairs[0][1].where}. V_{other} would not be independent: remove them from one."
                )
    leaked = data.leaks(train, [row for part in trusted.values() for row in part])
    if leaked and rows.leaks == "error":
        raise ValueError(
            f"{len({row.id for row, _ in leaked})} training rows also stand in the trusted rows, the first: "
            f"{leaked[0][0].where} equals {leaked[0][1].where}. Their weights would be rewarded for being copied. "
            "Remove them, or set data.leaks to drop."
        )
    if leaked:
        gone = {row.row for row, _ in leaked}
        train = [row for row in train if row.row not in gone]
        notes.append(f"{len(gone)} training rows were dropped because they also stand in the trusted rows.")
        if not train:
            raise ValueError("every training row also stands in the trusted rows; nothing is left to be judged.")
    if groups := data.duplicates(train):
        copies = sum(len(group) - 1 for group in groups)
        first = " and ".join(row.where for row in groups[0][:2])
        notes.append(f"{copies} training rows repeat another row, the first: {first}. Each copy has its own weight.")
    return Rows(train, trusted, notes)


def parts(rows: DataSection, options: data.DataOptions, dropped: Callable[[str], None]) -> dict[str, list[Example]]:
    """V_fit, V_select and V_report: from files of their own where given, the rest by splitting `validation`.

    Not yet checked for rows that stand in two of them. `dropped` is called for each row that is left out as empty.
    """
    if not rows.validation and not rows.dev and not rows.test:
        return {part: [] for part in PARTS}
    own = {"select": rows.dev, "report": rows.test}
    trusted = {part: data.load(paths, options, dropped=dropped) if paths else [] for part, paths in own.items()}
    shares = dict(zip(PARTS, rows.split, strict=True))
    wanted = [part for part in PARTS if shares[part] > 0 and not trusted.get(part)]
    total = sum(shares[part] for part in wanted)
    validation = data.load(rows.validation, options, dropped=dropped)
    pieces = (
        data.split(validation, [shares[part] / total for part in wanted], rows.seed)
        if len(wanted) > 1
        else (validation,)
    )
    return {part: [] for part in PARTS} | trusted | dict(zip(wanted, pieces, strict=True))


def reading(rows: DataSection) -> data.DataOptions:
    """How the rows are read: the keys of `rows` that `lm.data` knows."""
    return data.DataOptions(
        format=rows.format,
        prompt_field=rows.prompt_field,
        response_field=rows.response_field,
        text_field=rows.text_field,
        messages_field=rows.messages_field,
        system_field=rows.system_field,
        chosen_field=rows.chosen_field,
        rejected_field=rows.rejected_field,
        source_field=rows.source_field,
        label_field=rows.label_field,
        empty=rows.empty,
    )
