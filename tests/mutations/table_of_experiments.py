"""Table of mistakes in the experiments and their results: (name, file, old, new, tests)."""

_RUN = ("tests/experiments/test_run_experiment.py",)
_CHECKS = ("tests/experiments/test_trend_checks.py",)
_COMMAND = ("tests/experiments/test_experiment_command.py",)

MUTATIONS = (
    (
        "the state of an experiment leaves out the optimizer",
        "fused_megatron/experiments/measured_rank.py",
        'found["weights"] + found["gradients"] + found["optimizer"]',
        'found["weights"] + found["gradients"]',
        _RUN,
    ),
    (
        "a trend about some runs counts all of them",
        "fused_megatron/experiments/trend_checks.py",
        "statement.cases or tuple(measured)",
        "tuple(measured)",
        _CHECKS,
    ),
    (
        "values in order may be equal",
        "fused_megatron/experiments/trend_checks.py",
        "after > before * least",
        "after >= before * least",
        _CHECKS,
    ),
    (
        "report reads the result of another version",
        "fused_megatron/benchmarking/report/experiment_results.py",
        "check(version == VERSION",
        "check(True",
        _COMMAND,
    ),
    (
        "the shell completes one id",
        "fused_megatron/experiments/completion.py",
        'return " ".join(map(str, all_experiments()))',
        'return "106"',
        _COMMAND,
    ),
)
