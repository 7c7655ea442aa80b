"""TrainConfig: all sections of a run's settings, and the checks across sections."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fused_megatron.checks import check, check_divisible, check_multiple_or_divisor
from fused_megatron.config.data import DataConfig
from fused_megatron.config.expert_checks import check_expert_parallel
from fused_megatron.config.model import GPTConfig, TransformerConfig
from fused_megatron.config.optimizer import OptimizerConfig
from fused_megatron.config.parallel import ParallelConfig
from fused_megatron.config.training import TrainingConfig

# Every layer is an object, also in the cut of a pipeline and in a prediction: more would fill any memory.
MOST_LAYERS = 100_000


@dataclass(frozen=True)
class TrainConfig:
    """The settings of `fused-megatron train`. Each field is a section of the TOML file."""

    model: TransformerConfig = field(default_factory=GPTConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        layers = self.model.num_layers
        check(layers <= MOST_LAYERS, f"num_layers={layers} must be at most {MOST_LAYERS}")
        tp = self.parallel.tensor_parallel_size
        check_divisible("num_heads", self.model.num_heads, "tensor_parallel_size", tp, either=True)
        check_multiple_or_divisor("num_kv_heads", self.model.kv_heads, "tensor_parallel_size", tp, either=True)
        if len(self.model.expert_blocks) < layers:
            check_divisible("ffn_hidden_size", self.model.ffn_size, "tensor_parallel_size", tp, either=True)
        check_expert_parallel(self.model, self.parallel)
        if self.parallel.sequence_parallel:
            check_divisible("seq_len", self.model.seq_len, "tensor_parallel_size", tp, either=True)
        if self.parallel.context_parallel_size > 1:
            self._check_context_parallel()
        check(
            self.model.traits.predicts != "masked_tokens" or self.model.seq_len >= 3,
            f"seq_len={self.model.seq_len} must be at least 3: [CLS], a token and [SEP]",
        )
        check(
            self.model.traits.predicts != "masked_tokens" or not self.data.mask_documents,
            f"mask_documents=True must be false for model.family={self.model.family!r}: it needs a model that predicts "
            f"the next token, such as 'gpt'",
        )
        check(
            self.model.attention_dropout_kernel == "exact" or not self.data.mask_documents,
            "attention_dropout_kernel='fast' must be 'exact' with mask_documents=True: documents are computed tile by "
            "tile, without S x S tensors in any case",
        )
        check_divisible(
            "global_batch_size", self.training.global_batch_size, "microbatch_size", self.training.microbatch_size
        )
        if self.training.cuda_graphs != "off":
            self._check_cuda_graphs()
        check(
            not self.training.read_metrics_late or self.optimizer.kind == "adamw",
            f"read_metrics_late=True must be false with optimizer.kind={self.optimizer.kind!r}, whose update waits for "
            "the gradient norm (or set optimizer.kind='adamw')",
        )

    def _check_cuda_graphs(self) -> None:
        """Raise if a block does not do the same for each microbatch, or if several microbatches are under way."""
        model, parallel = self.model, self.parallel
        reasons = {
            f"model.family={model.family!r}, whose masks differ": model.traits.predicts == "masked_tokens",
            f"hidden_dropout={model.hidden_dropout}, which drops other elements each time": model.hidden_dropout > 0,
            f"attention_dropout={model.attention_dropout}, which drops other elements each time": (
                model.attention_dropout > 0
            ),
            "recompute='full' (recompute='selective' works)": model.recompute == "full",
            f"num_experts={model.num_experts}, whose loads differ": model.num_experts is not None,
            "mask_documents=True, whose masks differ": self.data.mask_documents,
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}, where several microbatches are under way": (
                parallel.pipeline_parallel_size > 1
            ),
            f"context_parallel_size={parallel.context_parallel_size}": parallel.context_parallel_size > 1,
            f"zero_stage={parallel.zero_stage}, whose gradients have new addresses each time": (
                (parallel.zero_stage or 0) > 1
            ),
        }
        reason = next((text for text, holds in reasons.items() if holds), None)
        check(reason is None, f"cuda_graphs={self.training.cuda_graphs!r} must be 'off' with {reason}")

    def _check_context_parallel(self) -> None:
        parallel, multiple = self.parallel, self.parallel.row_multiple
        ranks, method = parallel.context_parallel_size, parallel.context_parallel_method
        least = f"context_parallel_size={ranks}" + f" x tensor_parallel_size={multiple}" * (multiple > 1)
        check(
            self.model.seq_len >= ranks * multiple,
            f"seq_len={self.model.seq_len} must be at least {least}: every rank needs a position",
        )
        check(
            self.model.attention_dropout_kernel == "exact",
            f"attention_dropout_kernel={self.model.attention_dropout_kernel!r} must be 'exact' with {least}: context "
            "parallelism attends tile by tile, without S x S tensors in any case",
        )
        heads = self.model.num_heads // parallel.tensor_parallel_size
        check(
            method != "all_to_all" or heads % ranks == 0,
            f"num_heads / tensor_parallel_size = {heads} must be divisible by context_parallel_size={ranks} with "
            f"context_parallel_method='all_to_all' (any number of heads: 'ring', 'all_gather')",
        )

    def for_device(self, device_type: str) -> TrainConfig:
        """Return the config with the values that a device of this type decides, as TrainingConfig.for_device."""
        return replace(self, training=self.training.for_device(device_type))

    @property
    def most_positions(self) -> int:
        """Positions of the context-parallel rank that holds most of a sequence: the same number with every method."""
        multiple, ranks = self.parallel.row_multiple, self.parallel.context_parallel_size
        return multiple * -(-self.model.seq_len // (multiple * ranks))

    def replica_counts(self, dp_size: int) -> tuple[int, int]:
        """Return how many ranks hold the same dense weights and the same experts; equal in a model without experts."""
        replicas = self.parallel.replicas(dp_size)
        return replicas, replicas if self.model.num_experts is None else self.parallel.expert_replicas(dp_size)

    def check_data_parallel(self, dp_size: int) -> None:
        """Raise unless dp_size replicas get the same number of full microbatches, and can be cut by zero_shard_size."""
        self.parallel.check_shard_size(dp_size)
        check_divisible(
            "global_batch_size",
            self.training.global_batch_size,
            f"microbatch_size={self.training.microbatch_size} x data_parallel_size={dp_size}, i.e. by their product",
            self.training.microbatch_size * dp_size,
        )
        number = self.training.global_batch_size // self.training.microbatch_size // dp_size
        ranks, schedule = self.parallel.pipeline_parallel_size, self.parallel.schedule
        check(
            schedule != "pipedream" or number == 1,
            f"schedule='pipedream' updates after each microbatch: global_batch_size={self.training.global_batch_size} "
            f"must be microbatch_size x data_parallel_size={self.training.microbatch_size * dp_size}, or pipedream_2bw",
        )
        check(
            schedule != "pipedream_2bw" or number >= ranks,
            f"schedule='pipedream_2bw' needs as many microbatches as pipeline ranks: {number} must be at least {ranks} "
            "(raise global_batch_size)",
        )
