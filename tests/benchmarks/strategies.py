"""Five ways of answering sums of three-digit numbers, one table, where it is known which of them trains best.

    python -m tests.benchmarks.strategies out/sums
    bilevel-jax rank configs/rank.yaml --model.name-or-path out/sums/model --data.train out/sums/strategies.jsonl
        --data.prompt-field prompt --rank.max-question-tokens 0 --rank.max-response-tokens 0
        --generate.max-new-tokens 12 --rank.template '{examples}{question}' --rank.example-template $'{answer}\\n'
        --rank.final-answer '' --rank.pick-by perplexity --verifier.name numeric --verifier.answer-field result
        --data.validation out/sums/tested.jsonl --rank.train-examples 100
        --lora.r 0 --optimizer.learning-rate 1e-3 --train.max-steps 60 --train.global-batch-size 32

The model of `builtin:sums` knows two rules, the right one and one that forgets the carries. Strategies: right (the
sum), restated (the question and its sum), mixed (right or forgetful, by a coin for each question), forgetful, random
(another number of three digits). Every question has its sum as `result`, and so have those of tested.jsonl.
"""

import argparse
import json
import random
from pathlib import Path

from bilevel_jax.lm.builtin.sums import add_without_carries
from bilevel_jax.runs.tasks.builtin import BUILTIN_TASKS, pretrain_builtin_model


def main(out: Path) -> None:
    """Write strategies.jsonl, tested.jsonl and model/ into `out`; teaching the model takes two minutes."""
    made = BUILTIN_TASKS["sums"].write_files(out)
    if not (made / "model").exists():
        pretrain_builtin_model(made, BUILTIN_TASKS["sums"])
    drawn = random.Random(0)
    rows = []
    for line in (made / "train.jsonl").read_text("utf-8").splitlines():
        prompt = json.loads(line)["prompt"]
        a, b = map(int, prompt[:-1].split("+"))
        right, wrong = str(a + b), add_without_carries(a, b)
        responses = {
            "right": right,
            "restated": f"{prompt}{right}",
            "mixed": drawn.choice([right, wrong]),
            "forgetful": wrong,
            "random": str(drawn.randrange(100, 1000)),
        }
        rows.append({"prompt": prompt, "responses": responses, "result": right})
    report = [json.loads(line) for line in (made / "test.jsonl").read_text("utf-8").splitlines()]
    write(out / "strategies.jsonl", rows)
    write(out / "tested.jsonl", [row | {"result": row["response"]} for row in report])


def write(path: Path, rows: list[dict]) -> None:
    """As jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    main(parser.parse_args().out)
