"""The copy of dequantised weights: the same bits as without it, whole or absent, made once."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree
from test_gguf import tiny  # noqa: F401  a fixture
from tiny_gguf import write_gguf

from ip_jax.models import converted, gguf, hub
from ip_jax.models.gguf_file import open_gguf


@pytest.fixture
def model(tiny, tmp_path, monkeypatch):  # noqa: F811
    """A tiny model of each family as a quantised file, and an empty cache."""
    monkeypatch.setenv("IP_JAX_CACHE", str(tmp_path / "cache"))
    config, weights = tiny
    return str(write_gguf(tmp_path / "tiny.gguf", config, weights, kind="Q8_0"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_copy_has_the_very_bits_of_the_file(model, tmp_path, dtype):
    file = open_gguf(model)
    expected = gguf.read_params(file, gguf.read_config(file), dtype)
    for _ in ("made", "read"):
        found = hub.load_pretrained(model, dtype).params
        assert tree.structure(found) == tree.structure(expected)
        for ours, theirs in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            assert ours.dtype == theirs.dtype == dtype
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    (copy,) = (tmp_path / "cache" / "converted").iterdir()
    assert copy.name.endswith(f"-{np.dtype(dtype).name}-v1.safetensors")


def test_the_second_load_does_not_dequantise(model, monkeypatch):
    hub.load_pretrained(model, jnp.bfloat16)

    def refuse(*_, **__):
        raise AssertionError("dequantised again")

    monkeypatch.setattr(gguf, "reader", refuse)
    hub.load_pretrained(model, jnp.bfloat16)


def test_a_copy_is_whole_or_absent(model, tmp_path, monkeypatch):
    read = gguf.reader

    def broken(*arguments):
        give = read(*arguments)

        def of(path, layer):
            if path[-1] == "down":
                raise KeyboardInterrupt
            return give(path, layer)

        return of

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "reader", broken)
        with pytest.raises(KeyboardInterrupt):
            hub.load_pretrained(model, jnp.float32)
    assert not list((tmp_path / "cache" / "converted").iterdir())
    hub.load_pretrained(model, jnp.float32)


def test_without_room_the_file_itself_is_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "has_room", lambda *_: False)
    assert hub.load_pretrained(model, jnp.float32).params
    assert not list((tmp_path / "cache" / "converted").iterdir())
