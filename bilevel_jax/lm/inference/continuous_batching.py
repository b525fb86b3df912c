"""Continuous batching, where a waiting prompt takes a finished response's place."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bilevel_jax.core.types import Batch, Fetch, Params
from bilevel_jax.lm.inference.padding import BatchShapes, pad_left
from bilevel_jax.lm.inference.sampling import SamplingParams, log_probabilities, make_draw_keys, sample_tokens
from bilevel_jax.lm.models.cache import EMPTY_POSITION, KVCache, write_cache
from bilevel_jax.lm.models.decoder import Decoder

REFILL_SHARE = 4
"""Waiting prompts are read once this part of the places, 1 in 4, is free; the last responses move together likewise."""
MAX_KEPT_SHARE = 0.75
"""Places are given up once at most this part of them is wanted: it takes the compilation of a smaller batch."""
MAX_SLOT_RATIO = 1.2
"""Prompts share a batch where its rows are at most this many times as long as each would need."""


class Request(NamedTuple):
    """A response to generate."""

    prompt: int
    """The index of its prompt."""
    draw: int


class Tokens(NamedTuple):
    """The tokens of a response, the end token included, and their log-probs."""

    ids: list[int]
    log_probs: list[float]


class Places(NamedTuple):
    """The rows of a batch, each with a response that grows or none; rows are axis 1 of every array.

    All rows write into one slot of their caches in a step, one after another in a ring: a row that begins later has its
    tokens in other slots than its neighbours, at the positions that they have in its own sequence.
    """

    keys: Float[Array, "layers rows kv_heads dim slots"]
    values: Float[Array, "layers rows kv_heads slots dim"]
    slot_positions: Int[Array, "1 rows slots"]
    words: Int[Array, "1 rows 2"]
    """Of the hash of the prompt's id."""
    draws: Int[Array, "1 rows"]
    active: Bool[Array, "1 rows"]
    """Whether the response still grows."""
    num_tokens: Int[Array, "1 rows"]
    """Its tokens so far."""
    token: Int[Array, "1 rows"]
    """The last of them, not yet read."""
    position: Int[Array, "1 rows"]
    """Of that token."""
    tokens: Int[Array, "1 rows max_new_tokens"]
    """A ring: those of step t in column t mod max_new_tokens."""
    log_probs: Float[Array, "1 rows max_new_tokens"]


class PromptBlock(NamedTuple):
    """Prompts that were read."""

    cache: KVCache
    last_hidden: Float[Array, "prompts width"]
    """Of the last token of each."""


@dataclass(frozen=True, eq=False)
class Programs:
    """What runs on the devices; `compile_programs` compiles each once for each shape."""

    decoder: Decoder
    sampling: SamplingParams
    end_tokens: tuple[int, ...]

    def read_prompts(self, params: Params, batch: Batch) -> PromptBlock:
        """The key-value cache of prompts, padded on the left, and the hidden state that predicts the first token."""
        hidden, cache = self.decoder.extend(params, (), batch["tokens"][0], batch["positions"][0])
        return PromptBlock(cache, hidden[:, -1])

    def fill(self, params: Params, places: Places, block: PromptBlock, batch: Batch, time: Array) -> Places:
        """The places of `batch["filled"]` begin the responses to the prompts `batch["source_row"]` of the block."""
        filled, source_row = batch["filled"], batch["source_row"][0]
        cache = block.cache
        length = cache.positions.shape[1]

        def take(new: Array, old: Array) -> Array:
            return jnp.where(filled.reshape(filled.shape + (1,) * (old.ndim - 2)), new, old)

        words, draws = take(batch["words"], places.words), take(batch["draws"], places.draws)
        keys = make_draw_keys(self.sampling.seed, words[0], draws[0])
        logits = block.last_hidden[source_row] @ self.decoder.head(params)
        token, log_prob = self._choose(logits, keys, jnp.zeros(len(source_row), jnp.int32))
        prompt_positions = jnp.pad(
            cache.positions[source_row],
            [(0, 0), (0, places.slot_positions.shape[2] - length)],
            constant_values=EMPTY_POSITION,
        )
        growing = ~self._is_end(token) & (self.sampling.max_new_tokens > 1)
        return Places(
            places.keys.at[..., :length].set(take(cache.keys[:, source_row], places.keys[..., :length])),
            places.values.at[:, :, :, :length].set(take(cache.values[:, source_row], places.values[:, :, :, :length])),
            take(prompt_positions[None], places.slot_positions),
            words,
            draws,
            take(growing[None], places.active),
            take(jnp.ones_like(places.num_tokens), places.num_tokens),
            take(token[None], places.token),
            take(cache.positions[source_row, -1][None] + 1, places.position),
            self._write_column(places.tokens, token, filled, time - 1),
            self._write_column(places.log_probs, log_prob, filled, time - 1),
        )

    def generate_tokens(
        self, params: Params, places: Places, busy_until: Int[Array, "1 rows"], time: Array, quorum: Array
    ) -> tuple[Places, Array]:
        """Step by step a token of every active response, until `quorum` places are free or no response is active.

        A place without an active response is free from the time `busy_until` on.
        """
        head = self.decoder.head(params)
        keys = make_draw_keys(self.sampling.seed, places.words[0], places.draws[0])
        num_slots = max(self.sampling.max_new_tokens - 1, 1)
        first_slot = places.keys.shape[-1] - num_slots

        def goes_on(state: tuple[Places, Array]) -> Array:
            places, time = state
            is_free = ~places.active & (time >= busy_until)
            return places.active.any() & (is_free.sum() < quorum)

        def step(state: tuple[Places, Array]) -> tuple[Places, Array]:
            places, time = state
            active = places.active
            cache = KVCache(places.keys, places.values, places.slot_positions[0])
            # what a place without a response reads is padding, wherever its positions have come to
            positions = jnp.where(active, places.position, EMPTY_POSITION)
            hidden, block = self.decoder.extend(params, (cache,), places.token[0][:, None], positions[0][:, None])
            cache = write_cache(cache, block, first_slot + time % num_slots)
            token, log_prob = self._choose(hidden[:, 0] @ head, keys, places.num_tokens[0])
            num_tokens = places.num_tokens + active
            grown = places._replace(
                keys=cache.keys,
                values=cache.values,
                slot_positions=cache.positions[None],
                active=active & ~self._is_end(token)[None] & (num_tokens < self.sampling.max_new_tokens),
                num_tokens=num_tokens,
                token=jnp.where(active, token[None], places.token),
                position=places.position + active,
                tokens=self._write_column(places.tokens, token, active, time),
                log_probs=self._write_column(places.log_probs, log_prob, active, time),
            )
            return grown, time + 1

        return jax.lax.while_loop(goes_on, step, (places, time))

    def keep_rows(self, places: Places, rows: Int[Array, "1 kept"]) -> Places:
        """Only these rows, in this order; -1: a place without a response."""
        kept = jax.tree.map(lambda leaf: leaf[:, rows[0]], places)
        return kept._replace(active=kept.active & (rows >= 0))

    def _choose(self, logits: Array, keys: PRNGKeyArray, steps: Int[Array, "rows"]) -> tuple[Array, Array]:
        """A token of each row, the next after `steps` ones, and its log-prob."""
        log_p = log_probabilities(logits, self.sampling)
        token = sample_tokens(log_p, keys, steps) if self.sampling.temperature else jnp.argmax(log_p, -1)
        return token.astype(jnp.int32), jnp.take_along_axis(log_p, token[:, None], 1)[:, 0]

    def _is_end(self, token: Array) -> Array:
        if not self.end_tokens:
            return jnp.zeros_like(token, bool)
        return jnp.isin(token, jnp.asarray(self.end_tokens, jnp.int32))

    def _write_column(self, ring: Array, column: Array, rows: Bool[Array, "1 rows"], time: Array) -> Array:
        at = time % self.sampling.max_new_tokens
        old = jax.lax.dynamic_slice_in_dim(ring, at, 1, 2)
        return jax.lax.dynamic_update_slice_in_dim(ring, jnp.where(rows, column[None], old[..., 0])[..., None], at, 2)


class CompiledPrograms(NamedTuple):
    """The methods of `Programs`, compiled."""

    read_prompts: Callable[[Params, Batch], PromptBlock]
    fill: Callable[[Params, Places, PromptBlock, Batch, np.int32], Places]
    generate_tokens: Callable[[Params, Places, Array, np.int32, np.int32], tuple[Places, Array]]
    keep_rows: Callable[[Places, Array], Places]


def compile_programs(programs: Programs) -> CompiledPrograms:
    """The programs, each compiled at its first call of a shape; `Places` that are read are overwritten."""
    return CompiledPrograms(
        jax.jit(programs.read_prompts),
        jax.jit(programs.fill, donate_argnums=1),
        jax.jit(programs.generate_tokens, donate_argnums=1),
        jax.jit(programs.keep_rows),
    )


# ---- on the host


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Requests whose caches have one shape, in the order in which they take their places."""

    requests: Sequence[Request]
    prompt_tokens: Mapping[int, Sequence[int]]
    words: Mapping[int, np.ndarray]
    """uint32[2] of each prompt."""
    length: int
    """Tokens that the prompts are padded to."""
    num_draws: int
    """Of each prompt."""


def plan_batches(
    prompt_tokens: Sequence[Sequence[int]],
    ids: Sequence[str],
    words: Sequence[np.ndarray],
    draws: Sequence[int],
    shapes: BatchShapes,
) -> list[BatchPlan]:
    """All draws of all prompts, longest prompts first; a function of the prompts and draws alone."""
    order = sorted(range(len(ids)), key=lambda at: (-len(prompt_tokens[at]), ids[at]))
    groups: list[list[int]] = []
    longest = 0
    for at in order:
        length = shapes.pick_length(len(prompt_tokens[at]))
        new = shapes.num_new_tokens
        if not groups or longest + new > MAX_SLOT_RATIO * (length + new):
            groups.append([])
            longest = length
        groups[-1].append(at)
    return [
        BatchPlan(
            [Request(at, draw) for at in group for draw in draws],
            {at: prompt_tokens[at] for at in group},
            {at: words[at] for at in group},
            shapes.pick_length(len(prompt_tokens[group[0]])),
            len(draws),
        )
        for group in groups
    ]


@dataclass(frozen=True, eq=False)
class ContinuousBatching:
    """Generates the responses of a plan; the state of a run is a `_BatchRun`."""

    programs: CompiledPrograms
    sampling: SamplingParams
    shapes: BatchShapes
    place: Callable[[Batch], Batch]
    fetch: Fetch

    def generate(
        self, params: Params, plan: BatchPlan, known_counts: Mapping[Request, int]
    ) -> Iterator[list[tuple[Request, Tokens]]]:
        """The responses that end together, one list after another.

        A place, and so the rounding of log p, follows from the numbers of tokens of the responses before. So a response
        that is known is not generated, but holds its place for its number of tokens, in `known_counts`.
        """
        if all(request in known_counts for request in plan.requests):
            return
        run = _BatchRun(self, params, plan, known_counts)
        ended: list[tuple[Request, Tokens]] = []
        while run.fill_places():
            run.start_tokens()
            if ended:
                yield ended  # read on the host while the devices compute
            ended = run.take_ended()
        if ended:
            yield ended


class _BatchRun:
    """Which responses stand in which places, and which wait."""

    def __init__(
        self, engine: ContinuousBatching, params: Params, plan: BatchPlan, known_counts: Mapping[Request, int]
    ) -> None:
        self.engine, self.params, self.plan, self.known_counts = engine, params, plan, known_counts
        self.waiting = deque(plan.requests)
        self.num_rows = engine.shapes.pad_rows(len(plan.requests), plan.length)
        self.is_refilled = len(plan.requests) > self.num_rows
        self.requests: list[Request | None] = [None] * self.num_rows
        self.began = np.zeros(self.num_rows, np.int64)
        self.busy_until = np.zeros(self.num_rows, np.int32)
        """The times when the known responses end; 0 of the others."""
        self.time = 0
        self.places: Places | None = None
        self.end_time: Array | None = None
        """When the devices paused."""
        prompts = list(dict.fromkeys(request.prompt for request in plan.requests))
        at_once = len(prompts) if not self.is_refilled else -(-self._quorum() // plan.num_draws)
        self.block_rows = engine.shapes.pad_rows(at_once, plan.length)
        self.block_of = {prompt: divmod(at, self.block_rows) for at, prompt in enumerate(prompts)}
        self.prompts = prompts
        self.block_number = -1
        self.block: PromptBlock | None = None

    def fill_places(self) -> bool:
        """Move waiting requests to free places; False where none is left at all."""
        if not self.waiting and not any(self.requests):
            return False
        self._drop_empty_rows()
        free = [row for row, request in enumerate(self.requests) if request is None]
        begun: dict[int, list[int]] = {}
        for row in free[: len(self.waiting)]:
            request = self.waiting.popleft()
            self.requests[row], self.began[row] = request, self.time
            count = self.known_counts.get(request)
            self.busy_until[row] = 0 if count is None else self.time + count - 1
            if count is None:
                begun.setdefault(self.block_of[request.prompt][0], []).append(row)
        for block_number, rows in begun.items():
            self._begin(block_number, rows)
        return True

    def start_tokens(self) -> None:
        """Have the devices generate until enough places are free."""
        if self.places is not None:
            programs = self.engine.programs
            busy_until = self.engine.place({"busy_until": self.busy_until[None]})["busy_until"]
            self.places, self.end_time = programs.generate_tokens(
                self.params, self.places, busy_until, np.int32(self.time), np.int32(self._quorum())
            )

    def take_ended(self) -> list[tuple[Request, Tokens]]:
        """Free the places of responses that have ended, and return those that were not known."""
        active = np.zeros(self.num_rows, bool)
        if self.places is not None and self.end_time is not None:
            self.time = int(self.engine.fetch(self.end_time))
            active = self.engine.fetch(self.places.active)[0]
        if not active.any():  # known responses alone, which end at known times
            ends = sorted((self.busy_until[row] for row, request in enumerate(self.requests) if request), reverse=True)
            num_busy = self.num_rows - self._quorum()  # places that may be busy still
            self.time = max(self.time, int(ends[num_busy]) if num_busy < len(ends) else 0)
        ended = [
            (row, request)
            for row, request in enumerate(self.requests)
            if request is not None and not active[row] and self.busy_until[row] <= self.time
        ]
        new = [(row, request) for row, request in ended if request not in self.known_counts]
        responses = [
            (request, tokens)
            for (_, request), tokens in zip(new, self._read_tokens([row for row, _ in new]), strict=True)
        ]
        for row, _ in ended:
            self.requests[row], self.busy_until[row] = None, 0
        return responses

    def _read_tokens(self, rows: Sequence[int]) -> list[Tokens]:
        """Of responses that have ended."""
        if self.places is None or not rows:
            return []
        counts, ids, log_probs = (
            self.engine.fetch(leaf)[0] for leaf in (self.places.num_tokens, self.places.tokens, self.places.log_probs)
        )
        columns = [(self.began[row] - 1 + np.arange(counts[row])) % ids.shape[1] for row in rows]
        return [
            Tokens(ids[row, at].tolist(), log_probs[row, at].tolist()) for row, at in zip(rows, columns, strict=True)
        ]

    def _quorum(self) -> int:
        """The free places at which the devices pause."""
        if not self.is_refilled:
            return self.num_rows
        share = self.num_rows // REFILL_SHARE
        if self.waiting:
            return max(1, share)
        return self.num_rows - share * (share >= self.engine.shapes.row_multiple)

    def _drop_empty_rows(self) -> None:
        """Where more places are free than requests wait: fewer places, as many as their responses fill."""
        occupied = [row for row, request in enumerate(self.requests) if request is not None]
        num_rows = self.engine.shapes.pad_rows(max(1, len(occupied) + len(self.waiting)), self.plan.length)
        if not self.is_refilled or num_rows > MAX_KEPT_SHARE * self.num_rows:
            return
        rows = np.full(num_rows, -1, np.int32)
        rows[: len(occupied)] = occupied
        if self.places is not None:
            placed_rows = self.engine.place({"rows": rows[None]})["rows"]
            kept = self.engine.programs.keep_rows(self.places, placed_rows)
            self.places = Places(**self.engine.place(kept._asdict()))
        self.requests = [self.requests[row] if row >= 0 else None for row in rows]
        self.began, self.busy_until = self.began[rows], np.where(rows >= 0, self.busy_until[rows], 0).astype(np.int32)
        self.num_rows = num_rows

    def _begin(self, block_number: int, rows: list[int]) -> None:
        """Read the prompts of a block, unless they are there, and begin the responses in these rows."""
        if block_number != self.block_number:
            self.block = self._read_block(block_number)
            self.block_number = block_number
        assert self.block is not None
        if self.places is None:
            self.places = self._make_places(self.block)
        shape = (1, self.num_rows)
        batch = {
            "filled": np.zeros(shape, bool),
            "source_row": np.zeros(shape, np.int32),
            "draws": np.zeros(shape, np.int32),
            "words": np.zeros((*shape, 2), np.uint32),
        }
        for row in rows:
            request = self.requests[row]
            assert request is not None
            batch["filled"][0, row] = True
            batch["source_row"][0, row] = self.block_of[request.prompt][1]
            batch["draws"][0, row] = request.draw
            batch["words"][0, row] = self.plan.words[request.prompt]
        self.places = self.engine.programs.fill(
            self.params, self.places, self.block, self.engine.place(batch), np.int32(self.time)
        )

    def _read_block(self, number: int) -> PromptBlock:
        prompts = self.prompts[number * self.block_rows : (number + 1) * self.block_rows]
        ids = [np.asarray(self.plan.prompt_tokens[prompt], np.int32) for prompt in prompts]
        batch = pad_left(ids, [0] * len(ids), self.block_rows, self.plan.length)
        return self.engine.programs.read_prompts(self.params, self.engine.place(batch))

    def _make_places(self, block: PromptBlock) -> Places:
        """Places without responses."""
        layers, _, kv_heads, dim, length = block.cache.keys.shape
        rows, max_new_tokens = self.num_rows, self.engine.sampling.max_new_tokens
        num_slots = length + max(max_new_tokens - 1, 1)
        dtype = block.cache.keys.dtype
        arrays: Batch = {
            "keys": np.zeros((layers, rows, kv_heads, dim, num_slots), dtype),
            "values": np.zeros((layers, rows, kv_heads, num_slots, dim), dtype),
            "slot_positions": np.full((1, rows, num_slots), EMPTY_POSITION, np.int32),
            "words": np.zeros((1, rows, 2), np.uint32),
            "active": np.zeros((1, rows), bool),
            "tokens": np.zeros((1, rows, max_new_tokens), np.int32),
            "log_probs": np.zeros((1, rows, max_new_tokens), block.last_hidden.dtype),
        }
        arrays |= {name: np.zeros((1, rows), np.int32) for name in ("draws", "num_tokens", "token", "position")}
        return Places(**self.engine.place(arrays))
