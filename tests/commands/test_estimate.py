"""What `estimate` says, against what the same run really holds, compiles, counts and leaves on the disk."""

import gc
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.estimate.abstract_run import make_abstract_run, read_examples
from bilevel_jax.commands.estimate.run import estimate
from bilevel_jax.commands.select.run import select
from bilevel_jax.core.training import init_train_state
from bilevel_jax.runs.budget import compiled_steps, memory, work
from bilevel_jax.runs.config.load import SelectConfig, TrainConfig, TuneConfig, load_config, load_config_to_estimate
from bilevel_jax.runs.config.schema import CertifySection, RetrainSection
from bilevel_jax.runs.engine import trajectory_store
from bilevel_jax.runs.infra.placement import replicate, replicate_unplaced
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.text import prepare_text_task, tokenize_splits
from tests.commands.test_targets import SEVERAL, files, flags  # noqa: F401
from tests.conftest import ROOT
from tests.runs.engine.test_agreement import free_port

LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 128000,
    "eos_token_id": 128001, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
LARGE = (
    "--model.base-dtype", "bfloat16", "--train.max-steps", "1000", "--train.global-batch-size", "64",
    "--train.gradient-accumulation-steps", "8",
    "--data.max-length", "1024", "--estimate.train-examples", "50000", "--estimate.devices", "8",
    "--estimate.tflops", "989",
)  # fmt: skip


@pytest.fixture
def large(tmp_path):
    """A folder with the config.json of Llama-3-8B, and nothing else."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return folder


def subjects(made, tmp_path, *flags):
    """The same run of shapes, and of arrays: (config, subject, task)."""
    config = load_config(SelectConfig, made / "select.yaml", flags)
    found = splits.load_splits(config.data)
    task = prepare_text_task(
        config,
        found,
        tmp_path,
        num_steps=config.train.max_steps,
        seeds=[0],
        proximal_strength=config.outer.proximal,
        target=config.target,
    )
    return config, make_abstract_run(config, tokenize_splits(config, found, config.target), "select"), task


@pytest.mark.parametrize(
    "flags",
    [(), ("--lora.r", "2"), ("--lora.r", "2", "--model.base-dtype", "bfloat16")],
    ids=["all", "lora", "bfloat16"],
)
def test_shapes_are_those_of_the_loaded_model(made, tmp_path, flags):
    _, subject, task = subjects(made, tmp_path, *flags)
    params = task.init_params(0)
    state = init_train_state(task.optimizer, params)
    for shapes, arrays in (
        (subject.task.base_params, task.base_params),
        (subject.shapes.params, params),
        (subject.shapes.state, state),
    ):
        assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
        for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(arrays), strict=True):
            assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert trajectory_store.bytes_per_device(shapes) == sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(shapes))
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert (
        trajectory_store.bytes_per_device(subject.shapes.state) == 4 * 3 * size + 3 * 4
    )  # AdamW's moments, and three counts
    assert trajectory_store.bytes_per_device(subject.shapes.adjoint) == 4 * 3 * size


def test_each_target_is_estimated_by_its_own_validation_batch(made, files, tmp_path):  # noqa: F811
    """Its model passes, the readings of a run, and what DPO's reference leaves on the disk."""
    given = flags(made, files, *SEVERAL, f"{files}/targets.py:distance")[1:]
    given += ["--train.gradient-accumulation-steps", "2", "--model.remat", "none"]
    _, subject, task = subjects(made, tmp_path, *given)
    programs = compiled_steps.validation_gradient_programs(subject.task, subject.shapes)
    simpo, dpo, parameters = (
        compiled_steps.count_flops(program.function.trace(*program.arguments).jaxpr.jaxpr) for program in programs
    )
    training = compiled_steps.forward_program(subject.task, subject.shapes)
    sft = compiled_steps.count_flops(training.function.trace(*training.arguments).jaxpr.jaxpr)
    assert simpo == dpo == 2 * sft  # two answers for each example; the reference is read before
    assert parameters == 0  # reads no example
    for real, program in zip(compiled_steps.validation_gradient_programs(task, subject.shapes), programs, strict=True):
        assert {name: leaf.shape for name, leaf in real.arguments[2].items()} == {
            name: leaf.shape for name, leaf in program.arguments[2].items()
        }
    kept = [len(one.corpus.kept_indices) for one in task.target_corpora["validation"][:2]]
    assert kept == [5, 3]  # one batch each
    config = replace(subject.config, certify=CertifySection(enabled=False), retrain=RetrainSection(enabled=False))
    readings = [work.evaluation_work(subject.task, config, costs) for costs in np.eye(3).tolist()]
    trainings = config.outer.steps + 1
    test_batches = [math.ceil(len(one.corpus.kept_indices) / 8) for one in task.target_corpora["test"][:2]]
    assert readings[0] == pytest.approx(trainings * (1 + (1 + test_batches[0]) / 3))
    assert readings[1] == pytest.approx(trainings * (1 + (1 + test_batches[1]) / 3) + (1 + test_batches[1]) / 3)
    assert readings[2] == pytest.approx(trainings * (1 + 2 / 3))
    on_disk = (tmp_path / "reference.parquet").stat().st_size
    said = memory.disk_bytes(subject.task, subject.config, subject.shapes)["log-probabilities of the reference"]
    assert said == memory.BYTES_OF_PAIR * sum(
        one.num_rows for part in task.target_corpora.values() for one in part[1:2]
    )
    assert abs(on_disk - said) < 6000, (on_disk, said)


@pytest.mark.parametrize("flags", [(), ("--lora.r", "2")], ids=["all", "lora"])
def test_a_run_finds_the_steps_that_an_estimate_compiled(made, tmp_path, flags):
    """In the compilation cache, whose key is the program with the shardings of its arguments."""
    _, subject, task = subjects(made, tmp_path, *flags, "--mesh.data", "1")
    batch, weights = task.training_stream(0).batch(0), replicate(task.mesh, jnp.ones(task.num_examples))
    state = replicate_unplaced(task.mesh, init_train_state(task.optimizer, task.init_params(0)))
    part = task.train_step.gather(weights, batch)
    real = task.train_step.forward.lower(state, part, task.frozen(state.params), batch)
    program = compiled_steps.forward_program(subject.task, subject.shapes)
    assert program.function.lower(*program.arguments).as_text() == real.as_text()


@pytest.mark.slow  # compiles two steps of a run twice
def test_workspace_is_that_of_the_step_on_arrays(made, tmp_path):
    _, subject, task = subjects(made, tmp_path)
    batch, weights = task.training_stream(0).batch(0), jnp.ones(task.num_examples)
    state = init_train_state(task.optimizer, task.init_params(0))
    part = task.train_step.take(weights, batch)
    whole = task.train_step.forward.lower(state, part, task.frozen(state.params), batch).compile().memory_analysis()
    found = compiled_steps.compile_program(compiled_steps.forward_program(subject.task, subject.shapes))
    assert found.workspace_bytes == whole.temp_size_in_bytes > 0
    assert (
        compiled_steps.time_program(
            compiled_steps.forward_program(subject.task, subject.shapes), found.executable, calls=2
        )
        > 0
    )


def test_operations_are_counted_by_hand(made, tmp_path):
    """All parameters, no layer recomputed. Every product once forwards and twice backwards, the loss's once more."""
    _, subject, _ = subjects(made, tmp_path, "--model.remat", "none", "--train.gradient-accumulation-steps", "2")
    raw = json.loads((made / "model" / "config.json").read_text())
    width, inner, layers = raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"]
    layout = subject.task.layout
    places = layout.num_micro_batches * layout.rows * layout.length
    heads = raw["num_attention_heads"] * raw["head_dim"]
    linear = 2 * places * layers * (4 * width * heads + 3 * width * inner)
    attention = 2 * places * layers * 2 * layout.length * heads
    head = 2 * places * width * raw["vocab_size"]

    def flops(program):
        return compiled_steps.count_flops(program.function.trace(*program.arguments).jaxpr.jaxpr)

    body = linear + attention
    assert flops(compiled_steps.forward_program(subject.task, subject.shapes)) == 3 * body + 4 * head
    # with tangents each product is two more; the gradient itself is not asked for, so its last product falls away
    forwards, downwards, sideways = 3, 3, 2
    expected = (forwards + downwards + sideways) * linear + (forwards + 2 * downwards) * attention
    backward = flops(compiled_steps.backward_program(subject.task, subject.shapes))
    assert backward == expected + (8 + forwards) * head
    linearizing = compiled_steps.linearize_program(subject.task, subject.shapes)
    pulling = compiled_steps.vjp_program(subject.task, subject.shapes, compiled_steps.compile_program(linearizing))
    # what is left out of a step back: of each primal product the two that are not of the gradient alone
    assert flops(linearizing) == 3 * body + 4 * head
    assert flops(pulling) == backward - (2 * linear + 3 * attention + 2 * head)


def test_linearisations_are_as_large_as_was_said(made, tmp_path):
    _, subject, task = subjects(made, tmp_path, "--outer.linearize", "--train.gradient-accumulation-steps", "2")
    state, batch = init_train_state(task.optimizer, task.init_params(0)), task.training_stream(0).batch(0)
    _, info, linear = task.train_step.linearize(state, batch["index"] * 0.0, task.frozen(state.params), batch)
    there = {one.unsafe_buffer_pointer() for one in jax.tree.leaves((state, info, batch))}
    own = {one.unsafe_buffer_pointer(): one.nbytes for one in jax.tree.leaves(linear)}
    assert (
        memory.task_linearization_bytes(subject.task, subject.shapes)
        == sum(size for at, size in own.items() if at not in there)
        > 0
    )
    keep = memory.plan_task_checkpoints(subject.task, subject.config, subject.shapes)
    assert keep.linearize and keep.stored_steps == subject.task.num_steps
    tight = memory.plan_task_checkpoints(subject.task, subject.config, subject.shapes, device_bytes=2e7)
    phases = memory.memory_phases(subject.task, subject.config, subject.shapes, memory.Workspace(), tight)
    assert phases[0].parts["linearisations on the tape"] == tight.stored_steps * memory.task_linearization_bytes(
        subject.task, subject.shapes
    )


def test_a_model_larger_than_the_machine_is_not_allocated(large, tmp_path, capsys):
    before = sum(array.nbytes for array in jax.live_arrays())
    flags = [*LARGE, "--model.name-or-path", str(large), "--estimate.no-compile", "--estimate.memory-gib", "24"]
    assert main(["estimate", "configs/select.yaml", *flags, "--out", str(tmp_path / "out")]) == 0
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 50e6
    out, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "estimate.json").read_text())
    assert found["parameters"]["base"] == {"bfloat16": 8_030_261_248}  # as its model card counts them
    factors = 32 * 16 * ((4096 + 4096) + (4096 + 1024))  # rank 16 on queries and values
    assert found["parameters"]["trained"] == {"float32": factors}
    kept = found["arrays"]
    assert kept["snapshot"] == 4 * 3 * factors + 12 and kept["a step on the tape"] == kept["snapshot"] + 4 * factors
    assert (kept["snapshots"], kept["tape"]) == (27, 24)  # 1000 steps, each replayed once but the last
    taken = 27 * kept["snapshot"] + 24 * kept["a step on the tape"]
    assert 0.95 < 2 * taken / (24 * 2**30 - 2 * 8_030_261_248 - 4 * factors) <= 1
    assert found["arrays"]["base"] == 2 * 8_030_261_248  # whole on each of the devices
    assert "It does not fit" in out and "mesh.fsdp: 8" in out and "“writing”" in out


@pytest.mark.slow
def test_a_large_model_is_compiled_for_eight_devices(large, tmp_path):
    """A process of its own, with one device: minutes, and the memory of a small one."""
    command = [sys.executable, "-m", "bilevel_jax.cli", "estimate", "configs/select.yaml", *LARGE]
    command += ["--model.name-or-path", str(large), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": ""}, cwd=ROOT)
    _, process.returncode, usage = os.wait4(process.pid, 0)
    assert process.returncode == 0 and usage.ru_maxrss < 3 * 2**20  # KiB
    found = json.loads((tmp_path / "out" / "estimate.json").read_text())
    devices = found["devices"]
    assert devices["count"] == 8 and devices["mesh"] == {"data": 8, "fsdp": 1} and devices["simulated"]
    forward, backward = (found["programs"][name] for name in ("forward", "backward"))
    # of a forward pass, of which no product with weights is made again
    assert 2 < forward["flops"] / 1.02e15 < 2.5 and 4 < backward["flops"] / 1.02e15 < 5
    assert 0 < forward["workspace"] < backward["workspace"] < 4 * 8_030_261_248 / 2  # no float32 copy of the base
    assert found["hours_of_one_training"] == pytest.approx(1000 * forward["flops"] / (8 * 989e12 * 0.35) / 3600)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (),
        (
            "--outer.method",
            "implicit",
            "--outer.proximal",
            "0.5",
            "--outer.solver",
            "neumann",
            "--outer.max-iterations",
            "3",
        ),
        ("--outer.method", "window", "--outer.window", "4"),
        ("--outer.method", "alignment"),
        ("--outer.method", "penalty", "--outer.weighting", "sigmoid"),
    ],
    ids=lambda flags: " ".join(flags[:2]) or "unrolled",
)
def test_a_run_counts_what_was_planned(made, tmp_path, flags):
    result = select(load_config(SelectConfig, made / "select.yaml", [*flags, "--fast", "--out", str(tmp_path / "run")]))
    assert result["measured"]["passes"] == result["estimate"]["passes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--lora.r", "2"),
        ("--outer.memory-gib", "2e-3"),
        ("--outer.memory-gib", "1e-3"),
        ("--outer.linearize",),
        ("--outer.linearize", "--outer.memory-gib", "3e-2"),
        (*SEVERAL, "{files}/targets.py:distance"),
    ],
    ids=lambda flags: " ".join(flags[:4]),
)
def test_arrays_that_live_are_those_that_were_said(made, files, tmp_path, monkeypatch, flags):  # noqa: F811
    """After each step that is trained or replayed: never more than the largest phase, and as much in one of them."""
    most, due, advance = 0, Session.should_save, Session.advance

    def live():
        return sum({one.unsafe_buffer_pointer(): one.nbytes for one in jax.live_arrays()}.values())

    def counted(self):
        count()
        return due(self)

    def counting(self, amount=1.0):
        count()
        advance(self, amount)

    def count():
        nonlocal most
        most = max(most, live())

    flags = ["--fast", "--lora.r", "0", *(word.replace("{files}", str(files)) for word in flags)]
    if "--target.sources" in flags:
        flags += ["--data.validation", f"{files}/validation.jsonl", "--data.test", f"{files}/test.jsonl"]
    config = load_config(SelectConfig, made / "select.yaml", flags)
    text = tokenize_splits(config, splits.load_splits(config.data), config.target)
    subject = make_abstract_run(config, text, "dev")
    phases = memory.memory_phases(subject.task, subject.config, subject.shapes, memory.Workspace())
    gc.collect()  # what tests before this one left
    before = live()
    monkeypatch.setattr(Session, "should_save", counted)
    monkeypatch.setattr(Session, "advance", counting)
    select(load_config(SelectConfig, made / "select.yaml", [*flags, "--out", str(tmp_path / "run")]))
    assert most - before == pytest.approx(
        max(phase.total_bytes for phase in phases if phase.name != "writing"), rel=0.01
    )


def test_a_training_that_is_not_swept_keeps_its_start_alone(made, tmp_path):
    _, subject, _ = subjects(made, tmp_path, "--outer.method", "implicit", "--outer.proximal", "0.5")
    phases = memory.memory_phases(subject.task, subject.config, subject.shapes, memory.Workspace())
    for phase in phases[:-1]:
        kept = {name: phase.parts[name] for name in ("snapshots", "states on the tape", "gradients on the tape")}
        assert set(kept.values()) == {0} and phase.parts["start"] > 0


def estimate_hosts(config, out, *flags):
    """What is told of each of two hosts, whose four devices are simulated."""
    command = ["estimate", str(config), "--estimate.devices", "4", "--estimate.hosts", "2", "--estimate.no-compile"]
    assert main([*command, *flags, "--out", str(out)]) == 0
    return json.loads((out / "estimate.json").read_text())


def test_hosts_share_the_devices_and_read_everything(made, tmp_path, capsys):
    found = estimate_hosts(made / "select.yaml", tmp_path / "out")
    hosts, arrays = found["hosts"], found["arrays"]
    assert (hosts["count"], hosts["devices"], hosts["rows of a step"]) == (2, 2, 4)
    assert hosts["on its devices"] == {
        "parameters": 2 * arrays["trained parameters"], "optimizer": 2 * arrays["optimizer"],
        "batch": 2 * arrays["batch"], "at the peak": 2 * found["peak"],
    }  # fmt: skip
    read = hosts["files that it reads"]
    assert read["data"] == sum((made / f"{name}.jsonl").stat().st_size for name in ("train", "validation", "test"))
    assert read["weights of the model"] == (made / "model" / "model.safetensors").stat().st_size
    rows = 44 + 8 + 16  # validation stands behind the training rows, too, as it is of their kind
    assert hosts["in its memory"]["tokens of all rows"] == rows * 11 * 5 + (rows + 3) * 8  # ids, mask; offsets
    assert hosts["in its memory"]["whole model, for its file"] == arrays["trained parameters"]
    out = capsys.readouterr().out
    assert "each of 2 hosts" in out and "Every host reads all rows" in out


def test_hosts_of_rows_that_are_absent(large, tmp_path):
    """As many bytes of tokens as rows of full length would have."""
    flags = (*LARGE, "--model.name-or-path", str(large), "--estimate.hosts", "4", "--estimate.no-compile")
    assert main(["estimate", "configs/select.yaml", *flags, "--out", str(tmp_path / "out")]) == 0
    hosts = json.loads((tmp_path / "out" / "estimate.json").read_text())["hosts"]
    assert hosts["devices"] == 2 and hosts["on its devices"]["parameters"] > 2 * 2 * 8_030_261_248
    assert hosts["in its memory"]["tokens of all rows"] >= 50_256 * (1024 * 5 + 8)
    assert hosts["in its memory"]["whole model, for its file"] > 2 * 8_030_261_248
    assert hosts["files that it reads"] == {"weights of the model": None, "data": None}  # and not of no size


def test_hosts_hold_states_that_are_offloaded_and_what_is_written(made, tmp_path):
    flags = ("--outer.offload", "host", "--outer.memory-gib", "1e-3")
    found = estimate_hosts(made / "select.yaml", tmp_path / "select", *flags)
    states = 2 * found["arrays"]["snapshots"] * found["arrays"]["snapshot"]
    assert found["hosts"]["in its memory"]["states of outer.offload"] == states > 0
    for parts in ("adapter", "both"):
        found = estimate_hosts(made / "train.yaml", tmp_path / parts, "--lora.r", "2", "--output.model", parts)
        wanted = found["arrays"]["trained parameters"] + found["arrays"]["base"] * (parts == "both")
        assert found["hosts"]["in its memory"]["whole model, for its file"] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_hosts_hold_what_two_processes_hold(fsdp, made, tmp_path):
    """Two processes of two devices; with fsdp 4 each has half of the parameters."""
    port, xla = free_port(), os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    flags = ["--mesh.data", "0", "--mesh.fsdp", str(fsdp)]
    command = [sys.executable, "-m", "tests.commands.host_bytes", f"127.0.0.1:{port}"]
    running = [
        subprocess.Popen(
            [*command, str(number), str(tmp_path), str(made / "select.yaml"), *flags],
            env=os.environ | {"XLA_FLAGS": xla}, cwd=ROOT,
        )
        for number in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    wanted = estimate_hosts(made / "select.yaml", tmp_path / "out", "--mesh.fsdp", str(fsdp))["hosts"]
    for number in range(2):
        held = json.loads((tmp_path / f"host {number}.json").read_text())
        assert held == {name: wanted["on its devices"][name] for name in held}


WRONG = {
    "no config.json": (
        ("--model.name-or-path", "nowhere", "--estimate.train-examples", "10"),
        "nowhere/config.json: no such file",
    ),
    "no data": (("--data.train", "nowhere.jsonl"), "nowhere.jsonl.*--estimate.train-examples stands for them"),
    "devices and batch": (("--estimate.devices", "3"), "8 examples do not spread evenly over 3 devices"),
    "devices and groups": (
        ("--estimate.devices", "4", "--mesh.fsdp", "3"),
        "4 is no multiple of mesh.fsdp = 3",
    ),
    "devices and hosts": (
        ("--estimate.devices", "4", "--estimate.hosts", "3"),
        "estimate.hosts = 3: 4 devices do not spread evenly over so many hosts",
    ),
    "a wrong number": (("--estimate.mfu", "2"), r"estimate.mfu = 2.0: must be in \(0, 1\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_estimated_is_told(made, capsys, name):
    flags, words = WRONG[name]
    assert main(["estimate", str(made / "select.yaml"), "--estimate.no-compile", *flags]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_the_verb_is_known_by_its_sections(made, tmp_path):
    assert isinstance(load_config_to_estimate(made / "select.yaml")[0], SelectConfig)
    config, asked = load_config_to_estimate(
        made / "train.yaml", ["--train.num-epochs", "3", "--out", "there", "--estimate.train-examples", "7"]
    )
    assert isinstance(config, TrainConfig) and config.train.num_epochs == 3
    assert (asked.dir, asked.train_examples, config.output.dir) == ("there", 7, "out")
    (tmp_path / "other.yaml").write_text("rank: {sample: 3}\n")
    with pytest.raises(
        ValueError, match="config of none of select, train, compare, audit, tune.*unknown section 'rank'"
    ):
        load_config_to_estimate(tmp_path / "other.yaml")
    (tmp_path / "either.yaml").write_text("model: {name_or_path: here}\n")
    with pytest.raises(ValueError, match="may be a config of select or train.*--estimate.command"):
        load_config_to_estimate(tmp_path / "either.yaml")


def test_the_search_of_tune_is_counted_in_trainings(made, tmp_path):
    text = (made / "select.yaml").read_text()
    (tmp_path / "tune.yaml").write_text(text + "tune: {learning_rates: [0.5, 0.25, 1.0], budget: 60}\n")
    (tmp_path / "compare.yaml").write_text(text + "compare: {budgets: 3}\n")  # which tune passes over
    with pytest.raises(ValueError, match="(?s)is a config of none of .*budget"):
        load_config_to_estimate(tmp_path / "compare.yaml")
    config, options = load_config_to_estimate(tmp_path / "tune.yaml", ["--estimate.no-compile"])
    assert isinstance(config, TuneConfig)
    plain, _ = load_config_to_estimate(made / "select.yaml", ["--estimate.command", "tune"])
    assert isinstance(plain, TuneConfig) and plain.tune.budget == 400
    found = estimate(config, options).result
    training, gradient = 1, 5  # and its hypergradient, of a training, its replay and three for the products
    own = training + (2 + 1) + (1 + 2) * gradient + 2  # two draws; the halves of validation beside
    stages = list(found["work"].values())
    assert [stage / 10 for stage in stages] == pytest.approx([own, 2, 60 - own - 2])
    assert found["command"] == "tune" and found["trainings"] == pytest.approx(60) and found["disk"] == {}
    abstract = make_abstract_run(*read_examples(config, tmp_path), "tune")
    costs = work.count_tune_costs(abstract.task, config.outer, config.certify)
    assert sum(costs) == pytest.approx(own)
    with pytest.raises(ValueError, match="estimate.hosts = 2: tune runs in one process"):
        estimate(config, replace(options, hosts=2))


def test_a_finished_run_is_shown_beside_its_estimate(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    result = {
        "estimate": {
            "passes": 300, "peak": 2**30, "peak_phase": "step back", "disk": {"model": 2**20}, "memory_before": 2**29,
        },
        "measured": {
            "passes": 240, "memory": 2**31, "memory_of": "process", "disk": 2**21, "seconds_per_pass": 0.25,
            "device": "1 x cpu",
        },
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert main(["estimate", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "work, training steps 300 240" in out and "1 GiB 2 GiB" in out and "1 MiB 2 MiB" in out
    assert "240 of at most 300 training steps" in out
    del result["measured"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert main(["estimate", str(tmp_path)]) == 1 and "nothing measured" in capsys.readouterr().err
