"""convert.py both ways: run directories from directories of transformers, and back, with the tokenizer; fine-tuning.

tests/test_convert_transformers.py has transformers as the oracle.
"""

import json
import re
import weakref

import jax
import numpy as np
import pytest
import tokenizers as tk
from safetensors.numpy import load_file

from seqmodels import cli, data
from seqmodels.configs import transformer
from seqmodels.errors import UserError
from seqmodels.evals.run import load_run
from seqmodels.interop import pretrained, runs, tokenizer
from seqmodels.interop.files import FileTensor
from seqmodels.interop.stacking import unstack
from seqmodels.model import build
from seqmodels.scripts import convert as convert_script
from seqmodels.scripts import eval as eval_script
from seqmodels.training import loop, optimizer
from seqmodels.training.state import abstract_params
from tests.run_fixtures import tiny, write_text

VOCABULARY = 270
TEXT = "it is a truth universally acknowledged that all is well"


def save_tokenizer(folder, text=TEXT):
    """tokenizer.json as of a Llama, which puts <s> before a text."""
    made = tk.Tokenizer(tk.models.BPE())
    made.pre_tokenizer, made.decoder = tk.pre_tokenizers.ByteLevel(add_prefix_space=False), tk.decoders.ByteLevel()
    letters, special = tk.pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = tk.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=letters)
    made.train_from_iterator([text], trainer)
    made.post_processor = tk.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    end = dict(__type="AddedToken", content="</s>", special=True, **flags)
    fields = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token=end)
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A directory of transformers: a tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformer.get_config().model
    config.update(dict(width=16, repeats=4, tie_embeddings=False))
    config.attention.update(heads=2, kv_heads=1)
    config.mlp.hidden = 24
    model = build(config, VOCABULARY)
    variables = jax.eval_shape(model.init, jax.random.key(0), model.example_input(2))
    random = np.random.default_rng(0)
    shapes = jax.tree.map(lambda p: p.value.shape, variables["params"], is_leaf=lambda p: hasattr(p, "names"))
    params = jax.tree.map(
        lambda shape: random.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    pretrained.save(folder, params, model.config, notes=dict(max_position_embeddings=64, eos_token_id=1))
    save_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    return folder


def converted(argv):
    return cli.run(convert_script.main, convert_script.define, "", ["convert.py", *map(str, argv)])


@pytest.fixture(scope="module")
def imported(theirs, tmp_path_factory):
    """The run directory of it, by the command; its text is not there."""
    folder = tmp_path_factory.mktemp("runs") / "imported"
    text = ["--config.data.name=text", f"--config.data.path={folder}/gone.txt", f"--config.data.cache={folder}/cache"]
    assert converted([f"--from={theirs}", f"--workdir={folder}", *text]) == 0
    return folder


def test_import(theirs, imported):
    run = load_run(imported, text=False)
    jax.tree.map(np.testing.assert_array_equal, run.params, pretrained.load(theirs)[1])
    assert run.step == 0 and run.config.name == "imported" and run.config.seq_len == 64
    assert run.config.data.separator == "<s>" and run.dataset.tokenizer.separator == 0
    assert run.dataset.tokenizer.name == str(imported / "tokenizer" / "tokenizer.json")


def test_import_with_a_scan_over_blocks(theirs, tmp_path):
    config = runs.config_of(theirs, tmp_path)
    config.model.scan_blocks = 2
    runs.import_run(theirs, tmp_path / "run", config)
    params = load_run(tmp_path / "run", text=False).params
    assert params["blocks"]["block_1"]["mlp"]["up"].shape == (2, 16, 24)
    jax.tree.map(np.testing.assert_array_equal, unstack(params), pretrained.load(theirs)[1])
    runs.export_run(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", theirs)


def assert_same_tensors(found, wanted):
    found, wanted = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_export_gives_back_what_was_imported(theirs, imported, tmp_path, capsys):
    assert converted([f"--workdir={imported}", f"--export={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: the model after step 0\n"
    assert_same_tensors(tmp_path / "out", theirs)
    for file in theirs.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["eos_token_id"] == 1 and fields["bos_token_id"] == 0 and fields["max_position_embeddings"] == 64


def test_export_in_other_dtypes(imported, theirs, tmp_path):
    runs.export_run(imported, tmp_path, dtype="bfloat16")
    want, got = (pretrained.load(folder)[1] for folder in (theirs, tmp_path))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype("bfloat16").astype(np.float32), y), want, got)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_weights_are_written_in_several_files(theirs, tmp_path):
    fields, params = pretrained.load(theirs)
    config = transformer.get_config().model
    config.update(fields)
    model = build(config, VOCABULARY).config
    pretrained.save(tmp_path, params, model)
    pretrained.save(tmp_path, params, model, shard_bytes=20_000)  # replaces the single file, which would be read first
    files = sorted(tmp_path.glob("model*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 20_000 + 4_000 for file in files)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path)[1], params)
    pretrained.save(tmp_path, params, model)  # and back
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path)[1], params)
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_tensors_are_read_one_after_another(theirs, tmp_path, monkeypatch):
    """So a model may be larger than the host's memory, if the devices have room for it."""
    alive, most, read = [], 0, FileTensor.__array__

    class Array(np.ndarray):  # of which there may be weak references
        pass

    def watched(self, dtype=None, copy=None):
        nonlocal most
        array = read(self, dtype).view(Array)
        alive.append(0)
        weakref.finalize(array, alive.pop)
        most = max(most, len(alive))
        return array

    monkeypatch.setattr(FileTensor, "__array__", watched)
    pretrained.open_model(theirs)
    assert most == 0
    runs.import_run(theirs, tmp_path / "run", runs.config_of(theirs, tmp_path))
    assert most == 1


@pytest.mark.slow
def test_a_prompt_needs_no_text(imported, capsys):
    argv = ["eval.py", f"--workdir={imported}", "--prompt=it is", "--tokens=4", "--temperature=0"]
    assert cli.run(eval_script.main, eval_script.define, "", argv) == 0
    assert capsys.readouterr().out.startswith("it is")


def tuned(imported, text, **changes):
    config = cli.load_config(str(imported / "config.json")).unlock()
    config.update_from_flattened_dict(
        {
            **{"steps": 2, "batch_size": 2, "seq_len": 16, "sample.tokens": 0, "metrics.tensorboard": False},
            **{"data.path": f"{text}/*.txt", "data.cache": f"{text}/cache", "mesh.data": 1},
            **{"training.start": str(imported), "evaluation.rows": 2},
        }
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), lines=20)


@pytest.mark.slow
def test_training_starts_with_the_weights_of_another_run(imported, text, tmp_path):
    """And leaves frozen groups as they were. What the other run was trained on is gone."""
    groups = "mlp=0.5,embedding=0,block_0=0"
    loop.train(tuned(imported, text, optimizer__groups=groups, steps=2), tmp_path / "run")
    loop.train(tuned(imported, text, optimizer__groups=groups, steps=4), tmp_path / "run")  # goes on; no second start
    before, after = (load_run(folder, text=False).params for folder in (imported, tmp_path / "run"))
    same = jax.tree.map(lambda x, y: bool((x == y).all()), before, after)
    assert all(jax.tree.leaves((same["embedding"], same["block_0"])))
    rest = {name: tree for name, tree in same.items() if name not in ("embedding", "block_0")}
    assert not any(jax.tree.leaves(rest))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, after)
    assert max(jax.tree.leaves(moved)) < 4 * 2.1e-5  # AdamW's steps at the learning rate of an imported run
    runs.export_run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").exists()  # the tokenizer's files go along


@pytest.mark.slow
def test_a_start_that_does_not_fit_is_refused(imported, text, tmp_path, capsys):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message) as error:
            loop.train(tuned(imported, text, **changes), tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()

    refused("has no parameter block_4/mixer/key, which config.model has", model__repeats=5)
    refused("has a parameter block_3/mixer/key, which config.model has not", model__repeats=3)
    refused(r"mlp/down has the shape \(24, 16\), in config.model \(32, 16\)", model__mlp__hidden=32)
    refused("config.model.scan_blocks=1: must be that of training.start, 0", model__scan_blocks=1)
    refused("config.training.start=.*nowhere: no config.json there", training__start=str(tmp_path / "nowhere"))
    refused(r"separator='</s>': must be those of training.start.*'<s>'", data__separator="</s>")
    with pytest.raises(UserError, match="holds imported weights and no training; train in another --workdir"):
        loop.train(tuned(imported, text), imported)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((imported / "config.json").read_bytes())
    refused("there is no checkpoint in it", training__start=str(tmp_path / "empty"))
    capsys.readouterr()
    loop.train(tuned(imported, text, model__attention__rope_theta=5e3), tmp_path / "run")
    assert "warning: config.model.attention.rope_theta=5000.0: is 10000.0 in" in capsys.readouterr().out


def test_factors_of_places_in_the_model():
    """The last name in the text that fits counts."""
    config = transformer.get_config()
    boxed = abstract_params(build(config.model, 257), config)
    factors = optimizer.rate_factors("mlp=0.5,block_1=0,embedding=2,scale=3", boxed)
    assert factors["embedding"] == 2 and factors["block_0"]["mlp"]["up"] == 0.5 and factors["block_1"]["mlp"]["up"] == 0
    assert factors["block_1"]["norm"]["scale"] == 3 and factors["block_0"]["mixer"]["query"] == 1
    with pytest.raises(UserError, match=r"groups, embedding; did you mean mixer\?; or names on the paths"):
        optimizer.rate_factors("mixr=1", boxed)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--from=DIR .to import. or --export=DIR .to export. is needed"),
        (["--workdir=x", "--from={theirs}", "--export=y"], "is needed, not both"),
        (["--from={theirs}"], "--workdir is missing"),
        (["--workdir={new}", "--from={new}"], r"has no config\.json"),
        (["--workdir={new}", "--from={theirs}", "--step=3"], "--step=3: is for --export, which is missing"),
        (["--workdir={new}", "--export=y", "--dtype=int8"], "--dtype=int8: must be one of float32, bfloat16, float16"),
        (["--workdir={new}", "--export=y"], r"no config\.json there; it is not a run directory"),
        (["--workdir={run}", "--from={theirs}"], "holds a run already; name another directory"),
        (["--workdir={run}", "--export={run}"], r"config\.json is not of a transformers model; choose another"),
        (["--workdir={new}", "--from={theirs}", "--config.nonsense=1"], "--config.nonsense: no such field"),
        (["--workdir={new}", "--from={theirs}", "--config.model.width=8"], r"config\.model: .* has the shape"),
        (["--workdir={new}", "--from={theirs}", "--config.model.repeats=2"], "only the weights has the parameter"),
        (["--workdir={new}", "--from={theirs}", "--config.model.vocab_size=9"], "has so many"),
        (["--workdir={new}", "--from={theirs}", "--config.data.separator=<x>"], "must be '' or a token of"),
        (["--workdir={new}", "--from={theirs}", "--config.data.tokenizer=gone.json"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(argv, message, theirs, imported, tmp_path, capsys):
    places = dict(theirs=theirs, new=tmp_path / "new", run=imported)
    assert converted([argument.format(**places) for argument in argv]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "new").exists()


def test_weights_without_a_tokenizer(theirs, tmp_path, capsys):
    """Another one is named, or it is an error."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((theirs / name).read_bytes())
    assert converted([f"--from={bare}", f"--workdir={tmp_path / 'a'}"]) == 1
    assert "has neither tokenizer.json nor tokenizer.model; name one with" in capsys.readouterr().err
    assert converted([f"--from={bare}", f"--workdir={tmp_path / 'a'}", "--config.data.tokenizer=bytes"]) == 0
    assert load_run(tmp_path / "a", text=False).dataset.tokenizer.vocab_size == 257
    named = f"--config.data.tokenizer={theirs / 'tokenizer.json'}"
    assert converted([f"--from={bare}", f"--workdir={tmp_path / 'b'}", named]) == 0
    run = load_run(tmp_path / "b", text=False)
    assert run.config.data.tokenizer == str(tmp_path / "b" / "tokenizer" / "tokenizer.json")


def test_tokenizer_of_bytes_goes_along(tmp_path):
    """As a file of the library tokenizers, which gives the same ids and begins a text as our documents begin."""
    ours = data.load_tokenizer("bytes")
    assert tokenizer.write(ours, tmp_path) == dict(bos_token_id=256, eos_token_id=256)
    made = tk.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    sample = "".join(map(chr, range(1, 0x500))) + "Ω€𝄞 two  spaces\n"
    ids = made.encode(sample).ids
    assert ids == [256, *ours.encode(sample)] and made.decode(ids) == sample
    again = data.load_tokenizer(str(tmp_path / "tokenizer.json"), tokenizer.begins_with(tmp_path / "tokenizer.json"))
    assert (again.separator, again.vocab_size) == (256, 257)


def test_tokenizer_without_a_separator_gets_one(tmp_path):
    made = tk.Tokenizer(tk.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tk.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    ours = data.load_tokenizer(str(tmp_path / "words.json"))
    (tmp_path / "out").mkdir()
    assert tokenizer.write(ours, tmp_path / "out") == dict(bos_token_id=3, eos_token_id=3)
    assert tk.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a b").ids == [3, 0, 1]


def test_separator_of_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join([TEXT, *TEXT.split()] * 20))
    prefix = str(tmp_path / "tokenizer")
    sizes = dict(vocab_size=40, model_type="bpe", minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=prefix, **sizes)
    path = tmp_path / "tokenizer.model"
    assert data.load_tokenizer(str(path)).separator == 2  # its eos
    assert data.load_tokenizer(str(path), "<s>").separator == 1
    assert tokenizer.begins_with(path) == ""
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "add_bos_token": true}')
    assert tokenizer.begins_with(path) == "<s>"
    with pytest.raises(UserError, match=r"config.data.separator='<x>': must be '' or a token of"):
        data.load_tokenizer(str(path), "<x>")
    with pytest.raises(UserError, match=r"must be '' with config\.data\.tokenizer='bytes'"):
        data.load_tokenizer("bytes", "<s>")


@pytest.mark.slow
def test_models_that_transformers_lacks_are_refused_before_anything_is_written(tmp_path):
    config = tiny(
        write_text(tmp_path, lines=20),
        steps=1,
        model__dense__variant="read",
        model__repeats=2,
        model__dense__bottleneck=4,
    )
    loop.train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.dense\.variant is 'read'; only 'none' can be exported"):
        runs.export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
