"""The mixer that docs/mixers.md adds obeys the contract."""

import re
import sys
import types
from pathlib import Path

import pytest
import test_mixers as contract

from seqmodels.mixers import MIXERS

TEXT = (Path(__file__).parents[1] / "docs" / "mixers.md").read_text()


@pytest.fixture
def ema(monkeypatch):
    """The mixer of the page, registered."""
    module = types.ModuleType("ema")
    monkeypatch.setitem(sys.modules, "ema", module)
    exec(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], module.__dict__)
    monkeypatch.setitem(MIXERS, "ema", module.Ema)
    return "ema"


@pytest.mark.slow
def test_example_obeys_the_contract(ema):
    contract.test_causal(ema)
    contract.test_whole_equals_pieces_from_any_state(ema, (4, 1, 5), True)
    contract.test_packed_documents_equal_separate_ones(ema)
    contract.test_padding_is_nothing(ema, "interior")
    contract.test_state_is_differentiable_in_and_out(ema)
    contract.test_sharded_equals_unsharded(ema, ("data", "sequence"))
