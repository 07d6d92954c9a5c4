"""Schedules of softmax: those of the reductions."""

from bicompile.kernels.reduce.schedules import Schedule, schedule, schedules

__all__ = ["Schedule", "schedule", "schedules"]
