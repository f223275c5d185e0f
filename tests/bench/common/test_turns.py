"""prunekern.machine.measure.interleaved as the bench scripts use it: who follows whom, what is timed, what counts."""

import statistics

from prunekern.machine.measure import interleaved


def test_turns_begin_one_call_further_on():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    interleaved(calls, 0.0, 4, turning=True)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # once to warm up


def test_a_clock_of_ones_own_and_what_counts_of_its_times():
    times = {"a": iter([9.0, 3.0, 1.0, 2.0, 7.0]), "b": iter([9.0, 4.0, 4.0, 4.0, 5.0])}
    calls = {name: (lambda name=name: next(times[name])) for name in times}
    found = interleaved(calls, 0.0, 4, timed=lambda call: call(), of=statistics.median)
    assert found == {"a": 2.5, "b": 4.0}  # 9.0 was the call that warms up


def test_seconds_for_each_call():
    told = []
    interleaved({name: lambda: None for name in "abcd"}, 0.02, 1, progress=lambda share: told.append(share))
    alone = len(told)
    told.clear()
    interleaved({name: lambda: None for name in "abcd"}, 0.02, 1, each=True, progress=lambda share: told.append(share))
    assert len(told) > 2 * alone and told == sorted(told) and told[-1] > 0.9


def test_progress_of_turns_that_are_counted():
    told = []
    interleaved({"a": lambda: None}, 0.0, 4, progress=told.append)
    assert told == [0.25, 0.5, 0.75, 1.0]
