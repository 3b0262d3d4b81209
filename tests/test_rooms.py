"""The house: a room imports only from rooms before it, and no generic room knows a study."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = (
    "prompts",
    "data",
    "models",
    "training",
    "sampling",
    "rl",
    "evals",
    "lab",
    "studies",
    "report",
    "planning",
    "cli",
)


def imports_of(room: str):
    """(file, imported module) of every import of this package in a room, those in functions too."""
    for path in sorted((ROOT / "ip_jax" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            for module in modules:
                if module.startswith(("ip_jax.", "configs", "experiments")):
                    yield path.relative_to(ROOT), module


def test_every_folder_is_a_known_room():
    folders = {path.name for path in (ROOT / "ip_jax").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == set(ROOMS)


def test_no_generic_room_imports_a_study_and_none_a_config():
    for room in ROOMS:
        for path, module in imports_of(room):
            assert room == "studies" or not module.startswith("ip_jax.studies"), (path, module)
            assert room == "cli" or not module.startswith(("configs", "experiments")), (
                path,
                module,
            )


def test_no_generic_room_names_a_study():
    studies = [p.name for p in (ROOT / "ip_jax" / "studies").iterdir() if p.is_dir()]
    for room in ("prompts", "evals", "report", "lab"):
        for path in sorted((ROOT / "ip_jax" / room).rglob("*.py")):
            text = path.read_text().lower()
            named = [name for name in (*studies, "gcd") if name != "toy" and name in text]
            assert not named, (path, named)


def test_a_room_imports_only_from_rooms_before_it():
    order = {room: place for place, room in enumerate(ROOMS)}
    for room in ROOMS:
        for path, module in imports_of(room):
            other = module.partition("ip_jax.")[2].split(".")[0]
            assert other not in order or order[other] <= order[room], (path, module)
