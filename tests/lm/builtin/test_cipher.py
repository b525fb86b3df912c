"""The quickstart's files: the rules hold, no string is in two rows, the same seed writes the same bytes."""

import json

import pytest

from bilevel_jax.lm.builtin.cipher import (
    LETTERS,
    make_cipher_config,
    make_cipher_tokenizer,
    rotate_letters,
    write_cipher_data,
)
from bilevel_jax.lm.data.examples import find_leaks, load_examples
from bilevel_jax.lm.data.tokens import load_tokenizer, tokenize

PARTS = {"train": 384, "validation": 16, "dev": 16, "test": 128, "copies": 512}


def test_rotate():
    assert (
        rotate_letters("bhat", 1) == "ciba" and rotate_letters("tab", 1) == "abc" and rotate_letters("abc", -1) == "tab"
    )


def test_rules_and_counts(tmp_path):
    write_cipher_data(tmp_path)
    parts = {name: load_examples([str(tmp_path / f"{name}.jsonl")]) for name in PARTS}
    assert {name: len(part) for name, part in parts.items()} == PARTS
    for name, part in parts.items():
        for example in part:
            prompt, response = (turn.content for turn in example.turns)
            assert prompt.endswith(">") and len(prompt) == 5 and len(response) == 4
            assert set(prompt[:-1] + response) <= set(LETTERS)
            rules = {
                rotate_letters(prompt[:-1], 1): "clean",
                rotate_letters(prompt[:-1], -1): "wrong",
                prompt[:-1]: "copy",
            }
            assert example.label == rules.get(response, "noise")
            assert name == "train" or example.label == ("copy" if name == "copies" else "clean")
    labels = [example.label for example in parts["train"]]
    assert {label: labels.count(label) for label in labels} == {"clean": 128, "wrong": 128, "noise": 128}
    assert 30 < labels[:128].count("clean") < 56  # shuffled: a third of 128, 3 standard deviations
    prompts = [example.turns[0].content for part in parts.values() for example in part]
    assert len(set(prompts)) == len(prompts) == 1056
    assert not find_leaks(parts["train"], parts["validation"] + parts["dev"] + parts["test"])
    noise = "".join(e.turns[1].content for e in parts["train"] if e.label == "noise")
    assert min(map(noise.count, LETTERS)) > 0  # 512 letters of 20 kinds: 26 each, give or take 5


def read(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes(tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        write_cipher_data(tmp_path / name, seed=seed)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert read(tmp_path / "a")["train.jsonl"] != read(tmp_path / "c")["train.jsonl"]
    first = read(tmp_path / "a")["train.jsonl"].splitlines()[0]
    assert json.loads(first) == {"prompt": "hdhe>", "response": "gcgd", "label": "wrong"}  # on every machine


def test_nothing_is_overwritten_silently(tmp_path):
    write_cipher_data(tmp_path, clean=2, wrong=0, noise=0, dev=0)
    before = read(tmp_path)
    write_cipher_data(tmp_path, clean=2, wrong=0, noise=0, dev=0)
    assert read(tmp_path) == before and "dev.jsonl" not in before and len(before["train.jsonl"].splitlines()) == 2
    with pytest.raises(FileExistsError, match=r"train.jsonl: already there, with other contents. Name another folder"):
        write_cipher_data(tmp_path, clean=3, wrong=0, noise=0, dev=0)
    with pytest.raises(ValueError, match="none may be negative, and together they must be 1 to 160000 strings"):
        write_cipher_data(tmp_path / "new", clean=200_000)


def test_model_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_cipher_data(tmp_path)
    loaded = load_tokenizer(tmp_path / "untrained")
    settings = transformers.AutoConfig.from_pretrained(str(tmp_path / "untrained"))
    assert (settings.model_type, settings.vocab_size, settings.tie_word_embeddings) == ("llama", len(loaded), True)
    assert (settings.bos_token_id, settings.eos_token_id) == (loaded.bos_token_id, loaded.eos_token_id)
    assert settings.pad_token_id == loaded.pad_token_id and settings.rope_parameters["rope_theta"] == 10.0
    c = make_cipher_config()
    layer = (
        4 * (c["hidden_size"] + 1) * c["hidden_size"]
        + 3 * c["hidden_size"] * c["intermediate_size"]
        + 2 * c["hidden_size"]
    )
    assert 2 * layer + c["hidden_size"] * (c["vocab_size"] + 1) == 21_952
    examples = load_examples([str(tmp_path / "train.jsonl")])
    corpus, report = tokenize(examples, loaded, max_length=11)
    assert report.unknown_share == 0 and (corpus.lengths == 11).all() and report.num_targets == 384 * 5
    first = corpus.get_sequence(0)
    prompt, response = (turn.content for turn in examples[0].turns)
    assert make_cipher_tokenizer().decode(first.ids) == f"<s>{prompt}{response}</s>"
    assert make_cipher_tokenizer().decode(first.ids[first.target_mask]) == f"{response}</s>"
