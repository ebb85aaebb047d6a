"""Graph + shapes -> Executables, each compiled once per bucket and listed in the ledger."""

from jaxinfer.compiler.buckets import Bucket, Ladder, default_ladder, powers
from jaxinfer.compiler.cache import enable
from jaxinfer.compiler.executables import Executables
from jaxinfer.compiler.ledger import Entry, Ledger

__all__ = ["Bucket", "Entry", "Executables", "Ladder", "Ledger", "default_ladder", "enable", "powers"]
