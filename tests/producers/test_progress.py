"""What is shown while producing: units, the present rate, the main reasons, the time left."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.console import Console

from producers import progress
from producers.progress import ProduceProgress, show_reasons, show_time
from producers.unit import UnitReport


def report(unit: int, decoded: int = 10, **reasons: int) -> UnitReport:
    lost = sum(reasons.values())
    return UnitReport(
        unit=unit,
        num_rows=decoded + lost,
        num_kept=decoded,
        decoded=decoded,
        latents=decoded,
        captions=1,
        reasons=reasons,
    )


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_where_there_is_no_terminal(clock: Clock) -> None:
    out = io.StringIO()
    with ProduceProgress(Console(file=out, width=200)) as shown:
        shown.begin(4)
        for unit in range(4):
            clock.now += 20
            shown.unit_done(report(unit, too_small=unit, blurry=1, duplicate=2, no_caption=1))
    lines = out.getvalue().splitlines()
    assert lines[0] == (
        "1/4 units, 0.5 images/s, 4 not admitted (duplicate 2, blurry 1, no_caption 1), 20 s, about 60 s left"
    )
    assert lines[3].startswith("4/4 units, 0.5 images/s, 22 not admitted (duplicate 8, too_small 6, ")
    assert lines[3].endswith(", ...), 80 s, about 0 s left")


def test_the_rate_is_that_of_the_last_minutes(clock: Clock) -> None:
    class Gauges:
        rates: list[float] = []  # noqa: RUF012
        left: list[float] = []  # noqa: RUF012
        units = 0

        def unit_done(self, report: UnitReport) -> None:
            self.units += 1

        def state(self, *, images_per_s: float, units_left: int, left_s: float) -> None:
            self.rates.append(images_per_s)
            self.left.append(left_s)

    gauges = Gauges()
    with ProduceProgress(Console(file=io.StringIO())) as shown:
        shown.gauges.append(gauges)
        shown.begin(40)
        clock.now += 600  # models were loaded
        shown.unit_done(report(0))
        for unit in range(1, 20):
            clock.now += 10
            shown.unit_done(report(unit))
    assert gauges.units == 20
    assert gauges.rates[0] == pytest.approx(10 / 600)
    assert gauges.rates[-1] == pytest.approx(1.0)
    assert gauges.left[-1] == pytest.approx(200.0)


def test_figures_in_words() -> None:
    assert show_reasons(Counter()) == "0 not admitted"
    assert show_reasons(Counter(blurry=1200)) == "1,200 not admitted (blurry 1,200)"
    assert [show_time(seconds) for seconds in (0.4, 119, 125, 7199, 7260, 90_000)] == [
        "0 s",
        "119 s",
        "2 min",
        "2 h 00 min",
        "2 h 01 min",
        "25 h 00 min",
    ]
