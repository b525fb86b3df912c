"""The `inspect` command, which shows examples as training sees them."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel_jax.commands.inspect.survey import (
    Duplicates,
    PartSurvey,
    SpecialTokenCounts,
    TokenizedRows,
    find_copies,
    survey_part,
)
from bilevel_jax.commands.results import InspectedPart, InspectResult
from bilevel_jax.lm import models
from bilevel_jax.lm.data import examples, tokens
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.tokens import TokenizedSequence
from bilevel_jax.lm.data.turns import Turn
from bilevel_jax.lm.data.vocabulary import check_special_tokens, spell_tokens
from bilevel_jax.runs.config.load import InspectConfig
from bilevel_jax.runs.config.rules import reads_parameters_alone
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.infra.inputs import check_inputs_whole
from bilevel_jax.runs.tasks import objective, splits, targets
from bilevel_jax.runs.tasks.builtin import resolve_builtin_untrained
from bilevel_jax.runs.tasks.text import target_corpus_name
from bilevel_jax.runs.tasks.user_functions import load_user_function
from bilevel_jax.runs.terminal import make_console, show_control_characters

MAX_NAMES_SHOWN = 6
"""Sources, labels and places that are named; the others are counted."""
FEW_EXAMPLES = 5
"""Rows of a source, and 3 times as many of a part, below which they tell little."""


def inspect(config: InspectConfig) -> InspectResult:
    """Print everything, and return what to act on and the tokens of each example.

    Raises ValueError for files, rows or a template that no command could begin with.
    """
    check_inputs_whole(config)
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve_builtin_untrained(config, Path(folder))
        tokenizer = tokens.load_tokenizer(resolved.model.name_or_path)
        architecture = models.read_config(resolved.model.name_or_path)
        check_special_tokens(resolved.model.name_or_path, tokenizer, architecture.vocab_size)
        limit = min(resolved.data.max_length, architecture.max_length)
        empty: list[str] = []
        options = splits.make_data_options(replace(resolved.data, empty="drop"))
        keys: set[str] = set()
        train = examples.load_examples(resolved.data.train, options, empty.append, keys)
        train_keys = frozenset(keys)
        trusted = splits.load_held_out(resolved.data, options, empty.append, keys)
    by_target, target_errors = _split_by_target(resolved, trusted)
    examples_by_part = {"training": train} | by_target
    parts = [
        survey_part(name, part_examples, tokenizer, resolved.data, limit, architecture.vocab_size)
        for name, part_examples in examples_by_part.items()
    ]
    duplicates = find_copies(train, trusted)
    console = make_console(width=config.show.width or None)
    console.print(_build_table(parts, tokenizer, limit))
    for line in _describe_duplicates(duplicates):
        console.print(to_plain_text(line))
    for part in parts:
        _print_examples(console, part, tokenizer, config)
    findings = [
        *_find_unread_fields(resolved.data, train, train_keys, keys),
        *target_errors,
        *_find_errors(resolved, parts, duplicates, empty, limit),
        *_find_warnings(resolved, parts, duplicates, tokenizer),
    ]
    missing = sorted(
        set(config.show.ids) - {example.id for part_examples in examples_by_part.values() for example in part_examples}
    )
    findings += [f"show.ids: no row has the id {missing_id}" for missing_id in missing]
    console.print()
    inspected = {part.name: _measure_part(part) for part in parts}
    if not findings:
        return InspectResult("OK: nothing to act on.", (), inspected)
    listed = Table.grid(padding=(0, 1))
    for number, line in enumerate(findings, 1):
        listed.add_row(Text(f"{number}.", "bold", justify="right"), to_plain_text(line))
    console.print(listed)
    summary = f"{_format_quantity(len(findings), 'thing')} to act on, listed above."
    return InspectResult(summary, tuple(findings), inspected)


def _measure_part(part: PartSurvey) -> InspectedPart:
    readable = [part.example(place) for place in range(len(part.as_trained))]
    return InspectedPart(
        ids=np.array([example.id for example in readable], str),
        sources=np.array([example.source for example in readable], str),
        tokens=np.array(part.lengths),
        targets=np.array([sum(int(side.target_mask.sum()) for side in sides) for sides in part.as_trained], int),
    )


def to_plain_text(text: str) -> Text:
    """Text of anyone's as what it is: no markup is obeyed, and no control character reaches the terminal."""
    return Text(show_control_characters(text))


# ---- the table


def _build_table(parts: Sequence[PartSurvey], tokenizer: Any, limit: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for part in parts:
        table.add_column(part.name, overflow="fold")

    def add_line(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *map(to_plain_text, cells))

    add_line("rows", (f"{len(part.examples):,}" for part in parts))
    add_line(
        "read as",
        (_format_counts((f"{e.format} from {Path(e.file).name}" for e in part.examples), "files") for part in parts),
    )
    add_line("sources", (_format_counts((example.source for example in part.examples), "sources") for part in parts))
    labels = [[example.label or "(none)" for example in part.examples] for part in parts]
    if any(example.label is not None for part in parts for example in part.examples):
        add_line("labels", (_format_counts(part_labels, "labels") for part_labels in labels))
    not_learned = [sum(not turn.is_target for turn in _iterate_turns(part)) for part in parts]
    with_reasoning = [sum(bool(turn.reasoning) for turn in _iterate_turns(part)) for part in parts]
    with_weight = [sum(turn.weight != 1 for turn in _iterate_turns(part)) for part in parts]
    for name, counts in (
        ("answers marked as no target", not_learned),
        ("answers with a weight", with_weight),
        ("answers with a reasoning", with_reasoning),
    ):
        if any(counts):
            add_line(name, (f"{count:,}" for count in counts))
    add_line("tokens", (f"{_count_tokens(part):,}" for part in parts))
    add_line(
        "targets",
        (f"{_count_targets(part):,} ({_count_targets(part) / max(_count_tokens(part), 1):.1%})" for part in parts),
    )
    add_line("tokens of a row", (_format_quantiles(part.lengths) for part in parts))
    edges = _bin_edges(max(int(part.lengths.max()) for part in parts))
    add_line("", (_format_histogram(part.lengths, edges) for part in parts))
    add_line(f"beyond {limit:,}", (_format_overlong(part) for part in parts))
    add_line("BOS in a row", (_format_token_counts(part.bos, tokenizer.bos_token) for part in parts))
    add_line("EOS in a row", (_format_token_counts(part.eos, tokenizer.eos_token) for part in parts))
    unknown, single = _fallback_token_ids(tokenizer)
    for name, token_ids in (("unknown tokens", unknown), ("byte tokens", single)):
        shares = [float(np.isin(part.corpus.ids, token_ids).mean()) for part in parts]
        if any(shares):
            add_line(name, (f"{share:.2%}" for share in shares))
    add_line("filled if padded", (f"{_padded_fill_share(part):.0%}" for part in parts))
    if any(part.tokenized.merged_spaces for part in parts):
        add_line("spaces joined", (f"{part.tokenized.merged_spaces:,}" for part in parts))
    if any(part.tokenized.problems for part in parts):
        add_line("unreadable", (_format_unreadable(part.tokenized) for part in parts))
    return table


def _iterate_turns(part: PartSurvey) -> Iterable[Turn]:
    return (turn for example in part.examples for turn in example.turns + example.rejected)


def _format_counts(values: Iterable[str], kind: str) -> str:
    counts = Counter(values)
    lines = [f"{count:,} {_shorten(name)}" for name, count in counts.most_common(MAX_NAMES_SHOWN)]
    rest = [f"… {len(counts) - MAX_NAMES_SHOWN:,} more {kind}"] if len(counts) > MAX_NAMES_SHOWN else []
    return "\n".join(lines + rest)


def _shorten(name: str, max_length: int = 40) -> str:
    name = " ".join(name.split())
    return name if len(name) <= max_length else name[: max_length - 1] + "…"


def _count_tokens(part: PartSurvey) -> int:
    return sum(len(side.ids) for sides in part.as_trained for side in sides)


def _count_targets(part: PartSurvey) -> int:
    return sum(int(side.target_mask.sum()) for sides in part.as_trained for side in sides)


def _format_quantiles(lengths: np.ndarray) -> str:
    low, middle, high, most = np.quantile(lengths, (0, 0.5, 0.95, 1), method="nearest").tolist()
    return f"{low:,} to {most:,}\nmedian {middle:,}\n95% up to {high:,}"


def _bin_edges(longest: int) -> list[int]:
    """Powers of two, up to the longest row: what batches of one length would be cut to."""
    return [2**k for k in range(3, 40) if 2 ** (k - 1) < max(longest, 8)]


def _format_histogram(lengths: np.ndarray, edges: Sequence[int]) -> str:
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    filled = np.flatnonzero(counts)
    wide = len(f"{edges[filled[-1]]:,}")
    return "\n".join(
        f"≤{edges[i]:>{wide},} {_format_bar(counts[i] / counts.max())} {counts[i]:,}"
        for i in range(filled[0], filled[-1] + 1)
    )


def _format_bar(share: float, cells: int = 8) -> str:
    """Eighths of a cell; never nothing for something."""
    eighths = max(round(share * cells * 8), 1) if share else 0
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8]).strip()


def _format_overlong(part: PartSurvey) -> str:
    return f"{len(part.overlong):,} ({len(part.overlong) / len(part.as_trained):.1%})" if part.overlong else "0"


def _format_token_counts(token_counts: SpecialTokenCounts, token: str | None) -> str:
    if token is None:
        return "the tokenizer has none"
    common = sorted(token_counts.counts.items(), key=lambda item: -item[1])[:3]
    rest = (
        [f"else {sum(token_counts.counts.values()) - sum(n for _, n in common):,}"]
        if len(token_counts.counts) > 3
        else []
    )
    return ", ".join([*(f"{times} in {count:,}" for times, count in common), *rest])


def _format_unreadable(tokenized: TokenizedRows) -> str:
    return f"{len(tokenized.problems):,}" + (f"\n{tokenized.num_untried:,} untried" if tokenized.num_untried else "")


def _fallback_token_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of the unknown token and of the tokens that are single bytes."""
    unknown = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    names = (f"<0x{byte:02X}>" for byte in range(256))
    vocabulary = tokenizer.get_vocab()
    return unknown, [vocabulary[name] for name in names if name in vocabulary]


def _padded_fill_share(part: PartSurvey) -> float:
    lengths = np.array([len(side.ids) for sides in part.as_trained for side in sides])
    return float(lengths.mean() / max(lengths.max(), 1))


# ---- what stands twice


def _describe_duplicates(duplicates: Duplicates) -> list[str]:
    lines = []

    def add_group(count: int, text: str, places: Iterable[str]) -> None:
        if count:
            lines.extend([f"{text}: {count:,}", *_first_lines(places)])

    for name, groups in (("training", duplicates.train), ("the validation examples", duplicates.trusted)):
        add_group(sum(len(group) - 1 for group in groups), f"copies in {name}", map(_format_places, groups))
    leaked = len({row.id for row, _ in duplicates.leaks})
    equal = (f"{_format_place(first)} equals {_format_place(other)}" for first, other in duplicates.leaks)
    add_group(leaked, "training examples that also stand in the validation examples", equal)
    for (first, other), pairs in duplicates.overlaps.items():
        equal = (f"{_format_place(a)} equals {_format_place(b)}" for a, b in pairs)
        add_group(len(pairs), f"rows in both {first} and {other}", equal)
    lines = lines or ["No row stands twice: no copies, no leaks."]
    prompts = (
        f"training examples on {_format_quantity(len(duplicates.repeated_prompts), 'prompt')} with several responses"
    )
    add_group(sum(map(len, duplicates.repeated_prompts)), prompts, map(_format_places, duplicates.repeated_prompts))
    prompt_pairs = (
        f"{_format_place(first)} asks what {_format_place(other)} asks" for first, other in duplicates.shared_prompts
    )
    add_group(
        len(duplicates.shared_prompts),
        "training examples with the prompt of a validation example, but another response",
        prompt_pairs,
    )
    return lines


def _first_lines(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    rest = [f"    … and {len(lines) - MAX_NAMES_SHOWN:,} more"] if len(lines) > MAX_NAMES_SHOWN else []
    return [f"    {line}" for line in lines[:MAX_NAMES_SHOWN]] + rest


def _format_places(group: Sequence[Example]) -> str:
    rest = f" and {len(group) - 3:,} more" if len(group) > 3 else ""
    return ", ".join(_format_place(example) for example in group[:3]) + rest


def _format_quantity(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _format_place(example: Example) -> str:
    return f"{Path(example.file).name}:{example.line}"


# ---- rows, token by token


def _print_examples(console: Console, part: PartSurvey, tokenizer: Any, config: InspectConfig) -> None:
    ids = set(config.show.ids)
    shown_places = [
        place
        for place in range(len(part.as_trained))
        if (part.example(place).id in ids if ids else place < config.show.examples)
    ]
    if not shown_places:
        return
    console.print()
    console.rule(Text(f"{part.name}: tokens between |, targets between ⟦ and ⟧"), align="left", style="dim")
    for place in shown_places:
        example, sides = part.example(place), part.as_trained[place]
        targets = sum(int(side.target_mask.sum()) for side in sides)
        count = " + ".join(f"{len(side.ids):,}" for side in sides)
        head = (
            f"{_format_place(example)}  id {example.id}  source {_shorten(example.source)}  "
            f"{count} tokens, {targets:,} targets"
        )
        console.print(Text.assemble((to_plain_text(head).plain, "bold")))
        for name, side in zip(("chosen", "rejected") if len(sides) > 1 else ("",), sides, strict=True):
            lead = Text(f"{name:>8} ", "bold") if name else Text()
            console.print(
                lead + _render_tokens(side, tokenizer, config.show.max_tokens) if len(side.ids) else Text("(left out)")
            )


def _render_tokens(row: TokenizedSequence, tokenizer: Any, max_tokens: int) -> Text:
    """The tokens one after the other, of a long row the beginning and the end."""
    total = len(row.ids)
    head = total if total <= max_tokens else max_tokens - max_tokens // 3
    out = _render_token_span(row.ids[:head], row.target_mask[:head], tokenizer, joined=head < total)
    if head < total:
        start = total - max_tokens // 3
        gone = row.target_mask[head:start]
        out.append(f" … {len(gone):,} tokens, {int(gone.sum()):,} of them targets … ", "reverse")
        out.append_text(_render_token_span(row.ids[start:], row.target_mask[start:], tokenizer))
    return out


def _render_token_span(ids: np.ndarray, supervised: np.ndarray, tokenizer: Any, *, joined: bool = False) -> Text:
    out, inside = Text(), False
    pieces = spell_tokens(ids.tolist(), tokenizer)
    for number, ((piece, special), target) in enumerate(zip(pieces, supervised.tolist(), strict=True)):
        if target != inside:
            out.append("⟦" if target else "⟧", "bold green")
        elif number:
            out.append("|", "dim")
        inside = target
        style = ("bold " if special else "") + ("green underline" if target else "magenta" if special else "")
        visible = to_plain_text(piece).plain.replace("\t", "⇥").replace("\n", "⏎")
        out.append(visible, style.strip())
        if piece.endswith("\n"):
            out.append("\n")
    if inside and not joined:
        out.append("⟧", "bold green")
    return out


# ---- what to act on


def _split_by_target(
    config: InspectConfig, trusted: Mapping[str, list[Example]]
) -> tuple[dict[str, list[Example]], list[str]]:
    """The examples of each target in each part, by their names; and what other commands would stop at."""
    specs = targets.list_targets(config.target, config.objective)
    whole = {part: part_examples for part, part_examples in trusted.items() if part_examples}
    try:
        judging, reported = targets.split_reported(specs)
        beside, judges, _ = targets.group_reported(reported, whole)
        grouped = targets.group_by_target(judging, judges)
        for some, of_parts in ((judging, grouped), (reported, beside)):
            targets.check_target_examples(some, of_parts, config.objective)
        for spec in specs:
            if spec.settings is None:
                load_user_function(str(spec.loss), key="target.losses")
    except (ValueError, FileNotFoundError) as error:
        return whole, [f"the other commands stop: {error}"]
    return {
        target_corpus_name(part, spec): own
        for some, of_parts in ((judging, grouped), (reported, beside))
        for part, of_targets in of_parts.items()
        for spec, own in zip(some, of_targets, strict=False)
        if own
    }, []


def _find_errors(
    config: InspectConfig, parts: Sequence[PartSurvey], duplicates: Duplicates, empty: Sequence[str], limit: int
) -> Iterable[str]:
    """What another command would stop at, or is configured to do about it."""
    if empty:
        does = "left out" if config.data.empty == "drop" else "a stop for the other commands"
        yield f"{_format_quantity(len(empty), 'row')} with nothing to learn from, {does}. The first: {empty[0]}"
    try:
        objective.check_examples(config.objective, parts[0].examples)
    except ValueError as error:
        yield f"the other commands stop: {error}"
    for part in parts:
        if problems := part.tokenized.problems:
            untried = f" ({part.tokenized.num_untried:,} more were not tried)" if part.tokenized.num_untried else ""
            yield (
                f"{part.name}: {_format_quantity(len(problems), 'row')} that cannot be tokenized{untried}; "
                f"the other commands stop. The first: {problems[0]}"
            )
        if part.overlong:
            yield _describe_overlong(part, config.data.truncation, limit)
    if duplicates.leaks:
        does = "leave them out" if config.data.leaks == "drop" else "stop: remove them, or set data.leaks to drop"
        leaked = len({row.id for row, _ in duplicates.leaks})
        examples_text = _format_quantity(leaked, "training example")
        yield f"leaks: {examples_text} among the validation examples; the other commands {does}"
    for (first, other), pairs in duplicates.overlaps.items():
        both = f"{_format_quantity(len(pairs), 'row')} in both {first} and {other}"
        yield f"{both}; the other commands stop: remove them from one"


def _find_unread_fields(
    data: DataSection, train: Sequence[Example], train_keys: frozenset[str], keys: set[str]
) -> Iterable[str]:
    """Names of fields and a good label that match nothing."""
    for check in (
        partial(splits.check_fields, data, train_keys, keys),
        partial(splits.check_labels, data, train),
    ):
        try:
            check()
        except ValueError as error:
            yield f"the other commands stop: {error}"
            return


def _describe_overlong(part: PartSurvey, truncate: str, limit: int) -> str:
    whole = max(int(part.corpus.target_mask.sum()), 1)
    ways = {
        name: f"{name} loses {cut.lost_targets / whole:.1%} of the targets"
        + (
            f" and leaves {_format_quantity(cut.num_unusable, 'row')} without any, which stops the other commands"
            if cut.num_unusable
            else ""
        )
        for name, cut in part.truncation_effects.items()
    }
    others = "; ".join(text for name, text in ways.items() if name != truncate)
    does = "the other commands stop" if truncate == "error" else ways[truncate]
    return (
        f"{part.name}: {_format_quantity(len(part.overlong), 'row')} "
        f"({len(part.overlong) / len(part.as_trained):.1%}) of more than {limit:,} tokens, "
        f"the first {part.example(part.overlong[0]).where}. data.truncation = {truncate}: {does}. Instead: {others}"
    )


def _find_warnings(
    config: InspectConfig,
    parts: Sequence[PartSurvey],
    duplicates: Duplicates,
    tokenizer: Any,
) -> Iterable[str]:
    """What no command stops at."""
    if len(parts) == 1 and not reads_parameters_alone(config):
        yield "no validation examples: `select` needs data.validation, and `train` has nothing to read its progress on"
    if tokenizer.eos_token_id is None:
        yield "the tokenizer has no EOS: nothing teaches the model where an answer ends"
    for part in parts:
        yield from (f"{part.name}: {line}" for line in _find_odd_rows(part, tokenizer))
    sources = Counter(example.source for example in parts[0].examples)
    small = [f"{_shorten(name)} ({count})" for name, count in sources.most_common()[::-1] if count < FEW_EXAMPLES]
    if small and len(sources) > 1:
        rest = f" and {len(small) - MAX_NAMES_SHOWN:,} more" if len(small) > MAX_NAMES_SHOWN else ""
        names = ", ".join(small[:MAX_NAMES_SHOWN])
        yield f"sources with fewer than {FEW_EXAMPLES} training examples, which tell little: {names}{rest}"
    if duplicates.train:
        extra = sum(len(group) - 1 for group in duplicates.train)
        share = extra / len(parts[0].examples)
        yield f"copies in training: {_format_quantity(extra, 'row')} ({share:.1%}), each with a weight of its own"
    if duplicates.shared_prompts:
        count_text = _format_quantity(len(duplicates.shared_prompts), "training example")
        yield f"{count_text} with the prompt of a validation example, but another response: close to a leak"
    if not config.data.packing and _padded_fill_share(parts[0]) < 0.5:
        yield (
            f"{1 - _padded_fill_share(parts[0]):.0%} of a padded batch is padding: "
            "data.packing = true is faster and gives the same numbers"
        )


def _find_odd_rows(part: PartSurvey, tokenizer: Any) -> Iterable[str]:
    if len(part.examples) < (2 if part.name == "training" else 3 * FEW_EXAMPLES):
        yield f"{_format_quantity(len(part.examples), 'row')}: too few to tell much"
    if part.bos.odd_rows:
        expected = 1 if tokenizer.bos_token_id is not None else 0
        yield f"{_describe_first(part, part.bos.odd_rows)}: not exactly {expected} BOS; look at the chat template"
    if part.eos.odd_rows and tokenizer.eos_token_id is not None:
        yield f"{_describe_first(part, part.eos.odd_rows)}: no EOS at the end, or more than one in an answer"
    targets = np.array([sum(int(side.target_mask.sum()) for side in sides) for sides in part.tokenized.sequences])
    lengths = part.corpus.lengths.reshape(-1, part.corpus.sequences_per_example).sum(1)
    dialogue = np.array([example.turns[0].role != "text" for example in map(part.example, range(len(targets)))])
    whole = np.flatnonzero(dialogue & (targets >= lengths - part.corpus.sequences_per_example)).tolist()
    if whole:
        yield f"{_describe_first(part, whole)}: every token is a target, as if there were no prompt"
    if (share := targets.sum() / lengths.sum()) < 0.1:
        yield f"only {share:.1%} of the tokens are targets: the prompts take the time, and teach nothing"
    unknown, single = _fallback_token_ids(tokenizer)
    for token_ids, kind, threshold in (
        (unknown, "unknown to the tokenizer", 0.001),
        (single, "bytes of unknown characters", 0.05),
    ):
        fraction = float(np.isin(part.corpus.ids, token_ids).mean())
        if fraction > threshold:
            yield f"{fraction:.1%} of the tokens are {kind}: was it made for this language?"
    yield from examples.describe_unread_keys(part.examples)
    if cut := sum(example.num_dropped_turns > 0 for example in part.examples):
        yield f"{_format_quantity(cut, 'dialogue')} lost a last message of the user, which nothing answers"


def _describe_first(part: PartSurvey, places: Sequence[int]) -> str:
    return f"{_format_quantity(len(places), 'row')}, the first {part.example(places[0]).where}"
