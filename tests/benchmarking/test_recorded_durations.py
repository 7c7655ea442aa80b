"""Start here when benchmarks of a GPU report times that were not measured."""

from fused_megatron.benchmarking.recorded_durations import RecordedDurations


def test_each_call_takes_the_next_duration():
    recorded = RecordedDurations()
    recorded.load([1.0, 2.5])
    taken = []
    for _ in range(2):
        start = recorded.clock()
        recorded.advance()
        taken.append(recorded.clock() - start)
    assert taken == [1.0, 2.5]
