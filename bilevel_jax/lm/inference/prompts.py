"""Generation prompts from training examples."""

import sys
from collections.abc import Sequence

import numpy as np

from bilevel_jax.lm.data.encode import DEFAULT_TEMPLATE
from bilevel_jax.lm.data.examples import Example, example_kind
from bilevel_jax.lm.data.render import Tokenizer
from bilevel_jax.lm.data.tokens import tokenize
from bilevel_jax.lm.inference.generate import Prompt


def make_prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    template: str = DEFAULT_TEMPLATE,
    vocab_size: int | None = None,
) -> list[Prompt]:
    """The prompt of the last response of each example, with the example's id.

    The tokens are those that `tokenize` puts before that response: by the tokenizer's own chat template, with its
    generation prompt, or by `template` where it has none. So a response that is generated stands where training
    has one. The messages are the turns before it. Of a preference pair: the prompt that both sides share.

    White space that ends a prompt and that the response's first token takes in (`TokenizationReport.merged`) is not in
    the tokens, so these may then differ between two examples with one prompt. Raises ValueError, with file and line,
    for a row of plain text, which has no prompt, and where `tokenize` does.

    Args:
        examples: with at least one assistant turn.
        tokenizer: that of training.
        template: joins prompt and response where the tokenizer has no chat template.
        vocab_size: as of `tokenize`.

    Returns:
        One prompt for each example.

    Raises:
        ValueError: plain text, which has no prompt; and as `tokenize`. With file and line.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import examples
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cipher.write_cipher_data(folder, clean=3, wrong=0, noise=0, copies=0)
        ...     train = examples.load_examples([f"{folder}/train.jsonl"])
        >>> prompt = make_prompts(train, cipher.make_cipher_tokenizer())[0]
        >>> len(prompt.tokens)  # BOS, four letters and ">"
        6
    """
    if plain_texts := [example for example in examples if example_kind(example) == "text"]:
        raise ValueError(
            f"{plain_texts[0].where}: a row of plain text has no prompt to answer. Give rows with a prompt."
        )
    if not examples:
        return []
    # A prompt is one whether or not its answer is to be learned.
    asked = [
        example._replace(
            turns=tuple(turn._replace(is_target=True) for turn in example.turns),
            rejected=tuple(turn._replace(is_target=True) for turn in example.rejected),
        )
        for example in examples
    ]
    corpus, _ = tokenize(
        asked,
        tokenizer,
        max_length=sys.maxsize,
        template=template,
        train_on="last_turn",
        vocab_size=vocab_size,
    )
    out = []
    for i, example in enumerate(examples):
        row = corpus.get_sequence(i)
        prompt_tokens = row.ids[: int(np.argmax(row.target_mask))].tolist()
        last_answer = max(at for at, turn in enumerate(example.turns) if turn.role == "assistant")
        messages = tuple({"role": turn.role, "content": turn.content} for turn in example.turns[:last_answer])
        out.append(Prompt(example.id, tuple(prompt_tokens), messages))
    return out


def find_end_tokens(tokenizer: Tokenizer, eos: int | tuple[int, ...] | None = None) -> list[int]:
    """The tokens that end a response: the tokenizer's end of sequence, and those that config.json names (`eos`)."""
    config_tokens = () if eos is None else (eos,) if isinstance(eos, int) else eos
    return sorted({*config_tokens} | ({tokenizer.eos_token_id} - {None}))
