"""What the bench times: cases by group, the suites they make up, and the systems that race."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

OURS = "bicompile"
TRAINING_LAYERS = 4
"""A random model is trained with at most so many layers."""


@dataclass(frozen=True)
class Case:
    """One thing to time; cases of one group share their first rows, which must agree in bits.

    A group is a name and its sizes: `decode 1024` (of a model: after 1024 tokens),
    `prefill 2048`, `training 4096` (tokens of a row), `mm KxN`, `rms_norm K`, attention
    (`decode`, `prefill`, `attention_backward`) `HxHkvxSxD`; convolutions over I by I places with
    W by W taps: `conv2d CxNxIxW`, `depthwise CxIxW`.
    """

    group: str
    batch: int
    timed: bool = True
    """False: only its bits are compared with those of the other cases of the group."""

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.group} batch {self.batch}"

    @property
    def kind(self) -> str:
        """The group's name without its sizes."""
        return self.group.partition(" ")[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the group's name."""
        text = self.group.partition(" ")[2]
        return tuple(int(n) for n in text.split("x")) if text else ()


@dataclass(frozen=True)
class Shapes:
    """The sizes of a decoder model with random weights; those of Qwen3-8B if nothing is said."""

    layers: int = 8
    hidden: int = 4096
    intermediate: int = 12288
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    vocabulary: int = 151936

    @property
    def matmuls(self) -> dict[str, tuple[int, int]]:
        """(K, N) of each matmul of a layer, with what reads one input side by side."""
        attention = self.heads * self.head_size
        return {
            "qkv": (self.hidden, attention + 2 * self.kv_heads * self.head_size),
            "o": (attention, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }


@dataclass(frozen=True)
class Sequences:
    """Many requests served by one model: prompts padded on the left, a fixed number of slots."""

    count: int = 1000
    slots: int = 128
    prompt: tuple[int, int] = (8, 16)
    """Shortest and longest prompt, in tokens."""
    tokens: tuple[int, int] = (90, 110)
    """Shortest and longest answer, in tokens."""
    layers: int = 36
    alone: int = 8
    """So many requests are also served without the rest, and must give the same bits."""


@dataclass(frozen=True)
class Suite:
    """Everything that one run of the bench times."""

    name: str
    models: tuple[Case, ...]
    ops: tuple[Case, ...]
    training: tuple[Case, ...]
    first: tuple[Case, Case]
    """Prefill and decode cases whose compilation is timed: the way to the first answer."""
    calls: Mapping[str, int] = field(
        default_factory=lambda: {"prefill": 5, "decode": 5, "training": 2, "op": 30}
    )
    """Calls in each round: of a model's prefill, decode step and training step, of an op."""
    shapes: Shapes | None = None
    """Of the random model; None: the real one."""
    sequences: Sequences | None = None
    limits: tuple[int, int] = (1 << 30, 8192)
    """Bytes copied, and M = N = K multiplied, to measure what the machine can do."""


def cases(
    groups: Mapping[str, Sequence[int]], untimed: Mapping[str, int] = MappingProxyType({})
) -> tuple[Case, ...]:
    """The cases of some groups, each with its batch sizes; `untimed` adds one for its bits."""
    return tuple(
        case
        for group, batches in groups.items()
        for case in (
            *([Case(group, untimed[group], timed=False)] if group in untimed else ()),
            *(Case(group, batch) for batch in batches),
        )
    )


def by_group(all_cases: Sequence[Case]) -> Iterator[tuple[str, list[Case]]]:
    """The cases of each group, in the order of their first appearance."""
    for group in dict.fromkeys(case.group for case in all_cases):
        yield group, [case for case in all_cases if case.group == group]


SMALL = Suite(
    name="small",
    models=cases({"prefill": (1, 4), "decode": (1, 4, 16)}),
    first=(Case("prefill", 1), Case("decode", 1)),
    ops=cases(
        {
            "mm 576x1536": (1, 16, 128),
            "mm 1536x576": (1, 16, 128),
            "mm 576x49152": (1, 4),
            "decode 9x3x512x64": (1, 4, 16),
            "prefill 9x3x128x64": (1, 4),
            "attention_backward 9x3x128x64": (1, 4),
            "rms_norm 576": (1, 128),
            "layer_norm 576": (1, 128),
            "softmax 2048": (1, 128),
            "conv2d 64x64x56x3": (1, 4),
            "depthwise 384x14x3": (1, 4),
            "depthwise 96x56x7": (1, 4),
        }
    ),
    training=cases({"training 64": (2, 4)}),
)


def layers(
    name: str,
    shapes: Shapes,
    *,
    decode: Mapping[int, Sequence[int]],
    prefill: Mapping[int, Sequence[int]],
    training: Mapping[int, Sequence[int]],
    rows: Sequence[int],
    sequences: Sequences | None,
    calls: Mapping[str, int],
    limits: tuple[int, int],
    odd: Sequence[int] = (),
    convolutions: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Suite:
    """A suite of a random model's layers and of its ops.

    Args:
        name: names the suite.
        shapes: sizes of the model.
        decode: context length -> batch sizes of a decode step after it.
        prefill: prompt length -> batch sizes.
        training: tokens of a row -> batch sizes.
        rows: M of the matmuls; norms have each third and the last, logits the first decode batches.
        sequences: the requests to serve.
        calls: see `Suite.calls`.
        limits: see `Suite.limits`.
        odd: M of the matmuls, too, and of nothing else: rows that fill no tiles.
        convolutions: groups, which follow from no size of the model -> batch sizes.
    """
    heads = f"{shapes.heads}x{shapes.kv_heads}"
    matmuls = [*shapes.matmuls.values(), (shapes.hidden, shapes.vocabulary)]
    few = tuple(sorted({*rows[::3], rows[-1]}))
    models = {
        **{f"decode {length}": batches for length, batches in decode.items()},
        **{f"prefill {length}": batches for length, batches in prefill.items()},
    }
    steps = {f"training {length}": batches for length, batches in training.items()}
    ops = {
        **{f"mm {k}x{n}": tuple(sorted({*rows, *odd})) for k, n in matmuls},
        **{f"decode {heads}x{s}x{shapes.head_size}": bs for s, bs in decode.items()},
        **{f"prefill {heads}x{s}x{shapes.head_size}": bs for s, bs in prefill.items()},
        **{f"attention_backward {heads}x{s}x{shapes.head_size}": bs for s, bs in training.items()},
        f"rms_norm {shapes.hidden}": few,
        f"softmax {shapes.hidden}": few,
        f"softmax {shapes.vocabulary}": next(iter(decode.values())),
        f"log_softmax {shapes.vocabulary}": next(iter(decode.values())),
        **convolutions,
    }
    return Suite(
        name=name,
        models=cases(models, _second_batch(models)),
        ops=cases(ops, _second_batch(ops)),
        training=cases(steps, _second_batch(steps)),
        first=(_first("prefill", prefill), _first("decode", decode)),
        calls=calls,
        shapes=shapes,
        sequences=sequences,
        limits=limits,
    )


def _first(kind: str, batches: Mapping[int, Sequence[int]]) -> Case:
    length, (batch, *_) = next(iter(batches.items()))
    return Case(f"{kind} {length}", batch)


def _second_batch(groups: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """A group of one batch size needs another one, for its bits."""
    return {g: 2 if b[0] == 1 else 1 for g, b in groups.items() if len(b) == 1}


_CONVOLUTIONS = {
    "conv2d 64x64x56x3": (1, 32),
    "conv2d 512x512x14x3": (1, 32),
    "conv2d 1024x256x14x1": (1, 32),
    "depthwise 384x14x3": (1, 32),
    "depthwise 96x56x7": (1, 32),
}
QWEN3 = layers(
    "qwen3-8b",
    Shapes(),
    convolutions=_CONVOLUTIONS,
    decode={1024: (1, 8, 32, 128), 8192: (8,)},
    prefill={2048: (1,), 1024: (8,), 16384: (1,)},
    training={4096: (1,), 2048: (4,)},
    rows=(1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    odd=(20, 100, 200, 1000),
    sequences=Sequences(),
    calls={"prefill": 5, "decode": 20, "training": 5, "op": 8},
    limits=(1 << 30, 8192),
)
QWEN3_QUICK = layers(
    "qwen3-8b, quick",
    Shapes(layers=2),
    convolutions=_CONVOLUTIONS,
    decode={1024: (1, 32)},
    prefill={2048: (1,)},
    training={2048: (1,)},
    rows=(1, 128, 2048),
    sequences=None,
    calls={"prefill": 5, "decode": 20, "training": 5, "op": 8},
    limits=(1 << 30, 8192),
)
TINY = layers(
    "tiny",
    Shapes(2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_size=16, vocabulary=320),
    decode={24: (1, 3), 40: (2,)},
    prefill={16: (1,), 8: (3,)},
    training={8: (1, 3), 12: (2,)},
    rows=(1, 5),
    sequences=Sequences(count=7, slots=4, prompt=(3, 6), tokens=(4, 7), layers=2, alone=2),
    calls={"prefill": 2, "decode": 3, "training": 1, "op": 2},
    limits=(1 << 16, 64),
)
SMALL_QUICK = replace(
    SMALL,
    name="small, quick",
    models=tuple(c for _, group in by_group(SMALL.models) for c in group[:2]),
    ops=tuple(c for _, group in by_group(SMALL.ops) for c in group[:2]),
)
SUITES: Mapping[str, tuple[Suite, Suite]] = {
    "small": (SMALL, SMALL_QUICK),
    "qwen3-8b": (QWEN3, QWEN3_QUICK),
    "tiny": (TINY, TINY),
}
"""By name: the whole suite, and the quick one."""


# ---- Systems -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """One way to run a function."""

    name: str
    how: str
    """`eager`, `inductor`, `bicompile`, or the name of one of PyTorch's attention backends."""
    mode: str | None = None
    """Of torch.compile."""
    dynamic: bool | None = None
    """Of torch.compile; False compiles each case for its own sizes, which is its best."""
    ops: tuple[str, ...] = ()
    """The kinds of ops it is raced at; empty: all."""


_ATTENTION = ("decode", "prefill", "attention_backward")
_CONVOLUTION = ("conv2d", "depthwise")
_ROWWISE = ("rms_norm", "layer_norm", "softmax", "log_softmax")
SYSTEMS: Mapping[tuple[str, str], tuple[System, ...]] = {
    ("cpu", "model"): (System("inductor", "inductor"), System(OURS, "bicompile")),
    ("cpu", "ops"): (
        System("eager", "eager"),
        System("inductor", "inductor"),
        System(OURS, "bicompile"),
    ),
    ("cpu", "sequences"): (System("inductor", "inductor"), System(OURS, "bicompile")),
    ("cpu", "training"): (
        System("inductor", "inductor", dynamic=False),
        System(OURS, "bicompile"),
    ),
    ("cuda", "model"): (
        System("inductor", "inductor", dynamic=False),
        System("reduce-overhead", "inductor", "reduce-overhead", dynamic=False),
        System(OURS, "bicompile", "reduce-overhead", dynamic=False),
    ),
    ("cuda", "ops"): (
        System("cublas", "eager", ops=("mm",)),
        System("eager", "eager", ops=_CONVOLUTION),
        System("flash", "FLASH_ATTENTION", ops=_ATTENTION),
        System("cudnn", "CUDNN_ATTENTION", ops=_ATTENTION),
        System("inductor", "inductor", dynamic=False, ops=_ROWWISE),
        System(OURS, "bicompile"),
    ),
    ("cuda", "sequences"): (
        System("reduce-overhead", "inductor", "reduce-overhead", dynamic=False),
        System(OURS, "bicompile", "reduce-overhead"),
    ),
    ("cuda", "training"): (
        System("inductor", "inductor", dynamic=False),
        System(OURS, "bicompile"),
    ),
}
"""By device and part of the bench: who races, ours last."""
