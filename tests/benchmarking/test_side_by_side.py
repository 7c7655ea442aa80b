"""Start here when a benchmark times a wrong result, or its verdict does not follow from its rounds."""

import pytest
import torch

from fused_megatron.benchmarking.side_by_side import (  # fmt: skip
    BOUND,
    COMPILE,
    EAGER,
    OURS,
    Bars,
    Case,
    Comparison,
    Rounds,
    Spread,
    compare,
    side_by_side,
)
from fused_megatron.benchmarking.timing_devices import CpuDevice

TWO_ROUNDS = Rounds(budget_s=0, fewest=2, most=2)


class Clock(CpuDevice):
    """Device on which each step takes the time that it states."""

    def seconds(self, function):
        return function()

    def peak_bytes(self, function):
        function()
        return 7


def square(x):
    return x * x


def case(ours=square, dtype=torch.float32, **changes):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    return Case("square", "[4, 5]", (x,), ours=ours, unfused=square, num_bytes=5 * x.nbytes, **changes)


def measured(case):
    return compare(case, CpuDevice(), rounds=TWO_ROUNDS, compile_backend="eager")


def test_every_provider_is_timed_in_every_round():
    result = measured(case())
    assert list(result.seconds) == [OURS, EAGER, COMPILE, BOUND]
    assert all(len(seconds) == 2 for seconds in result.seconds.values())
    assert result.faults == {} and result.notes == {}
    assert result.name == "square [4, 5] float32"
    assert result.peak_bytes[EAGER] >= 4 * 5 * 4  # y and the gradient


def test_wrong_results_are_said_and_not_timed():
    for wrong in (
        lambda x: x * x * 1.001,
        lambda x: x * x.detach(),
        lambda x: x * x * torch.nan,
        lambda x: (x * x)[:1],
    ):
        result = measured(case(wrong))
        assert result.faults[OURS].startswith(("wrong: ", "failed: "))
        assert OURS not in result.seconds and EAGER in result.seconds
        assert result.ratio(EAGER) is None and result.verdicts() == []


def test_a_rounding_is_no_fault():
    result = measured(case(lambda x: (x.float() * x.float()).to(x.dtype), dtype=torch.bfloat16))
    assert result.faults == {}


def test_peers_may_be_missing_fail_or_be_inexact():
    def missing():
        raise ImportError("No module named 'peer'\nmore")

    def failing():
        def run(x):
            raise ValueError("it does not compile\nand says much more")

        return run

    def overwrites():
        def run(x):
            y = x * x
            x.data.zero_()
            return y

        return run

    peers = {"missing": missing, "failing": failing, "inexact": lambda: lambda x: x * x * 1.01, "rude": overwrites}
    result = measured(case(peers=peers))
    assert result.faults["missing"] == "not installed (No module named 'peer')"
    assert result.faults["failing"] == "failed: ValueError: it does not compile"
    assert "writes over its inputs" in result.faults["rude"]
    assert result.notes == {"inexact": "inexact: output 0 1.0%, gradient 0 1.0% off"}
    assert set(result.seconds) == {OURS, EAGER, COMPILE, BOUND, "inexact"}


def test_what_is_exact_may_depend_on_the_draw():
    def exact(inputs, upstream, outputs, gradients):
        assert outputs[0].sum() > 0, "nothing is kept"
        return outputs[0].double(), gradients[0].double()

    assert measured(case(exact=exact)).faults == {}
    assert measured(case(lambda x: x * x * 0, exact=exact)).faults == {OURS: "wrong: nothing is kept"}


def test_without_checks_there_is_only_time():
    result = compare(case(), CpuDevice(), rounds=TWO_ROUNDS, compile_backend="eager", check=False)
    assert list(result.seconds) == [OURS, EAGER, COMPILE] and result.peak_bytes == {}


def test_rounds_are_interleaved_and_their_order_moves_on():
    calls = []

    def step(name):
        def run():
            calls.append(name)
            return 1.0

        return run

    seconds = side_by_side({name: step(name) for name in "abc"}, Clock(), Rounds(budget_s=12, fewest=1, most=9))
    assert {name: len(s) for name, s in seconds.items()} == {"a": 4, "b": 4, "c": 4}  # 12 s, at 3 s a round
    assert "".join(calls[-12:]) == "abcbcacababc"
    assert side_by_side({}, Clock()) == {}


def test_ratios_are_taken_pair_by_pair():
    # In the second round the machine was ten times slower: the ratio does not change.
    result = Comparison("op", "[1]", "float32", 1_000_000, Bars(eager=2, compile=2, bound=1.5, memory=1 / 8))
    result.seconds = {OURS: [1e-3, 1e-2, 1e-3], EAGER: [2e-3, 2e-2, 2e-3], COMPILE: [1e-3, 1e-2, 1e-3]}
    result.seconds[BOUND] = [1e-3, 1e-2, 0.5e-3]
    assert result.ratio(EAGER) == Spread(2, 2, 2)
    assert result.ratio("nobody") is None
    assert result.gb_per_s() == pytest.approx(1.0)
    result.peak_bytes = {OURS: 1, EAGER: 4}
    assert result.verdicts() == [
        ("eager >= 2x", 2.0, "even"),
        ("compile >= 2x", 1.0, "MISSED"),
        ("bound <= 1.5x", 1.0, "even"),  # the last round took twice as long as the copy
        ("memory <= 1/8", 0.25, "MISSED"),
    ]
    result.seconds[EAGER] = [3e-3, 3e-2, 3e-3]
    assert result.verdicts()[0] == ("eager >= 2x", 3.0, "met")
    assert [result.verdict(name) for name in (EAGER, COMPILE, "nobody")] == ["faster", "even", None]
    result.seconds[COMPILE] = [0.8e-3, 0.8e-2, 0.9e-3]
    assert result.verdict(COMPILE) == "SLOWER"


def test_the_bar_against_the_best_of_all_others():
    seconds = {"ours": [1.0, 1.0, 1.0], "far": [3.0, 3.1, 2.9], "near": [1.2, 1.25, 1.3], "bound": [0.1, 0.1, 0.1]}
    result = Comparison("gpt", "tp=2", "float32", None, Bars(best=1.3), seconds)
    assert result.best_other() == "near"
    assert result.verdicts() == [("near >= 1.3x", 1.25, "even")]
    assert Comparison("gpt", "tp=2", "float32", None, Bars(best=1.3), {"ours": [1.0]}).verdicts() == []


def test_even_is_what_two_runs_may_differ_by_and_what_the_spread_includes():
    words = ("above", "below")
    for spread, word in (
        (Spread(1.05, 1.09, 1.2), "even"), (Spread(1.05, 1.12, 1.2), "above"), (Spread(0.9, 1.5, 2), "even"),
        (Spread(0.7, 0.8, 0.9), "below"), (Spread(0.7, 0.92, 0.95), "even"),
    ):  # fmt: skip
        assert spread.beside(1, words) == word


def test_forward_and_backward_have_their_own_times():
    result = measured(case())
    assert set(result.forward_seconds) == {OURS, EAGER, COMPILE}
    assert result.phases_ms(OURS) is not None and result.phases_ms(BOUND) is None
    known = Comparison("op", "[1]", "float32", None, Bars(), {OURS: [3e-3]}, forward_seconds={OURS: [1e-3]})
    assert [phase.median for phase in known.phases_ms(OURS)] == pytest.approx([1.0, 2.0])
    # x * x: one product forward, two products and a sum backward.
    assert result.model_flops == 4 * 5 * 4 and result.intensity() == pytest.approx(4 * 20 / (5 * 80))


def test_a_product_has_no_copy_beside_it():
    result = measured(case(compute_bound=True))
    assert list(result.seconds) == [OURS, EAGER, COMPILE] and result.num_bytes and not result.traffic


def test_rates_are_those_of_a_rank():
    def on(ranks, seconds, tokens=1000, flops=4_000_000):
        known = {"seconds": {OURS: [seconds]}, "ranks": ranks, "tokens": tokens, "model_flops": flops}
        return Comparison("GPT", "tp", "float32", None, Bars(), **known)

    one, two = on(1, 1e-3), on(2, 1e-3, tokens=1500, flops=7_000_000)
    assert two.gflop_per_s() == pytest.approx(3.5) and two.tokens_per_s() == pytest.approx(1.5e6)
    assert two.efficiency(one) == pytest.approx(3.5 / 4)
    one.model_flops = two.model_flops = None
    assert two.efficiency(one) == pytest.approx(0.75)


def test_percentiles():
    assert Spread.of([float(n) for n in range(11)]) == Spread(2, 5, 8)
    assert Spread.of([3.0]) == Spread(3, 3, 3)
