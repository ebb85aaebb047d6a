"""Decisions only: which sequence reads how many tokens into which pages. No jax here."""

from jaxinfer.scheduler.pages import PageGroup, Pool
from jaxinfer.scheduler.prefix import PrefixTree
from jaxinfer.scheduler.tokens import AGEING, Began, Drawn, Plan, Scheduler

__all__ = ["AGEING", "Began", "Drawn", "PageGroup", "Plan", "Pool", "PrefixTree", "Scheduler"]
