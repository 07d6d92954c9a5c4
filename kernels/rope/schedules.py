"""Schedules of the Triton rotary embedding: heads per program, warps. Free: no bits."""

from dataclasses import dataclass

from bicompile.certificate import choose


@dataclass(frozen=True)
class Schedule:
    """Heads of a token per program, and its warps."""

    heads: int
    warps: int


FEW = 64  # tokens
SINGLE = Schedule(4, 2)
TABLE = (SINGLE, Schedule(8, 4))


def schedule(tokens: int) -> Schedule:
    """The schedule for a number of tokens."""
    return choose("rope", "heads", wanted(tokens), SINGLE, lambda: TABLE)


def wanted(tokens: int) -> Schedule:
    """What the table says, certified or not."""
    return TABLE[tokens > FEW]
