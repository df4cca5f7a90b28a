"""Softmax attention by cuDNN's flash attention: no scores in memory, but plain masks only."""

import jax


def supports(platform: str, *, dtype, width, causal, segment_ids, key_mask, query_index, window) -> str | None:
    """Why this backend cannot serve the call; None: it can."""
    if platform != "cuda":
        return f"cuDNN needs an NVIDIA GPU, not {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN takes bfloat16 and float16, not {dtype}"
    if width % 8 or width > 128:
        return f"cuDNN takes heads of up to 128 channels, a multiple of 8, not {width}"
    for name, given in (("segment_ids", segment_ids), ("key_mask", key_mask), ("query_index", query_index)):
        if given:
            return f"cuDNN is not served with {name}"
    if window is not None and not causal:
        return "cuDNN takes a window with causal attention only"
    return None


def attention(q, k, v, *, scale, causal, window, **rules):
    """See `kernels.attention.attention`."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
