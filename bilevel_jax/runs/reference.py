"""Log-probabilities of the reference model (DPO): made once, stored by id, and refused for another model or text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from bilevel_jax.lm.data import Example
from bilevel_jax.lm.tokens import Corpus

NAME = "reference.parquet"


def fingerprint(model: str | Path, dtype: str) -> str:
    """SHA-256 of a model folder's config.json and tensors, and of the dtype that they are read in."""
    digest = hashlib.sha256(dtype.encode())
    folder = Path(model)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with open(path, "rb") as content:
            while piece := content.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()


def table(examples: Sequence[Example], corpus: Corpus, values: Float[np.ndarray, "rows 2"], made_by: str) -> pa.Table:
    """One row per pair: id, log p of each response, its token count, and a hash of the tokens that were read."""
    counts = _targets(corpus).reshape(corpus.rows, 2)
    columns = {
        "id": [example.id for example in examples],
        "chosen": values[:, 0],
        "rejected": values[:, 1],
        "chosen_tokens": counts[:, 0],
        "rejected_tokens": counts[:, 1],
        "tokens": token_hashes(corpus),
    }
    meaning = {
        "chosen": "log p(chosen response | prompt) under the reference model, nats, summed over its tokens",
        "rejected": "the same of the rejected response",
        "tokens": "hash of the ids and the mask of both sides",
        "model": made_by,
    }
    return pa.table(columns).replace_schema_metadata({key: value.encode() for key, value in meaning.items()})


def read(path: str | Path, examples: Sequence[Example], corpus: Corpus, made_by: str) -> Float[np.ndarray, "rows 2"]:
    """The stored values of these examples, in their order.

    Raises ValueError where another model made them, an id is missing, or a pair's tokens are not those that were read
    (another template, truncation or tokenizer).
    """
    stored = pq.read_table(path)
    if (was := (stored.schema.metadata or {}).get(b"model", b"").decode()) != made_by:
        raise ValueError(
            f"{path}: made by another model or precision (fingerprint {was[:12] or 'none'}, and model.name_or_path has "
            f"{made_by[:12]}). The margins would be measured from the wrong place: leave objective.reference empty."
        )
    place = {id: at for at, id in enumerate(stored["id"].to_pylist())}
    missing = [example for example in examples if example.id not in place]
    if missing:
        raise ValueError(
            f"{path}: no row for {len(missing)} of {len(examples)} pairs, the first at {missing[0].where}. "
            "Leave objective.reference empty to make it anew."
        )
    rows = np.array([place[example.id] for example in examples])
    hashes = np.array(stored["tokens"].to_pylist())[rows]
    odd = np.flatnonzero(hashes != token_hashes(corpus))
    if len(odd):
        raise ValueError(
            f"{path}: {len(odd)} pairs were read as other tokens, the first at {examples[odd[0]].where}: the template, "
            "the truncation or the tokenizer has changed. Leave objective.reference empty to make it anew."
        )
    return np.stack([stored[side].to_numpy()[rows] for side in ("chosen", "rejected")], axis=1)


def margins(values: Float[np.ndarray, "rows 2"]) -> Float[np.ndarray, "rows"]:
    """log p(chosen) - log p(rejected) of each pair; 0 for a dropped one, which no batch reads."""
    return np.nan_to_num(values[:, 0] - values[:, 1])


def token_hashes(corpus: Corpus) -> np.ndarray:
    """16 hex digits for each row: of the ids and the mask of both sides."""
    out = []
    for row in range(corpus.rows):
        part = slice(int(corpus.offsets[2 * row]), int(corpus.offsets[2 * row + 2]))
        edge = int(corpus.offsets[2 * row + 1]) - part.start
        content = corpus.ids[part].tobytes() + corpus.supervised[part].tobytes() + str(edge).encode()
        out.append(hashlib.sha256(content).hexdigest()[:16])
    return np.array(out)


def _targets(corpus: Corpus) -> np.ndarray:
    ends = np.concatenate([[0], np.cumsum(corpus.supervised)])
    return ends[corpus.offsets[1:]] - ends[corpus.offsets[:-1]]
