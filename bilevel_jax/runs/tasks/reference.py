"""Reference-model log-probabilities for DPO, stored by example id."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh
from jaxtyping import Float

from bilevel_jax.core.types import Batch, Frozen, Params
from bilevel_jax.lm import models
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.lm.hub.downloads import find_model_files
from bilevel_jax.lm.losses import sft
from bilevel_jax.runs.config.schema import ModelSection
from bilevel_jax.runs.infra import distributed, identity, run_dir
from bilevel_jax.runs.infra.placement import align_layout, place_stream
from bilevel_jax.runs.tasks.evaluation import evaluate_per_example

REFERENCE_FILE = "reference.parquet"


def attach_reference_margins(
    corpora: Mapping[str, Corpus],
    examples: Mapping[str, Sequence[Example]],
    folder: Path,
    decoder: models.Decoder,
    params: Params,
    mesh: Mesh,
    *,
    model: ModelSection,
    stored: str,
    batch_size: int,
    num_micro_batches: int,
) -> dict[str, Corpus]:
    """Corpora of pairs with the reference model's margins: read where they were stored, made and stored otherwise.

    `stored` is objective.reference; a run that is resumed reads what it has written into `folder`. Rows that two
    corpora share, as those of validation behind the training examples, are computed and stored once.
    """
    model_fingerprint = fingerprint_model_files(model.name_or_path, f"{model.param_dtype} {model.base_dtype}")
    stored_path = stored or (folder / REFERENCE_FILE if distributed.is_there(folder / REFERENCE_FILE) else "")
    tables = []

    def measure(name: str) -> Float[np.ndarray, "rows 2"]:
        corpus = corpora[name]
        found = (
            read_reference_log_probs(stored_path, examples[name], corpus, model_fingerprint)
            if stored_path
            else compute_pair_log_probs(decoder, params, corpus, batch_size, num_micro_batches, mesh)
        )
        tables.append(build_reference_table(examples[name], corpus, found, model_fingerprint))
        return found

    log_probs = measure_pairs(corpora, examples, measure)
    run_dir.write_parquet(folder / REFERENCE_FILE, pa.concat_tables(tables))
    identity.check_tokens(
        folder,
        {f"reference of {name}": {"log-probabilities": identity.hash_arrays(log_probs[name])} for name in log_probs},
    )
    return {name: corpus.with_reference_margins(reference_margins(log_probs[name])) for name, corpus in corpora.items()}


def compute_pair_log_probs(
    decoder: models.Decoder, params: Params, corpus: Corpus, batch_size: int, num_micro_batches: int, mesh: Mesh
) -> Float[np.ndarray, "rows 2"]:
    """log p of both responses of each pair under a model, nats, summed over their tokens; nan for a dropped pair.

    `batch_size` pairs in so many micro-batches, as in training: the model runs on no more of them at once than there.
    """
    log_likelihoods = sft.sequence_log_likelihoods(decoder)

    def pair_log_probs(params: Params, frozen: Frozen, batch: Batch) -> jax.Array:
        return log_likelihoods(params, batch).reshape(-1, 2)

    pairs = batch_size // num_micro_batches
    flat = batches.BatchShape(num_micro_batches, pairs, 2 * pairs, batches.padded_max_length(corpus), 2)
    stream = place_stream(mesh, batches.make_evaluation_stream(corpus, align_layout(mesh, flat)))
    return evaluate_per_example(pair_log_probs, params, None, stream, corpus.num_examples)


def measure_pairs(
    corpora: Mapping[str, Corpus],
    examples: Mapping[str, Sequence[Example]],
    measure: Callable[[str], Float[np.ndarray, "rows 2"]],
) -> dict[str, Float[np.ndarray, "rows 2"]]:
    """`measure` of each corpus by its name, once for rows that two share, as validation behind the training examples
    does."""
    known: dict[str, Float[np.ndarray, "2"]] = {}
    log_probs: dict[str, Float[np.ndarray, "rows 2"]] = {}
    for name, corpus in corpora.items():
        rows = zip(examples[name], hash_pair_tokens(corpus), strict=True)
        keys = [f"{example.id} {tokens}" for example, tokens in rows]
        is_known = all(key in known for key in keys)
        log_probs[name] = np.stack([known[key] for key in keys]) if is_known else measure(name)
        known |= dict(zip(keys, log_probs[name], strict=True))
    return log_probs


def fingerprint_model_files(model: str | Path, dtype: str) -> str:
    """SHA-256 of a model's config.json and tensors, and of the dtype that they are read in."""
    digest = hashlib.sha256(dtype.encode())
    folder = find_model_files(model)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with open(path, "rb") as content:
            while chunk := content.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def build_reference_table(
    examples: Sequence[Example], corpus: Corpus, log_probs: Float[np.ndarray, "rows 2"], model_fingerprint: str
) -> pa.Table:
    """One row per pair: id, log p of each response, its token count, and a hash of the tokens that were read."""
    target_counts = _count_targets(corpus).reshape(corpus.num_examples, 2)
    columns = {
        "id": [example.id for example in examples],
        "chosen": log_probs[:, 0],
        "rejected": log_probs[:, 1],
        "chosen_tokens": target_counts[:, 0],
        "rejected_tokens": target_counts[:, 1],
        "tokens": hash_pair_tokens(corpus),
    }
    metadata = {
        "chosen": "log p(chosen response | prompt) under the reference model, nats, summed over its tokens",
        "rejected": "the same of the rejected response",
        "tokens": "hash of the ids and the mask of both sides",
        "model": model_fingerprint,
    }
    return pa.table(columns).replace_schema_metadata({key: value.encode() for key, value in metadata.items()})


def read_reference_log_probs(
    path: str | Path, examples: Sequence[Example], corpus: Corpus, model_fingerprint: str
) -> Float[np.ndarray, "rows 2"]:
    """The stored values of these examples, in their order.

    Raises ValueError where another model made them, an id is missing, or a pair's tokens are not those that were read
    (another template, truncation or tokenizer).
    """
    stored = run_dir.read_parquet(path)
    if (stored_fingerprint := (stored.schema.metadata or {}).get(b"model", b"").decode()) != model_fingerprint:
        raise ValueError(
            f"{path}: made by another model or precision (fingerprint {stored_fingerprint[:12] or 'none'}, and "
            f"model.name_or_path has {model_fingerprint[:12]}). The margins would be measured from the wrong place: "
            "leave objective.reference empty."
        )
    row_of_id = {id: row for row, id in enumerate(stored["id"].to_pylist())}
    missing = [example for example in examples if example.id not in row_of_id]
    if missing:
        raise ValueError(
            f"{path}: no row for {len(missing)} of {len(examples)} pairs, the first at {missing[0].where}. "
            "Leave objective.reference empty to make it anew."
        )
    rows = np.array([row_of_id[example.id] for example in examples])
    hashes = np.array(stored["tokens"].to_pylist())[rows]
    changed = np.flatnonzero(hashes != hash_pair_tokens(corpus))
    if len(changed):
        raise ValueError(
            f"{path}: {len(changed)} pairs were read as other tokens, the first at {examples[changed[0]].where}: the "
            "template, the truncation or the tokenizer has changed. Leave objective.reference empty to make it anew."
        )
    return np.stack([stored[side].to_numpy()[rows] for side in ("chosen", "rejected")], axis=1)


def reference_margins(log_probs: Float[np.ndarray, "rows 2"]) -> Float[np.ndarray, "examples"]:
    """log p(chosen) - log p(rejected) of each pair; 0 for a dropped one, which no batch reads."""
    return np.nan_to_num(log_probs[:, 0] - log_probs[:, 1])


def hash_pair_tokens(corpus: Corpus) -> np.ndarray:
    """16 hex digits for each row: of the ids and the mask of both sides."""
    hashes = []
    for row in range(corpus.num_examples):
        span = slice(int(corpus.offsets[2 * row]), int(corpus.offsets[2 * row + 2]))
        chosen_length = int(corpus.offsets[2 * row + 1]) - span.start
        content = corpus.ids[span].tobytes() + corpus.target_mask[span].tobytes() + str(chosen_length).encode()
        hashes.append(hashlib.sha256(content).hexdigest()[:16])
    return np.array(hashes)


def _count_targets(corpus: Corpus) -> np.ndarray:
    cumulative = np.concatenate([[0], np.cumsum(corpus.target_mask)])
    return cumulative[corpus.offsets[1:]] - cumulative[corpus.offsets[:-1]]
