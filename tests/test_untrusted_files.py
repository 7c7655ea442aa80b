"""Start here when a damaged or hostile file ends in a traceback, in a wait, or in more memory than it has bytes."""

import contextlib
import copy
import hashlib
import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_megatron.benchmarking.report.command import report_lines
from fused_megatron.benchmarking.report.results_file import Results, read_results, write_results
from fused_megatron.benchmarking.side_by_side import Bars, Comparison
from fused_megatron.checkpoint import CheckpointError, TensorBox, read_manifest, save_checkpoint
from fused_megatron.checkpoint.manifest import Manifest
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checkpoint.run_state import run_state
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, TrainConfig
from fused_megatron.config.config_file import config_text, load_config
from fused_megatron.data.document_files import MOST_LINE_BYTES
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fused_megatron.data.text_source import path_source
from fused_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from fused_megatron.hugging_face.export_model import _model_of
from fused_megatron.observe.traffic import Traffic
from fused_megatron.pipeline.schedule.schedule_files import from_json, to_json
from fused_megatron.pipeline.schedule.schedules import build_schedule
from fused_megatron.untrusted_files import parse_json, read_bounded
from fused_megatron.weight_files import WeightFiles

VALUES = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**30,
    -(10**400),
    0.5,
    -0.0,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../y",
    "/etc/passwd",
    "a\nb",
    "\x1b[31m",
    "\ud800",
    "$\\x$",
    "9" * 5000,
    [],
    [1],
    [[]],
    ["x"],
    {},
    {"a": 1},
    [0] * 70,
    [2**59, 2**59],
    [-1, 5],
]


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


def places(value, found):
    """Find every (container, key) of a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            places(value[key], found)
    return found


def mutated(text, draw):
    """Return a JSON text with one or two errors: a value of another type, a key missing, renamed or doubled."""
    value = json.loads(text)
    for _ in range(draw.choice([1, 1, 2])):
        spots = places(value, [])
        if not spots:
            break
        container, key = draw.choice(spots)
        change = draw.random()
        if change < 0.7:
            container[key] = nested(draw.choice([3, 300])) if change < 0.05 else copy.deepcopy(draw.choice(VALUES))
        elif change < 0.85:
            del container[key]
        elif isinstance(container, dict):
            container[draw.choice(["", "x", "../../y", "\ud800", "9" * 40])] = container.pop(key)
        else:
            container.append(container[key])
    return value


def results_kind(folder):
    case = Comparison(
        "layer_norm",
        "[8, 8]",
        "float32",
        4096,
        Bars(eager=1.0, memory=0.5, bound=2.0),
        {"ours": [1e-3, 2e-3, 1e-3], "eager": [2e-3, 3e-3, 2e-3], "bound": [1e-3, 1e-3, 1e-3]},
        {"apex": "failed: it"},
        {"ours": "n"},
        {"ours": 9, "eager": 12},
        {"ours": Traffic(10, 2), "eager": Traffic(20, 4)},
        {"ours": 1.5},
        2,
        4096,
        10**9,
        10**9,
        {"ours": {"compute": 1e-3, "communication": 0.0}},
        {"ours": [5e-4, 1e-3, 5e-4]},
    )
    ceilings = {"copy_gb_per_s": 10.0, "gemm_gflop_per_s float32": 90.0}
    write_results(Results("node", "Xeon", "2026-11-22", {"torch": "2"}, ceilings, [case, case], True), folder / "r")
    good = (folder / "r").read_text()

    def read(value):
        (folder / "r").write_text(json.dumps(value))
        text = "\n".join(report_lines([read_results(folder / "r")])[0])
        assert text.replace("\n", "").isprintable()

    return good, read


def manifest_kind(folder):
    tensors = {"weight": TensorBox.whole(torch.arange(12.0).reshape(4, 3)), "bias": TensorBox.whole(torch.ones(4))}
    saved = save_checkpoint(folder, 3, tensors, state={"a": 1}, rank_tensors={"rng": torch.arange(5)})
    start = b'{"sha256": "'

    def read(value):
        value = {"sha256": "0" * 64, **{k: v for k, v in value.items() if k != "sha256"}}
        text = json.dumps(value).encode()
        digest = hashlib.sha256(text).hexdigest().encode()
        (saved / "manifest.json").write_bytes(start + digest + text[len(start) + 64 :])
        read_manifest(saved)

    return (saved / "manifest.json").read_text(), read


def state_kind(folder):
    config = {name: vars(getattr(TrainConfig(), name)) for name in vars(TrainConfig())}
    state = {"progress": {"step": 3, "samples_consumed": 48}, "vocab_size": 300, "config": config, "layout": {"pp": 1}}

    def read(value):
        manifest = Manifest(3, 1, {}, {}, value)
        run_state(folder, manifest)
        _model_of(folder, manifest)

    return json.dumps(state), read


def weights_kind(folder):
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [24, 24]},
    }

    def read(value):
        text = json.dumps(value).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
        files = WeightFiles(folder)
        for name in files.tensors:
            files.read(name)

    return json.dumps(header), read


def digest_kind(folder):
    with IndexedDatasetWriter(folder / "data", np.uint16, vocab_size=9) as writer:
        writer.add_document([1, 2, 3])

    def read(value):
        (folder / "data.crc32.json").write_text(json.dumps(value))
        IndexedDataset(folder / "data")

    return (folder / "data.crc32.json").read_text(), read


def tokenizer_kind(folder):
    train_tokenizer(["some words and some more words"] * 20, 270, folder / "t.json")
    whole = json.loads((folder / "t.json").read_text())
    # Most of the file is the vocabulary: the mutations should also change the rest.
    keep = dict(list(whole["model"]["vocab"].items()))
    whole["model"]["vocab"] = keep

    def read(value):
        (folder / "t.json").write_text(json.dumps(value))
        load_tokenizer(folder / "t.json")

    return json.dumps(whole), read


def text_kind(folder):
    def read(value):
        (folder / "t.jsonl").write_text(json.dumps(value) + "\n")
        list(path_source(folder / "t.jsonl").documents())

    return json.dumps({"text": "some", "more": [1, {"text": "x"}]}), read


def schedule_kind(folder):
    return to_json(build_schedule("1f1b", 2, 4, None, 1)), lambda value: from_json(json.dumps(value))


def metrics_kind(folder):
    def read(value):
        (folder / "metrics.jsonl").write_text(json.dumps(value) + "\n")
        for record in RunFolder(folder).read_metrics():
            assert f"{record['step']} {record.get('loss', 0.0):.3f} {record.get('tokens_per_s', 0.0):,.0f}"

    return json.dumps({"step": 1, "loss": 2.5, "tokens_per_s": 10.0}), read


KINDS = {
    "results": results_kind,
    "manifest": manifest_kind,
    "state": state_kind,
    "weights": weights_kind,
    "digest": digest_kind,
    "tokenizer": tokenizer_kind,
    "text": text_kind,
    "schedule": schedule_kind,
    "metrics": metrics_kind,
}


def refusals(kind, folder, count, seed):
    """Return how many of the mutated files are refused, each with one line; raise any other error."""
    good, read = KINDS[kind](folder)
    read(json.loads(good))
    draw, refused = random.Random(seed), 0
    for number in range(count):
        value = mutated(good, draw)
        try:
            read(value)
        except (InputError, CheckpointError) as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 2000, (number, str(error))
            refused += 1
        except Exception as error:
            raise AssertionError(f"{kind} {number}: {json.dumps(value)[:600]}") from error
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, kind):
    refused = refusals(kind, tmp_path, 40, seed=1)
    assert refused > 5 or kind == "metrics"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_mutated_files(tmp_path, kind):
    refusals(kind, tmp_path, 2000, seed=2)


def test_mutated_configs(tmp_path):
    path, draw = tmp_path / "c.toml", random.Random(3)
    lines = config_text(TrainConfig(model=GPTConfig(num_layers=2))).splitlines()
    values = ["-1", "1e400", "nan", "1" + "0" * 30, "[]", '["--data.path", "x"]', "{a = 1}", "1979-05-27", '"\\u0000"']
    for _ in range(12):
        changed = list(lines)
        at = draw.choice([i for i, line in enumerate(changed) if "=" in line])
        changed[at] = f"{changed[at].partition('=')[0]}= {draw.choice(values)}"
        path.write_text("\n".join(changed))
        with contextlib.suppress(InputError):
            load_config(path)


HOSTILE_CONFIGS = {
    "a = " + "[" * 5000: "nested too deeply",
    "[training]\nseed = " + "9" * 5000: "no TOML",
    "[training]\nseed = " + "9" * 30: "64 bits",
    "[model]\nlayer_norm_eps = inf": "finite",
    '[data]\npath = "a\\u0000b"': "control characters",
    '[parallel]\npipeline_cut = ["--training.num_steps", "3"]': "list of whole numbers",
    "[data]\npath = 1979-05-27": "must be text",
    "# " + "x" * (1 << 20): "bytes at most",
}


@pytest.mark.parametrize("text", HOSTILE_CONFIGS, ids=HOSTILE_CONFIGS.values())
def test_hostile_configs(tmp_path, text):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(InputError, match=HOSTILE_CONFIGS[text]) as caught:
        load_config(tmp_path / "c.toml")
    assert "\n" not in str(caught.value)


def test_a_theme_is_no_path(tmp_path):
    good, read = results_kind(tmp_path)
    with pytest.raises(InputError, match=r"is damaged: .*\$\.theme"):
        read(json.loads(good) | {"theme": "../../y"})


def test_a_tokenizer_of_huge_ids_is_refused_before_a_table_of_them_is_made(tmp_path):
    good, read = tokenizer_kind(tmp_path)
    whole = json.loads(good)
    whole["model"]["vocab"]["some"] = 2**32 - 1
    with pytest.raises(InputError, match=r"t\.json: .*token id 4294967295, must be below"):
        read(whole)


def test_pipes_and_sparse_files_are_refused_at_once(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    index = tmp_path / "data.idx"
    header = index.read_bytes()[:34]
    for start in (b"", header[:18] + struct.pack("<Q", 10**10) + header[26:]):
        index.write_bytes(start)
        os.truncate(index, 34 + 12 * 10**10 + 16)
        with pytest.raises(InputError, match=r"data\.idx: (the first 9 bytes|120\.0 GB)"):
            IndexedDataset(tmp_path / "data")
    for path, read in {
        index: lambda: IndexedDataset(tmp_path / "data"),
        tmp_path / "r.json": lambda: read_results(tmp_path / "r.json"),
        tmp_path / "t.json": lambda: load_tokenizer(tmp_path / "t.json"),
    }.items():
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(InputError, match="not a plain file"):
            read()


def test_a_long_line_is_refused_without_being_read(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "short"}\n')
    os.truncate(path, 1 << 33)
    documents = path_source(path).documents()
    assert next(documents) == "short"
    with pytest.raises(InputError, match=rf"t\.jsonl:2: a line of more than {MOST_LINE_BYTES} bytes"):
        next(documents)


def test_sizes_are_bounded_and_numbers_are_numbers(tmp_path):
    path = Path(tmp_path / "file")
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, must be 4 at most"):
        read_bounded(path, 4)
    for text, message in {
        "NaN": "no JSON",
        "1e999": "out of range",
        "9" * 5000: "no JSON",
        "[" * 9999: "nested too deeply",
        '"x': "cut off",
        "[1, true]": r"Expected `int`, got `bool` - at `\$\[1\]`",
        "{}": "Expected `array`",
    }.items():
        with pytest.raises(InputError, match=message):
            parse_json(text, list[int])
    assert parse_json("[1]", list[int]) == [1]
