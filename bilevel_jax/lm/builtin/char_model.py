"""A tiny character-level Llama and tokenizer for the builtin tasks."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bilevel_jax.lm.models.source_files import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")

MAX_LENGTH = 32
"""Tokens that the model can read, where the task does not say otherwise."""

# A dialogue is written without any header: the prompt's last character asks. The blocks mark what is learned.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


def make_char_config(characters: str, changes: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """config.json of a Llama of 2 layers and width 32, embeddings tied: some 22 thousand parameters."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "dtype": "float32",
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.18,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_LENGTH,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": len(SPECIAL_TOKENS) + len(characters),
    }
    return config | dict(changes)


def make_char_tokenizer(
    characters: str, *, max_length: int = MAX_LENGTH, skip_spaces: bool = False
) -> "PreTrainedTokenizerFast":
    """One token per character, for a space perhaps none, with a chat template that adds nothing but BOS and EOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *characters])}
    fast_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    each_character = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    without_spaces = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), each_character])
    fast_tokenizer.pre_tokenizer = without_spaces if skip_spaces else each_character
    fast_tokenizer.decoder = decoders.Fuse()
    pad, bos, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )


def write_untrained_model(
    folder: Path, characters: str, *, changes: Mapping[str, Any] = MappingProxyType({}), skip_spaces: bool = False
) -> None:
    """`folder` as a checkpoint without parameters: config, with the changes to its keys, and tokenizer."""
    folder.mkdir(exist_ok=True)
    config = make_char_config(characters, changes)
    write_once(folder / "config.json", json.dumps(config, indent=2) + "\n")
    max_length = config["max_position_embeddings"]
    write_tokenizer(folder, make_char_tokenizer(characters, max_length=max_length, skip_spaces=skip_spaces))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """The rows as jsonl; a file that is there with other contents is an error."""
    write_once(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_once(path: Path, text: str) -> None:
    """Write a file, unless it is there with just this text; one with another is an error."""
    if path.exists():
        if path.read_bytes() != text.encode():
            raise FileExistsError(
                f"{path}: already there, with other contents. Name another folder, or remove the file."
            )
        return
    # a kill leaves no half of a file, which would be refused next time
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(text.encode())
    os.replace(part, path)
