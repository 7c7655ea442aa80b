"""The command `fused-megatron generate`, which continues prompts at any tensor- and pipeline-parallel size."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Annotated

import tyro

from fused_megatron.assembly.build import build_mesh, build_model
from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.checkpoint import load_checkpoint, newest_checkpoint
from fused_megatron.checkpoint.model_state import buffer_boxes, parameter_boxes
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checkpoint.run_state import read_run_state
from fused_megatron.checks import InputError, check
from fused_megatron.config import MODEL_FAMILIES, ParallelConfig, TrainConfig, TransformerConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.data.tokenizer import Tokenizer, load_tokenizer
from fused_megatron.hugging_face.import_model import imported_config
from fused_megatron.hugging_face.tokenizer_files import end_tokens
from fused_megatron.inference.generation import continue_prompts, reads_at_once
from fused_megatron.inference.sampling import Sampling
from fused_megatron.inference.text_stream import TextStream
from fused_megatron.models import cut_stages
from fused_megatron.models.stage_cut import check_cut
from fused_megatron.training.device_settings import on_device
from fused_megatron.training.process_group import ThisRank, joined_ranks, on_every_rank, world_group
from fused_megatron.training.progress import Reporter

SEPARATOR = "\n---\n"
"""Text between the texts of several prompts."""


@dataclass(frozen=True)
class GenerateArguments:
    """Arguments of `fused-megatron generate`.

    A text ends where the model ends its document, or after num_tokens. Without --pipeline-parallel-size all ranks share
    each layer.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder of `fused-megatron train` or `convert from-hf`."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """Text to continue."""
    more_prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPT ...]")] = ()
    """Further texts, continued at the same time."""
    num_tokens: int = 100
    """Most tokens to add."""
    temperature: float = 0.8
    """Divisor of the logits; 0 takes the likeliest token."""
    top_k: int = 50
    """Draw only from the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens whose probabilities sum to top_p; 1 for all."""
    seed: int = 0
    """Seed of the draws of the first text; the next ones have the next seeds."""
    pipeline_parallel_size: int = 1
    """Ranks that share the depth of the model; the others share each layer."""

    def __post_init__(self) -> None:
        check(all(text != "" for text in self.prompts), "prompt='' must hold at least one character")
        check(self.num_tokens >= 0, f"num_tokens={self.num_tokens} must be 0 or more")
        check(
            self.pipeline_parallel_size >= 1, f"pipeline_parallel_size={self.pipeline_parallel_size} must be 1 or more"
        )
        _ = self.sampling

    @property
    def prompts(self) -> tuple[str, ...]:
        """All texts to continue."""
        return (self.prompt, *self.more_prompts)

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def generate_text(arguments: GenerateArguments, show: Callable[[str], None] | None = None) -> str:
    """Return the prompts and their continuations, the same on every rank, with SEPARATOR between several.

    Args:
        arguments: of the command.
        show: rank 0 calls it with each piece of the result as soon as it is known: the first text token by token, the
            next texts when they and the texts before them are complete.

    Raises:
        InputError: no run, no good checkpoint, or a model that cannot be divided over the ranks.
    """
    run = RunFolder(arguments.run)
    with joined_ranks(ParallelConfig().timeout_s) as this_rank:
        config, tokenizer, ends = on_every_rank(lambda: _open_run(run, this_rank, arguments.pipeline_parallel_size))
        length = on_every_rank(lambda: _longest(run, config.model))
        prompts = [tokenizer.encode_prompt(text).tolist() for text in arguments.prompts]
        group = world_group()
        newest = newest_checkpoint(run.checkpoints, group=group)
        checkpoint = on_every_rank(lambda: _require(newest, run))
        vocab_size = read_run_state(checkpoint)["vocab_size"]
        model_config = dataclasses.replace(config.model, vocab_size=vocab_size, seq_len=length)
        config = on_device(dataclasses.replace(config, model=model_config), this_rank.device.type)
        model = _load(config, checkpoint, this_rank)
        slow = _slow(config.model, max(map(len, prompts)) + arguments.num_tokens)
        Reporter(this_rank.rank == 0, 1).say(
            f"{checkpoint}, {this_rank.world_size} {this_rank.device.type} rank(s){slow}"
        )
        show = show if this_rank.rank == 0 else None
        texts = _Texts(tokenizer, arguments.prompts, prompts, ends, show or (lambda piece: None))
        continue_prompts(
            model,
            prompts,
            arguments.num_tokens,
            arguments.sampling,
            end_tokens=ends,
            device=this_rank.device,
            on_tokens=texts.add,
        )
        return texts.finish()


class _Texts:
    """Texts of several prompts that grow at the same time, shown one after the other."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        prompts: Sequence[Sequence[int]],
        ends: Collection[int],
        show: Callable[[str], None],
    ) -> None:
        self._streams = [TextStream(tokenizer, prompt) for prompt in prompts]
        self._texts, self._ends, self._show = list(texts), ends, show
        self._complete = [False] * len(prompts)
        self._current = 0
        show(texts[0])

    def add(self, tokens: list[int | None]) -> None:
        """Take the new token of each text; None for a text that has ended."""
        for index, token in enumerate(tokens):
            if token is None:
                continue
            if token in self._ends:
                self._end(index)
            else:
                self._append(index, self._streams[index].add(token))
        self._show_complete()

    def finish(self) -> str:
        """Show and return what there is."""
        for index in range(len(self._texts)):
            self._end(index)
        self._show_complete()
        return SEPARATOR.join(self._texts)

    def _append(self, index: int, piece: str) -> None:
        self._texts[index] += piece
        if index == self._current and piece:
            self._show(piece)

    def _end(self, index: int) -> None:
        if not self._complete[index]:
            self._append(index, self._streams[index].finish())
            self._complete[index] = True

    def _show_complete(self) -> None:
        """While the shown text is complete, go on to the next one."""
        while self._current < len(self._texts) - 1 and self._complete[self._current]:
            self._current += 1
            self._show(SEPARATOR + self._texts[self._current])


def _load(config: TrainConfig, checkpoint: Path, this_rank: ThisRank) -> ModelStages:
    mesh = build_mesh(config, this_rank.device.type)
    num_stages = config.parallel.pipeline_parallel_size
    model = ModelStages(
        cut_stages(config.model, num_stages),
        range(num_stages),
        mesh.pp_group,
        lambda span: build_model(config, mesh, this_rank.device, span),
    )
    boxes = parameter_boxes(model.parameters_by_name())
    for stage in model.stages.values():
        boxes |= buffer_boxes(stage)
    load_checkpoint(checkpoint, boxes, group=world_group(), allow_extra=("optimizer.*",))
    return model


def _slow(model: TransformerConfig, num_tokens: int) -> str:
    """Return a note if a text can grow beyond what a key-value cache serves; "" if it cannot."""
    fast = reads_at_once(model)
    if num_tokens <= fast:
        return ""
    return (
        f"; beyond {fast} tokens each token is slow: it costs a forward over the last {model.seq_len} (model.seq_len)"
    )


def _longest(run: RunFolder, model: TransformerConfig) -> int:
    """Return the length that the model reads: of an imported one its full length, if training has shorter sequences."""
    imported = imported_config(run) if model.position == "rotary" else None
    return model.seq_len if imported is None else max(model.seq_len, imported.seq_len)


def _require(checkpoint: Path | None, run: RunFolder) -> Path:
    if checkpoint is None:
        raise InputError(f"{run.checkpoints} holds no checkpoint that verifies (train first)")
    return checkpoint


def _open_run(
    run: RunFolder, this_rank: ThisRank, pipeline_parallel_size: int
) -> tuple[TrainConfig, Tokenizer, Collection[int]]:
    run.check_exists()
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
    ranks = this_rank.world_size
    check(
        ranks % pipeline_parallel_size == 0,
        f"pipeline_parallel_size={pipeline_parallel_size} must divide the number of ranks, {ranks}",
    )
    tp_size = ranks // pipeline_parallel_size
    _check_divides(config.model, tp_size, ranks)
    # The layout of training does not matter: all ranks of a stage share each of its layers by tensor parallelism.
    check_cut(config.model.num_layers, pipeline_parallel_size)
    layout = ParallelConfig(
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=pipeline_parallel_size,
        data_parallel_size=1,
        # The same ranks share as many experts as can be divided over them.
        expert_parallel_size=gcd(tp_size, config.model.num_experts or 1),
    )
    tokenizer = load_tokenizer(run.tokenizer)
    return dataclasses.replace(config, parallel=layout), tokenizer, end_tokens(run, tokenizer)


def _check_divides(model: TransformerConfig, tp_size: int, num_ranks: int) -> None:
    """Raise with the sizes that fit, if the heads or the feed-forward cannot be divided over tp_size ranks."""

    def fits(ranks: int) -> bool:
        shared = ranks % model.kv_heads == 0 and model.query_key_norm_over != "all_heads"
        heads = model.num_heads % ranks == 0 and (model.kv_heads % ranks == 0 or shared)
        dense = model.num_experts is None or len(model.expert_blocks) < model.num_layers
        return heads and not (dense and model.ffn_size % ranks) and model.shared_ffn_size % ranks == 0

    if not fits(tp_size):
        sizes = [ranks for ranks in range(1, model.num_heads + 1) if fits(ranks)]
        raise InputError(
            f"num_heads={model.num_heads}, num_kv_heads={model.kv_heads} and ffn_hidden_size={model.ffn_size} cannot "
            f"be divided over tensor_parallel_size={tp_size} (sizes that can: {', '.join(map(str, sizes))}): start "
            f"another number of ranks, or let them share the depth: --pipeline-parallel-size {num_ranks}"
        )
