"""Table of mistakes in the update rule of PipeDream and PipeDream-2BW: (name, file, old, new, tests)."""

_STASHED = "fused_megatron/pipeline/run/stashed_weights.py"
_UPDATES = "fused_megatron/assembly/stage_updates.py"
_ENGINE = ("tests/pipeline/run/test_executor_asynchronous.py",)
_RULE = ("tests/assembly/test_overlapping_steps.py::test_losses_and_weights_are_of_the_update_rule[pp2]",)
_RUNS = "tests/training/test_asynchronous_layouts.py"
_RESUME = (f"{_RUNS}::test_a_resumed_run_equals_the_whole_one_bit_for_bit",)

MUTATIONS = (
    (
        "a microbatch uses the newest weights",
        _STASHED,
        "versions[max(0, len(versions) - 1 - age)]",
        "versions[-1]",
        _ENGINE,
    ),
    (
        "2bw is two updates late",
        "fused_megatron/pipeline/schedule/action.py",
        "        return 1\n    return schedule.num_stages",
        "        return 2\n    return schedule.num_stages",
        _ENGINE,
    ),
    (
        "the next version overwrites the one before",
        _STASHED,
        "[value.clone() for value in self._newest]",
        "list(self._newest)",
        _ENGINE,
    ),
    (
        "one version more is kept",
        _STASHED,
        "if len(self._older) == self.behind:",
        "if len(self._older) > self.behind:",
        ("tests/pipeline/run/test_stashed_weights.py",),
    ),
    (
        "the first step's divisor is of all steps",
        "fused_megatron/pipeline/run/action_loop.py",
        "self.loss_divisors[microbatch * len(self.loss_divisors) // self.num_microbatches]",
        "self.loss_divisors[0]",
        _ENGINE,
    ),
    (
        "the optimizer updates the memory of the first version",
        "fused_megatron/assembly/assemble.py",
        "        self.optimizer.follow(own)\n",
        "",
        _RULE,
    ),
    (
        "overlapping updates have the first learning rate",
        _UPDATES,
        "assembly.update(self._lrs[index], scale, refused)",
        "assembly.update(self._lrs[0], scale, refused)",
        _RULE,
    ),
    (
        "a stage clips by its ranks' own gradients",
        _UPDATES,
        "        sum_over_ranks_(squares, self._group)\n",
        "",
        ("tests/assembly/test_overlapping_steps.py",),
    ),
    (
        "an update that is not finite is made",
        _UPDATES,
        "norm.isfinite().logical_not_()",
        "norm.isfinite().logical_and_(torch.zeros_like(norm) > 1)",
        ("tests/assembly/test_overlapping_steps.py::test_a_stage_keeps_its_weights_once_its_gradients_are_not_finite",),
    ),
    (
        "a resumed run begins with the newest weights",
        "fused_megatron/training/stashed_versions.py",
        "assembly.executor.stashed[stage].make_older(number)",
        "assembly.executor.stashed[stage].make_older(0)",
        _RESUME,
    ),
    (
        "older weights are not counted",
        "fused_megatron/planning/rank_memory.py",
        "size * self._versions[rank] * ",
        "size * ",
        (f"{_RUNS}::test_memory_has_every_version_once",),
    ),
)
