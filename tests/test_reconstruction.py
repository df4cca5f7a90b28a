"""The probe of what a linear map finds of a lower layer, against NumPy's least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs import mamba
from seqmodels.errors import UserError
from seqmodels.evals import reconstruction
from seqmodels.model import build
from seqmodels.training.sharding import unbox

pytestmark = pytest.mark.slow


def test_equals_least_squares():
    config = mamba.get_config().model.unlock()
    config.update(width=8, repeats=3, residual_dtype="float32")
    model = build(config, 11)
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    draw = np.random.default_rng(0)
    batches = [
        dict(
            tokens=draw.integers(0, 11, (4, 32)).astype(np.int32),
            segment_ids=np.zeros((4, 32), np.int32),
            mask=np.arange(32) < np.array([[32], [30], [32], [7]]),
        )
        for _ in range(2)
    ]
    got = reconstruction.measure(model, params, batches)
    assert {m: len(v) for m, v in got.items()} == {"1": 2, "2": 1}

    def rows(batch, layer):
        inputs = reconstruction.layer_inputs(model, params, batch["tokens"], batch["segment_ids"])
        return np.asarray(inputs[layer], np.float64)[batch["mask"]]

    def with_one(x):
        return np.concatenate([x, np.ones((len(x), 1))], axis=1)

    for distance, layer in ((1, 1), (1, 2), (2, 2)):
        (x, y), (x2, y2) = ((rows(batch, layer), rows(batch, layer - distance)) for batch in batches)
        W = np.linalg.lstsq(with_one(x), y, rcond=None)[0]
        r2 = 1 - ((y2 - with_one(x2) @ W) ** 2).sum() / ((y2 - y2.mean(0)) ** 2).sum()
        assert got[str(distance)][layer - distance] == pytest.approx(r2, abs=1e-3)
    embedding = np.asarray(params["embedding"], np.float64)[batches[0]["tokens"]]
    normed = embedding / np.sqrt((embedding**2).mean(-1, keepdims=True) + 1e-5)
    scale = np.asarray(params["block_0"]["norm"]["scale"])
    np.testing.assert_allclose(rows(batches[0], 0), (normed * scale)[batches[0]["mask"]], rtol=1e-4, atol=1e-5)


def test_a_scan_over_layers_is_refused():
    config = mamba.get_config()
    with config.unlocked():
        config.model.scan_blocks = 1
    with pytest.raises(UserError, match=r"config.model.scan_blocks=1: must be 0 for --evals=reconstruction"):
        reconstruction.check(config)
