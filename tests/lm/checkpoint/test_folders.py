"""Where a model lies: whole folders, adapters and their bases, runs; what is none of these is told."""

import json

import pytest

from bilevel_jax.lm.checkpoint.folders import ModelFolder, find_model_folder


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "base"


def adapter(folder, **keys):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(keys))
    return folder


def test_a_run_has_its_whole_model_or_its_adapter(base, tmp_path):
    assert find_model_folder(base) == ModelFolder(base, None)
    own = adapter(tmp_path / "run" / "model-adapter")
    assert find_model_folder(tmp_path / "run", str(base)) == ModelFolder(base, own)
    base.rename(tmp_path / "run" / "model")
    assert find_model_folder(tmp_path / "run") == ModelFolder(tmp_path / "run" / "model", None)


def test_the_base_of_an_adapter_and_its_tokenizer(base, tmp_path, monkeypatch):
    one = find_model_folder(adapter(tmp_path / "one", base_model_name_or_path=str(base)))
    assert one == ModelFolder(base, tmp_path / "one") and one.tokenizer == base and len(one.folders) == 2
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    assert one.tokenizer == tmp_path / "one"
    beside = find_model_folder(adapter(tmp_path / "two", base_model_name_or_path="../base"))
    assert beside.base.samefile(base)
    with pytest.raises(OSError, match=r"three: an adapter, and its base 'org/name' .* in the cache .* evaluate.base"):
        find_model_folder(adapter(tmp_path / "three", base_model_name_or_path="org/name"))
    with pytest.raises(ValueError, match="four: an adapter, and it names no base"):
        find_model_folder(adapter(tmp_path / "four", base_model_name_or_path=None))
    with pytest.raises(ValueError, match="nowhere"):
        find_model_folder(tmp_path / "one", "nowhere")


def test_what_holds_no_model_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such folder. Give .* NAME@http"):
        find_model_folder(tmp_path / "gone")
    with pytest.raises(
        FileNotFoundError, match="no config.json of a model, no adapter_config.json, and no folder model/"
    ):
        find_model_folder(tmp_path)
