"""Decisions only: which sequence reads how many tokens into which pages. No jax here."""

from jaxinfer.scheduler.pages import PageGroup, Pool
from jaxinfer.scheduler.tokens import Drawn, Plan, Row, Scheduler

__all__ = ["Drawn", "PageGroup", "Plan", "Pool", "Row", "Scheduler"]
