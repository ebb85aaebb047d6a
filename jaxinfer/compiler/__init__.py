"""Graph + shapes -> Executables: buckets, the compile cache, the ledger."""

from jaxinfer.compiler.buckets import Bucket, Ladder, default_ladder, invariant_ladder
from jaxinfer.compiler.cache import enable
from jaxinfer.compiler.executables import Executables, Key
from jaxinfer.compiler.ledger import Entry, Ledger

__all__ = ["Bucket", "Entry", "Executables", "Key", "Ladder", "Ledger", "default_ladder", "enable", "invariant_ladder"]
