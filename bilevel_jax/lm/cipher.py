"""The quickstart's task: a next-letter cipher with right, consistently wrong and random rows, as ordinary files.

`bhat>` wants `ciba`: every letter moves on by one, and after the last of the twenty comes the first. A model of 22
thousand parameters that can already copy learns it in seconds; a handful of trusted rows does not teach it the whole
alphabet; and which training rows hurt is known.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel_jax.lm.batches import permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrst"
WIDTH = 4
STRINGS = len(LETTERS) ** WIDTH
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz> \n"
"""All the tokenizer knows; more than the cipher needs, so that one's own short rows can be tried."""

# A dialogue is written without any header: the prompt's last character asks. The blocks mark what is learned.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


def write(
    folder: str | Path,
    *,
    seed: int = 0,
    clean: int = 128,
    wrong: int = 128,
    noise: int = 128,
    validation: int = 16,
    select: int = 16,
    report: int = 128,
    copies: int = 512,
) -> Path:
    """Write train, validation, select, report and copies .jsonl and untrained/ (config and tokenizer) into `folder`.

    Training rows carry the label clean (each letter + 1), wrong (each letter - 1) or noise (random letters); rows of
    copies repeat the prompt's letters, for the model to learn the form before it is asked anything; all other rows
    are clean. No prompt stands in two rows. The same arguments write the same bytes; a part of 0 rows is
    left out, and a file that is already there with other contents is an error.
    """
    folder = Path(folder)
    sizes = {"clean": clean, "wrong": wrong, "noise": noise, "validation": validation, "select": select}
    sizes |= {"report": report, "copies": copies}
    if min(sizes.values()) < 0 or not 0 < sum(sizes.values()) <= STRINGS:
        raise ValueError(f"{sizes} rows: none may be negative, and together they must be 1 to {STRINGS} strings.")
    drawn = permutation(np.arange(sum(sizes.values())), STRINGS, seed).tolist()
    strings = iter(_letters(number) for number in drawn)
    random = iter(_letters(number) for number in permutation(np.arange(2 * noise + 2), STRINGS, seed, 1).tolist())

    def noisy(string: str) -> str:
        return next(r for r in random if r not in {rotate(string, by) for by in (-1, 0, 1)})

    rules: dict[str, Callable[[str], str]] = {
        "clean": lambda string: rotate(string, 1),
        "wrong": lambda string: rotate(string, -1),
        "noise": noisy,
        "copy": lambda string: rotate(string, 0),
    }

    def rows(label: str, count: int) -> list[dict[str, str]]:
        taken = [next(strings) for _ in range(count)]
        return [{"prompt": s + ">", "response": rules[label](s), "label": label} for s in taken]

    train = [row for label in ("clean", "wrong", "noise") for row in rows(label, sizes[label])]
    shuffled = [train[i] for i in permutation(np.arange(len(train)), max(len(train), 1), seed, 2)]
    files = {"train": shuffled} | {name: rows("clean", sizes[name]) for name in ("validation", "select", "report")}
    files["copies"] = rows("copy", copies)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        if part:
            _put(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    (folder / "untrained").mkdir(exist_ok=True)
    _put(folder / "untrained" / "config.json", json.dumps(config(), indent=2) + "\n")
    tokenizer().save_pretrained(str(folder / "untrained"))
    return folder


def rotate(string: str, by: int) -> str:
    """Each letter moved on by `by` places; after the last of the twenty comes the first."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)] for letter in string)


def config() -> dict[str, Any]:
    """config.json of a Llama of 2 layers and width 32: 21,952 parameters, embeddings tied."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "bos_token_id": SPECIAL.index("<s>"),
        "dtype": "float32",
        "eos_token_id": SPECIAL.index("</s>"),
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.18,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": SPECIAL.index("<pad>"),
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": len(SPECIAL) + len(CHARACTERS),
    }


def tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character, with a chat template that adds nothing but BOS and EOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
        model_max_length=config()["max_position_embeddings"],
        chat_template=TEMPLATE,
    )


def _letters(number: int) -> str:
    return "".join(LETTERS[number // len(LETTERS) ** place % len(LETTERS)] for place in range(WIDTH))


def _put(path: Path, text: str) -> None:
    if path.exists() and path.read_bytes() != text.encode():
        raise FileExistsError(f"{path}: already there, with other contents. Name another folder, or remove the file.")
    path.write_bytes(text.encode())
