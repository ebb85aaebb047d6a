"""Who holds which page of KV memory. The device only obeys the tables made from this."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class Pool:
    """`size` pages with reference counts: every page is free or held."""

    def __init__(self, size: int):
        self.size = size
        self.holders = [0] * size
        self._free = list(range(size - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free page, now held once."""
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page that is held."""
        assert self.holders[page] > 0, f"page {page} is free and cannot be shared"
        self.holders[page] += 1

    def release(self, pages: Iterable[int | None]) -> None:
        """One holder fewer of each page; the last one frees it."""
        for page in pages:
            if page is None:
                continue
            assert self.holders[page] > 0, f"page {page} was released twice"
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self._free.append(page)


@dataclass(frozen=True)
class PageGroup:
    """The pages of one state group: how many tokens a page holds, how many pages there are, and the window."""

    name: str
    page_size: int
    pages: int
    window: int | None = None

    def first(self, read: int) -> int:
        """The first page that the token at position `read`, or any later one, can still see."""
        return 0 if self.window is None else max(0, read - self.window + 1) // self.page_size

    def need(self, read: int, end: int) -> int:
        """Pages held at once to read positions `read` to `end`."""
        return -(-end // self.page_size) - self.first(read)
