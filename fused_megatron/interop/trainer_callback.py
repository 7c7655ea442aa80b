"""Callback by which transformers' Trainer, and what inherits it, trains models after fm.parallelize.

This module imports transformers, so fused_megatron imports it at the first use of fm.TrainerCallback.
"""

import sys
from types import FrameType
from typing import Any

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.accelerator import share_layers
from fused_megatron.interop.class_change import become
from fused_megatron.interop.full_state import full_state_dict
from fused_megatron.interop.whole_head import show_whole_heads
from fused_megatron.optional_packages import install_command
from fused_megatron.sharding.replica_shards import replica_shards, whole_models

try:
    import transformers
except ImportError as error:
    raise ImportError(f"fm.TrainerCallback needs transformers: {install_command('transformers')}") from error


class TrainerCallback(transformers.TrainerCallback):
    """Makes transformers' Trainer train a model after fm.parallelize or fm.shard_data_parallel; also TRL's trainers.

        model = fm.parallelize(AutoModelForCausalLM.from_pretrained(folder), fm.init_mesh(tensor_parallel_size=2))
        trainer = Trainer(model, TrainingArguments(..), train_dataset=data, callbacks=[fm.TrainerCallback()])
        trainer.train()

    Losses equal the losses of one process. When the Trainer is made, its Accelerator becomes an fm.Accelerator:

        samples       ranks that share layers get the same; data-parallel ranks divide them (4 ranks with
                      tensor_parallel_size=2 are 2 data-parallel ranks), and average gradients
        clipping      max_grad_norm bounds the norm of the whole model, which the logs show as grad_norm
        checkpoints   have full weights and full optimizer states, as one process writes them; one process and any
                      number of ranks resume from them, and from_pretrained loads them
        save_model    writes the full model. All ranks must call it, as Trainer itself does
        evaluation    counts each sample once

    TRL's trainers compute their losses from the weight of the head: it is gathered for them in each forward.

    After shard_data_parallel pass optimizers=(fm.ShardedOptimizer(model, ..), None). Optimizers that compute with whole
    matrices (Adafactor, Muon) are wrong for shards; elementwise optimizers (AdamW, SGD) are right.

    Args:
        trainer: a Trainer that was made without the callback. None: the Trainer that gets this callback.

    Raises:
        InputError: when the Trainer is made, if its model was not parallelized and there are several ranks.

    Communication: in a step as fm.clip_grad_norm_; in saving as fm.full_state_dict, also for each tensor of the
        optimizer's state.
    Memory: in saving, the full model and the full state of the optimizer on the CPU of rank 0. In resuming, Trainer
        loads the full state of the optimizer on every rank.
    """

    def __init__(self, trainer: Any = None) -> None:
        if trainer is not None:
            share_trainer(trainer)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change the Trainer that calls this."""
        share_trainer(_calling_trainer())


class ShardedTrainer:
    """Methods of Trainer that need all ranks, for a Trainer of a model in shards."""

    model: nn.Module
    optimizer: Any
    args: Any

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        """Save the full model. All ranks must call."""
        if state_dict is None:
            state_dict = full_state_dict(self.model, rank0_only=not self.args.save_on_each_node)
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the full state of the optimizer. All ranks must call."""
        with self.optimizer.gathered():
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_from_checkpoint(self, *args: Any, **options: Any) -> None:
        """Load full weights into the shards. All ranks must call."""
        with whole_models([self.model]):
            super()._load_from_checkpoint(*args, **options)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """Load full weights into the shards. All ranks must call."""
        with whole_models([self.model]):
            super()._load_best_model()  # type: ignore[misc]


def share_trainer(trainer: Any) -> None:
    """Make a Trainer work with its model in shards.

    Raises:
        InputError: the model was not parallelized, and there are several ranks.
    """
    model = trainer.model
    is_parallel = any("parallel_report" in vars(module) for module in model.modules())  # also inside PEFT's wrapper
    if trainer.accelerator.num_processes > 1 and not is_parallel and replica_shards(model) is None:
        raise InputError(
            f"fm.TrainerCallback: {type(model).__name__} is not in shards (fm.parallelize(model, mesh) before the "
            "Trainer is made; a model that ranks only copy needs no callback)"
        )
    if any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__):
        if getattr(replica_shards(model), "keeps_rows_only", False):
            raise InputError(
                f"zero_stage=3: {type(trainer).__name__} reads the weight of the head outside of the head's forward, "
                "where a rank has only its rows (zero_stage=2)"
            )
        show_whole_heads(model)
    share_layers(trainer.accelerator, model)
    trainer.gather_function = trainer.accelerator.gather_for_metrics  # Trainer keeps the method itself
    become(trainer, ShardedTrainer)


def _calling_trainer() -> Any:
    """Return the Trainer whose code called a callback: transformers passes callbacks no reference to it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, transformers.Trainer):
            return found
        frame = frame.f_back
    raise InputError("fm.TrainerCallback() got no Trainer (fm.TrainerCallback(trainer) changes a Trainer made already)")
