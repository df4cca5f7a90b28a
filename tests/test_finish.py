"""The evaluation at the end of a run: its limit, what it shows, and that it can be stopped."""

import pytest

from seqmodels.data import train_tokenizer
from seqmodels.evals import perplexity
from seqmodels.evals.run import load_run
from seqmodels.training import progress
from seqmodels.training.finish import Watched
from seqmodels.training.loop import train
from seqmodels.training.preemption import Preempted
from tests.data_fixtures import POEM, text_config
from tests.run_fixtures import tiny, write_text


def test_a_limit_reads_so_many_rows(tmp_path, capsys):
    text = write_text(tmp_path)
    summary = train(tiny(text, steps=2, checkpoint__every=2, evaluation__limit=3), tmp_path / "run")
    assert summary["rows"] == 3 and "(3 of its rows)" in capsys.readouterr().out
    run = load_run(tmp_path / "run")
    options = dict(length=16, batch_size=4)
    for split in ("validation", "test"):
        first, whole = (
            perplexity.evaluate(run.model, run.params, run.dataset[split], **options, limit=limit)["loss"]
            for limit in (3, None)
        )
        assert summary["splits"][split]["loss"] == pytest.approx(first, abs=1e-6) != pytest.approx(whole, abs=1e-6)


def test_every_batch_may_be_the_last(tmp_path, capsys, monkeypatch):
    from seqmodels.data import load

    split = load(text_config(tmp_path, {"poem.txt": POEM}), seq_len=16, batch_size=4)["test"]
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    read = []

    def after():
        if len(read) == 2:
            raise Preempted(1)

    with pytest.raises(Preempted):
        for batch in Watched(split, "test", after).windows(16, 4):
            read.append(batch)
    rows = split.row_count(16)
    assert len(list(split.windows(16, 4))) == -(-rows // 4)
    assert capsys.readouterr().err == f"test: 1 of {-(-rows // 4)} batches\n"


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer(tmp_path):
    text = write_text(tmp_path)
    file = tmp_path / "bpe.json"
    assert train_tokenizer.main([f"--path={text}", "--size=270", f"--out={file}"]) == 0
    config = tiny(text, steps=1, checkpoint__every=1, evaluation__limit=1, data__tokenizer=str(file))
    train(config, tmp_path / "run")
    before = load_run(tmp_path / "run")
    file.unlink()
    after = load_run(tmp_path / "run")  # the token cache is found by what the file holds
    assert after.dataset.folder == before.dataset.folder
    assert after.dataset.tokenizer.encode("all is well") == before.dataset.tokenizer.encode("all is well")
