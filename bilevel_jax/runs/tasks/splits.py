"""Training, validation, dev and test examples, checked for leaks."""

from collections.abc import Callable
from typing import NamedTuple

from bilevel_jax.lm.data import examples
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.runs.config.schema import DataSection

PART_NAMES = ("validation", "dev", "test")


class DataSplits(NamedTuple):
    """What was loaded, checked for copies across the parts."""

    train: list[Example]
    held_out: dict[str, list[Example]]
    """validation, dev and test; all empty where no validation examples were given."""
    notes: list[str]
    """What loading found: layouts, duplicates, leaks."""


def load_splits(config: DataSection) -> DataSplits:
    """Read all files; refuse or drop what stands in two places. Streamed training examples are not read here.

    Raises ValueError where validation examples stand in two of their parts, or training examples among them.
    """
    options = make_data_options(config)
    dropped: list[str] = []
    train = [] if config.streaming else examples.load_examples(config.train, options, on_drop=dropped.append)
    held_out = load_held_out(config, options, dropped.append)
    notes = [
        "training: rows are read as training goes"
        if config.streaming
        else f"training: {examples.summarize_examples(train)}"
    ]
    notes += [
        f"{part}: {examples.summarize_examples(part_examples)}"
        for part, part_examples in held_out.items()
        if part_examples
    ]
    notes += examples.describe_unread_keys(
        [*train, *(example for part_examples in held_out.values() for example in part_examples)]
    )
    if dropped:
        notes.append(f"{len(dropped):,} rows were left out (data.empty = drop), the first: {dropped[0]}")
    for part, other_parts in (("dev", ("test",)), ("validation", ("dev", "test"))):
        for other_part in other_parts:
            if pairs := examples.find_leaks(held_out[part], held_out[other_part]):
                raise ValueError(
                    f"{len(pairs)} validation examples stand in both {part} and {other_part}, the first: "
                    f"{pairs[0][0].where} and {pairs[0][1].where}. {other_part} would not be independent: remove them "
                    "from one."
                )
    leaked_pairs = examples.find_leaks(train, [example for part in held_out.values() for example in part])
    if leaked_pairs and config.leaks == "error":
        raise ValueError(
            f"{len({example.id for example, _ in leaked_pairs})} training examples also stand in the validation "
            f"examples, the first: {leaked_pairs[0][0].where} equals {leaked_pairs[0][1].where}. Their weights would "
            "be rewarded for being copied. Remove them, or set data.leaks to drop."
        )
    if leaked_pairs:
        leaked_rows = {example.row for example, _ in leaked_pairs}
        train = [example for example in train if example.row not in leaked_rows]
        notes.append(
            f"{len(leaked_rows)} training examples were dropped because they also stand in the validation examples."
        )
        if not train:
            raise ValueError(
                "every training example also stands in the validation examples; nothing is left to be judged."
            )
    if groups := examples.find_duplicates(train):
        copies = sum(len(group) - 1 for group in groups)
        first_places = " and ".join(example.where for example in groups[0][:2])
        notes.append(
            f"{copies} training examples repeat another row, the first: {first_places}. Each copy has its own weight."
        )
    return DataSplits(train, held_out, notes)


def load_held_out(
    config: DataSection, options: examples.DataOptions, on_dropped: Callable[[str], None]
) -> dict[str, list[Example]]:
    """validation, dev and test: from files of their own where given, the rest by splitting `validation`.

    Not yet checked for rows that stand in two of them. `on_dropped` is called for each row that is left out as empty.
    """
    if not config.validation and not config.dev and not config.test:
        return {part: [] for part in PART_NAMES}
    paths_by_part = {"dev": config.dev, "test": config.test}
    held_out = {
        part: examples.load_examples(paths, options, on_drop=on_dropped) if paths else []
        for part, paths in paths_by_part.items()
    }
    shares = dict(zip(PART_NAMES, config.split, strict=True))
    parts_to_split = [part for part in PART_NAMES if shares[part] > 0 and not held_out.get(part)]
    total = sum(shares[part] for part in parts_to_split)
    validation = examples.load_examples(config.validation, options, on_drop=on_dropped)
    split_examples = (
        examples.split_examples(validation, [shares[part] / total for part in parts_to_split], config.seed)
        if len(parts_to_split) > 1
        else (validation,)
    )
    return {part: [] for part in PART_NAMES} | held_out | dict(zip(parts_to_split, split_examples, strict=True))


def make_data_options(config: DataSection) -> examples.DataOptions:
    """How files are read: the keys of the section data that `DataOptions` has."""
    return examples.DataOptions(
        format=config.format,
        prompt_field=config.prompt_field,
        response_field=config.response_field,
        text_field=config.text_field,
        messages_field=config.messages_field,
        system_field=config.system_field,
        chosen_field=config.chosen_field,
        rejected_field=config.rejected_field,
        source_field=config.source_field,
        label_field=config.label_field,
        empty=config.empty,
    )
