"""Questions as vectors: TF-IDF by its formula, hidden states whatever the batch; cosines in blocks; clusters."""

from collections import Counter

import jax
import numpy as np
import pytest

from bilevel_jax.lm.models import init_params as fresh
from bilevel_jax.lm.models import make_decoder
from bilevel_jax.scores import embedding
from bilevel_jax.scores.embedding import (
    cosine_similarities,
    extract_question,
    hidden_states,
    iterate_blocks,
    spherical_kmeans,
    tfidf,
)
from bilevel_jax.scores.requests import take_examples
from tests.lm.data.test_tokens import TALK, TEXT, example
from tests.lm.pairs_and_rows import TINY
from tests.scores.toy import rows

HOLDOUT = rows(("name a pet", "cat"), ("name a fish a fish", "cod"), ("what is a tree", "oak"))
ROWS = rows(("a pet fish", "x"), ("xylo", "x"), ("name a pet", "x"), ("", "x"))


def test_tfidf_is_its_formula():
    texts = [extract_question(e).split() for e in (*ROWS.examples, *HOLDOUT.examples)]
    words = sorted({word for text in texts for word in text})
    held = [text for text in texts[len(ROWS.examples) :]]
    idf = [np.log((1 + len(held)) / (1 + sum(word in text for text in held))) + 1 for word in words]
    table = np.array([[Counter(text)[word] for word in words] for text in texts]) * idf
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-30)
    one, other = tfidf(ROWS, HOLDOUT)
    expected = table[: len(ROWS.examples)] @ table[len(ROWS.examples) :].T
    np.testing.assert_allclose(cosine_similarities(one, other), expected, atol=1e-14)
    assert abs(expected[2, 0] - 1) < 1e-14 and (expected[[1, 3]] == 0).all()


def test_a_vector_depends_on_its_row_and_the_holdout_alone():
    alone = tfidf(take_examples(ROWS, np.array([0])), HOLDOUT)[0]
    np.testing.assert_array_equal(alone.toarray(), tfidf(ROWS, HOLDOUT)[0].toarray()[:1])


def test_a_question_is_what_the_user_says_or_the_text():
    assert extract_question(TALK) == "Name a pet.\nWhich one?" and extract_question(TEXT) == TEXT.turns[0].content
    assert extract_question(example("Be kind.", "Hi", "Hello", roles=("system", "user", "assistant"))) == "Hi"
    assert embedding.WORD_PATTERN.findall("it's x_1 猫と犬 été") == ["it", "s", "x_1", "猫", "と", "犬", "été"]


def test_hidden_states_are_means_over_the_prompt_whatever_stands_beside_it():
    model = make_decoder(TINY, remat="none")
    params = fresh(TINY, jax.random.key(0))
    some = rows(*[("name a pet and " * n + "x", "cat" * m) for n, m in ((0, 3), (1, 1), (2, 2), (3, 1))])
    found, other = hidden_states(model, params, batch_size=3)(some, take_examples(some, np.array([2])))
    tokens, real, prompt = (np.zeros((4, 64), np.int32) for _ in range(3))
    for i in range(4):
        ids, supervised, _ = some.sequences(i)[0]
        tokens[i, : len(ids)], real[i, : len(ids)], prompt[i, : len(ids)] = ids, 1, ~supervised
    # the whole rows: what stands before a token does not see it
    states = np.asarray(
        jax.jit(model.hidden)(params, tokens, np.tile(np.arange(64, dtype=np.int32), (4, 1)), real), float
    )
    mean = (states * prompt[..., None]).sum(1) / prompt.sum(1, keepdims=True)
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)  # float32
    np.testing.assert_allclose(cosine_similarities(found, other)[:, 0], found @ found[2], atol=1e-6)
    text = take_examples(some, np.array([2]))._replace(examples=[TEXT])
    whole = (states[2] * real[2, :, None]).sum(0)
    assert abs(hidden_states(model, params, batch_size=3)(text, text)[0][0] @ whole / np.linalg.norm(whole) - 1) < 1e-6


@pytest.mark.parametrize("count", [0, 1, 5, 12, 100])
def test_blocks_cover_all_rows_once_in_bounded_memory(count, monkeypatch):
    monkeypatch.setattr(embedding, "MAX_BLOCK_COSINES", 12)
    found = list(iterate_blocks(count, 3))
    assert [i for block in found for i in range(block.start, block.stop)] == list(range(count))
    assert all(block.stop - block.start <= 4 for block in found)


@pytest.mark.parametrize("dense", [True, False])
def test_clusters_find_groups(dense):
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 20)
    vectors = np.eye(3)[group] + 0.1 * rng.normal(size=(60, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centroids, found = spherical_kmeans(vectors if dense else embedding.sparse.csr_array(vectors), 3, seed=1)
    assert len({*zip(group.tolist(), found.tolist(), strict=True)}) == 3
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(np.argmax(vectors @ centroids.T, axis=1), found)


def test_clusters_of_copies_and_of_nothing_in_common_are_finite():
    for vectors in (np.ones((4, 1)), np.zeros((4, 2))):
        centroids, found = spherical_kmeans(vectors, 3, seed=0)
        assert np.isfinite(centroids).all() and found.shape == (4,)
    with pytest.raises(ValueError, match="5 clusters of 4 rows; between 1 and the number of rows"):
        spherical_kmeans(np.ones((4, 1)), 5, seed=0)


def test_padding_beyond_the_last_learned_position_is_not_read():
    def hidden(params, tokens, positions, segments):
        states = jax.nn.one_hot(tokens, TINY.width)
        return jax.numpy.where(segments[..., None] == 0, jax.numpy.nan, states)

    embed = hidden_states(make_decoder(TINY)._replace(hidden=hidden), {}, batch_size=4)
    found = embed(rows(("abba", "x"), ("a", "x")), HOLDOUT)[0]  # counts of BOS, a, b; of unit length
    np.testing.assert_allclose(found[:, :3], [[1 / 3, 2 / 3, 2 / 3], [0.5**0.5, 0.5**0.5, 0]], rtol=1e-6)
