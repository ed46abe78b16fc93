"""Anatomical landmarks by heatmap regression."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_landmarks.augment import Augmentation
    from lit_landmarks.data import LandmarkData
    from lit_landmarks.loaders import LandmarkBatch
    from lit_landmarks.metrics import MeanRadialError, RadialError, SuccessDetectionRate
    from lit_landmarks.model import HeatmapNet
    from lit_landmarks.module import LitLandmarks
    from lit_landmarks.plots import LandmarkPlots
    from lit_landmarks.predict import PredictionWriter

_HOME = {
    "Augmentation": "augment",
    "HeatmapNet": "model",
    "LandmarkBatch": "loaders",
    "LandmarkData": "data",
    "LandmarkPlots": "plots",
    "LitLandmarks": "module",
    "MeanRadialError": "metrics",
    "PredictionWriter": "predict",
    "RadialError": "metrics",
    "SuccessDetectionRate": "metrics",
}

__all__ = [
    "Augmentation",
    "HeatmapNet",
    "LandmarkBatch",
    "LandmarkData",
    "LandmarkPlots",
    "LitLandmarks",
    "MeanRadialError",
    "PredictionWriter",
    "RadialError",
    "SuccessDetectionRate",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import lit_landmarks` alone stays as fast as Python."""
    if name not in _HOME:
        raise AttributeError(f"module 'lit_landmarks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lit_landmarks.{_HOME[name]}"), name)
