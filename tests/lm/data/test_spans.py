"""Answers are found whatever their words are: masks of known structure, and clear refusals.

Each template has an oracle: plain Python that writes the text it renders piece by piece, and knows which pieces are the
answers. What it writes is first compared with transformers, then the mask of every token with the pieces.
"""

import gc
import itertools
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from bilevel_jax.lm.data import render
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.spans import choose_marks
from bilevel_jax.lm.data.tokens import tokenize
from bilevel_jax.lm.data.turns import Turn, turn_to_message
from tests.lm.data.test_tokens import bpe, runs

EOT, BEGIN, END = "<|eot|>", "<|begin|>", "<|end|>"
ALTERNATE = (
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
FOLD = (
    "{% if messages[0].role == 'system' %}{% set lead = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
)
THINK = (
    "{% set ns = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set said = m.content %}"
    "{% set thought = m.reasoning_content or '' %}{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set said = said.split('</think>')[-1].lstrip() %}{% endif %}{{ '<|head|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{{ '<|head|>' + m.role + '\n' }}{% if WHERE %}{% generation %}{{ m.content + '<|eot|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|eot|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


class Refused(Exception):
    """The oracle: no mask is right."""


def each(head, tail, strip=False, last=""):
    """A template that writes every message alike; `head` and `tail` are functions of the role."""

    def oracle(turns, targets):
        for i, turn in enumerate(turns):
            opening, begun = head(turn.role)
            # what the generation prompt does not write is the answer's; nothing asks for a first message
            yield opening + (begun if not i else ""), None
            yield (begun if i else "") + (turn.content.strip() if strip else turn.content), i
            mark, gap = tail(turn.role)
            yield mark, i
            ends = bool(last and targets) and i == targets[-1] == len(turns) - 1  # the last answer ends the dialogue
            yield gap, i if ends else None
        yield last, len(turns) - 1

    return oracle


def alternates(turns):
    rest = [turn for turn in turns if turn.role != "system"]
    if any((turn.role == "user") != (i % 2 == 0) for i, turn in enumerate(rest)):
        raise Refused("refuses the dialogue with the roles .*roles must alternate. Change the row as it asks, or use")


def inst(turns, targets):
    alternates(turns)
    lead = turns[0].content + "\n\n" if turns[0].role == "system" else ""
    yield BEGIN, None
    for i, turn in enumerate(turns):
        if turn.role == "user":
            yield f"[INST] {lead if i <= 1 else ''}{turn.content} [/INST]", None
        elif turn.role == "assistant":
            yield f" {turn.content}{END}", i


def folded(turns, targets):
    alternates(turns)
    lead = turns[0].content + "\n\n" if turns[0].role == "system" else ""
    yield BEGIN, None
    for i, turn in enumerate(turns):
        if turn.role != "system":
            name = "model" if turn.role == "assistant" else "user"
            yield f"<|head|>{name}\n" + (lead if turn.role == "user" and i <= 1 else ""), None
            yield turn.content.strip() + EOT, i
            yield "\n", None


def think(turns, targets):
    asked = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    if any(target < asked for target in targets):
        raise Refused("changes what stands before message .* once other messages follow.*set data.train_on to 'last_")
    for i, turn in enumerate(turns):
        thought, said = turn.reasoning, turn.content
        if turn.role == "assistant" and "</think>" in said:
            before, said = said.rsplit("</think>", 1)
            thought, said = before.split("</think>")[0].rsplit("<think>", 1)[-1].strip(), said.lstrip()
        yield f"<|head|>{turn.role}\n", None
        if turn.role == "assistant" and i > asked:
            yield f"<think>\n{thought}\n</think>\n\n", i if i else None
        yield said + EOT, i
        yield "\n", None


def asks_for_thoughts(turns, targets):
    if targets[0]:
        raise Refused("asks for the answer with .*, and that does not stand before it|changes the text of message")
    if len(targets) > 1:
        raise Refused("message 3 once it is answered: it asks for the answer with .*<think>")
    yield from each(lambda role: (f"<|head|>{role}\n", ""), lambda role: (EOT, "\n"))(turns, targets)


def merged(turns, targets):
    for i, turn in enumerate(turns):
        follows = i and turns[i - 1].role == turn.role
        if follows and i in targets:
            raise Refused("asks for the answer with .*, and that does not stand before it")
        yield "\n\n" if follows else f"<|head|>{turn.role}\n", None
        yield turn.content, i
        if i + 1 == len(turns) or turns[i + 1].role != turn.role:
            yield EOT, i


def counted(turns, targets):
    if any(targets):
        raise Refused("changes what stands before message")
    yield f"{len(turns)} messages\n", None
    yield from each(lambda role: (f"<|head|>{role}\n", ""), lambda role: (EOT, "\n"))(turns, targets)


def prefilled(turns, targets):
    for i, turn in enumerate(turns):
        yield f"<|head|>{turn.role}\n", None
        said = turn.content
        if i in targets and i:
            if not said.startswith("<think>\n"):
                raise Refused("asks for the answer with .*, and that does not stand before it.")
            yield "<think>\n", None
            said = said.removeprefix("<think>\n")
        yield said + EOT, i
        yield "\n", None


def alpaca(turns, targets):
    for i, turn in enumerate(turns):
        yield {"user": "### Instruction:\n", "assistant": "### Response:\n", "system": "### System:\n"}[turn.role], None
        last = bool(targets) and i == targets[-1]
        yield turn.content, i
        yield "\n\n", None if last else i


def only_last(turns, targets):
    if targets[0] + 1 < len(turns):
        raise Refused(f"blocks mark nothing of message {targets[0] + 1}, which .* set data.train_on to 'last_turn'")
    for i, turn in enumerate(turns):
        yield f"<|head|>{turn.role}\n", None
        yield turn.content + EOT, i if i + 1 == len(turns) else None
        yield "\n", None


HEAD = {"gp": "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}"}
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '\n' + m.content + '<|eot|>\n' }}{% endfor %}" + HEAD["gp"],
        each(lambda role: (f"<|head|>{role}\n", ""), lambda role: (EOT, "\n")),
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim "
        "+ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
        each(lambda role: (f"<|head|>{role}<|/head|>\n\n", ""), lambda role: (EOT, ""), strip=True),
    ),
    "inst": (
        "{{ bos_token }}" + FOLD + ALTERNATE + "{% for m in rest %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (lead if loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '<|end|>' }}{% endif %}{% endfor %}",
        inst,
    ),
    "model turns": (
        "{{ bos_token }}" + FOLD + ALTERNATE + "{% for m in rest %}"
        "{{ '<|head|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (lead if loop.first else '') "
        "+ m.content | trim + '<|eot|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>model\n' }}{% endif %}",
        folded,
    ),
    "think block in the last answer": (THINK, think),
    "eos behind the dialogue": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n' + m.content + '<|eot|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        each(lambda role: (f"<|head|>{role}<|/head|>\n", ""), lambda role: (EOT, "\n"), last=END),
    ),
    "prompt without the newline": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>' + '\n' + m.content + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}",
        each(lambda role: (f"<|head|>{role}<|/head|>", "\n"), lambda role: (END, "\n")),
    ),
    "speakers": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% elif m.role == 'system' %}"
        "{{ m.content + '\n\n' }}{% else %}{{ 'ASSISTANT: ' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        each(
            lambda role: {"user": ("USER: ", ""), "assistant": ("ASSISTANT:", " "), "system": ("", "")}[role],
            lambda role: {"user": (" ", ""), "assistant": (END, ""), "system": ("\n\n", "")}[role],
        ),
    ),
    "instructions": (
        "{% for m in messages %}{{ {'user': '### Instruction:\n', 'assistant': '### Response:\n', "
        "'system': '### System:\n'}[m.role] + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        alpaca,
    ),
    "special tokens alone": (
        "{% for m in messages %}{{ '<|head|>' + {'user': '<|/head|>', 'system': '<|begin|>', 'assistant': '<|end|>'}"
        "[m.role] + m.content | trim + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|><|end|>' }}{% endif %}",
        each(
            lambda role: ("<|head|>" + {"user": "<|/head|>", "system": BEGIN, "assistant": END}[role], ""),
            lambda role: (EOT, ""),
            strip=True,
        ),
    ),
    "no generation prompt": (
        "{% for m in messages %}{{ '## ' + m.role + ': ' + m.content + ' [END]\n' }}{% endfor %}",
        each(lambda role: (f"## {role}: ", ""), lambda role: (" [END]", "\n")),
    ),
    "header with the answers": (
        "{% for m in messages %}{{ '[' + m.role + ' says A, B, C or D] ' + m.content + ' [A B C D]\n' }}{% endfor %}",
        each(lambda role: (f"[{role} says A, B, C or D] ", ""), lambda role: (" [A B C D]", "\n")),
    ),
    "eos behind the dialogue, no generation prompt": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '\n' + m.content + '<|eot|>' }}{% endfor %}{{ eos_token }}",
        each(lambda role: (f"<|head|>{role}\n", ""), lambda role: (EOT, ""), last=END),
    ),
    "reminder of the system prompt": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '\n' + m.content }}{% if m.role == 'user' and "
        "messages[0].role == 'system' %}{{ '\n(' + messages[0].content + ')' }}{% endif %}{{ '<|eot|>' }}{% endfor %}"
        + HEAD["gp"],
        None,
    ),
    "prompt that begins the thoughts": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '\n' + m.content + '<|eot|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant\n<think>\n' }}{% endif %}",
        prefilled,
    ),
    "prompt that begins thoughts which answers lack": (
        "{% for m in messages %}{% set said = m.content %}{% if '</think>' in said %}"
        "{% set said = said.split('</think>')[-1] %}{% endif %}{{ '<|head|>' + m.role + '\n' + said + '<|eot|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant\n<think>\n' }}{% endif %}",
        asks_for_thoughts,
    ),
    "turns of one role are one": (
        "{% for m in messages %}{{ '\n\n' if not loop.first and loop.previtem.role == m.role else "
        "'<|head|>' + m.role + '\n' }}{{ m.content }}"
        "{% if loop.last or loop.nextitem.role != m.role %}{{ '<|eot|>' }}{% endif %}{% endfor %}" + HEAD["gp"],
        merged,
    ),
    "number of messages": (
        "{{ messages | length ~ ' messages\n' }}{% for m in messages %}"
        "{{ '<|head|>' + m.role + '\n' + m.content + '<|eot|>\n' }}{% endfor %}" + HEAD["gp"],
        counted,
    ),
    "blocks": (
        BLOCKS.replace("WHERE", "m.role == 'assistant'"),
        each(lambda role: (f"<|head|>{role}\n", ""), lambda role: (EOT, "\n")),
    ),
    "block around the last answer": (BLOCKS.replace("WHERE", "m.role == 'assistant' and loop.last"), only_last),
}


def reminded(turns, targets):
    reminder = f"\n({turns[0].content})" if turns[0].role == "system" else ""
    for i, turn in enumerate(turns):
        yield f"<|head|>{turn.role}\n", None
        yield turn.content, i
        yield (reminder, None) if turn.role == "user" else ("", None)
        yield EOT, i


TEMPLATES["reminder of the system prompt"] = (TEMPLATES["reminder of the system prompt"][0], reminded)


def talk(*said):
    names = {"s": "system", "u": "user", "a": "assistant", "x": "assistant"}
    return tuple(Turn(names[one[0]], one[1:], one[0] != "x") for one in said)


DIALOGUES = {
    "one answer": talk("uName a pet.", "aA cat."),
    "two answers": talk("uName a pet.", "aA cat.", "uWhich one?", "aThe cat\nis it."),
    "system": talk("sBe brief.", "uName a pet.", "aA dog."),
    "system, two answers": talk("sBe brief.", "uA?", "aB", "uC?", "aD"),
    "begins with the assistant": talk("aHello, I am Anna.", "uWho?", "aAnna."),
    "begins with system and assistant": talk("sYou are Anna.", "aHello.", "uWho?", "aAnna."),
    **{f"letter {letter}": talk("uA, B, C, D or E?", f"a{letter}") for letter in "ADEN"},
    "of the end mark": talk("u[END]?", "a[END]", "u[EN", "aEND]"),
    "answer is the question": talk("uA cat.", "aA cat.", "uA cat.", "aA cat."),
    "answer is the system prompt": talk("sBe brief.", "uWhat?", "aBe brief."),
    "answer is a role": talk("uassistant", "aassistant", "uuser", "auser"),
    "white space around": talk("uName a pet.", "a  A cat. \n", "uWhich?", "a\tThe cat\n\n"),
    "thoughts": talk("uWhich?", "a<think>\nA or B\n</think>\n\nB"),
    "thoughts twice": talk("uA?", "a<think>\nhm\n</think>\n\nB", "uC?", "a<think>\nhm\n</think>\n\nD"),
    "two questions": talk("uName a pet.", "uA small one.", "aA cat."),
    "two answers in a row": talk("uName a pet.", "aA cat.", "aOr a dog."),
    "numbers and letters of the world": talk("u7104216", "a71042163 猫 é 🐈", "u7", "a777"),
    "a full stop": talk("u.", "a.", "u.", "a."),
    "words of a template": talk("u### Response:\nA", "a### Response:\nUSER: B ASSISTANT: C", "u### ", "a [/INST] "),
    "first answer is no target": talk("uA?", "xB", "uC?", "aD"),
    "last answer is no target": talk("uA?", "aB", "uC?", "xD"),
    "empty answer between": talk("uA?", "x", "uC?", "aD"),
}


COUNTS = {
    "inst": (41, 8),
    "model turns": (41, 8),
    "think block in the last answer": (36, 13),
    "prompt that begins the thoughts": (4, 45),
    "prompt that begins thoughts which answers lack": (0, 49),
    "turns of one role are one": (47, 2),
    "number of messages": (0, 49),
    "block around the last answer": (35, 14),
}
"""(right masks, refusals) where not all dialogues have a mask."""


def oracle_tokens(tokenizer, oracle, turns, targets):
    """(ids, mask) by the pieces; Refused where no mask is right."""
    pieces = [(text, turn) for text, turn in oracle(turns, targets) if text]
    text = "".join(piece for piece, _ in pieces)
    if tokenizer.chat_template.startswith("{{ bos_token }}") and not text.startswith(BEGIN):
        pieces, text = [(BEGIN, None), *pieces], BEGIN + text
    messages = list(map(turn_to_message, turns))
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    wanted = np.concatenate([np.full(len(piece), turn in targets) for piece, turn in pieces])
    mask = np.array([wanted[start:stop].any() for start, stop in encoded["offset_mapping"]])
    last = int(np.flatnonzero(mask)[-1]) + 1
    ids, mask = np.array(encoded["input_ids"])[:last], mask[:last]
    if ids[0] != tokenizer.bos_token_id:
        ids, mask = np.insert(ids, 0, tokenizer.bos_token_id), np.insert(mask, 0, False)
    if ids[-1] != tokenizer.eos_token_id:
        ids, mask = np.append(ids, tokenizer.eos_token_id), np.append(mask, True)
    return ids, mask


def choose(turns, train_on):
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    return [i for i in (answers[-1:] if train_on == "last_turn" else answers) if turns[i].is_target]


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_the_oracle(name):
    template, oracle = TEMPLATES[name]
    tokenizer = bpe(template, eos=END)
    right = refused = 0
    for title, turns in DIALOGUES.items():
        row = Example("0#0", 0, turns, "mine", None, "rows.jsonl", 7)
        for train_on in ("all_turns", "last_turn"):
            if not (targets := choose(turns, train_on)):
                continue
            try:
                ids, mask = oracle_tokens(tokenizer, oracle, turns, targets)
            except Refused as refusal:
                refused += 1
                with pytest.raises(ValueError, match=rf"^rows.jsonl:7: .*({refusal})"):
                    tokenize([row], tokenizer, max_length=500, train_on=train_on)
                continue
            out = tokenize([row], tokenizer, max_length=500, train_on=train_on)[0].get_sequence(0)
            shown = tokenizer.convert_ids_to_tokens(out.ids.tolist())
            assert out.ids.tolist() == ids.tolist(), (title, train_on, shown)
            assert out.target_mask.tolist() == mask.tolist(), (title, train_on, shown, out.target_mask, mask)
            right += 1
    assert (right, refused) == COUNTS.get(name, (49, 0))


CHATML, LAST_THINKS = TEMPLATES["chatml"][0], TEMPLATES["think block in the last answer"][0]


def learned(tokenizer, turns, **options):
    """The texts that are targets."""
    row = Example("0#0", 0, turns, "mine", None, "rows.jsonl", 7)
    return runs(tokenize([row], tokenizer, max_length=500, **options)[0].get_sequence(0), tokenizer)


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, which does not say where its tokens stand."""

    @property
    def vocab_size(self):
        return 0x110000 - 1

    def get_vocab(self):
        return {chr(i): i for i in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def test_a_tokenizer_without_positions():
    tokenizer = Letters(eos_token="<|eot|>", bos_token="<|begin|>")
    for name in ("chatml", "no generation prompt", "instructions", "eos behind the dialogue"):
        tokenizer.chat_template = TEMPLATES[name][0]
        for title in ("two answers", "of the end mark", "letter D", "first answer is no target"):
            turns = DIALOGUES[title]
            targets = choose(turns, "all_turns")
            pieces = list(TEMPLATES[name][1](turns, targets))
            wanted = ["".join(text for text, turn in pieces if turn == target) for target in targets]
            got = learned(tokenizer, turns)
            assert [text.removesuffix("<|eot|>") for text in got] == [
                text.replace(END, "<|eot|>").removesuffix("<|eot|>") for text in wanted
            ]
    tokenizer.chat_template = TEMPLATES["blocks"][0]
    with pytest.raises(ValueError, match="rows.jsonl:7: .* {% generation %} blocks, and the tokenizer does not say wh"):
        learned(tokenizer, talk("uA?", "aB"))


def test_the_mark_is_in_no_text():
    marks, turns = [], talk("uA?", "aB")
    for _ in range(3):  # each dialogue holds the marks that the ones before it were found by
        marks += choose_marks(turns, bpe(CHATML))
        turns = (*turns, Turn("user", " ".join(marks)), Turn("assistant", marks[-1] + marks[-1][:-1]))
        assert learned(bpe(CHATML), turns, train_on="last_turn") == [turns[-1].content + EOT]
    assert len(set(marks)) == 3
    assert learned(bpe(marks[0] + CHATML), talk("uA?", "aB")) == ["B<|eot|>"]


REASONED = (Turn("user", "Which?"), Turn("assistant", "B", reasoning="A or B"))
SHOWN = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.reasoning_content %}{{ '(' + m.reasoning_content + ') ' }}"
    "{% endif %}{{ m.content + ' [END]\n' }}{% endfor %}"
)


def test_reasoning_is_learned_where_the_template_shows_it():
    assert learned(bpe(LAST_THINKS, eos=EOT), REASONED) == ["<think>\nA or B\n</think>\n\nB<|eot|>"]
    assert learned(bpe(SHOWN), REASONED) == ["(A or B) B [END]<|eot|>"]  # no generation prompt: all that is said
    messages = list(map(turn_to_message, REASONED))
    assert "(A or B) B" in bpe(SHOWN).apply_chat_template(messages, tokenize=False)
    with pytest.raises(ValueError, match="rows.jsonl:7: .* does not show the reasoning of message 2 .* Remove the key"):
        learned(bpe(CHATML), REASONED)
    earlier = (*REASONED, *talk("uA?", "aB"))  # where the answer is no target, the template may leave it out
    assert learned(bpe(CHATML), earlier, train_on="last_turn") == ["B<|eot|>"]
    with pytest.raises(ValueError, match="rows.jsonl:7: the answer has a reasoning .* has no chat template to show"):
        learned(bpe(), REASONED)


def test_white_space_that_ends_a_turn_goes_with_its_token():
    """Between two answers of a plain template tokens may hold the end of a mark and the line break behind it."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    inner.train_from_iterator(["]\n"] * 9 + ["\n\n"] * 7 + [".\n\n"] * 5 + ["##"] * 3 + ["D##"] * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    tokenizer.chat_template = TEMPLATES["no generation prompt"][0]
    assert learned(tokenizer, talk("uA?", "aB", "uC?", "aD")) == ["B [END]\n", "D [END]<|end|>"]
    tokenizer.chat_template = TEMPLATES["instructions"][0]
    assert learned(tokenizer, talk("uA?", "aB.", "uC?", "aD.")) == ["B.\n\n", "D.<|end|>"]
    tokenizer.chat_template = TEMPLATES["no generation prompt"][0].replace(" [END]\n", "")
    with pytest.raises(ValueError, match="rows.jsonl:7: a token holds the end of a prompt and the start of a response"):
        learned(tokenizer, talk("uA?", "aD", "uC?", "aB"))


REFUSALS = {
    "upper case": (CHATML.replace("m.content", "m.content | upper"), "changes the text of message 2"),
    "escaped": (CHATML.replace("m.content", "m.content | e"), "changes the text of message 2"),
    "cut": (CHATML.replace("m.content", "m.content[:9]"), "does not show message 2, or not its end"),
    "twice": (CHATML.replace("m.content", "m.content + m.content"), "writes message 2 2 times"),
    "other end": (
        CHATML.replace("'<|eot|>", "('!' if m.content[-1] in '>b' else '?') + '<|eot|>"),
        "depends on how it",
    ),
    "picky": (
        CHATML + "{% if messages[-1].role == 'assistant' and messages[-1].content != 'a > b' %}"
        "{{ raise_exception('another answer') }}{% endif %}",
        "where message 2 stands is found by rendering it with other words, and then the chat template refuses",
    ),
    "no content": ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not show message 2"),
    "no block": (
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + CHATML,
        "blocks mark no token of what the assistant says. Put them around its content",
    ),
    "block around headers": (
        CHATML.replace("{{ '<|head|>'", "{% generation %}{{ '<|head|>' }}{% endgeneration %}{{ ''"),
        "blocks mark no token of what the assistant says",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_answers_that_cannot_be_told_apart_are_refused(name):
    template, message = REFUSALS[name]
    with pytest.raises(ValueError, match=rf"^rows.jsonl:7: .*{message}"):
        learned(bpe(template), talk("uWhich?", "aa > b"))


END_BLOCK = BLOCKS.replace("WHERE", "m.role == 'assistant'").replace(
    "{{ m.content + '<|eot|>' }}{% endgeneration %}",
    "{{ m.content }}{% endgeneration %}<|head|>{% generation %}{{ '<|eot|>' }}{% endgeneration %}",
)
HEAD_BLOCK = BLOCKS.replace("WHERE", "m.role == 'assistant'").replace(
    "{{ '<|head|>' + m.role + '\n' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ '<|head|>' }}{% endgeneration %}{% endif %}{{ m.role + '\n' }}",
)


def test_blocks_around_marks_belong_to_the_answer_beside_them():
    turns, row = talk("uA?", "aB", "uC?", "aD"), talk("uA?", "aB", "aC", "xD")
    for template, one, two in (
        (END_BLOCK, ["B", EOT], ["D", EOT]),
        (HEAD_BLOCK, ["<|head|>", "B<|eot|>"], ["<|head|>", "D<|eot|>"]),
    ):
        assert learned(bpe(template), turns) == one + two
        assert learned(bpe(template), turns, train_on="last_turn") == two
        with pytest.raises(
            ValueError, match=r"rows.jsonl:7: .* blocks mark '<.(head|eot).>', and it cannot be told which"
        ):
            learned(bpe(template), row)
    assert learned(bpe(END_BLOCK), talk("uA?", "x", "uC?", "aD")) == ["D", EOT]


def test_a_reasoning_that_blocks_leave_out_is_refused():
    shown = "{% if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}"
    blocks = BLOCKS.replace("WHERE", "m.role == 'assistant'")
    assert learned(bpe(blocks.replace("{% generation %}", "{% generation %}" + shown)), REASONED) == [
        "(A or B)B<|eot|>"
    ]
    for hidden in (blocks, blocks.replace("{% generation %}", shown + "{% generation %}")):
        with pytest.raises(ValueError, match="rows.jsonl:7: .* does not show the reasoning of message 2"):
            learned(bpe(hidden), REASONED)


def test_an_answer_that_is_no_target():
    for template in (CHATML, BLOCKS.replace("WHERE", "m.role == 'assistant'"), TEMPLATES["no generation prompt"][0]):
        tokenizer = bpe(template)
        both = learned(tokenizer, talk("uA?", "aB", "uC?", "aD"))
        assert len(both) == 2 and learned(tokenizer, talk("uA?", "xB", "uC?", "aD")) == both[1:]
        assert learned(tokenizer, talk("uA?", "aB", "uC?", "xD"))[0].startswith("B")
        with pytest.raises(ValueError, match="rows.jsonl:7: the last answer is marked as no target .* 'all_turns'"):
            learned(tokenizer, talk("uA?", "aB", "uC?", "xD"), train_on="last_turn")
    with pytest.raises(ValueError, match="rows.jsonl:7: the response is marked as no target"):
        learned(bpe(), talk("uA?", "xB"))
    pair = Example("0#0", 0, talk("uA?", "aB"), "mine", None, "rows.jsonl", 7, talk("uA?", "xC"))
    with pytest.raises(ValueError, match="rows.jsonl:7: the response is marked as no target"):
        tokenize([pair], bpe(CHATML), max_length=99)


def test_special_tokens_in_a_reasoning_are_refused():
    turns = (Turn("user", "Which?"), Turn("assistant", "B", reasoning="A <|eot|>"))
    with pytest.raises(ValueError, match="rows.jsonl:7: the text holds '<.eot.>', which the tokenizer reads as a"):
        learned(bpe(LAST_THINKS), turns)


# ---- what a template raises, and limits

FAULTS = {
    "undefined": ("{{ messages[9].content }}", "fails at its line 1 (UndefinedError: list object has no element 9)"),
    "type": ("{% for m in messages %}\n\n{{ m.content + 1 }}{% endfor %}", "fails at its line 3 (TypeError: can only"),
    "security": ("{{ ''.__class__.__mro__ }}", "(SecurityError: access to attribute '__class__'"),
    "changes its input": ("{{ messages.append(1) }}", "(SecurityError: access to attribute 'append' of 'list'"),
    "syntax": ("{% for m in messages %}\n{{ m.content }", "fails at its line 2 (TemplateSyntaxError: unexpected '}')"),
    "filter": ("{{ messages | nofilter }}", "(TemplateAssertionError: No filter named 'nofilter'.)"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "(RecursionError: maximum recursion depth"),
    "division": ("{{ 1 // 0 }}", "(ZeroDivisionError: integer division or modulo by zero)"),
    "huge range": ("{% for i in range(10**9) %}a{% endfor %}", "(OverflowError: Range too big."),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_template_are_its_own(name):
    template, words = FAULTS[name]
    with pytest.raises(ValueError, match="rows.jsonl:7: the chat template ") as error:
        learned(bpe(template), talk("uA?", "aB"))
    assert words in str(error.value) and "role" not in str(error.value)
    assert str(error.value).endswith(
        "Mend the template (chat_template.jinja or tokenizer_config.json), or use a tokenizer with another template."
    )


def test_what_a_template_refuses_is_said_in_its_words():
    template = CHATML + "{{ raise_exception('no more than\none question') }}"
    with pytest.raises(ValueError) as error:
        learned(bpe(template), talk("uA?", "aB"))
    assert str(error.value) == (
        "rows.jsonl:7: the chat template refuses the dialogue with the roles ['user', 'assistant']: no more than one "
        "question. Change the row as it asks, or use a tokenizer with another template."
    )


LONG_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}WRITES{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        LONG_LOOP.replace("WRITES", ""),
        LONG_LOOP.replace("WRITES", "{{ messages }}"),
        DOUBLING.replace("START", "'abcdefgh'"),
        DOUBLING.replace("START", "[1, 2, 3]"),
        "{{ (messages | length + 8) ** (10 ** 9) > 3 }}",
        "{{ 'a' * 2000000 }}",
        "{{ 'a' * 10 ** 18 }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(monkeypatch, request, template):
    gc.disable()  # a tick inside another library's callback of the collector is lost, and pytest warns of it
    request.addfinalizer(gc.enable)
    monkeypatch.setattr(render, "MAX_SECONDS", 0.15)
    monkeypatch.setattr(render, "MAX_BYTES", 64 << 20)
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(
        ValueError, match="^rows.jsonl:7: the chat template .* for a dialogue of 2 messages and was sto"
    ):
        learned(bpe(template + CHATML), talk("uA?", "aB"))
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_memory_of_other_threads_is_not_the_templates(monkeypatch):
    peaks = itertools.count(0, 1 << 40)
    monkeypatch.setattr(render, "_peak_memory", lambda: next(peaks))
    with render._limit_time_and_memory():
        time.sleep(3 * render.TICK_SECONDS)
    assert next(peaks) == 1 << 40  # it was looked at once, at the beginning


def test_an_alarm_of_the_process_stays_as_it_is():
    handler = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 600)
    try:
        own = signal.getsignal(signal.SIGALRM)
        learned(bpe(CHATML), talk("uA?", "aB"))
        assert signal.getsignal(signal.SIGALRM) is own and 500 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_templates_render_in_other_threads():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(learned, bpe(CHATML), talk("uA?", "aB")).result() == ["B<|eot|>"]


def test_a_tokenizer_with_several_templates():
    tokenizer = bpe()
    tokenizer.chat_template = {"default": CHATML, "tool_use": SHOWN}
    assert learned(tokenizer, talk("uA?", "aB")) == ["B<|eot|>"]
    tokenizer.chat_template = {"rag": CHATML, "tool_use": SHOWN}
    with pytest.raises(ValueError, match=r"has the chat templates \['rag', 'tool_use'\], and none is called 'default'"):
        learned(tokenizer, talk("uA?", "aB"))
