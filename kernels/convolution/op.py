"""The op of the convolution family: shapes, reference and contract."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract, Window
from bicompile.registry import Kernel, register


def convolution_reference(
    input,
    weight,
    bias,
    stride,
    padding,
    dilation,
    transposed,
    output_padding,
    groups,
    tf32=False,
):
    """`aten.convolution`."""
    return torch.convolution(
        input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )


def output_sizes(input, weight, stride, padding, dilation, transposed, output_padding):
    """The sizes of the result along the axes that the window slides over."""
    sizes = zip(
        input.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
    )
    if transposed:
        return [(i - 1) * s - 2 * p + d * (w - 1) + extra + 1 for i, w, s, p, d, extra in sizes]
    return [(i + 2 * p - d * (w - 1) - 1) // s + 1 for i, w, s, p, d, _ in sizes]


def _fake(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, tf32):
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    sizes = output_sizes(input, weight, stride, padding, dilation, transposed, output_padding)
    return input.new_empty([input.shape[0], channels, *sizes])


def _case(*windows: Window) -> Case:
    """A convolution over as many axes as there are windows."""
    image, taps, out = (
        " ".join(f"{letter}{i + 1}" for i in range(len(windows))) for letter in "IWP"
    )
    transposed = windows[0].transposed
    weight = "H*C N" if transposed else "H*N C"
    return Case(
        f"input: B H*C {image}, weight: {weight} {taps}, bias?: H*N -> B H*N {out}",
        {
            **{n: [getattr(w, n) for w in windows] for n in ("stride", "padding", "dilation")},
            "transposed": transposed,
            "output_padding": [w.extra for w in windows],
            "groups": lambda sizes: sizes["H"],
            "tf32": False,
        },
        windows={f"P{i + 1}": w for i, w in enumerate(windows)},
    )


def _window(axis, stride=1, padding=0, dilation=1, transposed=False, extra=0):
    return Window(f"I{axis}", f"W{axis}", stride, padding, dilation, transposed, extra)


_CASES = (
    _case(_window(1, 1, 1), _window(2, 1, 1)),
    _case(_window(1, 2, 1), _window(2, 1, 2, 3)),
    _case(_window(1)),
    _case(_window(1, 3, 2, 2)),
    _case(_window(1, 2, 1), _window(2), _window(3, 1, 1, 2)),
    _case(_window(1, 2, 1, 1, True, 1)),
    _case(_window(1, 3, 1, 2, True), _window(2, 1, 0, 1, True)),
)

convolution = register(
    Kernel(
        name="convolution",
        schema="(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
        " int[] dilation, bool transposed, int[] output_padding, int groups, bool tf32) -> Tensor",
        contract=Contract(_CASES),
        reference=convolution_reference,
        eager=convolution_reference,
        order="the chain of mm over channels and taps, k = c * W + w (on a GPU w * C + c, in "
        "parts); outside the image is +0",
        fake=_fake,
    )
)
