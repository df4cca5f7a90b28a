"""Fields of a run: everything in a config except the options of the branches."""

import math
import re

from ml_collections import ConfigDict

from seqmodels.fields import Field, Group, Rule, above, at_least, between, each_at_least, names_among, one_of, share
from seqmodels.fields.depth import ATTNRES, HYPER
from seqmodels.fields.field import HUGE
from seqmodels.fields.model import DENSE, IMPLEMENTATION, MODEL
from seqmodels.fields.rules import assignments

FACTORS = re.compile(r"\w+=(\d+\.?\d*|\.\d+)(e[+-]?\d+)?")


def _is_factors(text: str) -> bool:
    parts = [part.strip() for part in text.split(",")] if text else []
    return all(FACTORS.fullmatch(part) and float(part.partition("=")[2]) <= HUGE for part in parts)


EXTRAPOLATIONS = tuple(
    ["none", "linear", "ntk", "dynamic", "yarn", "llama3", "rerope", "leaky_rerope", "log_n", "window", "dt"]
)

ROOT = Group(
    "",
    {
        "name": Field("", "name of the config; without --workdir the run directory is runs/<name>"),
        "seed": Field(0, "seed of parameters, batches and dropout", largest=2**63 - 1),
        "steps": Field(1000, "number of optimizer steps", at_least(1)),
        "batch_size": Field(8, "rows in a step, over all devices and micro-batches", at_least(1)),
        "seq_len": Field(256, "tokens in a row", at_least(1)),
        "platform": Field("", "kind of device; empty: the one that JAX finds", one_of("", "cpu", "gpu", "tpu")),
        "evals": Field("", "evaluators at the end of training, apart by commas (docs/evaluation.md); empty: none"),
    },
    path="",
)

DATA = Group(
    "data",
    {
        "name": Field(
            "shakespeare_austen",
            "shakespeare_austen (comes with the project), text (local files), hf:NAME (Hugging Face Hub), or a TFDS "
            "name such as wiki40b/en",
        ),
        "path": Field(
            "",
            "files of your own: names, globs, folders, apart by commas (text, JSON, CSV, Parquet, Arrow; docs/data.md)",
            path=True,
        ),
        "validation_path": Field("", "files of the validation split; empty: see held_out", since=2, path=True),
        "test_path": Field("", "files of the test split; empty: see held_out", since=2, path=True),
        "held_out": Field(
            "end",
            "splits without files: a twentieth of the text at its end (end), or of the documents, drawn (documents)",
            one_of("end", "documents"),
            since=2,
        ),
        "mixture": Field(
            "",
            "several texts in place of one, with weights: '0.7 books; 0.3 hf:org/name' (docs/data.md)",
            since=2,
            path=True,
        ),
        "streaming": Field(False, "read and tokenise the text while training, and keep no copy of it", since=2),
        "shuffle_buffer": Field(10_000, "with streaming: documents that are shuffled together", at_least(1), since=2),
        "text_key": Field("text", "feature of a TFDS dataset, key of JSON or column of a table that holds the text"),
        "tokenizer": Field(
            "bytes", "bytes, or path of a sentencepiece .model or a Hugging Face tokenizer.json", path=True
        ),
        "separator": Field(
            "",
            "token of the tokenizer's file that begins each document, such as <s>; empty: its end-of-text token "
            "(docs/data.md)",
            since=2,
        ),
        "cache": Field("data", "folder of datasets and of tokenised text", path=True),
        "reset": Field(True, "keep the documents of a row apart: states are reset, and attention sees one document"),
    },
    path="data",
)

# for configs whose rows are generated (docs/synthetic.md); the fields of `data.task` are those of the task's class
TASK_DATA = Group(
    "data",
    {
        "name": Field("mqar", "task of seqmodels/data/synthetic that makes the rows"),
        "loss": Field(
            "answers",
            "targets: the answers, or all next tokens too (induction, recall, in_context_recall and passkey have them)",
            one_of("answers", "all"),
        ),
        "rows": Field(512, "rows of the validation and of the test split", at_least(1)),
        "lengths": Field(
            (),
            "tokens of rows that a trained model is measured on too",
            each_at_least(1, "lengths in tokens", empty=True),
        ),
        "reset": Field(False, "without effect here: a row is one document"),
    },
    path="data",
)

# for configs whose rows are images, series, DNA or sound (docs/domains.md); the fields of `data.domain` are those of
# the domain's class
DOMAIN_DATA = Group(
    "data",
    {
        "name": Field("digits", "domain of seqmodels/data/domains that reads the rows", since=2),
        "path": Field(
            "",
            "file or folder of the data, or wheel that holds them; empty: packages in the cache, or installed ones",
            since=2,
            path=True,
        ),
        "cache": Field("data", "folder whose folder packages has the wheels that were fetched", since=2, path=True),
        "reset": Field(True, "keep the documents of a row apart, such as two texts that are compared", since=2),
        "half_rate": Field(
            0.0, "share of the training rows of which every second sample is read, at steps of 2", share, since=2
        ),
    },
    path="data",
)

OPTIMIZER = Group(
    "optimizer",
    {
        "name": Field(
            "adamw",
            "adamw; muon, for matrices, and AdamW for the rest; or schedule_free, AdamW whose average is the result",
            one_of("adamw", "muon", "schedule_free"),
            since=2,
        ),
        "muon": Field(0.95, "decay of Muon's mean of gradients", share, since=2),
        "learning_rate": Field(3e-3, "largest learning rate", above(0)),
        "schedule": Field(
            "cosine",
            "learning rate after the warm-up: cosine, wsd (constant, then a straight line down) or constant",
            one_of("cosine", "wsd", "constant"),
        ),
        "warmup": Field(0.02, "steps in which the learning rate rises; below 1: a share of all steps", at_least(0)),
        "decay": Field(0.2, "share of the steps, at the end, in which the learning rate of wsd falls", between(0, 1)),
        "floor": Field(0.1, "last learning rate as a share of the largest", between(0, 1)),
        "b1": Field(0.9, "decay of Adam's mean of gradients", share),
        "b2": Field(0.95, "decay of Adam's mean of squared gradients", share),
        "eps": Field(1e-8, "epsilon of Adam's denominator", above(0)),
        "weight_decay": Field(0.1, "decay of matrices, times the learning rate", at_least(0)),
        "clip": Field(1.0, "largest global norm of the gradients; larger ones are scaled down; 0: any", at_least(0)),
        "ema": Field(0.0, "decay of the averaged parameters, which are evaluated then; 0: none are kept", share),
        "groups": Field(
            "",
            "factors of the learning rate for groups of parameters, such as ssm=0.1,embedding=0.5",
            Rule(_is_factors, "GROUP=FACTOR apart by commas, such as 'ssm=0.1,embedding=0.5', or ''"),
            since=2,
        ),
    },
    path="optimizer",
)

TRAINING = Group(
    "training",
    {
        "accumulate": Field(1, "micro-batches of a step, whose gradients add up (to save memory)", at_least(1)),
        "bptt": Field(False, "truncated back-propagation through time: a row begins with the last step's final state"),
        "z_loss": Field(0.0, "weight of the squared logarithm of the softmax's denominator in the loss", at_least(0)),
        "loss_chunk": Field(1024, "tokens of a row whose logits are in memory at once; 0: all", at_least(0)),
        "nan": Field(
            "stop", "what to do where loss or gradient is not finite: stop, or skip the step", one_of("stop", "skip")
        ),
        "debug": Field(
            "",
            "help in finding mistakes (docs/debugging.md): nans (stop where the first NaN appears), shapes (print "
            "those of all activations) or nojit (run without compilation)",
            one_of("", "nans", "shapes", "nojit"),
            since=2,
        ),
        "start": Field(
            "",
            "run directory whose parameters a new run begins with (docs/checkpoints.md); empty: fresh ones",
            since=2,
            path=True,
        ),
        "xla": Field(
            "",
            "options of the XLA compiler for the step, such as xla_gpu_enable_latency_hiding_scheduler=false, over "
            "those of seqmodels/training/xla.py",
            Rule(lambda text: assignments(text) is not None, "NAME=VALUE apart by commas, or ''"),
            since=2,
        ),
        "hang_after": Field(
            0.0,
            "seconds without progress after which a run ends with status 75 and says which process is stuck where; 0: "
            "a job of several processes only says it",
            at_least(0),
            since=2,
        ),
        "recheck_every": Field(
            0,
            "every so many steps one is computed twice and must give the same bits; needs room for two states; 0: none",
            at_least(0),
            since=2,
        ),
        "profile_start": Field(0, "step at which a profile is started; 0: none", at_least(0)),
        "profile_steps": Field(3, "steps of that profile", at_least(1)),
    },
    path="training",
)

MESH = Group(
    "mesh",
    {
        "data": Field(
            -1,
            "devices that split the rows of a batch; -1: all that the other axes leave",
            Rule(lambda n: n == -1 or n >= 1, "at least 1, or -1 for the devices that the other axes leave"),
        ),
        "fsdp": Field(1, "devices that split the rows and the parameters", at_least(1)),
        "tensor": Field(1, "devices that split heads and inner channels", at_least(1)),
        "sequence": Field(1, "devices that split the tokens of a row", at_least(1)),
        "expert": Field(1, "devices that split experts", at_least(1)),
    },
    path="mesh",
)

CHECKPOINT = Group(
    "checkpoint",
    {
        "every": Field(100, "steps between checkpoints", at_least(1)),
        "keep": Field(2, "newest checkpoints that are kept", at_least(1)),
        "keep_every": Field(0, "checkpoints of every so many steps are kept for good; 0: none", at_least(0)),
        "best": Field("", "metric whose best checkpoint is kept too, such as validation_loss; empty: none"),
    },
    path="checkpoint",
)

EVALUATION = Group(
    "evaluation",
    {
        "every": Field(0, "steps between validations during training; 0: at the end only", at_least(0)),
        "rows": Field(64, "rows, spread over the split, that a validation during training reads", at_least(1)),
        "limit": Field(
            0,
            "rows of a split, spread over it, that the evaluation at the end of training reads; 0: all",
            at_least(0),
            since=2,
        ),
        "batch_size": Field(0, "rows at once; 0: as many as in training", at_least(0)),
        "lengths": Field(
            (1, 4, 16, 64),
            "lengths of context that eval.py measures, as multiples of seq_len",
            each_at_least(1, "multiples of seq_len"),
        ),
        "extrapolate": Field(
            "none",
            "methods of --evals=extrapolation for rows longer than in training, apart by commas (docs/positions.md)",
            names_among(*EXTRAPOLATIONS),
            since=2,
        ),
        "rates": Field(
            (2,),
            "of --evals=rate: one sample in so many is read",
            each_at_least(2, "numbers of samples"),
            since=2,
        ),
        "classification": Field(
            "", "JSON lines of prompt, choices and answer, as a glob; empty: those of the project", path=True
        ),
        "qa": Field("", "JSON lines of question, answers and context for --evals=qa, as a glob", path=True, since=2),
        "qa_tokens": Field(32, "most tokens of an answer of --evals=qa", at_least(1), since=2),
        "qa_shots": Field(0, "most examples before each question of --evals=qa", at_least(0), since=2),
        "qa_repeat": Field(1, "how often --evals=qa gives context and question", at_least(1), since=2),
        "qa_length": Field(
            0, "most tokens of a prompt of --evals=qa, whose context is cut; 0: any number", at_least(0), since=2
        ),
        "tasks": Field(
            "local", "tasks of lm-eval apart by commas, or a list of seqmodels/evals/lists.py such as local or mamba"
        ),
        "task_folder": Field("", "folder of your own task files for lm-eval", path=True),
    },
    path="evaluation",
)

THROUGHPUT = Group(
    "throughput",
    {
        "contexts": Field(
            (1, 4, 16), "lengths of the prompts, as multiples of seq_len", each_at_least(1, "multiples of seq_len")
        ),
        "batches": Field((1, 8), "numbers of prompts at once", each_at_least(1, "numbers of prompts")),
        "tokens": Field(32, "new tokens for each prompt", at_least(1)),
        "repeats": Field(3, "times that each is measured; the median counts", at_least(1)),
    },
    path="evaluation.throughput",
)

METRICS = Group(
    "metrics",
    {
        "every": Field(1, "steps between rows of metrics.jsonl", at_least(1)),
        "norms": Field(
            True, "report norms of parameters and updates too, for 12 bytes of memory traffic a parameter and step"
        ),
        "tensorboard": Field(True, "write TensorBoard events too"),
        "wandb": Field("", "project of Weights & Biases that gets the metrics too; empty: none"),
    },
    path="metrics",
)

SAMPLE = Group(
    "sample",
    {
        "prompt": Field("The ", "beginning of the text that is shown at the end of training"),
        "tokens": Field(200, "tokens of that text; 0: no text", at_least(0)),
        "temperature": Field(
            0.8,
            "temperature of sampling; 0: always take the likeliest token",
            Rule(lambda t: 0 <= t < math.inf, "at least 0, and finite"),
        ),
        "top_k": Field(0, "sample from the k likeliest tokens; 0: from all", at_least(0)),
        "top_p": Field(
            0.95,
            "sample from the likeliest tokens that have this probability together",
            Rule(lambda p: 0 < p <= 1, "greater than 0 and at most 1"),
        ),
    },
    path="sample",
)

GROUPS: tuple[Group, ...] = (
    *(ROOT, MODEL, IMPLEMENTATION, ATTNRES, HYPER, DENSE, DATA, OPTIMIZER, TRAINING, MESH, CHECKPOINT),
    *(EVALUATION, THROUGHPUT, METRICS, SAMPLE),
)


def defaults() -> ConfigDict:
    """A config with every field of a run at its default. A config file adds the options of its branches."""
    config = ROOT.defaults()
    for group in GROUPS[1:]:
        parent, _, name = group.home.rpartition(".")
        (config[parent] if parent else config)[name] = group.defaults()
    return config


def groups_of(config: ConfigDict) -> tuple[Group, ...]:
    """GROUPS for this config, whose data are a task if `data.task` exists, a domain with `data.domain`, else a text."""
    inside = {"task": TASK_DATA, "domain": DOMAIN_DATA}.get(kind_of_data(config), DATA)
    return tuple(inside if group is DATA else group for group in GROUPS)


def kind_of_data(config: ConfigDict) -> str:
    """What a config's rows are: of a "task", of a "domain", or "text"."""
    data = config.get("data")
    if not isinstance(data, ConfigDict):
        return "text"
    return next((kind for kind in ("task", "domain") if kind in data), "text")
