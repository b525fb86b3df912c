"""Loss, perplexity and reducible holdout loss (RHO-loss) of an example."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from bilevel_jax.lm.inference.loglik import LogLik
from bilevel_jax.scores.requests import ScorePlan, TokenizedExamples, make_score_plan, make_target_requests, per_token


def loss_score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
    """s_i = ℓ_i = -(1/|y_i|) Σ_t log p(y_it | x_i, y_i<t), nats per token: examples that the model finds hard come
    first.

    The loss of `sft_losses` under the same tokens; of a pair, that of the chosen response. The order of online batch
    selection (Loshchilov & Hutter, arXiv 1511.06343). Wrong where labels are: noise is hard.

    Args:
        candidates: examples to score.
        holdout: not read.

    Returns:
        A plan with one score for each candidate; nan for one without any target.

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
        >>> plan = loss_score(candidates, candidates)
        >>> plan.combine([LogLik(-2.0, 5)] * len(plan.requests))
        array([0.4, 0.4, 0.4])
    """
    return _make_likelihood_plan(candidates, lambda mean: -mean)


def perplexity_score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
    """s_i = -exp(ℓ_i): examples that the model finds likely come first; the reverse order of `loss_score`.

    The filter of CCNet (Wenzek et al., arXiv 1911.00359). Wrong where the model already knows what it likes.

    Args:
        candidates: examples to score.
        holdout: not read.

    Returns:
        A plan with one score for each candidate; nan for one without any target.

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
        >>> plan = perplexity_score(candidates, candidates)
        >>> plan.combine([LogLik(0.0, 5)] * len(plan.requests))
        array([-1., -1., -1.])
    """
    return _make_likelihood_plan(candidates, lambda mean: -np.exp(-mean))


def reducible_loss(
    candidates: TokenizedExamples, model_logliks: Sequence[LogLik], holdout_model_logliks: Sequence[LogLik]
) -> Float[np.ndarray, "examples"]:
    """s_i = ℓ_i(θ) - ℓ_i(θ_holdout), nats per token: hard now, and not hard for a model that learned what is wanted.

    Low for what is known already (ℓ(θ) is small) and
    for noise (ℓ(θ_holdout) is as large). Source: Mindermann et al., arXiv 2206.07137. Wrong where the holdout is too
    small to train on: θ_holdout must generalise to the candidates.

    Args:
        candidates: examples to score.
        model_logliks: answers to the requests of `loss_score` by the model.
        holdout_model_logliks: answers to the same requests by a model that was trained on the holdout.

    Returns:
        Nats per token; nan for an example without any target.

    Raises:
        ValueError: another number of answers than requests.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import examples, tokens
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cipher.write_cipher_data(folder, clean=3, wrong=0, noise=0, copies=0)
        ...     train = examples.load_examples([f"{folder}/train.jsonl"])
        >>> corpus, report = tokens.tokenize(train, cipher.make_cipher_tokenizer(), max_length=16)
        >>> from bilevel_jax.scores.requests import make_tokenized_examples
        >>> candidates = make_tokenized_examples(train, corpus)
        >>> reducible_loss(candidates, [LogLik(-2.0, 5)] * 3, [LogLik(-1.0, 5)] * 3)
        array([0.2, 0.2, 0.2])
    """
    score = loss_score(candidates, candidates).combine
    return score(model_logliks) - score(holdout_model_logliks)


def _make_likelihood_plan(
    candidates: TokenizedExamples, score: Callable[[Float[np.ndarray, "examples"]], Float[np.ndarray, "examples"]]
) -> ScorePlan:
    requests_by_sequence = [make_target_requests(candidates.sequences(i)[0]) for i in range(len(candidates.examples))]
    return make_score_plan(
        requests_by_sequence,
        lambda nats, tokens: score(per_token(nats, tokens)),
        np.zeros(len(requests_by_sequence), int),
        0,
    )
