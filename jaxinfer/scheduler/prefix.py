"""Pages whose contents are known, in a tree: a request that begins like an earlier one finds what that one has read.

A node is one page of tokens below the pages before it, looked up by the tokens themselves, so nothing can collide.
The tree holds its pages like any sequence does. A page that nobody else holds is *idle*: it stays until its pool runs
dry, and the least recently used goes first (the radix tree of SGLang, Zheng et al., 2024, with pages for edges). Where
there are tiers below the device, it goes there and can come back (`lower`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from jaxinfer.scheduler.lower import Lower, Move
from jaxinfer.scheduler.pages import PageGroup, Pool

LOOK = 16  # so many pages below a node are compared token by token


@dataclass(eq=False, slots=True)
class Node:
    """A page of tokens, and where each group keeps it (None: a window group has dropped it, or it is only below);
    `kept` are its places below the device, by tier and group.

    Fewer tokens than a page: a tail. Only these are known; its owner may be writing behind them. Without a parent: the
    tree has forgotten it.
    """

    key: Any  # the tokens; of a namespace's root, the namespace
    parent: Node | None = field(repr=False)
    pages: dict[str, int | None] = field(default_factory=dict)
    kept: dict[tuple[str, str], int] = field(default_factory=dict)
    below: OrderedDict[Any, Node] = field(default_factory=OrderedDict, repr=False)  # least recently used first


@dataclass(frozen=True)
class Match:
    """The first `length` tokens are known, full pages down to `node`: `pages` has one entry for each of them (None: no
    window shows it any more). `copies`, (group, page): the match ends inside these; they are to be copied into pages
    of one's own. `missing`, (group, index, node, place): these are on the host, and None in `pages` until the tree is
    asked to `bring` them; `again` pages could be brought, and it takes less time to read them again. Every page in here
    is held once for the caller, who releases it, and so is every place."""

    length: int
    node: Node | None
    pages: dict[str, list[int | None]]
    copies: tuple[tuple[str, int], ...] = ()
    missing: tuple[tuple[str, int, Node, int], ...] = ()
    again: int = 0


class PrefixTree:
    """The pools of all state groups, and the pages whose contents are known: found again by what they hold.

    Whoever holds a page also holds those before it, and releases them together; so in a group without window, idle
    pages are ordered from the leaves up, and only leaves are evicted. The exception are sequences that have read the
    same tokens at the same time: one copy is in the tree, and whoever has the other may extend a node without holding
    its page. Such a node can be evicted from above pages that are in use: the tree then forgets those, and their
    holders keep them. That way every idle page can be had, always.

    `host` and `disk` are the pages that these keep of each group. `moves` are what is to be done before the next step:
    pages go down and come back, and sequences add their copies, in order.
    """

    def __init__(self, groups: Iterable[PageGroup], host: Mapping[str, int] | None = None,
                 disk: Mapping[str, int] | None = None):
        self.groups = tuple(groups)
        sizes = {group.page_size for group in self.groups}
        assert len(sizes) == 1, f"one tree needs one page size, not {sorted(sizes)}"
        self.page_size = sizes.pop()
        self.pools = {group.name: Pool(group.pages) for group in self.groups}
        self.pages = {group.name: 0 for group in self.groups}  # held by the tree
        self.evicted = 0  # pages taken from the tree because no other was left
        self._windowed = {group.name for group in self.groups if group.window is not None}
        self._nodes: dict[str, list[Node | None]] = {group.name: [None] * group.pages for group in self.groups}
        self._idle: dict[str, OrderedDict[int, None]] = {group.name: OrderedDict() for group in self.groups}
        self._top = Node(None, None)  # of all namespaces
        self.moves: list[Move] = []
        self.lower = Lower(self.groups, host, disk or {}, self.moves, self._lost) if host else None

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
        """The longest known beginning of `tokens`, of at most `most` tokens, that every group can restore; or one that
        is longer with pages from the host, if that is to be had sooner."""
        path, end, source = self._known(namespace, tokens, most)
        missing, again = [], 0
        if self.lower:
            self.lower.touch(path)
            chosen, reach = self.lower.worth(path, end, ("host",))
            if chosen:
                end, source = self.page_size * chosen, None
            else:
                again = reach - end // self.page_size
        path = path[: end // self.page_size + 1]
        pages: dict[str, list[int | None]] = {}
        for group in self.groups:
            first, held = group.first(end), pages.setdefault(group.name, [])
            for i, node in enumerate(path[1:]):
                held.append(node.pages[group.name] if i >= first else None)
                if self.lower and i >= first and held[i] is None:
                    missing.append((group.name, i, node, self.lower.pin(group.name, node)))
            self._share(group.name, held)
        copies = tuple((name, page) for name, page in source.pages.items() if page is not None) if source else ()
        for name, page in copies:
            self._share(name, (page,))
        return Match(end, path[-1] if len(path) > 1 else None, pages, copies, tuple(missing), again)

    def give_up(self, match: Match) -> None:
        """Release all that a match holds."""
        for name, pages in match.pages.items():
            self.release(name, pages)
        for name, page in match.copies:
            self.release(name, (page,))
        for name, _, _, place in match.missing:
            self.lower.unpin(name, place)  # type: ignore[union-attr]

    def bring(self, match: Match) -> None:
        """Have what a match misses brought to the device before the next step. There must be as many pages."""
        for name, i, _, _ in match.missing:
            match.pages[name][i] = self.take(name)
        for name, i, node, place in match.missing:
            page = match.pages[name][i]
            assert page is not None and node.parent is not None and node.pages[name] is None
            self._hold(name, node, page)
            self.lower.bring(name, place, page)  # type: ignore[union-attr]

    def fetch(self, namespace: Hashable, tokens: Sequence[int], most: int) -> int:
        """Have pages read from the disk if a match is to be had sooner with them: how many are on their way."""
        if self.lower is None:
            return 0
        path, end, _ = self._known(namespace, tokens, most)
        return self.lower.fetch(path, end)

    def _known(self, namespace: Hashable, tokens: Sequence[int], most: int) -> tuple[list[Node], int, Node | None]:
        """The nodes of all full pages that are known, below their root; the end of the longest beginning that the
        device can restore; and the node that it ends inside of."""
        size, most = self.page_size, min(most, len(tokens))
        root = self._top.below.get(namespace)
        if root is None:
            return [], 0, None
        path = [root]
        for start in range(0, most - size + 1, size):
            child = path[-1].below.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            path[-1].below.move_to_end(child.key)
            path.append(child)
        runs = {group.name: self._runs(group.name, path) for group in self.groups}
        full = next(n for n in range(len(path) - 1, -1, -1) if self._shown(runs, n, size * n))
        return path, *self._inside(path, runs, tokens, most, full)

    def _runs(self, group: str, path: list[Node]) -> list[int]:
        """How many pages in a row are there before each end of a page."""
        runs = [0]
        for node in path[1:]:
            runs.append(0 if node.pages[group] is None else runs[-1] + 1)
        return runs

    def _shown(self, runs: dict[str, list[int]], full: int, end: int) -> bool:
        """Whether all that the token at `end` can see of the first `full` pages is there."""
        return all(full - group.first(end) <= runs[group.name][full] for group in self.groups)

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
                self._hold(name, child, page)
            else:
                child.pages.setdefault(name, None)
                self._touch(name, child)
            self._touch(name, parent)
        return child

    @property
    def namespaces(self) -> tuple[Any, ...]:
        return tuple(self._top.below)

    def forget(self, namespace: Hashable) -> None:
        """Forget what is known of a namespace."""
        root = self._top.below.get(namespace)
        if root is not None:
            self._forget(root)

    def clear(self) -> None:
        """Forget everything, and what is on its way."""
        for root in tuple(self._top.below.values()):
            self._forget(root)
        self.moves.clear()
        if self.lower:
            self.lower.reset()

    # Below, the books: a page is in `_nodes` if the tree holds it, and in `_idle` if nobody else does.

    def _share(self, group: str, pages: Iterable[int | None]) -> None:
        pool, idle = self.pools[group], self._idle[group]
        for page in pages:
            if page is not None:
                pool.share(page)
                idle.pop(page, None)

    def _hold(self, group: str, node: Node, page: int) -> None:
        self.pools[group].share(page)
        self._nodes[group][page] = node
        self.pages[group] += 1
        node.pages[group] = page

    def _touch(self, group: str, node: Node) -> None:
        """An idle page has just been used; without a window, so have those before it: they are to go later."""
        idle, at = self._idle[group], node
        while at.parent is not None:
            page = at.pages.get(group)
            if page in idle:
                idle.move_to_end(page)
            elif page is not None:
                break
            if group in self._windowed:
                break
            at = at.parent

    def _child(self, parent: Node, key: Hashable) -> Node:
        child = parent.below.get(key)
        if child is None:
            child = parent.below[key] = Node(key, parent)
        parent.below.move_to_end(key)
        return child

    def _evict(self, group: str) -> None:
        """Free the least recently used idle page, which may be kept below."""
        page = next(iter(self._idle[group]))
        node = self._nodes[group][page]
        assert node is not None
        self.evicted += 1
        if self.lower and len(node.key) == self.page_size and self.lower.keep(group, node, page):
            self._drop(group, node)
        else:
            self._lose(group, node)

    def _lost(self, group: str, node: Node) -> None:
        """A page has lost a copy below the device. It may have been the last."""
        if node.parent is None or node.pages[group] is not None or any(name == group for _, name in node.kept):
            return
        self._lose(group, node)

    def _lose(self, group: str, node: Node) -> None:
        """A window group loses just one page; otherwise the node goes. No empty node is left."""
        parent = node.parent
        assert parent is not None
        if group in self._windowed:
            self._drop(group, node)
            parent = node
        else:
            self._forget(node)
        while parent.parent is not None and not (parent.below or parent.kept or set(parent.pages.values()) - {None}):
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
            if self.lower:
                self.lower.forget(node)
            node.below.clear()
            node.parent = None

    def _drop(self, group: str, node: Node) -> None:
        page, node.pages[group] = node.pages[group], None
        if page is not None:
            self._nodes[group][page] = None
            self._idle[group].pop(page, None)
            self.pages[group] -= 1
            self.pools[group].release((page,))
