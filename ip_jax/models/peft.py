"""LoRA adapters as PEFT keeps them: a folder with adapter_config.json and
adapter_model.safetensors.

Source: peft's LoraConfig (the fields, what they mean, their defaults) and its save_pretrained
(names and layout of the tensors).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  registers "bfloat16" with numpy, under which safetensors then returns bf16 tensors
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ip_jax.models.embedded import file_hash
from ip_jax.models.families import DecoderConfig
from ip_jax.models.hf import hf_name, in_language_model
from ip_jax.models.lora import LoraConfig, projection_shapes

# {target: {"a": [L, inputs, rank], "b": [L, rank, outputs]}} of one run
Adapter = dict[str, dict[str, np.ndarray]]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields of adapter_config.json that do not change what a trained plain LoRA computes. Those of the
# second line are read.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "target_modules",
}
# others change the base weights as well
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}
_UNSET = (None, False, [], {})


def write_adapter(
    folder: Path,
    adapter: Mapping[str, Mapping[str, np.ndarray]],
    lora: LoraConfig,
    model: str,
    revision: str | None = None,
    multimodal: bool = False,
) -> None:
    """Writes one run's adapter as a folder that `peft.PeftModel.from_pretrained` loads on `model`
    (a name, kept in the config).

    `adapter` is {target: {"a": [L, inputs, rank], "b": [L, rank, outputs]}}, stored in its dtype.
    `multimodal`: transformers loads `model` as one of which the language model is a part
    (`hf.is_multimodal`). The config is written last.
    """
    layers = next(iter(adapter.values()))["a"].shape[0]
    tensors = {
        _tensor_name(target, layer, kind, multimodal): np.ascontiguousarray(
            adapter[target][kind][layer].T
        )
        for target in adapter
        for layer in range(layers)
        for kind in ("a", "b")
    }
    modules = [_module_name(target, 0).rpartition(".")[2] for target in adapter]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "bias": "none",
        # the vision part has modules of these names
        "target_modules": (
            rf".*\.language_model\..*\.({'|'.join(modules)})" if multimodal else modules
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_adapter(folder: Path, config: DecoderConfig) -> tuple[LoraConfig, Adapter]:
    """The adapter of a PEFT folder as float32, for a model of this config; the targets are those
    that it has tensors for.

    Raises FileNotFoundError for a folder that is none of PEFT's, ValueError for a damaged one, an
    option beyond plain LoRA, and tensors that are missing, unknown or of another shape (naming the
    first).
    """
    settings = _read_settings(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    places = {
        _tensor_name(target, layer, kind): (target, layer, kind)
        for target in projection_shapes(config)
        for layer in range(config.n_layers)
        for kind in ("a", "b")
    }
    unknown = sorted(tensors.keys() - places.keys())
    if unknown:
        raise ValueError(
            f"{folder / WEIGHTS} has the tensor {unknown[0]!r}, which is no LoRA matrix of a"
            f" {config.family} model with {config.n_layers} layers."
        )
    targets = tuple(
        target
        for target in projection_shapes(config)
        if any(places[name][0] == target for name in tensors)
    )
    rank, adapter = settings["r"], {}
    for target in targets:
        inputs, outputs = projection_shapes(config)[target]
        adapter[target] = {
            kind: np.stack(
                [
                    _matrix(folder, tensors, _tensor_name(target, layer, kind), shape)
                    for layer in range(config.n_layers)
                ]
            )
            for kind, shape in (("a", (inputs, rank)), ("b", (rank, outputs)))
        }
    lora = LoraConfig(
        rank,
        settings["lora_alpha"],
        bool(settings.get("use_rslora")),
        settings.get("lora_dropout", 0.0),
        targets,
    )
    return lora, adapter


def read_matching(folder: Path, config: DecoderConfig, wanted: LoraConfig) -> Adapter:
    """The adapter of a PEFT folder, if it is one of `wanted` (dropout apart). Raises as
    `read_adapter`, and ValueError that says what differs.
    """
    found, adapter = read_adapter(folder, config)
    differing = [
        f"{field} is {theirs} where the config's LoRA has {ours}"
        for field, theirs, ours in (
            ("rank", found.rank, wanted.rank),
            ("alpha", found.alpha, wanted.alpha),
            ("rslora", found.rslora, wanted.rslora),
            ("set of targets", ", ".join(sorted(found.targets)), ", ".join(sorted(wanted.targets))),
        )
        if theirs != ours
    ]
    if differing:
        raise ValueError(
            f"the adapter {folder} cannot be a starting point: its {'; its '.join(differing)}"
        )
    return adapter


def replace_runs(adapters: dict, starts: Sequence[Adapter | None]) -> dict:
    """`adapters` ({target: {"a": [R, L, inputs, rank], "b": [R, L, rank, outputs]}}) with run r's
    replaced where starts[r] is one.
    """
    for r, start in enumerate(starts):
        if start is not None:
            adapters = {
                target: {
                    kind: array.at[r].set(start[target][kind]) for kind, array in matrices.items()
                }
                for target, matrices in adapters.items()
            }
    return adapters


def fingerprint(folder: Path) -> str:
    """The content hash of the adapter's tensors. Raises as `read_adapter` for a folder that is none
    of PEFT's.
    """
    _read_settings(folder)
    return f"sha256:{file_hash(folder / WEIGHTS)}"


def _module_name(target: str, layer: int, multimodal: bool = False) -> str:
    name = hf_name(("layers", target), layer).removesuffix(".weight")
    return name.replace("model.", "model.language_model.", 1) if multimodal else name


def _tensor_name(target: str, layer: int, kind: str, multimodal: bool = False) -> str:
    return f"base_model.model.{_module_name(target, layer, multimodal)}.lora_{kind.upper()}.weight"


def _read_settings(folder: Path) -> dict:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name} is missing: an adapter is a PEFT folder with {CONFIG} and"
                f" {WEIGHTS}."
            )
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not valid JSON ({error}).") from error
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder / CONFIG} is an adapter of the kind {settings.get('peft_type')}; supported is"
            " LORA."
        )
    for field in ("r", "lora_alpha"):
        if not isinstance(settings.get(field), int | float):
            raise ValueError(
                f"{folder / CONFIG} has no number {field!r}, which a LoRA of PEFT needs."
            )
    for field, value in settings.items():
        if field not in _WITHOUT_EFFECT and value not in _PLAIN.get(field, _UNSET):
            raise ValueError(
                f"{folder / CONFIG} sets {field} = {value!r}, which is not supported: an adapter"
                " must be plain LoRA with one rank and alpha."
            )
    return settings


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {in_language_model(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}).") from error


def _matrix(
    folder: Path, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int]
) -> np.ndarray:
    """A tensor of the file, transposed to [in, out] as params have it."""
    if name not in tensors:
        raise ValueError(
            f"{folder / WEIGHTS} has no tensor {name!r}: an adapter must have one for every layer"
            " of each of its targets."
        )
    found = tensors[name].T
    if found.shape != shape:
        raise ValueError(
            f"{folder / WEIGHTS}: the tensor {name} has the shape {found.shape[::-1]} where the"
            f" model and the rank ask for {shape[::-1]}."
        )
    return found.astype(np.float32)
