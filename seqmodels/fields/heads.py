"""Rules shared by Mamba-2 and Mamba-3: the inner channels are split into heads, and the heads into groups."""

from typing import Any

from seqmodels.fields.field import refuse


def check_heads(name: str, options: Any, width: int) -> None:
    """Raises UserError unless the inner channels divide into heads of `head_dim`, and the heads into groups."""
    inner = options.expand * width
    if inner % options.head_dim:
        refuse(f"model.{name}.head_dim", options.head_dim, f"a divisor of expand * model.width = {inner}")
    heads = inner // options.head_dim
    if heads % options.groups:
        refuse(f"model.{name}.groups", options.groups, f"a divisor of the number of heads, {heads}")
