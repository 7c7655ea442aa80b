"""Start here when a model with experts trains differently in some layout, or resumes wrongly in another."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.checks import InputError
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.training import train as training
from fused_megatron.training.generate_text import GenerateArguments, generate_text

EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "balance_loss": 0.02, "router_z_loss": 0.002}
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
LLAMA: dict[str, Any] = {"activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "num_kv_heads": 2}
FORMS: dict[str, dict[str, Any]] = {
    # Biases, dropped tokens, a bias of the selection.
    "gpt": {**EXPERTS, **DROPOUT, "capacity_factor": 1.25, "router_bias_rate": 0.01, "router_jitter": 0.1},
    "llama": {
        **EXPERTS,
        **LLAMA,
        "linear_biases": False,
        "expert_ffn_hidden_size": 48,
        "num_shared_experts": 2,
        "shared_expert_gate": True,
        "num_dense_layers": 1,
        "router_normalize": False,
    },
    # As DeepSeek-V3.
    "sigmoid": {
        **EXPERTS,
        **LLAMA,
        "linear_biases": False,
        "num_experts": 8,
        "num_shared_experts": 1,
        "router_scores": "sigmoid",
        "router_scale": 1.5,
        "router_groups": 4,
        "router_groups_per_token": 2,
        "router_bias_rate": 0.01,
        "balance_loss_over": "step",
    },
    "documents": {**EXPERTS, **LLAMA, "mask_documents": True, "moe_every": 2},
    "bert": {**EXPERTS, "family": "bert", "hidden_dropout": 0.1},
}
TP = {"tensor_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
PP = {"pipeline_parallel_size": 2}
CP = {"context_parallel_size": 2}
DP = {"data_parallel_size": 2}


def ep(size: int, etp: int = 1) -> dict[str, Any]:
    return {"expert_parallel_size": size, "expert_tensor_parallel_size": etp}


def sweep() -> list[tuple[str, dict[str, Any]]]:
    """Return all ep 1, 2, 4 x etp 1, 2 on tp 1, 2 x pp 1, 2 x cp 1, 2 x dp on at most 8 ranks, with forms in turn."""
    found: list[tuple[str, dict[str, Any]]] = []
    forms = itertools.cycle(FORMS)
    others = itertools.cycle(
        [{}, {"recompute": "full"}, {"recompute": "selective", "zero_stage": 3}, {"sequence_parallel": True}]
    )
    batches = itertools.cycle([{"microbatch_size": 1}, {"global_batch_size": 4, "microbatch_size": 4}])
    for tp, pp, cp, e, etp in itertools.product((1, 2), (1, 2), (1, 2), (1, 2, 4), (1, 2)):
        dp = max(1, e * etp // (tp * cp))
        if tp * pp * cp * dp > 8 or dp > 4 or e == etp == 1:  # a step has four samples
            continue
        batch = next(batches) if dp == 1 else {"microbatch_size": 1}
        layout = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "context_parallel_size": cp}
        found.append((next(forms), {**layout, "data_parallel_size": dp, **ep(e, etp), **next(others), **batch}))
    return found


# Form of the model, and layout.
LAYOUTS: list[Any] = [
    ("gpt", {**ep(2), **TP, **CP}),  # 13 positions on each of two ranks, and 7 and 6 of them
    *(pytest.param(form, layout, marks=pytest.mark.slow) for form, layout in sweep()),
    *(
        pytest.param(form, layout, marks=pytest.mark.slow)
        for form, layout in [
            ("llama", {**ep(2), **PP, **DP, "zero_stage": 3, "recompute": "full"}),
            ("sigmoid", {**ep(4, 2), **SP, **CP, **DP}),
            ("gpt", {**ep(2), **PP, **DP, "schedule": "zb_v", "stages_per_rank": 2, "num_layers": 4}),
            ("llama", {**ep(2), **DP, "expert_dispatch": "all_gather"}),
            ("gpt", {**ep(4), **SP, **DP, "expert_dispatch": "all_gather", "recompute": "full"}),
        ]
    ),
]


@pytest.mark.parametrize(("form", "layout"), LAYOUTS)
def test_every_layout_has_the_curve_of_one_process(
    runs: Any, tmp_path: Path, form: str, layout: dict[str, Any]
) -> None:
    layout = {"data_parallel_size": 1, **layout}
    whole = {key: layout[key] for key in ("num_layers",) if key in layout}
    expected = runs.of_one_process({**FORMS[form], **whole})[1]
    runs.assert_same(runs.trained(tmp_path, **FORMS[form], **layout), expected)


def generated(rank: int, world_size: int, arguments: GenerateArguments) -> str:
    return generate_text(arguments)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({**ep(2), **DP}, {}),
        pytest.param({**ep(4), **SP, **DP, "zero_stage": 2}, {}, marks=pytest.mark.slow),
        pytest.param({}, {**ep(2, 2), **TP, **DP, **PP, "zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param({**ep(2, 2), **TP, **CP}, {**ep(4), **DP, **PP, **TP, "zero_stage": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_on_another_division_of_its_experts_and_generates_the_same_text(
    runs: Any, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    run, expected = runs.of_one_process(FORMS["gpt"])
    if before:
        records = runs.trained(tmp_path, **FORMS["gpt"], **{"data_parallel_size": 1, **before})
        runs.assert_same(records, expected)
    else:
        shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    runs.lose_last_checkpoint(tmp_path)
    runs.assert_same(runs.trained(tmp_path, **FORMS["gpt"], **{"data_parallel_size": 1, **after}), expected)
    # On two ranks experts are divided over them.
    asked = GenerateArguments(tmp_path, "line 3 of", num_tokens=8)
    assert {text for ranks in (1, 2) for text in run_on_ranks(generated, ranks, asked)} == {generated(0, 1, asked)}


def test_a_run_may_change_its_losses_but_not_drop_the_biases_of_its_routers(runs: Any) -> None:
    run, _ = runs.of_one_process(FORMS["gpt"])
    checkpoint = run / "checkpoints" / f"step-{runs.num_steps:06d}"
    changed = {"balance_loss": 0.5, "balance_loss_over": "step", "router_bias_rate": 0.0, "capacity_factor": None}
    config = runs.config(run, **{**FORMS["gpt"], **changed, "vocab_size": 300})
    training._state_of_same_run(checkpoint, config.model, config, lambda: None)
    for name, value in (("router_bias_rate", None), ("experts_per_token", 1), ("num_dense_layers", 1)):
        model = dataclasses.replace(config.model, **{name: value})
        with pytest.raises(InputError, match=f"is of another model: {name}="):
            training._state_of_same_run(checkpoint, model, config, lambda: None)
