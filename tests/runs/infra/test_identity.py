"""A run is resumed with the tokens, versions, devices and settings that it began with, or not at all."""

import json
import subprocess

import jax
import numpy as np
import pytest

from bilevel_jax.runs.config import load
from bilevel_jax.runs.config.load import RankConfig, SelectConfig, TrainConfig, config_to_yaml
from bilevel_jax.runs.config.schema import (
    DataSection,
    MeshSection,
    ModelSection,
    OutputSection,
    RetrainSection,
    WeightsSection,
)
from bilevel_jax.runs.infra import distributed, identity, inputs
from bilevel_jax.runs.infra.identity import compare_environments

NOW = {
    "packages": {"jax": "0.10.2", "numpy": "2.4.6", "transformers": "5.23.0", "pyarrow": "20.0"},
    "devices": ["cpu"] * 8,
    "machine": "x86_64",
    "processes": 1,
    "python": "3.11.9",
    "commit": "a",
    "jax": {"jax_enable_x64": "False", "jax_default_matmul_precision": "None"},
    "flags": {"XLA_FLAGS --xla_force_host_platform_device_count": "8"},
}
REFUSED = {
    "jax": (
        {"packages": NOW["packages"] | {"jax": "0.10.1"}}, "jax 0.10.1 then, 0.10.2 now", "pip install jax==0.10.1",
    ),
    "a package that was there": (
        {"packages": NOW["packages"] | {"libtpu": "1"}}, "libtpu 1 then, not installed now", "pip install libtpu==1",
    ),
    "a package that was not there": (
        {"packages": {k: v for k, v in NOW["packages"].items() if k != "numpy"}},
        "numpy was not installed then, 2.4.6 now",
        "pip uninstall numpy",
    ),
    "device": (
        {"devices": ["A100"] * 8}, "of kind A100 then, cpu x86_64 now", "resume it where there is A100",
    ),
    "architecture": ({"machine": "aarch64"}, "cpu aarch64 then, cpu x86_64 now", "where there is cpu aarch64"),
    "x64": (
        {"jax": NOW["jax"] | {"jax_enable_x64": "True"}}, "jax_enable_x64 = True then", "set JAX_ENABLE_X64=True",
    ),
    "precision": (
        {"jax": NOW["jax"] | {"jax_default_matmul_precision": "highest"}},
        "jax_default_matmul_precision = highest then, None now",
        "set JAX_DEFAULT_MATMUL_PRECISION=highest",
    ),
    "a flag": (
        {"flags": {"XLA_FLAGS --xla_allow_excess_precision": "false"}},
        "XLA_FLAGS --xla_allow_excess_precision false then, not set now",
        "set XLA_FLAGS --xla_allow_excess_precision=false",
    ),
    "a variable": (
        {"flags": {"NVIDIA_TF32_OVERRIDE": "0"}}, "NVIDIA_TF32_OVERRIDE 0 then, not set", "set NVIDIA_TF32_OVERRIDE=0",
    ),
}  # fmt: skip
TOLD = {
    "fewer devices": ({"devices": ["cpu"] * 4}, "4 devices then, 8 now (equal up to rounding)"),
    "processes": ({"processes": 2}, "processes 2 then, 1 now"),
    "Python": ({"python": "3.12.1"}, "Python 3.12.1 then, 3.11.9 now"),
    "commit": ({"commit": "b"}, "the source's commit b then, a now"),
    "pyarrow": ({"packages": NOW["packages"] | {"pyarrow": "19"}}, "pyarrow 19 then, 20.0 now"),
    "transformers, where the tokens are compared": (
        {"packages": NOW["packages"] | {"transformers": "5.12"}},
        "transformers 5.12 then, 5.23.0 now",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_numbers_is_refused_with_the_remedy(name):
    difference, words, remedy = REFUSED[name]
    refused, told = compare_environments(NOW | difference, NOW, makes_tokens=False)
    assert len(refused) == 1 and not told
    assert words in refused[0].text and remedy in refused[0].remedy


@pytest.mark.parametrize("name", TOLD)
def test_what_changes_no_number_is_told(name):
    difference, words = TOLD[name]
    refused, told = compare_environments(NOW | difference, NOW, makes_tokens=False)
    assert not refused and [change.text for change in told] == [words]


def test_what_changes_nothing_is_not_told():
    same = {"command": ["another"], "platform": "another kernel"}
    flags = {"flags": {"XLA_FLAGS --xla_dump_to": "/somewhere"}}
    assert compare_environments(NOW | same | flags, NOW, makes_tokens=True) == ([], [])
    assert compare_environments({"packages": NOW["packages"]}, NOW, makes_tokens=True) == ([], [])  # an older record


def test_another_tokenizer_is_refused_where_tokens_are_made_later():
    then = NOW | {"packages": NOW["packages"] | {"transformers": "5.12"}}
    refused, told = compare_environments(then, NOW, makes_tokens=True)
    assert [change.text for change in refused] == ["transformers 5.12 then, 5.23.0 now"] and not told
    assert identity.makes_tokens_later(RankConfig())
    assert identity.makes_tokens_later(TrainConfig(weights=WeightsSection(score="ica")))
    assert identity.makes_tokens_later(TrainConfig(data=DataSection(streaming=True)))
    assert identity.makes_tokens_later(SelectConfig(retrain=RetrainSection(variants=("uniform", "oneshot"))))
    assert not identity.makes_tokens_later(SelectConfig()) and not identity.makes_tokens_later(TrainConfig())


def test_flags_are_read_one_by_one():
    found = identity.list_flags(
        {"XLA_FLAGS": "--xla_a=1  --xla_b", "LIBTPU_INIT_ARGS": "--c='d e'", "NVIDIA_TF32_OVERRIDE": "", "HOME": "/"}
    )
    assert found == {"XLA_FLAGS --xla_a": "1", "XLA_FLAGS --xla_b": "set", "LIBTPU_INIT_ARGS --c": "d e"}


def test_every_setting_that_is_compared_exists():
    """In the oldest and the newest JAX that is supported all but a few of them do."""
    assert {"jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl"} <= set(
        identity.describe_environment()["jax"]
    )
    with jax.enable_x64(True):
        assert identity.describe_environment()["jax"]["jax_enable_x64"] == "True"


def test_a_commit_is_that_of_the_work_tree_itself(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert identity.find_commit(tmp_path) is None
    subprocess.run([*git, "commit", "-q", "--allow-empty", "--no-verify", "-m", "a"], check=True)
    assert len(identity.find_commit(tmp_path) or "") == 40
    (tmp_path / "site-packages").mkdir()
    assert identity.find_commit(tmp_path / "site-packages") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert identity.find_commit(tmp_path) is None


def test_an_environment_is_recorded_once_and_compared(tmp_path):
    config = SelectConfig(mesh=MeshSection(data=2), output=OutputSection(dir=str(tmp_path), resume=True))
    shown = config_to_yaml(config).replace("data: 2", "data: 4").replace("name_or_path: ''", "name_or_path: m")
    (tmp_path / "config.yaml").write_text(
        shown.replace("train: []", "train: [a]").replace("validation: []", "validation: [b]")
    )
    assert identity.check_environment(config, tmp_path) == []  # stopped before it was recorded
    identity.record_environment(tmp_path)
    recorded = json.loads((tmp_path / "environment.json").read_text())
    assert recorded["packages"]["jax"] == jax.__version__
    assert identity.check_environment(config, tmp_path) == ["mesh.data = 4 then, 2 now"]
    recorded["packages"]["optax"] = "0.1"
    (tmp_path / "environment.json").write_text(json.dumps(recorded))
    identity.record_environment(tmp_path)  # what was recorded first stays
    with pytest.raises(ValueError, match="gives other numbers.*optax 0.1 then.*pip install optax==0.1.*--out"):
        identity.check_environment(config, tmp_path)


def test_tokens_are_recorded_once_and_compared(tmp_path):
    first = {"dev": {"tokens": 3, "token ids": identity.hash_arrays(np.arange(3))}}
    identity.check_tokens(tmp_path, first)
    identity.check_tokens(tmp_path, {"test": {"tokens": 1}})  # more of them, later
    identity.check_tokens(tmp_path, first)
    with pytest.raises(ValueError, match="other tokens.*dev: other token ids.*chat template"):
        identity.check_tokens(tmp_path, {"dev": first["dev"] | {"token ids": identity.hash_arrays(np.arange(3)[::-1])}})
    with pytest.raises(ValueError, match="dev: 3 tokens then, 4 now; other token ids"):
        identity.check_tokens(tmp_path, {"dev": {"tokens": 4, "token ids": identity.hash_arrays(np.arange(4))}})


def test_hashes_tell_types_shapes_and_borders():
    some = np.arange(6, dtype=np.int32)
    hashes = [identity.hash_arrays(array) for array in (some, some.reshape(2, 3), some.astype(np.int64), some[::-1])]
    assert len({*hashes, identity.hash_arrays(some[:3], some[3:])}) == 5
    assert identity.hash_arrays(some) == identity.hash_arrays(np.repeat(some, 2)[::2])
    assert identity.hash_arrays(np.zeros(0, bool)) != identity.hash_arrays(np.zeros(0, np.int32))
    assert identity.hash_text(["ab", "c"]) != identity.hash_text(["a", "bc"])
    identity.hash_text(["\ud800"])


def test_what_processes_share_are_all_keys_but_their_own(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = SelectConfig(model=ModelSection(name_or_path=str(model)))
    shared = identity.list_shared_values(config)
    keys = {key for key, _ in load.flatten_config(config)}
    assert keys - set(shared) == set(load.PROCESS_OWN_KEYS)
    assert shared["optimizer.learning_rate"] == "0.0001" and shared["command"] == "select"
    assert shared["package jax"] == jax.__version__ and "setting" not in shared
    (model / "config.json").write_text("[]")
    assert [key for key, value in identity.list_shared_values(config).items() if shared[key] != value] == [
        "the files of model.name_or_path"
    ]


def test_a_large_file_is_told_by_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "END_BYTES", 4)
    file, hashes = tmp_path / "rows.jsonl", set()
    config = TrainConfig(data=DataSection(train=(str(file),)))
    for content in (b"0123456789", b"x123456789", b"012345678x", b"01234567890"):
        file.write_bytes(content)
        hashes.add(inputs.hash_file_ends(config)["data.train"])
    assert len(hashes) == 4


def test_differences_between_processes_name_the_key_and_the_holders(monkeypatch):
    """As three processes would see them; test_distributed_slow really starts some."""

    class Peers:
        is_leaving, changes = False, {}

        def gather(self, topic, value):
            return [value, json.dumps(json.loads(value) | self.changes), value]

        def agree_to_stop(self):
            self.is_leaving = True

    peers = Peers()
    monkeypatch.setattr(distributed, "_peers", peers)
    values = {"optimizer.learning_rate": "0.001", "train.max_steps": "3"}
    distributed.require_agreement("the run", values)
    assert not peers.is_leaving
    peers.changes = {"optimizer.learning_rate": "0.002", "package libtpu": "1"}
    with pytest.raises(ValueError) as caught:
        distributed.require_agreement("the run", values)
    assert str(caught.value) == (
        "the processes of this run differ in optimizer.learning_rate (0.001 in processes 0 and 2, 0.002 in process 1); "
        "in package libtpu (nothing in processes 0 and 2, 1 in process 1). Start all of them with the same config, "
        "packages, flags and files."
    )
    assert peers.is_leaving  # none speaks of the others' end
