"""A step that is computed twice: what differs in any bit is found, on the device where it differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from seqmodels.errors import UserError
from seqmodels.training.recheck import Recheck
from seqmodels.training.sharding import make_mesh
from tests.training_model import small_config


class Step:
    """Adds the batch to the state, whose buffers it takes; in its second call device 2 rounds the last bit wrongly."""

    def __init__(self, faulty):
        self.calls, self.faulty = 0, faulty
        self.add = jax.jit(lambda state, batch: (jax.tree.map(lambda x: x + batch, state), {"loss": batch}),
                           donate_argnums=0)  # fmt: skip

    def __call__(self, state, batch):
        self.calls += 1
        new, metrics = self.add(state, batch)
        if self.faulty and self.calls == 2:
            shards = [np.array(shard.data) for shard in new["split"].addressable_shards]
            shards[2].view(np.int32)[0] ^= 1
            placed = [jax.device_put(x, s.device) for x, s in zip(shards, new["split"].addressable_shards, strict=True)]
            old = new["split"]
            new["split"] = jax.make_array_from_single_device_arrays(old.shape, old.sharding, placed)
        return new, metrics


@pytest.mark.parametrize("faulty", [False, True])
def test_a_device_that_differs_in_one_bit_is_named(faulty):
    mesh = make_mesh(small_config(mesh__data=4), jax.devices()[:4])
    start = {"split": jnp.arange(8.0).at[1].set(jnp.nan), "whole": jnp.ones(3)}
    state = {
        name: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data" if name == "split" else None)))
        for name, x in start.items()
    }
    step, recheck = Step(faulty), Recheck(5, mesh)
    state, _ = recheck.step(step.add, state, jnp.ones(()), 4)  # not looked at
    if faulty:
        with pytest.raises(UserError, match=r"step 5, computed twice, gave other bits on device 2 of process \d+ on "):
            recheck.step(step, state, jnp.ones(()), 5)
        return
    state, metrics = recheck.step(step, state, jnp.ones(()), 5)
    assert step.calls == 2 and metrics["loss"] == 1
    np.testing.assert_array_equal(state["split"], np.asarray(start["split"]) + 2)
