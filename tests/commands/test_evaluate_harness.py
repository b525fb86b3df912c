"""The prompts of `evaluate` as a task of lm-evaluation-harness."""

import re

import pytest
import yaml

from bilevel_jax.commands.evaluate import harness
from bilevel_jax.runs.config.schema import GenerateSection, VerifierSection


def test_the_task_of_the_harness(tmp_path):
    generate = GenerateSection(temperature=0.7, top_p=0.9, max_new_tokens=32)
    task = harness.make_task("mine", "prompts.jsonl", generate, VerifierSection("numeric"))
    assert yaml.safe_load(yaml.safe_dump(task)) == task
    assert task["generation_kwargs"] == {
        "until": [], "max_gen_toks": 32, "do_sample": True, "temperature": 0.7, "top_p": 0.9
    }  # fmt: skip
    step = task["filter_list"][0]["filter"][0]
    assert step["function"] == "regex" and step["group_select"] == -1
    assert re.findall(step["regex_pattern"], "Yes. 1,000 of -$3.50, right.")[-1] == "-$3.50,"
    plain = harness.make_task("mine", "prompts.jsonl", GenerateSection(temperature=0.0), VerifierSection("exact"))
    assert plain["doc_to_target"] == "{{target}}" and "filter_list" not in plain
    assert plain["generation_kwargs"]["do_sample"] is False


@pytest.mark.parametrize(
    "verifier, reference, target",
    [
        ("numeric", "so 3 + 4\n#### 1,234", "1234"), ("numeric", "x = -1234567.50", "-1234567.5"),
        ("choice", "B) blue", "B"), ("exact", "B) blue", "B) blue"), ("", "as it is", "as it is"),
    ],
)  # fmt: skip
def test_the_target_of_the_harness_is_what_the_verifier_reads(verifier, reference, target):
    assert harness.make_target(reference, VerifierSection(verifier)) == target
