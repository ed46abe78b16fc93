"""Lightning callbacks that plug into any project: torch and lightning are all they need."""

from lit_callbacks.ema import EMA
from lit_callbacks.milestones import MilestoneGuard
from lit_callbacks.monitor import MemoryAndThroughput

__all__ = ["EMA", "MemoryAndThroughput", "MilestoneGuard"]
