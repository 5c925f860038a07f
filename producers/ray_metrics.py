"""The figures of `produce` as Ray metrics, for the Prometheus endpoint that Ray has on each node.

Place in the flow: the driver's process makes one once Ray runs, and hands it to the progress display. Names in Ray:
`qwenimg_dist_produce_units`, `..._images` (opened), `..._kept`, `..._not_admitted` with the tag `reason`, all counted
since this driver started; and the present `..._images_per_second`, `..._units_left`, `..._seconds_left`.
"""

from __future__ import annotations

from typing import Final

from ray.util.metrics import Counter, Gauge

from producers.unit import UnitReport

PREFIX: Final = "qwenimg_dist_produce"


class RayGauges:
    """`Gauges` of the progress display. Needs a Ray that is initialised."""

    def __init__(self) -> None:
        self._units = Counter(f"{PREFIX}_units", "units brought up to date")
        self._images = Counter(f"{PREFIX}_images", "pictures opened")
        self._kept = Counter(f"{PREFIX}_kept", "rows kept, of the units brought up to date")
        self._lost = Counter(f"{PREFIX}_not_admitted", "rows not admitted, by reason", tag_keys=("reason",))
        self._images_per_s = Gauge(f"{PREFIX}_images_per_second", "pictures opened per second, lately")
        self._units_left = Gauge(f"{PREFIX}_units_left", "units still to do in this round")
        self._left_s = Gauge(f"{PREFIX}_seconds_left", "estimated time to the end of this round")

    def unit_done(self, report: UnitReport) -> None:
        self._units.inc(1)
        # Ray refuses to add nothing.
        for counter, value in ((self._images, report.decoded), (self._kept, report.num_kept)):
            if value:
                counter.inc(value)
        for reason, count in report.reasons.items():
            self._lost.inc(count, tags={"reason": reason})

    def state(self, *, images_per_s: float, units_left: int, left_s: float) -> None:
        self._images_per_s.set(images_per_s)
        self._units_left.set(units_left)
        self._left_s.set(left_s)
