"""Lightning callbacks that plug into any project: torch and lightning are all they need."""

from lit_callbacks.batch_size import BatchSizeFit
from lit_callbacks.ema import EMA
from lit_callbacks.export import WeightsExport
from lit_callbacks.graceful import GracefulStop
from lit_callbacks.milestones import MilestoneGuard
from lit_callbacks.monitor import MemoryAndThroughput
from lit_callbacks.oom import OOMGuard
from lit_callbacks.predictions import PredictionLogger
from lit_callbacks.validation import ValidationSchedule

__all__ = [
    "EMA",
    "BatchSizeFit",
    "GracefulStop",
    "MemoryAndThroughput",
    "MilestoneGuard",
    "OOMGuard",
    "PredictionLogger",
    "ValidationSchedule",
    "WeightsExport",
]
