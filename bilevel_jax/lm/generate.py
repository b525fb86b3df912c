"""Responses that a language model writes: what is asked for, what comes back, and whoever answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Prompt(NamedTuple):
    """A question as a generator reads it."""

    id: str
    """Keys its draws: neither the other prompts nor their order, batches or devices change what is drawn."""
    tokens: tuple[int, ...] = ()
    """For a model in this process: BOS and template included; the response begins right after."""
    messages: tuple[dict[str, str], ...] = ()
    """The same as chat messages, {"role": ..., "content": ...}, for a service."""


class Sampling(NamedTuple):
    """How a response is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0: greedy, the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability; 1: all."""
    max_new: int = 256
    """Tokens of a response at most, the end token included."""
    seed: int = 0


class Response(NamedTuple):
    """What was written after a prompt."""

    text: str
    """Without the end token."""
    tokens: tuple[int, ...]
    """Ends with the end token if `ended`; () from a service, which gives none."""
    log_probs: tuple[float, ...]
    """Nats of each token under the sampler: after temperature, top-k and top-p; () if unknown."""
    ended: bool
    """False: cut at `max_new`, or where the context ends."""


Generator = Callable[[Sequence[Prompt], Sequence[int]], list[list[Response]]]
"""(prompts, numbers of the draws) -> responses, [prompt][draw]. The same prompt and draw is the same response."""
