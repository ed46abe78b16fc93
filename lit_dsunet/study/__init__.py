"""Studies: arms over folds, trained alike, resumed after any interruption, compared case by case."""

from lit_dsunet.study.command import study_main, sweep_main

__all__ = ["study_main", "sweep_main"]
