"""Fields that every config has, with their defaults, in one place.

A config file calls `base()`, adds the fields of its mixers, applies its preset, and returns the result of `finish`.
Nothing here touches a device, and nothing of the library is imported.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """Every field a config may have. Sizes are in tokens, rows and steps."""
    config = ConfigDict()
    config.name = ""
    config.seed = 0
    config.steps = 1000  # optimizer steps in all
    config.batch_size = 8  # rows a step, over all devices and accumulation steps
    config.seq_len = 256  # tokens a row
    config.platform = ""  # "" takes JAX's default; "cpu", "gpu" or "tpu" insists
    config.evals = ""  # evaluators at the end of training, names apart by commas (docs/evaluation.md); "": none

    config.model = ConfigDict(
        dict(
            width=128,  # D, the residual width
            pattern="mamba",  # one group of layers: blocks apart by spaces, channel mixer after "+"
            repeats=4,  # how often the pattern is repeated
            vocab_size=0,  # 0: the tokenizer's, rounded up to vocab_multiple
            vocab_multiple=8,
            tie_embeddings=True,
            embedding_std=0.02,
            norm_eps=1e-5,
            dropout=0.0,  # on every residual branch
            dtype="float32",  # of activations and matmuls; parameters, states and losses are float32
            residual_dtype="float32",
            remat="none",  # none | rescan | mixer | projected | scan | block | dots | streams: what is kept
            remat_blocks=0,  # remat only the first so many blocks, if unrolled; 0: all
            scan_blocks=0,  # 0: layers unrolled; k: lax.scan over super-blocks of k repeats
        )
    )
    config.model.implementation = ConfigDict(  # of each operation: "" picks by device, a file of kernels/<op> insists
        dict(
            selective_scan="",  # reference | xla | mosaic_gpu | mosaic_tpu
            short_conv="",  # reference | xla | mosaic_gpu | mosaic_tpu
            attention="",  # reference | xla | cudnn
            linear_attention="",  # reference | xla | mosaic_gpu | mosaic_tpu
        )
    )
    config.model.dense = ConfigDict(
        dict(
            variant="none",  # none | read | input | output | rank | carry
            depth=2,  # m, how many shallower layers are collected
            every=1,  # every how many layers a dense one
            gate="channel",  # channel | state | both | none
            activation="silu",  # of the gate: silu | sigmoid | identity
            bottleneck=32,  # the gate's inner width is width / bottleneck
            per_source=False,  # one gate a source, or one for all
            projection="identity",  # identity | linear (N by N)
            norm=False,  # RMSNorm: of the fused key and value (input), of the dense term (else)
        )
    )

    config.data = ConfigDict(
        dict(
            name="shakespeare_austen",  # of seqmodels.data: a local text, or any TFDS name such as wiki40b/en
            path="",  # local text file(s) for name="text": glob of .txt, .txt.xz, .txt.gz, .jsonl
            text_key="text",  # feature that holds the text in a TFDS dataset or JSON line
            tokenizer="bytes",  # bytes | path to a sentencepiece .model or a Hugging Face tokenizer.json
            cache="data",  # where datasets and token caches are kept
            reset=True,  # documents in a row are kept apart (segment ids), or run together
        )
    )

    config.optimizer = ConfigDict(
        dict(
            learning_rate=3e-3,
            schedule="cosine",  # cosine | wsd | constant
            warmup=0.02,  # share of the steps, or a number of steps if > 1
            decay=0.2,  # wsd: share of the steps that decays at the end
            floor=0.1,  # last learning rate as a share of the peak
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip=1.0,  # global gradient norm; 0 turns it off
            ema=0.0,  # decay of the averaged weights; 0 turns them off
        )
    )
    config.training = ConfigDict(
        dict(
            accumulate=1,  # gradient accumulation: micro-batches a step
            bptt=False,  # truncated BPTT: the state of step n goes into step n + 1
            z_loss=0.0,
            loss_chunk=1024,  # tokens of a row whose logits exist at once; 0: all
            nan="stop",  # stop | skip
            profile_start=0,  # step at which a profile starts; 0: none
            profile_steps=3,
        )
    )
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, sequence=1, expert=1))  # -1: what is left
    config.checkpoint = ConfigDict(
        dict(
            every=100,  # steps
            keep=2,  # newest ones kept
            keep_every=0,  # and each k-th step for good; 0: none
            best="",  # metric whose best checkpoint is kept too, such as validation_loss
        )
    )
    config.evaluation = ConfigDict(
        dict(
            every=0,  # steps between validations during training; 0: at the end only
            rows=64,  # rows a validation during training reads
            batch_size=0,  # 0: batch_size
            lengths=(1, 4, 16, 64),  # context lengths of eval.py, as multiples of seq_len
            classification="",  # JSON lines of prompt, choices and answer: a file or a glob; "": those of the project
            tasks="local",  # of lm-eval: names apart by commas, or a list of seqmodels/evals/lists.py such as mamba
            task_folder="",  # your own task files for lm-eval
        )
    )
    config.evaluation.throughput = ConfigDict(
        dict(
            contexts=(1, 4, 16),  # tokens of a prompt, as multiples of seq_len
            batches=(1, 8),  # prompts at once
            tokens=32,  # new tokens for each
            repeats=3,  # timings, of which the median counts
        )
    )
    config.metrics = ConfigDict(
        dict(
            every=1,  # steps between rows
            norms=True,  # of parameters and updates too: 12 bytes of memory traffic a parameter and step
            tensorboard=True,
            wandb="",  # project's name; "" is off
        )
    )
    config.sample = ConfigDict(
        dict(prompt="The ", tokens=200, temperature=0.8, top_k=0, top_p=0.95)  # text shown at the end of training
    )
    return config


def large(config: ConfigDict, *, learning_rate: float, steps: int, remat: str) -> None:
    """Training of the Mamba paper's language models, set in place.

    Batches of 0.5 M tokens, AdamW (0.9, 0.95) with weight decay 0.1 and clip 1, cosine from five times GPT-3's learning
    rate down to 1e-5, and GPT-3's 375 M tokens of warm-up. Micro-batches of 8 rows are meant for one GPU of 80 GB: with
    more devices lower `training.accumulate`. For other text set `data.name` and `data.tokenizer`: the vocabulary holds
    the GPT-NeoX tokenizer's 50,277, and the default's bytes too.
    """
    config.steps = steps
    config.batch_size = 256
    config.seq_len = 2048
    config.training.accumulate = 32
    config.model.vocab_size = 50280
    config.model.dtype = "bfloat16"
    config.model.remat = remat
    config.optimizer.learning_rate = learning_rate
    config.optimizer.floor = 1e-5 / learning_rate
    config.optimizer.warmup = 715.0
    config.checkpoint.every = 500
    config.evaluation.every = 500
    config.evaluation.batch_size = 8
    config.metrics.every = 10
    config.metrics.norms = False


def short(config: ConfigDict, *, learning_rate: float) -> None:
    """Training of 25 M parameters in half a minute of one H200, set in place: for ablations with several seeds.

    23 M tokens: give it a text as large (benchmarks/rfc_prose.py makes one) with `data.name`, `data.path` and
    `data.tokenizer`. The vocabulary holds 8,192 ids, and the default's bytes too. One checkpoint, at the end.
    """
    config.steps = 700
    config.batch_size = 32
    config.seq_len = 1024
    config.model.vocab_size = 8192
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup = 0.1
    config.checkpoint.every = config.steps
    config.checkpoint.keep = 1
    config.metrics.tensorboard = False
    config.sample.tokens = 0


def preset(arg: str | None, allowed: Iterable[str]) -> str:
    """Name of the preset that `--config=FILE.py:arg` asks for; none asks for "small".

    Raises ValueError, naming the nearest preset and all of them.
    """
    allowed = list(allowed)
    name = arg or "small"
    if name not in allowed:
        near = get_close_matches(name, allowed, n=1, cutoff=0.3)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no preset {name!r}: {guess}presets are {', '.join(allowed)}")
    return name


def finish(config: ConfigDict, name: str, chosen: str) -> ConfigDict:
    """Name the config and lock its fields: only values can change from here."""
    config.name = name if chosen == "small" else f"{name}-{chosen}"
    return config.lock()
