"""Write the golden JSON of every config and preset beside this file: python tests/golden/regenerate.py

tests/test_presets.py compares with them, so that no preset changes unseen: look through the diff before you commit it.
"""

import importlib
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def every_config() -> dict[str, str]:
    """File name and JSON text of each preset of each config; presets are those that a wrong name's error lists."""
    sys.path.insert(0, str(ROOT))
    golden = {}
    for path in sorted((ROOT / "configs").glob("[a-z]*.py")):
        module = importlib.import_module(f"seqmodels.configs.{path.stem}")
        if not hasattr(module, "get_config"):  # base.py
            continue
        try:
            module.get_config("?")
        except ValueError as error:
            presets = re.search("presets are (.*)", str(error)).group(1).split(", ")
        for preset in presets:
            text = json.dumps(module.get_config(preset).to_dict(), indent=1)
            golden[f"{path.stem}-{preset}.json"] = text + "\n"
    return golden


if __name__ == "__main__":
    for old in HERE.glob("*.json"):
        old.unlink()
    for name, text in every_config().items():
        (HERE / name).write_text(text)
        print(name)
