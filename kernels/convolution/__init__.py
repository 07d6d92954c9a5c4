"""Convolutions in one, two and three dimensions: strided, dilated, grouped, transposed.

`y[b, n, p] = bias[n] + sum over c, w of weight[n, c, w] * x[b, c, i]`, rounded once, with
`i = p * stride + w * dilation - padding`; i, p and w are a number for each axis of the image.

Bits, on the CPU: the chain of `mm` (kernels/matmul) over the terms `k = c * W + w`, the W taps of
all axes counted in row-major order, so that a convolution has the bits of `unfold`, then `mm`. What
lies outside the image is +0 and is multiplied like any other element, so that `padding` has the
bits of a padded image. A transposed convolution is its own sum, not one over an image with zeros
put in: output p takes the taps w, in rising order, for which `p + padding - w * dilation` is a
multiple of stride; i is how many strides it is. All p with one remainder by stride take the same.

On a GPU with more than 64 terms: the same chain of `tl.dot`. With 64 or less, as in a depthwise
convolution: one fma chain in fp32 over rising k. The number of terms decides and nothing else.

Row law: an output reads its window, its weights and its bias, in an order that follows the sizes of
C and W. The image around the window, where it lies, the batch and the other groups change no bit.
"""

from bicompile.kernels.convolution import op

__all__ = ["op"]
