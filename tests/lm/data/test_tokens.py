"""Exactly one BOS, an end token, and a mask that decodes to the response, whatever tokenizer and template."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bilevel_jax.lm.builtin.cipher import make_cipher_tokenizer as cipher_tokenizer
from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.lm.data.tokens import TokenizedSequence, corpus_from_sequences, load_tokenizer, tokenize
from bilevel_jax.lm.data.turns import turn_to_message

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|head|>' + m.role + '\n' + m.content + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|eot|>' }}{% endgeneration %}{% else %}{{ m.content + '<|eot|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
OUTSIDE = BLOCKS.replace("+ '<|eot|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|eot|>' }}")
ONE_BLOCK = BLOCKS.replace("== 'assistant'", "== 'assistant' and loop.last")
PLAIN = (  # no special tokens, no generation prompt
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
)
LLAMA2 = (  # every exchange is a document of its own
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% else %}"
    "{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)
THINKING = (  # what stands before an answer goes once it is not the last: the prompt is no prefix
    "{% for m in messages %}{{ '<|head|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '(thinks) ' }}{% endif %}{{ m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n(thinks) ' }}{% endif %}"
)


def bpe(template=None, bos="<|begin|>", eos="<|eot|>"):
    """A byte-level BPE as of Llama 3, whose post-processor puts BOS in front once more."""
    special = ["<|begin|>", "<|eot|>", "<|end|>", "<|head|>", "<|/head|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["user assistant system Name a pet. A cat, or a dog.\n\nWhich one is it? The cat is."] * 4
    inner.train_from_iterator(text, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    if bos:
        inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    out = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, chat_template=template)
    out.add_special_tokens({"additional_special_tokens": special})
    out.bos_token, out.eos_token = bos, eos
    return out


def example(*contents, roles=("user", "assistant"), line=1):
    roles = [roles[i % len(roles)] for i in range(len(contents))] if len(contents) > 1 else ["text"]
    return Example(f"{line:x}#0", 0, tuple(map(Turn, roles, contents)), "mine", None, "rows.jsonl", line)


def runs(row, tokenizer):
    """The decoded text of each run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.target_mask, [0]]).astype(int)))
    return [tokenizer.decode(row.ids[a:b]) for a, b in edges.reshape(-1, 2)]


PAIR = example("Name a pet.", "A cat, 猫!")
TALK = example("Name a pet.", "A cat", "Which one?", "The cat\nis it.")
TALK_TEXT = [turn.content for turn in TALK.turns]
TEXT = example("The cat is.\n Or a dog?")
TABLE = [
    ("llama3", bpe(LLAMA3), PAIR, ["A cat, 猫!<|eot|>"]),
    ("llama3 talk", bpe(LLAMA3), TALK, ["A cat<|eot|>", "The cat\nis it.<|eot|>"]),
    ("another eos", bpe(LLAMA3, eos="<|end|>"), PAIR, ["A cat, 猫!<|eot|><|end|>"]),
    ("no bos, no eos", bpe(CHATML, bos=None, eos=None), TALK, ["A cat<|eot|>", "The cat\nis it.<|eot|>"]),
    ("template without bos", bpe(CHATML), TALK, ["A cat<|eot|>", "The cat\nis it.<|eot|>"]),
    ("generation blocks", bpe(BLOCKS), TALK, ["A cat<|eot|>", "The cat\nis it.<|eot|>"]),
    ("blocks without the end", bpe(OUTSIDE), TALK, ["A cat<|eot|>", "The cat\nis it.<|eot|>"]),
    ("blocks, text row", bpe(BLOCKS), TEXT, ["The cat is.\n Or a dog?<|eot|>"]),
    ("headers, no generation prompt", bpe(PLAIN), TALK, ["A cat\n", "The cat\nis it.<|eot|>"]),
    ("llama2", bpe(LLAMA2), TALK, [" A cat <|eot|>", " The cat\nis it. <|eot|>"]),
    ("no template", bpe(), PAIR, ["A cat, 猫!<|eot|>"]),
    ("no template, no bos", bpe(bos=None), PAIR, ["A cat, 猫!<|eot|>"]),
    ("empty prompt", bpe(), example("", "A cat"), ["A cat<|eot|>"]),
    ("text", bpe(), TEXT, ["The cat is.\n Or a dog?<|eot|>"]),
    ("cipher", cipher_tokenizer(), example("bhace>", "cibdf"), ["cibdf</s>"]),
]


@pytest.mark.parametrize("name, tokenizer, row, wanted", TABLE, ids=[row[0] for row in TABLE])
def test_mask_decodes_to_the_response(name, tokenizer, row, wanted):
    corpus, report = tokenize([row], tokenizer, max_length=200)
    out = corpus.get_sequence(0)
    assert runs(out, tokenizer) == wanted
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert not out.target_mask[0] and out.target_mask[-1]
    if bos is not None and "llama2" not in name:
        assert out.ids[0] == bos and (out.ids == bos).sum() == 1
    if eos is not None:
        assert out.ids[-1] == eos and out.ids[-2] != eos
    assert (out.ids.dtype, out.target_mask.dtype) == (np.int32, bool)
    assert (report.num_examples, report.num_tokens, report.num_targets) == (1, len(out.ids), out.target_mask.sum())
    assert report.max_length == len(out.ids) and report.truncated == report.dropped == report.merged == 0


def test_llama2_begins_with_one_bos_though_the_template_writes_one_per_exchange():
    tokenizer = bpe(LLAMA2)
    ids = tokenize([TALK], tokenizer, max_length=200)[0].ids
    assert [int(i) for i in np.flatnonzero(ids == tokenizer.bos_token_id)][0] == 0
    assert (ids == tokenizer.bos_token_id).sum() == 2


def test_prompt_is_what_generation_will_be_given():
    tokenizer = bpe(LLAMA3)
    out = tokenize([PAIR], tokenizer, max_length=200)[0].get_sequence(0)
    asked = tokenizer.apply_chat_template(
        [turn_to_message(PAIR.turns[0])], add_generation_prompt=True, return_dict=False, tokenize=True
    )
    assert out.ids[~out.target_mask].tolist() == asked


def test_rows_keep_their_order_whatever_path_they_take():
    rows = [TEXT, TALK, PAIR, TEXT]
    for template in (BLOCKS, LLAMA3):
        tokenizer = bpe(template)
        corpus, report = tokenize(rows, tokenizer, max_length=200)
        assert corpus.num_examples == report.num_examples == 4 and corpus.kept_indices.tolist() == [0, 1, 2, 3]
        assert [len(runs(corpus.get_sequence(i), tokenizer)) for i in range(4)] == [1, 2, 1, 1]
        alone = [tokenize([row], tokenizer, max_length=200)[0].get_sequence(0).ids.tolist() for row in rows]
        assert [corpus.get_sequence(i).ids.tolist() for i in range(4)] == alone


def test_template_joins_prompt_and_response():
    tokenizer = bpe()
    corpus, _ = tokenize([PAIR], tokenizer, max_length=99, template="Q: {prompt}\nA:\n{response}")
    assert tokenizer.decode(corpus.ids) == "<|begin|>Q: Name a pet.\nA:\nA cat, 猫!<|eot|>"
    assert runs(corpus.get_sequence(0), tokenizer) == ["A cat, 猫!<|eot|>"]
    braces = example("{response} {x} %s", "{prompt}")
    assert tokenizer.decode(tokenize([braces], tokenizer, max_length=99)[0].ids).endswith("%s\n{prompt}<|eot|>")
    for template in ("{prompt}", "{response} {prompt}", "{prompt}{prompt}{response}", "{prompt}{response}."):
        with pytest.raises(ValueError, match=r"must hold \{prompt\} once and \{response\} once, at its end. Write"):
            tokenize([PAIR], tokenizer, max_length=99, template=template)


def test_token_across_the_border():
    tokenizer = bpe()
    template = "{prompt} A: {response}"  # the space goes into the first token of the response
    corpus, report = tokenize([example("Name a pet.", "The cat")], tokenizer, max_length=99, template=template)
    assert report.merged == 1 and runs(corpus.get_sequence(0), tokenizer) == [" The cat<|eot|>"]
    assert "1 prompt ends in white space that the first token of the response takes in" in str(report)
    with pytest.raises(ValueError, match="rows.jsonl:7: a token holds the end of a prompt and the start of a response"):
        tokenize([example("Which on", "e", line=7)], tokenizer, max_length=99, template="{prompt}{response}")


def test_too_long():
    tokenizer = bpe()
    rows = [PAIR, example("Name a pet.", "A cat. " * 9, line=2), example("Name a pet. " * 9, "A cat", line=3)]
    lengths = tokenize(rows, tokenizer, max_length=999)[0].lengths
    limit = int(lengths[0])
    assert lengths[1] > limit and lengths[2] > limit
    tokenize(rows[:1], tokenizer, max_length=limit)  # exactly at the limit is fine
    with pytest.raises(ValueError) as error:
        tokenize(rows, tokenizer, max_length=limit)
    assert str(error.value) == (
        f"rows.jsonl:2: {lengths[1]} tokens, and max_length is {limit}. Raise max_length, shorten the row, or set "
        "truncation to 'left', 'right' or 'drop'. (1 more rows have such a problem.)"
    )
    with pytest.raises(ValueError, match=rf"rows.jsonl:3: {lengths[2]} tokens, and its prompt alone fills max_length"):
        tokenize(rows, tokenizer, max_length=limit, truncation="right")
    corpus, report = tokenize(rows[:2], tokenizer, max_length=limit, truncation="right")
    assert corpus.lengths.tolist() == [limit, limit] and report.truncated == 1
    assert "A cat. A cat. ".startswith(runs(corpus.get_sequence(1), tokenizer)[0][:9]) and corpus.ids[-1] != 1
    corpus, report = tokenize(rows, tokenizer, max_length=limit, truncation="drop")
    assert corpus.lengths.tolist() == [limit, 0, 0] and corpus.kept_indices.tolist() == [0] and report.dropped == 2
    assert "2 rows dropped as too long" in str(report)
    with pytest.raises(ValueError, match="none of 2 rows is within max_length = "):
        tokenize(rows[1:], tokenizer, max_length=limit, truncation="drop")


def pair(chosen, rejected, line=1):
    """A preference pair: a row with a second dialogue."""
    return example(*chosen, line=line)._replace(rejected=example(*rejected).turns)


ASKED = ("Name a pet.", "A dog", "Which one?")
SHORT, LONG = "It is.", "The cat\nis it."
PAIRS = {  # the templates with and without generation blocks; the tokens of the prompt come from another path each
    "llama3": (bpe(LLAMA3), ASKED),
    "blocks": (bpe(BLOCKS), ASKED),
    "blocks without the end": (bpe(OUTSIDE), ASKED),
    "no template": (bpe(), ASKED[:1]),
    "no template, no bos": (bpe(bos=None), ASKED[:1]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pair_is_two_sequences_in_which_the_responses_count(name):
    tokenizer, prompt = PAIRS[name]
    row = pair((*prompt, SHORT), (*prompt, LONG))
    corpus, report = tokenize([row, row], tokenizer, max_length=200)
    assert (corpus.num_examples, corpus.sequences_per_example, len(corpus.offsets)) == (
        2,
        2,
        5,
    ) and corpus.kept_indices.tolist() == [0, 1]
    for i in range(2):
        assert [runs(corpus.get_sequence(i, side), tokenizer) for side in range(2)] == [
            [f"{SHORT}<|eot|>"],
            [f"{LONG}<|eot|>"],
        ]
        chosen, rejected = (corpus.get_sequence(i, side) for side in range(2))
        n = int(chosen.target_mask.argmax())
        assert n == rejected.target_mask.argmax() and (chosen.ids[:n] == rejected.ids[:n]).all()  # one prompt
    alone = [tokenize([example(*prompt, text)], tokenizer, max_length=200)[0].ids for text in (SHORT, LONG)]
    assert all((corpus.get_sequence(1, side).ids == alone[side]).all() for side in range(2))
    assert (report.num_examples, report.num_tokens, report.max_length) == (2, len(corpus.ids), len(alone[1]))


@pytest.mark.parametrize("template", [LLAMA3, BLOCKS], ids=["llama3", "blocks"])
def test_pair_that_differs_in_several_turns(template):
    tokenizer = bpe(template)
    row = pair((*ASKED, SHORT, "Which?", "A cat"), (*ASKED, LONG, "Is it?", "A dog"))
    wanted = [["It is.<|eot|>", "A cat<|eot|>"], ["The cat\nis it.<|eot|>", "A dog<|eot|>"]]
    corpus = tokenize([row], tokenizer, max_length=200)[0]
    assert [runs(corpus.get_sequence(0, side), tokenizer) for side in range(2)] == wanted
    corpus = tokenize([row], tokenizer, max_length=200, train_on="last_turn")[0]
    assert [runs(corpus.get_sequence(0, side), tokenizer) for side in range(2)] == [one[1:] for one in wanted]


@pytest.mark.parametrize("template", [LLAMA3, CHATML, BLOCKS, OUTSIDE, PLAIN, LLAMA2])
def test_supervise_the_last_answer(template):
    tokenizer = bpe(template)
    whole, last = (
        tokenize([TALK], tokenizer, max_length=200, train_on=which)[0] for which in ("all_turns", "last_turn")
    )
    assert (whole.ids == last.ids).all()
    assert runs(last.get_sequence(0), tokenizer) == runs(whole.get_sequence(0), tokenizer)[1:]
    for row in (PAIR, TEXT):  # nothing to leave out
        one, other = (
            tokenize([row], tokenizer, max_length=200, train_on=which)[0] for which in ("all_turns", "last_turn")
        )
        assert (one.target_mask == other.target_mask).all()


@pytest.mark.parametrize("bos", ["<|begin|>", None])
def test_cut_on_the_left(bos):
    tokenizer = bpe(bos=bos)
    row, lead = example("Name a pet. Which one is it?", "A cat"), int(bos is not None)
    whole = tokenize([row], tokenizer, max_length=99)[0].get_sequence(0)
    response = int(whole.target_mask.sum())
    for limit in range(2, len(whole.ids) + 2):
        out, report = tokenize([row], tokenizer, max_length=limit, truncation="left")
        ids, mask, _ = out.get_sequence(0)
        gone = max(len(whole.ids) - limit, 0)
        room = len(whole.ids) - response - 1  # all of the prompt but BOS; without BOS, one token stays to begin with
        kept = np.delete(whole.ids, slice(lead, lead + min(gone, room)))
        assert ids.tolist() == kept[:limit].tolist() and not mask[0] and len(ids) == min(limit, len(whole.ids))
        assert mask.sum() == min(response, limit - 1)
        assert (report.truncated_left, report.truncated, report.dropped) == (gone > 0, gone > room, 0)
        assert str(report).count("cut at the beginning") == (gone > 0)


def test_answer_torn_on_the_left_is_only_read():
    tokenizer = bpe(BLOCKS)
    whole = tokenize([TALK], tokenizer, max_length=200)[0].get_sequence(0)
    first = np.flatnonzero(np.diff(whole.target_mask.astype(int), prepend=0) == 1)
    for gone in range(1, int(first[1])):
        corpus, _ = tokenize([TALK], tokenizer, max_length=len(whole.ids) - gone, truncation="left")
        assert corpus.ids.tolist() == [whole.ids[0], *whole.ids[1 + gone :]]
        assert len(runs(corpus.get_sequence(0), tokenizer)) == 1 + (1 + gone <= first[0])  # whole, or not at all
        assert runs(corpus.get_sequence(0), tokenizer)[-1] == "The cat\nis it.<|eot|>"


def test_pair_too_long():
    tokenizer = bpe()
    prompt = "Name a pet. Which one is it?"
    rows = [pair((prompt, "A cat"), (prompt, "A dog. A cat. The cat is.")), pair(("A", "It"), ("A", "is"), line=2)]
    whole = tokenize(rows, tokenizer, max_length=99)[0]
    short, long = whole.lengths[:2]
    n = int(whole.get_sequence(0).target_mask.argmax())  # tokens of BOS and prompt
    corpus, report = tokenize(rows, tokenizer, max_length=long - 3, truncation="left")
    assert corpus.lengths[:2].tolist() == [short - 3, long - 3]  # both sides lose what the longer one must
    assert (
        corpus.get_sequence(0).ids[: n - 3] == corpus.get_sequence(0, 1).ids[: n - 3]
    ).all() and report.truncated_left == 1
    assert [corpus.get_sequence(0, side).target_mask.argmax() for side in range(2)] == [n - 3, n - 3]
    corpus, report = tokenize(rows, tokenizer, max_length=long - n, truncation="left")  # one less than BOS and response
    assert corpus.lengths[:2].tolist() == [short - n + 1, long - n]
    assert (report.truncated_left, report.truncated) == (1, 1)
    corpus, report = tokenize(rows, tokenizer, max_length=long - 3, truncation="right")
    assert corpus.lengths[:2].tolist() == [min(short, long - 3), long - 3] and report.truncated == 1
    corpus, report = tokenize(rows, tokenizer, max_length=long - 1, truncation="drop")  # one side fits: both go
    assert corpus.lengths[:2].tolist() == [0, 0] and report.dropped == 1
    assert corpus.kept_indices.tolist() == [1] and corpus.num_examples == 2
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: {long} tokens, and max_length is {long - 1}. Raise"):
        tokenize(rows, tokenizer, max_length=long - 1)


def test_reference_belongs_to_every_pair():
    corpus = tokenize([pair(("a", "b"), ("a", "c"))] * 3, bpe(), max_length=20)[0]
    assert corpus.with_reference_margins(np.arange(3)).reference_margins.tolist() == [0, 1, 2]
    dropped = corpus_from_sequences(
        [
            corpus.get_sequence(0),
            corpus.get_sequence(0, 1),
            *[TokenizedSequence(corpus.ids[:0], corpus.target_mask[:0])] * 2,
        ],
        2,
    )
    dropped.with_reference_margins(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="the reference of row 1 is nan; give one for every row in `kept_indices`"):
        corpus.with_reference_margins(np.array([1.0, np.nan, 0]))
    for wrong in (corpus, tokenize([PAIR] * 6, bpe(), max_length=20)[0]):
        with pytest.raises(ValueError, match=r"reference \(6,\) for . rows of . sequence\(s\)"):
            wrong.with_reference_margins(np.zeros(6))
    with pytest.raises(ValueError, match="3 sequences do not make rows of 2"):
        corpus_from_sequences([corpus.get_sequence(0)] * 3, 2)


ERRORS = [
    (
        bpe(),
        example("a<|eot|>", "b"),
        {},
        r"holds '<\|eot\|>', which the tokenizer reads as a special token",
    ),
    (bpe(), example("a", "b\ud800"), {}, r"rows.jsonl:1: the text holds half of a surrogate pair, U\+D800, which no"),
    (bpe(), TALK, {}, "rows.jsonl:1: a dialogue of 4 turns, and the tokenizer has no chat template."),
    (bpe(THINKING), TALK, {}, r"changes what stands before message 2 .* Use a template with {% generation %} blocks"),
    (bpe(LLAMA3.replace("trim", "upper")), PAIR, {}, "the chat template changes the text of message 2"),
    (
        bpe(LLAMA2),
        example("a", "b", roles=("system", "assistant")),
        {},
        r"refuses .* the roles \['system', .*no system",
    ),
    (bpe(BLOCKS.replace("== 'assistant'", "== 'model'")), PAIR, {}, "{% generation %} blocks mark no token"),
    (bpe(bos=None, eos=None), example("a"), {}, "rows.jsonl:1: no token to predict among its 1. Remove the row."),
    (
        bpe(),
        PAIR,
        {"truncation": "middle"},
        r"truncation is 'middle'; it is one of \['error', 'left', 'right', 'drop'\]",
    ),
    (bpe(), PAIR, {"train_on": "first"}, r"train_on is 'first'; it is one of \['all_turns', 'last_turn'\]"),
    (bpe(), pair(("a", "b"), ("a", "c<|eot|>")), {}, r"holds '<\|eot\|>', which the tokenizer reads as a special"),
    (bpe(), pair(("a", "b"), ("a", "b")), {}, "rows.jsonl:1: the chosen and the rejected response are the same"),
    (bpe(), pair(("a", "b"), ("c", "b")), {}, "differ at message 1 before the assistant answers; a preference compa"),
    (bpe(LLAMA3), pair(TALK_TEXT, TALK_TEXT[:2]), {}, "differ at message 3 before the assistant answers"),
    (bpe(), PAIR, {"max_length": 1}, "max_length is 1; at least 2 tokens are needed"),
]


@pytest.mark.parametrize("tokenizer, row, options, message", ERRORS)
def test_error(tokenizer, row, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize([row], tokenizer, **({"max_length": 200} | options))


def test_pairs_and_single_rows_do_not_mix():
    rows = [PAIR, pair(("a", "b"), ("a", "c"), line=2)]
    with pytest.raises(ValueError, match="rows.jsonl:2: a preference pair, and the rows before it are none"):
        tokenize(rows, bpe(), max_length=20)
    with pytest.raises(ValueError, match="rows.jsonl:1: no preference pair, and the rows before it are pairs"):
        tokenize(rows[::-1], bpe(), max_length=20)


def test_a_template_with_the_date_is_told():
    dated = bpe("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + LLAMA3)
    assert "on another day the tokens may be others" in str(tokenize([PAIR], dated, max_length=99)[1])
    for rows, tokenizer in (([TEXT], dated), ([PAIR], bpe(LLAMA3))):
        assert "another day" not in str(tokenize(rows, tokenizer, max_length=99)[1])


def test_unknown_tokens_are_counted():
    corpus, report = tokenize([example("bhace>", "ciéB7")], cipher_tokenizer(), max_length=32)
    assert report.unknown_share == pytest.approx(3 / 13) and "23.1% of the tokens are unknown" in str(report)


def test_corpus_of_rows():
    rows = [TokenizedSequence(np.arange(n, dtype=np.int32), np.arange(n) > 1) for n in (3, 0, 2)]
    corpus = corpus_from_sequences(rows)
    assert corpus.lengths.tolist() == [3, 0, 2] and corpus.kept_indices.tolist() == [0, 2] and corpus.num_examples == 3
    assert corpus.get_sequence(2).ids.tolist() == [0, 1] and corpus.get_sequence(0).target_mask.tolist() == [
        False,
        False,
        True,
    ]


def test_load_tokenizer(tmp_path):
    bpe(LLAMA3).save_pretrained(str(tmp_path / "model"))
    loaded = load_tokenizer(tmp_path / "model")
    assert tokenize([TALK], loaded, max_length=99)[0].ids.tolist() == (
        tokenize([TALK], bpe(LLAMA3), max_length=99)[0].ids.tolist()
    )
    with pytest.raises(FileNotFoundError, match="no tokenizer.json or tokenizer_config.json. Name a folder in the"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="The model of this run is .*model: name that"):
        load_tokenizer(tmp_path)


def relink(path):
    path.unlink()
    path.symlink_to("blob-that-never-came")


def remake(path):
    path.unlink()
    path.mkdir()


def rewrite(**changes):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {  # id: (file, what happens to it, what the error says)
    "no vocabulary": (
        "tokenizer.json",
        lambda path: path.unlink(),
        "has no token for text, only special and added ones",
    ),
    "empty vocabulary": ("tokenizer.json", rewrite(model={"type": "BPE"}), "tokenizer "),
    "link": ("tokenizer.json", relink, "tokenizer.json: a link to a file that is not there; fetch it again"),
    "link of the settings": (
        "tokenizer_config.json",
        relink,
        "tokenizer_config.json: a link to a file that is not there",
    ),
    "folder": ("tokenizer_config.json", remake, "tokenizer_config.json: no file, though a file of this name is read"),
    "empty": (
        "tokenizer_config.json",
        lambda path: path.write_bytes(b""),
        "tokenizer_config.json: empty; the download",
    ),
    "empty template": (
        "chat_template.jinja",
        lambda path: path.write_bytes(b""),
        "chat_template.jinja: empty; the down",
    ),
    "empty settings": ("generation_config.json", lambda path: path.write_bytes(b""), "generation_config.json: empty"),
    "length": ("tokenizer_config.json", rewrite(model_max_length="long"), "model_max_length is 'long'; it is a number"),
    "cut": ("tokenizer.json", lambda path: path.write_text(path.read_text()[:99]), "the tokenizer cannot be read"),
    "null": ("tokenizer.json", lambda path: path.write_text("null"), "the tokenizer cannot be read"),
    "list": ("tokenizer_config.json", lambda path: path.write_text("[1]"), "the tokenizer cannot be read"),
}


@pytest.mark.parametrize("file, damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_tokenizer_that_lacks_something(tmp_path, file, damage, message):
    bpe(LLAMA3).save_pretrained(str(tmp_path))
    # the tokenizer's class of this family makes do without a vocabulary
    sizes = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_hidden_layers"), 2)
    sizes |= dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 16)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes}))
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_half_of_a_vocabulary(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        (folder / name).write_text(
            '{"a": 0, "b": 1, "<|endoftext|>": 2}' if name == "vocab.json" else "#version: 0.2\n"
        )
        with pytest.raises(ValueError, match=f"{folder}: the tokenizer cannot be read .*vocab"):
            load_tokenizer(folder)


@pytest.mark.parametrize("name", ["babyllama-1m", "stories-260k"])
def test_real_tokenizer(shared, name):
    tokenizer = load_tokenizer(shared / "models" / name)
    rows = [example("Tom said:", "“Hi”, 3 + 4 = 7\n\nThe end.", line=1), example("One day, Lily\nran.", line=2)]
    corpus, report = tokenize(rows, tokenizer, max_length=256)
    assert (
        tokenizer.decode(corpus.get_sequence(0).ids).replace("<s> ", "<s>")
        == "<s>Tom said:\n“Hi”, 3 + 4 = 7\n\nThe end.</s>"
    )
    assert runs(corpus.get_sequence(0), tokenizer) == ["“Hi”, 3 + 4 = 7\n\nThe end.</s>"]
    assert runs(corpus.get_sequence(1), tokenizer) == ["One day, Lily\nran.</s>"]
    for i in range(2):
        ids = corpus.get_sequence(i).ids
        assert (ids == 1).sum() == (ids == 2).sum() == 1 and ids[0] == 1 and ids[-1] == 2
    assert (
        report.unknown_share == 0 and 0 < report.byte_share < 0.3
    )  # characters outside the vocabulary are spelled in bytes
