"""Opening a results folder, for the commands that work on one."""

from etils import epath

from ip_jax.training.results import read_record


def open_results(name: str) -> tuple[epath.Path, dict]:
    """(folder, its record). Raises ValueError for a folder that `ip-jax run` did not make."""
    folder = epath.Path(name)
    if not (folder / "config.json").exists():
        raise ValueError(f"{name} is no results folder: it has no config.json")
    record = read_record(folder / "config.json")
    if not {"experiment", "config"} <= record.keys():
        raise ValueError(f"{name} is no results folder: its config.json names no experiment")
    return folder, record
