"""A run is resumed with the files that it was started with, or not at all."""

import os
from dataclasses import replace

import pytest

from bilevel_jax.runs.config.load import SelectConfig
from bilevel_jax.runs.config.schema import DataSection, ModelSection
from bilevel_jax.runs.infra import inputs


@pytest.fixture
def started(tmp_path):
    """(config, the run's folder, the training examples, a file of the model)."""
    rows, trusted, model = tmp_path / "rows.jsonl", tmp_path / "trusted.jsonl", tmp_path / "model"
    model.mkdir()
    rows.write_text('{"text": "abc"}\n')
    trusted.write_text('{"text": "abd"}\n')
    (model / "model.safetensors").write_bytes(b"0123")
    data = DataSection(train=(str(rows), "hub:owner/name@train"), validation=(str(trusted),))
    config = SelectConfig(model=ModelSection(name_or_path=str(model)), data=data)
    folder = tmp_path / "run"
    folder.mkdir()
    inputs.record_inputs(config, folder)
    inputs.check_inputs_unchanged(config, folder)
    return config, folder, rows, model / "model.safetensors"


def test_a_touched_file_is_the_same(started):
    config, folder, rows, _ = started
    os.utime(rows, (1, 1))
    assert inputs.check_inputs_unchanged(config, folder) is None


def test_changed_data_and_model_are_both_named(started):
    config, folder, rows, weights = started
    rows.write_text('{"text": "abcd"}\n')
    weights.write_bytes(b"0124")
    os.utime(weights, (1, 1))
    with pytest.raises(ValueError, match="started with other files") as caught:
        inputs.check_inputs_unchanged(config, folder)
    assert f"data.train: {rows} had 16 bytes then and has 17 now" in str(caught.value)
    assert f"model.name_or_path: {weights} has another content of the same size" in str(caught.value)
    inputs.record_inputs(config, folder)  # what was recorded first stays
    with pytest.raises(ValueError, match="other files"):
        inputs.check_inputs_unchanged(config, folder)


def test_a_file_more_or_less_is_named(started):
    config, folder, rows, weights = started
    (weights.parent / "tokenizer.json").write_text("{}")
    rows.unlink()
    with pytest.raises(ValueError, match="tokenizer.json was not there then") as caught:
        inputs.check_inputs_unchanged(config, folder)
    assert f"data.train: {rows} is not there now" in str(caught.value)


def test_every_key_that_names_files_exists():
    from bilevel_jax.runs.config.load import section_names

    config = replace(SelectConfig(), data=DataSection(train=("nowhere",)))
    assert inputs.list_input_files(config) == {}
    assert {key.split(".")[0] for key in inputs.INPUT_FILE_KEYS} <= section_names()


def test_a_split_of_a_folder_names_the_files_of_the_folder(started, tmp_path):
    config, folder, _, weights = started
    config = replace(config, data=replace(config.data, train=(f"{weights.parent}@train",)))
    assert inputs.list_input_files(config)["data.train"] == [weights]
