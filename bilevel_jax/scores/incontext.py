"""In-Context Approximation: how much more likely demonstrations from the holdout make a row's response."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilevel_jax.core.certify import spearman
from bilevel_jax.lm.encode import Tokenizer
from bilevel_jax.lm.tokens import TokenizedSequence
from bilevel_jax.scores.demonstrations import Choice
from bilevel_jax.scores.random import number
from bilevel_jax.scores.requests import Answer, Plan, Rows, Score, per_token, plan, take, targets

TEMPLATE = "{demonstrations}{row}"


class Prompt(NamedTuple):
    """How demonstrations are put before a row, in tokens; `prompt` makes it from templates."""

    bos: tuple[int, ...]
    system: tuple[int, ...]
    """A system message that the chat template adds by itself; it stands once, before the demonstrations."""
    before: tuple[int, ...]
    """Between that and the first demonstration."""
    around: tuple[tuple[int, ...], tuple[int, ...]]
    """Before and after each demonstration."""
    behind: tuple[int, ...]
    """Between the last demonstration and the row."""
    end: tuple[int, ...]
    """What is taken off the end of a demonstration: an EOS that training adds and no template writes."""

    def skip(self, row: TokenizedSequence) -> int:
        """Tokens at the beginning of a row that `head` has: BOS and the chat template's own system message."""
        start = (*self.bos, *self.system)
        return len(start) if tuple(row.ids[: len(start)].tolist()) == start else len(self.bos)

    def piece(self, shown: TokenizedSequence) -> tuple[int, ...]:
        """One demonstration."""
        body = tuple(shown.ids.tolist())[self.skip(shown) :]
        body = body[: len(body) - len(self.end)] if self.end and body[-1:] == self.end else body
        return (*self.around[0], *body, *self.around[1])

    def head(self, pieces: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """All that stands before a row; the least wanted demonstration first, so the best is nearest to the row."""
        shown = (token for piece in reversed(pieces) for token in piece)
        return (*self.bos, *self.system, *self.before, *shown, *self.behind)

    def fitting(self, pieces: Sequence[tuple[int, ...]], row: int, max_length: int) -> list[tuple[int, ...]]:
        """The pieces, best first, that fit before a row of so many tokens beyond those that it skips."""
        room = max_length - row - len(self.head([]))
        fits = []
        for piece in pieces:
            if len(piece) <= room:
                fits.append(piece)
                room -= len(piece)
        return fits


def prompt(tokenizer: Tokenizer, template: str = TEMPLATE, demonstration: str = "") -> Prompt:
    """Templates -> Prompt. `template` says what stands around all demonstrations, `demonstration` around each.

    A row and a demonstration are the very tokens that training reads, by its chat template or its plain one, without
    their BOS. So the tokens of a response are the same with and without demonstrations, all rows with the same
    demonstrations begin with the same tokens, and no text of a row can pass for a part of a template. The default for
    `demonstration` is "{demonstration}" and the white space that the tokenizer's chat template writes between
    exchanges, or an empty line where it has none: then demonstrations are what earlier exchanges of one dialogue are.
    A system message of the row's own stands behind the demonstrations.
    """
    exchange, system = _exchange(tokenizer)
    space = exchange[len(exchange.rstrip()) :] if exchange else "\n\n"
    before, behind, rest = parts(template, ("{demonstrations}", "{row}"), TEMPLATE)
    if rest:
        raise ValueError(
            f"the template {template!r} goes on after {{row}}, which the model would not read. End it there."
        )
    around = parts(demonstration or "{demonstration}" + space, ("{demonstration}",), "{demonstration}\n\n")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    written = eos is None or exchange.rstrip().endswith(str(tokenizer.eos_token))
    return Prompt(
        bos=() if bos is None else (bos,),
        system=tuple(i for i in _literal(system, tokenizer) if i != bos),
        before=_literal(before, tokenizer),
        around=(_literal(around[0], tokenizer), _literal(around[1], tokenizer)),
        behind=_literal(behind, tokenizer),
        end=() if written else (eos,),
    )


def ica(form: Prompt, choose: Choice, *, max_length: int, k: int = 3, normalise: bool = True) -> Score:
    """s_i = log p(y_i | C_i, x_i) - log p(y_i | x_i), where C_i are k holdout rows as demonstrations, x_i the prompt.

    Of a preference pair, the change of its margin m = log p(y_w | x) - log p(y_l | x), without beta or a reference
    model; demonstrations show chosen responses, and exchanging the two sides changes the sign of s. `normalise`
    divides each log p by the number of its tokens, as the losses of training do: nats per token. The published score
    sums: nats per response, which grows with its length.

    Demonstrations that do not fit into `max_length` tokens with the row are left out, the least wanted first; `held`
    is the number that was shown, and a row with none has score 0. Source: arXiv 2510.14459, which reads s as a first
    approximation of what training on the holdout would change for row i. Wrong where the model does not learn in
    context, or where demonstrations tell it the format rather than what is right. Raises ValueError for a holdout of
    fewer than k rows and for rows longer than max_length.
    """

    def score(rows: Rows, holdout: Rows) -> Plan:
        chosen = choose(rows, holdout, k)
        pieces = {int(j): form.piece(holdout.sides(j)[0]) for j in np.unique(chosen[chosen >= 0])}
        asked, held = [], np.zeros(len(rows.examples), int)
        for i in range(len(rows.examples)):
            sides = rows.sides(i)
            longest = max(len(side.ids) for side in sides)
            skip = form.skip(sides[0])
            if longest > max_length:
                where = rows.examples[i].where
                raise ValueError(
                    f"{where}: {longest} tokens, and max_length is {max_length}. Raise it, or drop the row."
                )
            best = [pieces[j] for j in chosen[i].tolist() if j >= 0] if longest else []  # 0: a row dropped as too long
            shown = form.fitting(best, longest - skip, max_length)
            held[i] = len(shown)
            head, skip = (form.head(shown), skip) if shown else ((), 0)
            asked += [targets(side) for side in sides] + [targets(side, head, skip) for side in sides]
        sequences = rows.corpus.sequences_per_example

        def change(nats: Float[np.ndarray, "sequences"], tokens: Float[np.ndarray, "sequences"]) -> np.ndarray:
            values = per_token(nats, tokens if normalise else np.sign(tokens)).reshape(-1, 2, sequences)
            margins = values[..., 0] - values[..., 1] if sequences == 2 else values[..., 0]
            return margins[:, 1] - margins[:, 0]

        return plan(asked, change, held, k)

    return score


def agreement(
    scores: Float[np.ndarray, "rows"],
    other: Score,
    rows: Rows,
    holdout: Rows,
    answer: Answer,
    *,
    sample: int = 200,
    seed: int = 0,
) -> float:
    """Spearman's rank correlation of the scores with another score of a sample of the rows, -1 to 1.

    What `clustered` or `fixed` demonstrations lose against `knn`: the other score is asked for the sample only. nan
    where one of the two is constant on it. Rows without a score do not count.
    """
    drawn = sorted(np.flatnonzero(np.isfinite(scores)), key=lambda i: number(rows.examples[int(i)].id, seed))[:sample]
    if len(drawn) < 2:
        raise ValueError(f"{len(drawn)} rows with a score in a sample of {sample}; a rank correlation takes two.")
    asked = other(take(rows, np.array(drawn)), holdout)
    return spearman(jnp.asarray(scores[drawn]), jnp.asarray(asked.combine(answer(asked.requests))))


def parts(template: str, places: Sequence[str], remedy: str) -> list[str]:
    """The text before, between and after the places, each of which must stand in the template once, in this order."""
    found = [template.find(place) for place in places]
    if any(template.count(place) != 1 for place in places) or found != sorted(found):
        names = " and then ".join(places)
        raise ValueError(f"the template {template!r} must hold {names}, once each. Write, for instance, {remedy!r}.")
    pieces = []
    for place in places:
        piece, _, template = template.partition(place)
        pieces.append(piece)
    return [*pieces, template]


def _exchange(tokenizer: Tokenizer) -> tuple[str, str]:
    """One question and its answer as the chat template writes them, and what it writes before the first of them."""
    if not tokenizer.chat_template:
        return "", ""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    once, twice = (str(tokenizer.apply_chat_template(said * n, tokenize=False)) for n in (1, 2))
    again = twice.removeprefix(once)
    return once, once.removesuffix(again) if again != twice and once.endswith(again) else ""


def _literal(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a text that follows other text: some tokenizers put a space before the first word of all."""
    if not text:
        return ()
    alone, whole = tokenizer([".", "." + text], add_special_tokens=False, verbose=False)["input_ids"]
    begins = whole[: len(alone)] == alone
    return tuple(whole[len(alone) :] if begins else tokenizer(text, add_special_tokens=False)["input_ids"])
