"""What a model predicts from its hidden states, and the loss it is trained by, by name (`config.model.head`).

A head is a Linen module with the fields `width` (D), `size` and `dtype`, some with more, and

    at_root    whether its parameters lie at the root of the tree, and not under the name of the head
    method     method of the model that gives what the head's loss reads
    target     array of a batch that it is trained on; its size is `size`
    causal     whether no hidden state may know of later positions
    needs      arrays that a batch must have besides the input and the target
    head(hidden, mask, table) -> logits or predictions, float32
    loss(outputs_of, hidden, batch, **options(training)) -> (total, sums)
    figures(sums, **options(training)) -> {"loss": ..., ...}
    options(training) -> dict

`loss`, `figures` and `options` are pure functions without parameters. `total` and all of `sums` are sums over what
counts, and `sums.count` says how much that is, so that sums of micro-batches add up exactly: `total` is what is
differentiated, and the gradient is divided by the count at the end. `sums` carry no gradient. A new head is one file
and one line here.
"""

import flax.linen as nn

from seqmodels.heads.classify import Classify
from seqmodels.heads.forecast import Forecast
from seqmodels.heads.next_token import NextToken
from seqmodels.heads.regress import Regress

HEADS: dict[str, type[nn.Module]] = {
    "next_token": NextToken,
    "classify": Classify,
    "regress": Regress,
    "forecast": Forecast,
}
