"""Which rows are shown: nearest first, never the row itself or a near-duplicate, whatever the order of the rows."""

import numpy as np
import pytest

from bilevel_jax.scores import embedding
from bilevel_jax.scores.demonstrations import demonstration_selector, iterate_near_duplicates, split_into_sets
from bilevel_jax.scores.requests import take_examples
from tests.scores.toy import rows

HOLDOUT = rows(("name a pet", "cat"), ("name a fish", "cod"), ("what is a tree", "oak"), ("what is red", "wine"))
NAMES = ["knn", "clustered:2", "fixed", "random"]


def test_nearest_first():
    found = demonstration_selector("knn")(rows(("name a pet now", "x"), ("is wine red", "x")), HOLDOUT, 2)
    assert found[0].tolist() == [0, 1] and found[1, 0] == 3


@pytest.mark.parametrize("name", NAMES)
def test_sets_share_the_best_between_them(name):
    some, choose = rows(("name a cat", "x"), ("is wine red", "x")), demonstration_selector(name)
    one, other = (choose_set(some, HOLDOUT, 2) for choose_set in split_into_sets(choose, 2))
    np.testing.assert_array_equal(np.stack([one, other], axis=2).reshape(2, 4), choose(some, HOLDOUT, 4))
    np.testing.assert_array_equal(split_into_sets(choose, 1)[0](some, HOLDOUT, 3), choose(some, HOLDOUT, 3))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_never_shown_to_itself_and_only_its_demonstrations_change(name):
    some = rows(("name a pet", "hat"), ("name a Pet", "dog"), ("name a cod", "fish"), ("what is in a tree", "owl"))
    apart, all_of_them = (
        demonstration_selector(name)(some, HOLDOUT, 3),
        demonstration_selector(name, max_similarity=2)(some, HOLDOUT, 3),
    )
    assert (apart[:2] != 0).all() and (apart >= 0).all()
    changed = (apart != all_of_them).any(axis=1)
    assert not changed[2:].any()
    np.testing.assert_array_equal(changed[:2], [0 in shown for shown in all_of_them[:2]] if name != "knn" else True)
    for with_all, without in zip(all_of_them[:2], apart[:2], strict=True):
        others = [j for j in with_all if j != 0]
        assert without[: len(others)].tolist() == others  # the rest keep their order; the next best one joins


def test_a_copy_is_excluded_though_its_question_is_not_alike():
    text = rows(("abc", "x"), ("name a pet", "cat"))
    for block, banned in iterate_near_duplicates(text, HOLDOUT, max_similarity=2):
        assert block == slice(0, 2) and banned.tolist() == [[False] * 4, [True, False, False, False]]


def test_rows_without_enough_others_get_fewer():
    same = rows(*[("name a pet", answer) for answer in ("a", "b", "c")])
    found = demonstration_selector("knn")(rows(("name a pet", "d"), ("a fish", "e")), same, 2)
    assert found.tolist() == [[-1, -1], [0, 1]]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_the_order_of_rows_change_nothing(name, monkeypatch):
    some = rows(*[(f"{a} {b} is {c}", a) for a in ("pet", "fish", "tree") for b in ("a", "red") for c in ("a", "what")])
    choose = demonstration_selector(name, max_similarity=2)
    whole = choose(some, HOLDOUT, 2)
    monkeypatch.setattr(embedding, "MAX_BLOCK_COSINES", 12)
    np.testing.assert_array_equal(choose(some, HOLDOUT, 2), whole)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(choose(take_examples(some, order), HOLDOUT, 2), whole[order])
    sets = len({*map(tuple, whole)})
    assert sets <= {"fixed": 1, "clustered:2": 2}[name] if name in ("fixed", "clustered:2") else sets > 2


def test_draws_depend_on_the_seed_and_not_on_where_holdout_rows_stand():
    some, turned = rows(("abc", "x")), take_examples(HOLDOUT, np.array([3, 2, 1, 0]))
    shown = {
        name: [demonstration_selector(name, seed=s)(some, HOLDOUT, 2)[0].tolist() for s in range(8)]
        for name in NAMES[2:]
    }
    assert all(len({*map(tuple, found)}) > 2 for found in shown.values())
    assert [[3 - j for j in demonstration_selector("fixed", seed=s)(some, turned, 2)[0]] for s in range(8)] == shown[
        "fixed"
    ]


@pytest.mark.parametrize("name", ["nearest", "clustered", "clustered:0", "clustered:x", "knn:2", "fixed:", ""])
def test_names_are_checked(name):
    with pytest.raises(ValueError, match="they are 'knn', 'clustered:K' with K > 0 clusters, 'fixed' or 'random'"):
        demonstration_selector(name)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_holdout_rows_or_clusters_are_refused(name):
    some = rows(("abc", "x"))
    with pytest.raises(ValueError, match="0 holdout rows, and k = 1 of them"):
        demonstration_selector(name)(some, take_examples(HOLDOUT, np.arange(0)), 1)
    with pytest.raises(ValueError, match="k is 0; at least one"):
        demonstration_selector(name)(some, HOLDOUT, 0)
    if name == "clustered:2":
        with pytest.raises(ValueError, match="2 clusters of 1 rows"):
            demonstration_selector(name)(some, HOLDOUT, 1)
    else:
        assert (demonstration_selector(name)(some, HOLDOUT, 1) >= 0).all()
