"""Schedules of the Triton rotary embedding: heads per program, warps. Free: no bits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Heads of a token per program, and its warps."""

    heads: int
    warps: int


FEW = 64  # tokens
TABLE = (Schedule(4, 2), Schedule(8, 4))


def schedule(tokens: int) -> Schedule:
    """The schedule for a number of tokens."""
    return TABLE[tokens > FEW]


def schedules() -> tuple[Schedule, ...]:
    """Every schedule (one bit class)."""
    return TABLE
