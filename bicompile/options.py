"""The options of the backend: `torch.compile(..., backend="batch_invariant", options={...})`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from bicompile.errors import UnknownOption

_POLICIES = ("error", "allow")
_RELAXED = ("unsupported", "graph_breaks", "random", "batch_statistics")


@dataclass(frozen=True)
class Options:
    """What the user may relax or switch; each relaxation stands in the report.

    Args:
        unsupported: an op without an invariant kernel is an "error", or "allow"ed to run as it is.
        graph_breaks: the same for graph breaks.
        random: the same for ops that draw random numbers: allowed, they are deterministic for a
            seed and a shape.
        batch_statistics: the same for BatchNorm by the statistics of a batch: allowed, it is
            deterministic.
        schedules: of the GPU kernels: those that this machine's certificate lists ("certified"), or
            one for all sizes ("single"). No bit depends on it where the certificate is right.
        disable: passes left out, by name.
        fuel: apply only the first `fuel` rewrites; None applies all.
    """

    unsupported: str = "error"
    graph_breaks: str = "error"
    random: str = "error"
    batch_statistics: str = "error"
    schedules: str = "certified"
    disable: tuple[str, ...] = ()
    fuel: int | None = None

    @classmethod
    def parse(cls, given: Mapping[str, object] | None, *, passes: Sequence[str] = ()) -> Options:
        """Check the user's dictionary; `passes` are those that may be left out.

        Raises:
            UnknownOption: a name or a value is not known.

        Example:
            >>> Options.parse({"random": "allow"}).random
            'allow'
        """
        accepted: dict[str, tuple[str, ...]] = {
            **dict.fromkeys(_RELAXED, _POLICIES),
            "schedules": ("certified", "single"),
            "disable": tuple(passes),
        }
        known = [f.name for f in fields(cls)]
        values: dict[str, object] = dict(given or {})
        for name, value in values.items():
            if name not in known:
                raise UnknownOption(option=name, value=repr(value), accepted=known)
            if name == "fuel":
                ok = value is None or (isinstance(value, int) and value >= 0)
                accepted[name] = ("None", "a number of rewrites >= 0")
            elif name == "disable":
                values[name] = (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
                ok = set(values[name]) <= set(accepted[name])  # type: ignore[call-overload]
            else:
                ok = value in accepted[name]
            if not ok:
                raise UnknownOption(option=name, value=repr(value), accepted=accepted[name])
        return cls(**values)  # type: ignore[arg-type]
