"""Start here when a manifest is refused, or lists other tensors than the shards hold."""

import hashlib
import json
import random

import pytest
import torch

from fused_megatron.checkpoint import (
    CheckpointError,
    TensorBox,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    verify_checkpoint,
)
from fused_megatron.checkpoint.manifest import check_json_state
from fused_megatron.checks import InputError

START = b'{"sha256": "'


@pytest.fixture
def saved(tmp_path):
    tensors = {"weight": TensorBox.whole(torch.arange(12.0).reshape(4, 3)), "bias": TensorBox.whole(torch.ones(4))}
    return save_checkpoint(tmp_path, 3, tensors, state={"a": 1}, rank_tensors={"rng": torch.arange(5)})


def destinations():
    return {"weight": TensorBox.whole(torch.zeros(4, 3)), "bias": TensorBox.whole(torch.zeros(4))}


def forge(path, document):
    """Write any content with a right digest, as an attacker would."""
    document = {"sha256": "0" * 64, **{k: v for k, v in document.items() if k != "sha256"}}
    text = json.dumps(document).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    (path / "manifest.json").write_bytes(START + digest + text[len(START) + 64 :])


def read(path):
    return json.loads((path / "manifest.json").read_bytes())


def test_the_manifest_is_plain_json_with_all_that_the_checkpoint_is(saved):
    document = read(saved)
    file = "rank-00000-of-00001.safetensors"
    assert document["step"] == 3 and document["world_size"] == 1 and document["state"] == {"a": 1}
    assert document["files"] == {file: {"bytes": (saved / file).stat().st_size}}
    weight = document["tensors"]["weight"]
    assert weight["dtype"] == "float32" and weight["shape"] == [4, 3]
    assert [(b["file"], b["offset"], b["shape"]) for b in weight["boxes"]] == [(file, [0, 0], [4, 3])]
    assert list(document["rank_tensors"]) == ["0"] and list(document["rank_tensors"]["0"]) == ["rng"]


def test_a_forged_manifest_with_the_right_digest_reads_as_before(saved):
    forge(saved, read(saved))  # the other tests of this file rely on this
    assert verify_checkpoint(saved) == []


NAMES = [
    "../outside.safetensors",
    "/etc/passwd",
    "sub/rank-00000-of-00001.safetensors",
    "rank-00000-of-00001.safetensors\n",
    "rank-00000-of-00001.safetensors\0",
    "manifest.json",
    "",
    7,
]


@pytest.mark.parametrize("name", NAMES)
def test_no_file_outside_the_folder_is_opened(saved, name):
    outside = saved.parent / "outside.safetensors"
    outside.write_bytes((saved / "rank-00000-of-00001.safetensors").read_bytes())
    document = read(saved)
    for tensor in [*document["tensors"].values(), *document["rank_tensors"]["0"].values()]:
        tensor["boxes"][0]["file"] = name
    document["files"] = {str(name): document["files"].popitem()[1]}
    forge(saved, document)
    with pytest.raises(CheckpointError, match="malformed") as caught:
        load_checkpoint(saved, destinations())
    assert "\n" not in str(caught.value)


def change_first_box(key, value):
    return lambda document: document["tensors"]["weight"]["boxes"][0].__setitem__(key, value)


CHANGES = {
    "another format version": lambda d: d.update(version=99),
    "no version": lambda d: d.pop("version"),
    "a list for the tensors": lambda d: d.update(tensors=[]),
    "no tensors": lambda d: d.pop("tensors"),
    "state that is no object": lambda d: d.update(state=[1]),
    "a negative step": lambda d: d.update(step=-1),
    "a step of true": lambda d: d.update(step=True),
    "an unknown dtype": lambda d: d["tensors"]["weight"].update(dtype="object"),
    "a dtype that is a list": lambda d: d["tensors"]["weight"].update(dtype=["float32"]),
    "a giant shape": lambda d: d["tensors"]["weight"].update(shape=[2**62, 2**62]),
    "a box that leaves a hole": change_first_box("shape", [3, 3]),
    "a box that is outside": change_first_box("offset", [1, 0]),
    "a box of fewer dims": change_first_box("shape", [12]),
    "a box of negative size": change_first_box("shape", [-4, -3]),
    "a checksum that is no hex": change_first_box("crc32", "zzzzzzzz"),
    "a checksum that is a number": change_first_box("crc32", 5),
    "two boxes on top of each other": lambda d: d["tensors"]["weight"]["boxes"].append(
        d["tensors"]["weight"]["boxes"][0]
    ),
    "no box": lambda d: d["tensors"]["weight"].update(boxes=[]),
    "a rank beyond the world": lambda d: d.update(rank_tensors={"5": d["rank_tensors"]["0"]}),
    "a rank that is no number": lambda d: d.update(rank_tensors={"x": {}}),
    "a wrong file size": lambda d: next(iter(d["files"].values())).update(bytes=5),
    "a file of no tensor": lambda d: d["files"].update({"rank-00007-of-00008.safetensors": {"bytes": 1}}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_malformed_manifest_is_refused_in_one_line(saved, change):
    document = read(saved)
    CHANGES[change](document)
    forge(saved, document)
    with pytest.raises(CheckpointError, match=r"manifest\.json: malformed") as caught:
        read_manifest(saved)
    assert "\n" not in str(caught.value)


RAW = {
    "empty": b"",
    "not JSON": b"{" * 100,
    "nested without end": START + b"0" * 64 + b'", "x": ' + b"[" * 200_000,
    "no object": b"[]",
    "binary": bytes(range(256)),
    "NaN": START + b"0" * 64 + b'", "x": NaN}',
    "a giant number": START + b"0" * 64 + b'", "version": 1' + b"0" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", RAW)
def test_any_bytes_are_refused(saved, content):
    text = RAW[content]
    if text.startswith(START):  # with a right digest, so that the parser sees it
        text = START + hashlib.sha256(text).hexdigest().encode() + text[len(START) + 64 :]
    (saved / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError):
        read_manifest(saved)


def places(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from places(item, (*path, i))


@pytest.mark.parametrize("num_changes", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_any_change_under_a_right_digest_is_refused_or_harmless(saved, num_changes):
    generator = random.Random(0)
    original = read(saved)
    junk = [None, True, -1, 0, 3, 2**70, 0.5, "", "x", "float32", [], [1], [[]], {}, {"a": {}}]
    refused = 0
    for place in [p for p in places(original) if p and p[0] not in ("state", "sha256")]:
        for value in generator.sample(junk, num_changes):
            document = json.loads(json.dumps(original))
            target = document
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = value
            forge(saved, document)
            loaded = destinations()
            try:
                load_checkpoint(saved, loaded)
            except (CheckpointError, InputError) as error:
                assert "\n" not in str(error)
                refused += 1
            else:
                assert torch.equal(loaded["weight"].tensor, torch.arange(12.0).reshape(4, 3))
                assert torch.equal(loaded["bias"].tensor, torch.ones(4))
    assert refused > 33 * num_changes


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-310, -0.0, 2**80, "é\ud800\n", None, True, [], {}, [[{"a": [1]}]]])
def test_state_comes_back_as_it_was(tmp_path, value):
    path = save_checkpoint(tmp_path, 0, {}, state={"x": value})
    loaded = load_checkpoint(path, {})["x"]
    assert repr(loaded) == repr(value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"loss": float("nan")}, r"state\['loss'\]=nan must be finite"),
        ({"a": [0, {"b": float("inf")}]}, r"state\['a'\]\[1\]\['b'\]=inf"),
        ({1: 2}, "keys must be strings"),
        ({"t": torch.zeros(1)}, r"state\['t'\] is a Tensor"),
        ({"s": {1, 2}}, r"state\['s'\] is a set"),
    ],
)
def test_a_state_that_json_would_change_is_refused(tmp_path, state, message):
    with pytest.raises(InputError, match=message):
        check_json_state(state)
    with pytest.raises(InputError, match=message):
        save_checkpoint(tmp_path, 0, {}, state=state)
    assert list(tmp_path.iterdir()) == []
