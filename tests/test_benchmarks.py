"""The benchmark scripts: fields and merging of their results, floors, and that a wrong kernel is caught."""

import functools
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention, extrapolation, generation, grouped_matmul, meshes, models, trace
from benchmarks import kernels as script
from benchmarks.record import record, slug
from seqmodels import cli
from seqmodels.config import validate
from seqmodels.kernels import selective_scan as scan
from seqmodels.kernels.linear_attention import mosaic_tpu as tpu
from seqmodels.kernels.selective_scan import xla
from seqmodels.model import build

pytestmark = pytest.mark.slow

SHAPE = "2x6x4x2:full"
FIELDS = [
    "op",
    "implementation",
    "shape",
    "variant",
    "dtype",
    "pass",
    "ms",
    "floor_ms",
    "error",
    "device",
    "jax",
    "date",
]


def run(path, *arguments):
    return cli.run(
        script.main, script.define, script.__doc__, ["kernels.py", f"--out={path}", "--repeat=1", *arguments]
    )


def case(op="selective_scan", shape=SHAPE, dtype="float32"):
    return script.parse_shapes(script.OPERATIONS[op], shape, [dtype])[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A copy of few bytes, and timings of few calls."""
    monkeypatch.setattr(script, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(script, "measure", lambda run, sets, repeat: float(run(sets[0]) is not None))


@pytest.mark.slow
def test_results_have_the_fields_and_replace_their_own_kind(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert run(path, f"--shapes={SHAPE},1x5x3x2:read3", "--implementations=xla") == 0
    rows = json.loads(path.read_text())
    assert [list(row) for row in rows] == [[*FIELDS, "commit"]] * 4
    assert [(row["shape"], row["variant"], row["pass"]) for row in rows] == [
        ([2, 6, 4, 2], "full", "forward"),
        ([2, 6, 4, 2], "full", "forward+backward"),
        ([1, 5, 3, 2], "read3", "forward"),
        ([1, 5, 3, 2], "read3", "forward+backward"),
    ]
    assert all(0 < row["error"] < 1e-5 and row["ms"] == 1000 and row["dtype"] == "float32" for row in rows)
    assert SHAPE in capsys.readouterr().out

    assert run(path, f"--shapes={SHAPE}", "--implementations=reference,xla", "--passes=forward") == 0
    again = json.loads(path.read_text())
    assert len(again) == 5 and again[:3] == rows[1:]
    assert [row["implementation"] for row in again[3:]] == ["reference", "xla"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "op, shapes",
    [
        ("short_conv", "2x6x4x3:silu"),
        ("linear_attention", "2x12x4x3x5:ssd,1x12x2x3x5:retention,1x12x2x3x5:linear,1x12x2x3x5:gla"),
        ("delta_rule", "2x12x4x3x5:gated,1x12x2x3x5:deltanet,1x12x2x3x5:kda"),
        ("linear_scan", "2x12x4:hgrn,1x12x3:hgrn16"),
    ],
)
def test_other_operations_in_low_precision(tmp_path, op, shapes):
    path = tmp_path / "results.json"
    assert run(path, f"--op={op}", f"--shapes={shapes}", "--dtypes=bfloat16", "--implementations=xla") == 0
    assert all(1e-4 < row["error"] < 1e-2 for row in json.loads(path.read_text()))


def test_decoding_updates_the_state_in_place():
    token = case(shape="3x1x4x2:full")
    arguments, cotangents = token.draw(3)
    first = arguments["initial_state"]
    want = token.operation.call(arguments, variant="full", implementation="reference")["state"]
    run = script.program(token, "xla", "forward", 2)
    run([(arguments, cotangents), token.draw(4)])
    assert first.is_deleted()
    np.testing.assert_allclose(arguments["initial_state"], want, rtol=1e-5)
    assert script.check(token, run, 2) < 1e-5


def test_rounds_of_decoding_go_on_from_the_last_state():
    token = case(shape="3x1x4x2:full")
    given, other = token.draw(3), token.draw(4)
    step = dict(given[0])
    for _ in range(3):
        want = token.operation.call(step, variant="full", implementation="reference")
        step["initial_state"] = want["state"]
    run = script.program(token, "xla", "forward", 2, rounds=3)
    (outputs, _), _ = run([given, other])
    np.testing.assert_allclose(outputs["y"], want["y"], rtol=1e-4)
    np.testing.assert_allclose(given[0]["initial_state"], want["state"], rtol=1e-5)


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_a_wrong_kernel_fails(tmp_path, monkeypatch, wrong):
    class Wrong:
        supports = staticmethod(xla.supports)

        @staticmethod
        def selective_scan(**arguments):
            if wrong == "gradient":  # of one channel's step alone
                dt = arguments["dt"]
                stopped = dt.at[..., -1].set(script.jax.lax.stop_gradient(dt[..., -1]))
                return xla.selective_scan(**arguments | dict(dt=stopped))
            y, state = xla.selective_scan(**arguments)
            return y.at[-1, -1, -1].add(1e-2 if wrong == "value" else jnp.nan), state

    monkeypatch.setitem(scan.BACKENDS, "xla", Wrong)
    path = tmp_path / "results.json"
    assert run(path, f"--shapes={SHAPE}", "--implementations=xla") == 1
    errors = {row["pass"]: row["error"] for row in json.loads(path.read_text())}
    assert errors["forward+backward"] > 1e-4 and (errors["forward"] > 1e-5) == (wrong != "gradient")


def test_checks_some_rows_and_channels_of_large_shapes(monkeypatch):
    monkeypatch.setattr(script, "CHECKED", 6 * 2 * 2 * 4)
    large = case(shape="5x6x9x2:full")
    assert large.chosen["B"].tolist() == [0, 4] and large.chosen["E"].tolist() == [0, 3, 5, 8]
    run = script.program(large, "xla", "forward+backward", 1)
    assert script.check(large, run, 1) < 1e-5
    assert np.count_nonzero(np.any(large.checked[1]["y"], axis=(1, 2))) == 2

    def off_in_the_last_channel(sets):
        (arguments, cotangents), *_ = sets
        return run([(arguments | dict(A=arguments["A"].at[8].mul(1.01)), cotangents)])

    assert script.check(large, off_in_the_last_channel, 1) > 1e-5


def test_floors_by_hand():
    """B T E N = 2 6 4 2, float32: u dt z y have 48 numbers, B C 24, the state 16, A 8, D and the bias 4."""
    arguments, outputs = 3 * 48 + 2 * 24 + 16 + 8 + 2 * 4, 48 + 16
    exps = 2 * 6 * 4 * (2 + 2)
    full = case()
    assert full.costs("forward") == [(4 * (arguments + outputs), exps, 0)]
    assert full.costs("forward+backward")[1] == (4 * (2 * arguments + outputs), exps, 0)
    floor = functools.partial(script.floor_ms, copy=1e3, flops_per_second=None)
    assert floor(full, "forward", exps_per_second=None) == 4 * (arguments + outputs)
    assert floor(full, "forward", exps_per_second=exps / 10) == 10e3
    both = floor(full, "forward+backward", exps_per_second=exps / 1.5)
    assert both == pytest.approx(1500 + 4 * (2 * arguments + outputs))

    low = case(dtype="bfloat16")  # parameters and states stay float32
    assert low.costs("forward")[0][0] == 2 * (4 * 48 + 2 * 24) + 4 * (16 + 8 + 2 * 4 + 16)
    read = case(shape="2x6x4x2:read3")  # three u, dt, B, C, A, bias and states, two weights
    numbers = 6 * 48 + 48 + 6 * 24 + 3 * 16 + 3 * 8 + 4 + 3 * 4 + 2 * 48 + 48 + 3 * 16
    assert read.costs("forward") == [(4 * numbers, 2 * 6 * 4 * (3 * (2 + 1) + 1), 0)]
    conv = case("short_conv", "2x6x4x3:silu")
    assert conv.costs("forward") == [(4 * (48 + 12 + 4 + 16 + 48 + 16), 48, 0)]


def test_floors_of_linear_attention_by_hand():
    """B T H K V = 2 6 4 3 5, bfloat16, keys of each head: q and k have 144 numbers, v and y 240, the states 120."""
    retention = case("linear_attention", "2x6x4x3x5:retention", "bfloat16")
    chunk, tokens = 6, 12
    forward = 2 * tokens * 4 * (chunk * (3 + 5) + 2 * 15)
    backward = 2 * tokens * 4 * (chunk * (3 * 3 + 2 * 5) + 4 * 15)
    moved = 2 * (2 * 144 + 2 * 240) + 4 * (2 * 120 + 4)
    gradients = 2 * (2 * 144 + 240) + 4 * 120  # the decays are constants
    assert retention.costs("forward+backward") == [(moved, 0, forward), (moved + gradients, 0, backward)]
    floor = script.floor_ms(retention, "forward+backward", 1e9, exps_per_second=None, flops_per_second=1e3)
    assert floor == forward + backward
    ssd = case("linear_attention", "2x6x4x3x5:ssd", "bfloat16")  # keys of all heads, a decay a token and head
    assert ssd.costs("forward")[0][0] == 2 * (2 * 36 + 2 * 240) + 4 * (2 * 120 + 48)
    assert ssd.costs("forward")[0][2] == 2 * tokens * (chunk * (3 + 4 * 5) + 2 * 60)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_tpu_schedules_of_linear_attention(tmp_path):
    """Two chunks, in one step of the grid each; the fields are those of the selective scan's rows."""
    command = [sys.executable, "benchmarks/tpu_aot.py", "--op=linear_attention", "--chips=v5e", "--dtypes=bfloat16"]
    command += ["--shapes=1x256x8x128x64:ssd", f"--out={tmp_path / 'out.json'}"]
    root = Path(script.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    recorded = json.loads((root / "benchmarks" / "results" / "selective_scan_tpu_aot.json").read_text())
    for row, most in zip(rows, (25, 50), strict=True):  # a quarter above what they are: losing the overlap costs more
        assert recorded[0].keys() <= row.keys()
        assert (row["chunk"], row["block"]) == (128, 8) and row["bundles_of_loops"] == [row["bundles_per_chunk"]]
        assert 0 < row["bundles_per_token"] < row["scheduled_per_token"] < most
        assert 0 < row["vmem_bytes"] <= tpu.backward_vmem(8, 128, 64) <= tpu.VMEM_LIMIT < row["vmem_of_core"]
        assert row["floor_ms"] < row["estimated_ms"] <= row["scheduled_ms"]
        assert 0.1 < row["slots_used"]["mxu"] < 1


def test_reads_tpu_schedules():
    """A loop of the grid around a branch past all of a step, in which the state is read at the first chunk only."""
    from benchmarks import tpu_aot

    final = """
     0   :  { %1 = vsyncpa [#allocation6], 0 }
   0x1 LB: > { %s1 = sadd.s32 1, %s0 }
   0x2   : > { %2 = sbr.rel (%p1) target = $region40 }
   0x3   : > { %v1 = vld [vmem:[%s1] sm:$0xff] }
   0x4   :  {}
   0x5   : > { %3 = sbr.rel (%p2) target = $region44 }
   0x6   : > { %4 = vst [vmem:[%s2] sm:$0xff] /*vst_source=*/%v1 }
   0x7   : > { %5 = vst [vmem:[%s2 + $0x8] sm:$0xff] /*vst_source=*/%v1 } /* End region 43 */
   0x8 PF: > { %v2 = vadd.f32 %v1, %v1 } /* Start/End empty region 44 :: Start region 45 */
   0x9   : > { %v3 = vadd.f32 %v2, %v1 }
   0xa PF: > { %s2 = smov 0 } /* Start/End empty region 40 */
   0xb   : > { %6 = sbr.rel (!%p3) target = $region39 }
   0xc   :  { %s4 = smov 0 }
"""
    bundles = tpu_aot.read_bundles(final)
    assert len(bundles) == 13 and [x.target for x in bundles if x.target] == ["40", "44", "39"]
    every_step = [1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert tpu_aot.count_steps(bundles, steps=4) == (36, [9], every_step)


def test_tpu_floors_of_linear_attention_by_hand():
    """B T H K V = 2 6 4 3 5 with shared keys, against the figures of operations.py, whose chunks are as long here."""
    from benchmarks import tpu_aot

    one = case("linear_attention", "2x6x4x3x5:ssd", "bfloat16")
    flops = tpu_aot.attention_flops(one.sizes, 128)
    assert flops["forward"] == 2 * 12 * (6 * (3 + 4 * 5) + 2 * 60) == one.costs("forward")[0][2]
    assert flops["backward"] == 2 * 12 * (6 * (3 * 3 + 2 * 4 * 5) + 4 * 60) == one.costs("forward+backward")[1][2]
    exact = tpu_aot.linear_attention((2, 6, 4, 3, 5), "ssd", np.dtype("float32"))
    v5e = tpu_aot.CHIPS["v5e"]
    assert exact.seconds(v5e, "forward") == pytest.approx(6 * flops["forward"] / 197e12)
    arguments = {name: x.shape for name, x in exact.arguments.items() if x is not None}
    assert arguments == {name: x.shape for name, x in one.draw(1)[0].items()}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op=scan"], "--op=scan: allowed are selective_scan"),
        (["--shapes=8x2048"], "--shapes=8x2048: allowed are table, decode, few, small, and B x T x E x N"),
        (["--shapes=2x6x4x2"], "variant '' of selective_scan is none of full"),
        (["--implementations=cuda"], "--implementations=cuda: allowed are reference, xla"),
        (["--passes=backward"], "--passes=backward: allowed are forward, forward+backward"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, arguments, message):
    assert run(tmp_path / "results.json", *arguments) == 1
    assert message in capsys.readouterr().err


def test_every_named_shape_is_understood():
    for operation in script.OPERATIONS.values():
        for names in operation.shapes.values():
            for one in script.parse_shapes(operation, ",".join(names), ["float32"]):
                assert one.costs("forward")[0][0] > 0


def test_record_keeps_other_figures(tmp_path):
    path = tmp_path / "new" / "results.json"
    for ms, device in ((3, "a"), (2, "b"), (1, "a")):
        record(path, dict(op="scan", device=device, ms=ms), key=("op", "device"))
    assert [(row["device"], row["ms"]) for row in json.loads(path.read_text())] == [("b", 2), ("a", 1)]
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_every_row_of_models_is_a_valid_config():
    for config, batch, length, fields in models.ROWS.values():
        config = cli.load_config(config)
        config.update_from_flattened_dict(
            {"batch_size": batch, "seq_len": length, "training.accumulate": 1, **fields}
        )  # refuses unknown fields and other types
        validate(config)


@pytest.mark.slow
def test_models_measures_and_profiles(tmp_path, capsys):
    sizes = ["batch_size=2", "seq_len=16", "mesh.data=1", "model.vocab_size=64", "model.width=16", "model.repeats=1"]
    arguments = ["--config=configs/mamba.py", *(f"--config.{size}" for size in sizes)]
    options = [f"--out={tmp_path}/out.json", f"--profile={tmp_path}/profile", "--seconds=0.01", "--repeats=2"]
    assert cli.run(models.main, models.define, models.__doc__, ["models.py", *arguments, *options]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert (row["config"], row["batch"], row["length"]) == ("mamba", 2, 16)
    assert row["tokens_per_second"] > 0 and row["loss"][1] < row["loss"][0]
    said = capsys.readouterr().out
    assert "kernel" in said and "all kernels" in said and "block_*/mixer" in said


def test_attention_measures(tmp_path, capsys, monkeypatch):
    """Also what fails, in its row: cuDNN needs a GPU."""
    monkeypatch.setattr(attention, "measure", lambda run, sets, repeat: len(sets) / 1e3)
    options = ["--shapes=1x1024x2x1x8", "--masks=causal,window512", "--by=xla,cudnn", f"--out={tmp_path}/out.json"]
    arguments = ["attention.py", *options, "--dtype=float32"]
    assert cli.run(attention.main, attention.define, attention.__doc__, arguments) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["mask"], row["pass"]) for row in rows] == [
        (mask, one) for one in ("forward", "forward+backward") for mask in ("causal", "window512")
    ]
    assert all(row["ms"] > 0 and row["bytes"] > 0 and row["left"] == 1 for row in rows)  # of 3 tiles none is left out
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
    assert cli.run(attention.main, attention.define, attention.__doc__, ["attention.py", "--masks=windows"]) == 1
    assert "allowed are causal, full, documents, windowN" in capsys.readouterr().err
    assert attention.left(attention.mask_of("window512"), 4096) == 15 / 36


def test_grouped_matmul_measures(tmp_path, capsys, monkeypatch):
    """Also what fails, in its row: jax's sample kernels need a GPU."""
    monkeypatch.setattr(grouped_matmul, "bandwidth", lambda device: 1e10)
    monkeypatch.setattr(grouped_matmul, "measure", lambda run, sets, repeat: len(sets) / 1e3)
    options = ["--shape=64x16x24x4", "--repeat=1", f"--out={tmp_path}/out.json"]
    arguments = ["grouped_matmul.py", *options, "--by=dense,xla,sample", "--sizes=empty", "--passes=forward,weights"]
    assert cli.run(grouped_matmul.main, grouped_matmul.define, grouped_matmul.__doc__, arguments) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["implementation"], row["pass"]) for row in rows] == [
        (by, kind) for by in ("dense", "xla") for kind in ("forward", "weights")
    ]
    assert all(row["ms"] > 0 and (row["error"] or 0) < 1e-2 for row in rows)
    assert "!" in capsys.readouterr().out


@pytest.mark.parametrize("kind", grouped_matmul.SIZES)
def test_groups_have_all_rows(kind):
    sizes = grouped_matmul.group_sizes(kind, 8192, 16)
    assert sizes.sum() == 8192 and (sizes >= 0).all()
    assert (sizes == 0).sum() == (8 if kind == "empty" else 0)


def test_generation_measures(tmp_path):
    sizes = ["vocab_size=64", "width=16", "repeats=1"]
    arguments = ["--config=configs/mamba.py", *(f"--config.model.{size}" for size in sizes)]
    options = ["--batch=2", "--prompt=6", "--tokens=4", "--repeats=2", f"--out={tmp_path}/out.json"]
    assert cli.run(generation.main, generation.define, generation.__doc__, ["generation.py", *arguments, *options]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert (row["config"], row["batch"], row["prompt"], row["new_tokens"]) == ("mamba", 2, 6, 4)
    whole = 2 * 4 / row["tokens_per_second"] * 1e3
    assert row["prefill_ms"] > 0 and whole == pytest.approx(
        row["prefill_ms"] + 4 * row["decode_ms_per_token"], rel=0.02
    )


def test_rows_of_generation(capsys):
    for config, _ in generation.ROWS.values():
        build(cli.load_config(config).model, 50277)  # refuses fields that do not fit
    arguments = ["generation.py", "--rows=9b"]
    assert cli.run(generation.main, generation.define, generation.__doc__, arguments) == 1
    assert "--rows=9b: there are 130m-1, 130m-64" in capsys.readouterr().err


def test_kernels_of_all_layers_count_together():
    meaning = "jit(train_step)/transpose(jvp(LanguageModel))/block_{}/mixer/mixer.write/dot_general"
    names = {trace.label(f"gemm_fusion_{n}", meaning.format(n)) for n in (3, 12)}
    assert names == {"gemm_fusion  backward block_*/mixer/mixer.write/dot_general"}
    lines = trace.table({"a": (6, 9.0), "b": (3, 2.0), "c": (3, 1.0)}, steps=3, rows=1)
    assert [line.split() for line in lines[1:]] == [
        ["3.000", "75.0", "2", "a"],
        ["1.000", "25.0", "2", "the", "other", "2"],
        ["4.000", "100.0", "4", "all", "kernels"],
    ]


def test_extrapolation_of_several_runs(tmp_path):
    figures = {"none": {"16": {"loss": 2.0}, "64": {"not_served": "memory"}}, "yarn": {"16": {"loss": 1.5}}}
    for name in ("rope", "alibi"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"seq_len": 16}))
        (tmp_path / name / "eval.json").write_text(json.dumps({"extrapolation": {"test": figures}}))
    losses, trained = extrapolation.read(tmp_path / "rope", "test")
    assert (losses, trained) == ({"rope": {16: 2.0, 64: None}, "rope, yarn": {16: 1.5}}, 16)
    assert extrapolation.table(losses).splitlines()[2:] == ["| rope | 2.0000 | – |", "| rope, yarn | 1.5000 | – |"]
    extrapolation.plot(losses, trained, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_meshes_are_configs_and_a_toy_is_measured(tmp_path, monkeypatch):
    """On four of eight CPU devices, beside the row of one that is in the file already."""
    for row in meshes.ROWS.values():
        config = meshes.config_of(row)
        validate(config)
        assert dict(config.mesh) == dict(config.mesh) | {a: int(n) for a, _, n in [row.mesh.partition("=")] if a}
        assert not row.against or meshes.ROWS[row.against].mesh == ""
    path, device = tmp_path / "meshes.json", meshes.device_name(jax.devices()[0])
    same = dict(commit=meshes.commit(), device=device, jax=jax.__version__)
    path.write_text(json.dumps([dict(row="toy", devices=1, tokens_per_second=1e-3, **same)]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    arguments = ["meshes.py", "--one=toy-sequence", "--seconds=0.001", "--repeats=1", f"--out={path}"]
    assert cli.run(meshes.main, meshes.define, meshes.__doc__, arguments) == 0
    _, result = json.loads(path.read_text())
    assert (result["mesh"], result["devices"], result["batch"], result["length"]) == ("data=2,sequence=2", 4, 2, 32)
    assert result["efficiency"] == pytest.approx(result["tokens_per_second"] / 4e-3, rel=1e-3)
    assert set(meshes.FIELDS) < set(result)
