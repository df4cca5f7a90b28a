"""Eight CPU devices in every test process, so that sharding is tested wherever the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile more than they compute: without LLVM's optimisations that takes a third of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
