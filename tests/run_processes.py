"""train.py in processes of its own, on a tiny text."""

import sys
from pathlib import Path

from seqmodels.training import metrics

ROOT = Path(__file__).parent.parent
STEPS = 100


def command(workdir, text, *overrides):
    """train.py with a tiny Mamba on the corpus in the folder `text`, for STEPS steps."""
    return [
        sys.executable, "train.py", "--config=configs/mamba.py", f"--workdir={workdir}", f"--config.steps={STEPS}",
        "--config.model.width=16", "--config.model.repeats=1", "--config.metrics.tensorboard=False",
        "--config.batch_size=4", "--config.seq_len=24",
        "--config.data.name=text", f"--config.data.path={text}/*.txt", f"--config.data.cache={text}/cache",
        "--config.checkpoint.every=7", "--config.sample.tokens=0", "--config.model.dropout=0.1", *overrides,
    ]  # fmt: skip


def finish(process, status):
    """What a process said, which must end with this exit status and without a traceback."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out


def losses(workdir):
    """The losses of a run, by step."""
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # each step exactly once, in order
    return [row["loss"] for row in rows]
