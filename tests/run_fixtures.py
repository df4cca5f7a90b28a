"""Tiny configs and run directories for the tests of training and evaluation."""

import json

import jax
from ml_collections import ConfigDict

from seqmodels import data
from seqmodels.configs import mamba
from seqmodels.model import build
from seqmodels.training.checkpoint import Checkpoints
from seqmodels.training.optimizer import make_optimizer
from seqmodels.training.run import write_config
from seqmodels.training.sharding import make_mesh
from seqmodels.training.state import abstract_params, abstract_state, init_state
from tests.data_fixtures import POEM, text_config
from tests.overrides import with_fields

STEPS = (2, 4)  # of the checkpoints of `make_run`


def write_text(folder, lines=100):
    """A corpus of so many short documents in `folder`, which is returned."""
    (folder / "corpus.txt").write_text("\n\n".join(f"It is {n} o'clock, and all is well. " * 9 for n in range(lines)))
    return folder


def tiny(text, **overrides):
    """Six steps of a tiny Mamba on the corpus in the folder `text`; overrides are dotted names with __ for the dot."""
    config = mamba.get_config().unlock()
    config.steps, config.batch_size, config.seq_len, config.model.width, config.model.repeats = 6, 4, 16, 16, 1
    config.data.name, config.data.path, config.data.cache = "text", f"{text}/*.txt", f"{text}/cache"
    config.mesh.data, config.checkpoint.every, config.sample.tokens = 1, 3, 0
    config.metrics.tensorboard = False
    return with_fields(config, overrides)


def config_for(module, tmp_path):
    """Config of a tiny model of `module`, a file of configs/, on a poem in tmp_path."""
    config = ConfigDict(module.get_config().to_dict())
    config.data = text_config(tmp_path, {"poem.txt": POEM})
    config.update(seq_len=32, batch_size=8, steps=4)
    config.model.update(width=32, repeats=1)
    config.evaluation.update(lengths=(1, 2, 64), rows=4)
    config.checkpoint.update(best="validation_loss", keep=5)
    return config


def make_run(config, workdir):
    """A run directory with checkpoints of STEPS, whose parameters differ; the first has the lower validation loss."""
    mesh = make_mesh(config)
    dataset = data.load(config.data, seq_len=config.seq_len, batch_size=config.batch_size)
    model = build(config.model, dataset.tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, abstract_params(model, config))
    state = init_state(model, optimizer, config, abstract_state(model, optimizer, config, mesh))
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
    rows = []
    for step in STEPS:
        moved = jax.tree.map(lambda x, by=0.01 * step: x + by, state.params)
        metrics = {"validation_loss": float(step)}
        checkpoints.save(step, state.replace(step=state.step + step, params=moved), metrics)
        rows.append(json.dumps({"step": step, **metrics}))
    checkpoints.close()
    (workdir / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return workdir
