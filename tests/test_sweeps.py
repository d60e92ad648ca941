"""Sweeps: the folders of the jobs, which of them have a result, and what is reported on those that have none."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from common import sweeps
from common.files import CONFIGS, write_json
from common.run_names import run_name
from common.runs import comparable_config, failure_file, has_result_of
from common.sweeps import Sweep, SweepCallback, current_sweep
from evaluation.report import report_sweep, runs_of_sweep
from evaluation.run_records import grouped
from tests.test_report import config, make_run, result


@pytest.fixture
def swept(monkeypatch):
    """A function that starts a sweep of a recipe with overrides, without running a job, and returns it."""
    monkeypatch.setattr(sweeps, "_current", None)

    def begin(recipe: str, *overrides: str) -> Sweep:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            words = ["hydra.mode=MULTIRUN", *overrides]
            master = compose(recipe, [word for word in words if "," not in word], return_hydra_config=True)
            with open_dict(master):
                master.hydra.overrides.task = list(overrides)
            begin.callback = SweepCallback()
            begin.callback.on_multirun_start(master)
        return current_sweep()

    return begin


def names(sweep: Sweep) -> list[str]:
    return [folder.name for folder in sweep.runs]


@pytest.mark.parametrize("typed", ["save_model=false", "save_model=False", "+save_model=false"])
def test_a_value_has_one_spelling_in_a_folder_name(typed):
    assert run_name(0, [typed, "training.learning_rate=1e-3"]) == run_name(
        0, ["save_model=False", "training.learning_rate=0.001"]
    )


def test_the_jobs_of_a_sweep_have_the_folders_of_single_commands(swept, tmp_path):
    sweep = swept(
        "PMC-unlearn-tiny", f"models_dir={tmp_path}", "save_model=false", "method.temperature=1e0,2", "seed=0,1"
    )
    assert names(sweep) == [
        run_name(seed, ["save_model=false", f"method.temperature={temperature}"])
        for temperature in ("1.0", "2")
        for seed in (0, 1)
    ]
    assert {folder.parent for folder in sweep.runs} == {tmp_path / "unlearned" / "PMC-unlearn-tiny"}


def test_checkpoints_that_do_not_exist_are_named_before_the_first_job(swept, tmp_path, caplog):
    (tmp_path / "finetuned/tiny/seed-0").mkdir(parents=True)
    swept("PMC-unlearn-tiny", f"models_dir={tmp_path}", "seed=0,1", "method.temperature=1,2")
    assert f"2 of 4 jobs will fail, as finetuned={tmp_path}/finetuned/tiny/seed-1 does not exist" in caplog.text


def test_the_log_counts_jobs_not_folders(swept, tmp_path):
    sweep = swept("PMC-unlearn-tiny", f"models_dir={tmp_path}", "seed=0,0,1")
    assert len(sweep.runs) == 2 and swept.callback.jobs == 3


def test_an_output_folder_may_contain_the_seed(swept, tmp_path):
    sweep = swept("PMC-unlearn-tiny", f"models_dir={tmp_path}", "output_dir=${models_dir}/s${seed}", "seed=3,4")
    assert list(sweep.runs) == [tmp_path / f"s{seed}" / f"seed-{seed}" for seed in (3, 4)]


def test_an_output_folder_may_contain_the_number_of_the_job(swept, tmp_path):
    sweep = swept("PMC-unlearn-tiny", f"models_dir={tmp_path}", "output_dir=${models_dir}/${hydra:job.num}", "seed=3,4")
    assert list(sweep.runs) == [tmp_path / str(number) / f"seed-{3 + number}" for number in (0, 1)]


def test_sweeps_over_other_seeds_or_folders_have_reports_of_their_own(swept, tmp_path):
    sweeps = [
        swept("PMC-unlearn-tiny", f"models_dir={tmp_path}", *words)
        for words in (["seed=0,1"], ["seed=0,2"], ["seed=0,1", f"output_dir={tmp_path}/x"], ["seed=range(0,2)"])
    ]
    folders = [sweep.folder for sweep in sweeps]
    assert len(set(folders)) == 4
    assert all(folder.parent == tmp_path / "sweeps" / "PMC-unlearn-tiny" for folder in folders)


@pytest.mark.parametrize("recipe", ["PMC-unlearn-tiny", "tiny", "evaluate"])
def test_a_result_counts_if_configuration_and_start_are_those_of_the_command(swept, tmp_path, recipe):
    start = tmp_path / "start"
    start.mkdir()
    write_json(start / "result.json", result("first", config(0)))
    key = "finetuned" if recipe == "PMC-unlearn-tiny" else "model.path"
    ((folder, cfg),) = swept(recipe, f"models_dir={tmp_path}", f"{key}={start}").runs.items()
    assert not has_result_of(folder, cfg)
    folder.mkdir(parents=True)
    write_json(folder / "result.json", {**result("x", {}), "config": comparable_config(cfg, "first")})
    assert has_result_of(folder, cfg)
    assert not has_result_of(folder, OmegaConf.merge(cfg, {"evaluation": {"max_length": 77}}))
    write_json(start / "result.json", result("trained again", config(0)))
    assert not has_result_of(folder, cfg)


def test_results_of_an_earlier_configuration_are_not_those_of_the_sweep(tmp_path, capsys):
    folders = [make_run(tmp_path, seed, 90.0, 97.0) for seed in range(3)]
    cfg = OmegaConf.create({"model": {"path": None}, "models_dir": str(tmp_path), "method": {}})
    never = folders[0].parent / "seed-4"
    failed = folders[0].parent / "seed-5"
    failure_file(failed).parent.mkdir()
    write_json(failure_file(failed), {"message": "out of memory"})
    sweep = Sweep(tmp_path / "report", dict.fromkeys([*folders, never, failed], cfg), folders[0].parent, {folders[0]})
    (folders[1] / "in_progress").mkdir()
    write_json(folders[1] / "in_progress" / "run.json", {"config": {}, "overwrite": False})
    status = {run.folder: run.status for run in runs_of_sweep(sweep) if not run.reference}
    assert status.pop(folders[0]) == "done"
    assert status == {
        folders[1]: "not begun: its folder has the result of an earlier configuration or model",
        folders[2]: "not begun: its folder has the result of an earlier configuration or model",
        never: "not begun",
        failed: "failed: out of memory",
    }
    report_sweep(sweep)
    out = capsys.readouterr().out
    assert "1 of 5 runs are finished." in out and "- seed-4: not begun\n" in out


def test_a_sweep_without_a_result_has_a_report(tmp_path, capsys):
    cfg = OmegaConf.create({"model": {"path": None}, "models_dir": str(tmp_path), "method": {}})
    report_sweep(Sweep(tmp_path / "report", {tmp_path / "a": cfg, tmp_path / "b": cfg}, tmp_path))
    assert "No run is finished.\n\n0 of 2 runs are finished.\n- a: not begun\n- b: not begun" in capsys.readouterr().out
    assert "| method |" not in (tmp_path / "report" / "report.md").read_text()
    assert all((tmp_path / "report" / name).is_file() for name in ("report.html", "report.tex", "results.csv"))


def test_only_the_first_process_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    report_sweep(Sweep(tmp_path / "report", {tmp_path / "a": OmegaConf.create({})}, tmp_path))
    assert capsys.readouterr().out == "" and not (tmp_path / "report").exists()


def test_each_evaluation_of_a_sweep_is_a_row(tmp_path):
    folders = []
    for temperature, seed in ((0.5, 0), (0.5, 1), (1.5, 0), (1.5, 1)):
        identity = config(seed, metrics="sampling", start="m", sampling={"temperature": temperature})
        folder = tmp_path / f"{temperature}-{seed}"
        folder.mkdir()
        scores = {"unlearn_quality": 90.0, "utility": 97.0, "sampling/leak@1": temperature + seed}
        write_json(folder / "result.json", result(folder.name, identity, **scores))
        folders.append(folder)
    cfg = OmegaConf.create({"metrics": "sampling"})
    sweep = Sweep(tmp_path / "report", dict.fromkeys(folders, cfg), tmp_path, set(folders))
    groups = grouped(runs_of_sweep(sweep))
    found = {group.varied["sampling.temperature"]: group.values("sampling/leak@1") for group in groups}
    assert found == {0.5: [0.5, 1.5], 1.5: [1.5, 2.5]} and not any(group.best or group.on_front for group in groups)


def test_a_finished_job_is_recorded_and_its_failure_forgotten(swept, tmp_path):
    sweep = swept("PMC-unlearn-tiny", f"models_dir={tmp_path}", "seed=0,1")
    with initialize_config_dir(str(CONFIGS), version_base=None):
        job = compose("PMC-unlearn-tiny", [f"models_dir={tmp_path}", "seed=1"], return_hydra_config=True)
    with open_dict(job):
        job.hydra.mode = RunMode.MULTIRUN
        job.hydra.overrides.task = [f"models_dir={tmp_path}", "seed=1"]
    folder = list(sweep.runs)[1]
    callback = SweepCallback()
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = ValueError("no luck")
    callback.on_job_end(job, failed)
    assert failure_file(folder).is_file() and not sweep.finished
    callback.on_job_end(job, JobReturn(status=JobStatus.COMPLETED))
    assert not failure_file(folder).exists() and sweep.finished == {folder} and sweep.has_result(folder)
