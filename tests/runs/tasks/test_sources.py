"""Mixtures of sources as example weights, and sources that cannot be told apart."""

from types import SimpleNamespace

import numpy as np
import pytest

from bilevel_jax.runs.tasks.sources import MAX_USAGE, find_sources, require_sources


def task(*sources, dropped=(), file="rows.jsonl", unnamed=()):
    examples = [
        SimpleNamespace(source=source, file=file, line=line, names_source=line not in unnamed)
        for line, source in enumerate(sources, 1)
    ]
    kept = np.setdiff1d(np.arange(len(sources)), dropped)
    return SimpleNamespace(examples=examples, trainable_indices=lambda: kept)


def test_a_mixture_is_the_share_of_the_weight_of_what_is_trained_on():
    sources = find_sources(task("b", "a", "a", "b", "a", "c", dropped=[4, 5]))  # all of c, and one of a
    assert sources.names == ["a", "b", "c"] and sources.counts.tolist() == [2, 2, 0]
    assert sources.natural.tolist() == [0.5, 0.5, 0] == sources.stratified().tolist()
    weights = sources.weights(np.array([0.25, 0.75, 0]))
    assert weights.tolist() == [1.5, 0.5, 0.5, 1.5, 0.5, 0]
    assert weights[:4].mean() == 1 and sources.mixture(weights).tolist() == [0.25, 0.75, 0]
    assert sources.mixture(np.ones(6)).tolist() == sources.natural.tolist()
    one = find_sources(task("a", *"bbbbbbb"))
    assert one.weights(one.stratified()).tolist() == [4.0, *[4 / 7] * 7]  # a source of one example


def test_no_example_of_a_tiny_source_weighs_more_than_the_bound():
    """Equal shares with a cap, as UniMax: what a tiny source cannot take is shared by the others."""
    sources = find_sources(task("a", "b", "b", *"c" * 40, *"d" * 57, dropped=[]))
    mixture, weights = sources.stratified(), sources.weights(sources.stratified())
    assert mixture == pytest.approx([0.15, 0.28333, 0.28333, 0.28333], abs=1e-5)
    assert weights[0] == weights.max() == pytest.approx(MAX_USAGE) and weights.mean() == pytest.approx(1)
    assert sources.stratified(2.0) == pytest.approx([0.02, 0.04, 0.47, 0.47])
    assert sources.stratified(1.0) == pytest.approx(sources.natural)


def test_one_source_and_examples_without_one_are_refused():
    with pytest.raises(ValueError, match="proxy_fit needs two sources, and every .* comes from 'web'. Set data.so"):
        require_sources(task("web", "web"), "proxy_fit")
    with pytest.raises(ValueError, match="comes from 'web'"):
        require_sources(task("book", "web", "web", dropped=[0]), "proxy_fit")
    with pytest.raises(ValueError, match=r"2 examples of a/rows.jsonl name none under .* \(the first in line 2\)"):
        require_sources(task("web", "rows", "rows", file="a/rows.jsonl", unnamed=[2, 3]), "proxy_fit")
    assert require_sources(task("web", "rows"), "proxy_fit").num_trained == 2  # a source with the name of its file
    assert require_sources(task("web", "book"), "proxy_fit").names == ["book", "web"]
    files = task("one", "two", unnamed=[1, 2])  # the files are the sources
    files.examples[0].file, files.examples[1].file = "one.jsonl", "two.jsonl"
    assert require_sources(files, "proxy_fit").names == ["one", "two"]
    same = task("train", "train", "other", unnamed=[1, 2])
    same.examples[0].file, same.examples[1].file = "a/train.jsonl", "b/train.jsonl"
    with pytest.raises(ValueError, match="a/train.jsonl and b/train.jsonl have one name"):
        require_sources(same, "proxy_fit")
