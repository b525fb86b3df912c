"""The `rank` command, which ranks response generation strategies before training."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bilevel_jax.commands.rank import metrics, records, report, report_records, train_then_test
from bilevel_jax.commands.rank.candidates import choose_questions, write_candidates
from bilevel_jax.commands.rank.metrics import METRICS, ResponseMeasures
from bilevel_jax.commands.rank.model import (
    OwnAnswers,
    RankModel,
    collect_own_answers,
    drop_long_questions,
    load_rank_model,
    tokenize_for_scoring,
)
from bilevel_jax.commands.rank.strategies import (
    Question,
    StrategyResponses,
    draw_blocks,
    load_strategy_responses,
    load_written_questions,
    order_questions,
    parse_accuracies,
    read_own_answers,
)
from bilevel_jax.core.types import Batch, Stream
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.runs.config.load import RankConfig, config_hash
from bilevel_jax.runs.config.local_paths import short_file_names
from bilevel_jax.runs.infra import distributed, identity, run_dir
from bilevel_jax.runs.infra.placement import place_stream
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.scoring.likelihoods import ResumableEngine
from bilevel_jax.runs.stats import rank_correlation
from bilevel_jax.runs.tasks.text import describe_corpus
from bilevel_jax.scores import selfaligned
from bilevel_jax.scores.ifd import ifd_score
from bilevel_jax.scores.perplexity import perplexity_score
from bilevel_jax.scores.requests import ScorePlan, TokenizedExamples
from bilevel_jax.scores.selfsimilarity import response_similarity
from bilevel_jax.scores.strategies import MAX_PERPLEXITY

TABLE_FILE, RECORDS_FILE = "rank.parquet", "records.parquet"
SIGNS_OF_PLANS = {"sppl": -1, "perplexity": -1, "ifd": 1}
"""By which a score is what is measured: those of perplexity are minus it, so that the largest is the best."""


def rank(config: RankConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises as `load_strategy_responses` and `draw_blocks` do, and ValueError for questions or responses that do not fit
    the model's context, for a model that gives no answer of its own, and for accuracies of other strategies.
    """
    if config.rank.records:
        return _judge_metrics(config)
    _make_prompt_formatter(config)
    with open_run_dir(config) as folder:
        # a fault of the files is told before any work
        if config.candidates.strategies:
            asked = load_written_questions(config)
            names: tuple[str, ...] = config.candidates.strategies
        else:
            strategy_responses = load_strategy_responses(config)
            names = strategy_responses.strategies
        accuracies = parse_accuracies(config.rank.accuracies, names)
        if config.rank.own_answers:
            read_own_answers(config.rank.own_answers, config)
        rank_model = load_rank_model(config)
        if config.candidates.strategies:
            questions, notes = choose_questions(config, rank_model, *asked)
        else:
            sample = sample_blocks(config, rank_model, strategy_responses)
        with start_session(config, folder) as session:
            if config.candidates.strategies:
                path, writing_notes = write_candidates(config, rank_model, questions, session)
                strategy_responses = load_strategy_responses(replace(config, data=replace(config.data, train=(path,))))
                strategy_responses.notes[:0] = [*notes, *writing_notes]
                sample = sample_blocks(config, rank_model, strategy_responses)
                drawn = {question.id for block in sample.blocks for question in block}
                # further questions need no written responses
                sample = sample._replace(others=[one for one in questions if one.id not in drawn])
            return _run_ranking(
                config,
                rank_model,
                strategy_responses._replace(notes=strategy_responses.notes + sample.notes),
                sample,
                accuracies,
                session,
            )


def _judge_metrics(config: RankConfig) -> dict[str, Any]:
    """What result.json holds of metrics that are judged by rank.records."""
    with open_run_dir(config) as folder:
        stored = records.load_records(config.rank)
        with start_session(config, folder) as session:
            for note in stored.notes:
                session.print_line(note)
            result = records.judge_records(stored, config.rank, config.data.seed)
            result |= {"config_hash": config_hash(config)}
            run_dir.write_parquet(folder / RECORDS_FILE, records.pairs_table(result))
            run_dir.write_result(folder, result)
            report_records.write_records_report(folder)
            return result


class QuestionSample(NamedTuple):
    """The questions that strategies are judged by."""

    blocks: list[list[Question]]
    """Disjoint, of one size."""
    others: list[Question]
    """The rest that could be asked, in the order in which they would be drawn."""
    notes: list[str]
    """What was left out."""


def sample_blocks(config: RankConfig, rank_model: RankModel, strategy_responses: StrategyResponses) -> QuestionSample:
    """The blocks of questions."""
    questions, notes = drop_long_questions(config, rank_model, strategy_responses.questions), []
    if config.rank.max_question_tokens:
        notes.append(
            f"{len(questions):,} questions have at most {config.rank.max_question_tokens} tokens "
            "(rank.max_question_tokens), template included"
        )
    blocks = draw_blocks(questions, config.rank.block_size, config.rank.num_blocks, config.data.seed)
    if len(blocks) < config.rank.num_blocks:
        notes.append(f"they suffice for {len(blocks)} of {config.rank.num_blocks} blocks of {config.rank.block_size}")
    others = order_questions(questions, config.data.seed)[len(blocks) * config.rank.block_size :]
    return QuestionSample(blocks, others, notes)


def _run_ranking(
    config: RankConfig,
    rank_model: RankModel,
    strategy_responses: StrategyResponses,
    questions: QuestionSample,
    accuracies: dict[str, float],
    session: Session,
) -> dict[str, Any]:
    for note in strategy_responses.notes:
        session.print_line(note)
    began, sample = time.monotonic(), questions.blocks
    shows_answers = any("sppl" in METRICS[name].inputs for name in metrics.list_metrics(config.rank))
    others = questions.others if shows_answers else None
    own_answers = collect_own_answers(config, rank_model, sample, session, others=others)
    costs = {"answers": session.run_once("answers", lambda: time.monotonic() - began)}
    rows, num_cut = _tokenize_all_responses(config, rank_model, sample)
    identity.check_tokens(session.folder, {"responses": describe_corpus(rows.corpus, rows.examples)})
    measures, measure_costs = measure_responses(config, rank_model, sample, rows, own_answers, session)
    trial_results = (
        train_then_test.run_trials(config, strategy_responses, session) if config.rank.train_examples else None
    )
    session.set_phase("writing")
    result = metrics.rank_strategies(config.rank, strategy_responses.strategies, measures, config.data.seed)
    sizes = {
        "questions": len(strategy_responses.questions),
        "blocks": len(sample),
        "block": len(sample[0]),
        "cut": num_cut,
    }
    result |= {
        "counts": sizes | {"responses": len(rows.examples), "context": rank_model.decoder.config.max_length},
        "known": accuracies,
        "tested": trial_results,
        "against": correlate_with_truth(result, accuracies, trial_results),
        "notes": [*strategy_responses.notes, *own_answers.notes],
        "remarks": collect_remarks(config, measures, strategy_responses, rows, num_cut),
        "costs": costs | measure_costs,
        "seconds": session.job_cost("")[1] + costs["answers"],
        "config_hash": config_hash(config),
    }
    for note in (*own_answers.notes, *result["remarks"]):
        session.print_line(note)
    run_dir.write_parquet(
        session.folder / TABLE_FILE,
        build_response_table(strategy_responses.strategies, sample, measures, rows, own_answers),
    )
    run_dir.write_result(session.folder, result)
    report.write_rank_report(session.folder)
    return result


# ---- what is measured


def measure_responses(
    config: RankConfig,
    rank_model: RankModel,
    sample: Sequence[Sequence[Question]],
    rows: TokenizedExamples,
    own_answers: OwnAnswers,
    session: Session,
) -> tuple[ResponseMeasures, dict[str, float]]:
    """What the configured metrics read of every response, [blocks, block, strategies]; and what it cost."""
    shape = len(sample), len(sample[0]), len(sample[0][0].responses)
    inputs = {part for name in metrics.list_metrics(config.rank) for part in METRICS[name].inputs}
    plans: dict[str, ScorePlan] = {}
    if "sppl" in inputs:
        prompted_rows = tokenize_for_scoring(
            config, rank_model, build_self_aligned_prompts(config, sample, own_answers)
        )[0]
        plans["sppl"] = selfaligned.sppl_score(prompted_rows, prompted_rows)
    if "perplexity" in inputs:
        plans["perplexity"] = perplexity_score(rows, rows)
    if "ifd" in inputs:
        plans["ifd"] = ifd_score(rank_model.tokenizer.bos_token_id)(rows, rows)
    for name, plan in plans.items():
        _check_lengths(name, plan, rows, rank_model.decoder.config.max_length)
    pairs = (
        _pair_with_own_answers(config, rank_model, rows, sample, own_answers)
        if "self_similarity" in inputs
        else ([], [])
    )
    distinct = {request for plan in plans.values() for request in plan.requests}
    session.set_phase("scoring", total=session.work_done + len(distinct) + len({*pairs[0], *pairs[1]}))

    stored = session.run_once("scores", lambda: _compute_likelihood_scores(rank_model, plans, session))
    measures = {name: np.reshape(values, shape) for name, values in stored["values"].items()}
    costs = {"scores": stored["seconds"], "places": stored["places"], "tokens": stored["tokens"]}
    if "self_similarity" in inputs:
        stored = session.run_once("self_similarity", lambda: _compute_self_similarity(rank_model, pairs, session))
        measures["self_similarity"] = np.reshape(stored["values"], (*shape, -1)).mean(-1)
        costs["self_similarity"] = stored["seconds"]
    if "rewards" in inputs:
        measures["rewards"] = np.array([[one.rewards for one in block] for block in sample])
    for name, values in measures.items():
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise FloatingPointError(
                f"{rows.examples[at].where}: {name} of the response of strategy {at % shape[2] + 1} is "
                f"{values.ravel()[at]}. Is the model's loss finite, and does the response have more than one token?"
            )
    return measures, costs


def build_self_aligned_prompts(
    config: RankConfig, sample: Sequence[Sequence[Question]], own_answers: OwnAnswers
) -> list[Example]:
    """Every response behind its question with the model's own answers to other questions: of its block, and, where a
    verifier rejects too many of these, further ones."""
    write = _make_prompt_formatter(config)
    out = []
    for block, texts, accepted, is_shown in zip(
        sample, own_answers.texts, own_answers.accepted, own_answers.shown, strict=True
    ):
        further = own_answers.further if accepted.sum() < config.rank.k + 2 else []
        is_shown = np.concatenate([is_shown, np.ones(len(further), bool)])
        shown_by_question = selfaligned.choose_shown_answers(is_shown, config.rank.k)
        answered = [*zip(block, (drafts[0] for drafts in texts), strict=True), *further]
        own = [
            selfaligned.append_result(answer, question.reference_answer, config.rank.final_answer)
            for question, answer in answered
        ]
        for question, places in zip(block, shown_by_question[: len(block)], strict=True):
            with_own = question._replace(text=write(question.text, [own[at] for at in places]))
            out += [with_own.with_response(response) for response in question.responses]
    return out


def correlate_with_truth(
    result: dict[str, Any], accuracies: dict[str, float], trial_results: dict[str, Any] | None
) -> dict[str, dict[str, float]]:
    """Spearman's correlation of each metric, larger is better, with known accuracies and with train-then-test."""
    truths = {}
    if accuracies:
        truths["accuracy"] = np.array([accuracies[name] for name in result["strategies"]])
    if trial_results:
        by, sign = trial_results["decided_by"], 1 if trial_results["decided_by"] == "accuracy" else -1
        truths["train-then-test"] = sign * np.array([line["mean"][by][0] for line in trial_results["strategies"]])
    return {
        title: {
            name: rank_correlation(METRICS[name].sign * np.array([line["score"].value for line in lines]), truth)
            for name, lines in result["metrics"].items()
        }
        for title, truth in truths.items()
    }


def build_response_table(
    strategies: Sequence[str],
    sample: Sequence[Sequence[Question]],
    measures: ResponseMeasures,
    rows: TokenizedExamples,
    own_answers: OwnAnswers,
) -> pa.Table:
    """A row for each question and strategy: where it stands, its text, what was measured, the model's own answer."""
    count = len(strategies)
    questions = [(b, q, question) for b, block in enumerate(sample) for q, question in enumerate(block)]
    cells = [(b, q, question, s) for b, q, question in questions for s in range(count)]
    file_names = short_file_names(question.file for _, _, question, _ in cells)
    columns: dict[str, Any] = {
        "id": [question.id for _, _, question, _ in cells],
        "file": [file_names[question.file] for _, _, question, _ in cells],
        "line": [question.line for _, _, question, _ in cells],
        "block": [b for b, _, _, _ in cells],
        "strategy": [strategies[s] for _, _, _, s in cells],
        "question": [question.text for _, _, question, _ in cells],
        "response": [question.responses[s] for _, _, question, s in cells],
        "own_answer": [own_answers.texts[b][q][0] for b, q, _, _ in cells],
        "own_answer_kept": [bool(own_answers.accepted[b, q]) for b, q, _, _ in cells],
        "tokens": [int(rows.sequences(i)[0].target_mask.sum()) for i in range(len(cells))],
    }
    columns |= {name: values.ravel() for name, values in measures.items()}
    about = {
        "tokens": "tokens of the response that were read, end token left out",
        "sppl": "perplexity after answers of the model's own; the least wins",
        "perplexity": "exp(nats per token); the least wins",
        "ifd": "loss with the question over loss without; the least wins",
        "self_similarity": "mean cosine of hidden states with the model's own answers; the largest wins",
        "own_answer_kept": "whether the checker let the model's own answer pass",
    }
    return pa.table(columns).replace_schema_metadata({key: text for key, text in about.items() if key in columns})


def collect_remarks(
    config: RankConfig,
    measures: ResponseMeasures,
    strategy_responses: StrategyResponses,
    rows: TokenizedExamples,
    num_cut: int,
) -> list[str]:
    """What a person should know of the numbers."""
    out, count, metric_names = [], len(rows.examples), metrics.list_metrics(config.rank)
    if num_cut:
        out.append(
            f"{num_cut:,} of {count:,} responses were cut at {config.rank.max_response_tokens} tokens "
            "(rank.max_response_tokens): the ranking is of their beginnings"
        )
    if config.rank.mean == "arithmetic":
        for name in ("sppl", "perplexity"):
            out += (
                _find_outlier_responses(METRICS[name].title, measures[name], strategy_responses, rows)
                if name in metric_names
                else []
            )
    if "mix" in metric_names and (capped := float((measures["perplexity"] >= MAX_PERPLEXITY).mean())) > 0.5:
        out.append(
            f"{capped:.0%} of the perplexities are at the cap of {MAX_PERPLEXITY:g} that mix has: what it reads of "
            "perplexity are the few others, whose differences min-max makes as large as any"
        )
    if "ifd" in metric_names and (above := float((measures["ifd"] > 1).mean())) > 0.5:
        out.append(f"IFD is above 1 for {above:.0%} of the responses: their questions make them less probable")
    if config.rank.own_answers == "" and config.generate.backend == "service":
        out.append(
            "the answers of the model are a service's: SPPL is self-aligned only where it serves this very model"
        )
    return out


# ---- parts


def _compute_likelihood_scores(rank_model: RankModel, plans: dict[str, ScorePlan], session: Session) -> dict[str, Any]:
    began, done = time.monotonic(), 0

    def on_batch(now: int) -> None:
        nonlocal done
        session.advance(now - done)
        done = now

    reader = ResumableEngine(rank_model.decoder, rank_model.params, rank_model.mesh, session)
    requests = [request for plan in plans.values() for request in plan.requests]
    replies = reader(requests, on_batch)
    on_batch(len(set(requests)))  # also what a process before this one answered
    values, at = {}, 0
    for name, plan in plans.items():
        plan_replies = replies[at : at + len(plan.requests)]
        at += len(plan_replies)
        values[name] = (SIGNS_OF_PLANS[name] * plan.combine(plan_replies)).tolist()
    size = sum(len(request.prefix) + len(request.response) for request in requests)
    return {"values": values, "seconds": time.monotonic() - began, "places": reader.positions_read, "tokens": size}


def _compute_self_similarity(
    rank_model: RankModel, pairs: tuple[list[Any], list[Any]], session: Session
) -> dict[str, Any]:
    began = time.monotonic()

    def place_on_mesh(batch: Batch) -> Batch:
        return place_stream(rank_model.mesh, Stream(lambda step: batch, 1)).batch(0)

    def progress(done: int) -> None:
        session.advance(done)
        session.check_signals()

    compute_similarity = response_similarity(
        rank_model.decoder,
        rank_model.tokenizer.bos_token_id,
        batch_size_multiple=rank_model.mesh.size,
        place_batch=place_on_mesh,
        fetch=distributed.fetch_to_host,
        on_progress=progress,
    )
    return {"values": compute_similarity(rank_model.params, *pairs).tolist(), "seconds": time.monotonic() - began}


def _pair_with_own_answers(
    config: RankConfig,
    rank_model: RankModel,
    rows: TokenizedExamples,
    sample: Sequence[Sequence[Question]],
    own_answers: OwnAnswers,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(each response, each answer of the model's own to its question), as often as there are draws."""
    own_examples = [
        question.with_response(text)
        for block, texts in zip(sample, own_answers.texts, strict=True)
        for question, drafts in zip(block, texts, strict=True)
        for text in drafts
    ]
    own_rows = tokenize_for_scoring(config, rank_model, own_examples)[0]
    draws, strategies = len(own_answers.texts[0][0]), len(sample[0][0].responses)
    responses, others = [], []
    for i in range(len(rows.examples)):
        offset = i // strategies * draws
        responses += [_response_token_ids(rows, i)] * draws
        others += [_response_token_ids(own_rows, offset + draw) for draw in range(draws)]
    return responses, others


def _response_token_ids(rows: TokenizedExamples, i: int) -> tuple[int, ...]:
    ids, supervised, _ = rows.sequences(i)[0]
    return tuple(ids[supervised].tolist())


def _tokenize_all_responses(
    config: RankConfig, rank_model: RankModel, sample: Sequence[Sequence[Question]]
) -> tuple[TokenizedExamples, int]:
    """Every response behind its question, and how many were cut."""
    return tokenize_for_scoring(
        config,
        rank_model,
        [question.with_response(text) for block in sample for question in block for text in question.responses],
    )


def _make_prompt_formatter(config: RankConfig) -> Callable[[str, Sequence[str]], str]:
    """What is asked with the answers that are shown; a ValueError where the templates of the config cannot be used."""
    return selfaligned.prompt_writer(
        config.rank.template or selfaligned.SPPL_TEMPLATE, config.rank.example_template or selfaligned.EXAMPLE_TEMPLATE
    )


def _check_lengths(name: str, plan: ScorePlan, rows: TokenizedExamples, context: int) -> None:
    lengths = np.array([len(request.prefix) + len(request.response) - 1 for request in plan.requests])
    if lengths.max() <= context:
        return
    at = int(np.argmax(lengths))
    where = rows.examples[at * len(rows.examples) // len(lengths)].where
    prefix_note = "with the answers that are shown before it, " if name == "sppl" else ""
    raise ValueError(
        f"{where}: {prefix_note}the question and a response take {lengths[at]} token places, and the model's context "
        f"has {context}; so do {int((lengths > context).sum())} of {len(lengths)}. Set rank.max_response_tokens and "
        "rank.max_question_tokens, or lower generate.max_new_tokens or rank.k; rank.template says what else stands "
        "there."
    )


def _find_outlier_responses(
    title: str, values: np.ndarray, strategy_responses: StrategyResponses, rows: TokenizedExamples
) -> list[str]:
    """How many strategies owe more than half of their arithmetic mean to one response, and the worst of them."""
    flat = values.reshape(-1, values.shape[-1])
    shares = flat.max(0) / flat.sum(0)
    if not (shares > 0.5).any():
        return []
    worst = int(shares.argmax())
    where = rows.examples[int(flat[:, worst].argmax()) * flat.shape[1] + worst].where
    return [
        f"one response makes more than half of the {title} of {int((shares > 0.5).sum())} of {len(shares)} strategies, "
        f"at worst {shares[worst]:.0%} of that of {strategy_responses.strategies[worst]} ({where}): see whether "
        "rank.mean = geometric agrees"
    ]
