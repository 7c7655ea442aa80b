"""Table of mistakes that cost time on a GPU, small sums and waits of the host: (name, file, old, new, tests)."""

_STEP_SUMS = "fused_megatron/assembly/step_sums.py"
_STEP_TESTS = "tests/assembly/test_training_step.py"
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
        "fused_megatron/assembly/training_step.py",
        "refused = sums.refusal(num_refusing)",
        "refused = sums.refusal(num_refusing).zero_()",
        (f"{_STEP_TESTS}::test_a_refused_step_changes_nothing",),
    ),
    (
        "experts' loads are kept in a step that is refused",
        "fused_megatron/assembly/training_step.py",
        "assembly.expert_loads.update(sums.expert_loads, refused)",
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
)
