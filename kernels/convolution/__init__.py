"""Convolutions in one, two and three dimensions: strided, dilated, grouped, transposed.

`y[b, n, p] = bias[n] + sum over c, w of weight[n, c, w] * x[b, c, i]`, rounded once, with
`i = p * stride + w * dilation - padding`; i, p and w are a number for each axis of the image.

Bits, on the CPU: the chain of `mm` (kernels/matmul) over the terms `k = c * W + w`, the W taps of
all axes counted in row-major order, so that a convolution has the bits of `unfold`, then `mm`. What
lies outside the image is +0 and is multiplied like any other element, so that `padding` has the
bits of a padded image. A transposed convolution is its own sum, not one over an image with zeros
put in: output p takes the taps w, in rising order, for which `p + padding - w * dilation` is a
multiple of stride; i is how many strides it is. All p with one remainder by stride take the same.

On a GPU the terms of a tap lie side by side, `k = w * C + c`, with C filled up by channels of zeros
to 1, 2, 4 or a multiple of 8: a chain of `tl.dot` over rising k, as `mm` has it on `unfold`'s
columns in that order. More than 1536 terms of several taps are as many parts as that takes, of
equal length but the last; each is such a chain from +0, and they are added in rising order. One tap
is one chain: the product that it is. One channel of up to 64 taps, as in a depthwise convolution,
is one fma chain in fp32 over the taps. The numbers of channels and taps decide, and nothing else.

Row law: an output reads its window, its weights and its bias, in an order that follows the sizes of
C and W. The image around the window, where it lies, the batch and the other groups change no bit.
"""

from bicompile.kernels.convolution import op

__all__ = ["op"]
