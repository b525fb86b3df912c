"""Rendering of chat templates, with limits on time and size.

A chat template is a program that comes with a model folder. transformers runs it in jinja2's immutable sandbox; what it
raises, and that it may not end, is dealt with here.
"""

import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from bilevel_jax.lm.data.turns import Turn, turn_to_message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # importing transformers takes seconds, so it waits for `load_tokenizer`

MAX_SECONDS = 10.0
"""CPU seconds in which a chat template must have rendered one dialogue; it takes some 1e-4."""
MAX_BYTES = 512 << 20
"""By how much one rendering may raise the peak of the process's memory."""
MAX_GROWTH = 1_000_000
"""Characters that a chat template may add to the texts of a dialogue."""
TICK_SECONDS = 0.02
ANOTHER_TEMPLATE = "use a tokenizer with another template"
_GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")


class ChatTemplateError(ValueError):
    """A chat template raised something, or ran into a limit; the message lacks the place of the row."""


class TemplateLimitError(ChatTemplateError):
    """A chat template ran into a limit."""


class RenderedChat(NamedTuple):
    """A dialogue as text."""

    text: str
    blocks: list[tuple[int, int]]
    """[start, stop) of the characters that the template's {% generation %} blocks mark; of an empty one, the same."""


class _LimitError(Exception):
    """A limit that a rendering ran into."""


def get_chat_template(tokenizer: Tokenizer) -> str:
    """The chat template that renders dialogues; empty where the tokenizer has none."""
    if not tokenizer.chat_template:
        return ""
    if not isinstance(tokenizer.chat_template, str | dict):
        raise ValueError(
            f"the tokenizer's chat_template is {tokenizer.chat_template!r}; a text is wanted. Mend it in "
            "tokenizer_config.json, or put a chat_template.jinja beside it."
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        names = sorted(tokenizer.chat_template)
        raise ValueError(
            f"the tokenizer has the chat templates {names}, and none is called 'default', so which one renders the "
            "dialogues is open. Name one of them 'default' in its chat_template."
        ) from None


def has_generation_blocks(chat_template: str) -> bool:
    """Whether the template marks what the assistant says by {% generation %} blocks."""
    return bool(_GENERATION_BLOCK.search(chat_template))


def list_special_tokens(tokenizer: Tokenizer) -> list[str]:
    """The texts that the tokenizer reads as special tokens, the longest first."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)


def render_chat(turns: Sequence[Turn], tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> str:
    """The dialogue as text, by the tokenizer's chat template.

    Args:
        turns: of the dialogue, in order.
        tokenizer: of transformers, with a chat template.
        add_generation_prompt: whether the text goes on to where the assistant is to speak.

    Returns:
        The text.

    Raises:
        ChatTemplateError: the template raised something; a caller puts the place of the row before the sentence.
        TemplateLimitError: it took too much time or memory, or wrote too much. In another than the main thread, only
            what it writes is limited.
    """

    def render() -> str:
        messages = list(map(turn_to_message, turns))
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)  # type: ignore[return-value]

    return _render_within_limits(render, turns)


def render_with_blocks(turns: Sequence[Turn], tokenizer: Tokenizer) -> RenderedChat:
    """The dialogue as text, with the characters that {% generation %} blocks mark.

    Args:
        turns: of the dialogue, in order.
        tokenizer: of transformers, with a chat template that has such blocks.

    Returns:
        The text and its blocks.

    Raises:
        ChatTemplateError: as of `render_chat`.
        TemplateLimitError: as of `render_chat`.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    blocks: list[tuple[int, int]] = []
    special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def render() -> str:
        rendered: Any = render_jinja_template(
            [list(map(turn_to_message, turns))],
            chat_template=get_chat_template(tokenizer),
            return_assistant_tokens_mask=True,
            **special_tokens,
        )
        ((text,), (found,)) = rendered
        blocks.extend(found)
        return text

    return RenderedChat(_render_within_limits(render, turns), blocks)


def _render_within_limits(render: Callable[[], str], turns: Sequence[Turn]) -> str:
    import jinja2

    try:
        with _limit_time_and_memory():
            text = render()
        if len(text) > MAX_GROWTH + 10 * sum(len(turn.content) + len(turn.reasoning) for turn in turns):
            raise _LimitError(f"writes {len(text):,} characters")
    except (_LimitError, MemoryError) as error:
        limit = error if isinstance(error, _LimitError) else "takes more memory than there is"
        raise TemplateLimitError(
            f"the chat template {limit} for a dialogue of {len(turns)} messages and was stopped. Mend the loop in "
            f"it, or {ANOTHER_TEMPLATE}."
        ) from None
    except Exception as error:  # a template can raise anything: it computes with what it is given
        words = " ".join(str(error).split())[:400]
        if type(error) is jinja2.TemplateError:  # of raise_exception: the template means the dialogue
            roles = [turn.role for turn in turns]
            raise ChatTemplateError(
                f"the chat template refuses the dialogue with the roles {roles}: {words}. Change the row as it asks, "
                f"or {ANOTHER_TEMPLATE}."
            ) from None
        line = _find_template_line(error)
        at = f" at its line {line}" if line else ""
        raise ChatTemplateError(
            f"the chat template fails{at} ({type(error).__name__}: {words or 'without a word'}). Mend the template "
            f"(chat_template.jinja or tokenizer_config.json), or {ANOTHER_TEMPLATE}."
        ) from None
    return text


def _find_template_line(error: Exception) -> int | None:
    """Where in the template it was raised; jinja2 puts the template's lines into the traceback."""
    if isinstance(line := getattr(error, "lineno", None), int):
        return line
    trace, template_line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            template_line = trace.tb_lineno
        trace = trace.tb_next
    return template_line


@contextmanager
def _limit_time_and_memory() -> Iterator[None]:
    """Raises _LimitError in a rendering that takes too much of either.

    A timer's signal looks at both: it comes through in the middle of a loop, and of the arithmetic of large numbers.
    Signals reach the main thread alone; in another there is no limit. The peak of memory is the process's, which other
    threads raise, too, so it counts only from where the rendering has worked for longer than TICK_SECONDS itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    start, peak = time.thread_time(), _peak_memory()

    def check(number: int, frame: Any) -> None:
        seconds = time.thread_time() - start
        if seconds > MAX_SECONDS:
            raise _LimitError(f"does not end within {MAX_SECONDS:g} s")
        if seconds > TICK_SECONDS and _peak_memory() - peak > MAX_BYTES:
            raise _LimitError(f"takes more than {MAX_BYTES >> 20} MiB")

    handler = signal.signal(signal.SIGALRM, check)
    timer = signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _take_pending_signal()
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    if time.thread_time() - start > TICK_SECONDS:
        check(0, None)  # one long step of the interpreter, in which no signal came through


def _take_pending_signal() -> None:
    """Nothing: the interpreter hands out signals where a function begins, here to the handler that they are for."""


def _peak_memory() -> int:
    """Bytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
