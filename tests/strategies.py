"""What is drawn: samples that follow from the contracts of the kernels, pairs of parameters."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st

from bicompile.testing import make_sample
from bicompile.testing.contents import CONTENTS
from bicompile.testing.sizes import axis_sizes


def crossed(names, *values):
    """Parametrise with every combination; the default run has those off the diagonal left out."""
    every = itertools.product(*map(enumerate, values))
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*found, marks=[] if len(set(at)) == 1 else pytest.mark.soak)
            for at, found in (zip(*pairs, strict=True) for pairs in every)
        ],
        ids=str,
    )


@st.composite
def samples(draw, kernel, dtype, device="cpu"):
    """A call of `kernel`: a case of its contract, sizes, contents."""
    case = draw(st.sampled_from(kernel.contract.cases), label="case")
    crowded = len(case.axes) > 3
    windows = len(case.windows)
    sizes = {
        a: draw(st.sampled_from(axis_sizes(a, crowded, windows)), label=a)
        for a in case.axes
        if a != "1"
    }
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
