"""A model with one run's adapter merged into it, written as a Hugging Face folder, one shard at a
time.

Weights come from the base model's own files, never from a loaded model: beyond one shard, the host
holds one tensor.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ip_jax.models import gguf, hf, hub
from ip_jax.models.assemble import Reader, Tensor
from ip_jax.models.families import DecoderConfig, ParamPath, param_shapes
from ip_jax.models.gguf_file import open_gguf
from ip_jax.models.lora import LoraConfig
from ip_jax.models.peft import Adapter
from ip_jax.models.quantised import KERNELS, rounded
from ip_jax.prompts.chat import end_ids

SHARD_BYTES = 10**9
# of the base model's folder: tokenizer, chat template, generation config
_COPIED = ("*.json", "*.model", "*.jinja", "*.txt")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that is read when it is asked for: `shape` as in the file, [out, in]
    for kernels.

    `is_weight`: a floating-point one of the language model. Others go out as they are.
    """

    name: str
    shape: tuple[int, ...]
    is_weight: bool
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Precision:
    """`held`: the dtype in which the run had its base weights; `stored`: the dtype of the exported
    ones. Sums are in float32.

    `quantised`: the kind of `quantised.quantise` by which the run held its projections, or None.
    """

    held: str
    stored: str
    quantised: str | None = None


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when everything is there. What a killed export
    left, the next one clears away.

    Raises FileExistsError if something is there already.
    """
    if target.exists():
        raise FileExistsError(
            f"{target} exists already: choose another folder, or delete it first."
        )
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_merged(
    folder: Path,
    source: hub.Source,
    adapter: Adapter,
    lora: LoraConfig | None,
    precision: Precision,
) -> None:
    """`source` with scale * A B added to the projections that `adapter` has, as config.json,
    safetensors, tokenizer and generation config.

    Tensors keep their names; a .gguf file becomes a folder of its family. An empty `adapter` writes
    the model as it is held. The config is written last. Raises ValueError if the model has no
    tensor for a matrix of the adapter, and as the model's loading.
    """
    with open_weights(source) as (config, tensors):
        kernels = {
            hf.hf_name(("layers", name), layer): (name, layer)
            for name in KERNELS
            for layer in range(config.n_layers)
        }
        changed = {name for name, (target, _) in kernels.items() if target in adapter}
        missing = sorted(changed - {hf.in_language_model(tensor.name) for tensor in tensors})
        if missing:
            raise ValueError(
                f"{source.path} has no tensor {missing[0]!r}, which the adapter changes."
            )

        def merged(tensor: StoredTensor) -> np.ndarray:
            array = tensor.read()
            if not tensor.is_weight:
                return array
            array = array.astype(jnp.dtype(precision.held))
            target, layer = kernels.get(hf.in_language_model(tensor.name), (None, None))
            if target and precision.quantised:
                array = rounded(array.T, precision.quantised).T
            if target in adapter:
                a, b = (adapter[target][kind][layer].astype(np.float32) for kind in ("a", "b"))
                array = array.astype(np.float32) + (lora.scale * (a @ b)).T
            return array.astype(jnp.dtype(precision.stored))

        write_shards(folder, tensors, merged, jnp.dtype(precision.stored).itemsize)
    _write_companions(folder, source, precision.stored)


def write_trained(folder: Path, source: hub.Source, weights: Path, dtype: str) -> None:
    """A run of which all weights were trained from `source`, as `write_merged` writes others.

    `weights` is a safetensors file of params, named by their path: "embed", "layers.q", ... What
    `source` sees with goes out as it is. Raises as the model's loading.
    """
    with open_weights(source) as (config, base), safe_open(weights, framework="numpy") as file:
        own_name = {hf.in_language_model(tensor.name): tensor.name for tensor in base}

        def read(path: ParamPath, layer: int | None) -> Tensor:
            stored = file.get_slice(".".join(path))
            return stored[:] if layer is None else _OfLayer(stored, layer)

        def converted(tensor: StoredTensor) -> np.ndarray:
            return tensor.read().astype(jnp.dtype(dtype)) if tensor.is_weight else tensor.read()

        trained = [
            dataclasses.replace(tensor, name=own_name.get(tensor.name, tensor.name))
            for tensor in tensors_by_config(config, read)
        ]
        write_shards(
            folder,
            trained + [tensor for tensor in base if hf.is_of_vision(tensor.name)],
            converted,
            jnp.dtype(dtype).itemsize,
        )
    _write_companions(folder, source, dtype)


@contextlib.contextmanager
def open_weights(source: hub.Source) -> Iterator[tuple[DecoderConfig, list[StoredTensor]]]:
    """(config, every tensor of the model under its Hugging Face name), open while the context
    is.
    """
    if source.is_gguf:
        file = open_gguf(source.path)
        config = gguf.read_config(file)
        yield config, tensors_by_config(config, gguf.reader(file, config))
        return
    config = hf.read_config(source.path)
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="numpy"))
            for path in hf.weight_files(source.path)
        ]
        yield config, [_stored(file, name) for file in files for name in file.keys()]  # noqa: SIM118  it is no dict


def tensors_by_config(config: DecoderConfig, read: Reader) -> list[StoredTensor]:
    """The tensors of a model whose params `read` gives (see `assemble`), named and laid out as
    Hugging Face has them: one for each expert.
    """
    tensors = []
    for path, shape in param_shapes(config).items():
        of_layer, layers = (shape[1:], range(shape[0])) if path[0] == "layers" else (shape, (None,))
        one, experts = (
            (of_layer[1:], range(of_layer[0]))
            if path[-1].startswith("expert_")
            else (of_layer, (None,))
        )
        is_kernel = len(one) == 2 and path != ("embed",)
        for layer, expert in itertools.product(layers, experts):
            part = slice(None) if expert is None else slice(expert, expert + 1)

            def turned(
                path=path, layer=layer, part=part, one=one, is_kernel=is_kernel
            ) -> np.ndarray:
                array = read(path, layer)[(part,)].reshape(one)
                return array.T if is_kernel else array

            tensors.append(
                StoredTensor(
                    hf.hf_name(path, layer, expert), one[::-1] if is_kernel else one, True, turned
                )
            )
    return tensors


def write_shards(
    folder: Path,
    tensors: Sequence[StoredTensor],
    convert: Callable[[StoredTensor], np.ndarray],
    itemsize: int,
) -> None:
    """Each tensor as `convert` gives it, in files of at most SHARD_BYTES (or one tensor), with an
    index where there are several.

    Raises OSError for a disk that is full.
    """
    shards, total, weight_map = _cut(tensors, itemsize), 0, {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else hf.SINGLE
        arrays = {tensor.name: np.ascontiguousarray(convert(tensor)) for tensor in shard}
        try:
            save_file(arrays, folder / file, {"format": "pt"})  # transformers asks for the format
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / file} ({error}).") from error
        total += sum(array.nbytes for array in arrays.values())
        weight_map |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        (folder / hf.INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            + "\n"
        )


def _stored(file, name: str) -> StoredTensor:
    tensor = file.get_slice(name)
    is_weight = tensor.get_dtype() in hf.FLOATS and not hf.is_of_vision(name)
    return StoredTensor(name, tuple(tensor.get_shape()), is_weight, lambda: file.get_tensor(name))


class _OfLayer:
    """One layer of a stored tensor [L, ...], of which only the asked slice is read."""

    def __init__(self, tensor, layer: int):
        self._tensor, self._layer = tensor, layer
        self.shape = tuple(tensor.get_shape()[1:])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._tensor[(slice(self._layer, self._layer + 1), *index)][0]


def _cut(tensors: Sequence[StoredTensor], itemsize: int) -> list[list[StoredTensor]]:
    shards, room = [], 0
    for tensor in tensors:
        # the others are few, and at most this wide
        size = math.prod(tensor.shape) * (itemsize if tensor.is_weight else 8)
        if not shards or size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_companions(folder: Path, source: hub.Source, dtype: str) -> None:
    """Tokenizer, chat template and generation config of the base model, which names every token at
    which sampling ends here; config.json with the dtype of the new weights, last.
    """
    if source.is_gguf:
        file = open_gguf(source.path)
        config, tokenizer = gguf.hf_config(file), gguf.read_tokenizer(file)
        tokenizer.save_pretrained(folder)
        ids = {
            f"{role}_token_id": getattr(tokenizer, f"{role}_token_id")
            for role in ("bos", "eos", "pad")
        }
        config |= {name: value for name, value in ids.items() if value is not None}
        generation = {name: config[name] for name in ids if name in config}
    else:
        config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        for path in sorted(path for pattern in _COPIED for path in source.path.glob(pattern)):
            if path.name not in ("config.json", hf.INDEX):
                (folder / path.name).write_bytes(path.read_bytes())
        has_tokenizer = (folder / "tokenizer.json").exists()
        tokenizer = hub.load_tokenizer(os.fspath(source.path)) if has_tokenizer else None
        path = folder / "generation_config.json"
        generation = json.loads(path.read_text()) if path.exists() else {}
    if tokenizer is not None and tokenizer.chat_template:
        ends = end_ids(tokenizer, hub.end_ids(os.fspath(source.path)))
        generation["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    config.pop("dtype", None)  # transformers 5; the older name is read by every version
    (folder / "config.json").write_text(
        json.dumps(config | {"torch_dtype": dtype}, indent=2) + "\n"
    )
