"""What `bicompile verify` tries on the convolution kernels: every schedule of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bicompile.kernels.common.launch import capability
from bicompile.kernels.convolution import gpu
from bicompile.kernels.convolution.schedules import SINGLE, schedules
from bicompile.kernels.matmul.schedules import kinds
from bicompile.kernels.matmul.sweep import DTYPES
from bicompile.sweep import VALUES, BitClass, Depth, Problem

ROWS = ((0, 1), (1, 3))
LAYOUTS = ("misaligned", "rotated strides", "every second element")


@dataclass(frozen=True)
class Form:
    """A convolution over two axes: images, input and output channels of a group, size, taps."""

    b: int
    c: int
    n: int
    i: int
    taps: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    transposed: bool = False

    @property
    def name(self) -> str:
        """Its sizes, as those of the bench."""
        return "x".join(map(str, (self.b, self.c, self.n, self.i, self.taps)))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of image, weight and bias."""
        inner, outer = (self.c, self.n) if not self.transposed else (self.n, self.c)
        return (
            (self.b, self.groups * self.c, self.i, self.i),
            (self.groups * outer, inner, self.taps, self.taps),
            (self.groups * self.n,),
        )


#: Steps of one tap and of several, few channels, sums of several parts, one tap.
FORMS = {
    Depth.SMALL: (Form(3, 34, 9, 4, 3), Form(3, 3, 5, 5, 3)),
    Depth.QUICK: (Form(3, 256, 70, 9, 3), Form(4, 24, 33, 12, 3, stride=2)),
    Depth.FULL: (
        Form(3, 256, 70, 9, 3), Form(4, 24, 33, 12, 3, stride=2), Form(5, 512, 130, 7, 3),
        Form(4, 3, 64, 30, 7, stride=2), Form(9, 64, 72, 20, 3, dilation=2), Form(7, 200, 80, 9, 1),
        Form(4, 40, 24, 9, 3, groups=3), Form(3, 72, 40, 8, 4, stride=2, transposed=True),
    ),
}  # fmt: skip


def classes(depth: Depth) -> Iterator[BitClass]:
    """One bit class per kind."""
    here = capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for kind in (k for k in kinds(here) if k in SINGLE):
        problems = tuple(_problems(kind, depth))
        yield BitClass("convolution", kind, SINGLE[kind], schedules(kind), problems)


def _problems(kind: str, depth: Depth) -> Iterator[Problem]:
    dtypes = DTYPES[kind] if depth is Depth.FULL else DTYPES[kind][:1]
    for dtype in DTYPES[kind][-1:] if depth is Depth.SMALL else dtypes:
        for number, form in enumerate(FORMS[depth]):
            name = f"{str(dtype).removeprefix('torch.')} {form.name}"
            yield Problem(
                f"convolution {name}", dtype, form.shapes, _run(form, kind == "tf32"),
                ROWS[:1] if depth is Depth.SMALL else ROWS,
                layouts=LAYOUTS[: depth.pick(1, 1, 3 if number < 2 else 1)],
                values=depth.pick(("cancelling",), ("random", "cancelling"), tuple(VALUES)),
            )  # fmt: skip


def _run(form: Form, tf32: bool):
    padding = form.taps // 2

    def run(x, s):
        return gpu.convolution(
            *x, [form.stride] * 2, [padding] * 2, [form.dilation] * 2, form.transposed, [0, 0],
            form.groups, tf32, chosen=s,
        )  # fmt: skip

    return run
