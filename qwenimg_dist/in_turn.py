"""Work on a stream of items in threads, results in the order of the items, with a bounded number of them waiting.

Place in the flow: whoever waits for many files uses it: the scan, the decoding of pictures, `data verify`. For a list
whose results all fit in memory there is `data.pins.parallel`. Work that holds Python's lock gains nothing here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

_POLL_S: Final = 1.0

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_turn(
    action: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    threads: int,
    ahead: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[_Result]:
    """`map`; one thread is this one. At most `ahead` items (None: one more than threads) are begun and not yet taken.

    `tick` is called before each result, and about once a second while one is waited for. An error of `action` comes at
    its item's turn; what was not begun by then is not.
    """
    if threads <= 1:
        for item in items:
            tick()
            yield action(item)
        return
    waiting: deque[Future[_Result]] = deque()

    def first() -> _Result:
        tick()
        while not waiting[0].done():
            wait([waiting[0]], timeout=_POLL_S)
            tick()
        return waiting.popleft().result()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="in-turn")
    try:
        for item in items:
            waiting.append(pool.submit(action, item))
            if len(waiting) >= (threads + 1 if ahead is None else ahead):
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)
