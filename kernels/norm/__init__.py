"""layer_norm, rms_norm and group_norm, and their gradients with respect to the input.

`(x - mean) / sqrt(var + eps) * weight + bias`; rms_norm: `x / sqrt(mean(x * x) + eps) * weight`.

Bits: means run in the lanes and the tree of `bicompile.kernels.reduce`; the variance is a second
pass around the mean.  layer_norm: `fma((x - mean) * rstd, weight, bias)` in float32.  group_norm:
in double, rounded once.  rms_norm repeats the roundings of the ops that it replaces:
``x.float().pow(2).mean(-1)``, ``+ eps``, ``rsqrt``, ``x * r``, the cast, ``* (offset + weight)``.

Gradients: `g = grad * weight`, `y = (x - mean) * rstd`, `rstd * ((g - mean(g)) - y * mean(g * y))`
in double, rounded once; without `mean(g)` for rms_norm.  Weights and biases sum over all rows: that
is the reduce family's business.

Row law: a row (for group_norm, one group of one sample) reads itself alone.
"""

from bicompile.kernels.norm import op

__all__ = ["op"]
