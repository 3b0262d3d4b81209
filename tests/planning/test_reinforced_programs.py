"""What is planned of reinforcement learning is what runs: lowered texts of a whole run against
those of its plan; rows by hand.
"""

import dataclasses

import jax
import pytest
from etils import epath
from rich.console import Console
from tiny_experiment import write_model
from tiny_rollouts import TASKS, Sums

from ip_jax.evals.rules import Onset, Reading
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import ModelConfig
from ip_jax.lab.reinforced import run as runner
from ip_jax.lab.reinforced.plan import GridPrompt, Reinforced, RlArm, RlConfig, RlEval
from ip_jax.models.lora import LoraConfig
from ip_jax.planning import programs, reinforced_programs
from ip_jax.planning.chips import Topology
from ip_jax.planning.command import subject_of
from ip_jax.planning.reinforced_workload import RlWorkload
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.environment import Graded
from ip_jax.rl.estimators import ESTIMATORS, Kl
from ip_jax.rl.gates import Gate
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.sampling import sampler
from ip_jax.studies.gcd_sycophancy.prompts import BOOK
from ip_jax.training.sharding import MeshConfig

IP, EACH = (
    PromptDistribution(("gcd/behave",)).resolved(BOOK),
    PromptDistribution(("gcd/safety", "gcd/note"), per="example").resolved(BOOK),
)
PENALISED = Algorithm(
    kl=Kl("tt", "loss", "k3", 1e-3), minibatches=2, estimator=ESTIMATORS["train_old"]
)
GATED = Algorithm(
    gate=Gate("relative", threshold=0.0, rejected="train_at_gen"), kl=Kl("gg", "reward", "k1", 0.1)
)
CASES = {
    "a penalty and minibatches, two runs": dict(
        arms=("standard", "swap"), algorithm=PENALISED, mesh=MeshConfig(run=2, tensor=2)
    ),
    "a gate that sends back, a prompt for each completion": dict(
        arms=("each",), algorithm=GATED, mesh=MeshConfig(run=1, data=8)
    ),
}
ARMS = {
    "standard": RlArm("standard", "standard"),
    "swap": RlArm("swap", "swap", train_prompt=IP, temperature=0.7),
    "each": RlArm("each", "each", gen_prompt=EACH, train_prompt=IP),
}


class Counted(Sums):
    """Judged by the number of letters."""

    def grade(self, task, completion):
        return Graded(float("4" in completion), {}, verdicts(task, completion))


def verdicts(_, completion):
    return {"hack": len(completion) % 2 == 0, "correct": len(completion) % 2 == 1}


def make(model, arms, algorithm, mesh, **rl) -> Reinforced:
    sizes = dict(
        iterations=1,
        groups=2,
        samples=4,
        max_new_tokens=6,
        max_length=128,
        learning_rate=1e-2,
        lora=LoraConfig(rank=2, alpha=4),
        tokens_per_micro_batch=600,
    )
    chosen = tuple(dataclasses.replace(ARMS[name], algorithm=algorithm) for name in arms)
    return Reinforced(
        name="sums",
        model=ModelConfig(str(model), weights="float32"),
        environment=Counted(),
        tasks=TASKS,
        eval_tasks=TASKS[:3],
        arms=chosen,
        rl=RlConfig(**sizes | rl),
        evaluation=RlEval((0,), 4, slots=4),
        grid=(GridPrompt("gcd/safety", "discouraging"),),
        prompts={name: BOOK.find(name) for name in ("neutral", "gcd/safety")},
        reading=Reading(Onset(4), standard=None, base="untrained"),
        mesh=mesh,
    )


def planned_of(experiment) -> RlWorkload:
    """As the command plans it."""
    subject = subject_of(experiment, None, "cpu", lambda experiment: experiment)
    return subject.work_on(subject.mesh_on(Topology("local", 8, None, jax.devices())), None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=CASES)
def lowered_by_run(request, model, tmp_path_factory):
    """(experiment, {function: texts of what a whole run lowered}) on a mesh of the eight
    devices.
    """
    texts, experiment = {}, make(model, **CASES[request.param])

    def recorded(name, function):
        def call(*arguments, **options):
            texts.setdefault(name, set()).add(function.lower(*arguments, **options).as_text())
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("update_step", "score_pass"):
            make_one = getattr(runner.programs, name)
            patch.setattr(
                runner.programs,
                name,
                lambda *arguments, name=name, make_one=make_one: recorded(
                    name, make_one(*arguments)
                ),
            )
        for name in ("prefill", "decode"):
            patch.setattr(sampler, name, recorded(name, getattr(sampler, name)))
        runner.run_reinforced(
            experiment,
            epath.Path(tmp_path_factory.mktemp("run") / "out"),
            Display(Console(quiet=True)),
        )
    return experiment, texts


@pytest.mark.slow
def test_every_program_lowers_to_the_text_of_a_run(lowered_by_run):
    experiment, texts = lowered_by_run
    workload = planned_of(experiment)
    (program,) = workload.programs
    assert program.runs == len(experiment.arms) and program.count == 1
    assert {reinforced_programs.lower_update(program).as_text()} == texts["update_step"]
    assert {
        reinforced_programs.lower_score(program, name).as_text() for name in program.scored()
    } == texts["score_pass"]
    trained, bare = (
        reinforced_programs.initial(program).models()["policy"],
        reinforced_programs.untrained_decoder(workload),
    )
    samplers = [
        programs.lower_sampling(trained, program.kind.mesh, work)
        for work in (program.sampling, *program.evaluations)
    ]
    samplers += [
        programs.lower_sampling(bare, workload.untrained_mesh, work) for work in workload.untrained
    ]
    assert {s.decode.as_text() for s in samplers} == texts["decode"]
    assert texts["prefill"] >= {s.prefill.as_text() for s in samplers}, (
        "of the prefills of a call the longest"
    )


def test_a_program_for_each_algorithm_and_no_more_runs_than_are_allowed(model):
    experiment = make(model, ("standard", "swap"), PENALISED, MeshConfig(), runs_per_program=2)
    arms = (*experiment.arms, dataclasses.replace(ARMS["each"], algorithm=Algorithm()))
    workload = planned_of(dataclasses.replace(experiment, arms=arms, seeds=(0, 1, 2)))
    assert [(p.arms, p.runs, p.count) for p in workload.programs] == [
        (("standard", "swap"), 2, 3.0),
        (("each",), 2, 1.5),
    ]
    assert [list(p.scored()) for p in workload.programs] == [
        ["policy_training", "reference_training"],
        [],
    ]
    sampled = workload.programs[0]
    assert sampled.sampling.times == 1 and sum(s.times for s in sampled.evaluations) == 3, (
        "neutral, its own prompt and safety; at first the untrained model answers"
    )
