"""Everything that a file with a STUDY imports, under one name."""

from ip_jax.data.rows import Files, FilesSpec, StudyData
from ip_jax.evals.judges import Endpoint, Judge, Number, YesNo
from ip_jax.evals.metrics import Difference, Given, Holds, Mean, Rate
from ip_jax.evals.rules import (
    Contrast,
    Onset,
    Reading,
    Rule,
    equivalent_within,
    interval_above,
    interval_below,
)
from ip_jax.evals.scorers import All, Matches
from ip_jax.lab.experiment import Arm, EvalConfig, ModelConfig, SftConfig, SupervisedPreset
from ip_jax.lab.reinforced.plan import GridPrompt, ReinforcedPreset, RlArm, RlConfig, RlEval
from ip_jax.lab.study import Study
from ip_jax.models.lora import LoraConfig
from ip_jax.prompts.prompt import Prompt
from ip_jax.prompts.transforms import (
    Chain,
    Detector,
    Paraphrases,
    Prefix,
    Share,
    Slot,
    Suffix,
    System,
    Where,
)
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.environment import Environment, Graded
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.training.schedules import Schedule
from ip_jax.training.sharding import MeshConfig

__all__ = [
    "Algorithm",
    "All",
    "Endpoint",
    "Judge",
    "Matches",
    "Number",
    "YesNo",
    "Arm",
    "Chain",
    "Contrast",
    "Detector",
    "Difference",
    "Environment",
    "EvalConfig",
    "Files",
    "FilesSpec",
    "Given",
    "Graded",
    "GridPrompt",
    "Holds",
    "LoraConfig",
    "Mean",
    "MeshConfig",
    "ModelConfig",
    "Onset",
    "Paraphrases",
    "Prefix",
    "Prompt",
    "PromptDistribution",
    "Rate",
    "Reading",
    "ReinforcedPreset",
    "RlArm",
    "RlConfig",
    "RlEval",
    "Rule",
    "Schedule",
    "SftConfig",
    "Share",
    "Slot",
    "Study",
    "StudyData",
    "Suffix",
    "SupervisedPreset",
    "System",
    "Where",
    "equivalent_within",
    "interval_above",
    "interval_below",
]
