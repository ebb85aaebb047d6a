"""Pages whose contents are known, in a tree: a request that begins like an earlier one finds what that one has read.

A node is one page of tokens below the pages before it, looked up by the tokens themselves, so nothing can collide.
The tree holds its pages like any sequence does. A page that nobody else holds is *idle*: it stays until its pool runs
dry, and the least recently used goes first (the radix tree of SGLang, Zheng et al., 2024, with pages for edges).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from jaxinfer.scheduler.pages import PageGroup, Pool

LOOK = 16  # so many pages below a node are compared token by token


@dataclass(eq=False, slots=True)
class Node:
    """A page of tokens, and where each group keeps it (None: a window group has dropped it).

    Fewer tokens than a page: a tail. Only these are known; its owner may be writing behind them. Without a parent: the
    tree has forgotten it.
    """

    key: Any  # the tokens; of a namespace's root, the namespace
    parent: Node | None = field(repr=False)
    pages: dict[str, int | None] = field(default_factory=dict)
    below: OrderedDict[Any, Node] = field(default_factory=OrderedDict, repr=False)  # least recently used first


@dataclass(frozen=True)
class Match:
    """The first `length` tokens are known, full pages down to `node`: `pages` has one entry for each of them (None: no
    window shows it any more). `copies`, (group, page): the match ends inside these; they are to be copied into pages
    of one's own. Every page in here is held once for the caller, who releases it."""

    length: int
    node: Node | None
    pages: dict[str, list[int | None]]
    copies: tuple[tuple[str, int], ...] = ()


class PrefixTree:
    """The pools of all state groups, and the pages whose contents are known: found again by what they hold.

    Whoever holds a page also holds those before it, and releases them together; so in a group without window, idle
    pages are ordered from the leaves up, and only leaves are evicted. The exception are sequences that have read the
    same tokens at the same time: one copy is in the tree, and whoever has the other may extend a node without holding
    its page. Such a node can be evicted from above pages that are in use: the tree then forgets those, and their
    holders keep them. That way every idle page can be had, always.
    """

    def __init__(self, groups: Iterable[PageGroup]):
        self.groups = tuple(groups)
        sizes = {group.page_size for group in self.groups}
        assert len(sizes) == 1, f"one tree needs one page size, not {sorted(sizes)}"
        self.page_size = sizes.pop()
        self.pools = {group.name: Pool(group.pages) for group in self.groups}
        self.pages = {group.name: 0 for group in self.groups}  # held by the tree
        self.evicted = 0  # pages taken from the tree because no other was left
        self._windows = [group for group in self.groups if group.window is not None]
        self._windowed = {group.name for group in self._windows}
        self._nodes: dict[str, list[Node | None]] = {group.name: [None] * group.pages for group in self.groups}
        self._idle: dict[str, OrderedDict[int, None]] = {group.name: OrderedDict() for group in self.groups}
        self._top = Node(None, None)  # of all namespaces

    # Pages.

    def obtainable(self, group: str) -> int:
        """Pages that `take` can give: the free ones and the idle ones."""
        return self.pools[group].free + len(self._idle[group])

    def take(self, group: str) -> int | None:
        """A page, now held once; None if every page is in use."""
        pool = self.pools[group]
        if not pool.free:
            if not self._idle[group]:
                return None
            self._evict(group)
        return pool.take()

    def release(self, group: str, pages: Iterable[int | None]) -> None:
        """One holder fewer of each page. The pages of a sequence are released at once, or from the last to the first;
        except those of a window group, of which the first are needed least."""
        pool, nodes, idle = self.pools[group], self._nodes[group], self._idle[group]
        for page in pages if group in self._windowed else reversed(tuple(pages)):
            if page is None:
                continue
            node = nodes[page]
            assert node is None or pool.holders[page] > 1, f"page {page} was released by somebody who does not hold it"
            pool.release((page,))
            if node is not None and pool.holders[page] == 1:
                idle[page] = None
                self._touch(group, node)

    # Contents.

    def match(self, namespace: Hashable, tokens: Sequence[int], most: int) -> Match:
        """The longest known beginning of `tokens`, of at most `most` tokens, that every group can restore."""
        size, most = self.page_size, min(most, len(tokens))
        root = self._top.below.get(namespace)
        if root is None:
            return Match(0, None, {group.name: [] for group in self.groups})
        path = [root]
        for start in range(0, most - size + 1, size):
            child = path[-1].below.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            path[-1].below.move_to_end(child.key)
            path.append(child)
        runs = {group.name: self._runs(group.name, path) for group in self._windows}
        full = next(n for n in range(len(path) - 1, -1, -1) if self._shown(runs, n, size * n))
        end, source = self._inside(path, runs, tokens, most, full)
        path = path[: end // size + 1]
        pages: dict[str, list[int | None]] = {}
        for group in self.groups:
            first = group.first(end)
            pages[group.name] = [node.pages[group.name] if i >= first else None for i, node in enumerate(path[1:])]
            self._share(group.name, pages[group.name])
        copies = tuple((name, page) for name, page in source.pages.items() if page is not None) if source else ()
        for name, page in copies:
            self._share(name, (page,))
        return Match(end, path[-1] if len(path) > 1 else None, pages, copies)

    def _runs(self, group: str, path: list[Node]) -> list[int]:
        """How many pages in a row are there before each end of a page."""
        runs = [0]
        for node in path[1:]:
            runs.append(0 if node.pages[group] is None else runs[-1] + 1)
        return runs

    def _shown(self, runs: dict[str, list[int]], full: int, end: int) -> bool:
        """Whether all that the token at `end` can see of the first `full` pages is there."""
        return all(full - group.first(end) <= runs[group.name][full] for group in self._windows)

    def _inside(
        self, path: list[Node], runs: dict[str, list[int]], tokens: Sequence[int], most: int, full: int
    ) -> tuple[int, Node | None]:
        """Whether a match can go beyond `full` pages, and end inside a page: where, and the page to be copied.

        A copy must be worth it: a quarter of a page, or all that there is to be known.
        """
        size = self.page_size
        wanted = min(size * full + max(1, size // 4), len(tokens) - 1)
        for depth in range(len(path) - 1, full - 1, -1):
            start = size * depth
            rest = tuple(tokens[start : min(start + size, most)])
            source, length = None, max(1, wanted - start) - 1
            for child in islice(reversed(path[depth].below.values()), LOOK):
                if length == len(rest):
                    break
                if child.key[: length + 1] != rest[: length + 1] or None in child.pages.values():
                    continue
                common = next((i for i, (a, b) in enumerate(zip(child.key, rest, strict=False)) if a != b), None)
                common = min(len(child.key), len(rest)) if common is None else common
                if self._shown(runs, depth, start + common):
                    source, length = child, common
            if source:
                path[depth].below.move_to_end(source.key)
                return start + length, source
        return size * full, None

    def extend(
        self, node: Node | None, namespace: Hashable, tokens: tuple[int, ...], pages: dict[str, int | None]
    ) -> Node:
        """The node for one page of `tokens` below `node` (None: at the beginning), kept in `pages`, which the caller
        holds; the tree holds them too from now on.

        Fewer tokens than a page are a tail; it goes when the same page comes with more tokens. If the tokens are known
        already, this is the node that knows them, with its own pages. Below a node that the tree has forgotten nothing
        is remembered: this is then that same node.
        """
        if node is not None and node.parent is None:
            return node
        assert 0 < len(tokens) <= self.page_size, f"{len(tokens)} tokens are no page of {self.page_size}"
        parent = self._child(self._top, namespace) if node is None else node
        for name, page in pages.items():
            assert page is not None or name in self._windowed, f"a page of {name!r} is missing"
            before = None if page is None else self._nodes[name][page]
            if before is not None and before.key != tokens:
                assert before.parent is parent and before.key == tokens[: len(before.key)], f"{page} has other contents"
                self._forget(before)
        child = self._child(parent, tokens)
        for name, page in pages.items():
            if page is not None and child.pages.get(name) is None:
                self.pools[name].share(page)
                self._nodes[name][page] = child
                self.pages[name] += 1
                child.pages[name] = page
            else:
                child.pages.setdefault(name, None)
                self._touch(name, child)
            self._touch(name, parent)
        return child

    def forget(self, namespace: Hashable) -> None:
        """Forget what is known of a namespace."""
        root = self._top.below.get(namespace)
        if root is not None:
            self._forget(root)

    def clear(self) -> None:
        """Forget everything."""
        for root in tuple(self._top.below.values()):
            self._forget(root)

    # Below, the books: a page is in `_nodes` if the tree holds it, and in `_idle` if nobody else does.

    def _share(self, group: str, pages: Iterable[int | None]) -> None:
        pool, idle = self.pools[group], self._idle[group]
        for page in pages:
            if page is not None:
                pool.share(page)
                idle.pop(page, None)

    def _touch(self, group: str, node: Node) -> None:
        """An idle page has just been used; without a window, so have those before it: they are to go later."""
        idle, at = self._idle[group], node
        while (page := at.pages.get(group)) is not None and page in idle:
            idle.move_to_end(page)
            if group in self._windowed or at.parent is None:
                break
            at = at.parent

    def _child(self, parent: Node, key: Hashable) -> Node:
        child = parent.below.get(key)
        if child is None:
            child = parent.below[key] = Node(key, parent)
        parent.below.move_to_end(key)
        return child

    def _evict(self, group: str) -> None:
        """Free the least recently used idle page. A window group drops just that; otherwise the node goes."""
        node = self._nodes[group][next(iter(self._idle[group]))]
        assert node is not None and node.parent is not None
        parent = node.parent
        if group in self._windowed:
            self._drop(group, node)
            parent = node
        else:
            self._forget(node)
        self.evicted += 1
        while parent.parent is not None and not parent.below and not any(p is not None for p in parent.pages.values()):
            node, parent = parent, parent.parent
            self._forget(node)

    def _forget(self, node: Node) -> None:
        """Give back all pages of a node and of those below it."""
        assert node.parent is not None
        del node.parent.below[node.key]
        going = [node]
        while going:
            node = going.pop()
            going.extend(node.below.values())
            for name in node.pages:
                self._drop(name, node)
            node.below.clear()
            node.parent = None

    def _drop(self, group: str, node: Node) -> None:
        page, node.pages[group] = node.pages[group], None
        if page is not None:
            self._nodes[group][page] = None
            self._idle[group].pop(page, None)
            self.pages[group] -= 1
            self.pools[group].release((page,))
