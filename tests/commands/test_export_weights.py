"""The weighted loss of exported rows, by LLaMA-Factory's definition, is that of the run that chose the weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bilevel_jax.cli import main
from bilevel_jax.core.problem import weighted
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.lm.data.tokens import tokenize
from bilevel_jax.lm.losses.sft import sft_losses
from bilevel_jax.lm.models import DecoderConfig, init_params, make_decoder
from tests.lm.data.test_tokens import LLAMA3, bpe

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Name a pet."},
            {"role": "assistant", "content": "A cat.", "weight": 0.5},
            {"role": "user", "content": "Which one?"},
            {"role": "assistant", "content": "The cat is it."},
        ]
    },
    {"messages": [{"role": "user", "content": "Or a dog?"}, {"role": "assistant", "content": "A dog, or a pet."}]},
    {
        "messages": [
            {"role": "system", "content": "Which pet?"},
            {"role": "user", "content": "Is it?"},
            {"role": "assistant", "content": "It is.", "weight": 0},
            {"role": "user", "content": "A dog?"},
            {"role": "assistant", "content": "A cat.", "weight": 2},
        ]
    },
]
WEIGHTS = [0.75, 2.0, 1.25]


def llama_factory_loss(rows, tokenizer, log_probs_of):
    """The loss of one micro-batch of all rows in LLaMA-Factory's v1 (sources of August 2026, commit ff6d4d1), restated.

    data_engine.py makes a sample of each answer whose loss_weight is above 1e-6, rendering.py gives the tokens behind
    its prompt that weight, and sft_trainer.py takes Σ -log p · w / (Σ w + 1e-6).
    """
    total, total_weight = 0.0, 0.0
    for row in rows:
        messages = [
            {"role": one["role"], "content": "".join(part["value"] for part in one["content"])}
            for one in row["messages"]
        ]
        for cut, one in enumerate(row["messages"], 1):
            if one["role"] != "assistant" or one["loss_weight"] <= 1e-6:
                continue
            prompt, whole = (
                tokenizer(
                    tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=asks),
                    add_special_tokens=False,
                )["input_ids"]
                for part, asks in ((messages[: cut - 1], True), (messages[:cut], False))
            )
            assert whole[: len(prompt)] == prompt
            log_probs = log_probs_of(whole)[len(prompt) - 1 :]
            total -= log_probs.sum() * one["loss_weight"]
            total_weight += len(log_probs) * one["loss_weight"]
    return total / (total_weight + 1e-6)


def test_the_loss_of_exported_rows_is_ours(tmp_path, monkeypatch, capsys, x64):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    examples = load_examples(["rows.jsonl"])
    pq.write_table(pa.table({"id": [e.id for e in examples], "weight": WEIGHTS}), "weights.parquet")
    flags = ("--data.train", "rows.jsonl", "--weights", "weights.parquet", "--selection.top-share", "1")
    assert main(["export", *flags, "--export.format", "llama_factory_v1", "--out", "out"]) == 0
    capsys.readouterr()
    exported = [json.loads(line) for line in Path("out/train.jsonl").read_text().splitlines()]

    tokenizer = bpe(LLAMA3)
    config = DecoderConfig(
        vocab_size=len(tokenizer), width=16, mlp_width=24, layers=2, heads=4, kv_heads=2, head_dim=4, max_length=128,
        init_scale=0.3,
    )  # fmt: skip
    decoder, params = make_decoder(config), init_params(config, jax.random.key(0), dtype=jnp.float64)

    def log_probs_of(ids):
        """log p of each token but the first, given those before it."""
        ids = jnp.array(ids)[None]
        hidden = decoder.hidden(params, ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
        log_probs = jax.nn.log_softmax(hidden @ decoder.head(params))
        return np.asarray(log_probs[0, np.arange(ids.shape[1] - 1), ids[0, 1:]])

    theirs = llama_factory_loss(exported, tokenizer, log_probs_of)

    corpus, _ = tokenize(examples, tokenizer, max_length=128)
    mass = sum(
        weight * corpus.get_sequence(i).token_weights[corpus.get_sequence(i).target_mask].sum()
        for i, weight in enumerate(WEIGHTS)
    )
    for num_micro_batches, packing in ((1, False), (1, True), (3, False)):
        order = batches.sequential_order(corpus.kept_indices, len(ROWS), len(ROWS))
        shape = batches.fit_batch_shape(
            corpus, [order], 1, num_micro_batches=num_micro_batches, length=128, packing=packing
        )
        stream = batches.make_train_stream(corpus, order, 1, shape)
        losses = jax.jit(sft_losses(decoder, reduction="token_mean"))
        problem = weighted(lambda params, frozen, batch, losses=losses: losses(params, batch))
        split = [jax.tree.map(lambda leaf, m=m: leaf[m], stream.batch(0)) for m in range(num_micro_batches)]
        # a step of ours divides by the number of tokens: with weights whose mean over those is 1, it is theirs
        weights = jnp.array(WEIGHTS) * corpus.target_mask.sum() / mass
        ours = sum(problem.inner(params, weights[batch["index"]], None, batch) for batch in split)
        assert abs(ours - theirs) <= 1e-6 * abs(theirs)
    uniform = [
        {"messages": [one | {"loss_weight": float(one["loss_weight"] > 0)} for one in row["messages"]]}
        for row in exported
    ]
    assert abs(llama_factory_loss(uniform, tokenizer, log_probs_of) - theirs) > 1e-3 * theirs  # weights matter
