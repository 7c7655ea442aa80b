"""Start here when a BERT trains differently at some layout, or does not resume bit for bit."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_megatron import cli
from fused_megatron.checkpoint.run_folder import CLOCK_FIELDS, RunFolder
from fused_megatron.checks import InputError
from fused_megatron.config.config_file import load_config
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.training.train import train

# Each run draws its loss plot: imported once here, matplotlib is shared by all forked ranks.
with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

NUM_STEPS, HALF = 6, 3
# Both orders of norms; the Megatron order with dropout.
FORMS = {
    "re-arranged": ("--model.hidden_dropout=0.1", "--model.embedding_dropout=0.1"),
    "published": ("--model.post_norm=True", "--model.activation=gelu_exact"),
}
LAYOUTS = {
    "tp": ("re-arranged", "--parallel.tensor_parallel_size=2", "--training.microbatch_size=8"),
    "tp sp": ("published", "--parallel.tensor_parallel_size=2", "--parallel.sequence_parallel=True"),
    "dp": ("re-arranged", "--parallel.data_parallel_size=2"),
    "pp": ("re-arranged", "--parallel.pipeline_parallel_size=2", "--model.recompute=full"),
    "zb": ("published", "--parallel.pipeline_parallel_size=2", "--parallel.schedule=zb_v"),
}


def run_of(work: Path, name: str, form: str, *options: str) -> list[dict[str, Any]]:
    """Train the run work/name, or resume it; return its metrics."""
    run = work / name
    words = (*FORMS[form], f"--training.run_folder={run}", *options)
    train(load_config(work / "bert.toml", words), run)
    return RunFolder(run).read_metrics()


def without_speed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in CLOCK_FIELDS} for record in records]


def on_two_ranks(rank: int, world_size: int, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of every layout, then of runs that resume in the middle, in the same and another layout."""
    found = {name: run_of(work, name, form, *options) for name, (form, *options) in LAYOUTS.items()}
    form, *tp = LAYOUTS["tp"]
    for name, source, options in (("tp again", "tp", tp), ("tp from pp", "pp", tp)):
        if rank == 0:
            copy_to_the_middle(work / source, work / name)
        torch.distributed.barrier()
        found[name] = run_of(work, name, form, *options)
    return found


def copy_to_the_middle(run: Path, target: Path) -> None:
    """Copy a run as if its process had been killed after HALF steps."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoints" / f"step-{NUM_STEPS:06d}")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a text and a config."""
    work = tmp_path_factory.mktemp("bert")
    (work / "text.txt").write_text("".join(f"line {i * i % 97} of a text says {'ab' * (i % 5)}.\n" for i in range(500)))
    (work / "bert.toml").write_text(f"""
        [model]
        family = "bert"
        num_layers = 4
        hidden_size = 32
        num_heads = 4
        seq_len = 24
        [data]
        path = "{work / "text.txt"}"
        cache_folder = "{work / "cache"}"
        tokenizer_vocab_size = 300
        mask_fraction = 0.2
        [optimizer]
        lr = 3e-3
        min_lr = 1e-3
        warmup_steps = 2
        [training]
        num_steps = {NUM_STEPS}
        checkpoint_interval = {HALF}
        eval_interval = {HALF}
        global_batch_size = 8
        microbatch_size = 2
        eval_batches = 3
    """)
    return work


@pytest.mark.slow  # tests/models/test_bert.py has every layout in the fast part
def test_one_curve_at_every_layout_and_resumes(work: Path) -> None:
    one = {form: run_of(work, form, form) for form in FORMS}
    # ln(300) = 5.70; the last held-out batch has padding, and rows of nothing else.
    assert 5.5 < one["re-arranged"][0]["loss"] < 5.9 and one["re-arranged"][-1]["bits_per_byte"] is None
    ranks = run_on_ranks(on_two_ranks, 2, work, timeout_s=300)
    for found in ranks:
        assert found == ranks[0]
    for name, records in ranks[0].items():
        form = LAYOUTS[name][0] if name in LAYOUTS else "re-arranged"
        assert [r["step"] for r in records] == [r["step"] for r in one[form]] and len(records) == NUM_STEPS + 2
        for ours, theirs in zip(records, one[form], strict=True):
            for key in {"loss", "gradient_norm", "validation_loss"} & theirs.keys():
                assert abs(ours[key] - theirs[key]) < 1e-5 * theirs[key], (name, ours, theirs)
            assert ours.get("validation_tokens") == theirs.get("validation_tokens")
    assert without_speed(ranks[0]["tp again"]) == without_speed(ranks[0]["tp"])
    last = f"checkpoints/step-{NUM_STEPS:06d}"
    for file in sorted((work / "tp" / last).glob("*.safetensors")):
        assert file.read_bytes() == (work / "tp again" / last / file.name).read_bytes(), file.name


def test_generate_and_heads_that_are_not_trained(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = work / "re-arranged"
    run_of(work, run.name, run.name)  # an existing run, or a new one
    assert cli.main(["generate", str(run), "line"]) == 2
    assert "holds a BERT, which predicts masked tokens and cannot continue a text" in capsys.readouterr().err
    for option, message in (
        ("--model.next_sentence_head=True", "model.next_sentence_head=True must be False: train teaches"),
        ("--model.masked_lm_head=False", "model.masked_lm_head=False must be True"),
    ):
        with pytest.raises(InputError, match=message):
            run_of(work, "refused", "re-arranged", option)
    (work / "gpt.toml").write_text((work / "bert.toml").read_text().replace('"bert"', '"gpt"'))
    with pytest.raises(InputError, match="is of another model: family=bert there, family=gpt here"):
        train(load_config(work / "gpt.toml"), run)
    assert not (work / "refused").exists()
