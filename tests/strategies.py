"""Hypothesis strategies derived from the contracts of the registered kernels."""

from __future__ import annotations

from hypothesis import strategies as st

from bicompile.testing import make_sample
from bicompile.testing.contents import CONTENTS

BOUNDARIES = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
WIDE = (*BOUNDARIES, 255, 256, 257, 511, 512, 513, 1000, 1023, 1024, 1025, 2049)
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33)
SMALL = (1, 2, 3, 4)


def axis_sizes(axis: str, crowded: bool, windows: int):
    """Sizes of an axis; `crowded` keeps calls with many axes small, and so do several windows."""
    if axis[0] == "I":
        return st.sampled_from((1, 2, 7, 16, 33, 130) if windows == 1 else (1, 2, 5, 9, 17))
    if axis[0] == "W":
        return st.sampled_from((1, 2, 3, 7))
    if windows and axis[0] == "N":
        return st.sampled_from((*SMALL, 5, 17))
    if axis[0] in "BHC":
        return st.sampled_from(SMALL)
    if axis[0] in "KS":
        return st.sampled_from(BOUNDARIES if crowded else WIDE)
    if axis[0] == "D":
        return st.sampled_from((1, 3, 8, 16, 33, 64, 80))
    return st.sampled_from(SMALL if crowded else ROWS)


@st.composite
def samples(draw, kernel, dtype, device="cpu"):
    """A call of `kernel`: a case of its contract, sizes, contents."""
    case = draw(st.sampled_from(kernel.contract.cases), label="case")
    crowded = len(case.axes) > 3
    windows = len(case.windows)
    sizes = {a: draw(axis_sizes(a, crowded, windows), label=a) for a in case.axes if a != "1"}
    if isinstance(groups := case.params.get("groups"), int):
        sizes["G"] = groups
    optional = [arg.name for arg in case.inputs if arg.optional]
    absent_sets = st.sets(st.sampled_from(optional)) if optional else st.just(set())
    absent = draw(absent_sets, label="absent")
    return make_sample(
        kernel,
        case,
        dtype,
        sizes,
        seed=draw(st.integers(0, 2**16), label="seed"),
        device=device,
        absent=tuple(absent),
        float_mask=bool(case.masks) and draw(st.booleans(), label="float mask"),
        contents=draw(st.sampled_from(sorted(CONTENTS)), label="contents"),
    )
