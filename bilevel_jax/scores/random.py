"""Random scores and random numbers from hashes of example ids."""

import hashlib

import numpy as np

from bilevel_jax.scores.requests import ScoreFn, ScorePlan, TokenizedExamples, make_score_plan


def random_score(seed: int = 0) -> ScoreFn:
    """s_i ~ uniform on [0, 1), a hash of the example's id and the seed, so that it does not depend on the order.

    The baseline that every other score must beat.

    Args:
        seed: another seed, other scores.

    Returns:
        A score without requests.

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
        >>> plan = random_score(seed=0)(candidates, candidates)
        >>> plan.combine([]).shape
        (3,)
    """

    def score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
        random_values = np.array([hash_to_int(example.id, seed) for example in candidates.examples]) / 2.0**64
        requests_by_sequence: list = [[] for _ in random_values]
        return make_score_plan(
            requests_by_sequence, lambda nats, tokens: random_values, np.zeros(len(random_values), int), 0
        )

    return score


def hash_to_int(text: str, seed: int = 0) -> int:
    """64 bits that depend on the text and the seed alone: draws by id do not depend on the order of the examples."""
    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:8], "big")
