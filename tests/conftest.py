"""Eight CPU devices in every test process, so that sharding is tested wherever the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
