"""The prompts as a task of lm-evaluation-harness, and its command line."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.schema import GenerateSection, VerifierSection
from bilevel_jax.runs.evaluation.models import Candidate
from bilevel_jax.runs.evaluation.questions import Question
from bilevel_jax.runs.infra import distributed, run_dir
from bilevel_jax.runs.scoring.verifiers import parse_choice, parse_final_number

FOLDER, PROMPTS_FILE = "harness", "prompts.jsonl"


def write_harness_task(
    folder: Path,
    questions: Sequence[Question],
    candidates: Sequence[Candidate],
    generate: GenerateSection,
    verifier: VerifierSection,
) -> tuple[list[str], list[str]]:
    """Write FOLDER/harness: a task of lm-evaluation-harness (0.4 or newer) and its prompts.

    Returns:
        (the command of each model, notes). The harness puts a prompt into one message of the user, so dialogues and
        system messages are left out, and so are prompts without a reference, which it cannot score.
    """
    usable = [
        question
        for question in questions
        if question.reference is not None and [message["role"] for message in question.messages] == ["user"]
    ]
    notes = []
    if len(usable) < len(questions):
        notes.append(
            f"lm-evaluation-harness: {format_count('prompt', len(questions) - len(usable), ('is', 'are'))} left out, "
            "as it takes single messages with a reference"
        )
    if not usable:
        return [], notes
    target = folder / FOLDER
    distributed.run_on_first_process(lambda: target.mkdir(exist_ok=True))
    name = "bilevel_" + re.sub(r"\W+", "_", folder.resolve().name).strip("_").lower()
    rows = [
        {"id": item.id, "prompt": item.text, "target": make_target(item.reference or "", verifier)} for item in usable
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    run_dir.write_atomic(target / PROMPTS_FILE, lines)
    task = make_task(name, str(folder / FOLDER / PROMPTS_FILE), generate, verifier)
    run_dir.write_atomic(target / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False, allow_unicode=True))
    if verifier.answer_field:
        notes.append(
            "lm-evaluation-harness: the task compares with the responses of the rows, not verifier.answer_field"
        )
    if verifier.name not in ("", "exact", "numeric", "choice"):
        notes.append(f"lm-evaluation-harness: the task scores exact matches, as {verifier.name} is a function of yours")
    return [_make_command(candidate, name, target) for candidate in candidates], notes


def make_task(name: str, prompts: str, generate: GenerateSection, verifier: VerifierSection) -> dict[str, Any]:
    """The YAML of a task: generate an answer, filter it as the verifier does, compare it with the reference."""
    sampling = {"do_sample": generate.temperature > 0, "temperature": generate.temperature}
    if generate.temperature and generate.top_p < 1:
        sampling["top_p"] = generate.top_p
    if generate.temperature and generate.top_k:
        sampling["top_k"] = generate.top_k
    patterns = {"numeric": r"(-?\$?[0-9][0-9.,]*)", "choice": r"\b([A-J])\b"}
    filters: dict[str, Any] = {}
    if pattern := patterns.get(verifier.name):
        steps = [{"function": "regex", "regex_pattern": pattern, "group_select": -1}, {"function": "take_first"}]
        filters["filter_list"] = [{"name": verifier.name, "filter": steps}]
    ignored = [",", r"\$", r"\.$"] if verifier.name == "numeric" else [r"^\s+", r"\s+$"]
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": False}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": prompts}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": [], "max_gen_toks": generate.max_new_tokens, **sampling},
        **filters,
        "metric_list": [metric | {"regexes_to_ignore": ignored}],
        "repeats": 1,
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def make_target(reference: str, verifier: VerifierSection) -> str:
    """What an answer, filtered, has to equal: the number or the letter that the verifier reads in the reference."""
    if verifier.name == "choice":
        return parse_choice(reference, verifier.markers) or reference
    number = parse_final_number(reference, verifier.markers) if verifier.name == "numeric" else None
    if number is None:
        return reference
    return str(number.numerator) if number.denominator == 1 else repr(float(number))


def _make_command(candidate: Candidate, task: str, folder: Path) -> str:
    if candidate.service is not None:
        model = "local-chat-completions"
        arguments = f"model={candidate.service.name},base_url={candidate.service.url.rstrip('/')}/chat/completions"
        chat = ["--apply_chat_template"]
    else:
        assert candidate.local is not None and candidate.local.folders is not None
        folders = candidate.local.folders
        model, arguments = "hf", f"pretrained={folders.base}"
        arguments += f",peft={folders.adapter}" if folders.adapter else ""
        arguments += f",tokenizer={folders.tokenizer}" if folders.tokenizer != folders.base else ""
        chat = ["--apply_chat_template"] if candidate.template else []
    words = ["lm_eval", "--model", model, "--model_args", arguments, "--include_path", str(folder), "--tasks", task]
    return shlex.join([*words, *chat, "--log_samples", "--output_path", str(folder / "results" / candidate.role)])
