"""The verb `inspect`: rows as training would see them, token by token, and what a person should act on."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel_jax.lm import data, tokens
from bilevel_jax.lm import models as lm
from bilevel_jax.lm.data import Example
from bilevel_jax.lm.tokens import Tokenized
from bilevel_jax.runs import objective, rows
from bilevel_jax.runs.config import InspectConfig
from bilevel_jax.runs.embedded import untrained
from bilevel_jax.runs.figures import printable
from bilevel_jax.runs.survey import Copies, Marks, Part, Reading, copies, survey

NAMED = 6
"""Sources, labels and places that are named; the others are counted."""
FEW = 5
"""Rows of a source, and 3 times as many of a part, below which they tell little."""
EIGHT_BIT = {code: f"⟨U+{code:X}⟩" for code in (*range(0x80, 0xA0), 0x2028, 0x2029)}
"""Control characters that terminals obey and pages do not."""


def inspect(config: InspectConfig) -> str:
    """Print everything, and return the verdict: what to act on, or that there is nothing.

    Raises ValueError for files, rows or a template that no verb could begin with.
    """
    with tempfile.TemporaryDirectory() as folder:
        ready = untrained(config, Path(folder))
        tokenizer = tokens.load_tokenizer(ready.model.name_or_path)
        architecture = lm.read_config(ready.model.name_or_path)
        limit = min(ready.data.max_length, architecture.max_length)
        empty: list[str] = []
        options = rows.reading(replace(ready.data, empty="drop"))
        train = data.load(ready.data.train, options, empty.append)
        trusted = rows.parts(ready.data, options, empty.append)
    named = {"training": train} | {f"V_{part}": some for part, some in trusted.items() if some}
    parts = [survey(name, some, tokenizer, ready.data, limit) for name, some in named.items()]
    twice = copies(train, trusted)
    console = Console(
        width=config.show.width or None, markup=False, emoji=False, highlight=False,
        force_jupyter=False,  # plain text in a notebook, too
    )  # fmt: skip
    console.print(_table(parts, tokenizer, limit))
    for line in _twice(twice):
        console.print(plain(line))
    for part in parts:
        _show(console, part, tokenizer, config)
    found = [*_stops(ready, parts, twice, empty, limit), *_warnings(ready, parts, twice, tokenizer, architecture)]
    missing = sorted(set(config.show.ids) - {example.id for some in named.values() for example in some})
    found += [f"show.ids: no row has the id {one}" for one in missing]
    console.print()
    if not found:
        return "OK: nothing to act on."
    listed = Table.grid(padding=(0, 1))
    for number, line in enumerate(found, 1):
        listed.add_row(Text(f"{number}.", "bold", justify="right"), plain(line))
    console.print(listed)
    return f"{_many(len(found), 'thing')} to act on, listed above."


def plain(text: str) -> Text:
    """Text of anyone's as what it is: no markup is obeyed, and no control character reaches the terminal."""
    return Text(printable(text).translate(EIGHT_BIT))


# ---- the table


def _table(parts: Sequence[Part], tokenizer: Any, limit: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for part in parts:
        table.add_column(part.name, overflow="fold")

    def line(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *map(plain, cells))

    line("rows", (f"{len(part.examples):,}" for part in parts))
    line(
        "read as",
        (_counted((f"{e.format} from {Path(e.file).name}" for e in part.examples), "files") for part in parts),
    )
    line("sources", (_counted((example.source for example in part.examples), "sources") for part in parts))
    labels = [[example.label for example in part.examples if example.label is not None] for part in parts]
    if any(labels):
        line("labels", (_counted(some, "labels") for some in labels))
    line("tokens", (f"{_tokens(part):,}" for part in parts))
    line("targets", (f"{_targets(part):,} ({_targets(part) / max(_tokens(part), 1):.1%})" for part in parts))
    line("tokens of a row", (_spread(part.lengths) for part in parts))
    edges = _edges(max(int(part.lengths.max()) for part in parts))
    line("", (_bars(part.lengths, edges) for part in parts))
    line(f"beyond {limit:,}", (_beyond(part) for part in parts))
    line("BOS in a row", (_often(part.bos, tokenizer.bos_token) for part in parts))
    line("EOS in a row", (_often(part.eos, tokenizer.eos_token) for part in parts))
    unknown, single = _strangers(tokenizer)
    for name, which in (("unknown tokens", unknown), ("byte tokens", single)):
        shares = [float(np.isin(part.flat.ids, which).mean()) for part in parts]
        if any(shares):
            line(name, (f"{share:.2%}" for share in shares))
    line("filled if padded", (f"{_filled(part):.0%}" for part in parts))
    if any(part.reading.merged for part in parts):
        line("spaces joined", (f"{part.reading.merged:,}" for part in parts))
    if any(part.reading.problems for part in parts):
        line("unreadable", (_unreadable(part.reading) for part in parts))
    return table


def _counted(values: Iterable[str], kind: str) -> str:
    counts = Counter(values)
    lines = [f"{count:,} {_short(name)}" for name, count in counts.most_common(NAMED)]
    more = [f"… {len(counts) - NAMED:,} more {kind}"] if len(counts) > NAMED else []
    return "\n".join(lines + more)


def _short(name: str, most: int = 40) -> str:
    name = " ".join(name.split())
    return name if len(name) <= most else name[: most - 1] + "…"


def _tokens(part: Part) -> int:
    return sum(len(side.ids) for sides in part.seen for side in sides)


def _targets(part: Part) -> int:
    return sum(int(side.supervised.sum()) for sides in part.seen for side in sides)


def _spread(lengths: np.ndarray) -> str:
    low, middle, high, most = np.quantile(lengths, (0, 0.5, 0.95, 1), method="nearest").tolist()
    return f"{low:,} to {most:,}\nmedian {middle:,}\n95% up to {high:,}"


def _edges(longest: int) -> list[int]:
    """Powers of two, up to the longest row: what batches of one length would be cut to."""
    return [2**k for k in range(3, 40) if 2 ** (k - 1) < max(longest, 8)]


def _bars(lengths: np.ndarray, edges: Sequence[int]) -> str:
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    filled = np.flatnonzero(counts)
    wide = len(f"{edges[filled[-1]]:,}")
    return "\n".join(
        f"≤{edges[i]:>{wide},} {_bar(counts[i] / counts.max())} {counts[i]:,}" for i in range(filled[0], filled[-1] + 1)
    )


def _bar(share: float, cells: int = 8) -> str:
    """Eighths of a cell; never nothing for something."""
    eighths = max(round(share * cells * 8), 1) if share else 0
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8]).strip()


def _beyond(part: Part) -> str:
    return f"{len(part.over):,} ({len(part.over) / len(part.seen):.1%})" if part.over else "0"


def _often(marks: Marks, token: str | None) -> str:
    if token is None:
        return "the tokenizer has none"
    shown = sorted(marks.counts.items(), key=lambda item: -item[1])[:3]
    more = [f"else {sum(marks.counts.values()) - sum(n for _, n in shown):,}"] if len(marks.counts) > 3 else []
    return ", ".join([*(f"{times} in {count:,}" for times, count in shown), *more])


def _unreadable(reading: Reading) -> str:
    return f"{len(reading.problems):,}" + (f"\n{reading.untried:,} untried" if reading.untried else "")


def _strangers(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of the unknown token and of the tokens that are single bytes."""
    unknown = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    names = (f"<0x{byte:02X}>" for byte in range(256))
    vocabulary = tokenizer.get_vocab()
    return unknown, [vocabulary[name] for name in names if name in vocabulary]


def _filled(part: Part) -> float:
    lengths = np.array([len(side.ids) for sides in part.seen for side in sides])
    return float(lengths.mean() / max(lengths.max(), 1))


# ---- what stands twice


def _twice(twice: Copies) -> list[str]:
    lines = []

    def add(count: int, text: str, places: Iterable[str]) -> None:
        if count:
            lines.extend([f"{text}: {count:,}", *_some(places)])

    for name, groups in (("training", twice.train), ("the trusted rows", twice.trusted)):
        add(sum(len(group) - 1 for group in groups), f"copies in {name}", map(_places, groups))
    leaked = len({row.id for row, _ in twice.leaks})
    equal = (f"{_where(one)} equals {_where(other)}" for one, other in twice.leaks)
    add(leaked, "training rows that also stand in the trusted rows", equal)
    for (one, other), pairs in twice.overlaps.items():
        equal = (f"{_where(a)} equals {_where(b)}" for a, b in pairs)
        add(len(pairs), f"rows in both V_{one} and V_{other}", equal)
    lines = lines or ["No row stands twice: no copies, no leaks."]
    prompts = f"training rows on {_many(len(twice.answers), 'prompt')} with several responses"
    add(sum(map(len, twice.answers)), prompts, map(_places, twice.answers))
    asked = (f"{_where(one)} asks what {_where(other)} asks" for one, other in twice.prompts)
    add(len(twice.prompts), "training rows with the prompt of a trusted row, but another response", asked)
    return lines


def _some(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    more = [f"    … and {len(lines) - NAMED:,} more"] if len(lines) > NAMED else []
    return [f"    {line}" for line in lines[:NAMED]] + more


def _places(group: Sequence[Example]) -> str:
    more = f" and {len(group) - 3:,} more" if len(group) > 3 else ""
    return ", ".join(_where(one) for one in group[:3]) + more


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _where(example: Example) -> str:
    return f"{Path(example.file).name}:{example.line}"


# ---- rows, token by token


def _show(console: Console, part: Part, tokenizer: Any, config: InspectConfig) -> None:
    ids = set(config.show.ids)
    chosen = [
        place
        for place in range(len(part.seen))
        if (part.example(place).id in ids if ids else place < config.show.examples)
    ]
    if not chosen:
        return
    console.print()
    console.rule(Text(f"{part.name}: tokens between |, targets between ⟦ and ⟧"), align="left", style="dim")
    for place in chosen:
        example, sides = part.example(place), part.seen[place]
        targets = sum(int(side.supervised.sum()) for side in sides)
        count = " + ".join(f"{len(side.ids):,}" for side in sides)
        head = (
            f"{_where(example)}  id {example.id}  source {_short(example.source)}  {count} tokens, {targets:,} targets"
        )
        console.print(Text.assemble((plain(head).plain, "bold")))
        for name, side in zip(("chosen", "rejected") if len(sides) > 1 else ("",), sides, strict=True):
            lead = Text(f"{name:>8} ", "bold") if name else Text()
            console.print(
                lead + _spelled(side, tokenizer, config.show.max_tokens) if len(side.ids) else Text("(left out)")
            )


def _spelled(row: Tokenized, tokenizer: Any, most: int) -> Text:
    """The tokens one after the other, of a long row the beginning and the end."""
    total = len(row.ids)
    head = total if total <= most else most - most // 3
    out = _spell(row.ids[:head], row.supervised[:head], tokenizer, joined=head < total)
    if head < total:
        start = total - most // 3
        gone = row.supervised[head:start]
        out.append(f" … {len(gone):,} tokens, {int(gone.sum()):,} of them targets … ", "reverse")
        out.append_text(_spell(row.ids[start:], row.supervised[start:], tokenizer))
    return out


def _spell(ids: np.ndarray, supervised: np.ndarray, tokenizer: Any, *, joined: bool = False) -> Text:
    out, inside = Text(), False
    pieces = spelled(ids.tolist(), tokenizer)
    for number, ((piece, special), target) in enumerate(zip(pieces, supervised.tolist(), strict=True)):
        if target != inside:
            out.append("⟦" if target else "⟧", "bold green")
        elif number:
            out.append("|", "dim")
        inside = target
        style = ("bold " if special else "") + ("green underline" if target else "magenta" if special else "")
        shown = plain(piece).plain.replace("\t", "⇥").replace("\n", "⏎")
        out.append(shown, style.strip())
        if piece.endswith("\n"):
            out.append("\n")
    if inside and not joined:
        out.append("⟧", "bold green")
    return out


def spelled(ids: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, whether it is special) of each token; its name in the vocabulary where it is no whole character."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = tokenizer.convert_ids_to_tokens(list(ids))
    out: list[tuple[str, bool]] = []
    run: list[
        int
    ] = []  # tokens since the last special one, decoded together: a token's space may hang on its neighbour
    before = ""
    for token, name in zip(ids, names, strict=True):
        if token in special:
            out.append((name, True))
            run, before = [], ""
            continue
        run.append(token)
        text = tokenizer.decode(run, clean_up_tokenization_spaces=False)
        if text.startswith(before) and not text.endswith("\ufffd") and len(text) > len(before):
            out.append((text[len(before) :], False))
            before = text
        else:
            out.append((f"‹{name}›", False))
    return out


# ---- what to act on


def _stops(
    config: InspectConfig, parts: Sequence[Part], twice: Copies, empty: Sequence[str], limit: int
) -> Iterable[str]:
    """What another verb would stop at, or was told to do about it."""
    if empty:
        does = "left out" if config.data.empty == "drop" else "a stop for the other verbs"
        yield f"{_many(len(empty), 'row')} with nothing to learn from, {does}. The first: {empty[0]}"
    try:
        objective.check_rows(config.objective, [example for part in parts for example in part.examples])
    except ValueError as error:
        yield f"the other verbs stop: {error}"
    for part in parts:
        if problems := part.reading.problems:
            untried = f" ({part.reading.untried:,} more were not tried)" if part.reading.untried else ""
            yield (
                f"{part.name}: {_many(len(problems), 'row')} that cannot be tokenized{untried}; the other verbs stop. "
                f"The first: {problems[0]}"
            )
        if part.over:
            yield _too_long(part, config.data.truncation, limit)
    if twice.leaks:
        does = "leave them out" if config.data.leaks == "drop" else "stop: remove them, or set data.leaks to drop"
        leaked = len({row.id for row, _ in twice.leaks})
        yield f"leaks: {_many(leaked, 'training row')} among the trusted rows; the other verbs {does}"
    for (one, other), pairs in twice.overlaps.items():
        both = f"{_many(len(pairs), 'row')} in both V_{one} and V_{other}"
        yield f"{both}; the other verbs stop: remove them from one"


def _too_long(part: Part, truncate: str, limit: int) -> str:
    whole = max(int(part.flat.supervised.sum()), 1)
    ways = {
        name: f"{name} loses {cut.lost / whole:.1%} of the targets"
        + (f" and leaves {_many(cut.unusable, 'row')} without any, which stops the other verbs" if cut.unusable else "")
        for name, cut in part.cuts.items()
    }
    others = "; ".join(text for name, text in ways.items() if name != truncate)
    does = "the other verbs stop" if truncate == "error" else ways[truncate]
    return (
        f"{part.name}: {_many(len(part.over), 'row')} ({len(part.over) / len(part.seen):.1%}) of more than {limit:,} "
        f"tokens, the first {part.example(part.over[0]).where}. data.truncation = {truncate}: {does}. Instead: {others}"
    )


def _warnings(
    config: InspectConfig, parts: Sequence[Part], twice: Copies, tokenizer: Any, architecture: lm.DecoderConfig
) -> Iterable[str]:
    """What no verb stops at."""
    if len(parts) == 1:
        yield "no trusted rows: `select` needs data.validation, and `train` has nothing to read its progress on"
    if tokenizer.eos_token_id is None:
        yield "the tokenizer has no EOS: nothing teaches the model where an answer ends"
    for part in parts:
        yield from (f"{part.name}: {line}" for line in _odd_rows(part, tokenizer, architecture))
    sources = Counter(example.source for example in parts[0].examples)
    small = [f"{_short(name)} ({count})" for name, count in sources.most_common()[::-1] if count < FEW]
    if small and len(sources) > 1:
        more = f" and {len(small) - NAMED:,} more" if len(small) > NAMED else ""
        yield f"sources with fewer than {FEW} training rows, which tell little: {', '.join(small[:NAMED])}{more}"
    if twice.train:
        extra = sum(len(group) - 1 for group in twice.train)
        share = extra / len(parts[0].examples)
        yield f"copies in training: {_many(extra, 'row')} ({share:.1%}), each with a weight of its own"
    if twice.prompts:
        many = _many(len(twice.prompts), "training row")
        yield f"{many} with the prompt of a trusted row, but another response: close to a leak"
    if not config.data.packing and _filled(parts[0]) < 0.5:
        yield (
            f"{1 - _filled(parts[0]):.0%} of a padded batch is padding: data.packing = true is faster and gives the "
            "same numbers"
        )


def _odd_rows(part: Part, tokenizer: Any, architecture: lm.DecoderConfig) -> Iterable[str]:
    if len(part.examples) < (2 if part.name == "training" else 3 * FEW):
        yield f"{_many(len(part.examples), 'row')}: too few to tell much"
    if part.bos.odd:
        wanted = 1 if tokenizer.bos_token_id is not None else 0
        yield f"{_first(part, part.bos.odd)}: not exactly {wanted} BOS; look at the chat template"
    if part.eos.odd and tokenizer.eos_token_id is not None:
        yield f"{_first(part, part.eos.odd)}: no EOS at the end, or more than one in an answer"
    if (largest := int(part.flat.ids.max())) >= architecture.vocab:
        yield f"the tokenizer gives the token {largest}, and the model has {architecture.vocab}: they are no pair"
    targets = np.array([sum(int(side.supervised.sum()) for side in sides) for sides in part.reading.sides])
    lengths = part.flat.lengths.reshape(-1, part.flat.sequences).sum(1)
    dialogue = np.array([example.turns[0].role != "text" for example in map(part.example, range(len(targets)))])
    whole = np.flatnonzero(dialogue & (targets >= lengths - part.flat.sequences)).tolist()
    if whole:
        yield f"{_first(part, whole)}: every token is a target, as if there were no prompt"
    if (share := targets.sum() / lengths.sum()) < 0.1:
        yield f"only {share:.1%} of the tokens are targets: the prompts take the time, and teach nothing"
    unknown, single = _strangers(tokenizer)
    for which, kind, most in (
        (unknown, "unknown to the tokenizer", 0.001),
        (single, "bytes of unknown characters", 0.05),
    ):
        found = float(np.isin(part.flat.ids, which).mean())
        if found > most:
            yield f"{found:.1%} of the tokens are {kind}: was it made for this language?"
    if cut := sum(example.cut > 0 for example in part.examples):
        yield f"{_many(cut, 'dialogue')} lost a last message of the user, which nothing answers"


def _first(part: Part, places: Sequence[int]) -> str:
    return f"{_many(len(places), 'row')}, the first {part.example(places[0]).where}"
