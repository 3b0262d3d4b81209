"""The files of `launch/` parse, and start this program."""

import pathlib
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launch_files_parse_and_start_the_command_line(path):
    text = path.read_text()
    assert "ip-jax" in text
    if path.suffix == ".yaml":
        assert all(isinstance(document, dict) for document in yaml.safe_load_all(text))
    else:
        checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_every_launch_file_is_explained():
    explained = (LAUNCH.parent / "docs" / "scale.md").read_text()
    assert all(f"launch/{path.name}" in explained for path in LAUNCH.iterdir())
