"""The command line: one sentence and the nearest names for every mistake, fields of a config,
redrawing without a model.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.gcd_sycophancy import PRESETS
from ip_jax import cli
from ip_jax.lab.observer import Watch

CONFIG = """
from configs.gcd_sycophancy import PRESETS as published
import dataclasses

{experiment}
MODEL = dataclasses.replace(published["demo"].model, name={model!r})
PRESETS = {{"demo": dataclasses.replace(published["demo"], model=MODEL)}}
"""


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch):
    """It would stay switched on for the tests that follow."""
    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: "nowhere")


@pytest.fixture
def config(tmp_path) -> str:
    """A config of the user's own whose model points nowhere."""
    path = tmp_path / "mine.py"
    path.write_text(
        CONFIG.format(experiment='EXPERIMENT = "gcd_sycophancy"', model=str(tmp_path / "nowhere"))
    )
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
                "no command is called 'rnu': did you mean run? there is run, plan, figure, chat,"
                " export, models"
            ),
        ),
        (
            ["run"],
            (
                "run needs a config: amplification, estimators, gated_recontextualization,"
                " gcd_approval, gcd_sycophancy, generality, rl_shapes, sft_shapes, or the path of a"
                " Python file"
            ),
        ),
        (
            ["run", "gcd_sycophany"],
            "no config is called 'gcd_sycophany': did you mean gcd_sycophancy, gcd_approval?",
        ),
        (["run", "nowhere/mine.py"], "there is no config file nowhere/mine.py"),
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
        ("x = 1", "has no PRESETS"),
        (
            CONFIG.format(experiment="", model="x"),
            (
                "belongs to no experiment called 'mine': there is amplification, estimators,"
                " gated_recontextualization, gcd_approval, gcd_sycophancy, generality; say"
                " EXPERIMENT = ... in it"
            ),
        ),
        (
            CONFIG.format(experiment="EXPERIMENT = 'gcd_sycophany'", model="x"),
            "did you mean gcd_sycophancy, gcd_approval?",
        ),
    ],
    ids=["no presets", "no experiment", "unknown experiment"],
)
def test_a_config_file_that_is_none(capsys, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    assert message in failure(capsys, "run", str(tmp_path / "mine.py"))


def test_fields_replace_those_of_the_preset():
    demo = PRESETS["demo"]
    changed = cli.override(
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
    assert cli.override(demo, [], "test") == demo


def test_a_changed_config_has_a_folder_of_its_own_and_a_longer_list_of_arms_has_not():
    from experiments import gcd_sycophancy

    def folder(*fields):
        return str(
            cli.default_folder(gcd_sycophancy, cli.override(PRESETS["demo"], list(fields), "test"))
        )

    assert folder().startswith("results/gcd_sycophancy/demo-")
    assert (
        folder()
        == folder("--arms", "neutral")
        == folder("--seeds", "0", "1")
        == folder("--judge", "published")
    )
    changed = [
        folder("--sft.learning-rate", "1e-3"),
        folder("--data.rows", "100"),
        folder("--model.name", "m"),
        folder("--evaluation.temperature", "0.5"),
    ]
    assert len({folder(), *changed}) == 5


def test_help_teaches_by_example(capsys):
    cli.main([])
    usage = capsys.readouterr().out
    assert "ip-jax run gcd_sycophancy --sft.learning-rate 1e-4" in usage
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "gcd_sycophancy", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--sft.learning-rate" in said and "--evaluation.max-new-tokens" in said


def test_redraw_needs_no_model(capsys, config, tmp_path):
    sys.path.insert(0, str(Path(__file__).parent / "report"))
    from synthetic import demo_rows, write_folder

    folder = write_folder(tmp_path / "out", demo_rows())
    cli.main(["run", config, "--redraw", "--out", str(folder)])
    drawn = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert (
        drawn["figure.png"] > 10_000 and drawn["figure.svg"] > 10_000 and drawn["table.csv"] > 100
    )
    assert "random string" in capsys.readouterr().out
    assert "nowhere" in failure(capsys, "run", config, "--out", str(tmp_path / "other")), (
        "while training asks for it"
    )


def test_redraw_follows_the_judge_of_the_config(monkeypatch, config, tmp_path):
    from experiments import gcd_sycophancy

    drawn = []
    monkeypatch.setattr(
        gcd_sycophancy, "write_report", lambda folder, console, judge: drawn.append(judge)
    )
    for chosen in ([], ["--judge", "published"]):
        cli.main(["run", config, "--redraw", "--out", str(tmp_path), *chosen])
    (tmp_path / "config.json").write_text(
        json.dumps({"experiment": "gcd_sycophancy", "config": {}})
    )
    for chosen in ([], ["--judge", "published"]):
        cli.main(["figure", str(tmp_path), *chosen])
    assert drawn == ["strict", "published"] * 2


def test_experiments_without_a_choice_of_judges_are_redrawn_and_refuse_one(capsys, tmp_path):
    sys.path.insert(0, str(Path(__file__).parent / "report"))
    import rl_synthetic

    folder = rl_synthetic.write_folder(
        tmp_path / "out",
        {name: rl_synthetic.KINDS[name] for name in ("base", "standard", "oracle")},
        1,
    )
    cli.main(["run", "generality", "--redraw", "--out", str(folder)])
    assert (folder / "report.md").exists() and "Hacked runs" in capsys.readouterr().out
    for experiment, says in (
        ("generality", "figures on the toy have no judge"),
        ("gcd_approval", "gcd_approval is drawn from counts of one judge"),
    ):
        record = json.loads((folder / "config.json").read_text()) | {"experiment": experiment}
        (folder / "config.json").write_text(json.dumps(record))
        said = failure(capsys, "figure", str(folder), "--judge", "published")
        assert f"{says}: --judge is for gcd_sycophancy" in " ".join(said.split())


def test_redraw_of_nothing_is_one_sentence(capsys, config, tmp_path):
    said = failure(capsys, "run", config, "--redraw", "--out", str(tmp_path / "none"))
    assert "config.json is missing" in said and "\n" not in said


@pytest.mark.parametrize(
    "given, project", [([], None), (["--wandb"], "ip_jax"), (["--wandb", "mine"], "mine")], ids=str
)
def test_what_to_watch_reaches_the_experiment(capsys, monkeypatch, tmp_path, given, project):
    from experiments import gcd_sycophancy

    seen, found = [], importlib.util.find_spec
    # as if it were installed
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "wandb" or found(name, *rest)
    )
    monkeypatch.setattr(
        gcd_sycophancy,
        "run",
        lambda config, folder, console, watch: seen.append((config.seeds, watch)),
    )
    cli.main(
        [
            "run",
            "gcd_sycophancy",
            "--out",
            str(tmp_path / "out"),
            *given,
            "--seeds",
            "3",
            "--profile",
        ]
    )
    assert seen == [((3,), Watch(profile=True, wandb=project))]
    assert "compiled programs: nowhere" in capsys.readouterr().out


def test_what_to_watch_reaches_reinforcement_learning_and_the_toy_says_no(
    capsys, monkeypatch, tmp_path
):
    from experiments import gcd_approval

    seen = []
    monkeypatch.setattr(gcd_approval, "experiment", lambda config: config.preset)
    monkeypatch.setattr(
        gcd_approval,
        "run_reinforced",
        lambda experiment, folder, display, watch: seen.append((experiment, watch)),
    )
    monkeypatch.setattr(gcd_approval, "draw", lambda folder, console: None)
    cli.main(["run", "gcd_approval", "--out", str(tmp_path / "out"), "--profile"])
    assert [watch for _, watch in seen] == [Watch(profile=True)]
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
        "import jax; from ip_jax.cli import _enable_compile_cache as on; print(on());"
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
        "holds the experiment 'estimator', whose figure is not known here: did you mean estimators"
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
        (["--judge", "foo"], "judge is 'foo': choose from strict, published"),
        (["--eval-sets", "task"], "the figure shows the set generated, so it has to be among them"),
        (["--seeds", "0", "0"], "seeds is (0, 0): it must name at least one, and none twice"),
        (["--seeds", "-1"], "seeds is (-1,): each must be at least 0"),
        (["--seeds"], "seeds is (): it must name"),
        (["--arms"], "arms is (): it must name"),
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
        (["--evaluation.max-new-tokens-solving", "0"], "evaluation.max_new_tokens_solving is 0"),
        (
            ["--data.training-file", "mine.jsonl", "--arms", "neutral", "clean"],
            "the arm clean trains on the setting's rows of the kind mixed",
        ),
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
        (["--arms"], "arms is ()"),
    ],
)
def test_runs_of_reinforcement_learning_are_checked_alike(capsys, tmp_path, fields, message):
    assert (
        message in failure(capsys, "run", "gcd_approval", "--out", str(tmp_path / "out"), *fields)
        and not (tmp_path / "out").exists()
    )


def test_published_and_generated_data_have_folders_of_their_own(monkeypatch, tmp_path):
    folders = []
    for place in ("", str(tmp_path)):
        (tmp_path / "gcd_sycophancy").mkdir(exist_ok=True)
        monkeypatch.setenv("IP_JAX_DATA_DIR", place)
        folders.append(
            cli.default_folder(
                importlib.import_module("experiments.gcd_sycophancy"), PRESETS["demo"]
            )
        )
    assert folders[0] != folders[1]
