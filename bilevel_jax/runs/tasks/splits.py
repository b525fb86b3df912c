"""Training, validation, dev and test examples, checked for leaks."""

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from bilevel_jax.lm.data import examples
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.targets import TokenWeights
from bilevel_jax.runs.config.schema import DataSection

PART_NAMES = ("validation", "dev", "test")
NUM_PEEKED_ROWS = 1000
"""Rows of streamed training data that are read ahead, to see whether they have the fields that the config names."""


class DataSplits(NamedTuple):
    """What was loaded, checked for copies across the parts."""

    train: list[Example]
    held_out: dict[str, list[Example]]
    """validation, dev and test; all empty where no validation examples were given."""
    notes: list[str]
    """What loading found: layouts, duplicates, leaks."""
    token_weights: Mapping[str, TokenWeights] | None = None
    """Factors of the losses of single tokens, by the id of a training example."""


def load_splits(config: DataSection) -> DataSplits:
    """Read all files; refuse or drop what stands in two places. Streamed training examples are not read here.

    Raises ValueError where validation examples stand in two of their parts, or training examples among them.
    """
    options = make_data_options(config)
    dropped: list[str] = []
    keys: set[str] = set()
    train = [] if config.streaming else examples.load_examples(config.train, options, dropped.append, keys)
    train_keys = frozenset(keys)
    held_out = load_held_out(config, options, dropped.append, keys)
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
    if config.streaming:
        notes += _check_streamed_fields(config, options)
    else:
        check_fields(config, train_keys, keys)
        notes += check_labels(config, train)
    if dropped:
        notes.append(
            f"{examples.format_count('row', len(dropped), ('was', 'were'))} left out (data.empty = drop), the first: "
            f"{dropped[0]}"
        )
    for part, other_parts in (("dev", ("test",)), ("validation", ("dev", "test"))):
        for other_part in other_parts:
            if pairs := examples.find_leaks(held_out[part], held_out[other_part]):
                stand = examples.format_count("validation example", len(pairs), ("stands", "stand"))
                raise ValueError(
                    f"{stand} in both {part} and {other_part}, the first: "
                    f"{pairs[0][0].where} and {pairs[0][1].where}. {other_part} would not be independent: remove them "
                    "from one."
                )
    leaked_pairs = examples.find_leaks(train, [example for part in held_out.values() for example in part])
    if leaked_pairs and config.leaks == "error":
        num_leaked = len({example.id for example, _ in leaked_pairs})
        raise ValueError(
            f"{examples.format_count('training example', num_leaked)} also {'stands' if num_leaked == 1 else 'stand'} "
            f"in the validation examples, the first: {leaked_pairs[0][0].where} equals {leaked_pairs[0][1].where}. "
            "Their weights would be rewarded for being copied. Remove them, or set data.leaks to drop."
        )
    if leaked_pairs:
        leaked_rows = {example.row for example, _ in leaked_pairs}
        train = [example for example in train if example.row not in leaked_rows]
        notes.append(
            f"{examples.format_count('training example', len(leaked_rows), ('was', 'were'))} dropped because "
            f"{'it also stands' if len(leaked_rows) == 1 else 'they also stand'} in the validation examples."
        )
        if not train:
            raise ValueError(
                "every training example also stands in the validation examples; nothing is left to be judged."
            )
    if groups := examples.find_duplicates(train):
        copies = sum(len(group) - 1 for group in groups)
        first_places = " and ".join(example.where for example in groups[0][:2])
        notes.append(
            f"{examples.format_count('training example', copies, ('repeats', 'repeat'))} another row, the first: "
            f"{first_places}. Each copy has its own weight."
        )
    return DataSplits(train, held_out, notes)


def load_held_out(
    config: DataSection,
    options: examples.DataOptions,
    on_dropped: Callable[[str], None],
    keys: set[str] | None = None,
) -> dict[str, list[Example]]:
    """validation, dev and test: from files of their own where given, the rest by splitting `validation`.

    Not yet checked for rows that stand in two of them, nor for pairs next to other rows: each target reads its own.
    `on_dropped` is called for each row that is left out as empty;
    `keys` receives the keys of the rows.
    """
    if not config.validation and not config.dev and not config.test:
        return {part: [] for part in PART_NAMES}
    paths_by_part = {"dev": config.dev, "test": config.test}
    held_out = {
        part: examples.load_examples(paths, options, on_dropped, keys, mixed=True) if paths else []
        for part, paths in paths_by_part.items()
    }
    shares = dict(zip(PART_NAMES, config.split, strict=True))
    parts_to_split = [part for part in PART_NAMES if shares[part] > 0 and not held_out.get(part)]
    total = sum(shares[part] for part in parts_to_split)
    validation = examples.load_examples(config.validation, options, on_dropped, keys, mixed=True)
    split_examples = (
        examples.split_examples(validation, [shares[part] / total for part in parts_to_split], config.seed)
        if len(parts_to_split) > 1
        else (validation,)
    )
    return {part: [] for part in PART_NAMES} | held_out | dict(zip(parts_to_split, split_examples, strict=True))


def check_fields(config: DataSection, train_keys: AbstractSet[str], all_keys: AbstractSet[str]) -> None:
    """Raises ValueError for a name of a field that no row has, where a missing field would go unnoticed."""
    given = {
        "label_field": ("training example", train_keys),
        "source_field": ("training example", train_keys),
        "system_field": ("row", all_keys),
    }
    for key, (kind, names) in given.items():
        name = getattr(config, key)
        if name and name != getattr(DataSection, key) and name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"nearest: {nearest[0]!r}; " if nearest else ""
            raise ValueError(
                f"data.{key} is {name!r}, and no {kind} has a value under that key; {hint}the keys are "
                f"{sorted(names)}. Set data.{key} to one of them, or leave it out."
            )


def _check_streamed_fields(config: DataSection, options: examples.DataOptions) -> list[str]:
    """`check_fields` of the first rows: an error if these are all, else a note, as a later row may have the key."""
    keys: set[str] = set()
    stream = examples.stream_examples(config.train, options, keys=keys)
    count = sum(1 for _ in itertools.islice(stream, NUM_PEEKED_ROWS))
    try:
        check_fields(config, keys, keys)
    except ValueError as error:
        if count < NUM_PEEKED_ROWS:
            raise
        return [f"of the first {count:,} rows: {error}"]
    return []


def check_labels(config: DataSection, train: Sequence[Example]) -> list[str]:
    """A note for people, where only some of the training examples are labelled; none without labels.

    Raises ValueError where no label is data.good_label: then nothing could be said against the labels.
    """
    if not config.label_field:
        return []
    counts = Counter(example.label for example in train if example.label is not None)
    good_label = examples.normalize_name(config.good_label)
    if good_label is None or good_label not in counts:
        shown = ", ".join(f"{label!r} ({count:,})" for label, count in counts.most_common(8))
        more = f" and {len(counts) - 8:,} more" if len(counts) > 8 else ""
        nearest = difflib.get_close_matches(config.good_label, counts, n=1, cutoff=0.5)
        hint = f"nearest: {nearest[0]!r}; " if nearest else ""
        raise ValueError(
            f"data.good_label is {config.good_label!r}, and no training example has that label under "
            f"'{config.label_field}'; {hint}the labels are {shown}{more}. Set data.good_label to the label of good "
            "examples, or leave data.label_field out."
        )
    if counts.total() == len(train):
        return []
    return [
        f"{len(train) - counts.total():,} of {len(train):,} training examples have no label: AUC, F1 and the oracle "
        f"rest on the other {counts.total():,} alone, of which {counts[good_label]:,} are good."
    ]


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
