"""Damaged model folders: one sentence with the file and the remedy, whatever is wrong."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bilevel_jax.lm.checkpoint.files import open_tensors, read_json_object
from bilevel_jax.lm.models import init_params, load_model, read_config, save_model
from tests.lm.models.test_families import TINY

NORM = "model.norm.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """config.json, tensors and bytes of a whole model folder."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_model(folder, TINY, init_params(TINY, jax.random.key(0)))
    return (folder / "config.json").read_bytes(), load_file(folder / WEIGHTS), (folder / WEIGHTS).read_bytes()


@pytest.fixture
def folder(tmp_path, source):
    (tmp_path / "config.json").write_bytes(source[0])
    (tmp_path / WEIGHTS).write_bytes(source[2])
    return tmp_path


def header(about, size=0, body=b""):
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    return struct.pack("<Q", size or len(text)) + text + body


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BYTES = {  # id: (bytes of a whole file -> bytes of the damaged one, what the error says)
    "empty": (lambda b: b"", "model.safetensors: not a safetensors file, it is empty"),
    "four bytes": (lambda b: b[:4], "model.safetensors: ends after 4 bytes, inside its header; the download was inter"),
    "cut in the header": (lambda b: b[:100], "ends after 100 bytes, inside its header of .*; the download was interru"),
    "cut in the tensors": (lambda b: b[:-1000], r"has [\d,]+ of [\d,]+ bytes; the download was interrupted, so fetch"),
    "one byte short": (lambda b: b[:-1], "the download was interrupted, so fetch it again"),
    "longer": (lambda b: b + b"\0" * 7, "has 7 bytes more than its header says; it is damaged, so fetch it again"),
    "zeros": (lambda b: b"\0" * len(b), "it is empty; the download was interrupted"),
    "zeros at the end": (lambda b: b[:20] + b"\0" * (len(b) - 20), "its header is damaged; fetch it again"),
    "header of a petabyte": (lambda b: struct.pack("<Q", 2**50) + b[8:], "its header would have 1,125,899,906,842,624"),
    "header longer than the file": (lambda b: struct.pack("<Q", len(b)) + b[8:], "inside its header of"),
    "header is no JSON": (lambda b: header(b"not json at all"), "its header is damaged; fetch it again"),
    "header is a list": (lambda b: header([1, 2]), "its header is damaged"),
    "header without offsets": (lambda b: header({"a": {"dtype": "F32", "shape": [1]}}), "its header is damaged"),
    "header of text": (lambda b: header({"a": "b"}), "its header is damaged"),
    "negative shape": (lambda b: header({"a": {**F32, "shape": [-1]}}, body=b"\0" * 4), "not a safetensors file"),
    "overlapping": (lambda b: header({"a": F32, "b": F32}, body=b"\0" * 4), "not a safetensors file"),
    "shape beyond its bytes": (lambda b: header({"a": {**F32, "shape": [9]}}, body=b"\0" * 4), "not a safetensors fil"),
    "unknown dtype": (lambda b: header({"a": {**F32, "dtype": "X9"}}, body=b"\0" * 4), "not a safetensors file"),
    "flipped": (lambda b: b[:30] + bytes([b[30] ^ 0x80]) + b[31:], "model.safetensors: "),
    "pointer": (
        lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a pointer of Git LFS; fetch the file itself with `git lfs pull`",
    ),
    "web page": (lambda b: b"<!DOCTYPE html><html>Access denied</html>", "it is a web page; the download was refused"),
    "zip of torch": (lambda b: b"PK\x03\x04" + b"\0" * 100, "it is a pickle; convert it with `save_pretrained`"),
    "JSON": (lambda b: b'{"error": "unauthorised"}', "not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", BYTES.values(), ids=BYTES)
def test_damaged_weights(folder, source, damage, message):
    (folder / WEIGHTS).write_bytes(damage(source[2]))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert f"{folder / WEIGHTS}: " in str(caught.value) and "\n" not in str(caught.value)


TENSORS = {  # id: (tensors -> tensors of the damaged file, what the error says)
    "nan": (
        lambda t: {**t, NORM: t[NORM] * np.nan},
        f"{NORM} has 16 NaN or infinite values of 16 as float32; the train",
    ),
    "one inf": (lambda t: {**t, NORM: np.r_[np.inf, t[NORM][1:]]}, f"{NORM} has 1 NaN or infinite values of 16"),
    "bfloat16 nan": (lambda t: {**t, NORM: np.full(16, np.nan, ml_dtypes.bfloat16)}, f"{NORM} has 16 NaN"),
    "integers": (lambda t: {**t, NORM: t[NORM].astype(np.int8)}, f"{NORM} is I8, which is not supported; .* Quantised"),
    "true and false": (lambda t: {**t, NORM: t[NORM] > 0}, f"{NORM} is BOOL"),
    "float8": (lambda t: {**t, NORM: t[NORM].astype(ml_dtypes.float8_e4m3fn)}, f"{NORM} is F8_E4M3"),
    "shape": (lambda t: {**t, NORM: t[NORM][:8]}, rf"{NORM}: the file has \(8,\), the configuration asks for \(16,\)"),
    "axes": (lambda t: {**t, NORM: t[NORM][None]}, rf"{NORM}: the file has \(1, 16\)"),
    "scalar": (lambda t: {**t, NORM: np.float32(1).reshape(())}, rf"{NORM}: the file has \(\)"),
    "transposed": (lambda t: {**t, "lm_head.weight": t["lm_head.weight"].T.copy()}, r"the file has \(16, 31\)"),
    "missing": (lambda t: {name: value for name, value in t.items() if name != NORM}, f"Missing 1: .'{NORM}'.; unexp"),
    "unexpected": (lambda t: {**t, "lm_head.bias": t[NORM]}, "unexpected 1: .'lm_head.bias'"),
    "one more layer": (lambda t: {**t, "model.layers.2.mlp.up_proj.weight": t[NORM]}, "unexpected 1"),
    "adapter": (lambda t: {"base_model.model." + name: value for name, value in t.items()}, "Missing 21"),
    "nothing": (lambda t: {}, "Missing 21"),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(folder, source, change, message):
    save_file({name: np.array(value, order="C") for name, value in change(source[1]).items()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def write_shards(folder, tensors):
    """Two shards and the contents of their index."""
    names = sorted(tensors)
    parts = {SHARDS[0]: names[::2], SHARDS[1]: names[1::2]}
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    return {"metadata": {}, "weight_map": {name: shard for shard, part in parts.items() for name in part}}


def moved(index):
    return {"weight_map": {**index["weight_map"], NORM: [s for s in SHARDS if s != index["weight_map"][NORM]][0]}}


INDICES = {  # id: (index -> damaged index, or a function of the folder, what the error says)
    "list": (lambda index: [1], f"{INDEX}: holds a list; a JSON object"),
    "no map": (lambda index: {"metadata": {}}, f"{INDEX}: weight_map is null; it is a JSON object that gives each"),
    "map is a list": (lambda index: {"weight_map": list(SHARDS)}, f"{INDEX}: weight_map is a list"),
    "empty map": (lambda index: {"weight_map": {}}, f"{INDEX}: weight_map is an object; it is a JSON object that"),
    "numbers": (lambda index: {"weight_map": {NORM: 1}}, f"{INDEX}: weight_map is an object; it is a JSON object that"),
    "other folder": (lambda index: {"weight_map": {NORM: "../secret.safetensors"}}, "'../secret.safetensors' is no fi"),
    "absolute": (lambda index: {"weight_map": {NORM: "/etc/passwd"}}, "'/etc/passwd' is no file of this folder"),
    "missing shard": (
        lambda index: {"weight_map": {**index["weight_map"], "x": "model-00003-of-00003.safetensors"}},
        f"no model-00003-of-00003.safetensors, of 3 shards that {INDEX} names; fetch what is missing",
    ),
    "tensor elsewhere": (moved, rf"lacks 1 of the tensors that {INDEX} places there: \['{NORM}'\]; index and shards"),
    "other model": (
        lambda index: {"weight_map": {**index["weight_map"], "model.layers.9.x.weight": SHARDS[0]}},
        "lacks 1 of the tensors .*'model.layers.9.x.weight'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", INDICES.values(), ids=INDICES)
def test_an_index_that_does_not_fit(folder, source, change, message):
    (folder / WEIGHTS).unlink()
    index = write_shards(folder, source[1])
    (folder / INDEX).write_text(json.dumps(index))
    load_model(folder)
    (folder / INDEX).write_text(json.dumps(change(index)))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_shards_that_are_cut_or_hold_a_tensor_twice(folder, source):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps(write_shards(folder, source[1])))
    save_file(source[1], folder / SHARDS[1])
    with pytest.raises(ValueError, match=rf"{SHARDS[1]}: \['lm_head.weight', .* also in {SHARDS[0]}; which one counts"):
        load_model(folder)
    (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{SHARDS[1]}: has .* bytes; the download was interrupted"):
        load_model(folder)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {SHARDS[1]}, of 2 shards"):
        load_model(folder)


CONTENTS = {  # id: (bytes of config.json, what the error says)
    "empty": (b"", "config.json:1: not JSON, expecting value, it is empty"),
    "zeros": (b"\0" * 99, "it is empty; the download was interrupted"),
    "cut": (b'{"model_type": "llama", "vocab', "config.json:1: not JSON, unterminated string"),
    "cut in line 3": (b'{\n"model_type":\n"llama",', "config.json:3: not JSON"),
    "null": (b"null", "config.json: holds null; a JSON object"),
    "list": (b"[1, 2]", "config.json: holds a list"),
    "number": (b"3", "config.json: holds a number"),
    "string": (b'"llama"', "config.json: holds a string"),
    "true": (b"true", "config.json: holds true or false"),
    "latin": ('{"model_type": "lläma"}'.encode("latin-1"), "config.json: byte 18 is not UTF-8 text"),
    "UTF-16": ('{"model_type": "llama"}'.encode("utf-16"), "config.json: byte 0 is not UTF-8 text"),
    "deep": (b"[" * 100_000, "config.json: JSON that cannot be read"),
    "number of 5000 digits": (b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}", "config.json: .*cannot"),
    "pickle": (b"\x80\x04\x95", "it is a pickle"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "web page": (b"\n<html>404</html>", "it is a web page"),
    "YAML": (b"model_type: llama\n", "config.json:1: not JSON"),
    "comment": (b'{"model_type": "llama", // mine\n}', "config.json:1: not JSON"),
    "surrogate": (b'{"model_type": "\\ud800"}', r"config.json: model_type '\\ud800' is not supported"),
    "no type": (b"{}", "config.json: model_type None is not supported; supported: "),
}  # fmt: skip


@pytest.mark.parametrize("contents, message", CONTENTS.values(), ids=CONTENTS)
def test_odd_contents_of_config_json(folder, contents, message):
    (folder / "config.json").write_bytes(contents)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_fault(folder, source):
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + source[0])
    assert read_config(folder) == TINY


def test_missing_files_are_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: no such file; give a Hugging Face model folder"):
        read_config(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="the folder holds an adapter, and not the model that it belongs to"):
        read_config(folder)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="no model.safetensors; only .* pickles. The folder has pytorch_model.bin"
    ):
        open_tensors(folder, WEIGHTS)
    (folder / WEIGHTS).mkdir()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        open_tensors(folder, WEIGHTS)
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such file"):
        read_json_object(folder / "nowhere.json")
