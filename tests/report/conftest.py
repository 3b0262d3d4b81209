"""Results folders with known counts."""

import pytest
import synthetic


@pytest.fixture
def demo(tmp_path):
    """The demo preset's folder: one seed, three trained arms, nothing asked without a claim."""
    return synthetic.write_folder(tmp_path / "demo", synthetic.demo_rows())
