"""Which pages of a cache are free, held or findable by what they contain."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class PagePool:
    """Reference counts, contents and free pages; all on the host.

    A page is free, held by one or more tables, or idle: held by none, but still findable by its
    content. Idle pages are taken only when no free one is left, least recently used first, and a
    page never before idle ones that follow it in a published sequence: nobody would find those.
    """

    def __init__(self, num_pages: int):
        # Taken from the end, so the lowest first, and again in the order of their use.
        self._free = list(reversed(range(num_pages)))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.holders = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._content_of: dict[int, tuple[bytes, bytes | None]] = {}  # key, key of the page before

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """Takes ``count <= num_free`` pages, held once each."""
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Counts one more holder of each."""
        for page in pages:
            self.holders[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Counts one holder less of each; those of one sequence are given in its order."""
        for page in reversed(pages):
            self.holders[page] -= 1
            if self.holders[page]:
                continue
            if page not in self._content_of:
                self._free.append(page)
            # A page may go idle after those before it: if they had left its sequence earlier, or
            # if the sequence has them in pages of its own. They must outlive it all the same.
            before = page
            while before in self._content_of and not self.holders[before]:
                self._idle[before] = None
                self._idle.move_to_end(before)
                before = self._page_of.get(self._content_of[before][1])

    def publish(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """Makes the first pages of a sequence findable, except where their content is already."""
        for page, key, before in zip(pages, keys, [None, *keys], strict=False):
            if self._page_of.setdefault(key, page) == page:
                self._content_of[page] = key, before

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest findable prefix."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def contradicts(self, page: int, key: bytes) -> bool:
        """Whether a page is findable by another content."""
        return page in self._content_of and self._content_of[page][0] != key

    def is_shared(self, page: int, leaving: int = 0) -> bool:
        """Whether a page must not be written to: it is findable, or has more than one holder even
        once ``leaving`` of them have left."""
        return page in self._content_of or self.holders[page] - leaving > 1

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        key, _ = self._content_of.pop(page)
        del self._page_of[key]
        return page


def content_keys(tokens: np.ndarray, page_size: int) -> Iterator[bytes]:
    """One key for each full page: of its tokens and, through the key before, all earlier ones.

    A cryptographic hash, as tokens may come from anybody: equal keys mean equal tokens.
    """
    key = b""
    for end in range(page_size, len(tokens) + 1, page_size):
        key = hashlib.sha256(key + tokens[end - page_size : end].tobytes()).digest()
        yield key
