"""Finding a study by its name, folder or file, and its preset with the fields of a command line."""

import argparse
import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ip_jax.cli import nearest
from ip_jax.lab.study import Study


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a command is about: a study (None where a config holds sizes alone), a preset of it, and
    the command's own options.
    """

    study: Study | None
    preset: Any
    options: argparse.Namespace


def read(command: str, arguments: list[str], own: argparse.ArgumentParser) -> Asked:
    """The study and preset that a command line names. `own` parses the command's options, what it
    leaves are fields of the preset. Raises ValueError with the nearest names.
    """
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is None:
        raise ValueError(
            f"{command} needs a study: {', '.join(config_names())}, a folder with a study.py, or"
            " the path of a Python file"
        )
    module = load_module(name)
    own.add_argument("--preset")
    options, fields = own.parse_known_args(arguments[1:])
    study = study_of(module, name)
    preset = study.preset(options.preset) if study else _sizes(module, name, options.preset)
    program = f"ip-jax {command} {name} --preset {preset.preset}"
    return Asked(study, override(preset, fields, program), options)


def override(preset, fields: list[str], program: str):
    """`preset` with the fields of a command line (`--sft.learning-rate 1e-4`) replaced. A field
    that is not known ends with the nearest names.
    """
    import tyro

    return tyro.cli(
        type(preset),
        default=preset,
        args=fields,
        prog=program,
        description=f"Fields of the preset {preset.preset}, all of which can be changed.",
    )


def find_study(name: str) -> Study:
    """The study of that name, folder or file. Raises ValueError with the nearest names, and for a
    config that holds sizes alone.
    """
    study = study_of(load_module(name), name)
    if study is None:
        raise ValueError(
            f"the config {name} holds sizes and no data, so it can only be planned: ip-jax plan"
            f" {name} --topology v5e:4x4"
        )
    return study


def recorded_study(folder: str, record: dict) -> Study:
    """The study whose results a folder holds, by what its config.json says. Raises ValueError where
    the study is not to be found any more.
    """
    file, name = record.get("study_file"), record["experiment"]
    if file is not None and Path(file).exists():
        return find_study(file)
    if name not in config_names():
        raise ValueError(
            f"{folder} holds the study {name!r}, which is not known here:"
            f" {f'its file {file} is gone' if file else nearest(name, config_names())}"
        )
    return find_study(name)


def study_of(module: ModuleType, name: str) -> Study | None:
    """The STUDY of a module; None where it holds PRESETS that are sizes alone."""
    study = getattr(module, "STUDY", None)
    if study is None and not getattr(module, "PRESETS", None):
        raise ValueError(f"{name} holds no STUDY: a Python file of a study sets STUDY = Study(...)")
    if study is not None and not isinstance(study, Study):
        raise ValueError(f"the STUDY of {name} is {type(study).__name__} and no Study")
    if study is None or module.__name__.startswith("configs."):
        return study
    return dataclasses.replace(study, file=str(Path(module.__file__).resolve()))


def load_module(name: str) -> ModuleType:
    """The module of a name in configs/, of a folder with a study.py, or of a Python file. Raises
    ValueError with the nearest names.
    """
    path = Path(name)
    if path.is_dir() and (path / "study.py").exists():
        path = path / "study.py"
    if path.suffix == ".py":
        return _load_file(path)
    if name in config_names():
        return importlib.import_module(f"configs.{name}")
    if path.is_dir():
        raise ValueError(f"the folder {name} holds no study.py")
    raise ValueError(
        f"no study is called {name!r}: {nearest(name, config_names())}, a folder with a study.py,"
        " or the path of a .py file"
    )


def _load_file(path: Path) -> ModuleType:
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    # processes that grade import the module by its name
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def config_names() -> list[str]:
    """Names in configs/."""
    import configs

    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def _sizes(module: ModuleType, name: str, preset: str | None):
    """A preset of a config that holds sizes alone."""
    preset = preset or next(iter(module.PRESETS))
    if preset not in module.PRESETS:
        raise ValueError(f"{name} has no preset {preset!r}: {nearest(preset, module.PRESETS)}")
    return module.PRESETS[preset]
