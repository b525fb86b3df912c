"""Instruction-following difficulty (IFD)."""

import numpy as np
from jaxtyping import Float

from bilevel_jax.lm.inference.loglik import LogLikRequest
from bilevel_jax.scores.requests import (
    ScoreFn,
    ScorePlan,
    TokenizedExamples,
    make_score_plan,
    make_target_requests,
    per_token,
)


def ifd_score(bos: int | None) -> ScoreFn:
    """s_i = ℓ(y_i | x_i) / ℓ(y_i), the loss of an example's last response with its prompt over that without.

    The same tokens in both, after `bos` alone in ℓ(y); where the model has no such token, ℓ(y) is the mean over all
    tokens but the first. Near 1 the prompt does not help, above 1 it misleads; its authors keep the largest below 1.
    nan for a response without tokens, or of a single token where there is no `bos`. Source:
    Li et al., arXiv 2308.12032. Wrong for short responses, whose ℓ(y) is mostly that of their first tokens.

    Args:
        bos: the BOS token of the model; None where it has none.

    Returns:
        A score; it does not read the holdout.

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
        >>> plan = ifd_score(bos=1)(candidates, candidates)
        >>> plan.combine([LogLik(-2.0, 5)] * len(plan.requests))
        array([1., 1., 1.])
    """

    def score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
        requests_by_sequence = []
        for i in range(len(candidates.examples)):
            with_prompt = make_target_requests(candidates.sequences(i)[0])[-1:]
            responses = [request.response if bos is None else (bos, *request.response) for request in with_prompt]
            requests_by_sequence += [with_prompt, [LogLikRequest(ids[:1], ids[1:]) for ids in responses]]

        def ratio(nats: Float[np.ndarray, "sequences"], tokens: Float[np.ndarray, "sequences"]) -> np.ndarray:
            losses = -per_token(nats, tokens).reshape(-1, 2)
            return losses[:, 0] / losses[:, 1]

        return make_score_plan(requests_by_sequence, ratio, np.zeros(len(candidates.examples), int), 0)

    return score
