"""Start here when a model trains differently on context-parallel ranks, or resumes wrongly on others."""

import shutil
from pathlib import Path
from typing import Any

import pytest

DROPOUT: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
LLAMA: dict[str, Any] = {"activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "num_kv_heads": 2}
DOCUMENTS = {"mask_documents": True}
FORMS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "dropout": {**DROPOUT, **DOCUMENTS},
    "llama": {**LLAMA, **DROPOUT, **DOCUMENTS},
    "window": {**LLAMA, **DOCUMENTS, "sliding_window": 9, "reset_positions": False},
    "untied": {"tied_embeddings": False},
    "bert": {"family": "bert", **DROPOUT},
}
SP = {"tensor_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_parallel_size": 2}


def cp(size: int, method: str = "ring") -> dict[str, Any]:
    return {"context_parallel_size": size, "context_parallel_method": method}


# Form of the model, layout, and whether a fast test has it.
LAYOUTS: list[tuple[str, dict[str, Any], bool]] = [
    ("dropout", {**cp(2), **SP, "recompute": "full"}, True),
    (
        "llama",
        {
            **cp(2, "all_gather"),
            "data_parallel_size": 2,
            "zero_stage": 3,
            "recompute": "selective",
            "recompute_blocks": 1,
        },
        True,
    ),
    ("bert", cp(2), True),
    ("gpt", cp(2), False),
    ("gpt", cp(4), False),
    ("gpt", {**cp(2), **PP}, False),
    ("gpt", {**cp(2), **SP, **PP}, False),
    ("gpt", {**cp(2), "tensor_parallel_size": 2, "data_parallel_size": 2, "zero_stage": 0}, False),
    ("dropout", {**cp(4), **SP}, False),
    ("dropout", {**cp(4), **PP, "stages_per_rank": 1, "recompute": "selective"}, False),
    ("dropout", {**cp(4), "data_parallel_size": 2, "zero_stage": 2}, False),
    ("dropout", {**cp(2), **PP, "data_parallel_size": 2, "schedule": "zb_h1"}, False),
    ("dropout", {**cp(2, "all_to_all"), **SP, **PP}, False),
    ("llama", {**cp(4), "data_parallel_size": 2, "zero_stage": 3, "zero_shard_size": 2}, False),
    ("llama", {**cp(4, "all_to_all")}, False),
    ("llama", {**cp(4, "all_to_all+ring"), "tensor_parallel_size": 2}, False),
    ("window", cp(4), False),
    ("window", {**cp(2, "all_gather"), **SP}, False),
    ("untied", {**cp(2), **PP, "zero_stage": 3, "zero_gather": "step"}, False),
    ("bert", {**cp(2, "all_gather"), **SP, **PP}, False),
    ("bert", {**cp(4, "all_to_all"), "data_parallel_size": 2, "zero_stage": 3}, False),
]


@pytest.mark.parametrize(
    ("form", "layout"),
    [pytest.param(form, layout, marks=() if fast else pytest.mark.slow) for form, layout, fast in LAYOUTS],
)
def test_every_layout_has_the_curve_of_one_process(
    runs: Any, tmp_path: Path, form: str, layout: dict[str, Any]
) -> None:
    layout = {"data_parallel_size": 1, **layout}
    runs.assert_same(runs.trained(tmp_path, **FORMS[form], **layout), runs.of_one_process(FORMS[form])[1])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {**cp(2), "zero_stage": 3}),
        pytest.param({**cp(4)}, {}, marks=pytest.mark.slow),
        pytest.param({**cp(2), **SP}, {**cp(4, "all_gather"), **PP}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_on_another_number_of_context_parallel_ranks(
    runs: Any, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    run, expected = runs.of_one_process(FORMS["dropout"])
    if before:
        runs.trained(tmp_path, **FORMS["dropout"], data_parallel_size=1, **before)
    else:
        shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    runs.lose_last_checkpoint(tmp_path)
    runs.assert_same(runs.trained(tmp_path, **FORMS["dropout"], data_parallel_size=1, **after), expected)
