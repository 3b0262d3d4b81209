"""Shared fixtures: eight fake CPU devices, the published data, the embedded model, a cache of
compiled programs.
"""

import os
import pathlib

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder that holds the published data; the test skips where it is not set."""
    folder = os.environ.get("IP_JAX_DATA_DIR")
    if not folder:
        pytest.skip("needs the published data: set IP_JAX_DATA_DIR to the folder that holds it")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in float32 (fetched once into the cache, 98 MB)."""
    import jax.numpy as jnp

    from ip_jax.models.hub import load_pretrained

    return load_pretrained("smollm2-135m-instruct", jnp.float32)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """Each takes some memory maps, of which Linux allows a process 65,530; hundreds of tests in one
    process come near that.
    """
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Every start of an engine compiles its programs anew: for a module's tests they come from a
    cache.
    """
    import jax

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
