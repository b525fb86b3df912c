"""In-context approximation (ICA) of training on the holdout."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilevel_jax.core.certify import spearman
from bilevel_jax.lm.data.render import Tokenizer
from bilevel_jax.lm.data.tokens import TokenizedSequence
from bilevel_jax.scores.demonstrations import DemonstrationSelector
from bilevel_jax.scores.random import hash_to_int
from bilevel_jax.scores.requests import (
    LoglikFn,
    ScoreFn,
    ScorePlan,
    TokenizedExamples,
    make_score_plan,
    make_target_requests,
    per_token,
    take_examples,
)

DEMONSTRATIONS_TEMPLATE = "{demonstrations}{row}"


class DemonstrationFormat(NamedTuple):
    """How demonstrations are put before an example, in tokens; from `make_demonstration_format`."""

    bos: tuple[int, ...]
    system: tuple[int, ...]
    """A system message that the chat template adds by itself; it stands once, before the demonstrations."""
    prefix: tuple[int, ...]
    """Between that and the first demonstration."""
    demonstration_affixes: tuple[tuple[int, ...], tuple[int, ...]]
    """Before and after each demonstration."""
    separator: tuple[int, ...]
    """Between the last demonstration and the row."""
    stripped_eos: tuple[int, ...]
    """What is taken off the end of a demonstration: an EOS that training adds and no template writes."""

    def count_skipped(self, example: TokenizedSequence) -> int:
        """Tokens at the beginning of an example that the context has: BOS and the chat template's system message."""
        start = (*self.bos, *self.system)
        return len(start) if tuple(example.ids[: len(start)].tolist()) == start else len(self.bos)

    def format_demonstration(self, demonstration: TokenizedSequence) -> tuple[int, ...]:
        """One demonstration."""
        body = tuple(demonstration.ids.tolist())[self.count_skipped(demonstration) :]
        body = (
            body[: len(body) - len(self.stripped_eos)] if self.stripped_eos and body[-1:] == self.stripped_eos else body
        )
        return (*self.demonstration_affixes[0], *body, *self.demonstration_affixes[1])

    def format_context(self, pieces: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """All that stands before a row; the least wanted demonstration first, so the best is nearest to the row."""
        context_tokens = (token for piece in reversed(pieces) for token in piece)
        return (*self.bos, *self.system, *self.prefix, *context_tokens, *self.separator)

    def select_fitting(
        self, pieces: Sequence[tuple[int, ...]], num_example_tokens: int, max_length: int
    ) -> list[tuple[int, ...]]:
        """The pieces, best first, that fit before a row of so many tokens beyond those that it skips."""
        room = max_length - num_example_tokens - len(self.format_context([]))
        fits = []
        for piece in pieces:
            if len(piece) <= room:
                fits.append(piece)
                room -= len(piece)
        return fits


def make_demonstration_format(
    tokenizer: Tokenizer, template: str = DEMONSTRATIONS_TEMPLATE, demonstration_template: str = ""
) -> DemonstrationFormat:
    """The tokens around demonstrations, from templates.

    An example and a demonstration are the very tokens that training reads, by its chat template or its plain one,
    without their BOS. So the tokens of a response are the same with and without demonstrations, all rows with the same
    demonstrations begin with the same tokens, and no text of a row can pass for a part of a template. The default for
    `demonstration_template` is "{demonstration}" and the white space that the tokenizer's chat template writes between
    exchanges, or an empty line where it has none: then demonstrations are what earlier exchanges of one dialogue are.
    A system message of the example's own comes after the demonstrations.

    Args:
        tokenizer: that of training.
        template: the text around all demonstrations, with {demonstrations} and {row}, which ends it.
        demonstration_template: the text around each demonstration, with {demonstration}; "": the default.

    Returns:
        The tokens.

    Raises:
        ValueError: a template without its placeholders, or with text after {row}.
    """
    exchange, system = _chat_template_exchange(tokenizer)
    space = exchange[len(exchange.rstrip()) :] if exchange else "\n\n"
    before, behind, after_row = split_template(template, ("{demonstrations}", "{row}"), DEMONSTRATIONS_TEMPLATE)
    if after_row:
        raise ValueError(
            f"the template {template!r} goes on after {{row}}, which the model would not read. End it there."
        )
    affixes = split_template(
        demonstration_template or "{demonstration}" + space, ("{demonstration}",), "{demonstration}\n\n"
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    template_writes_eos = eos is None or exchange.rstrip().endswith(str(tokenizer.eos_token))
    return DemonstrationFormat(
        bos=() if bos is None else (bos,),
        system=tuple(i for i in _tokenize_literal(system, tokenizer) if i != bos),
        prefix=_tokenize_literal(before, tokenizer),
        demonstration_affixes=(_tokenize_literal(affixes[0], tokenizer), _tokenize_literal(affixes[1], tokenizer)),
        separator=_tokenize_literal(behind, tokenizer),
        stripped_eos=() if template_writes_eos else (eos,),
    )


def ica_score(
    demonstration_format: DemonstrationFormat,
    choose: DemonstrationSelector,
    *,
    max_length: int,
    k: int = 3,
    per_token_mean: bool = True,
) -> ScoreFn:
    """s_i = log p(y_i | C_i, x_i) - log p(y_i | x_i), where C_i are k holdout examples as demonstrations, x_i the
    prompt.

    Of a preference pair, the change of its margin m = log p(y_w | x) - log p(y_l | x), without beta or a reference
    model; demonstrations show chosen responses, and exchanging the two sides changes the sign of s. `per_token_mean`
    divides each log p by the number of its tokens, as the losses of training do: nats per token. The published score
    sums: nats per response, which grows with its length.

    Demonstrations that do not fit into `max_length` tokens with the example are left out, the least wanted first;
    `num_holdout` is the number that was shown, and an example with none has score 0. Source: arXiv 2510.14459, which
    reads s as a first approximation of what training on the holdout would change for example i. Wrong where the model
    does not learn in context, or where demonstrations tell it the format rather than what is right.

    Args:
        demonstration_format: from `make_demonstration_format`.
        choose: which holdout examples are shown; from `demonstration_selector`.
        max_length: tokens of an example with its demonstrations.
        k: demonstrations of each example.
        per_token_mean: whether log p is divided by the number of tokens.

    Returns:
        A score. It raises ValueError for a holdout of fewer than k examples and for examples longer than max_length.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import examples, tokens
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cipher.write_cipher_data(folder, clean=3, wrong=0, noise=0, copies=0)
        ...     train = examples.load_examples([f"{folder}/train.jsonl"])
        >>> corpus, report = tokens.tokenize(train, cipher.make_cipher_tokenizer(), max_length=16)
        >>> from bilevel_jax.lm.inference.loglik import LogLik
        >>> from bilevel_jax.scores.requests import make_tokenized_examples
        >>> candidates = make_tokenized_examples(train, corpus)
        >>> from bilevel_jax.scores.demonstrations import demonstration_selector
        >>> demonstrations = make_demonstration_format(cipher.make_cipher_tokenizer())
        >>> score = ica_score(demonstrations, demonstration_selector("knn"), max_length=32, k=1)
        >>> plan = score(candidates, candidates)
        >>> plan.combine([LogLik(-2.0, 5)] * len(plan.requests))
        array([0., 0., 0.])
    """

    def score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
        chosen = choose(candidates, holdout, k)
        pieces = {
            int(j): demonstration_format.format_demonstration(holdout.sequences(j)[0])
            for j in np.unique(chosen[chosen >= 0])
        }
        requests_by_sequence, num_holdout = [], np.zeros(len(candidates.examples), int)
        for i in range(len(candidates.examples)):
            sides = candidates.sequences(i)
            longest = max(len(side.ids) for side in sides)
            skip = demonstration_format.count_skipped(sides[0])
            if longest > max_length:
                where = candidates.examples[i].where
                raise ValueError(
                    f"{where}: {longest} tokens, and max_length is {max_length}. Raise it, or drop the row."
                )
            ranked_pieces = (
                [pieces[j] for j in chosen[i].tolist() if j >= 0] if longest else []
            )  # 0: a row dropped as too long
            fitting_pieces = demonstration_format.select_fitting(ranked_pieces, longest - skip, max_length)
            num_holdout[i] = len(fitting_pieces)
            head, skip = (demonstration_format.format_context(fitting_pieces), skip) if fitting_pieces else ((), 0)
            requests_by_sequence += [make_target_requests(side) for side in sides] + [
                make_target_requests(side, head, skip) for side in sides
            ]
        sequences = candidates.corpus.sequences_per_example

        def change(nats: Float[np.ndarray, "sequences"], tokens: Float[np.ndarray, "sequences"]) -> np.ndarray:
            values = per_token(nats, tokens if per_token_mean else np.sign(tokens)).reshape(-1, 2, sequences)
            margins = values[..., 0] - values[..., 1] if sequences == 2 else values[..., 0]
            return margins[:, 1] - margins[:, 0]

        return make_score_plan(requests_by_sequence, change, num_holdout, k)

    return score


def measure_rank_agreement(
    scores: Float[np.ndarray, "examples"],
    other_score: ScoreFn,
    candidates: TokenizedExamples,
    holdout: TokenizedExamples,
    loglik_fn: LoglikFn,
    *,
    sample_size: int = 200,
    seed: int = 0,
) -> float:
    """Spearman's rank correlation of the scores with another score of a sample of the rows, -1 to 1.

    What `clustered` or `fixed` demonstrations lose against `knn`: the other score is asked for the sample only. nan
    where one of the two is constant on it. Rows without a score do not count.
    """
    sampled_indices = sorted(
        np.flatnonzero(np.isfinite(scores)), key=lambda i: hash_to_int(candidates.examples[int(i)].id, seed)
    )[:sample_size]
    if len(sampled_indices) < 2:
        raise ValueError(
            f"{len(sampled_indices)} rows with a score in a sample of {sample_size}; a rank correlation takes two."
        )
    other_plan = other_score(take_examples(candidates, np.array(sampled_indices)), holdout)
    return spearman(
        jnp.asarray(scores[sampled_indices]), jnp.asarray(other_plan.combine(loglik_fn(other_plan.requests)))
    )


def split_template(template: str, placeholders: Sequence[str], example_template: str) -> list[str]:
    """The text before, between and after the places, each of which must stand in the template once, in this order."""
    offsets = [template.find(placeholder) for placeholder in placeholders]
    if any(template.count(placeholder) != 1 for placeholder in placeholders) or offsets != sorted(offsets):
        names = " and then ".join(placeholders)
        raise ValueError(
            f"the template {template!r} must hold {names}, once each. Write, for instance, {example_template!r}."
        )
    pieces = []
    for placeholder in placeholders:
        piece, _, template = template.partition(placeholder)
        pieces.append(piece)
    return [*pieces, template]


def _chat_template_exchange(tokenizer: Tokenizer) -> tuple[str, str]:
    """One question and its answer as the chat template writes them, and what it writes before the first of them."""
    if not tokenizer.chat_template:
        return "", ""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    one_exchange, two_exchanges = (str(tokenizer.apply_chat_template(messages * n, tokenize=False)) for n in (1, 2))
    second_exchange = two_exchanges.removeprefix(one_exchange)
    return one_exchange, one_exchange.removesuffix(
        second_exchange
    ) if second_exchange != two_exchanges and one_exchange.endswith(second_exchange) else ""


def _tokenize_literal(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a text that follows other text: some tokenizers put a space before the first word of all."""
    if not text:
        return ()
    prefix_ids, joined_ids = tokenizer([".", "." + text], add_special_tokens=False, verbose=False)["input_ids"]
    has_prefix = joined_ids[: len(prefix_ids)] == prefix_ids
    return tuple(
        joined_ids[len(prefix_ids) :] if has_prefix else tokenizer(text, add_special_tokens=False)["input_ids"]
    )
