"""Sweeps whose settings Optuna chooses: they continue, share their trials, prune, and end as other sweeps do."""

import logging
import re
import signal
import subprocess
import sys

import pytest
from filelock import FileLock
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from common import sweeps
from common.errors import Pruned, UserError
from common.files import CONFIGS, ROOT, write_json
from common.runs import run_folder, stored_config
from common.sweeps import current_sweep, utility_floor
from evaluation.report import report_sweep, runs_of_sweep
from evaluation.run_records import grouped
from tests.helpers import run_stage, wait_for
from tests.test_report import result

optuna = pytest.importorskip("optuna")

from hydra_plugins.optuna_sweeper import checked_distribution  # noqa: E402

SEARCH = ["method.lambda_unlearning=interval(0.5,8)", "method.num_samples=range(2,11,4)"]


@pytest.fixture
def search(monkeypatch, tmp_path):
    """A function that runs a sweep of Optuna in this process, with a function in the stage's place; returns its study."""
    monkeypatch.setattr(sweeps, "_current", None)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(objective, *words: str, n_trials: int = 6):
        chosen = [
            "hydra.mode=MULTIRUN",
            "hydra/sweeper=optuna",
            f"hydra.sweeper.n_trials={n_trials}",
            f"models_dir={tmp_path}",
            # Configuring logging closes absl's handler, and with it the stream that pytest captures.
            "hydra.job_logging.root=null",
            "hydra.hydra_logging.root=null",
        ]
        with initialize_config_dir(str(CONFIGS), version_base=None):
            hydra = GlobalHydra.instance().hydra
            hydra.multirun("PMC-unlearn-tiny", objective, [*chosen, *(words or SEARCH)])
        return study()

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def study():
    storage = f"sqlite:///{current_sweep().folder / 'study.db'}"
    return optuna.load_study(study_name="PMC-unlearn-tiny", storage=storage)


def settings(found) -> list[dict]:
    return [trial.params for trial in found.trials]


def states(found) -> list[str]:
    return [trial.state.name for trial in found.trials]


def scores_of(cfg: DictConfig) -> list[float]:
    """More unlearning costs utility; further samples raise neither beyond 6."""
    weight, samples = cfg.method.lambda_unlearning, cfg.method.num_samples
    return [95.0 - 5 * weight + min(samples, 6), 60.0 + 4 * weight + min(samples, 6)]


def stage(cfg: DictConfig) -> list[float]:
    """Writes the result that the stage would."""
    quality, utility = scores_of(cfg)
    folder = run_folder("unlearned", cfg)
    folder.mkdir(parents=True, exist_ok=True)
    found = result(folder.name, stored_config(cfg), unlearn_quality=quality, utility=utility)
    write_json(folder / "result.json", found)
    return [quality, utility]


@pytest.mark.slow
def test_the_pareto_front_is_that_of_the_report(search, capsys):
    found = search(stage, n_trials=7)
    groups = [group for group in grouped(runs_of_sweep(current_sweep())) if not group.reference]
    front = {tuple(group.varied.values()) for group in groups if group.on_front}
    assert front == {tuple(trial.params[key] for key in trial.params) for trial in found.best_trials}
    assert 1 < len(front) < len(groups) == 7
    report_sweep(current_sweep())
    assert "7 of 7 runs are finished." in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_command_continues_with_the_settings_of_an_uninterrupted_one(search):
    whole = settings(search(scores_of, n_trials=4))

    def stops(cfg):
        calls.append(cfg)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scores_of(cfg)

    calls = []
    current_sweep().folder.joinpath("study.db").unlink()
    with pytest.raises(KeyboardInterrupt):
        search(stops, n_trials=4)
    assert states(study()) == ["COMPLETE"] * 2 + ["RUNNING"]
    found = search(stops, n_trials=4)
    assert settings(found) == whole and set(states(found)) == {"COMPLETE"} and len(calls) == 5
    assert len(current_sweep().runs) == 4
    search(stops, n_trials=4)
    assert len(calls) == 5
    assert len(search(stops, n_trials=5).trials) == 5 and len(calls) == 6


@pytest.mark.slow
def test_a_trial_that_another_worker_runs_is_left_to_it(search):
    def stops(cfg):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(stops)
    with FileLock(current_sweep().folder / "trial-0.lock"):
        assert states(search(scores_of, n_trials=3)) == ["RUNNING", "COMPLETE", "COMPLETE"]
    assert states(search(scores_of, n_trials=3)) == ["COMPLETE"] * 3


@pytest.mark.slow
def test_a_failed_trial_does_not_stop_the_others_and_is_replaced_by_the_next_command(search):
    def fails(cfg):
        calls.append(cfg)
        if len(calls) == 2:
            raise UserError("no luck")
        return [float("nan"), 90.0] if len(calls) == 3 else scores_of(cfg)

    calls = []
    with pytest.raises(UserError, match="no luck"):
        search(fails, n_trials=4)
    assert states(study()) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert study().trials[1].user_attrs == {"error": "UserError: no luck"}
    assert states(search(fails, n_trials=4)) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


@pytest.mark.slow
def test_a_run_below_the_floor_is_pruned_and_the_report_says_when(search, capsys):
    def prunes(cfg):
        assert utility_floor() == 90
        if cfg.method.num_samples == 2:
            raise Pruned(3, 71.25, utility_floor())
        return scores_of(cfg)

    choices = ["method.num_samples=2,4", "hydra.sweeper.min_utility=90"]
    found = search(prunes, *choices, n_trials=5)
    assert {value for trial in found.trials for value in trial.params.values()} == {"2", "4"}
    for trial in found.trials:
        pruned = next(iter(trial.params.values())) == "2"
        assert trial.state.name == ("PRUNED" if pruned else "COMPLETE")
        assert trial.user_attrs == ({"pruned_in_epoch": 3, "utility": 71.25} if pruned else {})
    report_sweep(current_sweep())
    out = capsys.readouterr().out
    assert re.search(
        r"- seed-0\+method.num_samples-2: pruned: utility 71.2 after epoch 3 is below .*min_utility=90\n", out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.num_samples=2"], "no setting to search"),
        (["seed=0,1"], "seed: Optuna would keep the seed"),
        ([*SEARCH, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: expected a positive"),
        ([*SEARCH, "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0: expected a positive"),
        ([*SEARCH, "hydra.sweeper.seed=-1"], "hydra.sweeper.seed=-1: expected an integer, 0 or more"),
        ([*SEARCH, "+hydra.sweeper.params=5"], "hydra.sweeper.params=5: expected settings"),
        (["method.num_samples=shuffle(2,3)"], r"shuffle\(2,3\): the order of the values has no meaning"),
        (["method.num_samples=tag(log,range(1,9))"], "the only tag is log, and only of an interval"),
        (["method.num_samples=tag(Log,interval(1,9))"], "the only tag is log, and only of an interval"),
        (["method.num_samples=range(1,10,0)"], r"range\(1,10,0\): .*must not be zero"),
        (["method.lambda_unlearning=interval(1,inf)"], r"interval\(1,inf\): expected finite bounds"),
        (["method.num_samples=range(9,2)"], r"range\(9,2\): the range is empty"),
        (["method.lambda_unlearning=interval(8,0.5)"], r"lambda_unlearning=interval\(8,0.5\): .*low <= high"),
        (["method.lambda_unlearning=tag(log,interval(0,8))"], r"lambda_unlearning=.*low > 0"),
        ([*SEARCH, "hydra.sweeper.min_utility=900"], "min_utility=900: expected a utility in percent"),
        ([*SEARCH, "hydra.sweeper.min_utility=90", "evaluation.every_epochs=0"], "every_epochs below the number"),
        ([*SEARCH, "hydra.sweeper.min_utility=90", "evaluation.every_epochs=25"], r"now 25 of 25"),
    ],
)
def test_what_cannot_be_searched_is_refused(search, words, message):
    with pytest.raises(UserError, match=message):
        search(scores_of, *words)
    assert not list(current_sweep().folder.glob("*"))


@pytest.mark.slow
def test_trials_of_another_configuration_are_not_continued(search):
    search(scores_of, n_trials=1)
    found = study().user_attrs["config"]
    found["training"]["learning_rate"] = 0.5
    study().set_user_attr("config", found)
    with pytest.raises(UserError, match=r"study.db: its trials .*training.learning_rate: 0.5 -> 0.001"):
        search(scores_of, n_trials=2)


@pytest.mark.slow
def test_trials_pruned_at_another_floor_are_not_continued(search):
    search(scores_of, *SEARCH, "hydra.sweeper.min_utility=90", n_trials=1)
    with pytest.raises(UserError, match=r"study.db: its trials .*hydra.sweeper.min_utility: 90 -> 20"):
        search(scores_of, *SEARCH, "hydra.sweeper.min_utility=20", n_trials=2)


@pytest.mark.slow
def test_no_trials_are_started_after_three_that_failed(search):
    def fails(cfg):
        raise UserError("a wrong setting")

    with pytest.raises(UserError, match="a wrong setting"):
        search(fails, n_trials=9)
    assert states(study()) == ["FAIL"] * 3


@pytest.mark.slow
def test_a_setting_of_the_yaml_need_not_be_in_the_recipe(search):
    found = search(scores_of, "+hydra.sweeper.params={training.max_grad_norm:'0.5,1'}", n_trials=1)
    assert states(found) == ["COMPLETE"]


@pytest.mark.slow
def test_settings_to_search_may_be_in_yaml(search):
    first = search(scores_of, "+hydra.sweeper.params={method.num_samples:'4,6'}", n_trials=2)
    folder = current_sweep().folder
    assert all(value in ("4", "6") for trial in first.trials for value in trial.params.values())
    other = search(scores_of, "+hydra.sweeper.params={method.num_samples:'7,8'}", n_trials=2)
    assert current_sweep().folder != folder and len(other.trials) == 2


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("interval(0.5,8)", "FloatDistribution(high=8.0, log=False, low=0.5, step=None)"),
        ("tag(log,interval(1e-5,1e-3))", "FloatDistribution(high=0.001, log=True, low=1e-05, step=None)"),
        ("int(interval(2,8))", "IntDistribution(high=8, log=False, low=2, step=1)"),
        ("range(2,11,4)", "IntDistribution(high=10, log=False, low=2, step=4)"),
        ("range(0,1.2,0.3)", "FloatDistribution(high=0.9, log=False, low=0.0, step=0.3)"),  # 0.3 + 0.3 + 0.3 is no 0.9
        ("range(1.6,0.2,-0.3)", "FloatDistribution(high=1.6, log=False, low=0.4, step=0.3)"),
        ("range(10,2,-4)", "IntDistribution(high=10, log=False, low=6, step=4)"),
        ("range(0.5,2,0.5)", "FloatDistribution(high=1.5, log=False, low=0.5, step=0.5)"),
        ("npo,simnpo", "CategoricalDistribution(choices=('npo', 'simnpo'))"),
        ("choice(ab,1,true)", "CategoricalDistribution(choices=('ab', '1', 'True'))"),
    ],
)
def test_hydra_s_syntax_is_that_of_the_search(typed, expected):
    (item,) = OverridesParser.create().parse_overrides([f"key={typed}"])
    assert str(checked_distribution(item)) == expected


@pytest.mark.slow
def test_two_commands_share_the_trials_and_one_of_them_may_be_killed(models_dir):
    words = [
        "-m",
        "-cn=PMC-unlearn-tiny",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        f"models_dir={models_dir}",
    ]
    words += ["training.num_epochs=2", "method.num_samples=2", "save_model=false", "evaluation.start=false"]
    words += ["training.learning_rate=tag(log,interval(1e-4,1e-1))", "hydra.sweeper.min_utility=75"]
    command = [sys.executable, str(ROOT / "unlearning" / "main.py"), *words]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(killed, "epoch 1 ")
    killed.send_signal(signal.SIGSTOP)  # it holds its trial
    both = run_stage("unlearning", *words)
    assert "3 of 4 runs are finished." in both.stdout or "pruned" in both.stdout
    assert both.stdout.count("job ") == 3 and "job 1 of 4" not in both.stdout
    killed.kill()
    killed.communicate()
    last = run_stage("unlearning", *words)
    assert last.stdout.count("job ") == 1 and "job 1 of 4" in last.stdout
    finished = int(re.search(r"(\d) of 4 runs are finished", last.stdout)[1])
    pruned = re.findall(r"- seed-0.*: pruned: utility [\d.]+ after epoch \d is below", last.stdout)
    assert finished + len(pruned) == 4 and pruned
    folders = list((models_dir / "unlearned/PMC-unlearn-tiny").glob("*learning_rate*"))
    assert not [path for folder in folders for path in folder.rglob("checkpoint-*")]
