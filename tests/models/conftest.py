"""What the tests of attention kernels share."""

import jax
import pytest

from ip_jax.models import kernels


@pytest.fixture
def cudnn_in_xla(monkeypatch):
    """What cudnn is asked to do, done by XLA with the same arguments, in float32 too: the kernel
    itself is not on a CPU.
    """
    attention = jax.nn.dot_product_attention

    def in_xla(*arrays, implementation, **options):
        assert implementation == "cudnn" and all(x.shape[1] % 8 == 0 for x in arrays), (
            "odd lengths are refused in training"
        )
        return attention(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    monkeypatch.setattr(kernels, "refusal", lambda *_: None)
