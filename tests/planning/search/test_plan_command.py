"""Start here when `fused-megatron plan` refuses good input, takes bad input, or its config does not start."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.checks import InputError
from fused_megatron.cli import main
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.amounts import parse_amount, round_to_even_share
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.planning.search.model_source import read_workload

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 2000,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_model(tmp_path, **LLAMA)


def write_model(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def plan(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["plan", *map(str, words)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_a_plan_of_a_transformers_folder_starts(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = llama / "plan.toml"
    words = [llama, "--cluster", "h100", "--gpus", 16, "--tokens", "1B", "--batch-tokens", "256k", "--price", "2.5"]
    code, out, _ = plan(capsys, *words, "--write", file, "--no-verify")
    assert code == 0
    assert "sequences of 1,024 tokens" in out and "256,000" in out and "GPU hours" in out
    assert f"{file}: not verified yet" in out and "is ready" not in out
    assert "torchrun --nnodes 2 --nproc-per-node 8" in out
    config = load_config(file)
    assert config.parallel.num_ranks == 16 and config.training.num_steps == round(1e9 / 262144 + 0.5)
    code, out, _ = plan(capsys, *words, "--json")
    document = json.loads(out)
    best = document["plans"][0]
    assert code == 0 and document["fits"] and document["verified"] is None
    assert best["tp"] == config.parallel.tensor_parallel_size and best["zero_stage"] == config.parallel.zero_stage
    assert sum(best["parts_s"].values()) == pytest.approx(best["step_s"])
    assert best["tokens_per_s"] * best["step_s"] == pytest.approx(document["batch_tokens"])
    (llama / "again.toml").write_text(document["config"])
    assert load_config(llama / "again.toml") == config
    run = DryRun(config)
    assert max(run.rank(rank).peak_bytes for rank in run.pipeline_ranks()) < 1e9 * best["memory_gb"]


def test_the_printed_command_has_the_planned_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(Path(__file__).parents[3] / "examples" / "gpt_tiny.toml")
    own = [tiny, "--training.global-batch-size", "64"]
    code, out, _ = plan(capsys, *own, "--cluster", "h100", "--gpus", 16, "--json")
    assert code == 0
    document = json.loads(out)
    train = shlex.split(document["command"].partition(" train ")[2])
    (tmp_path / "planned.toml").write_text(document["config"])
    started, planned = load_config(Path(train[0]), train[1:]), load_config(tmp_path / "planned.toml")
    assert started.parallel == planned.parallel and started.parallel.num_ranks == 16
    assert started.training.microbatch_size == planned.training.microbatch_size
    assert train[:3] == own
    _, out, _ = plan(capsys, *own, "--cluster", "h100", "--gpus", 8, "--batch-tokens", "32k")
    assert "--write FILE.toml" in out and out.rstrip().endswith("train FILE.toml")  # options cannot say this batch


def test_what_does_not_fit_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    big = {
        **LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 40,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
    }
    folder = write_model(tmp_path, **big)
    code, out, _ = plan(capsys, folder, "--cluster", "h100", "--gpus", 1)
    assert code == 1
    needed = re.search(
        r"does not fit: needs at least ([0-9,]+) GPUs of h100-80gb, not 1\. The nearest that fits: tp=", out
    )
    assert needed is not None and "needs at least" in out and "GB of 80 GB" in out
    code, out, _ = plan(capsys, folder, "--cluster", "h100", "--gpus", needed[1], "--json")
    assert code == 0 and json.loads(out)["fits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cluster h101 --gpus 8", "cluster='h101' must be one of a100-80gb, b200, h100-80gb, h200"),
        ("--cluster h100 --gpus 0", "gpus=0 must be 1 or more"),
        ("--cluster h100 --gpus 12", r"gpus=12 must be at most gpus_per_node=8 .*nearest: 8, 16"),
        ("--cluster h100 --gpus eight", "gpus='eight' must be a whole number"),
        ("--cluster h100", "plan needs --gpus"),
        ("--gpus 8", "plan needs --cluster"),
        ("--cluster h100 --gpus 8 --tokens 100Q", "tokens='100Q' must be a number such as"),
        ("--cluster h100 --gpus 8 --tokens 0", "tokens=0 must be 1 or more"),
        ("--cluster h100 --gpus 8 --batch-tokens 100", "must be at least one sequence"),
        ("--cluster h100 --gpus 8 --price free", "price='free' must be a number"),
        ("--cluster h100 --gpus 8 --price 1e6", "price='1e6' must be a number above 0"),
        ("--cluster h100 --gpus 8 --write /nowhere/plan.toml", "write='/nowhere/plan.toml' must be in a folder that"),
        ("--cluster h100 --gpus 8 --write /proc/plan.toml", "must be in a folder that can be written"),
        ("--cluster h100 --gpus 8 --gpus 16", "--gpus must be given once"),
        ("--cluster h100 --gpus 8 --json --json", "--json must be given once"),
        ("--cluster h100 --gpus 8 --write plan.txt", "must be the name of a .toml file"),
        ("--cluster h100 --gpus 8 --model.num_layers 3", "needs one of our configs"),
        ("--cluster h100 --gpus", "--gpus needs a value"),
    ],
)
def test_bad_input_is_one_line(llama: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    code, out, err = plan(capsys, llama, *shlex.split(words))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it has none"),
        ("[1]", "must hold a JSON object"),
        ('{"model_type": "resnet"}', "is not known"),
        (json.dumps({**LLAMA, "hidden_size": -1}), "hidden_size=-1 must be a whole number"),
    ],
)
def test_a_model_that_is_no_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, out, err = plan(capsys, tmp_path, "--cluster", "h100", "--gpus", 8)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    code, _, err = plan(capsys, tmp_path / "nothing", "--cluster", "h100", "--gpus", 8)
    assert (code, err.count("\n")) == (2, 1) and "must be the path of a config" in err


def test_search_starts_without_torch(llama: Path) -> None:
    words = ["plan", str(llama), "--cluster", "h100", "--gpus", "8"]
    code = f"import sys; from fused_megatron.cli import main; main({words!r}); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("False")


def test_workload_of_a_config_and_of_a_preset() -> None:
    tiny = read_workload("examples/gpt_tiny.toml", ["--model.num_layers", "3"], num_gpus=2)
    assert tiny.config.model.num_layers == 3 and "vocabulary" in tiny.notes[0]
    preset = read_workload("gpt_175b", num_gpus=1024)
    assert preset.name == "gpt_175b_tp8_pp16_dp8_zero1"
    assert (preset.config.training.global_batch_size, preset.notes) == (1536, ())
    longer = read_workload("gpt_175b", num_gpus=1024, seq_len=8192)
    assert longer.batch_tokens == preset.batch_tokens and longer.config.model.seq_len == 8192
    with pytest.raises(InputError, match="gpt_530b_tp8_pp35_dp7_zero1, gpt_530b_tp8_pp35_dp9"):
        read_workload("gpt_530b", num_gpus=8)


def test_amounts() -> None:
    written = ("64", "4M", "1.5T", "100b", "2k")
    assert [parse_amount("n", text) for text in written] == [64, 4 * 10**6, 15 * 10**11, 10**11, 2000]
    for text in ("", "-1", "1e9", "B", "1.5.2", "9" * 30):
        with pytest.raises(InputError):
            parse_amount("n", text)
    for sequences, gpus in ((976.6, 64), (976.6, 3072), (5, 64), (1, 8), (1024, 24)):
        rounded = round_to_even_share(sequences, gpus)
        assert abs(rounded - sequences) <= max(0.6, sequences / 16)
    assert round_to_even_share(976.6, 3072) % 96 == 0
