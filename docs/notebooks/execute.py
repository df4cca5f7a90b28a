"""Executes the notebooks of this folder: python docs/notebooks/execute.py [NAME.ipynb ...]

The cells of each run in a process and a folder of its own, and what they print is written into the notebook. No Jupyter
is needed.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))


def run(notebook: Path, folder: Path) -> dict:
    """The notebook with the outputs of its cells, which run one after another in `folder`."""
    content = json.loads(notebook.read_text())
    names: dict = {"__name__": "__main__"}
    with contextlib.chdir(folder):
        for number, cell in enumerate(cells(content), 1):
            printed = io.StringIO()
            code = compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            text = {"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}
            cell["outputs"], cell["execution_count"] = [text] if text["text"] else [], number
    return content


def cells(content: dict) -> list[dict]:
    """The cells with code."""
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["PYTHONPATH"] = str(ROOT)  # for the commands that cells start
    names = sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb"))
    if len(names) > 1:
        for name in names:
            subprocess.run([sys.executable, __file__, name], check=True)
        return
    notebook = HERE / names[0]
    with tempfile.TemporaryDirectory() as folder:
        content = run(notebook, Path(folder))
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(notebook.name)


if __name__ == "__main__":
    main()
