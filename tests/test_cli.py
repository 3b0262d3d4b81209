"""The command line: one sentence and the nearest names for every mistake, fields of a config,
redrawing without a model.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.gcd_sycophancy import STUDY
from ip_jax import cli
from ip_jax.cli import run as run_command
from ip_jax.cli import studies
from ip_jax.lab import build
from ip_jax.lab import run as lab
from ip_jax.lab.observer import Watch
from ip_jax.prompts.chat import Rendered
from ip_jax.report import draw as drawing
from ip_jax.studies.gcd_sycophancy import data
from ip_jax.studies.gcd_sycophancy import study as gcd

DEMO = STUDY.preset("demo")
CONFIG = """
import dataclasses

from configs.gcd_sycophancy import STUDY as published

DEMO = published.presets["demo"]
MODEL = dataclasses.replace(DEMO.model, name={model!r})
STUDY = dataclasses.replace(
    published, presets={{"demo": dataclasses.replace(DEMO, model=MODEL)}}
)
"""


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch):
    """It would stay switched on for the tests that follow."""
    monkeypatch.setattr(run_command, "_enable_compile_cache", lambda: "nowhere")


@pytest.fixture
def config(tmp_path) -> str:
    """A study of the user's own whose model points nowhere."""
    path = tmp_path / "mine.py"
    path.write_text(CONFIG.format(model=str(tmp_path / "nowhere")))
    return str(path)


def failure(capsys, *arguments: str) -> str:
    """What a command that fails says on stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["rnu"],
            (
                "no command is called 'rnu': did you mean run? there is new, check, run, plan,"
                " figure, chat, export, models"
            ),
        ),
        (
            ["run"],
            (
                "run needs a study: amplification, estimators, gated_recontextualization,"
                " gcd_approval, gcd_sycophancy, generality, rl_shapes, sft_shapes, a folder with a"
                " study.py, or the path of a Python file"
            ),
        ),
        (
            ["run", "gcd_sycophany"],
            "no study is called 'gcd_sycophany': did you mean gcd_sycophancy, gcd_approval?",
        ),
        (["run", "nowhere/mine.py"], "there is no file nowhere/mine.py"),
        (["run", "sft_shapes"], "holds sizes and no data, so it can only be planned"),
        (
            ["run", "gcd_sycophancy", "--preset", "dmo"],
            "gcd_sycophancy has no preset 'dmo': did you mean demo? there is demo, full, paper",
        ),
        (
            ["run", "gcd_sycophancy", "--out", "OUT", "--arms", "neutral", "ip_behav"],
            "no arm or prompt is called 'ip_behav': did you mean ip_behave",
        ),
        (
            ["run", "gcd_sycophancy", "--out", "OUT", "--arms", "gcd/behve"],
            "no arm or prompt is called 'gcd/behve': did you mean gcd/behave",
        ),
        (["run", "gcd_sycophancy", "--out", "OUT", "--arms", "mine="], "must read name=text"),
        (
            ["run", "gcd_sycophancy", "--out", "OUT", "--arms", "neutral", "neutral"],
            "the arm 'neutral' is listed twice",
        ),
        (
            ["run", "gcd_sycophancy", "--out", "OUT", "--model.name", "smollm2-135m"],
            "There is no model 'smollm2-135m': .* embedded model (nearest: smollm2-135m-instruct",
        ),
        (
            ["run", "gcd_sycophancy", "--out", "OUT", "--model.name", "nowhere/model.gguf"],
            "There is no model folder or .gguf file at nowhere/model.gguf",
        ),
        (["figure", "nowhere"], "nowhere is no results folder: it has no config.json"),
        (["figure", "[/nowhere]"], "[/nowhere] is no results folder"),
        (["chat", "nowhere", "--arm", "neutral"], "nowhere is no results folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_with_the_nearest_names(capsys, tmp_path, arguments, message):
    said = failure(
        capsys,
        *[str(tmp_path / "out") if argument == "OUT" else argument for argument in arguments],
    )
    begin, dots, end = message.partition(".*")
    assert said.startswith("ip-jax: ") and begin in said and end in said and "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, nearest",
    [
        (["--sft.learning-rte", "1e-4"], "--sft.learning-rate"),
        (["--model.nme", "x"], "--model.name"),
        (["--sees", "1"], "--seeds"),
        (["--pre", "demo"], "--preset"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest(capsys, arguments, nearest):
    said = failure(capsys, "run", "gcd_sycophancy", *arguments)
    assert arguments[0] in said and nearest in said


def test_a_value_of_the_wrong_kind_is_refused(capsys):
    said = failure(capsys, "run", "gcd_sycophancy", "--sft.steps", "many")
    assert "--sft.steps" in said and "many" in said
    said = failure(capsys, "run", "gcd_sycophancy", "--sft.schedule.kind", "cosin")
    assert "cosin" in said and "cosine" in said


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "mine.py holds no STUDY: a Python file of a study sets STUDY = Study(...)"),
        ("STUDY = 3", "the STUDY of"),
        (
            "from ip_jax.study import Arm, Study\n"
            "STUDY = Study(name='a', title='a', arms=(Arm('b', 'b'), Arm('b', 'c')))",
            "the study a has two arms called 'b'",
        ),
        (
            "from ip_jax.study import Prompt, Study\n"
            "P = Prompt('p', 'inoculation', 'Shout.', 'own')\n"
            "STUDY = Study(name='a', title='a', arms=(), prompts=(P, P))",
            "two prompts have one name",
        ),
        (
            "from ip_jax.study import Study\nSTUDY = Study(name='a', title='a', arms=())",
            "the study a has no presets",
        ),
    ],
    ids=["no study", "no Study", "equal arms", "equal prompts", "no presets"],
)
def test_a_file_that_holds_no_study(capsys, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    assert message in failure(capsys, "run", str(tmp_path / "mine.py"))


def test_a_folder_without_a_study_is_one_sentence(capsys, tmp_path):
    assert "holds no study.py" in failure(capsys, "run", str(tmp_path))


def test_fields_replace_those_of_the_preset():
    demo = DEMO
    changed = studies.override(
        demo,
        "--sft.learning-rate 1e-3 --arms neutral gcd/note --sft.drop-long"
        " --evaluation.neutral-steps 5 10 --model.name m".split(),
        "test",
    )
    assert (changed.sft.learning_rate, changed.arms, changed.sft.drop_long) == (
        1e-3,
        ("neutral", "gcd/note"),
        True,
    )
    assert (changed.evaluation.neutral_steps, changed.model.name) == ((5, 10), "m")
    assert (changed.sft.lora, changed.data, changed.evaluation.full_steps) == (
        demo.sft.lora,
        demo.data,
        demo.evaluation.full_steps,
    )
    assert studies.override(demo, [], "test") == demo


def test_a_changed_config_has_a_folder_of_its_own_and_a_longer_list_of_arms_has_not(monkeypatch):
    monkeypatch.setattr(build, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(
        build,
        "_load",
        lambda study, spec, model: generated(spec),
    )

    def folder(*fields):
        preset = studies.override(DEMO, list(fields), "test")
        return lab.folder_name(STUDY, lab.experiment_of(STUDY, preset))

    assert folder().startswith("demo-")
    assert (
        folder()
        == folder("--arms", "neutral")
        == folder("--seeds", "0", "1")
        == folder("--judge", "published")
        == folder("--controls", "standard")
    )
    changed = [
        folder("--sft.learning-rate", "1e-3"),
        folder("--data.rows", "100"),
        folder("--model.name", "m"),
        folder("--evaluation.temperature", "0.5"),
        folder("--data.seed", "1"),
    ]
    assert len({folder(), *changed}) == 6


def generated(spec):
    """The study's data without a tokenizer."""
    return data.load(spec, lambda messages: 10, None)


def test_help_teaches_by_example(capsys):
    cli.main([])
    usage = capsys.readouterr().out
    assert "ip-jax run gcd_sycophancy --sft.learning-rate 1e-4" in usage
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "gcd_sycophancy", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--sft.learning-rate" in said and "--evaluation.max-new-tokens" in said


def test_figure_needs_no_model(capsys, config, tmp_path):
    sys.path.insert(0, str(Path(__file__).parent / "report"))
    from synthetic import demo_rows, write_folder

    folder = write_folder(tmp_path / "out", demo_rows())
    record = json.loads((folder / "config.json").read_text()) | {"study_file": config}
    (folder / "config.json").write_text(json.dumps(record))
    cli.main(["figure", str(folder)])
    drawn = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert (
        drawn["figure.png"] > 10_000 and drawn["figure.svg"] > 10_000 and drawn["table.csv"] > 100
    )
    assert "random string" in capsys.readouterr().out
    assert "nowhere" in failure(capsys, "run", config, "--out", str(tmp_path / "other")), (
        "while training asks for it"
    )


def test_a_figure_follows_the_judge_that_is_asked_for(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        drawing, "write_report", lambda study, folder, console, judge: drawn.append(judge)
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"experiment": "gcd_sycophancy", "config": {}})
    )
    for chosen in ([], ["--judge", "published"]):
        cli.main(["figure", str(tmp_path), *chosen])
    assert drawn == [None, "published"]


def test_studies_without_a_choice_of_judges_are_drawn_and_refuse_one(capsys, tmp_path):
    sys.path.insert(0, str(Path(__file__).parent / "report"))
    import rl_synthetic

    folder = rl_synthetic.write_folder(
        tmp_path / "out",
        {name: rl_synthetic.KINDS[name] for name in ("base", "standard", "oracle")},
        1,
    )
    for experiment in ("generality", "gcd_approval"):
        record = json.loads((folder / "config.json").read_text()) | {"experiment": experiment}
        (folder / "config.json").write_text(json.dumps(record))
        cli.main(["figure", str(folder)])
        assert (folder / "report.md").exists() and "Hacked runs" in capsys.readouterr().out
        said = failure(capsys, "figure", str(folder), "--judge", "published")
        assert f"{experiment} is drawn from counts of one judge" in " ".join(said.split())


def test_a_figure_whose_study_is_gone_is_one_sentence(capsys, tmp_path):
    gone = {"experiment": "mine", "config": {}, "study_file": str(tmp_path / "gone.py")}
    (tmp_path / "config.json").write_text(json.dumps(gone))
    said = failure(capsys, "figure", str(tmp_path))
    assert "holds the study 'mine'" in said and "gone.py is gone" in said and "\n" not in said


@pytest.mark.parametrize(
    "given, project", [([], None), (["--wandb"], "ip_jax"), (["--wandb", "mine"], "mine")], ids=str
)
def test_what_to_watch_reaches_the_experiment(capsys, monkeypatch, tmp_path, given, project):
    seen, found = [], importlib.util.find_spec
    # as if it were installed
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "wandb" or found(name, *rest)
    )
    watched(monkeypatch, seen)
    fields = ["--out", str(tmp_path / "out"), *given, "--seeds", "3", "--profile"]
    cli.main(["run", "gcd_sycophancy", *fields])
    assert seen == [((3,), Watch(profile=True, wandb=project))]
    assert "compiled programs: nowhere" in capsys.readouterr().out


def watched(monkeypatch, seen):
    """Nothing is loaded, run or drawn: `seen` gets the seeds and what would be watched."""
    monkeypatch.setattr(lab, "experiment_of", lambda study, preset: preset.seeds)
    monkeypatch.setattr(lab, "folder_name", lambda study, experiment: "x")
    monkeypatch.setattr(
        lab, "run", lambda study, seeds, folder, display, watch: seen.append((seeds, watch))
    )
    monkeypatch.setattr(drawing, "draw", lambda *_: None)


def test_what_to_watch_reaches_reinforcement_learning_and_the_toy_says_no(
    capsys, monkeypatch, tmp_path
):
    seen = []
    with monkeypatch.context() as patch:
        watched(patch, seen)
        cli.main(["run", "gcd_approval", "--out", str(tmp_path / "out"), "--profile"])
    assert seen == [((0,), Watch(profile=True))]
    said = failure(capsys, "run", "generality", "--out", str(tmp_path / "toy"), "--profile")
    assert "--profile and --wandb do not watch the toy" in said and not (tmp_path / "toy").exists()


def test_wandb_without_its_package_is_one_sentence(capsys, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "wandb" else found(name, *rest),
    )
    assert "--wandb needs the package wandb" in failure(
        capsys, "run", "gcd_sycophancy", "--out", str(tmp_path / "out"), "--wandb"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("chosen", [False, True], ids=["default", "environment"])
def test_compiled_programs_are_kept_where_it_says(tmp_path, chosen):
    """In a process of its own: the cache would stay switched on for the tests that follow."""
    code = (
        "import jax; from ip_jax.cli.run import _enable_compile_cache as on; print(on());"
        " jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0); jax.jit(lambda x: x"
        " + 1)(1)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    } | {"IP_JAX_CACHE": str(tmp_path / "ours"), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs")} if chosen else {}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    place = tmp_path / "theirs" if chosen else tmp_path / "ours" / "compiled"
    assert done.stdout.strip() == str(place) and list(place.iterdir())


def test_models_lists_families_and_names(capsys):
    cli.main(["models"])
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said and "smollm2-135m-instruct" in said


def test_the_installed_command_says_one_sentence(tmp_path):
    command = [
        str(Path(sys.executable).with_name("ip-jax")),
        "run",
        "gcd_sycophancy",
        "--arms",
        "neutrl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(
        "ip-jax: no arm or prompt is called 'neutrl': did you mean neutral"
    )
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not a record of this program"),
        ("[]", "is not a record of this program"),
        ('{"architectures": ["LlamaForCausalLM"]}', "names no experiment"),
        ('{"experiment": "nothing"}', "names no experiment"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [["figure"], ["chat", "--arm", "untrained"], ["export", "--arm", "untrained", "--to", "x"]],
    ids=lambda command: command[0],
)
def test_a_folder_that_holds_no_results_is_refused(capsys, tmp_path, command, text, message):
    (tmp_path / "config.json").write_text(text)
    said = failure(capsys, command[0], str(tmp_path), *command[1:])
    assert said.startswith("ip-jax: ") and message in said and "\n" not in said


def test_a_figure_of_an_unknown_experiment_is_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"experiment": "estimator", "config": {}}')
    assert (
        "holds the study 'estimator', which is not known here: did you mean estimators"
        in failure(capsys, "figure", str(tmp_path))
    )


def test_the_toy_has_nothing_to_talk_to(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"experiment": "estimators", "config": {"rl": {}}}')
    for command in (["chat"], ["export", "--to", "x"]):
        assert "holds runs of the toy, which is no language model" in failure(
            capsys, command[0], str(tmp_path), "--arm", "untrained", *command[1:]
        )


@pytest.mark.parametrize(
    "fields, message",
    [
        (["--judge", "foo"], "'foo' is no judge of the study gcd_sycophancy: choose from strict"),
        (["--data.eval-sets", "tasks"], "data.eval_sets is ('tasks',): choose at least one of"),
        (["--data.eval-sets"], "data.eval_sets is (): choose at least one of"),
        (["--seeds", "0", "0"], "seeds is (0, 0): it must name at least one, and none twice"),
        (["--seeds", "-1"], "seeds is (-1,): each must be at least 0"),
        (["--seeds"], "seeds is (): it must name"),
        (["--controls", "foo"], "there is no control 'foo': choose from random_string, lorem"),
        (["--sft.checkpoint-every", "0"], "sft.checkpoint_every is 0: it must be at least 1"),
        (["--sft.steps", "0"], "sft.steps is 0"),
        (["--sft.batch-size", "0"], "sft.batch_size is 0"),
        (
            ["--sft.learning-rate", "nan"],
            "sft.learning_rate is nan: it must be a number of at least 0",
        ),
        (["--sft.train-on", "first"], "sft.train_on is 'first': choose from last, all"),
        (["--evaluation.temperature", "-1"], "the first must be at least 0"),
        (["--evaluation.top-p", "0"], "the second above 0 and at most 1"),
        (["--evaluation.max-new-tokens", "0"], "evaluation.max_new_tokens is 0"),
        (["--data.training-file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_without_meaning_is_refused(capsys, tmp_path, fields, message):
    said = failure(capsys, "run", "gcd_sycophancy", "--out", str(tmp_path / "out"), *fields)
    assert (
        message in " ".join(said.split())
        and "Traceback" not in said
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        (["--seeds", "0", "0"], "seeds is (0, 0)"),
        (["--seeds", "-1"], "seeds is (-1,)"),
        (["--arms", "standart"], "gcd_approval has no arm 'standart': did you mean standard"),
        (["--algorithm", "grop"], "gcd_approval has no algorithm 'grop': did you mean grpo"),
    ],
)
def test_runs_of_reinforcement_learning_are_checked_alike(capsys, tmp_path, fields, message):
    assert (
        message in failure(capsys, "run", "gcd_approval", "--out", str(tmp_path / "out"), *fields)
        and not (tmp_path / "out").exists()
    )


def test_published_and_generated_data_have_folders_of_their_own(data_dir, monkeypatch):
    monkeypatch.setattr(build, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(gcd, "render_conversation", lambda *_: Rendered(np.zeros(9), None))
    folders = []
    for place in ("", str(data_dir)):
        monkeypatch.setenv("IP_JAX_DATA_DIR", place)
        folders.append(lab.folder_name(STUDY, lab.experiment_of(STUDY, DEMO)))
    assert folders[0] != folders[1]
