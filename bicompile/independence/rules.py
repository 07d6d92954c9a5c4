"""TABLE: op -> how its axes map.  An op that is not in it is undecided, never proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bicompile.independence import combining, indexing, moving, routing
from bicompile.passes.audit import ALLOWED


@dataclass(frozen=True)
class Entry:
    """A rule.

    Args:
        rule: takes the call and returns what is known of its results, one for all or one for each.
        keeps: it takes integers with their meaning (`Content`) and checks itself what it does with
            them, and with the batch size among its arguments.
        sized: the batch size may stand among its arguments.
    """

    rule: Callable[..., Any]
    keeps: bool = False
    sized: bool = False


# Not pointwise, or with sizes among the arguments.
_NOT_POINTWISE = frozenset("bitcast view_of_dtype inductor_force_stride_order".split())
_POINTWISE = " ".join(sorted((ALLOWED["pointwise"][1] | ALLOWED["conversion"][1]) - _NOT_POINTWISE))

KEEPS, SIZED, PLAIN = "keeps", "sized", ""

_GROUPS: tuple[tuple[Callable[..., Any], str, str], ...] = (
    (combining.pointwise, PLAIN, _POINTWISE),
    (combining.pointwise, PLAIN, "__and__ __or__ __xor__ __lshift__ __rshift__ copy celu"),
    (combining.pointwise, PLAIN, "log_sigmoid_forward true_divide"),
    (moving.copied, KEEPS, "clone alias detach contiguous lift_fresh lift_fresh_copy"),
    (moving.copied, KEEPS, "_to_copy convert_element_type device_put to"),
    (moving.viewed, KEEPS, "view _unsafe_view reshape view_copy _reshape_alias"),
    (moving.viewed, KEEPS, "squeeze unsqueeze squeeze_copy unsqueeze_copy unflatten flatten"),
    (moving.expanded, KEEPS, "expand expand_copy"),
    (moving.permuted, KEEPS, "permute permute_copy"),
    (moving.transposed, KEEPS, "transpose t"),
    (moving.sliced, KEEPS, "slice narrow"),
    (moving.selected, KEEPS, "select"),
    (moving.unbound, KEEPS, "unbind"),
    (moving.split, KEEPS, "split split_with_sizes chunk"),
    (moving.repeated, KEEPS, "repeat"),
    (moving.created, KEEPS, "full zeros ones empty empty_strided empty_permuted scalar_tensor"),
    (moving.created, KEEPS, "new_full new_zeros new_ones new_empty new_empty_strided"),
    (moving.created, KEEPS, "full_like zeros_like ones_like empty_like"),
    (moving.counted, KEEPS, "arange"),
    (moving.constant, PLAIN, "linspace logspace eye tril_indices triu_indices"),
    (moving.concatenated, PLAIN, "cat"),
    (moving.stacked, PLAIN, "stack"),
    (moving.padded, PLAIN, "constant_pad_nd"),
    (moving.moved_along, PLAIN, "flip roll"),
    (moving.triangle, PLAIN, "tril triu"),
    (combining.reduced, PLAIN, "sum mean prod var std var_mean std_mean amax amin any all norm"),
    (combining.reduced, PLAIN, "argmax argmin max min aminmax logsumexp linalg_vector_norm"),
    (combining.reduced, PLAIN, "count_nonzero median mode"),
    (combining.along, PLAIN, "cumprod cummax cummin logcumsumexp diff glu kthvalue softmax"),
    (combining.along, PLAIN, "log_softmax _softmax _log_softmax _safe_softmax"),
    (combining.chosen_along, PLAIN, "topk"),
    (combining.normalised, PLAIN, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    (combining.batch_norm, PLAIN, "batch_norm cudnn_batch_norm native_batch_norm"),
    (combining.batch_norm, PLAIN, "_native_batch_norm_legit _native_batch_norm_legit_functional"),
    (combining.batch_norm, PLAIN, "_native_batch_norm_legit_no_training _batch_norm_no_update"),
    (combining.batch_norm, PLAIN, "_batch_norm_with_update_functional"),
    (combining.group_norm, SIZED, "group_norm native_group_norm"),
    (combining.by_letters, PLAIN, "mm bmm addmm baddbmm mv dot vdot addmv addbmm"),
    (combining.linear, PLAIN, "linear"),
    (combining.attention, PLAIN, "scaled_dot_product_attention"),
    (combining.attention, PLAIN, "_scaled_dot_product_flash_attention_for_cpu"),
    (combining.attention, PLAIN, "_scaled_dot_product_efficient_attention"),
    (combining.spatial, PLAIN, "convolution conv1d conv2d conv3d avg_pool1d avg_pool2d avg_pool3d"),
    (combining.spatial, PLAIN, "max_pool2d_with_indices _adaptive_avg_pool2d upsample_nearest2d"),
    (combining.spatial, PLAIN, "upsample_bilinear2d upsample_bicubic2d pixel_shuffle"),
    (combining.spatial, PLAIN, "pixel_unshuffle"),
    (routing.sort, KEEPS, "sort"),
    (routing.divided, KEEPS, "floor_divide"),
    (routing.histogram, KEEPS, "histc"),
    (routing.accumulated, KEEPS, "cumsum"),
    (routing.grouped_product, KEEPS, "_grouped_mm"),
    (indexing.embedding, KEEPS, "embedding"),
    (indexing.indexed, KEEPS, "index _unsafe_index"),
    (indexing.index_selected, KEEPS, "index_select"),
    (indexing.gathered, PLAIN, "gather"),
    (indexing.scattered, PLAIN, "scatter scatter_add scatter_reduce"),
    (indexing.put, KEEPS, "index_put _unsafe_index_put"),
    (indexing.copied_in, PLAIN, "index_copy index_add index_fill"),
    (indexing.part_written, SIZED, "slice_scatter select_scatter"),
)

_OURS: tuple[tuple[Callable[..., Any], str], ...] = (
    (combining.by_letters, "mm bmm addmm baddbmm mm_add swiglu qkv_proj"),
    (combining.heads, "qk_norm_rope"),
    (combining.solved, "solve_triangular"),
    (combining.attention, "sdpa sdpa_visible"),
    (combining.attention_gradients, "sdpa_backward sdpa_backward_visible"),
    (combining.visible_range, "visible_range"),
    (combining.reduced, "sum mean prod var std var_mean logsumexp norm"),
    (combining.along, "softmax softmax_backward"),
    (combining.statistics, "softmax_statistics"),
    (combining.along, "cumsum cumprod logcumsumexp"),
    (combining.chosen_along, "topk"),
    (indexing.added_by_row, "index_add"),
    (combining.normalised, "layer_norm rms_norm layer_norm_backward"),
    (combining.group_norm, "group_norm group_norm_backward"),
    (combining.spatial, "convolution"),
)

TABLE: Mapping[str, Entry] = {
    **{f"prims::{name}": Entry(combining.pointwise) for name in _POINTWISE.split()},
    "prims::convert_element_type": Entry(moving.copied, keeps=True),
    "prims::iota": Entry(moving.counted, keeps=True),
    **{
        f"aten::{name}": Entry(rule, kind == KEEPS, kind == SIZED)
        for rule, kind, names in _GROUPS
        for name in names.split()
    },
    **{f"bicompile::{name}": Entry(rule) for rule, names in _OURS for name in names.split()},
    "bicompile::grouped_mm": Entry(routing.grouped_product, keeps=True),
    "transformers::grouped_mm_fallback": Entry(routing.grouped_product, keeps=True),
}
"""Qualified name of an op -> its rule, for all its overloads."""

FROM_SHAPES = frozenset(
    "aten::" + name
    for name in (
        "full_like zeros_like ones_like empty_like "
        "new_full new_zeros new_ones new_empty new_empty_strided"
    ).split()
)
"""Ops that read of their tensor its sizes alone."""
