"""The verb `rank`: which way of generating responses will train the model best, from a sample and without training."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bilevel_jax.core.types import Batch, Stream
from bilevel_jax.lm.data import Example
from bilevel_jax.runs import candidates, files, rank_report, ranking, trials
from bilevel_jax.runs import config as configs
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.candidates import Candidates, Question
from bilevel_jax.runs.config import RankConfig
from bilevel_jax.runs.likelihoods import Reader
from bilevel_jax.runs.ranking import METRICS, Measured
from bilevel_jax.runs.session import Session, run_folder, started
from bilevel_jax.runs.statistics import rank_correlation
from bilevel_jax.runs.target import Answers, Target, answers, asked, load, tokenized
from bilevel_jax.scores import selfaligned
from bilevel_jax.scores.ifd import ifd
from bilevel_jax.scores.perplexity import perplexity
from bilevel_jax.scores.requests import Plan, Rows
from bilevel_jax.scores.selfsimilarity import similarity
from bilevel_jax.scores.strategies import CAP

TABLE = "rank.parquet"


def rank(config: RankConfig) -> dict[str, Any]:
    """Run the verb in `config.output.folder` and return what result.json holds.

    Raises as `candidates.load` and `candidates.drawn` do, and ValueError for questions or responses that do not fit the
    model's context, for a model that gives no answer of its own, and for accuracies of other strategies.
    """
    _writer(config)
    with run_folder(config) as folder:
        found = candidates.load(config)
        known = candidates.accuracies(config.rank.accuracies, found.strategies)
        target = load(config)
        sample, notes = sampled(config, target, found)
        with started(config, folder) as work:
            return _work(config, target, found._replace(notes=found.notes + notes), sample, known, work)


def sampled(config: RankConfig, target: Target, found: Candidates) -> tuple[list[list[Question]], list[str]]:
    """The blocks of questions, and what was left out of them."""
    questions, most = found.questions, config.rank.max_question_tokens
    notes = []
    if most:
        made = asked(config, target, questions)
        questions = [one for one, prompt in zip(questions, made, strict=True) if len(prompt.tokens) <= most]
        notes.append(
            f"{len(questions):,} questions have at most {most} tokens (rank.max_question_tokens), template included"
        )
    sample = candidates.drawn(questions, config.rank.block_size, config.rank.num_blocks, config.data.seed)
    if len(sample) < config.rank.num_blocks:
        notes.append(f"they suffice for {len(sample)} of {config.rank.num_blocks} blocks of {config.rank.block_size}")
    return sample, notes


def _work(
    config: RankConfig, target: Target, found: Candidates, sample: list[list[Question]], known: dict[str, float],
    work: Session,
) -> dict[str, Any]:  # fmt: skip
    for note in found.notes:
        work.say(note)
    began = time.monotonic()
    said = answers(config, target, sample, work)
    costs = {"answers": time.monotonic() - began}
    rows, cut = _responses(config, target, sample)
    measured, told = measure(config, target, sample, rows, said, work)
    tested = trials.tested(config, found, work) if config.rank.train_examples else None
    work.phase("writing")
    result = ranking.ranking(config.rank, found.strategies, measured, config.data.seed)
    sizes = {"questions": len(found.questions), "blocks": len(sample), "block": len(sample[0]), "cut": cut}
    result |= {
        "counts": sizes | {"responses": len(rows.examples), "context": target.decoder.config.max_length},
        "known": known,
        "tested": tested,
        "against": against(result, known, tested),
        "notes": [*found.notes, *said.notes],
        "remarks": remarks(config, measured, found, rows, cut),
        "costs": costs | told,
        "seconds": work.cost("")[1] + costs["answers"],
        "config_hash": configs.config_hash(config),
    }
    for note in (*said.notes, *result["remarks"]):
        work.say(note)
    files.write_table(work.folder / TABLE, table(found.strategies, sample, measured, rows, said))
    files.write_json(work.folder / "result.json", result)
    rank_report.write(work.folder)
    return result


# ---- what is measured


def measure(
    config: RankConfig, target: Target, sample: Sequence[Sequence[Question]], rows: Rows, said: Answers, work: Session
) -> tuple[Measured, dict[str, float]]:
    """What the configured metrics read of every response, [blocks, block, strategies]; and what it cost."""
    shape = len(sample), len(sample[0]), len(sample[0][0].responses)
    wanted = {part for name in ranking.wanted(config.rank) for part in METRICS[name].reads}
    plans: dict[str, Plan] = {}
    if "sppl" in wanted:
        shown = tokenized(config, target, prompted(config, sample, said))[0]
        plans["sppl"] = selfaligned.sppl(shown, shown)
    if "perplexity" in wanted:
        plans["perplexity"] = perplexity(rows, rows)
    if "ifd" in wanted:
        plans["ifd"] = ifd(target.tokenizer.bos_token_id)(rows, rows)
    for name, plan in plans.items():
        _check_lengths(name, plan, rows, target.decoder.config.max_length)
    pairs = _pairs(config, target, rows, sample, said) if "self_similarity" in wanted else ([], [])
    distinct = {request for plan in plans.values() for request in plan.requests}
    work.phase("scoring", total=work.work + len(distinct) + len({*pairs[0], *pairs[1]}))

    told = work.once("scores", lambda: _scored(target, plans, work))
    found = {name: np.reshape(values, shape) for name, values in told["values"].items()}
    costs = {"scores": told["seconds"], "places": told["places"], "tokens": told["tokens"]}
    if "self_similarity" in wanted:
        told = work.once("self_similarity", lambda: _alike(target, pairs, work))
        found["self_similarity"] = np.reshape(told["values"], (*shape, -1)).mean(-1)
        costs["self_similarity"] = told["seconds"]
    if "rewards" in wanted:
        found["rewards"] = np.array([[one.rewards for one in block] for block in sample])
    for name, values in found.items():
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise FloatingPointError(
                f"{rows.examples[at].where}: {name} of the response of strategy {at % shape[2] + 1} is "
                f"{values.ravel()[at]}. Is the model's loss finite, and does the response have more than one token?"
            )
    return found, costs


def prompted(config: RankConfig, sample: Sequence[Sequence[Question]], said: Answers) -> list[Example]:
    """Every response behind its question with the model's own answers to other questions of its block."""
    write = _writer(config)
    out = []
    for block, texts, kept in zip(sample, said.texts, said.kept, strict=True):
        shown = selfaligned.examples(kept, config.rank.k)
        own = [
            selfaligned.with_result(some[0], one.result, config.rank.final_answer)
            for one, some in zip(block, texts, strict=True)
        ]
        for one, places in zip(block, shown, strict=True):
            with_own = one._replace(text=write(one.text, [own[at] for at in places]))
            out += [with_own.answered(response) for response in one.responses]
    return out


def against(
    result: dict[str, Any], known: dict[str, float], tested: dict[str, Any] | None
) -> dict[str, dict[str, float]]:
    """Spearman's correlation of each metric, larger is better, with known accuracies and with train-then-test."""
    truths = {}
    if known:
        truths["accuracy"] = np.array([known[name] for name in result["strategies"]])
    if tested:
        by, sign = tested["decided_by"], 1 if tested["decided_by"] == "accuracy" else -1
        truths["train-then-test"] = sign * np.array([line["mean"][by][0] for line in tested["strategies"]])
    return {
        title: {
            name: rank_correlation(METRICS[name].sign * np.array([line["score"].value for line in lines]), truth)
            for name, lines in result["metrics"].items()
        }
        for title, truth in truths.items()
    }


def table(
    strategies: Sequence[str], sample: Sequence[Sequence[Question]], measured: Measured, rows: Rows, said: Answers
) -> pa.Table:
    """A row for each question and strategy: where it stands, its text, what was measured, the model's own answer."""
    count = len(strategies)
    questions = [(b, q, one) for b, block in enumerate(sample) for q, one in enumerate(block)]
    each = [(b, q, one, s) for b, q, one in questions for s in range(count)]
    columns: dict[str, Any] = {
        "id": [one.id for _, _, one, _ in each],
        "file": [one.file for _, _, one, _ in each],
        "line": [one.line for _, _, one, _ in each],
        "block": [b for b, _, _, _ in each],
        "strategy": [strategies[s] for _, _, _, s in each],
        "question": [one.text for _, _, one, _ in each],
        "response": [one.responses[s] for _, _, one, s in each],
        "own_answer": [said.texts[b][q][0] for b, q, _, _ in each],
        "own_answer_kept": [bool(said.kept[b, q]) for b, q, _, _ in each],
        "tokens": [int(rows.sides(i)[0].supervised.sum()) for i in range(len(each))],
    }
    columns |= {name: values.ravel() for name, values in measured.items()}
    about = {
        "tokens": "tokens of the response that were read, end token left out",
        "sppl": "perplexity after answers of the model's own; the least wins",
        "perplexity": "exp(nats per token); the least wins",
        "ifd": "loss with the question over loss without",
        "self_similarity": "mean cosine of hidden states with the model's own answers; the largest wins",
        "own_answer_kept": "whether the checker let the model's own answer pass",
    }
    return pa.table(columns).replace_schema_metadata({key: text for key, text in about.items() if key in columns})


def remarks(config: RankConfig, measured: Measured, found: Candidates, rows: Rows, cut: int) -> list[str]:
    """What a person should know of the numbers."""
    out, count, shown = [], len(rows.examples), ranking.wanted(config.rank)
    if cut:
        out.append(
            f"{cut:,} of {count:,} responses were cut at {config.rank.max_response_tokens} tokens (rank.max_response_tokens): the "
            "ranking is of their beginnings"
        )
    if config.rank.mean == "arithmetic":
        for name in ("sppl", "perplexity"):
            out += _alone(METRICS[name].title, measured[name], found, rows) if name in shown else []
    if "mix" in shown and (capped := float((measured["perplexity"] >= CAP).mean())) > 0.5:
        out.append(
            f"{capped:.0%} of the perplexities are at the cap of {CAP:g} that mix has: what it reads of perplexity are "
            "the few others, whose differences min-max makes as large as any"
        )
    if "ifd" in shown and (above := float((measured["ifd"] > 1).mean())) > 0.5:
        out.append(f"IFD is above 1 for {above:.0%} of the responses: their questions make them less probable")
    if config.rank.own_answers == "" and config.generate.backend == "service":
        out.append(
            "the answers of the model are a service's: SPPL is self-aligned only where it serves this very model"
        )
    return out


# ---- parts


def _scored(target: Target, plans: dict[str, Plan], work: Session) -> dict[str, Any]:
    began, done = time.monotonic(), 0

    def on_batch(now: int) -> None:
        nonlocal done
        work.advance(now - done)
        done = now

    read = Reader(target.decoder, target.params, target.mesh, work)
    requests = [request for plan in plans.values() for request in plan.requests]
    replies = read(requests, on_batch)
    values, at = {}, 0
    for name, plan in plans.items():
        some = replies[at : at + len(plan.requests)]
        at += len(some)
        sign = METRICS[name].sign  # scores are larger-is-better; what is shown are perplexities
        values[name] = (sign * plan.combine(some)).tolist()
    size = sum(len(request.prefix) + len(request.response) for request in requests)
    return {"values": values, "seconds": time.monotonic() - began, "places": read.places, "tokens": size}


def _alike(target: Target, pairs: tuple[list[Any], list[Any]], work: Session) -> dict[str, Any]:
    began = time.monotonic()

    def place(batch: Batch) -> Batch:
        return placing.placed(target.mesh, Stream(lambda step: batch, 1)).batch(0)

    def progress(done: int) -> None:
        work.advance(done)
        work.check()

    read = similarity(
        target.decoder, target.tokenizer.bos_token_id, multiple=target.mesh.size, place=place, progress=progress
    )
    return {"values": read(target.params, *pairs).tolist(), "seconds": time.monotonic() - began}


def _pairs(
    config: RankConfig, target: Target, rows: Rows, sample: Sequence[Sequence[Question]], said: Answers
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(each response, each answer of the model's own to its question), as often as there are draws."""
    own = [
        one.answered(text)
        for block, texts in zip(sample, said.texts, strict=True)
        for one, some in zip(block, texts, strict=True)
        for text in some
    ]
    their = tokenized(config, target, own)[0]
    draws, strategies = len(said.texts[0][0]), len(sample[0][0].responses)
    responses, others = [], []
    for i in range(len(rows.examples)):
        first = i // strategies * draws
        responses += [_ids(rows, i)] * draws
        others += [_ids(their, first + draw) for draw in range(draws)]
    return responses, others


def _ids(rows: Rows, i: int) -> tuple[int, ...]:
    ids, supervised = rows.sides(i)[0]
    return tuple(ids[supervised].tolist())


def _responses(config: RankConfig, target: Target, sample: Sequence[Sequence[Question]]) -> tuple[Rows, int]:
    """Every response behind its question, and how many were cut."""
    return tokenized(
        config, target, [one.answered(text) for block in sample for one in block for text in one.responses]
    )


def _writer(config: RankConfig) -> Callable[[str, Sequence[str]], str]:
    """What is asked with the answers that are shown; a ValueError where the templates of the config cannot be used."""
    return selfaligned.prompt(
        config.rank.template or selfaligned.TEMPLATE, config.rank.example_template or selfaligned.EXAMPLE
    )


def _check_lengths(name: str, plan: Plan, rows: Rows, context: int) -> None:
    lengths = np.array([len(request.prefix) + len(request.response) - 1 for request in plan.requests])
    if lengths.max() <= context:
        return
    at = int(np.argmax(lengths))
    where = rows.examples[at * len(rows.examples) // len(lengths)].where
    shown = "with the answers that are shown before it, " if name == "sppl" else ""
    raise ValueError(
        f"{where}: {shown}the question and a response take {lengths[at]} token places, and the model's context has "
        f"{context}; so do {int((lengths > context).sum())} of {len(lengths)}. Set rank.max_response_tokens and "
        "rank.max_question_tokens, or lower generate.max_new_tokens or rank.k; rank.template says what else stands there."
    )


def _alone(title: str, values: np.ndarray, found: Candidates, rows: Rows) -> list[str]:
    """How many strategies owe more than half of their arithmetic mean to one response, and the worst of them."""
    flat = values.reshape(-1, values.shape[-1])
    shares = flat.max(0) / flat.sum(0)
    if not (shares > 0.5).any():
        return []
    s = int(shares.argmax())
    where = rows.examples[int(flat[:, s].argmax()) * flat.shape[1] + s].where
    return [
        f"one response makes more than half of the {title} of {int((shares > 0.5).sum())} of {len(shares)} strategies, "
        f"at worst {shares[s]:.0%} of that of {found.strategies[s]} ({where}): see whether rank.mean = geometric agrees"
    ]
