"""Heads by name (`config.model.head`): what a model predicts from its hidden states, and its training loss.

A new head is one file, a subclass of `Head`, one line here, and its name in seqmodels/fields/model.py.
"""

from seqmodels.heads.classify import Classify
from seqmodels.heads.forecast import Forecast
from seqmodels.heads.gaussian import NextValue, RegressSteps
from seqmodels.heads.head import Head
from seqmodels.heads.next_token import NextToken
from seqmodels.heads.pair import Pair
from seqmodels.heads.rebuild import Rebuild
from seqmodels.heads.regress import Regress
from seqmodels.heads.window import Window

HEADS: dict[str, type[Head]] = {
    "next_token": NextToken,
    "classify": Classify,
    "regress": Regress,
    "forecast": Forecast,
    "window": Window,
    "pair": Pair,
    "rebuild": Rebuild,
    "next_value": NextValue,
    "regress_steps": RegressSteps,
}
