"""Small files of real rows for `configs/compare_sources.yaml`, `compare_solutions.yaml` and `audit_stories.yaml`.

    python -m tests.benchmarks.rows ../shared/data out/rows

Sources: the first 150 instructions each of text-davinci-003 and of GPT-4 (field `source`), and GPT-4's for
validation.
Solutions: what four models answered to the first 60 test questions (fields `source` and `label`, correct or wrong),
and the answers of the data set's authors to other questions as validation examples.

Reviews: sentences of film reviews, the first half as prompt and the rest as response: 80 as they are, 50 whose letters
went through one fixed substitution, 30 openings of school arithmetic instead (`label`), and 64 validation examples.
"""

import argparse
import itertools
import json
import random
import string
from pathlib import Path


def main(data: Path, out: Path) -> None:
    """Write sources*.jsonl, solutions*.jsonl and reviews*.jsonl into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tiny = {path.stem: json.loads(path.read_text("utf-8")) for path in (data / "scalebio_tiny").glob("*.json")}
    davinci, gpt4 = (
        [row | {"source": name} for row in tiny[file][:150]]
        for name, file in (("davinci", "train_alpaca"), ("gpt4", "train_gpt4_alpaca"))
    )
    write(out / "sources.jsonl", davinci + gpt4)
    write(out / "sources_trusted.jsonl", tiny["val"][:100])
    write(out / "sources_report.jsonl", tiny["test"][:150])

    with open(data / "gsm8k" / "example_model_solutions.jsonl", encoding="utf-8") as file:
        questions = [json.loads(line) for line in itertools.islice(file, 310)]
    solutions = [
        {
            "prompt": row["question"],
            "response": row[model]["solution"],
            "source": model,
            "label": "correct" if row[model]["is_correct"] else "wrong",
        }
        for row in questions[:60]
        for model in row
        if model not in ("question", "ground_truth") and row[model]["solution"]
    ]
    write(out / "solutions.jsonl", solutions)
    answers = [{"prompt": row["question"], "response": row["ground_truth"]} for row in questions]
    write(out / "solutions_trusted.jsonl", answers[60:160])
    write(out / "solutions_report.jsonl", answers[160:310])

    with open(data / "sst2" / "train.jsonl", encoding="utf-8") as file:
        sentences = list(dict.fromkeys(json.loads(line)["text"] for line in file))
    drawn = random.Random(0)
    sentences = drawn.sample([text for text in sentences if 40 <= len(text) <= 90], 194)
    letters = str.maketrans(string.ascii_lowercase, "".join(drawn.sample(string.ascii_lowercase, 26)))
    with open(data / "gsm8k" / "train.jsonl", encoding="utf-8") as file:
        arithmetic = [json.loads(line)["question"][:80] for line in itertools.islice(file, 30)]
    parts = {
        "clean": sentences[:80],
        "garbled": [text.translate(letters) for text in sentences[80:130]],
        "off-domain": arithmetic,
    }
    reviews = [halves(text) | {"label": label} for label, part in parts.items() for text in part]
    write(out / "reviews.jsonl", drawn.sample(reviews, len(reviews)))
    write(out / "reviews_trusted.jsonl", [halves(text) for text in sentences[130:]])


def halves(text: str) -> dict[str, str]:
    """A sentence as prompt and response, cut between two words."""
    words = text.split()
    return {"prompt": " ".join(words[: len(words) // 2]), "response": " ".join(words[len(words) // 2 :])}


def write(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    main(given.data, given.out)
