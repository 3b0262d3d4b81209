"""What a results folder holds of its trained runs: which there are, what one of them learned, and
its way out to other programs.
"""

import dataclasses
import difflib
import json
from pathlib import Path

import ml_dtypes  # noqa: F401  registers "bfloat16" with numpy, under which safetensors then returns bf16 tensors
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load
from safetensors.numpy import save as to_safetensors

from ip_jax.lab.experiment import ModelConfig, decided
from ip_jax.models import hub
from ip_jax.models.decoder import split_decoder
from ip_jax.models.export import Precision, whole_folder, write_merged, write_trained
from ip_jax.models.lora import LoraConfig
from ip_jax.models.peft import Adapter, write_adapter
from ip_jax.training.results import write_json, write_whole

UNTRAINED = "untrained"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """One run: the model under it, what run.json says of it, and what it learned.

    That is an adapter ({target: {"a": [L, in, r], "b": [L, r, out]}} in float32), or `weights`, a
    file of all params, where all were trained. The untrained model has neither, and no record.
    """

    arm: str
    seed: int
    model: ModelConfig
    record: dict
    lora: LoraConfig | None
    adapter: Adapter
    weights: epath.Path | None = None

    def check_base(self, fingerprint: str) -> None:
        """Raises ValueError if the adapter was trained on other weights than those of this
        fingerprint.
        """
        if self.record and self.record["fingerprint"] != fingerprint:
            raise ValueError(
                f"the run of arm {self.arm} with seed {self.seed} was trained on other weights than"
                f" those of {self.model.name} now"
            )


def write_run(target: epath.Path, about: dict, learned: dict[str, np.ndarray], name: str) -> None:
    """Records a run as complete: what it learned as `name`.safetensors, first, and run.json last:
    where that stands, the run is complete.
    """
    # one metadata entry: safetensors writes several in an order of chance, and equal runs should be
    # equal files
    write_whole(
        target / f"{name}.safetensors",
        to_safetensors(
            {key: np.ascontiguousarray(a) for key, a in learned.items()}, {"run": json.dumps(about)}
        ),
    )
    write_json(target / "run.json", about)


def trained_runs(folder: epath.Path) -> dict[str, list[int]]:
    """The complete runs of a results folder: arm -> seeds."""
    runs: dict[str, list[int]] = {}
    for path in sorted(folder.glob("runs/*/run.json")):
        record = json.loads(path.read_text())
        runs.setdefault(record["arm"], []).append(record["seed"])
    return runs


def read_run(folder: epath.Path, arm: str, seed: int | None = None) -> TrainedRun:
    """A complete run of a results folder, the arm's first one without a seed. Raises ValueError for
    an arm or seed that is not there.
    """
    runs = trained_runs(folder)
    if arm != UNTRAINED and arm not in runs:
        near = difflib.get_close_matches(arm, runs, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(
            f"{folder} has no trained arm {arm!r}: {hint}there is {', '.join([*runs, UNTRAINED])}"
        )
    seeds = runs.get(arm, [0])
    if seed is not None and seed not in seeds:
        raise ValueError(
            f"arm {arm} has no run with seed {seed}: there is {', '.join(map(str, seeds))}"
        )
    seed = seeds[0] if seed is None else seed
    config = json.loads((folder / "config.json").read_text())["config"]
    if "model" not in config:
        raise ValueError(
            f"{folder} holds runs of the toy, which is no language model: there is nothing to talk"
            " to or to export"
        )
    model = decided(ModelConfig(**config["model"]))  # a record need not name its dtypes
    if arm == UNTRAINED:
        return TrainedRun(arm, seed, model, {}, None, {})
    path = folder / "runs" / f"{arm}-s{seed}"
    record = json.loads((path / "run.json").read_text())
    if (path / "weights.safetensors").exists():
        return TrainedRun(arm, seed, model, record, None, {}, path / "weights.safetensors")
    if "lora" not in record:
        raise ValueError(
            f"{path} was recorded by an earlier version, without its LoRA settings: train it again"
            " in another folder"
        )
    lora = LoraConfig(**record["lora"] | {"targets": tuple(record["lora"]["targets"])})
    tensors = load((path / "adapter.safetensors").read_bytes())
    return TrainedRun(
        arm,
        seed,
        model,
        record,
        lora,
        {
            target: {kind: tensors[f"{target}.{kind}"] for kind in ("a", "b")}
            for target in lora.targets
        },
    )


def decoder_of(run: TrainedRun, base: hub.Pretrained) -> tuple:
    """(graphdef, lora, weights) of a run, as `split_decoder` gives them, with R = 1. Raises
    ValueError if it began from other weights.
    """
    run.check_base(base.fingerprint)
    if run.weights:
        with safe_open(run.weights, framework="numpy") as file:
            return split_decoder(
                base.config,
                unflatten_dict({name: file.get_tensor(name) for name in file.keys()}, sep="."),
            )  # noqa: SIM118
    adapter = {
        target: {kind: array[np.newaxis] for kind, array in matrices.items()}
        for target, matrices in run.adapter.items()
    }
    return split_decoder(base.config, base.params, adapter, run.lora)


def export_run(run: TrainedRun, target: str, merged: bool, dtype: str | None = None) -> None:
    """Writes a run as a PEFT folder, or merged into its base model as a Hugging Face folder with
    weights in `dtype`.

    Without a `dtype`, merged weights have the one in which the run held its base. The folder
    appears when it is whole. Raises ValueError, FileExistsError or another OSError with one
    sentence.
    """
    if "://" in target:
        raise ValueError(
            f"cannot export to {target}: write to a folder on this machine, and copy it from there"
        )
    if not merged and not run.adapter:
        raise ValueError(
            f"arm {run.arm} has no adapter to export: --merged writes the model itself"
        )
    if dtype is not None and (dtype not in DTYPES or not merged):
        raise ValueError(
            f"--dtype {dtype} is not possible: with --merged it is one of {', '.join(DTYPES)}; an"
            " adapter is always float32"
        )
    with whole_folder(Path(target)) as partial:
        if merged:
            source, dtype = (
                hub.resolve(run.model.name, run.model.revision),
                dtype or run.model.weights,
            )
            run.check_base(hub.fingerprint(run.model.name, run.model.revision))
            if run.weights:
                write_trained(partial, source, run.weights, dtype)
            else:
                write_merged(
                    partial,
                    source,
                    run.adapter,
                    run.lora,
                    Precision(run.model.weights, dtype, run.model.quantised),
                )
        else:
            multimodal = hub.is_multimodal(run.model.name, run.model.revision)
            write_adapter(
                partial, run.adapter, run.lora, run.model.name, run.model.revision, multimodal
            )
        if run.record:
            (partial / "run.json").write_text(json.dumps(run.record, indent=2) + "\n")
