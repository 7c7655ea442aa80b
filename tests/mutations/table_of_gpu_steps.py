"""Table of mistakes that cost time on a GPU, small sums and waits of the host: (name, file, old, new, tests)."""

_STEP_SUMS = "fused_megatron/assembly/step_sums.py"
_STEP_TESTS = "tests/assembly/test_training_step.py"
_GRAPH_TESTS = "tests/models/test_block_graphs.py"
_PARTS = ("tests/sharding/test_partial_gradients.py",)

MUTATIONS = (
    (
        "gradients by parts are summed in backward and by the buckets",
        "fused_megatron/sharding/partial_gradients.py",
        "        sum_over(group)\n    return True\n",
        "        sum_over(group)\n    return False\n",
        _PARTS,
    ),
    (
        "the buckets leave gradients by parts as they are",
        "fused_megatron/data_parallel/reduction.py",
        "        self._sum_parts()\n",
        "",
        _PARTS,
    ),
    (
        "rotary frequencies are copied from the host",
        "fused_megatron/models/rotary.py",
        "_frequencies(sequence.seq_len, config, device)",
        '_frequencies(sequence.seq_len, config, torch.device("cpu")).to(device)',
        ("tests/models/test_host_waits.py",),
    ),
    (
        "weights change in a step that is refused",
        _STEP_SUMS,
        "message[2 : 2 + num_refusing].any())",
        "message[2 : 2 + num_refusing].any()).zero_()",
        (f"{_STEP_TESTS}::test_a_refused_step_changes_nothing",),
    ),
    (
        "experts' loads are kept in a step that is refused",
        "fused_megatron/assembly/training_step.py",
        "assembly.expert_loads.update(sums.expert_loads, sums.refused)",
        "assembly.expert_loads.update(sums.expert_loads)",
        (f"{_STEP_TESTS}::test_a_refused_step_changes_nothing",),
    ),
    (
        "the host waits for the sums before the update",
        _STEP_SUMS,
        'message.to("cpu", non_blocking=True)',
        "message.cpu()",
        (f"{_STEP_TESTS}::test_the_host_waits_once_at_the_end_of_a_step",),
    ),
    (
        "a view with gaps is copied to the GPU",
        "fused_megatron/data/batch.py",
        "part.contiguous().pin_memory()",
        "part.pin_memory()",
        (f"{_STEP_TESTS}::test_the_host_waits_once_at_the_end_of_a_step",),
    ),
    (
        "a step is begun before the refused one is known",
        "fused_megatron/assembly/training_step.py",
        "            sums.refused.logical_or_(refused_before)\n",
        "            pass\n",
        ("tests/training/test_trainer.py::test_no_weight_changes_after_a_step_that_is_not_finite",),
    ),
    (
        "a checkpoint is written before its step is finished",
        "fused_megatron/training/trainer.py",
        "not any(interval and step % interval == 0 for interval in intervals)",
        "True",
        ("tests/training/test_trainer.py::test_metrics_that_are_read_late_are_the_same",),
    ),
    (
        "the thread reads beyond the last step",
        "fused_megatron/training/trainer.py",
        "if step + 1 < training.num_steps else None",
        "if step < training.num_steps else None",
        ("tests/training/test_trainer.py::test_a_thread_reads_the_rows_of_the_next_step",),
    ),
    (
        "what was read ahead is taken for another position",
        "fused_megatron/data/read_ahead.py",
        "if self._ahead not in (None, position):",
        "if False:",
        ("tests/data/test_read_ahead.py::test_a_jump_reads_what_is_asked_for",),
    ),
    (
        "a graph replays other shapes",
        "fused_megatron/models/block_graphs.py",
        "                value == wanted.get(name),\n",
        "                True,\n",
        (f"{_GRAPH_TESTS}::test_another_call_than_the_captured_one_is_refused",),
    ),
    (
        "a graph replays in evaluation",
        "fused_megatron/models/block_graphs.py",
        "if not (self._block.training and torch.is_grad_enabled()):",
        "if False:",
        (f"{_GRAPH_TESTS}::test_evaluation_runs_the_block_itself",),
    ),
    (
        "gradients of a refused update count as zeroed",
        "fused_megatron/assembly/training_step.py",
        "self.assembly.gradients.were_zeroed = False",
        "pass",
        (f"{_STEP_TESTS}::test_a_refused_step_changes_nothing",),
    ),
    (
        "gradients of other rows count as zeroed",
        "fused_megatron/assembly/assemble.py",
        "zeroes = refused is not None and self.gradients.has_own_only",
        "zeroes = refused is not None",
        ("tests/training/test_trainer.py::test_five_steps_are_those_of_a_plain_loop[2]",),
    ),
    (
        "gradients of a backward after the update count as zeroed",
        "fused_megatron/data_parallel/reduction.py",
        "        self.were_zeroed = False\n        standing",
        "        standing",
        (f"{_STEP_TESTS}::test_the_update_sets_the_gradients_to_0",),
    ),
)
