"""Bad inputs of every kind, through the command line: one clear sentence, no traceback, nothing left behind."""
# ruff: noqa: E501 - a table

import errno
import gzip
import json
import os
import re
import shutil
import struct
from email.message import Message
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.lm.inference import openai, transport
from bilevel_jax.runs.infra import run_dir, seals
from tests.runs import blobs

GOOD = [
    {"prompt": f"{a}{b}{c}d>", "response": f"{b}{c}de", "label": "clean"} for a in "abc" for b in "abc" for c in "abc"
]
EVIL = "a\x1b[31mred\x9b2J\u202eevil\u2028next"
CHAT = {"messages": [{"role": "user", "content": "abcd>"}, {"role": "assistant", "content": "bcde"}]}
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u061c\u202a-\u202e\u2066-\u2069]")


class Bench:
    """Makes the files of one bad input, and the command lines that name them."""

    def __init__(self, folder, made):
        self.folder, self.made, self.out = folder, made, folder / "out"

    def file(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return str(path)

    def model(self, changes=None, files=None, drop=()):
        """A copy of the tiny model with other keys in its config.json, other files, or fewer."""
        folder = self.folder / "model"
        shutil.copytree(self.made / "model", folder)
        settings = json.loads((folder / "config.json").read_text()) | (changes or {})
        settings = {key: value for key, value in settings.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(settings))
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        for name in drop:
            (folder / name).unlink()
        return str(folder)

    def run(self, command, config, *flags):
        return [command, str(config), "--out", str(self.out), *map(str, flags)]

    def select(self, *flags):
        return self.run("select", self.made / "select.yaml", "--fast", *flags)

    def train(self, *flags):
        return self.run("train", self.made / "train.yaml", *flags)

    def config(self, content, command="select"):
        data = ("--data.train", self.made / "train.jsonl", "--data.validation", self.made / "validation.jsonl")
        flags = ("--model", self.made / "model", "--optimizer.warmup-steps", 0, *data)
        return self.run(command, self.file("c.yaml", content), *flags)

    def rows(self, content, name="rows.jsonl", key="--data.train", command="select", flags=()):
        return getattr(self, command)(key, self.file(name, content), *flags)

    def weights(self, content, name="weights.jsonl", flags=()):
        return self.train("--weights.file", self.file(name, content), *flags)

    def table(self, **columns):
        path = self.folder / "weights.parquet"
        pq.write_table(pa.table(columns), path)
        return self.train("--weights.file", path)

    def inspect(self, rows, *flags, model=None):
        return ["inspect", "--model", str(model or self.made / "model"), "--train", self.file("r.jsonl", rows), *flags]

    def export(self, *flags, weights='{"id": "x", "weight": 1}\n'):
        data = ("--data.train", self.file("rows.jsonl", GOOD), "--weights.file", self.file("w.jsonl", weights))
        return ["export", "--out", str(self.out), *data, *map(str, flags)]

    def arrays(self, command, *flags, **arrays):
        path = blobs.write(self.folder / "blobs.npz")
        np.savez(path, **(arrays.pop("only", None) or dict(np.load(path)) | arrays))
        config = self.file("c.yaml", f"data: {{train: ['{path}']}}\noutput: {{progress: false}}\nmesh: {{data: 1}}\n")
        return self.run(command, config, "--outer.proximal", 0.01, *flags)

    def rank(self, rows=None, *flags):
        made = [{"prompt": row["prompt"], "responses": {"one": row["response"], "two": "abcd"}} for row in GOOD]
        data = (
            "--data.train",
            self.file("table.jsonl", made if rows is None else rows),
            "--model",
            self.made / "model",
        )
        settings = "rank: {block_size: 6, num_blocks: 2}\ngenerate: {max_new_tokens: 4}\noutput: {progress: false}\n"
        return self.run("rank", self.file("rank.yaml", settings + "mesh: {data: 1}\nlora: {r: 0}\n"), *data, *flags)

    def refine(self, *flags):
        data = [f"--data.{part}" for part in ("train", "validation", "dev", "test")]
        named = [word for flag in data for word in (flag, self.made / f"{flag[7:]}.jsonl")]
        settings = self.file("refine.yaml", "output: {progress: false}\nmesh: {data: 1}\nlora: {r: 0}\n")
        return self.run(
            "refine",
            settings,
            "--model",
            self.made / "model",
            *named,
            "--data.split",
            1,
            0,
            0,
            "--generate.max-new-tokens",
            4,
            *flags,
        )

    def ran(self, *, sealed=False, **files):
        """The folder of a run with other files; `sealed` as if the run had written them."""
        self.out.mkdir()
        write = lambda path, content: path.write_bytes(content)  # noqa: E731
        if sealed:
            seals.begin(self.out)
            write = run_dir.write_atomic
        settings = (self.made / "select.yaml").read_bytes()
        for name, content in ({"config_yaml": settings} | files).items():
            write(self.out / name.replace("_", "."), content if isinstance(content, bytes) else content.encode())
        return self.out


def tensor(shape, dtype="F32", size=None):
    """A safetensors file of one tensor."""
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size or 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 4


# (kind, name) -> (what is run, what the sentence holds)
CASES = {
    # ---- config files
    ("config", "no such file"): (lambda b: b.run("select", b.folder / "selct.yaml"), r"selct.yaml: no such config"),
    ("config", "a folder"): (lambda b: b.run("select", b.folder), r"a folder, and no config"),
    ("config", "a list"): (lambda b: b.config("- a\n- b\n"), r"c.yaml: holds .*wanted sections"),
    ("config", "a word"): (lambda b: b.config("train\n"), r"c.yaml: holds 'train'.*wanted sections"),
    ("config", "empty"): (
        lambda b: ["select", b.file("c.yaml", ""), "--data.train", "t", "--data.validation", "v"],
        r"model.name_or_path",
    ),
    ("config", "binary"): (lambda b: b.config(bytes(range(256))), r"c.yaml: not UTF-8 \(byte 128\). Save"),
    ("config", "latin-1"): (
        lambda b: b.config("output: {dir: é}".encode("latin-1")),
        r"c.yaml: not UTF-8 \(byte 14\). Save",
    ),
    ("config", "UTF-16"): (
        lambda b: b.config("train: {max_steps: x}".encode("utf-16")),
        r"c.yaml: not UTF-8 \(byte 0\). Save",
    ),
    ("config", "a tab"): (lambda b: b.config("train:\n\tmax_steps: 3\n"), r"c.yaml:2: not YAML: .* Indent with spaces"),
    ("config", "an open bracket"): (
        lambda b: b.config("train: {max_steps: 3\n"),
        r"c.yaml:2: not YAML: .*Look at the line",
    ),
    ("config", "a key twice"): (lambda b: b.config("train: {max_steps: 3, max_steps: 4}"), r"c.yaml:1: .*stands twice"),
    ("config", "a section twice"): (lambda b: b.config("train: {}\ntrain: {}"), r"c.yaml:2: 'train' stands twice"),
    ("config", "two documents"): (
        lambda b: b.config("train: {}\n---\ntrain: {}\n"),
        r"c.yaml:2: not YAML: .*another document",
    ),
    ("config", "an anchor bomb"): (
        lambda b: b.config(
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True))
        ),
        r"c.yaml:2: \*a stands for another value. Write the value itself",
    ),
    ("config", "an alias of itself"): (
        lambda b: b.config("data: {train: &a [*a]}"),
        r"c.yaml:1: \*a stands for another value",
    ),
    ("config", "deep"): (lambda b: b.config("a: " + "[" * 3000), r"c.yaml:1: more than 20 levels"),
    ("config", "a python object"): (
        lambda b: b.config("data: !!python/object/apply:os.system [ls]"),
        r"c.yaml:1: not YAML: .*python/object",
    ),
    ("config", "a key that is a number"): (
        lambda b: b.config("3: {max_steps: 3}"),
        r"c.yaml:1: unknown section '3'; the sections",
    ),
    ("config", "a key in a section that is a number"): (
        lambda b: b.config("train: {3: 3}"),
        r"c.yaml:1: unknown key 'train.3'; the keys of train",
    ),
    ("config", "a key that is a list"): (
        lambda b: b.config("? [a, b]\n: 3\n"),
        r"c.yaml:1: not YAML: .*unhashable key",
    ),
    ("config", "a section that is a list"): (lambda b: b.config("train: [max_steps]"), r"c.yaml:1: train is"),
    ("config", "an unknown section"): (lambda b: b.config("trian: {max_steps: 3}"), r"did you mean 'train'"),
    ("config", "an unknown key"): (lambda b: b.config("train: {max_step: 3}"), r"c.yaml:1: .*did you mean 'max_steps'"),
    ("config", "a key of another section"): (
        lambda b: b.config("train: {learning_rate: 3}"),
        r"'optimizer.learning_rate'",
    ),
    ("config", "yes for text"): (lambda b: b.config("data: {prompt_field: yes}"), r"wanted text \(quote"),
    ("config", "a date for text"): (lambda b: b.config("output: {dir: 2024-01-01}"), r"wanted text \(quote"),
    ("config", "octal"): (
        lambda b: b.config("train: {max_steps: 010}"),
        r"c.yaml:1: 010 is no decimal number. Write its digits",
    ),
    ("config", "minutes and seconds"): (
        lambda b: b.config("train: {max_steps: 1:30}"),
        r"c.yaml:1: 1:30 is no decimal number. Write its digits",
    ),
    ("config", "nan"): (lambda b: b.config("optimizer: {learning_rate: .nan}"), r"wanted a number"),
    ("config", "infinity"): (lambda b: b.config("optimizer: {learning_rate: .inf}"), "learning_rate = inf"),
    ("config", "a huge number"): (lambda b: b.config(f"train: {{max_steps: {'9' * 40}}}"), r"below 2\^63"),
    ("config", "a number of 5,000 digits"): (
        lambda b: b.config(f"train: {{max_steps: {'9' * 5000}}}"),
        r"c.yaml: a value that cannot be read .*fewer digits",
    ),
    ("config", "a negative number"): (lambda b: b.config("train: {max_steps: -3}"), r"train.max_steps = -3"),
    ("config", "text for a number"): (lambda b: b.config("train: {max_steps: many}"), r"wanted a whole number"),
    ("config", "null"): (lambda b: b.config("train: {max_steps: }"), r"train.max_steps is empty"),
    ("config", "a map for text"): (lambda b: b.config("output: {dir: {a: b}}"), r"wanted text"),
    ("config", "a list in a list"): (lambda b: b.config("data: {train: [[a]]}"), r"data.train"),
    ("config", "a control character"): (
        lambda b: b.config("data: {prompt_field: a\x07b}"),
        r"the character U\+0007 at 22",
    ),
    ("config", "a null character in a name"): (
        lambda b: b.config('data: {test: ["a\\0b"]}'),
        r"data.test = .* holds a null character",
    ),
    ("config", "half a surrogate pair"): (
        lambda b: b.config('data: {prompt_field: "\\ud800"}'),
        r"data.prompt_field = .* no valid text",
    ),
    ("command line", "bytes that are no text"): (
        lambda b: b.select("--out", f"{b.folder}/\udcff"),
        r"output.dir = .* no valid text: write it in UTF-8",
    ),
    ("command line", "a value of 100,000 characters"): (
        lambda b: b.select("--outer.method", "x" * 100_000),
        r"x \.\.\. x.*wanted one of unrolled",
    ),
    ("command line", "a width"): (lambda b: b.inspect(GOOD, "--show.width", "-5"), r"show.width = -5: must be 0"),
    ("command line", "a negative seed"): (
        lambda b: b.select("--train.seed", -1),
        r"train.seed = -1: must be 0 or more",
    ),
    ("command line", "an unknown score"): (
        lambda b: b.run("audit", b.made / "compare_text.yaml", "--audit.scores", "losss"),
        r"did you mean 'loss'",
    ),
    ("command line", "a strategy of another name"): (
        lambda b: b.rank(None, "--rank.strategies", "oone", "two"),
        r"did you mean 'one'",
    ),
    ("contradiction", "rank without places"): (
        lambda b: b.rank(None, "--rank.template", "x"),
        r"must hold \{question\}",
    ),
    ("contradiction", "devices that do not divide"): (
        lambda b: b.select("--mesh.fsdp", 3, "--mesh.data", 1),
        r"Choose a multiple of 3",
    ),
    ("contradiction", "sharding rules"): (
        lambda b: b.select("--mesh.sharding-rules", "(("),
        r"is no rule; wanted PATTERN",
    ),
    ("contradiction", "nothing to compare"): (
        lambda b: b.run("compare", b.made / "compare_text.yaml", "--compare.methods", "--compare.baselines"),
        r"name a method or a baseline",
    ),
    ("contradiction", "a budget for nothing"): (
        lambda b: b.run("compare", b.made / "compare_text.yaml", "--compare.budget", 1),
        r"compare.budget = 1 is too small",
    ),
    ("contradiction", "refine without dev"): (
        lambda b: b.run("refine", b.made / "compare_text.yaml", "--outer.proximal", 0, "--generate.max-new-tokens", 4),
        r"no rows for dev: .*data.dev",
    ),
    ("data", "a device"): (lambda b: b.select("--data.train", "/dev/null"), r"/dev/null: not a file"),
    ("data", "a hub name without a name"): (lambda b: b.select("--data.train", "hub:"), r"hub:name@split"),
    ("data", "a link to itself"): (
        lambda b: os.symlink("l.jsonl", b.folder / "l.jsonl") or b.select("--data.train", b.folder / "l.jsonl"),
        r"l.jsonl: cannot be opened",
    ),
    ("folder", "an export that is there"): (lambda b: b.export("--out", b.file("f", "x")), r"f is there already"),
    ("folder", "an estimate in a file"): (
        lambda b: ["estimate", str(b.made / "select.yaml"), "--estimate.no-compile", "--out", b.file("f", "x")],
        r"/f: file exists",
    ),
    ("config", "of another command"): (lambda b: b.config("audit: {queries: 3}"), r"unknown section 'audit'"),
    ("config", "a value of another time"): (lambda b: b.config("bench: {arms: [uniform]}"), r"is now 'compare"),
    ("config", "of no command to estimate"): (
        lambda b: ["estimate", b.file("c.yaml", "rank: {k: 3}")],
        r"c.yaml is a config of none of select",
    ),
    ("config", "of two commands to estimate"): (
        lambda b: ["estimate", b.file("c.yaml", "output: {dir: x}")],
        r"choose one by --estimate.command",
    ),
    ("config", "help of a bad one"): (lambda b: ["select", b.file("c.yaml", "train: 3"), "--help"], r"train is 3"),
    # ---- command lines
    ("command line", "no command"): (lambda b: ["selekt"], r"did you mean 'select'"),
    ("command line", "no config to estimate"): (lambda b: ["estimate"], r"give the config of the run"),
    ("command line", "nothing else"): (lambda b: ["rank", "--data.train", "t"], r"model.name_or_path = ''"),
    ("command line", "an unknown flag"): (lambda b: b.select("--outer.stepz", 3), r"did you mean '--outer.steps'"),
    ("command line", "a flag of another command"): (lambda b: b.train("--audit.queries", 3), r"a flag of audit"),
    ("command line", "no value"): (lambda b: b.select("--outer.steps"), r"--outer.steps has no value"),
    ("command line", "a word for a number"): (lambda b: b.select("--outer.steps", "two"), r"wanted a whole number"),
    ("command line", "a list twice"): (
        lambda b: b.select("--data.train", "a", "--data.train", "b"),
        r"--data.train stands twice",
    ),
    ("command line", "two configs"): (
        lambda b: ["select", "configs/select.yaml", "b.yaml"],
        r"'b.yaml' stands behind no flag",
    ),
    ("command line", "an empty folder name"): (lambda b: b.select("--output.dir", ""), r"output.dir"),
    ("command line", "an empty model"): (lambda b: b.select("--model", ""), r"model.name_or_path = ''"),
    ("command line", "empty data"): (lambda b: b.select("--data.train"), r"data.train"),
    ("command line", "a data file without a name"): (lambda b: b.select("--data.train", ""), r"data.train"),
    ("command line", "an unknown flag of estimate"): (
        lambda b: ["estimate", str(b.made / "select.yaml"), "--estimate.devises", "3"],
        r"did you mean '--estimate.devices'",
    ),
    # ---- options that contradict each other
    ("contradiction", "score and file"): (
        lambda b: b.train("--weights.score", "loss", "--weights.file", "w.parquet"),
        r"give one of weights.file and",
    ),
    ("contradiction", "packing and streaming"): (
        lambda b: b.train("--data.packing", "--data.streaming", "--train.max-steps", 3),
        r"packing needs all examples",
    ),
    ("contradiction", "streaming without steps"): (lambda b: b.train("--data.streaming"), r"train.max_steps"),
    ("contradiction", "accumulation"): (
        lambda b: b.train("--train.gradient-accumulation-steps", 3),
        r"divide train.global_batch_size",
    ),
    ("contradiction", "warmup beyond the end"): (
        lambda b: b.select("--optimizer.warmup-steps", 99),
        r"must be below train.max_steps",
    ),
    ("contradiction", "a split beyond 1"): (lambda b: b.select("--data.split", 1, 1, 0), r"sum to 1"),
    ("contradiction", "lion"): (lambda b: b.select("--optimizer.name", "lion"), r"choose adamw"),
    ("contradiction", "car without rewards"): (
        lambda b: b.rank(None, "--rank.metrics", "car", "--rank.pick-by", "car"),
        r"rank.reward_field",
    ),
    ("contradiction", "refine by a service"): (
        lambda b: b.refine("--generate.backend", "service", "--generate.url", "http://x/v1", "--generate.model", "m"),
        r"leave it at embedded",
    ),
    ("contradiction", "a filter without a verifier"): (
        lambda b: b.refine("--refine.verifier-use", "filter"),
        r"set verifier.name",
    ),
    ("contradiction", "an adapter of nothing"): (
        lambda b: b.train("--output.model", "adapter", "--lora.r", 0),
        r"output.model = 'adapter': .*set lora.r above 0",
    ),
    ("contradiction", "more devices than there are"): (
        lambda b: b.select("--mesh.data", 64),
        r"there are 8 devices: cpu. Lower them",
    ),
    # ---- data
    ("data", "no such file"): (
        lambda b: b.select("--data.train", b.folder / "rows.jsonl"),
        r"rows.jsonl: no such file",
    ),
    ("data", "an ending that is unknown"): (lambda b: b.rows(GOOD, "rows.txt"), r"rows.txt: the name must end"),
    ("data", "a folder"): (lambda b: b.select("--data.train", b.folder), r"a folder, but not one .* Name a file"),
    ("data", "empty"): (lambda b: b.rows(""), r"rows.jsonl: no rows"),
    ("data", "white space"): (lambda b: b.rows("\n\n"), r"rows.jsonl"),
    ("data", "no JSON"): (lambda b: b.rows([*GOOD, '{"prompt": "a\n']), r"rows.jsonl:28: "),
    ("data", "a number"): (lambda b: b.rows([*GOOD, "3\n"]), r"rows.jsonl:28: "),
    ("data", "a list"): (lambda b: b.rows([*GOOD, "[1, 2]\n"]), r"rows.jsonl:28: "),
    ("data", "null"): (lambda b: b.rows([*GOOD, "null\n"]), r"rows.jsonl:28: "),
    ("data", "no response"): (lambda b: b.rows([*GOOD, {"prompt": "a"}]), r"rows.jsonl:28: no 'response'"),
    ("data", "a response that is a number"): (lambda b: b.rows([*GOOD, GOOD[0] | {"response": 3}]), r"rows.jsonl:28: "),
    ("data", "a response that is null"): (lambda b: b.rows([*GOOD, GOOD[0] | {"response": None}]), r"rows.jsonl:28: "),
    ("data", "an empty response"): (lambda b: b.rows([*GOOD, GOOD[0] | {"response": ""}]), r"rows.jsonl:28: "),
    ("data", "half a surrogate pair"): (
        lambda b: b.rows([*GOOD, '{"prompt": "ab>", "response": "\\ud800"}\n']),
        r"rows.jsonl:28",
    ),
    ("data", "no UTF-8"): (lambda b: b.rows(b'{"prompt": "ab>", "response": "\xff"}\n'), r"rows.jsonl"),
    ("data", "UTF-16"): (lambda b: b.rows(json.dumps(GOOD[0]).encode("utf-16")), r"rows.jsonl"),
    ("data", "deep"): (lambda b: b.rows("[" * 100_000), r"rows.jsonl"),
    ("data", "a number of 5,000 digits"): (lambda b: b.rows('{"prompt": ' + "1" * 5000 + "}\n"), r"rows.jsonl"),
    ("data", "no gzip"): (lambda b: b.rows(GOOD, "rows.jsonl.gz"), r"rows.jsonl.gz"),
    ("data", "half a gzip"): (
        lambda b: b.rows(gzip.compress(json.dumps(GOOD[0]).encode() * 99)[:-20], "rows.jsonl.gz"),
        r"rows.jsonl.gz",
    ),
    ("data", "no parquet"): (lambda b: b.rows(b"PAR1 no", "rows.parquet"), r"rows.parquet"),
    ("data", "an empty parquet"): (lambda b: b.rows(b"", "rows.parquet"), r"rows.parquet"),
    ("data", "a JSON that is no list"): (lambda b: b.rows('{"a": 1}', "rows.json"), r"rows.json"),
    ("data", "half a JSON"): (lambda b: b.rows('[{"prompt": "a"', "rows.json"), r"rows.json"),
    ("data", "an unknown role"): (
        lambda b: b.rows([{"messages": [{"role": "wizard", "content": "a"}, CHAT["messages"][1]]}]),
        r"rows.jsonl:1: ",
    ),
    ("data", "no answer"): (lambda b: b.rows([{"messages": CHAT["messages"][:1]}]), r"rows.jsonl:1"),
    ("data", "no messages"): (lambda b: b.rows([{"messages": []}]), r"rows.jsonl:1"),
    ("data", "messages that are text"): (lambda b: b.rows([{"messages": "abcd"}]), r"rows.jsonl:1"),
    ("data", "a message without content"): (
        lambda b: b.rows([{"messages": [{"role": "user"}, CHAT["messages"][1]]}]),
        r"rows.jsonl:1",
    ),
    ("data", "one example"): (lambda b: b.rows(GOOD[:1]), r"1 training example; weights compare"),
    ("data", "zero validation examples"): (lambda b: b.rows([], key="--data.validation"), r"no rows"),
    ("data", "all too long"): (
        lambda b: b.rows([{"prompt": "a" * 90 + ">", "response": "b", "label": "clean"}] * 3),
        r"rows.jsonl:1",
    ),
    ("data", "all too long, dropped"): (
        lambda b: b.rows(
            [{"prompt": "a" * 90 + ">", "response": f"b{i}", "label": "clean"} for i in range(3)],
            flags=("--data.truncation", "drop"),
        ),
        r"training examples none is left: .*Set data.truncation",
    ),
    ("data", "validation in training"): (
        lambda b: b.select("--data.validation", b.file("v.jsonl", GOOD[3:5]), "--data.train", b.file("t.jsonl", GOOD)),
        r"2 training examples also stand in",
    ),
    ("data", "labels of another name"): (
        lambda b: b.rows(GOOD, flags=("--data.label-field", "lable")),
        r"data.label_field",
    ),
    ("data", "text that is a format"): (lambda b: b.rows(GOOD, flags=("--data.format", "chat")), r"rows.jsonl:1"),
    ("data", "pairs for sft"): (
        lambda b: b.rows([{"prompt": "a>", "chosen": "b", "rejected": "c", "label": "clean"}] * 3),
        r"rows.jsonl:1: .*Set objective.name to dpo",
    ),
    ("data", "rows for dpo"): (lambda b: b.rows(GOOD, flags=("--objective.name", "dpo")), r"rows.jsonl"),
    ("data", "nothing to inspect"): (lambda b: b.inspect(""), r"r.jsonl"),
    ("data", "no id of that name"): (lambda b: b.inspect(GOOD, "--show.ids", "x"), None),
    ("data", "of one strategy"): (
        lambda b: b.rank([{"prompt": "ab>", "responses": {"one": "b"}}] * 20),
        r"table.jsonl: 1 strategy; ranking takes at least 2",
    ),
    ("data", "a strategy without a response"): (
        lambda b: b.rank(
            [{"prompt": "ab>", "responses": {"a": "b", "c": "d"}}, {"prompt": "b>", "responses": {"a": "c"}}]
        ),
        r"table.jsonl:2: no response of 'c'",
    ),
    ("data", "fewer questions than a block"): (
        lambda b: b.rank([{"prompt": "ab>", "responses": {"a": "b", "c": "d"}}]),
        r"rank.block_size",
    ),
    ("data", "responses that are a list"): (
        lambda b: b.rank([{"prompt": "ab>", "responses": ["a"]}]),
        r"table.jsonl:1",
    ),
    ("data", "accuracies that are no JSON"): (
        lambda b: b.rank(None, "--rank.accuracies", b.file("a.json", "{")),
        r"a.json",
    ),
    ("data", "accuracies that are nan"): (
        lambda b: b.rank(None, "--rank.accuracies", b.file("a.json", '{"one": NaN, "two": 1}')),
        r"rank.accuracies",
    ),
    ("data", "own answers of nobody"): (
        lambda b: b.rank(None, "--rank.own-answers", b.folder / "own.jsonl"),
        r"own.jsonl",
    ),
    ("data", "a verifier that is no file"): (
        lambda b: b.refine("--verifier.name", f"{b.folder}/judge.py:f"),
        r"judge.py",
    ),
    ("data", "a verifier that fails"): (
        lambda b: b.refine("--verifier.name", b.file("judge.py", "def f(q, a, r:\n") + ":f"),
        r"judge.py",
    ),
    # ---- arrays
    ("arrays", "no such file"): (lambda b: b.arrays("compare", "--data.train", b.folder / "x.npz"), r"x.npz"),
    ("arrays", "no npz"): (lambda b: b.arrays("audit", "--data.train", b.file("x.npz", b"PK")), r"x.npz"),
    ("arrays", "other names"): (lambda b: b.arrays("compare", only={"a": np.ones(3)}), r"blobs.npz: no x_train"),
    ("arrays", "other lengths"): (
        lambda b: b.arrays("audit", x_train=np.ones((5, 64)), y_train=np.ones(3, int)),
        r"y_train is .* for each row",
    ),
    ("arrays", "objects"): (lambda b: b.arrays("audit", x_train=np.array([{}, {}])), r"not a whole .npz"),
    ("arrays", "nan"): (
        lambda b: b.arrays("compare", x_train=np.full((120, 64), np.nan)),
        r"row 0 of x_train is not finite",
    ),
    ("arrays", "labels with a fraction"): (
        lambda b: b.arrays("compare", y_train=np.linspace(0, 1, 120)),
        r"y_train is float64.*a whole number from 0",
    ),
    ("arrays", "a huge class"): (
        lambda b: b.arrays("audit", y_train=np.full(120, 10**12)),
        r"the class 1000000000000, more than there are rows",
    ),
    ("arrays", "a number alone"): (lambda b: b.arrays("audit", x_train=np.float32(3)), r"x_train float32\[\]; wanted"),
    ("arrays", "other features in test"): (lambda b: b.arrays("audit", x_test=np.ones((40, 3))), r"and 3 in x_test"),
    ("arrays", "too few"): (lambda b: b.arrays("compare"), r"blobs.npz has 120 in x_train. Lower one of them"),
    # ---- weights
    ("weights", "no such file"): (
        lambda b: b.train("--weights.file", b.folder / "w.parquet"),
        r"w.parquet: no such file",
    ),
    ("weights", "no parquet"): (lambda b: b.weights(b"no", "w.parquet"), r"w.parquet"),
    ("weights", "empty"): (lambda b: b.weights(""), r"weights.jsonl"),
    ("weights", "other columns"): (lambda b: b.table(a=[1.0], b=["x"]), r"weights.parquet"),
    ("weights", "of other examples"): (lambda b: b.table(id=["x"], weight=[1.0]), r"weights.parquet"),
    ("weights", "text"): (lambda b: b.weights([{"id": "x", "weight": "one"}]), r"weights.jsonl"),
    ("weights", "nan"): (lambda b: b.weights('{"id": "x", "weight": NaN}\n'), r"weights.jsonl"),
    ("weights", "infinity"): (lambda b: b.table(id=["x"], weight=[float("inf")]), r"weights.parquet"),
    ("weights", "null"): (lambda b: b.table(id=["x"], weight=pa.array([None], pa.float64())), r"weights.parquet"),
    ("weights", "an id twice"): (lambda b: b.table(id=["x", "x"], weight=[1.0, 1.0]), r"weights.parquet"),
    ("weights", "a list of numbers"): (lambda b: b.weights("[1, 2]\n"), r"weights.jsonl:1"),
    ("weights", "constant 0"): (lambda b: b.train("--weights.constant", 0), r"weights.constant"),
    ("weights", "negative constant"): (lambda b: b.train("--weights.constant", -1), r"weights.constant"),
    ("weights", "of other examples, to export"): (lambda b: b.export(), r"w.jsonl"),
    ("weights", "none to export"): (
        lambda b: ["export", "--out", str(b.out), "--data.train", b.file("r.jsonl", GOOD)],
        r"weights.file",
    ),
    # ---- models
    ("model", "no such folder"): (lambda b: b.select("--model", b.folder / "nowhere"), r"nowhere"),
    ("model", "a file"): (lambda b: b.select("--model", b.file("m", "x")), r"m"),
    ("model", "an empty folder"): (lambda b: b.select("--model", b.folder), r"config.json"),
    ("model", "a hub name"): (lambda b: b.select("--model", "org/name"), r"org/name"),
    ("model", "no built-in"): (lambda b: b.select("--model", "builtin:cypher"), r"cypher"),
    ("model", "half a config"): (
        lambda b: b.select("--model", b.model(files={"config.json": '{"a":'})),
        r"config.json",
    ),
    ("model", "a config that is a list"): (
        lambda b: b.select("--model", b.model(files={"config.json": "[]"})),
        r"config.json",
    ),
    ("model", "a config that is null"): (
        lambda b: b.select("--model", b.model(files={"config.json": "null"})),
        r"config.json",
    ),
    ("model", "a binary config"): (
        lambda b: b.select("--model", b.model(files={"config.json": b"\xff\xfe\0"})),
        r"config.json",
    ),
    ("model", "an unknown kind"): (lambda b: b.select("--model", b.model({"model_type": "mamba"})), r"mamba"),
    ("model", "no kind"): (lambda b: b.select("--model", b.model({"model_type": ...})), r"model_type"),
    ("model", "a kind that is a number"): (lambda b: b.select("--model", b.model({"model_type": 3})), r"model_type"),
    ("model", "no width"): (
        lambda b: b.select("--model", b.model({"hidden_size": ..., "n_embd": ...})),
        r"config.json",
    ),
    ("model", "a width in words"): (
        lambda b: b.select("--model", b.model({"hidden_size": "wide", "n_embd": "wide"})),
        r"wide",
    ),
    ("model", "a negative width"): (lambda b: b.select("--model", b.model({"hidden_size": -8, "n_embd": -8})), r"-8"),
    ("model", "heads that do not divide"): (
        lambda b: b.select("--model", b.model({"num_attention_heads": 7, "n_head": 7, "head_dim": ...})),
        r"7",
    ),
    ("model", "no layers"): (lambda b: b.select("--model", b.model({"num_hidden_layers": 0, "n_layer": 0})), r"layer"),
    ("model", "an activation that is unknown"): (
        lambda b: b.select("--model", b.model({"hidden_act": "wow", "activation_function": "wow"})),
        r"wow",
    ),
    ("model", "no weights"): (lambda b: b.select("--model", b.model(drop=("model.safetensors",))), r"safetensors"),
    ("model", "half of the weights"): (
        lambda b: b.select(
            "--model", b.model(files={"model.safetensors": (b.made / "model" / "model.safetensors").read_bytes()[:-99]})
        ),
        r"model.safetensors",
    ),
    ("model", "empty weights"): (
        lambda b: b.select("--model", b.model(files={"model.safetensors": b""})),
        r"model.safetensors",
    ),
    ("model", "a bad header"): (
        lambda b: b.select("--model", b.model(files={"model.safetensors": b"\xff" * 99})),
        r"model.safetensors",
    ),
    ("model", "other tensors"): (
        lambda b: b.select("--model", b.model(files={"model.safetensors": tensor([1])})),
        r"model.safetensors|tensor",
    ),
    ("model", "a tensor of another size"): (
        lambda b: b.select("--model", b.model(files={"model.safetensors": tensor([7])})),
        r"model.safetensors",
    ),
    ("model", "an index of nothing"): (
        lambda b: b.select(
            "--model",
            b.model(
                files={"model.safetensors.index.json": '{"weight_map": {"x": "m-1.safetensors"}}'},
                drop=("model.safetensors",),
            ),
        ),
        r"m-1.safetensors",
    ),
    ("model", "an index that is a list"): (
        lambda b: b.select(
            "--model", b.model(files={"model.safetensors.index.json": "[]"}, drop=("model.safetensors",))
        ),
        r"index.json",
    ),
    ("model", "an index that leaves the folder"): (
        lambda b: b.select(
            "--model",
            b.model(
                files={"model.safetensors.index.json": '{"weight_map": {"x": "../../x.safetensors"}}'},
                drop=("model.safetensors",),
            ),
        ),
        r"x.safetensors",
    ),
    ("model", "pickles alone"): (
        lambda b: b.select("--model", b.model(files={"pytorch_model.bin": b"\x80"}, drop=("model.safetensors",))),
        r"safetensors",
    ),
    ("model", "a vocabulary that is too small"): (
        lambda b: b.select("--model", b.model({"vocab_size": 5})),
        r"vocab|embedding|shape",
    ),
    ("model", "bfloat16 in words"): (lambda b: b.select("--model.param-dtype", "half"), r"wanted one of float32"),
    # ---- tokenizers and templates
    ("tokenizer", "none"): (lambda b: b.select("--model", b.model(drop=("tokenizer.json",))), r"tokenizer"),
    ("tokenizer", "no JSON"): (lambda b: b.select("--model", b.model(files={"tokenizer.json": "{"})), r"tokenizer"),
    ("tokenizer", "a list"): (lambda b: b.select("--model", b.model(files={"tokenizer.json": "[]"})), r"tokenizer"),
    ("tokenizer", "an empty object"): (
        lambda b: b.select("--model", b.model(files={"tokenizer.json": "{}"})),
        r"tokenizer",
    ),
    ("tokenizer", "a config that is a list"): (
        lambda b: b.select("--model", b.model(files={"tokenizer_config.json": "[]"})),
        r"tokenizer",
    ),
    ("template", "that does not parse"): (
        lambda b: b.inspect([CHAT], model=b.model(files={"chat_template.jinja": "{% for m in messages %}"})),
        r"template",
    ),
    ("template", "that raises"): (
        lambda b: b.inspect([CHAT], model=b.model(files={"chat_template.jinja": "{{ raise_exception('no') }}"})),
        r"r.jsonl:1: the chat template refuses .*: no\.",
    ),
    ("template", "that divides by 0"): (
        lambda b: b.inspect([CHAT], model=b.model(files={"chat_template.jinja": "{{ 1 // 0 }}"})),
        r"r.jsonl:1: the chat template fails at its line 1 .*Mend the template",
    ),
    ("template", "of a config, without places"): (
        lambda b: b.rows(GOOD, flags=("--data.template", "{{ x.y.z }}")),
        r"must hold \{prompt\} once and \{response\} once",
    ),
    # ---- run folders
    ("folder", "a file"): (lambda b: b.select("--out", b.file("f", "x")), r"f is a file; choose another"),
    ("folder", "below a file"): (lambda b: b.select("--out", b.file("f", "x") + "/run"), r"/f"),
    ("folder", "not empty"): (lambda b: b.select("--out", Path(b.file("d/x", "x")).parent), r"d is not empty"),
    ("folder", "a run"): (lambda b: b.select("--out", b.ran()), r"--resume"),
    ("folder", "no run to resume"): (lambda b: b.select("--resume"), r"holds no run"),
    ("folder", "of another config"): (lambda b: b.select("--out", b.ran(sealed=True), "--resume"), r"another config"),
    ("folder", "without its seals"): (lambda b: b.select("--out", b.ran(), "--resume"), r"seals.jsonl is missing"),
    ("folder", "a config that was changed"): (
        lambda b: (b.ran(sealed=True) / "config.yaml").write_text("train: {}") and b.select("--resume"),
        r"config.yaml",
    ),
    ("folder", "a config that is garbage"): (
        lambda b: b.select("--out", b.ran(sealed=True, config_yaml=b"\xff\0"), "--resume"),
        r"config.yaml",
    ),
    ("folder", "a config that is a list"): (
        lambda b: b.select("--out", b.ran(sealed=True, config_yaml="- a"), "--resume"),
        r"config.yaml",
    ),
    ("folder", "a name that is too long"): (lambda b: b.select("--out", b.folder / ("x" * 300)), r"xxx"),
    ("folder", "in /proc"): (lambda b: b.select("--out", "/proc/run"), r"/proc/run"),
    ("folder", "nothing to export"): (
        lambda b: ["export", str(b.folder), "--out", str(b.out)],
        r"config.yaml is missing",
    ),
    ("folder", "no weights to export"): (
        lambda b: ["export", str(b.ran()), "--out", str(b.folder / "e")],
        r"weights.parquet",
    ),
    ("folder", "weights that are garbage"): (
        lambda b: ["export", str(b.ran(weights_parquet=b"PAR1")), "--out", str(b.folder / "e")],
        r"weights.parquet",
    ),
    ("folder", "a config to export that is garbage"): (
        lambda b: ["export", str(b.ran(config_yaml="[")), "--out", str(b.folder / "e")],
        r"config.yaml",
    ),
    ("folder", "a config to export that is a list"): (
        lambda b: ["export", str(b.ran(config_yaml="[]")), "--out", str(b.folder / "e")],
        r"config.yaml",
    ),
    ("folder", "a result to export that is a list"): (
        lambda b: ["export", str(b.ran(result_json="[]")), "--out", str(b.folder / "e")],
        r"weights.parquet: no such file",
    ),
    ("folder", "nothing to estimate"): (lambda b: ["estimate", str(b.folder)], r"no config.yaml; give the folder"),
    ("folder", "an unfinished run to estimate"): (
        lambda b: ["estimate", str(b.ran())],
        r"no result.json; give the folder",
    ),
    ("folder", "a result to estimate that is garbage"): (
        lambda b: ["estimate", str(b.ran(result_json="{"))],
        r"result.json",
    ),
    ("folder", "a result to estimate that is a list"): (
        lambda b: ["estimate", str(b.ran(result_json="[]"))],
        r"result.json",
    ),
    ("folder", "a result to estimate that is null"): (
        lambda b: ["estimate", str(b.ran(result_json='{"measured": null}', environment_json="[]"))],
        r"result.json",
    ),
    # ---- services, before any request
    ("service", "no address"): (
        lambda b: b.rank(None, "--generate.backend", "service", "--generate.model", "m"),
        r"generate.url = ''",
    ),
    ("service", "a password in the address"): (
        lambda b: b.rank(
            None, "--generate.backend", "service", "--generate.model", "m", "--generate.url", "http://u:sesame@h/v1"
        ),
        r"generate.url = 'http://...@h/v1': must end at /v1",
    ),
    ("service", "parameter names"): (
        lambda b: b.rank(None, "--generate.parameter-names", "max_token=x"),
        r"what is sent is n, seed",
    ),
    # ---- hostile text
    ("hostile text", "a command"): (lambda b: [EVIL], r"no command"),
    ("hostile text", "a flag"): (lambda b: b.select(f"--{EVIL}", 3), r"no such flag"),
    ("hostile text", "a value"): (lambda b: b.select("--outer.method", EVIL), r"wanted one of"),
    ("hostile text", "a file name"): (lambda b: b.select("--data.train", f"{b.folder}/{EVIL}.jsonl"), r"no such file"),
    ("hostile text", "a file"): (lambda b: b.rows([{"prompt": EVIL}], f"{EVIL[:20]}.jsonl"), r"no 'response'"),
    ("hostile text", "a key of a row"): (lambda b: b.rows([{EVIL: "a"}]), r"rows.jsonl:1"),
    ("hostile text", "a role"): (
        lambda b: b.rows([{"messages": [{"role": EVIL, "content": "a"}, CHAT["messages"][1]]}]),
        r"rows.jsonl:1",
    ),
    ("hostile text", "a model"): (lambda b: b.select("--model", f"{b.folder}/{EVIL}"), r"red"),
    ("hostile text", "a kind of model"): (lambda b: b.select("--model", b.model({"model_type": EVIL})), r"red"),
    ("hostile text", "a template"): (
        lambda b: b.inspect(
            [CHAT], model=b.model(files={"chat_template.jinja": "{{ raise_exception('" + EVIL + "') }}"})
        ),
        r"red",
    ),
    ("hostile text", "a config"): (lambda b: b.config(f'"{EVIL.encode("unicode_escape").decode()}": 3'), r"red"),
    ("hostile text", "a strategy"): (
        lambda b: b.rank(
            [{"prompt": "ab>", "responses": {EVIL: "b", "c": "d"}}, {"prompt": "b>", "responses": {"c": "c"}}]
        ),
        r"table.jsonl:2: no response of",
    ),
    ("hostile text", "a folder"): (lambda b: b.select("--out", Path(b.file(f"{EVIL}/x", "x")).parent), r"is not empty"),
    ("hostile text", "labels"): (lambda b: b.inspect([GOOD[0] | {"source": EVIL, "label": EVIL}]), None),
}

TEXT_COMMANDS = {
    "train": lambda b, *flags: b.train(*flags),
    "inspect": lambda b, *flags: ["inspect", "--model", str(b.made / "model"), *map(str, flags)],
    "refine": lambda b, *flags: b.run("refine", b.made / "compare_text.yaml", "--outer.proximal", 0, *flags),
    "export": lambda b, *flags: ["export", "--out", str(b.out), "--weights.file", "w.jsonl", *flags],
    "compare": lambda b, *flags: b.run("compare", b.made / "compare_text.yaml", *flags),
    "audit": lambda b, *flags: b.run("audit", b.made / "compare_text.yaml", *flags),
    "estimate": lambda b, *flags: ["estimate", str(b.made / "select.yaml"), "--estimate.no-compile", *map(str, flags)],
}
"""The other commands that read text, for what `CASES` tries with select."""
BAD_ROWS = {
    "no JSON": ([*GOOD, '{"prompt": "a\n'], r"bad.jsonl:28: "),
    "no response": ([*GOOD, {"prompt": "a>", "label": "clean"}], r"bad.jsonl:28: no 'response'.*data.response_field"),
    "null": ([*GOOD, "null\n"], r"bad.jsonl:28: "),
    "hostile text": ([*GOOD, {EVIL: EVIL}], r"bad.jsonl:28: "),
    "no rows": ("", r"bad.jsonl: no rows"),
}
for command, build_command in TEXT_COMMANDS.items():
    for rows_name, (bad_rows, row_text) in BAD_ROWS.items():
        CASES[f"data of {command}", rows_name] = (
            lambda b, build_command=build_command, bad_rows=bad_rows: build_command(
                b, "--data.train", b.file("bad.jsonl", bad_rows)
            ),
            row_text,
        )
    if command != "export":  # which reads no model
        CASES[f"data of {command}", "no model"] = (
            lambda b, build_command=build_command: build_command(
                b, "--model.name-or-path", b.folder / "nowhere", "--data.train", b.file("good.jsonl", GOOD)
            ),
            r"nowhere: no tokenizer",
        )

WARNED = {("data", "no id of that name"), ("hostile text", "labels")}
"""What is told in the output, and stops nothing."""
LEFT = {"folder"}
"""Kinds whose cases begin with a folder that is there."""


def check_sentence(code, out, err, expected):
    """Exactly one sentence that begins with the program's name, at the end, and holds what is expected."""
    assert not CONTROLS.search(out + err), "a control character reaches the terminal"
    assert "Traceback" not in out + err
    if code == 0:
        return
    said = err[err.index("bilevel-jax: ") :]
    assert err.count("bilevel-jax: ") == 1, err
    assert len(said.splitlines()) == 1 and said.rstrip().endswith((".", ")", "`", "'")), said
    assert re.search(expected, said), said


COMPARE_TEXT = """
model: {{name_or_path: {made}/model}}
lora: {{r: 0}}
data: {{train: [{made}/train.jsonl], validation: [{made}/validation.jsonl], split: [1, 0, 0], label_field: label}}
optimizer: {{warmup_steps: 0}}
outer: {{proximal: 0.01}}
output: {{progress: false}}
mesh: {{data: 1}}
"""


@pytest.fixture
def bench(made, tmp_path, monkeypatch):
    (made / "compare_text.yaml").write_text(COMPARE_TEXT.format(made=made))
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, made)


@pytest.mark.parametrize("kind, name", CASES, ids=lambda text: text)
def test_one_clear_sentence(kind, name, bench, capsys):
    build, expected = CASES[kind, name]
    code = main(build(bench))
    assert bool(code) != ((kind, name) in WARNED)
    check_sentence(code, *capsys.readouterr(), expected)
    assert kind in LEFT or not bench.out.exists(), "a folder is left behind"


def reply(content, status=200):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return transport.Reply(status, "Reason", Message(), body)


def message(content, reason="stop", **more):
    return reply({"choices": [{"message": {"content": content, **more}, "finish_reason": reason}]})


SERVICES = {
    "no connection": (
        ConnectionRefusedError(111, "Connection refused"),
        r"did not answer .* Connection refused.* Is it r",
    ),
    "a timeout": (TimeoutError("no whole answer within 120 s"), r"no whole answer within 120 s.* raise timeout"),
    "too large": (transport.TooLargeError("the answer has 9 bytes, more than 8"), r"the answer has 9 bytes"),
    "busy for ever": (reply({"error": {"code": 429, "message": "busy"}}), r"status 200 429: busy.*Lower concurrency"),
    "no such model": (reply({"error": {"message": "no m", "code": "x"}}, 404), r"refused with status 404: no m"),
    "a wrong key": (
        reply({"error": f"bad key {EVIL}"}, 401),
        r"the environment variable OPENAI_API_KEY is empty; set it",
    ),
    "a renamed parameter": (
        reply({"error": "no 'max_tokens'"}, 400),
        r"generate.parameter_names, as max_tokens=max_compl",
    ),
    "a page": (
        reply(f"<html><title>Log in{EVIL}</title>".encode()),
        r"a page of HTML, Log in.*which ends in /v1",
    ),
    "moved": (reply(b"", 308), r"moved: status 308.*set generate.url"),
    "cut reasoning": (
        message(None, "length", reasoning="x"),
        r"was spent on reasoning.* Raise generate.max_new_tokens",
    ),
    "refusals": (message(None, refusal=f"No{EVIL}"), r"the model refused: No.*Remove the question"),
    "empty messages": (message(""), r"the message is empty"),
    "hostile text": (reply(EVIL.encode()), r"no chat completion: it has no list of choices: a.*red"),
}


@pytest.mark.parametrize("name", SERVICES)
def test_one_clear_sentence_of_a_service(name, bench, capsys, monkeypatch):
    result, expected = SERVICES[name]

    def post_json(*args):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(transport, "post_json", post_json)
    monkeypatch.setattr(openai, "MAX_RETRY_WAIT", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flags = ("--generate.backend", "service", "--generate.url", "http://127.0.0.1:9/v1", "--generate.model", "m")
    code = main(bench.rank(None, *flags))
    assert code == 1
    check_sentence(code, *capsys.readouterr(), expected)


FAULTS = {
    "a full disk": (errno.ENOSPC, r"the disk is full: .*/out holds no run yet\. Free space, then start it again"),
    "a full quota": (errno.EDQUOT, r"the disk is full: .*/out holds no run yet\. Free space, then start it again"),
    "no permission": (errno.EACCES, r"/out/.*: permission denied\. Change its permissions"),
    "a read-only disk": (errno.EROFS, r"/out/.*: read-only file system\. Choose a folder that can be written"),
    "too many files": (errno.EMFILE, r"too many open files\. Raise the limit"),
    "a broken disk": (errno.EIO, r"/out/.*: input/output error\. Look at"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_clear_sentence_of_the_machine(name, bench, capsys, monkeypatch):
    number, expected = FAULTS[name]

    def replace(source, target):
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(run_dir.os, "replace", replace)
    code = main(bench.select())
    assert code == 1
    check_sentence(code, *capsys.readouterr(), expected)


HOSTILE_RUNS = {
    "inspect": [],
    "estimate": ["--estimate.no-compile"],
    "export": [],
    "evaluate": ["--generate.max-new-tokens", 4, "--verifier.name", "exact", "--evaluate.harness"],
    "rank": ["--rank.metrics", "perplexity", "--rank.pick-by", "perplexity"],
    "train": ["--train.max-steps", 2, "--optimizer.warmup-steps", 0, "--train.eval-steps", 1],
    "select": ["--train.max-steps", 2, "--optimizer.warmup-steps", 0, "--outer.steps", 1, "--fast"],
    "refine": [
        "--train.max-steps",
        2,
        "--optimizer.warmup-steps",
        0,
        "--refine.rounds",
        1,
        "--refine.methods",
        "uniform",
    ],
}
SLOW_COMMANDS = ("estimate", "evaluate", "rank", "train", "select", "refine")


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_COMMANDS else []) for name in HOSTILE_RUNS],
)
def test_hostile_text_in_every_field_of_an_output(command, bench, capsys):
    """Prompts, responses, sources, labels, strategies, names of files and folders; all that is printed is visible."""
    rows = [{**row, "source": EVIL, "label": f"{EVIL}{at % 2}"} for at, row in enumerate(GOOD)]
    folder = bench.folder / EVIL
    parts = {
        part: bench.file(f"{EVIL}/{part}{EVIL}.jsonl", rows[start : start + 9])
        for part, start in (("train", 0), ("validation", 9), ("dev", 18))
    }
    model = folder / "model"
    shutil.copytree(bench.made / "model", model)
    settings = "output: {progress: false}\nmesh: {data: 1}\nlora: {r: 0}\n"
    data = [word for part in parts for word in (f"--data.{part}", parts[part])]
    flags = [
        "--model",
        model,
        *data,
        "--data.split",
        1,
        0,
        0,
        "--data.label-field",
        "label",
        "--data.good-label",
        f"{EVIL}0",
        "--out",
        folder / "out",
    ]
    config = bench.file(f"{EVIL}/c.yaml", settings)
    if command == "rank":
        table = [{"prompt": row["prompt"], "responses": {EVIL: "abcd", f"{EVIL}2": "bcd"}} for row in GOOD]
        config = bench.file(
            "c.yaml", settings + "rank: {block_size: 6, num_blocks: 2}\ngenerate: {max_new_tokens: 4}\n"
        )
        flags = ["--model", model, "--data.train", bench.file(f"{EVIL}/t.jsonl", table), "--out", folder / "out"]
    elif command == "evaluate":
        config = bench.file(f"{EVIL}/e.yaml", settings.replace("lora: {r: 0}\n", ""))
        flags = [
            "--model",
            model,
            "--baseline",
            bench.made / "model",
            "--prompts",
            parts["train"],
            "--out",
            folder / "out",
        ]
    elif command == "export":
        ids = [example.id for example in load_examples([parts["train"]])]
        weights = bench.file(f"{EVIL}/w.jsonl", [{"id": one, "weight": 1.0 + at} for at, one in enumerate(ids)])
        flags = ["--data.train", parts["train"], "--weights.file", weights, "--out", folder / "out"]
    elif command == "estimate":
        config = bench.file("c.yaml", settings + "selection: {top_share: 0.5}\n")
        flags = flags[:-2]
    elif command == "refine":
        flags += ["--generate.max-new-tokens", 4]
    elif command == "inspect":
        flags = flags[:-2]
    code = main([command, str(config), *map(str, flags), *map(str, HOSTILE_RUNS[command])])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert not CONTROLS.search(out + err)
    assert "red" in out + err or command == "estimate"  # which names no text of the data
