"""The comparison of methods: its table, and that a failed run leaves the others alone."""

import csv
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from common.config import read_section
from common.errors import UserError
from common.files import CONFIGS, ROOT, read_json_lines
from evaluation.tables import cell
from scripts.compare_methods import Commands, ComparisonSettings, compare, message_of, run_all
from tests.helpers import TOKEN, run_imported

RESULT = {
    "scores": {},
    "config": {
        "model": {"prompt": {}},
        "data": {"path": "d", "splits": {"forget": "forget"}},
        "evaluation": {"full_eval": False},
    },
}


def test_a_missing_value_of_one_seed_leaves_the_others():
    assert cell("utility", [1.0, None, 3.0], 1) == "2.0 ± 1.4"
    assert cell("utility", [1.0, None], 1) == "1.0"
    assert cell("utility", [12345678.0, float("inf"), float("nan")], 1) == "1.2e+07"


def written(folder, seeds, methods):
    """A comparison's recipe in a folder of the user's own."""
    (folder / "small.yaml").write_text(
        "defaults:\n  - run\n  - _self_\ncomparison:\n  metrics: [headline]\n  before: []\n"
        f"  seeds: {seeds}\n  methods: {methods}\n"
    )
    return folder


def run(recipe, *overrides):
    script = ROOT / "scripts" / "compare_methods.py"
    return run_imported(script, [str(script), f"-cd={recipe}", "-cn=small", *overrides], recipe)[0]


def test_a_method_that_fails_leaves_a_gap_and_an_error(tmp_path, models_dir):
    quick = ["training.num_epochs=1", "evaluation.start=false"]
    methods = "{Good: -cn=unlearn-tiny method=wga, Bad: -cn=unlearn-tiny method=wga method.beta=-1}"
    recipe = written(tmp_path, [0], methods)
    done = run(recipe, f"models_dir={models_dir}", *quick)
    assert done.returncode != 0
    assert "method.beta=-1" in done.stdout, "the reason of the failure"
    command, message = done.stderr.split("these commands failed; the table has the other runs:\n")[1].splitlines()[:2]
    assert command.startswith("python unlearning/main.py -cd=configs -cn=unlearn-tiny method=wga method.beta=-1")
    assert message.startswith("  method.beta=-1: expected float")
    assert "Traceback" not in done.stderr
    folder = models_dir / "comparisons/small"
    lines = (folder / "comparison.md").read_text().splitlines()
    (good,) = [line for line in lines if line.startswith("| Good")]
    assert "-" not in good.split("|")[2]
    assert not [line for line in lines if line.startswith("| Bad")]
    assert "method.beta=-1" in "\n".join(lines).partition("Failed, and not in the table:")[2]
    assert [row["name"] for row in csv.DictReader((folder / "results.csv").open())] == ["Good"]
    assert len(read_json_lines(folder / "Good/seed-0/history.jsonl")) == 1
    assert (folder / "comparison.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_comparison_without_a_successful_run_names_every_failure(tmp_path, models_dir):
    done = run(written(tmp_path, [0], "{Bad: -cn=unlearn-tiny method=wga method.beta=-1}"), f"models_dir={models_dir}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "No run succeeded." in done.stdout and "method.beta=-1: expected float" in done.stderr


VALID = {"seeds": [0], "before": [], "methods": {"A": "-cn=unlearn-tiny"}, "metrics": ["headline"]}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seeds", ["x"], "comparison.seeds.0=x: expected int, at least 0"),
        ("seeds", [-1], "comparison.seeds.0=-1: expected int"),
        ("seeds", [1, 1], "comparison.seeds=[1, 1]: expected each seed once"),
        ("before", 5, "comparison.before=5: expected list[str]"),
        ("before", ["training -cn=tiny"], "comparison.before=['training -cn=tiny']: 'training' is no stage"),
        ("before", [""], "comparison.before=['']: '' is no stage"),
        ("before", ["finetuning -cn='tiny"], 'comparison.before=["finetuning -cn=\'tiny"]: No closing quotation'),
        (
            "before",
            ["finetuning -cn=tinny"],
            "comparison.before=['finetuning -cn=tinny']: finetuning: no recipe 'tinny'",
        ),
        (
            "methods",
            {"A": "-cn=unlearn-tinny"},
            "comparison.methods={'A': '-cn=unlearn-tinny'}: A: no recipe 'unlearn-ti",
        ),
        (
            "metrics",
            ["headlines"],
            "comparison.metrics=['headlines']: metrics=headlines: no such metrics; did you mean",
        ),
        ("methods", {"A": "x", "B": f"training.hub_token={TOKEN}"}, "training.hub_token: a secret on the command line"),
    ],
)
def test_what_no_stage_could_run_is_named_before_the_first_one(key, value, message):
    with pytest.raises(UserError) as caught:
        read_section("comparison", ComparisonSettings, OmegaConf.create(VALID | {key: value}))
    assert str(caught.value).startswith(message)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("name", ["tiny", "smollm2-cpu", "tofu-cpu"])
def test_the_recipes_pass(name):
    recipe = OmegaConf.load(CONFIGS / f"compare/{name}.yaml")
    recipe.models_dir = "models"
    assert read_section("comparison", ComparisonSettings, recipe.comparison).methods


def test_references_are_evaluated_as_the_methods_are(monkeypatch):
    commands = []
    monkeypatch.setattr(Commands, "run", lambda self, stage, *words: commands.append((stage, *words)) or True)
    monkeypatch.setattr("scripts.compare_methods.result_of", lambda folder: RESULT)
    more = {"evaluation": "retain_model.path=m/seed-{seed}", "references": {"vanilla": "v/seed-{seed}"}}
    settings = ComparisonSettings([3], [], {"PMC": "-cn=unlearn-tiny"}, ["headline"], **more)
    found = run_all(settings, Commands([], settings.commands()), [], [], Path("folder"))
    assert len(commands) == settings.commands() == 3
    of_reference, unlearn, of_method = commands
    assert of_reference[0] == of_method[0] == "evaluation" and of_reference[4:] == of_method[4:]
    assert 'model.path="v/seed-3"' in of_reference and "retain_model.path=m/seed-3" in of_method
    assert [(run.name, run.reference) for run in found] == [("vanilla", True), ("PMC", False)]


def test_an_evaluation_with_other_inputs_than_its_run_is_a_failure(monkeypatch):
    commands = []
    monkeypatch.setattr(Commands, "run", lambda self, stage, *words: commands.append((stage, *words)) or True)
    other = {**RESULT, "config": {**RESULT["config"], "evaluation": {"full_eval": True}}}
    monkeypatch.setattr(
        "scripts.compare_methods.result_of", lambda folder: other if folder.name == "evaluation" else RESULT
    )
    settings = ComparisonSettings([3], [], {"PMC": "-cn=unlearn-tiny"}, ["headline"])
    shared = ["generation.engine=vllm", "method.beta=1", "evaluation.full_eval=true", "evaluation.every_epochs=1"]
    comparison = Commands(shared, settings.commands())
    assert run_all(settings, comparison, [], [], Path("folder")) == []
    why = "evaluated with another value of evaluation.full_eval than its run seed-3"
    assert comparison.failed == {"evaluation of PMC, seed 3": why}
    passed_on = [word for word in commands[1] if word in shared]
    assert passed_on == [shared[0], shared[2]], "answers are generated and scored as in the run"


def test_a_recipe_that_names_the_folder_of_each_stage_keeps_them_with_other_data(monkeypatch):
    commands = []
    monkeypatch.setattr(Commands, "run", lambda self, stage, *words: commands.append((stage, *words)) or True)
    monkeypatch.setattr("scripts.compare_methods.result_of", lambda folder: RESULT)
    before = ["finetuning -cn=tiny output_dir=m/{seed}/a", "finetuning -cn=tiny-retain output_dir=m/{seed}/b"]
    more = {"unlearning": "finetuned=m/{seed}/b", "references": {"finetuned": "m/{seed}/b"}}
    settings = ComparisonSettings([3], before, {"NPO": "-cn=unlearn-tiny method=npo"}, ["headline"], **more)
    assert settings.own_models() and not replace(settings, before=[*before, "finetuning -cn=tiny"]).own_models()
    run_all(settings, Commands(["data.path=d"], settings.commands()), [], ["data.path=d"], Path("folder"))
    assert [words[2:] for words in commands[:2]] == [
        ("output_dir=m/3/a", "seed=3", "data.path=d"),
        ("output_dir=m/3/b", "seed=3", "data.path=d"),
    ]
    unlearn = commands[3]
    assert unlearn[:4] == ("unlearning", "-cn=unlearn-tiny", "finetuned=m/3/b", "method=npo")
    assert "data.path=d" in unlearn and not any("before/" in word for word in unlearn)


def test_a_method_that_names_its_start_has_it_and_the_others_the_finetuned_model(monkeypatch):
    """UNDO starts from a method's result, also where other data give the comparison a finetuned model of its own."""
    commands = []
    monkeypatch.setattr(Commands, "run", lambda self, stage, *words: commands.append((stage, *words)) or True)
    monkeypatch.setattr("scripts.compare_methods.result_of", lambda folder: RESULT)
    methods = {"PMC": "-cn=unlearn-tiny", "UNDO": "-cn=unlearn-tiny method=undo finetuned=m/PMC/seed-{seed}"}
    settings = ComparisonSettings([3], ["finetuning -cn=tiny"], methods, ["headline"])
    run_all(settings, Commands([], settings.commands()), ["data.path=x"], ["data.path=x"], Path("folder"))
    pmc, undo = ([word for word in words if "finetuned" in word] for stage, *words in commands if stage == "unlearning")
    assert pmc == ['++finetuned="folder/before/seed-3"']
    assert undo == [*pmc, "finetuned=m/PMC/seed-3"], "the last one counts"
    for _, *words in commands:
        options = [word.startswith("-") for word in words]
        assert options == sorted(options, reverse=True), "Hydra takes no option behind an override"


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("tiny", "data.path=x", "data.path=x: this recipe names models of its own data (comparison.references, "),
        ("smollm2-cpu", "++finetuned=x", "++finetuned=x: this recipe names models of its own data"),
        ("tiny", "seed=3", "seed=3: has no effect on a comparison; use comparison.seeds=[3]"),
        ("tiny", "output_dir=x", "output_dir=x: has no effect on a comparison; use models_dir=FOLDER"),
    ],
)
def test_overrides_that_would_compare_something_else_are_refused(recipe, override, message, tmp_path, monkeypatch):
    cfg = OmegaConf.load(CONFIGS / f"compare/{recipe}.yaml")
    cfg.models_dir = str(tmp_path)
    job = SimpleNamespace(overrides=SimpleNamespace(task=[override]), job=SimpleNamespace(config_name=recipe))
    monkeypatch.setattr("scripts.compare_methods.HydraConfig.get", lambda: job)
    monkeypatch.setattr(Commands, "run", lambda self, *words: pytest.fail("nothing may run"))
    with pytest.raises(UserError) as caught:
        compare(cfg)
    assert str(caught.value).startswith(message)
    if "names models" in message:
        assert "add comparison.references={} comparison.evaluation=''" in str(caught.value)


def test_the_warnings_of_commands_that_succeed_are_shown(monkeypatch, caplog):
    output = "[09:00:00] start\n[09:00:01] Warning: cut\nWarning: of a text\n[09:00:02] Warning: cut\n[09:00:02] Warning: b\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, output))
    commands = Commands([], 1)
    assert commands.run("unlearning", "-cn=unlearn-tiny")
    assert commands.warnings == {"python unlearning/main.py -cd=configs -cn=unlearn-tiny": ["cut", "b"]}
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == ["cut", "b"]


@pytest.mark.parametrize(
    ("code", "output", "message"),
    [
        (1, "[12:00] start\n\nError: seed=x: expected int\n", "seed=x: expected int"),
        (1, "Traceback\nKeyError: 'x'\n", "KeyError: 'x'"),
        (1, "", "no output"),
        (-9, "[12:00] start\n", "killed by signal 9; out of memory?"),
    ],
)
def test_a_failed_command_is_reported_with_its_own_message(code, output, message):
    assert message_of(subprocess.CompletedProcess([], code, output)) == message


@pytest.mark.slow
def test_a_wrong_recipe_is_refused_with_all_that_is_wrong(tmp_path):
    done = run(written(tmp_path, [], "{NPO: method=npo}"), f"models_dir={tmp_path}")
    assert "comparison.seeds: is empty" in done.stderr
    assert "comparison.methods={'NPO': 'method=npo'}: NPO: expected arguments of a stage" in done.stderr


def test_the_log_counts_the_commands_and_estimates_the_time_left(monkeypatch, caplog):
    """Two seeds of one stage and two methods are ten commands; what a failure skips is not counted."""
    clock = [0.0]

    def finished(command, **_):
        clock[0] += 60.0
        fails = {"finetuning/main.py": "seed=0" in command, "unlearning/main.py": "method=npo" in command}
        return subprocess.CompletedProcess(command, int(fails.get(command[1], False)), "")

    monkeypatch.setattr(subprocess, "run", finished)
    monkeypatch.setattr(
        "scripts.compare_methods.result_of",
        lambda folder: {**RESULT, "seconds": {"unlearning": 1.0}, "scores": {"utility": 1.0}},
    )
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    caplog.set_level("INFO")
    methods = {"NPO": "-cn=unlearn-tiny method=npo", "PMC": "-cn=unlearn-tiny"}
    settings = ComparisonSettings([0, 1], ["finetuning -cn=tiny"], methods, ["headline"])
    (run,) = run_all(settings, Commands([], settings.commands(), started=0.0), [], [], Path("folder"))
    assert (run.name, run.folder, run.scores["minutes"]) == ("PMC", Path("folder/PMC/seed-1"), 1 / 60)
    lines = [
        record.getMessage().partition(": python")[0] for record in caplog.records if ": python" in record.getMessage()
    ]
    assert lines == [
        "command 1 of 10",
        "command 2 of 6, time left 05:00",  # the rest of seed 0 is skipped
        "command 3 of 6, time left 04:00",
        "command 4 of 5, time left 02:00",  # the evaluation of NPO is skipped
        "command 5 of 5, time left 01:00",
    ]
