"""Every field of a config, declared once: its default, what it means, and what is allowed.

`seqmodels/fields/<branch>.py` declares the options of one branch, `model.py` those of every model, and `run.py` all
others. Configs take their values from here, `seqmodels.config.validate` and the modules their checks, and `--help` its
text. Nothing in this package imports JAX, so that mistakes are found before it is loaded, and `--help` is quick.
"""

from seqmodels.fields.field import Field, refuse
from seqmodels.fields.group import Group, group
from seqmodels.fields.rules import Rule, above, any_value, at_least, between, each_at_least, names_among, one_of, share

__all__ = [
    "Field",
    "Group",
    "Rule",
    "above",
    "any_value",
    "at_least",
    "between",
    "each_at_least",
    "group",
    "names_among",
    "one_of",
    "refuse",
    "share",
]
