"""The command `fused-megatron generate`, which continues a prompt at any tensor-parallel size."""

import dataclasses
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import torch
import tyro

from fused_megatron.assembly.build import build_mesh, build_model
from fused_megatron.checkpoint import load_checkpoint, newest_checkpoint
from fused_megatron.checkpoint.model_state import buffer_boxes, parameter_boxes
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checkpoint.run_state import read_run_state
from fused_megatron.checks import InputError, check
from fused_megatron.config import MODEL_FAMILIES, ParallelConfig, TrainConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.data.tokenizer import Tokenizer, load_tokenizer
from fused_megatron.inference.generation import generate
from fused_megatron.training.process_group import ThisRank, joined_ranks, on_every_rank, world_group
from fused_megatron.training.progress import Reporter


@dataclass(frozen=True)
class GenerateArguments:
    """Arguments of `fused-megatron generate`."""

    run: tyro.conf.Positional[Path]
    """Run folder of `fused-megatron train`."""
    prompt: tyro.conf.Positional[str]
    """Text to continue."""
    num_tokens: int = 100
    """Tokens to add."""
    temperature: float = 0.8
    """Divisor of the logits; 0 takes the likeliest token."""
    top_k: int = 50
    """Draw only from the k likeliest tokens; 0 for all."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        check(self.prompt != "", "prompt='' must hold at least one character")
        check(self.num_tokens >= 0, f"num_tokens={self.num_tokens} must be 0 or more")
        check(self.temperature >= 0, f"temperature={self.temperature} must be 0 or more")
        check(self.top_k >= 0, f"top_k={self.top_k} must be 0 or more")


def generate_text(arguments: GenerateArguments) -> str:
    """Return the prompt and its continuation, the same on every rank. All ranks share the layers by tensor parallelism.

    Raises:
        InputError: no run, no good checkpoint, or heads that cannot be divided over the ranks.
    """
    run = RunFolder(arguments.run)
    with joined_ranks(ParallelConfig().timeout_s) as this_rank:
        config, tokenizer = on_every_rank(lambda: _open_run(run, this_rank))
        tokens = tokenizer.encode_prompt(arguments.prompt)
        group = world_group()
        newest = newest_checkpoint(run.checkpoints, group=group)
        checkpoint = on_every_rank(lambda: _require(newest, run))
        vocab_size = read_run_state(checkpoint)["vocab_size"]
        mesh = build_mesh(config, this_rank.device.type)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
        model = build_model(config, mesh, this_rank.device)
        boxes = parameter_boxes(dict(model.named_parameters())) | buffer_boxes(model)
        load_checkpoint(checkpoint, boxes, group=group, allow_extra=("optimizer.*",))
        Reporter(this_rank.rank == 0, 1).say(f"{checkpoint}, {this_rank.world_size} {this_rank.device.type} rank(s)")
        start = torch.tensor([list(tokens)], dtype=torch.int64, device=this_rank.device)
        result = generate(
            model,
            start,
            arguments.num_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
        return tokenizer.decode(result[0].tolist())


def _require(checkpoint: Path | None, run: RunFolder) -> Path:
    if checkpoint is None:
        raise InputError(f"{run.checkpoints} holds no checkpoint that verifies (train first)")
    return checkpoint


def _open_run(run: RunFolder, this_rank: ThisRank) -> tuple[TrainConfig, Tokenizer]:
    check(run.config.exists(), f"run={run.path} is no run folder: it has no {run.config.name}")
    check(
        run.tokenizer.exists(),
        f"run={run.path} has no {run.tokenizer.name}: it was trained on token ids, so there is no text to generate",
    )
    config = load_config(run.config)
    family, able = config.model.family, [name for name, traits in MODEL_FAMILIES.items() if traits.generates]
    check(
        family in able,
        f"run={run.path} holds a {family.upper()}, which predicts masked tokens and cannot continue a text: only a run "
        f"of model.family={' or '.join(map(repr, able))} can",
    )
    # The layout of training does not matter: all present ranks share each layer by tensor parallelism.
    layout = ParallelConfig(
        tensor_parallel_size=this_rank.world_size,
        data_parallel_size=1,
        # The same ranks share as many experts as can be divided over them.
        expert_parallel_size=gcd(this_rank.world_size, config.model.num_experts or 1),
    )
    return dataclasses.replace(config, parallel=layout), load_tokenizer(run.tokenizer)
