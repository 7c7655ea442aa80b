"""Table of faults of parallel training: the plant of each fault, a run that shows it, and the expected report.

tests/testing/test_planted_faults.py runs `fused-megatron verify` and `fm.verify` on every fault. Without the fault the
layout must be right; with it the report must name the axis and the tensor. A new axis adds its faults here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fused_megatron.config import (
    BERTConfig,
    GPTConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
    TransformerConfig,
)
from fused_megatron.testing import context_parallel_plants as context
from fused_megatron.testing import expert_parallel_plants as experts
from fused_megatron.testing import fault_plants as plants
from fused_megatron.testing import modules_in_shards as modules

TENSOR, SEQUENCE, OVERLAP = "tensor parallel", "sequence parallel", "overlap"
PIPELINE, CONTEXT, DATA = "pipeline parallel", "context parallel", "data parallel"
MICROBATCHES, RECOMPUTATION, EXPERT = "microbatches", "recomputation", "expert parallel"

_DROPOUT = {"hidden_dropout": 0.1, "embedding_dropout": 0.1}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: name of the fault.
        plant: returns a context that plants the fault into this process.
        axis: part of the layout that the report must name.
        tensor: regular expression for the reported name of the first tensor that differs.
        config: a run that shows the fault; None if a module shows it.
        build_model, batch: a module and its batch, as fm.verify takes them, on two tensor-parallel ranks.
    """

    name: str
    plant: Callable[[], plants.Planted]
    axis: str
    tensor: str
    config: TrainConfig | None = None
    build_model: Callable[[Any], Any] | None = None
    batch: Any = None

    def is_named_by(self, described: str) -> bool:
        """Return whether this text names the expected tensor."""
        return re.search(self.tensor, described) is not None


def _run(model: TransformerConfig | None = None, **parallel: Any) -> TrainConfig:
    """Return the config of a small run; `parallel` are fields of ParallelConfig."""
    parallel.setdefault("data_parallel_size", 1)
    return TrainConfig(
        model or _gpt(),
        ParallelConfig(**parallel),
        optimizer=OptimizerConfig(lr=3e-3),
        training=TrainingConfig(global_batch_size=8, microbatch_size=2),
    )


def _gpt(**forms: Any) -> GPTConfig:
    return GPTConfig(num_layers=2, hidden_size=32, num_heads=4, seq_len=20, vocab_size=61, **forms)


_TP = {"tensor_parallel_size": 2}
_SP = {**_TP, "sequence_parallel": True}
_PP = {"pipeline_parallel_size": 2}
_CP = {"context_parallel_size": 2}
_DP = {"data_parallel_size": 2}
_EP = {**_DP, "expert_parallel_size": 2, "expert_dispatch": "all_to_all"}
_ROUTED = {"num_experts": 4, "balance_loss": 0.5}


def _fault(
    plant: Callable[[], plants.Planted],
    axis: str,
    tensor: str,
    parallel: Mapping[str, Any],
    model: TransformerConfig | None = None,
) -> Fault:
    """Return a fault that a run shows; its name is the name of its plant."""
    return Fault(plant.__name__.replace("_", " "), plant, axis, tensor, _run(model, **parallel))


def _fault_of_module(
    plant: Callable[[], plants.Planted], tensor: str, build_model: Callable[[Any], Any], batch: Any
) -> Fault:
    return Fault(plant.__name__.replace("_", " "), plant, TENSOR, tensor, None, build_model, batch)


FAULTS = (
    _fault_of_module(
        plants.smoothing_by_the_local_vocabulary, "^loss of step 1", modules.smoothed_loss, modules.TOKENS
    ),
    _fault_of_module(plants.bias_on_every_rank, "^loss of step 1", modules.perceptron, modules.ROWS),
    _fault(plants.input_gradient_not_summed, TENSOR, r"^gradient of blocks\.1\.mlp_norm", {**_TP, "overlap": False}),
    _fault(
        plants.gathered_gradient_summed,
        TENSOR,
        r"^gradient of head_transform",
        _TP,
        BERTConfig(num_layers=2, hidden_size=32, num_heads=4, seq_len=20, vocab_size=61),
    ),
    _fault(
        plants.key_value_copies_not_summed,
        TENSOR,
        r"^gradient of blocks\.1\.attention\.query_key_value\.\w+\.(key|value)",
        _TP,
        _gpt(num_kv_heads=1),
    ),
    _fault(
        plants.head_norms_not_summed,
        TENSOR,
        r"^gradient of blocks\.1\.attention\.(query|key)_norm",
        _TP,
        _gpt(query_key_norm=True, position="rotary"),
    ),
    _fault(plants.padding_in_the_loss, TENSOR, "^loss of step 1", _TP),
    _fault(plants.embedding_not_summed, TENSOR, "^output of token_embedding", _TP),
    _fault(plants.head_gradient_not_summed, TENSOR, "^gradient of final_norm", _TP),
    _fault(plants.weights_drawn_by_the_shard, TENSOR, r"^weight token_embedding\.weight before", _TP),
    _fault(
        plants.attention_dropout_by_the_local_head,
        TENSOR,
        r"^output of blocks\.0\.attention in",
        _TP,
        _gpt(attention_dropout=0.1),
    ),
    _fault(plants.replicated_counted_by_every_rank, TENSOR, "^gradient norm of step 1", _TP),
    _fault(plants.norm_of_one_shard, TENSOR, "^gradient norm of step 1", _TP),
    _fault(plants.clipped_on_the_first_rank_only, TENSOR, "^weight .* after update 1", _TP),
    _fault(plants.sharded_biases_decayed, TENSOR, r"^weight blocks\.0\..*\.bias.* after update 1", _TP),
    _fault(plants.norm_gradient_not_summed, SEQUENCE, "^gradient of final_norm", _SP),
    _fault(plants.ranks_swapped_in_a_gather, SEQUENCE, r"^output of blocks\.0\.attention in", _SP),
    _fault(plants.positions_of_the_first_block, SEQUENCE, r"^output of blocks\.0\.attention_norm", _SP),
    _fault(plants.dropout_of_the_first_block, SEQUENCE, r"^output of blocks\.0\.attention_norm", _SP, _gpt(**_DROPOUT)),
    _fault(plants.output_bias_not_summed, SEQUENCE, r"^gradient of blocks\.1\.mlp\.projection\.bias", _SP),
    _fault(plants.last_rows_lost, OVERLAP, r"^output of blocks\.0\.attention in", _TP),
    _fault(
        plants.recomputed_with_other_dropout,
        RECOMPUTATION,
        r"^gradient of blocks\.1\.",
        _DP,
        _gpt(recompute="full", **_DROPOUT),
    ),
    _fault(context.divided_by_own_targets, CONTEXT, "^loss of step 1", _CP),
    _fault(context.positions_counted_by_the_rank, CONTEXT, r"^output of blocks\.0\.attention_norm", _CP),
    _fault(
        context.rotated_by_the_position_in_the_rank,
        CONTEXT,
        r"^output of blocks\.0\.attention in",
        _CP,
        _gpt(position="rotary"),
    ),
    _fault(
        context.dropout_by_the_position_in_the_rank,
        CONTEXT,
        r"^output of blocks\.0\.attention_norm",
        _CP,
        _gpt(**_DROPOUT),
    ),
    _fault(experts.expert_gradients_too_large, EXPERT, r"^gradient of blocks\.1\.mlp\.experts", _EP, _gpt(**_ROUTED)),
    _fault(experts.tokens_of_two_ranks_swapped, EXPERT, r"^output of blocks\.0\.mlp", _EP, _gpt(**_ROUTED)),
    _fault(experts.loads_of_own_positions, CONTEXT, "^loss of step 1", _CP, _gpt(**_ROUTED)),
    _fault(experts.router_gradient_not_summed, TENSOR, r"^gradient of blocks\.1\.mlp\.router", _TP, _gpt(**_ROUTED)),
    _fault(plants.averaged_over_replicas, DATA, "^gradient of final_norm", _DP),
    _fault(plants.sent_a_microbatch_early, DATA, "^gradient of final_norm", _DP),
    _fault(plants.last_bucket_not_sent, DATA, r"^gradient of (blocks\.0\.|\w+_embedding)", _DP),
    _fault(plants.dropout_by_the_replica, DATA, r"^output of blocks\.0\.attention_norm", _DP, _gpt(**_DROPOUT)),
    _fault(plants.weights_not_gathered, DATA, "^loss of step 2", _DP),
    _fault(plants.rows_of_another_replica, DATA, "^gradient of final_norm", _DP),
    _fault(plants.norm_of_own_rows, DATA, "^gradient norm of step 1", _DP),
    _fault(plants.summed_in_bfloat16, DATA, "^gradient of final_norm", _DP),
    _fault(plants.sharded_sums_averaged, DATA, "^gradient of final_norm", {**_DP, "zero_stage": 2}),
    _fault(plants.last_microbatch_kept, DATA, "^gradient of final_norm", {**_DP, "zero_stage": 2}),
    _fault(
        plants.copies_not_summed,
        DATA,
        "^gradient of final_norm",
        {"data_parallel_size": 4, "zero_stage": 2, "zero_shard_size": 2},
    ),
    _fault(plants.weights_of_the_start_gathered, DATA, "^loss of step 2", {**_DP, "zero_stage": 3}),
    _fault(plants.gathered_in_another_order, DATA, "^weight position_embedding before", {**_DP, "zero_stage": 3}),
    _fault(plants.divided_by_microbatches, MICROBATCHES, "^gradient of final_norm", _DP),
    _fault(plants.targets_of_another_microbatch, MICROBATCHES, "^loss of step 1", _PP),
    _fault(plants.tied_gradient_twice, PIPELINE, r"^gradient of token_embedding\.weight", _PP),
    _fault(plants.tied_gradient_not_summed, PIPELINE, r"^gradient of token_embedding\.weight", _PP),
    _fault(
        plants.deferred_product_lost,
        PIPELINE,
        r"^gradient of blocks\.1\.mlp\.projection\.weight",
        {**_PP, "schedule": "zb_h1"},
    ),
    _fault(plants.handed_back_twice, PIPELINE, r"^gradient of blocks\.0\.", _PP),
    _fault(plants.norm_of_one_stage, PIPELINE, "^gradient norm of step 1", _PP),
)


def fault(name: str) -> Fault:
    """Return the fault with this name."""
    return next(each for each in FAULTS if each.name == name)
