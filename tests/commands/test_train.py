"""The command `train` as a user runs it: what it writes, which weights it uses, that it stops and goes on."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.results import summarize_training
from bilevel_jax.commands.select.run import select
from bilevel_jax.commands.train.run import train
from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import load_examples as load_rows
from bilevel_jax.runs.config.load import SelectConfig, TrainConfig, load_config
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.tasks.text import build_objective
from tests.runs.command import run_verb
from tests.runs.problems_lm import MODEL, reviews

PAIRS = ("--data.train", "pairs.jsonl", "--data.validation", "pairs_report.jsonl", "--data.dev")
OBJECTIVES = {
    "sft": (),
    "dpo": ("--objective.name", "dpo", *PAIRS),
    "simpo": ("--objective.name", "simpo", *PAIRS),
}


def run(made, out, *flags):
    given = [str(made / flag) if flag.endswith(".jsonl") and "/" not in flag else flag for flag in flags]
    return train(load_config(TrainConfig, made / "train.yaml", [*given, "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """One uninterrupted run: (its folder, its result)."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, run(made, out)


def weights_file(path, examples, weights, **more):
    pq.write_table(pa.table({"id": [e.id for e in examples], "weight": weights, **more}), path)
    return str(path)


LOCAL = ("config.yaml", "inputs.json", "environment.json", "log.jsonl", "report.html", "identity.json", "manifest.json")


def test_what_travels_names_no_place_of_this_machine(made, whole):
    out, _ = whole
    travels = [path for path in out.rglob("*") if path.is_file() and path.name not in LOCAL]
    travels = [path for path in travels if path.relative_to(out).parts[0] not in ("checkpoints", "parts")]
    assert {"result.json", "weights.parquet", "config.json"} <= {path.name for path in travels}
    place = str(made.parent).encode()
    assert [path.name for path in travels if place in path.read_bytes()] == []
    assert set(pq.read_table(out / "weights.parquet")["file"].to_pylist()) == {"train.jsonl"}


def test_modes_of_files_follow_the_umask(whole):
    out, _ = whole
    umask = os.umask(0)
    os.umask(umask)
    odd = [
        path.relative_to(out)
        for path in out.rglob("*")
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    ]
    assert odd == []


def tensors(folder):
    return {
        key: np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(models.load_model(folder / "model")[1])
    }


def test_writes_what_it_promises(made, whole):
    out, result = whole
    assert result["steps"] == 10 and result["epochs"] == 2
    before, after = (result["parts"]["test"][when] for when in ("before", "after"))
    assert after["loss"] < before["loss"] and set(result["parts"]) == {"validation", "dev", "test"}
    assert [record["step"] for record in result["records"]] == [0, 4, 8, 10]
    assert summarize_training(result).startswith("10 steps on 36 rows; test loss fell from")
    table = pq.read_table(out / "weights.parquet")
    assert set(table["weight"].to_pylist()) == {1.0} and table.num_rows == 36
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [record for record in steps if record["event"] == "steps"]
    losses = {record["first"] + i: loss for record in steps for i, loss in enumerate(record["losses"])}
    assert sorted(losses) == list(range(10)) and losses[9] < losses[0]
    assert "<html" in (out / "report.html").read_text()
    assert result["measured"]["passes"] == result["estimate"]["passes"] == 10 and result["measured"]["memory"] > 0
    assert result["measured"]["disk"] > result["estimate"]["disk"]["model"] == 4 * 21_952
    assert result["tokens"] == 2 * 36 * 5  # four letters and EOS in every row, in each of two epochs
    carried = {path.name: path.read_bytes() for path in (made / "model").iterdir() if path.name != "model.safetensors"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < set(carried)
    assert {name: (out / "model" / name).read_bytes() for name in carried} == carried


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns(made, tmp_path, objective):
    result = run(made, tmp_path / "run", *OBJECTIVES[objective], "--train.num-epochs", "6")
    part = result["parts"]["test"]
    assert part["after"]["loss"] < part["before"]["loss"]
    assert 0 <= part["after"]["accuracy"] <= 1
    assert result["unit"] == ("nats per token" if objective == "sft" else "nats per pair")
    if objective == "dpo":
        assert part["before"]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the model starts as its own reference


@pytest.mark.slow  # tests/lm/test_objectives.py has the hypergradients of pairs, and the tests above read them
@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_select_weighs_pairs(made, tmp_path, objective):
    flags = [
        "--objective.name", objective, "--data.train", str(made / "pairs.jsonl"), "--data.validation",
        str(made / "pairs_validation.jsonl"), "--data.test", str(made / "pairs_report.jsonl"),
        "--outer.learning-rate", "1.0", "--train.max-steps", "20", "--retrain.variants", "uniform", "learned",
        "--optimizer.eps-root", "1e-6",
    ]  # fmt: skip
    result = select(load_config(SelectConfig, made / "select.yaml", [*flags, "--out", str(tmp_path / "run")]))
    assert result["auc"]["weights"] > 0.9  # a third of the pairs is swapped
    loss = {row["name"]: row["mean"]["test"] for row in result["compare"]}
    assert loss["learned"] < loss["uniform"]
    assert "nats per pair" in (tmp_path / "run" / "report.html").read_text()
    assert result["certificates"]["uniform weights"]["exact"]["ratios"][0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "flags, at",
    [
        ((), 6),
        pytest.param(("--train.load-best", "--lora.r", "2"), 9, marks=pytest.mark.slow),
        pytest.param(OBJECTIVES["dpo"], 3, marks=pytest.mark.slow),
    ],
    ids=["sft", "lora, best", "dpo"],
)
def test_stopped_anywhere_and_resumed_changes_no_bit(made, tmp_path, stop_at, flags, at):
    run(made, tmp_path / "whole", *flags)
    stop_at(at)
    with pytest.raises(session.Interrupted, match="everything is saved"):
        run(made, tmp_path / "run", *flags)
    result = run(made, tmp_path / "run", *flags, "--resume")
    assert 0 < result["resumed"] < result["steps"]
    for name in ("model/model.safetensors", "weights.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    other = json.loads((tmp_path / "whole" / "result.json").read_text())
    for key in ("records", "parts", "tokens", "best"):
        assert result[key] == other[key], key


def test_weights_are_joined_by_id(made, tmp_path):
    """A file in another order, with a row that is not there; weights of 2 and 0 where uniform has 1."""
    examples = load_rows([str(made / "train.jsonl")])
    weights = np.where(np.arange(36) % 2, 2.0, 0.0)
    other = [*reversed(examples), examples[0]._replace(id="0" * 16 + "#0")]
    path = weights_file(tmp_path / "w.parquet", other, [*reversed(weights.tolist()), 7.0])
    result = run(made, tmp_path / "run", "--weights.file", path)
    assert pq.read_table(tmp_path / "run" / "weights.parquet")["weight"].to_pylist() == weights.tolist()
    assert result["weights"]["zero"] == 18 and result["weights"]["ess"] == pytest.approx(18)


@pytest.fixture(scope="module")
def twice(made, tmp_path_factory):
    """The parameters of plain SGD on twice the loss."""
    out = tmp_path_factory.mktemp("twice") / "run"
    run(made, out, *SGD, "--data.packing", "--weights.constant", "2")
    return tensors(out)


SGD = ("--optimizer.name", "sgd", "--optimizer.learning-rate", "0.1")


@pytest.mark.parametrize(
    "way",
    [
        "weights.tokens",
        pytest.param("messages", marks=pytest.mark.slow),
        pytest.param("messages, four devices", marks=pytest.mark.slow),
    ],
)
def test_weights_of_tokens_and_messages_are_factors_of_the_loss(made, twice, tmp_path, capsys, way):
    examples = load_rows([str(made / "train.jsonl")])
    if way == "weights.tokens":  # the first example gets none, and the weight of a row instead
        rows = [{"id": e.id, "token_weights": [2.0] * 5} for e in examples[1:]]
        pq.write_table(pa.Table.from_pylist([*rows, {"id": "0#0", "token_weights": [1.0]}]), tmp_path / "t.parquet")
        weights = weights_file(tmp_path / "w.parquet", examples, [2.0] + [1.0] * 35)
        flags = ("--weights.tokens", str(tmp_path / "t.parquet"), "--weights.file", weights)
    else:
        rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
        rows = [row | {"response": [{"role": "assistant", "content": row["response"], "weight": 2}]} for row in rows]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ("--data.train", str(tmp_path / "train.jsonl"))
        flags += ("--mesh.data", "2", "--mesh.fsdp", "2") if way != "messages" else ()
    result = run(made, tmp_path / "run", *SGD, "--data.packing", *flags)
    ours = tensors(tmp_path / "run")
    assert all(np.allclose(ours[key], twice[key], atol=1e-7) for key in twice)
    assert result["tokens"] == 2 * 36 * 5  # a weight changes no count
    if way == "weights.tokens":
        note = "weights of tokens: of 35 of 36 training examples, from t.parquet; 1 id of the file is that of no"
        assert any(one.startswith(note) for one in result["notes"])
        tokens = json.loads((tmp_path / "run" / "tokens.json").read_text())
        assert "token weights" in json.dumps(tokens) and "t.parquet" in (tmp_path / "run" / "inputs.json").read_text()


@pytest.mark.slow
def test_constant_weights_scale_the_loss(made, tmp_path):
    """A constant weight c is c times the loss: the same as c times the learning rate of plain SGD, bit-near."""
    sgd = ("--optimizer.name", "sgd", "--optimizer.schedule", "constant", "--optimizer.warmup-steps", "0")
    run(made, tmp_path / "weight", *sgd, "--weights.constant", "2", "--optimizer.learning-rate", "0.05")
    run(made, tmp_path / "rate", *sgd, "--optimizer.learning-rate", "0.1")
    one, other = tensors(tmp_path / "weight"), tensors(tmp_path / "rate")
    assert all(np.allclose(one[key], other[key], atol=1e-7) for key in one)


def test_rows_without_a_weight_are_dropped_or_weigh_nothing(made, tmp_path):
    """Dropped: the run on the remaining rows, bit for bit."""
    examples = load_rows([str(made / "train.jsonl")])
    path = weights_file(tmp_path / "w.parquet", examples[:24], [1.0] * 24)
    dropped = run(made, tmp_path / "dropped", "--weights.file", path, "--weights.missing", "drop")
    (tmp_path / "fewer.jsonl").write_text("".join((made / "train.jsonl").read_text().splitlines(True)[:24]))
    run(made, tmp_path / "fewer", "--data.train", str(tmp_path / "fewer.jsonl"))
    assert dropped["rows"]["train"] == 24 and dropped["weights"]["missing"] == 12
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("dropped", "fewer"))
    assert one == other
    zero = run(made, tmp_path / "zero", "--weights.file", path, "--weights.missing", "zero")
    assert zero["rows"]["train"] == 36 and zero["weights"]["zero"] == 12


def test_the_best_parameters_are_kept(made, tmp_path):
    """A rate that overshoots: the best on dev is not the last, and is what is written."""
    flags = ("--optimizer.learning-rate", "0.3", "--optimizer.schedule", "constant", "--train.load-best")
    result = run(made, tmp_path / "run", *flags, "--train.eval-steps", "1")
    values = [record["loss"]["dev"] for record in result["records"]]
    assert result["best"]["step"] == int(np.argmin(values)) < result["steps"]
    assert result["parts"]["dev"]["after"]["loss"] == min(values)


def test_without_validation(made, tmp_path):
    result = run(made, tmp_path / "run", "--data.validation", "--data.dev")
    assert result["parts"] == {} and "nothing says whether" in summarize_training(result)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    "parts, written", [("full", {"model"}), ("adapter", {"model-adapter"}), ("both", {"model", "model-adapter"})]
)
def test_lora_is_written_as_asked(made, tmp_path, parts, written):
    run(made, tmp_path / "run", "--lora.r", "2", "--train.num-epochs", "1", "--output.model", parts)
    assert {path.name for path in (tmp_path / "run").glob("model*")} == written
    for path in (tmp_path / "run").glob("model-adapter/adapter_config.json"):
        assert json.loads(path.read_text())["base_model_name_or_path"] is None  # a place on this machine names nothing


@pytest.mark.slow
def test_bfloat16_products_train(made, tmp_path):
    result = run(made, tmp_path / "run", "--train.compute-dtype", "bfloat16", "--train.num-epochs", "6")
    part = result["parts"]["test"]
    assert part["after"]["loss"] < part["before"]["loss"]
    assert all(leaf.dtype == np.float32 for leaf in tensors(tmp_path / "run").values())


@pytest.mark.slow
def test_a_stored_reference_is_used_and_checked(made, whole, tmp_path, capsys):
    run(made, tmp_path / "one", *OBJECTIVES["dpo"])
    stored = ("--objective.reference", str(tmp_path / "one" / "reference.parquet"))
    run(made, tmp_path / "two", *OBJECTIVES["dpo"], *stored)
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == other
    with pytest.raises(ValueError, match="made by another model"):
        run(made, tmp_path / "three", *OBJECTIVES["dpo"], *stored, "--model.name-or-path", str(whole[0] / "model"))
    with pytest.raises(ValueError, match="were read as other tokens"):
        run(made, tmp_path / "four", *OBJECTIVES["dpo"], *stored, "--data.truncation", "left", "--data.max-length", "9")


WRONG = {
    "single responses": (("--objective.name", "dpo"), "compares a chosen with a rejected one.*objective.name to sft"),
    "pairs": (("--data.train", "pairs.jsonl"), "a preference pair, and objective.name = sft"),
    "best without dev": (("--train.load-best", "--data.dev", "--data.split", "1", "0", "0"), "has no examples"),
    "no such weights": (("--weights.file", "nowhere.parquet"), "nowhere.parquet: no such file"),
    "no such tokens": (
        ("--weights.tokens", "test.jsonl"),
        "test.jsonl:1: no 'id'; the keys are .* Each row is the id of a training example and its token_weights",
    ),
    "streamed tokens": (
        ("--weights.tokens", "test.jsonl", "--data.streaming", "--train.max-steps", "2"),
        "weights.tokens = .*: are joined with the examples before the first step",
    ),
    "diverges": (("--optimizer.learning-rate", "1e30"), "training loss is (nan|inf) at step"),
    "smoothing of sft": (("--objective.label-smoothing", "0.1"), "is for dpo only"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_clear_error(made, tmp_path, capsys, name):
    import re

    flags, message = WRONG[name]
    given = [str(made / flag) if flag.endswith(".jsonl") else flag for flag in flags]
    assert main(["train", str(made / "train.yaml"), *given, "--out", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert re.search(message, told, re.DOTALL) and "Traceback" not in told, told


STREAMED = ("--data.streaming", "--train.max-steps", "12")


@pytest.mark.slow
def test_streamed_rows_are_the_rows_in_order(made, tmp_path):
    """Without a buffer, an epoch is the files in order: the run on rows held at hand, in that order, to rounding."""
    result = run(made, tmp_path / "run", *STREAMED, "--data.shuffle-buffer", "0")
    assert result["tokens"] == 12 * 8 * 5 and result["epochs"] == 96 / 36 and result["rows"]["train"] == 36
    assert result["parts"]["test"]["after"]["loss"] < result["parts"]["test"]["before"]["loss"]
    ids = pq.read_table(tmp_path / "run" / "weights.parquet")["id"].to_pylist()
    assert ids == [example.id for example in load_rows([str(made / "train.jsonl")])]


@pytest.mark.slow
def test_streamed_answers_have_weights_in_some_batches_alone(made, tmp_path):
    """The first batch has weights of answers, and the others none: as the same weights of rows."""
    examples = load_rows([str(made / "train.jsonl")])
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    rows = [
        row | {"response": [{"role": "assistant", "content": row["response"], "weight": 1 + int(i < 8)}]}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (*STREAMED[:1], "--train.max-steps", "4", "--data.shuffle-buffer", "0", *SGD)
    run(made, tmp_path / "turns", *flags, "--data.train", str(tmp_path / "train.jsonl"))
    weights = weights_file(tmp_path / "w.parquet", examples, [2.0] * 8 + [1.0] * 28)
    run(made, tmp_path / "rows", *flags, "--weights.file", weights)
    ours, wanted = tensors(tmp_path / "turns"), tensors(tmp_path / "rows")
    assert all(np.allclose(ours[key], wanted[key], atol=1e-7) for key in wanted)


def test_streamed_stopped_and_resumed_changes_no_bit(made, tmp_path, stop_at):
    flags = (*STREAMED, "--data.shuffle-buffer", "10", "--objective.name", "simpo", *PAIRS)
    run(made, tmp_path / "whole", *flags)
    stop_at(8)
    with pytest.raises(session.Interrupted):
        run(made, tmp_path / "run", *flags)
    run(made, tmp_path / "run", *flags, "--resume")
    for name in ("model/model.safetensors", "weights.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_streamed_weights_and_leaks(made, tmp_path, capsys):
    examples = load_rows([str(made / "train.jsonl")])
    path = weights_file(tmp_path / "w.parquet", examples[:20], [2.0] * 20)
    rows = [json.loads(line) | {"system_prompt": "x"} for line in (made / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--weights.file", path, "--weights.missing", "drop", "--data.train", str(tmp_path / "train.jsonl"))
    result = run(made, tmp_path / "run", *STREAMED, *given)
    assert result["rows"]["train"] == 20 and result["weights"]["mean"] == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "the key 'system_prompt' is not read: 20 rows, the first" in told and "train.jsonl:1" in told
    rows = (made / "train.jsonl").read_text() + (made / "test.jsonl").read_text()
    (tmp_path / "leaky.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"leaky.jsonl:37 also stands in the validation examples, at .*test.jsonl:1"):
        run(made, tmp_path / "leaky", *STREAMED, "--data.train", str(tmp_path / "leaky.jsonl"))


def greedy(folder, ids, count):
    """The next tokens by the largest logit, with our decoder."""
    config, params = models.load_model(folder)
    decoder = models.make_decoder(config)

    @jax.jit
    def logits(tokens):
        places, segments = jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
        return decoder.hidden(params, tokens, places, segments) @ decoder.head(params)

    tokens = np.zeros((1, len(ids) + count), np.int32)  # one shape: what stands behind is not seen
    tokens[0, : len(ids)] = ids
    for place in range(len(ids), tokens.shape[1]):
        tokens[0, place] = np.asarray(logits(jnp.asarray(tokens)))[0, place - 1].argmax()
    return tokens[0, len(ids) :].tolist()


def continued(folder, text, count):
    """How `transformers` continues `text`, and how we do: token ids, EOS as any other."""
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=-1)
    return out[0, len(ids) :].tolist(), greedy(folder, ids, count)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_written_model_says_the_same_in_transformers(whole):
    theirs, ours = continued(whole[0] / "model", "abcd>", 4)
    assert theirs == ours


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_a_real_model_learns_real_rows_and_says_the_same_in_transformers(shared, tmp_path):
    texts = reviews(shared, 160)
    for name, part in (("train", texts[:96]), ("validation", texts[96:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    flags = {
        "model.name_or_path": shared / "models" / MODEL, "data.train": tmp_path / "train.jsonl", "data.max-length": 64,
        "data.validation": tmp_path / "validation.jsonl", "optimizer.learning-rate": 3e-3,
    }  # fmt: skip
    given = [text for flag, value in flags.items() for text in (f"--{flag}", value)]
    result = run_verb("train", "configs/train.yaml", tmp_path / "run", *given)
    report = result["parts"]["test"]
    assert report["after"]["loss"] < report["before"]["loss"] - 0.3
    theirs, ours = continued(tmp_path / "run" / "model", "the film is", 20)
    assert theirs == ours


@pytest.mark.slow
def test_steps_that_are_not_finite_are_left_out_up_to_the_cap(made, tmp_path, monkeypatch):
    """One row's loss is nan: it is met in each of two epochs."""
    made_by = build_objective

    def objective(*args, **kwargs):
        whole = made_by(*args, **kwargs)

        def losses(params, fixed, batch):
            return whole.losses(params, fixed, batch) * jnp.where(batch["index"] == 5, jnp.nan, 1)

        return whole._replace(losses=losses)

    monkeypatch.setattr("bilevel_jax.runs.tasks.text.build_objective", objective)
    result = run(made, tmp_path / "two", "--train.max-nonfinite-steps", "2")
    assert result["skipped"] == 2 and "2 steps were left out: not finite." in result["notes"]
    assert all(np.isfinite(leaf).all() for leaf in tensors(tmp_path / "two").values())
    for skip in ("1", "0"):
        with pytest.raises(FloatingPointError, match=r"the loss of \w+#0 \(.*train.jsonl:6\) is not finite"):
            run(made, tmp_path / f"skip {skip}", "--train.max-nonfinite-steps", skip)


@pytest.mark.parametrize(
    "ids, weights, flags, said",
    [
        (slice(0, 36), 0.0, (), "every weight is 0, so nothing would be learned"),
        (slice(0, 0), 1.0, ("--weights.missing", "one"), "none of its 1 ids, such as other, is that of a training"),
        (slice(0, 0), 1.0, ("--weights.missing", "zero"), "none of its 1 ids, such as other, is that of a training"),
        (slice(0, 0), 1.0, ("--weights.missing", "drop"), "no row is left to train on"),
        (slice(0, 20), -1.0, ("--weights.missing", "drop"), "a weight is 0 or more. If it is a score"),
    ],
)
def test_streamed_weights_that_teach_nothing_are_refused(made, tmp_path, ids, weights, flags, said):
    examples = load_rows([str(made / "train.jsonl")])[ids]
    rows = [{"id": example.id, "weight": weights} for example in examples] + [{"id": "other", "weight": 1.0}]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=said):
        run(made, tmp_path / "run", *STREAMED, "--weights.file", str(tmp_path / "w.jsonl"), *flags)


def test_streamed_rows_without_a_weight_are_counted(made, tmp_path):
    examples = load_rows([str(made / "train.jsonl")])
    path = weights_file(tmp_path / "w.parquet", examples[:20], [2.0] * 20)
    flags = ("--data.streaming", "--train.max-steps", "5", "--weights.file", path, "--weights.missing", "one")
    assert run(made, tmp_path / "run", *flags)["weights"]["missing"] == 16


def test_weights_of_rows_that_do_not_fit_teach_nothing(made, tmp_path):
    long = {"prompt": "abcdefgh>", "response": "abcdefgh", "label": "clean"}
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()] + [long]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = weights_file(tmp_path / "w.parquet", load_rows([str(tmp_path / "long.jsonl")]), [0.0] * 36 + [1.0])
    flags = ["--data.train", str(tmp_path / "long.jsonl"), "--data.truncation", "drop", "--data.max-length", "12"]
    with pytest.raises(ValueError, match=r"every example that fits data.max_length has weight 0"):
        run(made, tmp_path / "run", *flags, "--weights.file", path)
