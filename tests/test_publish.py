"""The scripts that make a corpus and that publish a sweep's table."""

import gzip
import json
import math
import re
import statistics
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks import publish, rfc_prose
from seqmodels.sweeps import plots

# Prose of RFCs


PROSE = "The quick brown fox jumps over the lazy dog, and {} of them look at it with great surprise."
PAGE = "Crocker                        [Page 1]\n\f\nRFC 12          A Title           April 1969\n"


def rfc(folder, number, paragraphs, *, packed=True):
    text = ("\n\n".join(["Network Working Group", *paragraphs]) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (f"rfc{number}.txt" + ".gz" * packed)).write_bytes(gzip.compress(text) if packed else text)


def test_prose_is_taken_out_of_pages_tables_and_repetitions(tmp_path):
    one, two, three = (PROSE.format(name) for name in ("all", "none", "some"))
    broken = one.replace(" and ", "\n   and ")
    table = "| 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 | 12 | 13 | 14 | 15 | 16 | 17 | 18 | 19 | 20 |"
    contents = "1. the introduction of what is to come in this document for all of us ......... 1"
    shouted = two.upper()
    rfc(tmp_path / "b", 12, [f"{broken}\n{PAGE}", table, contents, shouted, "Too short to count."])
    rfc(tmp_path / "a", 7, [two, one], packed=False)
    rfc(
        tmp_path / "c", 7, ["Another copy of what is there, which counts for nothing, as the first is taken, in order."]
    )
    (tmp_path / "a" / "rfc-index.txt").write_text("no document")
    files = rfc_prose.find(tmp_path)
    assert [(number, path.parent.name) for number, path in files] == [(7, "a"), (12, "b")]
    assert list(rfc_prose.paragraphs(rfc_prose.read(files[1][1]))) == [one]
    rfc(tmp_path / "d", 3, [PROSE.format(f"{word}s") for word in "abcdefgh"])
    rfc(tmp_path / "d", 20, [PROSE.format(f"{word}s") for word in "abcdefgh"] + [three])
    ((number, text),) = rfc_prose.documents(rfc_prose.find(tmp_path))  # 7 and 12 are short, 20 repeats 3
    assert number == 3 and text.split("\n\n") == [PROSE.format(f"{word}s") for word in "abcdefgh"]


def test_a_sample_keeps_the_newest_and_grows(tmp_path):
    corpus = [(number, "x" * 100) for number in range(1, 101)]
    small, large = (rfc_prose.sample(corpus, size, whole=91) for size in (3000, 5000))
    assert len(small) == 30 and len(large) == 50 and set(small) < set(large)
    assert corpus[90:] == small[-10:] and [number for number, _ in large] == sorted(number for number, _ in large)
    assert rfc_prose._first_held_out(corpus, 10_000) == 91


def test_corpus_and_tokenizer(tmp_path, monkeypatch, capsys):
    for number in range(40):
        rfc(tmp_path / "in", number + 1, [PROSE.format(f"{word}{number}s") for word in "abcdefgh"])
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["rfc_prose.py", str(tmp_path / "in"), f"--out={out}", "--vocabulary=300"])
    rfc_prose.main()
    assert "40 documents" in capsys.readouterr().out
    from seqmodels.data import load_tokenizer
    from seqmodels.data.readers import read_documents

    texts = list(read_documents(out / "prose.jsonl.xz", "text"))
    assert len(texts) == 40 and all(f"a{number}s" in text for number, text in enumerate(texts))
    tokenizer = load_tokenizer(str(out / "bpe300.json"))
    odd = "Überraschung \x00 <|endoftext|>\n"
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode(odd)) == odd
    assert tokenizer.separator not in tokenizer.encode(odd) and len(tokenizer.encode(texts[0])) < len(texts[0]) / 1.5


# Tables


def sweep(folder, losses, **about):
    """A sweep's directory: trial to the losses of its seeds."""
    lines = ["id,status,seed,model.dense.variant,parameters,validation.loss,tokens_per_second,eval.lengths.64.loss"]
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            identity, speed = f"{name}{seed}", 1000.0 if seed == 0 else ""
            lines.append(f"{identity},{'done' if loss else 'failed'},{seed},{name},24807936,{loss or ''},{speed},3.5")
            (folder / "trials" / identity).mkdir(parents=True)
            record = {"overrides": {"model.dense.variant": name, "seed": seed}}
            (folder / "trials" / identity / "trial.json").write_text(json.dumps(record))
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    (folder / "sweep.json").write_text(json.dumps(about))
    (folder / "report.md").write_text("# all of it\n")
    return folder


def test_table_between_the_marks(tmp_path, monkeypatch, capsys):
    losses = {"none": (2.0, 2.2, 2.4), "read": (1.9, 2.0, None)}
    folder = sweep(tmp_path / "sweep", losses)
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- /one -->\nafter\n")
    argv = ["publish.py", str(folder), f"--out={tmp_path / 'docs' / 'one'}", f"--page={page}"]
    monkeypatch.setattr(sys, "argv", argv)
    for _ in range(2):  # a second time changes nothing
        publish.main()
        text = page.read_text()
        assert text.startswith("before\n<!-- one -->\n\n| trial | seeds | parameters |") and "old" not in text
        assert text.endswith("[docs/one/report.md](docs/one/report.md).\n\n<!-- /one -->\nafter\n")
    spread = statistics.stdev(losses["none"])
    assert f"| variant=none | 3 | 24,807,936 | 2.2000 ± {spread:.4f} |  | 1,000 |" in text
    difference = statistics.stdev([-0.1, -0.2])  # of the seeds that both have
    assert f"| variant=read | 2 | 24,807,936 | 1.9500 ± 0.0707 | -0.1500 ± {difference:.4f} | 1,000 |" in text
    monkeypatch.setattr(sys, "argv", [*argv, "--figures=eval.lengths.64.loss"])
    publish.main()
    assert "| tokens/s | lengths.64.loss |" in page.read_text() and "|  | 1,000 | 3.5000 |" in page.read_text()
    compared = {f"input{seed}": f"read{seed}" for seed in range(2)}  # with what the sweep says, not with the first
    groups = publish.read(sweep(tmp_path / "compared", losses | {"input": (1.0, 1.5)}, against=compared))
    row = publish.table(groups).splitlines()[-1]
    assert f"| 1.2500 ± 0.3536 | -0.7000 ± {statistics.stdev([-0.9, -0.5]):.4f} |" in row
    assert (tmp_path / "docs/one/results.csv").read_text() == (folder / "results.csv").read_text()
    assert math.isclose(statistics.fmean(losses["none"]), 2.2) and "variant=read" in capsys.readouterr().out


def test_of_a_comparison_the_best_rates_are_published(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.csv").write_text("id,status,seed\n")
    table = "| # | model | 95% interval | difference from 12 |\n| --- | --- | ---: | ---: |\n| 2 | x | [1, 2] | -0.1 |"
    report = "# Comparison\n\n| all |\n\n## Best learning rate of each model\n\n{}\n\nThe rate\n"
    (tmp_path / "report.md").write_text(report.format(table))
    monkeypatch.setattr(sys, "argv", ["publish.py", str(tmp_path), f"--out={tmp_path / 'out'}"])
    publish.main()
    assert capsys.readouterr().out == "| model | difference from the first |\n| --- | ---: |\n| x | -0.1 |\n"


def test_pictures_are_drawn_again_from_the_table(tmp_path, monkeypatch):
    cells = ["id,status,seed,optimizer.learning_rate,model.pattern,steps_done,parameters,test.accuracy"]
    cells += [f"{rate}{name},done,0,{rate},{name},7,100,0.{len(name)}" for rate in (0.1, 0.2) for name in ("x", "yy")]
    (tmp_path / "results.csv").write_text("\n".join([*cells, "z,failed,0,0.3,x,,,"]) + "\n")
    pictures = "![training losses](losses.png)\n\n![test.accuracy of each trial](bars.png)\n\n![x](quality.png)\n\n"
    (tmp_path / "report.md").write_text(f"# Title\n\n{pictures}## Behind\n")
    (tmp_path / "bars.png").write_bytes(b"old")
    monkeypatch.setattr(sys, "argv", ["publish.py", str(tmp_path), "--redraw"])
    publish.main()
    report = (tmp_path / "report.md").read_text()
    assert "(losses.png)\n\n![test.accuracy of each trial: mean" in report and report.endswith("\n\n## Behind\n")
    linked = set(re.findall(r"\((\w+)\.svg\)", report))
    assert linked == {"metric", "differences", "parameters"} == {path.stem for path in tmp_path.glob("*.svg")}
    assert not (tmp_path / "bars.png").exists() and "learning_rate=0.3" not in (tmp_path / "metric.svg").read_text()
    publish.main()  # a second time changes nothing
    assert (tmp_path / "report.md").read_text() == report


def test_each_picture_is_published_once_and_small(tmp_path, monkeypatch):
    folder, out = sweep(tmp_path / "sweep", {"none": (2.0,)}), tmp_path / "out"
    figure, axes = plots.new_figure(xlabel="0.123456")
    for number in range(10):  # as many colours as a report has
        axes.plot(np.sin(np.arange(300.0) * (number + 1)))
    for name in ("metric.svg", "metric.png", "old.png"):
        figure.savefig(folder / name)
    (folder / "report.md").write_text("![0.123456](metric.png) and ![a](old.png)\n")
    out.mkdir()
    (out / "metric.png").write_bytes(b"as it was published before")
    monkeypatch.setattr(sys, "argv", ["publish.py", str(folder), f"--out={out}"])
    publish.main()
    assert sorted(path.name for path in out.glob("*.*")) == ["metric.svg", "old.png", "report.md", "results.csv"]
    assert (out / "report.md").read_text() == "![0.123456](metric.svg) and ![a](old.png)\n"
    before, after = (list(ElementTree.parse(each / "metric.svg").iter()) for each in (folder, out))
    assert "".join(before[0].itertext()).split() == "".join(after[0].itertext()).split()
    paths = [" ".join(each.get("d", "") for each in drawn) for drawn in (before, after)]
    np.testing.assert_allclose(*(np.array(re.findall(r"[\d.]+", each), float) for each in paths), atol=0.0051)
    pictures = [np.asarray(Image.open(each / "old.png").convert("RGB"), int) for each in (folder, out)]
    assert abs(pictures[0] - pictures[1]).max() < 25
    for name in ("metric.svg", "old.png"):
        assert (out / name).stat().st_size < 0.8 * (folder / name).stat().st_size


def test_what_cannot_be_published_is_said(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- one -->\n")
    folder = sweep(tmp_path / "sweep", {"none": (2.0,)})
    for argv, reason in (
        ([str(tmp_path), "--out=x"], "no report.md"),
        ([str(folder), f"--out={tmp_path / 'one'}", "--figures=eval.x"], "--figures=eval.x: in no row"),
        ([str(folder), f"--out={tmp_path / 'one'}", f"--page={page}"], "must have <!-- one --> and <!-- /one -->"),
    ):
        monkeypatch.setattr(sys, "argv", ["publish.py", *argv])
        with pytest.raises(SystemExit):
            publish.main()
        assert reason in capsys.readouterr().err
    assert page.read_text() == "<!-- one -->\n"
