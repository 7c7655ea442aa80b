"""Table of mistakes in the code, each with the tests that must detect it."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One edit that makes the code wrong.

    Attributes:
        name: of the mistake.
        file: path from the root of the repository.
        old: text that occurs exactly once in the file.
        new: its replacement.
        tests: node ids of pytest; at least one of the tests must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_PLAIN = ("tests/training/test_trainer.py::test_five_steps_are_those_of_a_plain_loop[2]",)
_KEYS = "tests/training/test_every_key.py::test_key"
_TRAINER = "fused_megatron/training/trainer.py"
_STEP_LOG = "fused_megatron/training/step_log.py"
_STEP = "fused_megatron/assembly/training_step.py"
_OPTIMIZER = "fused_megatron/data_parallel/optimizer.py"
_RULES = "fused_megatron/data_parallel/update_rules.py"
_RING = "fused_megatron/collectives/transport/host_ring.py"
_RING_TESTS = "tests/collectives/transport/test_host_ring.py"
_CONTEXT = ("tests/context_parallel/test_attention.py",)
_CONTEXT_MODEL = ("tests/models/test_stack.py::test_context_parallel_ranks_have_parts_of_one_sequence",)
_CONTEXT_RUNS = ("tests/training/test_context_parallel_layouts.py",)
_CONTEXT_MODELS = "tests/interop/test_context_parallel.py"
_ADAPTERS = "tests/interop/test_adapters.py::test_adapters"
_STAGES = ("tests/pipeline/run/test_stage_compute.py",)

MUTATIONS = (
    # A config key without effect, or a value that is one step late.
    Mutation(
        "eps is torch's default",
        _RULES,
        "            eps=config.eps,\n",
        "",
        (*_PLAIN, f"{_KEYS}[optimizer.eps]"),
    ),
    Mutation(
        "beta2 is torch's default",
        _RULES,
        "beta2=config.beta2",
        "beta2=0.999",
        (*_PLAIN, f"{_KEYS}[optimizer.beta2]"),
    ),
    Mutation(
        "vectors are decayed",
        _OPTIMIZER,
        "weight_decay if decayed else 0.0",
        "weight_decay",
        _PLAIN,
    ),
    Mutation(
        "Muon puts a matrix together from the first shard of every rank",
        "fused_megatron/data_parallel/whole_matrices.py",
        "offset.append(tp_rank * blocks // tp_size * size)",
        "offset.append(0 * size)",
        ("tests/data_parallel/test_whole_matrices.py",),
    ),
    Mutation(
        "Muon ignores the clip coefficient",
        "fused_megatron/data_parallel/muon.py",
        "[matrix.rows] * step.gradient_scale",
        "[matrix.rows] * 1.0",
        ("tests/data_parallel/test_muon.py::test_bfloat16_parameters_have_the_bits_of_torch",),
    ),
    Mutation(
        "the random bits of a shard begin with the first element",
        "fused_megatron/data_parallel/stochastic_state.py",
        "    first = sum(start * stride for start, stride in zip(box.offset, strides, strict=True))",
        "    first = 0",
        ("tests/data_parallel/test_stochastic_state.py::test_every_layout_has_the_same_bits",),
    ),
    Mutation(
        "the seed does not reach the order of the data",
        "fused_megatron/data/training_data.py",
        "corpus.train_dataset(seq_len, training.seed)",
        "corpus.train_dataset(seq_len, 1234)",
        (*_PLAIN, f"{_KEYS}[training.seed]"),
    ),
    Mutation(
        "the seed does not reach the weights",
        "fused_megatron/assembly/build.py",
        "seed=config.training.seed",
        "seed=1234",
        (*_PLAIN, f"{_KEYS}[training.seed]"),
    ),
    Mutation(
        "the seed does not reach dropout",
        "fused_megatron/models/stack.py",
        "        self.reset_dropout(seed)\n",
        "        self.reset_dropout(0)\n",
        (f"{_KEYS}[training.seed]",),
    ),
    Mutation(
        "the learning rate of the next step",
        _TRAINER,
        "learning_rate(step, training.num_steps",
        "learning_rate(step + 1, training.num_steps",
        _PLAIN,
    ),
    Mutation(
        "samples are counted by microbatch",
        _TRAINER,
        "self.progress.samples_consumed += training.global_batch_size",
        "self.progress.samples_consumed += training.microbatch_size",
        (*_PLAIN, f"{_KEYS}[training.global_batch_size]"),
    ),
    Mutation("gradients are not zeroed", _STEP, "    assembly.gradients.begin()\n", "", _PLAIN),
    Mutation(
        "gradients are not clipped",
        _STEP,
        "sums.gradient_scale(assembly.config.optimizer.clip_norm)",
        "sums.gradient_scale(0.0)",
        (*_PLAIN, f"{_KEYS}[optimizer.clip_norm]"),
    ),
    Mutation(
        "replicas read the same rows",
        "fused_megatron/data/training_data.py",
        "first = samples_consumed + dp_rank * count",
        "first = samples_consumed",
        _PLAIN,
    ),
    # Documents of packed samples.
    Mutation(
        "a document predicts the first token of the next",
        "fused_megatron/data/training_data.py",
        "inputs_and_targets(rows, starts)",
        "inputs_and_targets(rows)",
        ("tests/data/test_documents.py::test_batches_of_masked_documents", f"{_KEYS}[data.mask_documents]"),
    ),
    Mutation(
        "the loss is divided by the targets of whole samples",
        "fused_megatron/data/training_data.py",
        "            targets -= self.training.num_document_starts(samples_consumed, global_batch_size)\n",
        "            targets -= 0\n",
        ("tests/data/test_documents.py::test_batches_of_masked_documents",),
    ),
    Mutation(
        "empty documents count as starts",
        "fused_megatron/data/sample_index.py",
        "            if empty_before is not None:\n",
        "            if False:\n",
        ("tests/data/test_documents.py::test_documents_of_samples_are_seen_in_their_tokens",),
    ),
    Mutation(
        "every microbatch has the documents of the first",
        "fused_megatron/data/batch.py",
        "cumulative_lengths(starts)",
        "cumulative_lengths(self.document_starts[:size])",
        ("tests/data/test_documents.py::test_microbatches_and_positions_of_a_rank",),
    ),
    Mutation(
        "rotation ignores the positions of documents",
        "fused_megatron/models/stack.py",
        "rotary_tables(sequence, self.config, device=x.device, dtype=dtype, positions=positions)",
        "rotary_tables(sequence, self.config, device=x.device, dtype=dtype)",
        ("tests/models/test_gpt.py::test_packed_tokens_are_rotated_without_a_copy",),
    ),
    Mutation(
        "the position embedding ignores the positions of documents",
        "fused_megatron/models/stack.py",
        "if self.position_embedding is not None and positions is not None:",
        "if False:",
        ("tests/models/test_gpt.py::test_float64_model_is_exact",),
    ),
    Mutation(
        "every tensor-parallel rank counts the visible pairs",
        "fused_megatron/training/step_rows.py",
        'items() if axis != "dp")',
        'items() if axis == "pp")',
        ("tests/training/test_document_layouts.py",),
    ),
    # Wrong figures.
    Mutation(
        "tokens per second times the replicas",
        _STEP_LOG,
        "return self._config.training.global_batch_size * self._model.seq_len / seconds",
        "return 2 * self._config.training.global_batch_size * self._model.seq_len / seconds",
        ("tests/training/test_trainer.py::test_figures_are_those_computed_apart",),
    ),
    Mutation(
        "bits per byte in nats",
        "fused_megatron/training/evaluation.py",
        "loss_sum / math.log(2) / num_bytes",
        "loss_sum / num_bytes",
        ("tests/training/test_trainer.py::test_figures_are_those_computed_apart",),
    ),
    Mutation(
        "the speed of the last step, not of the run",
        "fused_megatron/training/train.py",
        "[len(losses) // 2]:,.0f} tokens/s",
        "[-1]:,.0f} tokens/s",
        ("tests/training/test_trainer.py::test_figures_are_those_computed_apart",),
    ),
    Mutation(
        "the time left is the time of the whole run",
        _STEP_LOG,
        "(self._config.training.num_steps - step) * seconds",
        "self._config.training.num_steps * seconds",
        ("tests/training/test_trainer.py::test_figures_are_those_computed_apart",),
    ),
    # Ranks that disagree or drift apart, and a NaN on one rank.
    Mutation(
        "kinds and bytes are not compared",
        _RING,
        "if theirs != own and self._disagreement is None:",
        "if False:",
        (f"{_RING_TESTS}::test_ranks_that_disagree",),
    ),
    Mutation(
        "any thread may use the group",
        _RING,
        "if self._num_begun and self._thread.is_alive():",
        "if False:",
        (f"{_RING_TESTS}::test_a_thread_or_a_forked_child_cannot_use_the_group",),
    ),
    Mutation(
        "a replica's NaN is its own",
        "fused_megatron/assembly/step_sums.py",
        "squares = assembly.share_of_squares()",
        "squares = assembly.share_of_squares().nan_to_num()",
        ("tests/training/test_trainer.py::test_a_gradient_that_is_nan_on_one_replica_ends_the_run",),
    ),
    Mutation(
        "the wrong rank is named",
        "fused_megatron/sharding/replicas.py",
        "if (digest == common) is same",
        "if digest == common",
        ("tests/sharding/test_replicas.py",),
    ),
    # Wrong tensors or messages.
    Mutation(
        "what is handed on is not copied",
        "fused_megatron/pipeline/run/action_loop.py",
        "t.detach().clone(memory_format=torch.contiguous_format).requires_grad_",
        "t.detach().requires_grad_",
        _STAGES,
    ),
    Mutation(
        "no gradient is a gradient of zeros",
        "fused_megatron/pipeline/run/stage_compute.py",
        "return [x.grad for x in inputs]",
        "return [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]",
        _STAGES,
    ),
    Mutation(
        "a receive stands where it is used",
        "fused_megatron/pipeline/schedule/lowering.py",
        "earliest[channel] = min(position, earliest.get(channel, position))",
        "earliest[channel] = position",
        ("tests/pipeline/schedule/test_lowering.py",),
    ),
    Mutation(
        "16-bit gradients are summed in 16 bits",
        "fused_megatron/collectives/conjugate_pairs.py",
        "dy.reshape(-1).to(torch.promote_types(dy.dtype, torch.float32))",
        "dy.reshape(-1)",
        ("tests/collectives/test_conjugate_pairs.py",),
    ),
    Mutation(
        "a tensor changed in place is the same input",
        "fused_megatron/interop/sequence_region.py",
        "stale = self._source is not x or self._version != version",
        "stale = self._source is not x",
        ("tests/interop/test_sequence_region.py",),
    ),
    Mutation(
        "gradients of own rows are not summed over the context-parallel ranks",
        "fused_megatron/interop/context_region.py",
        "SummedParameters(module, names, self.group).install([])",
        "SummedParameters(module, names, None).install([])",
        (f"{_CONTEXT_MODELS}::test_two_ranks",),
    ),
    Mutation(
        "the sum over a second axis replaces the sum over the first",
        "fused_megatron/interop/summed_parameters.py",
        "tuple(getattr(self.owner, name) for name in self.names)",
        "tuple(self.owner._parameters[name] for name in self.names)",
        ("tests/interop/test_summed_parameters.py",),
    ),
    Mutation(
        "the second sum leaves its tensor in the module",
        "fused_megatron/interop/summed_parameters.py",
        "always_call=True, prepend=True",
        "always_call=True",
        ("tests/interop/test_summed_parameters.py",),
    ),
    Mutation(
        "rows of ranks are joined in the order of the ranks",
        "fused_megatron/sharding/sequence_partition.py",
        "sorted(runs, key=lambda run: run[0])",
        "runs",
        (f"{_CONTEXT_MODELS}::test_two_ranks",),
    ),
    Mutation(
        "a layer that a checkpoint runs again attends by the former implementation",
        "fused_megatron/interop/context_region.py",
        "is not None:  # gradient checkpointing runs",
        "is None:  # gradient checkpointing runs",
        (f"{_CONTEXT_MODELS}::test_two_ranks",),
    ),
    Mutation(
        "packed documents of transformers are one document",
        "fused_megatron/interop/context_mask.py",
        "return causal, None if behind.all() else starts",
        "return causal, None",
        ("tests/interop/test_context_mask.py",),
    ),
    Mutation(
        "frozen parameters become trainable",
        "fused_megatron/interop/replacements.py",
        ", requires_grad=old.requires_grad)",
        ")",
        ("tests/interop/test_parallelize.py::test_frozen_parameters_stay_frozen",),
    ),
    Mutation(
        "gradients of whole adapters are not summed on blocks of the sequence",
        "fused_megatron/interop/preparation.py",
        "for module in self.adapters[layer.module].whole:",
        "for module in ():",
        (f"{_ADAPTERS}_that_were_made_before_train_save_and_merge_as_on_one_process",),
    ),
    Mutation(
        "DoRA's norms beside a row layer are those of one rank's columns",
        "fused_megatron/interop/sharded_adapters.py",
        "if self.sums_columns:",
        "if False:",
        (f"{_ADAPTERS}_that_were_made_before_train_save_and_merge_as_on_one_process",),
    ),
    Mutation(
        "an adapter's dropout draws masks of one rank's part",
        "fused_megatron/interop/sharded_adapters.py",
        "return -1 if host.input_is_parallel else None",
        "return None",
        (f"{_ADAPTERS}_that_were_made_before_train_save_and_merge_as_on_one_process",),
    ),
    Mutation(
        "GPT-2's dropouts are swapped",
        "fused_megatron/hugging_face/gpt2.py",
        '"attention_dropout": settings.number("attn_pdrop", 0.1)',
        '"attention_dropout": settings.number("embd_pdrop", 0.1)',
        ("tests/hugging_face/test_known_families.py::test_every_dropout_comes_over_and_goes_back",),
    ),
    Mutation(
        "Llama's dropout is lost",
        "fused_megatron/hugging_face/llama.py",
        '        "attention_dropout": settings.number("attention_dropout", 0.0),\n',
        "",
        ("tests/hugging_face/test_known_families.py::test_every_dropout_comes_over_and_goes_back",),
    ),
    Mutation(
        "top_k is one token short",
        "fused_megatron/inference/sampling.py",
        "logits.topk(sampling.top_k, dim=-1)",
        "logits.topk(max(1, sampling.top_k - 1), dim=-1)",
        ("tests/inference/test_generation.py::test_top_k_draws_from_the_likeliest_k_tokens",),
    ),
    Mutation(
        "unknown keys of a file are skipped",
        "fused_megatron/config/config_file.py",
        '                problems.append(_unknown("key", name, known))\n',
        "",
        ("tests/config/test_config_file.py",),
    ),
    Mutation(
        "a box without elements must begin inside",
        "fused_megatron/sharding/box.py",
        "return 0 in self.shape or all(",
        "return all(",
        ("tests/sharding/test_box.py", "tests/checkpoint/test_load.py"),
    ),
    # Context parallelism.
    Mutation(
        "queries have the positions of a rank's rows, not of the sequence",
        "fused_megatron/context_parallel/attention_plan.py",
        "tiles=visibility.tiles(partition.layouts[rank].ranges, ((0, partition.seq_len),)),",
        "tiles=visibility.tiles(((0, partition.sizes[rank]),), ((0, partition.seq_len),)),",
        _CONTEXT,
    ),
    Mutation(
        "the gradient of the query misses one hop",
        "fused_megatron/context_parallel/ring.py",
        "        found = attend(received, hop.tiles, index)\n",
        "        found = attend(received, hop.tiles if index < 2 else (), index)\n",
        _CONTEXT,
    ),
    Mutation(
        "own keys are attended once, not in two halves",
        "fused_megatron/context_parallel/attention_plan.py",
        "cut = _cut_before(tile, row) if row > 0 else ((tile,), ())",
        "cut = ((), ())",
        _CONTEXT,
    ),
    Mutation(
        "returned gradients are added to the first rows",
        "fused_megatron/context_parallel/ring.py",
        "            sums[start:stop] += part[row : row + stop - start]\n",
        "            sums[row : row + stop - start] += part[row : row + stop - start]\n",
        _CONTEXT,
    ),
    Mutation(
        "the heads of a rank drop as those of the first rank",
        "fused_megatron/context_parallel/attention.py",
        "return _FirstHead(self.dropout, heads.query_heads(heads.me)[0])",
        "return _FirstHead(self.dropout, 0)",
        _CONTEXT,
    ),
    Mutation(
        "a message's keys are numbered as the sender's rows",
        "fused_megatron/context_parallel/attention_plan.py",
        "        shifts.append((start, stop, first - start))\n",
        "        shifts.append((start, stop, 0))\n",
        _CONTEXT,
    ),
    Mutation(
        "all keys travel, needed or not",
        "fused_megatron/context_parallel/attention_plan.py",
        "            received = _needed(tiles)\n",
        "            received = ((0, _length(rows[source])),)\n",
        ("tests/context_parallel/test_attention_plan.py",),
    ),
    Mutation(
        "the keys of a hop are sent when they are needed",
        "fused_megatron/context_parallel/ring.py",
        """        following = keys.start(index + 1)
        attention.add(spread(own[0]), spread(own[1]), hop.tiles, keys.padding_of(index))
""",
        """        attention.add(spread(own[0]), spread(own[1]), hop.tiles, keys.padding_of(index))
        following = keys.start(index + 1)
""",
        ("tests/context_parallel/test_attention_plan.py::test_keys_of_the_next_hop_travel_under_attention",),
    ),
    Mutation(
        "a partition has equal tokens, but not equal work",
        "fused_megatron/sharding/sequence_partition.py",
        "if max(loads) * num_ranks <= (1 + _EVEN_ENOUGH) * total or total == 0:",
        "if True:",
        ("tests/sharding/test_sequence_partition.py",),
    ),
    # Context-parallel ranks of a model and of a run.
    Mutation(
        "positions are counted in the rank, not in the sequence",
        "fused_megatron/models/stack.py",
        "return partition.layouts[group_rank(self.layout.cp_group)]",
        "return SequenceLayout.whole(partition.sizes[group_rank(self.layout.cp_group)])",
        _CONTEXT_MODEL,
    ),
    Mutation(
        "a rank drops the positions of the first rank",
        "fused_megatron/models/stack.py",
        "masks = self._masks(batch, sequence, batch_slice)",
        "masks = self._masks(batch, sequence if partition is None else partition.layouts[0], batch_slice)",
        _CONTEXT_MODEL,
    ),
    Mutation(
        "attention drops the tiles of the first position",
        "fused_megatron/models/dropout.py",
        "first_head, tile.query_position, tile.key_position)",
        "first_head, 0, tile.key_position)",
        _CONTEXT_MODEL,
    ),
    Mutation(
        "a validation counts the positions of one context-parallel rank",
        "fused_megatron/training/evaluation.py",
        "sum_over_ranks_(totals, mesh.replicas.group)",
        "sum_over_ranks_(totals, mesh.dp_group)",
        _CONTEXT_RUNS,
    ),
    Mutation(
        "context-parallel ranks keep their own gradients",
        "fused_megatron/data_parallel/shared_state.py",
        "_replica_set(mesh.replicas, shards, copies, placements)",
        '_replica_set(mesh["dp"], mesh["dp"], copies, placements)',
        _CONTEXT_RUNS,
    ),
)
