"""Configs whose real steps calibrate the constants of a machine: small GPTs that differ in what their time goes to."""

import dataclasses
from typing import Any

from fused_megatron.config import GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """A GPT and its batch on one replica.

    Attributes:
        layers, hidden, heads, vocabulary, seq_len: of the model.
        samples: in a microbatch.
        microbatches: in a step.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    seq_len: int
    samples: int
    microbatches: int = 1

    def config(self, dtype: str, **parallel: Any) -> TrainConfig:
        """Return the config of this shape in a layout."""
        layout = ParallelConfig(**{"data_parallel_size": 1, **parallel}, timeout_s=300.0)
        batch = self.samples * self.microbatches * (layout.data_parallel_size or 1)
        return TrainConfig(
            GPTConfig(
                num_layers=self.layers,
                hidden_size=self.hidden,
                num_heads=self.heads,
                seq_len=self.seq_len,
                vocab_size=self.vocabulary,
            ),
            layout,
            optimizer=OptimizerConfig(lr=1e-4),
            training=TrainingConfig(global_batch_size=batch, microbatch_size=self.samples, dtype=dtype),
        )


CPU_SHAPES = {
    "many small ops": Shape(4, 64, 4, 256, 32, 2),
    "many microbatches": Shape(2, 128, 4, 512, 64, 2, 4),
    "a middle model": Shape(4, 256, 4, 2048, 128, 4),
    "wide products": Shape(2, 512, 8, 2048, 128, 4),
    "long sequences": Shape(2, 128, 4, 512, 512, 2),
    "a large vocabulary": Shape(1, 256, 4, 16384, 128, 4),
    "many tokens": Shape(2, 256, 4, 4096, 256, 8),
}
GPU_SHAPES = {
    "many small ops": Shape(8, 512, 8, 8192, 512, 1, 2),
    "a middle model": Shape(8, 2048, 16, 51200, 2048, 2),
    "wide products": Shape(4, 4096, 32, 51200, 2048, 2),
    "long sequences": Shape(4, 1024, 8, 51200, 16384, 1),
    "a large vocabulary": Shape(1, 2048, 16, 131072, 2048, 4),
}
_WHOLE = "a middle model"
"""Shape whose layers tensor-parallel ranks share, or whose stages pipeline ranks do."""


def calibration_configs(device: str, ranks: int) -> dict[str, TrainConfig]:
    """Return the configs to measure, by name.

    Args:
        device: "cpu" or "cuda".
        ranks: of the process group. One rank for each shape computes the same; with several ranks they are replicas,
            and one shape also runs with shared layers and as a pipeline.
    """
    dtype = "float32" if device == "cpu" else "bfloat16"
    shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    found = {name: shape.config(dtype, data_parallel_size=ranks, zero_stage=0) for name, shape in shapes.items()}
    if ranks == 1:
        return found
    whole = shapes[_WHOLE]
    found["shared optimizer state"] = whole.config(dtype, data_parallel_size=ranks)
    if whole.heads % ranks == 0:
        found["shared layers"] = whole.config(dtype, tensor_parallel_size=ranks)
    if whole.layers >= ranks:
        pipeline = dataclasses.replace(whole, samples=max(1, whole.samples // 2), microbatches=2 * ranks)
        found["a pipeline"] = pipeline.config(dtype, pipeline_parallel_size=ranks)
    return found
