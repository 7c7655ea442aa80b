"""Start here when the command line answers bad input with a traceback."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fused_megatron import cli
from fused_megatron.data.indexed_dataset import IndexedDatasetWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a config, a text and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("\n\n".join("the quick brown fox jumps over the lazy dog " * 9 for _ in range(40)))
    (folder / "tiny.toml").write_text(f"""
        [model]
        num_layers = 1
        hidden_size = 16
        num_heads = 2
        seq_len = 16
        [data]
        path = "{folder / "text.txt"}"
        cache_folder = "{folder / "cache"}"
        tokenizer_vocab_size = 270
        [training]
        num_steps = 3
        global_batch_size = 4
        microbatch_size = 2
        eval_batches = 1
        run_folder = "{folder / "run"}"
    """)
    assert cli.main(["train", str(folder / "tiny.toml")]) == 0
    return folder


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run the command, which must fail; return its error line."""
    assert cli.main([str(word) for word in words]) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fused-megatron: error: "), output.err
    return lines[0].removeprefix("fused-megatron: error: ")


def test_a_run_says_what_it_did_and_leaves_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "again"
    assert (
        cli.main(["train", str(folder / "tiny.toml"), "--training.run-folder", str(run), "--model.num-layers=2"]) == 0
    )
    shown = capsys.readouterr().out
    assert "step 3/3" in shown
    for part in ("training loss", "held-out loss", "bits per byte", "tokens/s", "metrics.jsonl", "checkpoints"):
        assert part in shown
    assert [line[:5] for line in shown.splitlines()[-3:]] == ["  1. ", "  2. ", "  3. "]
    assert {p.name for p in run.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
        "tokenizer.json",
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 3]
    assert "num_layers = 2" in (run / "config.toml").read_text()


def test_the_first_line_comes_before_torch_is_loaded() -> None:
    """Loading torch takes seconds; here it fails, as it does where it is missing."""
    code = "import sys; sys.modules['torch'] = None; from fused_megatron import cli; cli.main(['train', 'x.toml'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == f"fused-megatron {cli._version()}: train x.toml; loading PyTorch ...\n"
    assert "import of torch halted" in result.stderr  # so the line came first


def test_the_resolved_config_trains_the_same_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(folder / "run" / "config.toml")]) == 0
    assert "nothing to train: step 3 of 3 is done" in capsys.readouterr().out


def test_generate_continues_the_prompt_and_repeats_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        assert cli.main(["generate", str(folder / "run"), "the quick", "--num-tokens", "30", "--seed", str(seed)]) == 0
        texts.append(capsys.readouterr().out.partition("\n")[2])
    assert texts[0].startswith("the quick") and len(texts[0]) > 20
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("words", "message"), [
    (["--model.num-layer", "3"], "unknown option --model.num-layer (did you mean --model.num-layers?)"),
    (["--num-layers", "3"], "unknown option --num-layers (did you mean --model.num-layers?)"),
    (["--model.num-layers", "many"], "model.num_layers='many' must be a whole number"),
    (["--model.num-heads", "3"], "hidden_size=16 must be divisible by num_heads=3 (nearest: 15, 18)"),
    (["--parallel.tensor-parallel-size", "4"], "num_heads=2 must be divisible by tensor_parallel_size=4 (nearest: 4; "
     "or tensor_parallel_size=2)"),
    (["--training.microbatch-size", "3"], "global_batch_size=4 must be divisible by microbatch_size=3 (nearest: 3, 6)"),
    (["--parallel.pipeline-parallel-size", "3"], "num_layers=1 must be at least 2: of the 3 pipeline stages"),
    (["--parallel.schedule", "1f2b"], "schedule='1f2b' must be one of: gpipe, 1f1b, interleaved_1f1b"),
    (["--parallel.schedule", "pipedream"], "schedule='pipedream' updates after each microbatch: global_batch_size=4"),
    (["--parallel.schedule", "pipedream_2bw", "--parallel.zero-stage", "3"], "zero_stage=3 must be 0 or 1"),
    (["--parallel.schedule", "zb_v", "--parallel.stages-per-rank", "3"], "stages_per_rank=3 must be 2 for zb_v"),
    (["--parallel.pipeline-cut", "1", "1"], "pipeline_cut=[1, 1] must have one number of blocks for each of the 1"),
    (["--parallel.tensor-parallel-size", "2"], "= 2 must equal the world size 1 (start 2 ranks: torchrun or fused-"),
    (["--training.dtype", "float16"], "dtype='float16' must be one of: 'auto', 'float32', 'bfloat16'"),
    (["--data.path", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--training.run-folder", "/proc/no/run"], "training.run_folder=/proc/no/run cannot be written"),
    (["stray"], "unexpected argument 'stray' (an option begins with --)"),
    (["--training.num-steps"], "--training.num-steps needs a value"),
    (["--optimizer.name", "x"], "unknown option --optimizer.name (optimizer.kind chooses: adamw, sgd, lion, muon; "),
    (["--optimizer.lr", "nan"], "optimizer.lr=nan must be a finite number"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")  # fmt: skip
def test_bad_options(
    folder: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = () if "--training.run-folder" in words else ("--training.run-folder", tmp_path / "run")
    assert message in fails(capsys, "train", folder / "tiny.toml", *run, *words)


@pytest.mark.parametrize(("text", "message"), [
    ("[model]\nhiden_size = 3\n", "unknown key model.hiden_size (did you mean model.hidden_size?)"),
    ("[modle]\nhidden_size = 16\n", "unknown key modle.hidden_size (did you mean model.hidden_size?)"),
    ("hidden_size = 16\n", "hidden_size must stand in a section (did you mean model.hidden_size?)"),
    ("[model]\nhidden_size = [16]\n", "model.hidden_size=[16] must be a whole number"),
    ("[model]\nhidden_size = 16.5\n", "model.hidden_size=16.5 must be a whole number"),
    ("[model\n", "is no TOML"),
    ("[training]\nnum_steps = 0\n", "num_steps=0 must be 1 or more"),
    ("[optimizer]\nname = 'adamw'\n", "unknown key optimizer.name (optimizer.kind chooses: adamw, sgd, lion, muon; "),
    ("[optimizer]\nkind = 'adam'\n", "optimizer.kind='adam' must be one of: 'adamw', 'sgd', 'lion', 'muon'"),
], ids=range(9))  # fmt: skip
def test_bad_config_files(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text(text)
    said = fails(capsys, "train", tmp_path / "bad.toml")
    assert message in said and "bad.toml" in said


def test_bad_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'trian'" in fails(capsys, "trian")
    assert "train needs a config file" in fails(capsys, "train")
    assert "nowhere.toml does not exist" in fails(capsys, "train", tmp_path / "nowhere.toml")
    assert "is no run folder" in fails(capsys, "generate", tmp_path, "a prompt")
    step = next((folder / "run" / "checkpoints").iterdir())
    assert f"(give {folder / 'run'}, of which it is a part)" in fails(capsys, "generate", step, "a prompt")
    (tmp_path / "short.txt").write_text("few words")
    words = ["--data.path", tmp_path / "short.txt", "--training.run-folder", tmp_path / "short"]
    assert fails(capsys, "train", folder / "tiny.toml", *words).startswith(f"{tmp_path / 'short.txt'}: ")
    assert "must hold at least one character" in fails(capsys, "generate", folder / "run", "")
    assert "generate" in fails(capsys, "generate", folder / "run")
    assert "temperature=-1.0 must be 0 or more" in fails(capsys, "generate", folder / "run", "a", "--temperature", "-1")


def indexed(prefix: Path, highest: int) -> Path:
    writer = IndexedDatasetWriter(str(prefix), np.int32)
    for start in range(40):
        writer.add_document(np.arange(start, start + 50, dtype=np.int64) % (highest + 1))
    writer.finalize()
    return prefix


def test_damaged_and_unfitting_datasets(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ("train", folder / "tiny.toml", "--training.run-folder", tmp_path / "run", "--data.path")
    good = indexed(tmp_path / "good", 59)
    assert cli.main([str(word) for word in (*train, good)]) == 0
    assert "no tokenizer" not in capsys.readouterr().err
    assert "model.vocab_size=50 must be at least 60" in fails(capsys, *train, good, "--model.vocab-size", 50)
    for suffix in (".bin", ".idx"):
        bad = indexed(tmp_path / f"cut{suffix[1:]}", 59)
        file = bad.with_suffix(suffix)
        file.write_bytes(file.read_bytes()[:-5])
        assert file.name in fails(capsys, *train, bad)
    # A token id outside the given vocabulary size: found when the sample is read.
    forged = indexed(tmp_path / "forged", 59)
    flipped = indexed(tmp_path / "flipped", 59)
    data = bytearray(flipped.with_suffix(".bin").read_bytes())
    data[403] ^= 64
    flipped.with_suffix(".bin").write_bytes(bytes(data))
    assert "flipped.bin: the checksum of bytes 0 to 8000 is " in fails(capsys, *train, flipped)
    for prefix in (forged, flipped):
        prefix.with_suffix(".crc32.json").unlink()  # written by another program
    data = bytearray(forged.with_suffix(".bin").read_bytes())
    for token in range(40 * 50):
        struct.pack_into("<i", data, 4 * token, 100)
    forged.with_suffix(".bin").write_bytes(bytes(data))
    said = fails(capsys, *train, forged, "--model.vocab-size", 60, "--training.run-folder", tmp_path / "other")
    assert "100" in said or "101" in said
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in fails(capsys, *train, tmp_path / "empty.txt")


def test_another_model_in_the_run_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "train", folder / "tiny.toml", "--model.hidden-size", "32")
    assert "is of another model: hidden_size=16 there, hidden_size=32 here" in said
    # The mistake has not changed the run.
    assert cli.main(["generate", str(folder / "run"), "the", "--num-tokens", "3"]) == 0


def test_another_text_in_the_run_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer that is trained on another text gives the ids of the run another meaning, even with as many ids."""
    (tmp_path / "other.txt").write_text("pack my box with five dozen liquor jugs. " * 200)
    words = ["train", folder / "tiny.toml", "--data.path", tmp_path / "other.txt", "--training.num-steps", "4"]
    own = folder / "run" / "tokenizer.json"
    before = own.read_bytes()
    said = fails(capsys, *words)
    assert said.startswith(f"{tmp_path / 'other.txt'} has another tokenizer than {folder / 'run'}")
    assert f"(data.tokenizer_path={own} keeps the run's; or choose" in said
    assert own.read_bytes() == before
    copy = shutil.copytree(folder / "run", tmp_path / "run")
    words += ["--data.tokenizer-path", own, "--training.run-folder", copy]
    assert cli.main([str(word) for word in words]) == 0
    assert "was trained on other data" in capsys.readouterr().out


def test_a_broken_checkpoint_is_named_and_passed_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "broken"
    words = [
        "train",
        str(folder / "tiny.toml"),
        "--training.run-folder",
        str(run),
        "--training.checkpoint-interval",
        "2",
    ]
    assert cli.main(words) == 0
    (file,) = (run / "checkpoints" / "step-000003").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    capsys.readouterr()
    assert cli.main(words) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("fused-megatron: warning: checkpoint passed over: ") and file.name in line
    assert "step-000002 (step 2)" in said.out
    # No checkpoint is good: the run must not start anew over them.
    for file in (run / "checkpoints").glob("*/manifest.json"):
        file.write_bytes(file.read_bytes()[:-9])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "has no checkpoint that is good (step-000003, step-000002; " in last and "put back a copy, or move" in last
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    helped = capsys.readouterr().out
    assert "--parallel.tensor-parallel-size" in helped and "Ranks that share each layer" in helped


def test_python_m() -> None:
    result = subprocess.run([sys.executable, "-m", "fused_megatron", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "generate RUN" in result.stdout


@pytest.mark.parametrize(
    "words", [["--help"], pytest.param(["train", "--help"], marks=pytest.mark.slow)], ids=["help", "train"]
)
def test_a_reader_that_has_read_enough_is_no_fault(words: list[str]) -> None:
    command = [sys.executable, "-m", "fused_megatron", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # closed before anything is printed: buffered output meets the closed pipe at the end
        assert process.stderr.read() == b""
    assert process.returncode == 141
