"""gpurnn bench parallel: the model of the cost, and the figures made of what the processes report."""

import pytest

from bench.parallel import lines, summarize
from bench.parallel_cost import Link, fit_link, predict

LINK = Link(latency=1e-3, message=1e-5, bandwidth=125e6)  # 1 Gbit/s and 1 ms


def test_what_a_sum_costs():
    assert LINK.sum_seconds(1, 10**6) == 0
    assert LINK.sum_seconds(2, 10**6) == pytest.approx(2 * (1e-3 + 0.5e6 / 125e6))
    assert LINK.sum_seconds(10, 10**6) == pytest.approx(2 * (1e-3 + 8e-5 + 0.9e6 / 125e6))
    assert [LINK.exchange_seconds(ranks) for ranks in (1, 2, 1024)] == pytest.approx([0, 1e-3, 1e-2])


def test_the_link_that_made_the_times_is_found_again():
    sizes = [1 << 10, 1 << 16, 1 << 20, 1 << 24]
    found = fit_link(sizes, [LINK.sum_seconds(2, size) for size in sizes], 1e-5)
    assert (found.latency, found.bandwidth) == pytest.approx((1e-3, 125e6), rel=1e-9)


def test_more_processes_cost_more():
    efficiency = [predict(LINK, 0.1, 4_000_000, ranks)[1] for ranks in (1, 2, 8, 1024)]
    assert efficiency[0] == 1 and efficiency == sorted(efficiency, reverse=True)


def test_figures():
    def report(update, **more):
        return [{"update": update, "quick": update, "reduce": 0.01, "updates": 3, "bytes": 4000, "link": None} | more]

    sizes = [1 << 10, 1 << 20]
    link = {"sums": [[size, LINK.sum_seconds(2, size)] for size in sizes], "message": 1e-5}
    found = {"one": report(0.09), "apart": report(0.095), "weak": report(0.1, link=link), "strong": report(0.06),
             "torch one": report(0.1), "torch weak": report(0.2)}  # fmt: skip
    figures = summarize(found, 2)
    assert figures["weak efficiency"] == pytest.approx(0.9) and figures["strong efficiency"] == pytest.approx(0.75)
    assert figures["torch weak efficiency"] == 0.5 and figures["time in sums"] == pytest.approx(0.1)
    assert figures["machine"] * figures["group"] == pytest.approx(0.9)
    other = summarize(found, 2, "0.01,1e6")["predicted"]["1024"]
    assert other[0] > figures["predicted"]["1024"][0]
    assert len(list(lines(figures))) == 6 + 6 + 6
    for measured, far in ((0.19, False), (0.21, True), (0.049, True)):
        said = "\n".join(lines(figures | {"checked": (0.1, measured)}))
        assert ("differ by more than a factor of 2" in said) == far
