"""A Hugging Face model folder (config.json + safetensors, one file or an index of shards) ->
config, params, fingerprint.
"""

import hashlib
import json
import re
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes  # noqa: F401  registers "bfloat16" with numpy, under which safetensors then returns bf16 tensors
import numpy as np
from safetensors import SafetensorError, safe_open

from ip_jax.models.assemble import ShardingOf, Tensor, assemble, check_shape
from ip_jax.models.families import DecoderConfig, ParamPath, from_hf_config, param_shapes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_OUTSIDE = {
    ("embed",): "model.embed_tokens.weight",
    ("final_norm",): "model.norm.weight",
    ("head",): "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "attn_post_norm": "post_attention_layernorm.weight",  # where the block has norms on both sides
    "mlp_pre_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "router": "block_sparse_moe.gate.weight",
    "expert_gate": "block_sparse_moe.experts.{}.w1.weight",
    "expert_up": "block_sparse_moe.experts.{}.w3.weight",
    "expert_down": "block_sparse_moe.experts.{}.w2.weight",
}
# The names of transformers 5 within a program and, with save_original_format=False, in a folder:
# all experts of a layer in one tensor [E, outputs, inputs], gate before up.
_FUSED = {
    "router": "mlp.gate.weight",
    "expert_gate": "mlp.experts.gate_up_proj",
    "expert_up": "mlp.experts.gate_up_proj",
    "expert_down": "mlp.experts.down_proj",
}
# What checkpoints carry besides a language model's weights: rope's frequencies (old ones), the head
# of a model whose embeddings are tied, the part of a multimodal model that sees.
_VISION = r"^(model\.)?(vision_tower|multi_modal_projector)\."
_WITHOUT_EFFECT = rf"\.rotary_emb\.inv_freq$|^lm_head\.weight$|{_VISION}"
FLOATS = ("F64", "F32", "F16", "BF16")


def hf_name(path: ParamPath, layer: int | None, expert: int | None = None) -> str:
    """The checkpoint's name of the array at `path` of params, for example ("layers", "q"), 3 ->
    model.layers.3.self_attn.q_proj.weight.

    The experts of a layer are tensors of their own, so each is asked for.
    """
    return (
        _OUTSIDE[path]
        if layer is None
        else f"model.layers.{layer}.{_LAYER[path[-1]]}".format(expert)
    )


def _fused_name(path: ParamPath, layer: int) -> str:
    return f"model.layers.{layer}.{_FUSED[path[-1]]}"


def read_config(folder: Path | str) -> DecoderConfig:
    """Raises FileNotFoundError without a config.json, ValueError for a damaged or unsupported one
    (naming the folder).
    """
    config = _read_json(Path(folder) / "config.json")
    try:
        return from_hf_config(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def read_params(
    folder: Path | str, config: DecoderConfig, dtype, sharding: ShardingOf | None = None
) -> dict:
    """The params of `config`, read tensor by tensor and converted to `dtype`; kernels are
    transposed to [in, out].

    With a `sharding`, each process reads only the slices of every tensor that its own devices hold.
    Before any is read, raises ValueError for a damaged or truncated file (naming it) and for a
    tensor that is missing, of another shape or unknown to the config (naming it), FileNotFoundError
    for a missing shard.
    """
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in weight_files(folder)}
        owner = {
            in_language_model(name): (path, name)
            for path, file in files.items()
            for name in file.keys()
        }
        used: set[str] = set()

        def read(path: ParamPath, layer: int | None) -> Tensor:
            if path[-1].startswith("expert_"):
                return _Stack([_Lazy(tensor, transposed=True) for tensor in experts(path, layer)])
            fused = path[-1] == "router" and _fused_name(path, layer) in owner
            tensor = stored(_fused_name(path, layer) if fused else hf_name(path, layer))
            return _Lazy(tensor, transposed=path != ("embed",) and len(tensor.get_shape()) == 2)

        def experts(path: ParamPath, layer: int) -> list:
            if _fused_name(path, layer) not in owner:
                return [stored(hf_name(path, layer, expert)) for expert in range(config.n_experts)]
            outputs = config.d_model if path[-1] == "expert_down" else config.d_ff
            first = config.d_ff if path[-1] == "expert_up" else 0
            return [
                _OfExpert(stored(_fused_name(path, layer)), expert, first, outputs)
                for expert in range(config.n_experts)
            ]

        def stored(name: str):
            if name not in owner:
                raise ValueError(
                    f"{folder} has no tensor {name!r} in its safetensors files, so the model is"
                    " incomplete; fetch it again."
                )
            used.add(name)
            path_of_file, stored_name = owner[name]
            tensor = files[path_of_file].get_slice(stored_name)
            if tensor.get_dtype() not in FLOATS:
                raise ValueError(
                    f"{path_of_file}: the tensor {name} is stored as {tensor.get_dtype()};"
                    f" supported are {', '.join(FLOATS)}."
                )
            return tensor

        for path, shape in param_shapes(config).items():
            for layer in range(shape[0]) if path[0] == "layers" else (None,):
                check_shape(
                    read(path, layer),
                    path,
                    layer,
                    shape if layer is None else shape[1:],
                    Path(folder),
                )
        _refuse_unknown(sorted(owner.keys() - used), folder, config)
        return assemble(config, read, dtype, sharding, Path(folder))


def in_language_model(name: str) -> str:
    """A tensor's name within the language model of a multimodal checkpoint: transformers wrote
    language_model.model.layers..., then model.language_model.layers...
    """
    return name.replace("language_model.", "", 1)


def is_of_vision(name: str) -> bool:
    """Whether a tensor belongs to the part of a multimodal checkpoint that sees."""
    return re.search(_VISION, name) is not None


def is_multimodal(folder: Path | str) -> bool:
    """Whether transformers loads the folder as a model of which the language model is a part.
    Raises as `read_config` for its config.json.
    """
    return "Gemma3ForConditionalGeneration" in _read_json(Path(folder) / "config.json").get(
        "architectures", ()
    )


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files of a model folder. Raises FileNotFoundError when there are none or one
    that the index names is missing.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(
                f"{folder / INDEX} names no files: it needs a weight_map from tensors to files;"
                " fetch it again."
            )
        files = sorted({folder / name for name in weight_map.values()})
    else:
        files = [folder / SINGLE]
    for path in files:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: a model folder holds {SINGLE}, or {INDEX} and every file that"
                " it names."
            )
    return files


def fingerprint(folder: Path | str) -> str:
    """ "sha256:..." over config.json and each weight file's name, size, header and first 4 KiB of
    every tensor.

    Not a hash of all weights, which would read a 7B model twice: it tells models and their
    fine-tunes apart, but does not notice a change in the middle of a tensor. Raises as
    `weight_files`, and ValueError for a damaged file.
    """
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in weight_files(folder):
        with _open(path):  # validates the header against the file's length
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + header)
            for name, entry in json.loads(header).items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    file.seek(8 + size + start)
                    digest.update(file.read(min(4096, end - start)))
    return f"sha256:{digest.hexdigest()}"


def _refuse_unknown(names: list[str], folder: Path | str, config: DecoderConfig) -> None:
    unknown = [name for name in names if not re.search(_WITHOUT_EFFECT, name)]
    if unknown:
        others = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ValueError(
            f"{folder} has the tensor {unknown[0]!r}{others}, which a {config.family} model of this"
            " config.json does not have."
        )


class _Lazy:
    """A tensor of a safetensors file, transposed on request, of which only the asked slice is
    read.
    """

    def __init__(self, tensor, transposed: bool):
        self._tensor, self._transposed = tensor, transposed
        self.shape = tuple(tensor.get_shape())[:: -1 if transposed else 1]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._tensor[index[::-1]].T if self._transposed else self._tensor[index]


class _OfExpert:
    """One expert's outputs, from `first` on, in a stored tensor [E, outputs, inputs] that holds
    those of all.
    """

    def __init__(self, tensor, expert: int, first: int, count: int):
        self._tensor, self._expert, self._first, self._count = tensor, expert, first, count

    def get_shape(self) -> list[int]:
        outputs, inputs = self._tensor.get_shape()[1:]
        return [min(self._count, outputs - self._first), inputs]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        start, stop, _ = index[0].indices(self._count)
        return self._tensor[
            self._expert : self._expert + 1, self._first + start : self._first + stop, index[1]
        ][0]


class _Stack:
    """The experts of a layer as one tensor [E, ...], of which only the asked slice is read, one
    expert at a time.
    """

    def __init__(self, tensors: list[_Lazy]):
        shapes = [tensor.shape for tensor in tensors]
        self._tensors = tensors
        # where they differ, the odd one, which the caller refuses
        self.shape = (len(tensors), *min(shapes, key=shapes.count))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        tensors = self._tensors[index[0]]
        first = tensors[0][index[1:]]
        out = np.empty((len(tensors), *first.shape), first.dtype)
        out[0] = first
        for i, tensor in enumerate(tensors[1:], start=1):
            out[i] = tensor[index[1:]]
        return out


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); fetch it again.") from error


def _read_json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, so {path.parent} is not a model folder.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; fetch it again.")
    return found
