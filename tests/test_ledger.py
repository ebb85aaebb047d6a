"""The ledger is a table, for terminals and for notebooks."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.compiler import Entry, Ledger
from jaxinfer.compiler.ledger import COLUMNS

TEXT = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=12)  # no spaces: cells split


class Cells(HTMLParser):
    """What a browser shows of a table, row by row."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert tag in ("table", "tr", "th", "td") and not attrs, "markup that is not ours"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.rows[-1][-1] += data


def test_an_entry_counts_what_its_hits_carried_and_padded():
    ledger = Ledger()
    entry = ledger["forward[T=8,R=8]"]
    assert entry is ledger["forward[T=8,R=8]"] and (len(ledger), list(ledger)) == (1, [entry])
    assert entry.origin == "listed" and entry.waste == 0
    entry.hits, entry.tokens, entry.padding, entry.kernels = 2, 12, 4, {"attend": "visits", "matmul": "two_rows"}
    entry.usual = 0.0025
    header, row = str(ledger).splitlines()
    assert header.split("  ")[0] == "executable" and "padding" in header
    assert row.split() == ["forward[T=8,R=8]", "listed", "0.00", "0.0", "2", "2.5", "25%", "attend:visits",
                           "matmul:two_rows"]


@given(names=st.lists(TEXT, max_size=3, unique=True), missed=TEXT, seconds=st.floats(0, 1e4),
       size=st.integers(0, 2**40))
def test_the_table_shows_every_entry_whatever_is_in_it(names, missed, seconds, size):
    ledger = Ledger({name: Entry(name, "disk", seconds, size, missed=missed) for name in names})
    assert Cells(ledger._repr_html_()).rows == [list(COLUMNS), *map(list, ledger.rows())]
    lines = str(ledger).splitlines()
    assert len(lines) == 1 + len(names) and repr(ledger) == str(ledger)
    for line, name in zip(lines[1:], names, strict=True):
        assert line.startswith(name) and line.endswith(missed)
        assert f"{seconds:.2f}" in line and f"{size / 1e6:.1f}" in line


def test_columns_are_aligned():
    ledger = Ledger({name: Entry(name) for name in ("short", "a much longer name")})
    lines = zip(str(ledger).splitlines(), ("origin", "listed", "listed"), strict=True)
    assert len({line.index(word) for line, word in lines}) == 1
