"""Orders are permutations without tables; batches hold the same examples packed or not, split or whole."""

import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from bilevel_jax.core.types import PADDING
from bilevel_jax.lm.data.batches import (
    BatchShape,
    fit_batch_shape,
    fit_evaluation_batch_shape,
    make_evaluation_stream,
    make_train_stream,
    padded_max_length,
    permute_indices,
    sequential_order,
    shuffled_order,
    shuffled_subset_order,
    steps_per_epoch,
)
from bilevel_jax.lm.data.tokens import TokenizedSequence, corpus_from_sequences

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 99, 100, 101, 1000, 4097]


def corpus(rows, seed=0, longest=12, sequences=1):
    """Sequences of 2 to `longest` tokens, all tokens different, the last half of each supervised."""
    rng = np.random.default_rng(seed)
    out, at = [], 1
    for n in rng.integers(2, longest + 1, rows * sequences):
        mask = np.arange(n) >= max(n // 2, 1)
        out.append(TokenizedSequence(np.arange(at, at + n, dtype=np.int32), mask))
        at += n
    made = corpus_from_sequences(out, sequences)
    return made.with_reference_margins(rng.normal(size=rows)) if sequences == 2 else made


@pytest.mark.parametrize("size", SIZES)
def test_permutation_is_a_bijection(size):
    for seed, epoch in [(0, 0), (1, 0), (0, 1), (-5, 3), (2**70, 10**6)]:
        assert sorted(permute_indices(np.arange(size), size, seed, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_permutations_are_all_equally_likely(size):
    counts = Counter(tuple(permute_indices(np.arange(size), size, 0, epoch)) for epoch in range(2400))
    kinds = {2: 2, 3: 6, 4: 24}[size]
    expected = 2400 / kinds
    assert len(counts) == kinds
    # chi-square: mean kinds - 1, standard deviation sqrt(2 (kinds - 1)); 5 of them
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < kinds - 1 + 5 * (2 * (kinds - 1)) ** 0.5


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_positions_are_uniform_and_epochs_and_seeds_are_unrelated(size):
    draws = np.stack([permute_indices(np.arange(size), size, seed, epoch) for seed in range(20) for epoch in range(20)])
    for places in (draws[:, 0], draws[:, size // 2], draws[:, -1]):
        counts = np.histogram(places, bins=10, range=(0, size))[0]
        assert ((counts - 40) ** 2 / 40).sum() < 9 + 5 * 18**0.5  # chi-square with 9 degrees of freedom, 5 deviations
    pairs = np.histogram2d(draws[:, 0], draws[:, 1], bins=5, range=[(0, size)] * 2)[0] / len(draws)
    chance = (size / 5) ** 2 / (size * (size - 1)) * (1 - np.eye(5) * 5 / size)
    assert (((pairs - chance) ** 2 / chance).sum() * len(draws)) < 24 + 5 * 48**0.5
    steps = np.diff(draws, axis=1)  # neighbours must not stay neighbours
    assert abs((steps == 1).mean() - 1 / size) < 5 / np.sqrt(steps.size * size)
    ranks = draws - (size - 1) / 2
    cosines = (ranks[1:] * ranks[:-1]).sum(1) / (ranks**2).sum(1)[0]
    assert abs(cosines.mean()) < 5 / np.sqrt(size * len(cosines)) and abs(cosines).max() < 5 / np.sqrt(size - 1)


def test_seed_and_epoch_do_not_change_places():
    keys = [(seed, epoch) for seed in range(8) for epoch in range(8)]
    assert len({tuple(permute_indices(np.arange(50), 50, *key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("rows, batch", [(1, 1), (1, 4), (2, 4), (3, 2), (10, 5), (10, 4), (1000, 64)])
def test_every_epoch_covers_every_row_once(rows, batch):
    draw, steps = shuffled_order(rows, batch, 3), steps_per_epoch(rows, batch)
    epochs = [np.concatenate([draw(e * steps + s) for s in range(steps)]) for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == steps * batch
        assert sorted(epoch[:rows]) == list(range(rows)) and (epoch[rows:] == rows).all()
    if rows == 1000:
        assert (epochs[0][:rows] == epochs[1][:rows]).mean() < 0.01  # 1 of 1000 by chance
        assert (draw(1) == shuffled_order(rows, batch, 4)(1)).mean() < 0.2
        assert (draw(17) == shuffled_order(rows, batch, 3)(17)).all()  # no state


def test_ten_million_rows_cost_what_ten_do():
    draw = shuffled_order(10**7, 64, 0)
    draw(0)
    tracemalloc.start()
    chosen = np.concatenate([draw(step) for step in (1, 10**5, 10**9)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000  # bytes; one table of the rows would be 80 million
    assert len(set(chosen)) == 192 and chosen.max() < 10**7 and chosen.max() > 9 * 10**6


def test_building_a_batch_does_not_touch_the_whole_corpus():
    many = 200_000
    flat = np.arange(many * 5, dtype=np.int32)
    big = corpus_from_sequences([TokenizedSequence(flat[:5], np.ones(5, bool))])
    big = type(big)(flat, np.ones(many * 5, bool), np.arange(0, many * 5 + 1, 5))
    stream = make_train_stream(big, shuffled_order(many, 8, 0), 10, BatchShape(2, 4, 4, 8))
    stream.batch(0)
    tracemalloc.start()
    stream.batch(5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000  # bytes; the offsets alone are 1.6 million


def test_subset_keeps_the_numbers_of_the_whole_table():
    chosen = [3, 11, 40, 41, 99]
    draw = shuffled_subset_order(chosen, 100, 2, 0)
    drawn = np.concatenate([draw(step) for step in range(3)])
    assert sorted(drawn) == [*chosen, 100] and drawn[-1] == 100
    data = corpus(100)
    stream = make_train_stream(
        data,
        draw,
        3,
        fit_batch_shape(data, [draw], 3, num_micro_batches=1, length=padded_max_length(data), packing=False),
    )
    assert set(np.concatenate([stream.batch(s)["index"].ravel() for s in range(3)])) == {*chosen, PADDING}
    assert [float(stream.batch(s)["num_examples"][0]) for s in range(3)] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"chosen rows lie in 3..100; the corpus has 0..99"):
        shuffled_subset_order([3, 100], 100, 2, 0)
    with pytest.raises(ValueError, match="0 rows in batches of 2: both must be at least 1"):
        shuffled_subset_order([], 100, 2, 0)


def contents(batch):
    """What a global step holds, whatever its layout: {sequence: its (token, target, supervised) in order}."""
    micro, rows, length = batch["tokens"].shape
    empty = batch["supervised"].shape[1]
    sequences = empty // batch["index"].shape[1]
    found = {}
    for m in range(micro):
        for r in range(rows):
            segments = batch["segments"][m, r]
            assert (batch["slot"][m, r][segments == 0] == empty).all()
            for segment in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == segment)
                assert (np.diff(here) == 1).all()
                assert (batch["positions"][m, r, here] == np.arange(len(here))).all()
                slots = set(batch["slot"][m, r, here]) - {empty}
                assert len(slots) == 1
                slot = slots.pop()
                supervised = batch["slot"][m, r, here] == slot
                assert batch["supervised"][m, slot] == supervised.sum()
                row = int(batch["index"][m, slot // sequences]) * sequences + slot % sequences
                assert row not in found
                places = zip(batch["tokens"][m, r, here], batch["targets"][m, r, here], supervised, strict=True)
                found[row] = [tuple(map(int, place)) for place in places]
    real = [i for i in batch["index"].ravel() if i != PADDING]
    assert sorted(found) == sorted(i * sequences + side for i in real for side in range(sequences))
    assert (batch["supervised"][np.repeat(batch["index"] == PADDING, sequences, axis=1)] == 1).all()
    return found


def test_short_sequences_are_padded_by_an_eighth_at_most():
    def pad(places):
        return padded_max_length(SimpleNamespace(lengths=np.array([2, places + 1])))

    padded = {places: pad(places) for places in range(1, 300)}
    assert [padded[places] for places in (1, 10, 16, 17, 31, 33, 63, 65, 100)] == [1, 10, 16, 18, 32, 36, 64, 72, 104]
    assert all(places <= length <= places * 1.125 for places, length in padded.items() if places < 64)
    assert all(length % 8 == 0 and length - places < 8 for places, length in padded.items() if places >= 64)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro", [1, 2, 16])
@pytest.mark.parametrize("sequences", [1, 2])
def test_composition_is_the_same_whatever_the_layout(sequences, micro, packing):
    data, steps = corpus(39, sequences=sequences), 6
    draws = [shuffled_order(39, 16, seed) for seed in range(3)]
    shape = fit_batch_shape(
        data, draws, steps, num_micro_batches=micro, length=padded_max_length(data), packing=packing
    )
    assert shape.num_micro_batches * shape.examples == 16 and shape.length == int(data.lengths.max()) - 1 == 11
    if packing and micro == 1:
        assert shape.rows * shape.length <= 160 * sequences  # 16 examples of 1 to 11 places, 176 without packing
    if not packing:
        assert shape == shape.unpacked and shape.rows == shape.examples * sequences
    for draw in draws:
        stream = make_train_stream(data, draw, steps, shape)
        for step in range(steps):
            batch = stream.batch(step)
            assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
                "tokens": ((micro, shape.rows, 11), "int32"),
                "targets": ((micro, shape.rows, 11), "int32"),
                "positions": ((micro, shape.rows, 11), "int32"),
                "segments": ((micro, shape.rows, 11), "int32"),
                "slot": ((micro, shape.rows, 11), "int32"),
                "index": ((micro, shape.examples), "int32"),
                "supervised": ((micro, shape.examples * sequences), "float32"),
                "num_examples": ((micro,), "float32"),
                "targeted": ((micro,), "float32"),
            } | ({"reference": ((micro, shape.examples), "float32")} if sequences == 2 else {})
            real = [int(i) for i in draw(step) if i < 39]
            found = contents(batch)
            assert sorted(found) == sorted(i * sequences + side for i in real for side in range(sequences))
            assert (batch["num_examples"] == len(real)).all()
            assert (
                batch["targeted"] == sum(data.get_sequence(*divmod(j, sequences)).target_mask[1:].sum() for j in found)
            ).all()
            assert [i for i in batch["index"].ravel() if i != PADDING] == real
            if sequences == 2:
                there = batch["index"] != PADDING
                np.testing.assert_array_equal(
                    batch["reference"][there], data.reference_margins[real].astype(np.float32)
                )
                assert not batch["reference"][~there].any()
            for sequence, places in found.items():
                ids, mask, _ = data.get_sequence(*divmod(sequence, sequences))
                assert places == list(zip(ids[:-1].tolist(), ids[1:].tolist(), mask[1:].astype(int), strict=True))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("sequences", [1, 2])
def test_evaluation_covers_every_row_once_in_order(sequences, packing):
    data = corpus(11, sequences=sequences)
    shape = fit_evaluation_batch_shape(data, 4, num_micro_batches=2, length=20, packing=packing)
    stream = make_evaluation_stream(data, shape)
    assert stream.steps == 3
    batches = [stream.batch(step) for step in range(3)]
    index = np.concatenate([b["index"].ravel() for b in batches])
    assert index.tolist() == [*range(11), PADDING]
    found = [contents(b) for b in batches]
    assert sorted(sequence for one in found for sequence in one) == list(range(11 * sequences))
    targets = sum(wanted for one in found for places in one.values() for *_, wanted in places)
    assert all((b["num_examples"] == 11).all() and (b["targeted"] == targets).all() for b in batches)


def test_summed_stream_counts_the_rows_that_it_holds():
    data, chosen = corpus(30), np.arange(3, 25)
    draw = shuffled_subset_order(chosen, 30, 8, 0)
    stream = make_train_stream(data, draw, 3, BatchShape(2, 4, 4, 16), total_examples=len(chosen))
    batches = [stream.batch(step) for step in range(3)]
    targets = sum(data.get_sequence(int(i)).target_mask[1:].sum() for i in chosen)
    assert all((b["num_examples"] == 22).all() and (b["targeted"] == targets).all() for b in batches)
    assert sum((b["slot"] < 4).sum() for b in batches) == targets


def test_sides_of_a_pair_lie_side_by_side():
    data, draw = corpus(8, sequences=2), shuffled_order(8, 4, 0)
    flat = fit_batch_shape(data, [draw], 2, num_micro_batches=1, length=16, packing=False)
    for batch in (make_train_stream(data, draw, 2, flat._replace(rows=rows)).batch(0) for rows in (8, 16)):
        for e, row in enumerate(batch["index"][0]):
            for side in range(2):
                ids = data.get_sequence(row, side).ids
                assert batch["tokens"][0, 2 * e + side, : len(ids) - 1].tolist() == ids[:-1].tolist()


def test_dropped_rows_keep_their_numbers_and_are_never_drawn():
    full = corpus(6)
    parts = [
        full.get_sequence(i) if i != 2 else TokenizedSequence(np.zeros(0, np.int32), np.zeros(0, bool))
        for i in range(6)
    ]
    data = corpus_from_sequences(parts)
    assert data.kept_indices.tolist() == [0, 1, 3, 4, 5] and data.num_examples == 6
    stream = make_evaluation_stream(
        data, fit_evaluation_batch_shape(data, 2, num_micro_batches=1, length=16, packing=False)
    )
    index = np.concatenate([stream.batch(s)["index"].ravel() for s in range(stream.steps)])
    assert index.tolist() == [0, 1, 3, 4, 5, PADDING] and stream.batch(0)["num_examples"][0] == 5
    with pytest.raises(
        ValueError,
        match="row 2 was dropped by `tokenize`. Draw from `corpus.kept_indices` with `shuffled_subset_order`",
    ):
        make_train_stream(data, sequential_order(range(6), 6, 6), 1, BatchShape(1, 6, 6, 16)).batch(0)


def test_spare_rows_stay_empty():
    data, draw = corpus(20), shuffled_order(20, 4, 0)
    exact, spare = (make_train_stream(data, draw, 5, BatchShape(1, 4, rows, 16)).batch(2) for rows in (4, 8))
    assert contents(exact) == contents(spare)
    assert (spare["tokens"][:, :4] == exact["tokens"]).all() and not spare["segments"][:, 4:].any()


def test_errors_of_layouts():
    data = corpus(20)
    draw = shuffled_order(20, 4, 0)
    with pytest.raises(ValueError, match=r"row \d+ takes 11 token places, but a row of the batch has 6. Raise length"):
        fit_batch_shape(data, [draw], 2, num_micro_batches=1, length=6, packing=True)
    with pytest.raises(ValueError, match="a batch of 4 examples does not split into 3 micro-batches"):
        fit_batch_shape(data, [draw], 2, num_micro_batches=3, length=16, packing=True)
    with pytest.raises(ValueError, match="a step of 4 examples does not fit 2 micro-batches of 4"):
        make_train_stream(data, draw, 1, BatchShape(2, 4, 4, 16)).batch(0)
    with pytest.raises(
        ValueError, match="the batch shape has 1 sequences for each example and the corpus 2; make the shape"
    ):
        make_train_stream(corpus(20, sequences=2), draw, 1, BatchShape(1, 4, 4, 16)).batch(0)
    pairs = corpus(20, sequences=2, longest=40)
    row = int(pairs.lengths.argmax()) // 2
    with pytest.raises(ValueError, match=rf"row {row} takes {pairs.lengths.max() - 1} token places"):
        fit_batch_shape(pairs, [draw], 2, num_micro_batches=1, length=16, packing=False)
    with pytest.raises(ValueError, match=r"needs \d rows and has 1. Give its order to `fit_batch_shape` as well"):
        make_train_stream(data, draw, 1, BatchShape(1, 4, 1, 12)).batch(0)
