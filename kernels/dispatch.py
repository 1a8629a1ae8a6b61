"""Which implementation a public kernel runs: Triton on a GPU, its plain torch twin elsewhere."""

from typing import Literal

from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.attention_checks import check_tree_attention, check_tree_values
from specdec.kernels.reference import SharedPrefix, Window


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_nodes: Tensor,
    ancestor_bits: Tensor,
    *,
    scale: float,
    window: int | Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    softmax: Literal["running", "unified"] = "running",
    unified_max: float = 0.0,
    shared_prefix: SharedPrefix | None = None,
    max_context: int | None = None,
    split: int | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Attention of the rows of a ragged batch of trees over paged keys and values.

    specdec.kernels.attention.tree_attention, whose contract this is, for CUDA and HIP tensors, else
    the twin in reference.py: one definition, which softmax, shared_prefix, max_context and split
    only ask to be computed in another way.
    """
    if q.is_cuda:
        from specdec.kernels import attention

        return attention.tree_attention(
            q, k_pages, v_pages, block_table, context_lens, cu_nodes, ancestor_bits, scale=scale,
            window=window, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, out=out,
            softmax=softmax, unified_max=unified_max, shared_prefix=shared_prefix,
            max_context=max_context, split=split, validate=validate,
        )  # fmt: skip
    window = Window(window) if isinstance(window, int) else window
    check_tree_attention(
        q, k_pages, v_pages, block_table, context_lens, cu_nodes, ancestor_bits, scale=scale,
        window=window, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, out=out,
        softmax=softmax, shared_prefix=shared_prefix, max_context=max_context, split=split,
    )  # fmt: skip
    if validate is not False:
        check_tree_values(
            k_pages.shape, block_table, context_lens, cu_nodes, ancestor_bits, rows=q.shape[0],
            shared_prefix=shared_prefix, max_context=max_context,
        )  # fmt: skip
    return reference.tree_attention(
        q, k_pages, v_pages, block_table, context_lens, cu_nodes, ancestor_bits, scale=scale,
        window=window, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, out=out,
    )  # fmt: skip
