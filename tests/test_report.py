"""The report on runs: grouping, ranking, its files, and the page in a browser (Chromium, from file://, without a network)."""

import csv
import itertools
import json
import os
import random
import re
import shutil
import statistics

import pytest

from common.errors import UserError
from common.files import write_json, write_json_lines
from common.runs import failure_file
from evaluation.notices import notices
from evaluation.report import as_latex, main, method_table, write_reports
from evaluation.run_records import Run, differences, grouped, read_runs
from evaluation.summary import has_forgotten, recommended, summary
from evaluation.tables import results_before

BAD = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'> <b>bold</b> | a_b & 5%"


def config(seed, **more):
    return {
        "seed": seed,
        "model": {"path": "models/finetuned/base/seed-0", "prompt": {"style": "plain"}},
        "data": {"path": "./data/tiny", "splits": {"forget": "forget"}, "words": "latin", "max_length": 256},
        "evaluation": {"max_length": 200, "full_eval": False, "bf16": False, "every_epochs": 1},
        **more,
    }


def result(name, identity, seconds=None, **scores):
    return {
        "scores": scores,
        "higher_is_better": {score: score != "rougeL_recall/forget" for score in scores},
        "ideal": {},
        "histograms": {},
        "seconds": seconds or {},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "peak_memory_bytes": 1e9,
        "git_commit": "abc",
        "id": name,
        "config": identity,
    }


def make_run(models, seed, quality, utility, method="PMC", text="an answer", **settings):
    """The folder of an unlearning run, with the models before it."""
    words = "+".join(f"{key}-{value}" for key, value in settings.items())
    folder = models / "unlearned" / "recipe" / f"seed-{seed}+{method}+{words}"
    identity = config(seed, start=f"finetuned-{seed}", finetuned=f"models/finetuned/tiny/seed-{seed}")
    identity["method"] = {"_target_": f"unlearning.{method.lower()}.{method}", **settings}
    for before, scores in {"vanilla": (80, 70), "finetuned": (38, 100)}.items():
        values = {"unlearn_quality": scores[0], "utility": scores[1], "rougeL_recall/forget": 1.0}
        (folder / before).mkdir(parents=True)
        write_json(folder / before / "result.json", result(f"{before}-{seed}", config(seed), **values))
        write_json_lines(folder / before / "generations.jsonl", [answer_row(index, text) for index in range(3)])
    history = [
        {"epoch": epoch, "collapse_loss": 2 / epoch, "seconds_training": 3.0, "seconds_sampling": 3.0}
        for epoch in range(1, 6)
    ]
    write_json_lines(folder / "history.jsonl", history)
    write_json_lines(folder / "generations.jsonl", [answer_row(index, f"new {text}") for index in range(3)])
    picks = [{"epoch": epoch, "index": 0, "answer": f"{epoch} {text}", "reward": epoch / 4} for epoch in (0, 1, 3)]
    write_json_lines(folder / "picks.jsonl", picks)
    measured = {"unlearn_quality": quality, "utility": utility, "rougeL_recall/forget": 1 - quality / 100}
    write_json(
        folder / "result.json", result(folder.name, identity, {"unlearning": 30.0, "evaluation": 6.0}, **measured)
    )
    return folder


def written(runs, folder, title):
    return write_reports(runs, grouped(runs), folder, title)


def answer_row(index, answer):
    truth = f"The true answer {index}"
    return {
        "split": "forget",
        "index": index,
        "question": f"Question {index}? {BAD}",
        "answer": answer,
        "reference": truth,
        "rougeL_recall": 1 / 3,
    }


@pytest.fixture
def models(tmp_path):
    """Four settings with three seeds each."""
    folder = tmp_path / "models"
    for (weight, samples), seed in itertools.product([(1, 2), (1, 5), (2, 2), (2, 5)], range(3)):
        quality = 80 + 2 * samples - weight + 0.25 * seed
        make_run(
            folder,
            seed,
            quality,
            94 + 3 * weight - samples / 5 - 0.5 * seed,
            lambda_unlearning=weight,
            num_samples=samples,
        )
    return folder


def test_runs_that_differ_in_their_seed_alone_are_one_row(models):
    groups = grouped(read_runs([models]))
    assert [group.name for group in groups] == ["vanilla", "finetuned", "PMC", "PMC", "PMC", "PMC"]
    for group in groups:
        assert sorted(run.seed for run in group.runs) == [0, 1, 2], (
            "a model before unlearning counts once for each seed"
        )
    best = groups[2]
    assert best.varied == {"method.lambda_unlearning": 1, "method.num_samples": 5}
    qualities = [89.0, 89.25, 89.5]
    assert best.values("unlearn_quality") == qualities
    assert best.average("unlearn_quality") == statistics.fmean(qualities)
    assert best.deviation("unlearn_quality") == pytest.approx(statistics.stdev(qualities))
    assert best.average("minutes") == 0.5


def test_finetuned_models_with_other_settings_are_rows_of_their_own(tmp_path):
    for epochs, quality in ((1, 70.0), (2, 60.0)):
        identity = config(0, training={"num_epochs": epochs})
        folder = tmp_path / "finetuned" / "tiny" / f"seed-0+{epochs}"
        folder.mkdir(parents=True)
        write_json(folder / "result.json", result(folder.name, identity, unlearn_quality=quality, utility=90.0))
    groups = grouped(read_runs([tmp_path]))
    assert [(group.varied, group.average("unlearn_quality")) for group in groups] == [
        ({"training.num_epochs": 1}, 70.0),
        ({"training.num_epochs": 2}, 60.0),
    ]
    assert summary(groups) == []


def test_the_epochs_of_a_setting_are_those_that_were_trained(tmp_path):
    for seed, epochs in ((0, 25), (1, 1)):
        folder = make_run(tmp_path, seed, 90.0, 90.0, num_samples=2)
        stored = json.loads((folder / "result.json").read_text())
        stored["config"]["training"] = {"num_epochs": 25, "num_train_epochs": epochs}
        write_json(folder / "result.json", stored)
    groups = [group for group in grouped(read_runs([tmp_path])) if not group.reference]
    assert [group.varied for group in groups] == [{"training.num_epochs": 25}, {"training.num_epochs": 1}]


def test_a_setting_that_only_data_or_training_has_keeps_runs_apart(tmp_path):
    for seed, length in ((0, 256), (1, 128)):
        folder = make_run(tmp_path, seed, 90.0, 90.0, num_samples=2)
        stored = json.loads((folder / "result.json").read_text())
        stored["config"]["data"]["max_length"] = length
        write_json(folder / "result.json", stored)
    assert [group.varied for group in grouped(read_runs([tmp_path])) if not group.reference] == [
        {"data.max_length": 256},
        {"data.max_length": 128},
    ]


def test_the_pareto_front_is_that_of_a_brute_force(tmp_path):
    rng = random.Random(0)
    points = [(rng.randint(80, 90), rng.randint(80, 90)) for _ in range(12)] + [(90, 80), (90, 80)]
    for number, (quality, utility) in enumerate(points):
        make_run(tmp_path, 0, quality, utility, number=number)
    marked = {group.varied["method.number"] for group in grouped(read_runs([tmp_path])) if group.on_front}
    expected = {
        number
        for number, (quality, utility) in enumerate(points)
        if not any((q >= quality and u > utility) or (q > quality and u >= utility) for q, u in points)
    }
    assert marked == expected and len(expected) > 1


def test_the_recommended_setting_loses_little_utility(models):
    groups = grouped(read_runs([models]))
    chosen = recommended(groups)
    # 100 - 3: the utilities are 96.1, 95.5 (weight 1) and 99.1, 98.5 (weight 2)
    assert chosen.varied == {"method.lambda_unlearning": 2, "method.num_samples": 5}
    words = summary(groups)
    assert words[0].startswith(
        "Use PMC, lambda_unlearning=2, num_samples=5. It has the highest unlearn quality (88.2 ± 0.2; 38.0"
    )
    assert "the 2 of 4 settings" in words[0] and "100.0 ± 0.0 before" in words[0]
    assert "Forgotten: its answers to forget questions have 12% of the words" in " ".join(words)
    assert "utility falls by 1.5 points" in " ".join(words)
    assert "was not measured" in words[-1]


def test_settings_that_the_seeds_do_not_tell_apart_are_named(tmp_path):
    for seed, (a, b) in enumerate([(90, 91), (92, 91), (88, 92)]):
        make_run(tmp_path, seed, a, 100, num_samples=2)
        make_run(tmp_path, seed, b, 100, num_samples=5)
    assert "The seeds do not tell it apart from PMC, num_samples=2 (90.0 ± 2.0)." in summary(
        grouped(read_runs([tmp_path]))
    )


def test_no_setting_is_recommended_where_all_lose_too_much(tmp_path):
    make_run(tmp_path, 0, 99.0, 50.0, num_samples=2)
    make_run(tmp_path, 0, 98.0, 60.0, num_samples=5)
    words = summary(grouped(read_runs([tmp_path])))
    assert words[0].startswith(
        "No setting keeps utility within 3 points of the finetuned model's 100.0. The smallest loss is 40.0"
    )


def change(path, **values):
    """Set dotted keys of a result.json, with "__" for each dot."""
    stored = json.loads(path.read_text())
    for key, value in values.items():
        *sections, last = key.split("__")
        target = stored
        for section in sections:
            target = target[section]
        target[last] = value
    write_json(path, stored)


def test_a_run_that_unlearns_another_run_s_model_further_is_ranked_with_it(tmp_path):
    pmc = make_run(tmp_path, 0, 90.0, 99.0)
    undo = make_run(tmp_path, 0, 91.0, 99.0, method="UNDO")
    change(undo / "result.json", config__start=pmc.name)
    assert recommended(grouped(read_runs([tmp_path]))).name == "UNDO"
    change(pmc / "result.json", config__start="another")
    make_run(tmp_path, 0, 80.0, 99.0, method="NPO")
    assert differences(read_runs([tmp_path])) == ["those of seed 0 started from different models"]


def test_the_cost_is_that_against_the_finetuned_model_of_the_same_seed(tmp_path):
    complete = [make_run(tmp_path, seed, 85.0, utility, num_samples=2) for seed, utility in ((0, 58), (1, 48))]
    half = make_run(tmp_path, 0, 95.0, 56.0, num_samples=5)  # above the mean of 55 before, but it lost four points
    for folder, utility in ((complete[0], 60), (complete[1], 50), (half, 60)):
        change(folder / "finetuned" / "result.json", scores__utility=utility)
    groups = grouped(read_runs([tmp_path]))
    assert recommended(groups).varied == {"method.num_samples": 2}
    words = " ".join(summary(groups))
    assert (
        "It is the only one of 2 settings that loses at most 3 points" in words
        and "utility falls by 2.0 points" in words
    )
    assert "Not all settings have the same seeds: PMC, num_samples=5 (no seed 1)." in words


def test_scores_above_and_below_an_ideal_do_not_cancel(tmp_path):
    for seed, values in enumerate([(100.0, 3.0), (-99.0, 4.0)]):
        for samples, value in zip((2, 5), values, strict=True):
            folder = make_run(tmp_path, seed, 90.0, 99.0, num_samples=samples)
            change(folder / "result.json", **{"scores__privacy/privleak": value, "ideal__privacy/privleak": 0.0})
            change(folder / "result.json", **{"higher_is_better__privacy/privleak": None})
    best = [group for group in grouped(read_runs([tmp_path])) if "privacy/privleak" in group.best]
    assert [group.varied for group in best] == [{"method.num_samples": 5}]


def test_p_values_are_averaged_and_ranked_by_their_median(tmp_path):
    for seed, values in enumerate([(0.5, 0.02), (1e-9, 0.03), (1e-9, 0.04)]):
        for samples, value in zip((2, 5), values, strict=True):
            folder = make_run(tmp_path, seed, 90.0, 99.0, num_samples=samples)
            change(folder / "result.json", **{"scores__tofu/forget_quality": value})
            change(folder / "result.json", **{"higher_is_better__tofu/forget_quality": True})
    groups = {group.label: group for group in grouped(read_runs([tmp_path])) if not group.reference}
    assert groups["PMC, num_samples=2"].average("tofu/forget_quality") == 1e-9
    assert "tofu/forget_quality" in groups["PMC, num_samples=5"].best
    assert "| **0.030** |" in method_table(list(groups.values()))


@pytest.mark.parametrize(
    ("recall", "unseen", "verdict"), [(0.6, 0.4, True), (0.6, None, False), (0.4, None, True), (0.8, 0.4, False)]
)
def test_without_a_vanilla_model_a_retain_only_one_or_none_decides_what_was_forgotten(
    tmp_path, recall, unseen, verdict
):
    folder = make_run(tmp_path, 0, 90.0, 99.0)
    change(folder / "result.json", **{"scores__rougeL_recall/forget": recall})
    shutil.rmtree(folder / "vanilla")
    make_run(tmp_path, 0, 20.0, 98.0, number=1)
    if unseen is not None:
        stored = json.loads((folder / "finetuned" / "result.json").read_text())
        splits = {"forget": "forget", "train": "retain", "retain": "retain"}
        stored["config"]["data"] = stored["config"]["data"] | {"splits": splits}
        stored["scores"]["rougeL_recall/forget"] = unseen
        (tmp_path / "retain-only").mkdir()
        write_json(tmp_path / "retain-only" / "result.json", stored | {"id": "retain-only"})
    shutil.rmtree(tmp_path / "unlearned" / "recipe" / "seed-0+PMC+number-1" / "vanilla")
    groups = grouped(read_runs([tmp_path]))
    assert has_forgotten(recommended(groups), groups) is verdict
    words = " ".join(summary(groups))
    assert words.startswith(
        "Use PMC" if verdict else "No setting is recommended: none that keeps utility has forgotten"
    )


def evaluate_run(models, folder, scores, name="evaluated/one", **more):
    stored = json.loads((folder / "result.json").read_text())
    identity = {**stored["config"], "start": stored["id"], "metrics": "tofu", **more}
    identity["model"] = {**identity["model"], "path": str(folder)}
    (models / name).mkdir(parents=True)
    write_json(models / name / "result.json", result("e", identity, {"evaluation": 6.0}, **scores))


def test_an_evaluation_adds_its_scores_to_the_run_that_made_its_model(models):
    folder = sorted((models / "unlearned" / "recipe").iterdir())[0]
    evaluate_run(models, folder, {"tofu/probability/forget": 0.5, "memorization/extraction_strength": None})
    scores = {run.folder: run.scores for run in read_runs([models])}
    assert scores[folder]["tofu/probability/forget"] == 0.5 and scores[folder]["unlearn_quality"] == 83.0
    assert sum("tofu/probability/forget" in of_run for of_run in scores.values()) == 1
    alone = read_runs([models / "evaluated"])
    assert [run.folder for run in alone if not run.reference] == [folder], "the run itself is read, too"
    (group,) = [group for group in grouped(read_runs([models])) if group.values("tofu/probability/forget")]
    assert "0.50 (n=1)" in method_table([group])


def test_an_evaluation_on_other_data_is_left_out_by_name(tmp_path):
    folder = make_run(tmp_path, 0, 92.0, 99.0)
    other = {"path": "./data/other", "splits": {"forget": "forget"}, "words": "latin"}
    evaluate_run(tmp_path, folder, {"unlearn_quality": 1.0, "tofu/probability/forget": 0.5}, data=other)
    runs = {run.folder: run for run in read_runs([tmp_path])}
    assert runs[folder].scores["unlearn_quality"] == 92.0 and "tofu/probability/forget" not in runs[folder].scores
    assert runs[tmp_path / "evaluated/one"].status.startswith(
        "left out: evaluated with another value of data.path than"
    )


def test_evaluations_with_different_settings_are_named(tmp_path):
    for seed, rate in ((0, 1e-3), (1, 1e-5)):
        folder = make_run(tmp_path, seed, 92.0, 99.0)
        more = {"relearning": {"learning_rate": rate}, "sampling": {"num_samples": seed}}
        evaluate_run(tmp_path, folder, {"relearning/rougeL_recall": 0.5}, f"evaluated/{seed}", **more)
    (notice,) = notices(grouped(read_runs([tmp_path])))
    assert "relearning.learning_rate (0.001, 1e-05)" in notice and "sampling" not in notice
    change(tmp_path / "evaluated" / "0" / "result.json", config__data__max_length=128)
    assert "data.max_length (128, 256)" in notices(grouped(read_runs([tmp_path])))[-1]


def test_evaluations_that_do_not_agree_are_named(tmp_path):
    folder = make_run(tmp_path, 0, 92.0, 99.0)
    evaluate_run(tmp_path, folder, {"unlearn_quality": 92.0 + 1e-9, "utility": 95.0})
    (notice,) = notices(grouped(read_runs([tmp_path])))
    assert "do not agree on utility (99 and 95); the newest ones count" in notice


def test_an_evaluation_of_a_model_that_was_trained_again_is_left_out(tmp_path):
    folder = make_run(tmp_path, 0, 92.0, 99.0)
    evaluate_run(tmp_path, folder, {"tofu/probability/forget": 0.5})
    stored = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", stored | {"id": "trained again"})
    runs = {run.folder: run for run in read_runs([tmp_path])}
    assert "was trained again or removed" in runs[tmp_path / "evaluated/one"].status
    assert not runs[folder].evaluations


def test_results_without_a_headline_score_and_runs_begun_again_are_named(tmp_path):
    folder = make_run(tmp_path, 0, 92.0, None)
    (folder / "in_progress").mkdir()
    write_json(folder / "in_progress" / "run.json", {"config": {}, "overwrite": True})
    lacking, again = notices(grouped(read_runs([tmp_path])))
    assert lacking.endswith("its result has no utility.") and "a newer run was begun here and is unfinished" in again


def test_a_run_whose_publishing_broke_off_is_unfinished(tmp_path):
    folder = make_run(tmp_path, 0, 92.0, 99.0)
    (folder / "in_progress.publishing").mkdir()
    (folder / "result.json").rename(folder / "in_progress.publishing" / "result.json")
    status = [run.status for run in read_runs([tmp_path]) if not run.reference]
    assert status == ["unfinished: its files were not all moved up; the command of the run completes it"]


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("result.json", '{"id": "x", "scores": {}, "config": null}', "config"),
        ("result.json", "[]", "unfinished"),
        (
            "result.json",
            '{"id": "x", "config": {"model": {}, "data": {}, "evaluation": {}}, "scores": {}}',
            "model.prompt",
        ),
        (
            "vanilla/result.json",
            '{"id": "x", "config": {"model": 1, "data": 2, "evaluation": 3}}',
            "vanilla/result.json",
        ),
        ("result.json", "scores", "scores.utility"),
        ("result.json", "id", "id"),
        ("in_progress/run.json", "", None),
        ("../.failed/other.json", "{", "not readable"),
        ("history.jsonl", '{"epoch": 1}\n{"epo', None),
        ("generations.jsonl", '{"spl', None),
        ("finetuned/generations.jsonl", '{"spl', None),
        ("picks.jsonl", "{", None),
    ],
)
def test_a_damaged_file_does_not_end_the_report(tmp_path, file, text, named):
    folder = make_run(tmp_path, 0, 92.0, 99.0)
    make_run(tmp_path, 1, 91.0, 98.0)
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    if text in ("scores", "id"):
        stored = json.loads(path.read_text())
        stored["scores"]["utility"] = "99" if text == "scores" else 99.0
        text = json.dumps({key: value for key, value in stored.items() if key != text or text == "scores"})
    path.write_text(text)
    runs = read_runs([tmp_path])
    page = written(runs, tmp_path / "report", "damaged").read_text()
    wrong = [run.status for run in runs if run.status != "done"]
    assert len(wrong) == (named is not None) and all(named in status for status in wrong)
    assert all(status.replace("'", "&#39;") in page for status in wrong)


def test_a_seed_counts_once(tmp_path):
    for place in ("a", "b"):
        make_run(tmp_path / place, 0, 90.0, 99.0)
        stored = json.loads((tmp_path / place / "unlearned/recipe/seed-0+PMC+/result.json").read_text())
        write_json(tmp_path / place / "unlearned/recipe/seed-0+PMC+/result.json", stored | {"id": place})
    (group,) = [group for group in grouped(read_runs([tmp_path])) if not group.reference]
    assert len(group.runs) == 1 and group.deviation("utility") is None
    assert "PMC has another run of seed 0, and this one is not counted" in summary([group])[-1]


def test_models_that_were_only_evaluated_have_the_seeds_of_their_paths(tmp_path):
    for seed, quality in ((3, 78.0), (4, 80.0)):
        identity = config(0, metrics="tofu")  # the evaluation's own seed is 0
        identity["model"]["path"] = f"models/finetuned/tiny-retain/seed-{seed}"
        (tmp_path / str(seed)).mkdir()
        write_json(tmp_path / str(seed) / "result.json", result("e", identity, unlearn_quality=quality, utility=99.0))
    (group,) = grouped(read_runs([tmp_path]))
    assert (group.name, group.values("unlearn_quality"), group.repeated) == ("tiny-retain", [78.0, 80.0], [])
    assert [run.seed for run in group.runs] == [3, 4]


def test_results_of_something_else_are_left_out_by_name(models):
    other = models / "unlearned" / "recipe" / "odd"
    other.mkdir()
    write_json(other / "result.json", {"config": {}, "id": "x"})
    status = {run.folder: run.status for run in read_runs([models])}
    assert status[other] == "left out: result.json has no configuration of data, evaluation, model"


def test_answers_that_stay_likely_are_called_hidden(tmp_path):
    hidden = make_run(tmp_path, 0, 92.0, 99.0)
    evaluate_run(tmp_path, hidden, {"tofu/probability/forget": 0.45})
    evaluate_run(tmp_path, hidden / "vanilla", {"tofu/probability/forget": 0.01}, "evaluated/vanilla")
    words = summary(grouped(read_runs([tmp_path])))
    assert words[-1].startswith("Hidden rather than removed") and "0.45 (0.01 in vanilla" in words[-1]


def test_a_model_that_was_trained_on_the_answers_is_no_evidence_of_removal(tmp_path):
    folder = make_run(tmp_path, 0, 92.0, 99.0)
    evaluate_run(tmp_path, folder, {"tofu/probability/forget": 0.45})
    for train, probability in (("full", 0.92), ("retain", 0.01)):
        identity = config(0, metrics="tofu")
        identity["model"]["path"] = f"models/finetuned/{train}/seed-0"
        identity["data"]["splits"] = {"forget": "forget", "train": train, "retain": "retain"}
        (tmp_path / train).mkdir()
        write_json(tmp_path / train / "result.json", result("e", identity, **{"tofu/probability/forget": probability}))
        words = summary(grouped(read_runs([tmp_path])))[-1]
        assert ("was not measured" in words) == (train == "full")
    assert words.startswith("Hidden rather than removed") and "0.45 (0.01 in retain" in words


def test_failed_unfinished_and_broken_runs_are_listed(models, tmp_path):
    parent = models / "unlearned" / "recipe"
    failed, killed, broken = (parent / name for name in ("seed-0+failed", "seed-0+killed", "seed-0+broken"))
    failure_file(failed).parent.mkdir()
    write_json(failure_file(failed), {"message": "method.temperature=0: must be positive <b>"})
    (killed / "in_progress").mkdir(parents=True)
    write_json(killed / "in_progress" / "run.json", {"config": config(0), "overwrite": False})
    for folder in (broken, parent / "seed-0+broken-before" / "vanilla"):
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{")
    write_json(parent / "seed-0+broken-before" / "result.json", result("b", config(0)))
    status = {run.folder.name: run.status for run in read_runs([models]) if run.status != "done"}
    assert status["seed-0+failed"] == "failed: method.temperature=0: must be positive <b>"
    assert status["seed-0+killed"] == "unfinished"
    assert "not readable as JSON" in status["seed-0+broken"]
    assert "vanilla/result.json: not readable as JSON" in status["seed-0+broken-before"]
    page = written(read_runs([models]), tmp_path / "report", "a sweep").read_text()
    assert "must be positive &lt;b&gt;" in page and "positive <b>" not in page
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "seed-0+failed: failed: method.temperature=0: must be positive \\<b\\>" in text
        and "seed-0+killed: unfinished" in text
    )


def test_a_job_that_failed_after_an_older_result_is_failed(models):
    folder = sorted((models / "unlearned" / "recipe").iterdir())[0]
    failure_file(folder).parent.mkdir()
    write_json(failure_file(folder), {"message": "out of memory"})
    assert {run.folder: run.status for run in read_runs([models])}[folder] == "failed: out of memory"


def test_runs_on_other_data_or_from_other_models_are_not_ranked(models):
    other = make_run(models, 0, 99.0, 99.0, num_samples=50)
    stored = json.loads((other / "result.json").read_text())
    stored["config"] |= {"start": "another", "data": {**stored["config"]["data"], "path": "./data/other"}}
    write_json(other / "result.json", stored)
    runs = read_runs([models])
    assert "different data" in differences(runs)[0] and "seed 0 started from different models" in differences(runs)[1]
    groups = grouped(runs)
    assert not any(group.on_front or group.best for group in groups) and recommended(groups) is None
    assert summary(groups)[0].startswith("These runs cannot be ranked")


def test_a_reference_that_was_evaluated_on_other_rows_is_named(tmp_path):
    folder = make_run(tmp_path, 0, 92.0, 99.0)
    assert notices(grouped(read_runs([tmp_path]))) == []
    stored = json.loads((folder / "finetuned" / "result.json").read_text())
    stored["config"]["data"]["splits"] = {"forget": "forget[:5]", "holdout": "holdout"}
    write_json(folder / "finetuned" / "result.json", stored)
    assert notices(grouped(read_runs([tmp_path]))) == [
        "finetuned was evaluated with another data.splits.forget (forget[:5], not forget): do not compare its scores with the "
        "others."
    ]


def test_results_of_other_machines_and_versions_are_named(tmp_path):
    for seed, made in enumerate(
        [{"device": "H100", "git_commit": "0123456789abcdef-dirty"}, {"versions": {}, "git_commit": None}, {}]
    ):
        path = make_run(tmp_path, seed, 92.0, 99.0) / "result.json"
        write_json(path, json.loads(path.read_text()) | made)
    (notice,) = notices(grouped(read_runs([tmp_path])))
    assert notice == "The results were made with different device (cpu, H100); git_commit (abc, 0123456789ab-dirty)."


def test_columns_of_two_sections_keep_their_full_names(tmp_path):
    folders = [make_run(tmp_path, 0, 90.0, 99.0, num_samples=number) for number in (2, 5)]
    for folder, value in zip(folders, (False, True), strict=True):
        stored = json.loads((folder / "result.json").read_text())
        stored["config"]["evaluation"]["bf16"] = value
        stored["config"]["training"] = {"bf16": value}
        write_json(folder / "result.json", stored)
    groups = grouped(read_runs([tmp_path]))
    assert "| evaluation.bf16 | num_samples | training.bf16 |" in method_table(groups).splitlines()[0]
    assert "were evaluated with different evaluation.bf16 (false and true)" in summary(groups)[0]


def test_an_output_that_is_no_folder_is_named(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output=.*file: .*; name another folder"):
        main([str(models), "--output", str(tmp_path / "file")])


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_runs([tmp_path / "nothing"])
    with pytest.raises(UserError, match="no run is in it"):
        read_runs([tmp_path])


# --- the files ---


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_every_number_in_the_page_and_the_files_is_that_of_the_runs(models, capsys):
    main([str(models), "--output", str(models / "out")])
    printed = capsys.readouterr().out
    data = data_of((models / "out" / "report.html").read_text())
    stored = {path: json.loads((path / "result.json").read_text()) for path in (models / "unlearned/recipe").iterdir()}
    for group in (group for group in data["groups"] if not group["reference"]):
        runs = [
            run["scores"]
            for run in stored.values()
            if all(run["config"]["method"][key.partition(".")[2]] == value for key, value in group["settings"].items())
        ]
        assert len(runs) == group["runs"] == 3
        for score in ("unlearn_quality", "utility", "rougeL_recall/forget"):
            values = [run[score] for run in runs]
            assert group["stats"][score] == [statistics.fmean(values), pytest.approx(statistics.stdev(values)), 3]
    assert len(data["curves"]) == 12
    assert data["curves"][0]["values"]["collapse_loss"] == [2, 1, 0.666667, 0.5, 0.4]
    assert data["curves"][0]["minutes"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    with (models / "out" / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["reference"] == "False"]
    by_setting = {
        (
            run["config"]["method"]["num_samples"],
            run["config"]["method"]["lambda_unlearning"],
            run["config"]["seed"],
        ): run
        for run in stored.values()
    }
    assert len(rows) == 12
    for row in rows:
        key = (int(row["method.num_samples"]), int(row["method.lambda_unlearning"]), int(row["seed"]))
        assert float(row["unlearn_quality"]) == by_setting[key]["scores"]["unlearn_quality"]
    line = "| PMC \\* | 1 | 5 | 3 | **89.2 ± 0.2** | 95.5 ± 0.5 | **0.11 ± 0.00** | 0.50 ± 0.00 |"
    table = (models / "out" / "report.md").read_text()
    assert line.replace("\\*", "*") in table and line.replace("\\*", "*") in printed
    assert r"PMC & 1 & 5 & \textbf{89.2 $\pm$ 0.2} & 95.5 $\pm$ 0.5" in (models / "out" / "report.tex").read_text()


def test_text_in_latex():
    assert as_latex(r"a_b & 5% {x} \y ± ~^") == (
        r"a\_b \& 5\% \{x\} \textbackslash{}y $\pm$ \textasciitilde{}\textasciicircum{}"
    )


def test_a_sampled_number_is_rounded_in_the_tables_alone(tmp_path):
    make_run(tmp_path, 0, 90.0, 99.0, learning_rate=1.8877843577590545)
    make_run(tmp_path, 0, 90.0, 99.0, learning_rate=2e-05)
    written(read_runs([tmp_path]), tmp_path / "out", "one")
    for name, shown in {"report.md": "1.888", "report.tex": "1.888", "results.csv": "1.8877843577590545"}.items():
        text = (tmp_path / "out" / name).read_text()
        assert re.search(rf"\b{re.escape(shown)}\b", text) and "2e-05" in text


def test_the_page_has_the_words_shared_with_the_truth(tmp_path):
    make_run(tmp_path, 0, 90.0, 99.0, text="no true thing, answers")
    rows = data_of(written(read_runs([tmp_path]), tmp_path / "out", "one").read_text())["answers"]
    # "new no true thing, answers": words are stemmed as ROUGE does
    assert rows[0]["after_marks"] == [2, 4] and rows[0]["before_marks"] == [1, 3]


# --- the page in a browser ---


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, path, **options):
    """The page, once all tables and plots are drawn; and the list that its errors are added to."""
    page, problems = browser.new_page(**options), []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append("a dialog"))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(f"file://{path}")
    page.locator("html[data-ready=true]").wait_for(state="attached", timeout=60000)
    return page, problems


@pytest.mark.slow
def test_the_page_sorts_filters_and_draws(models, browser, tmp_path):
    make_run(models, 0, 88.0, 99.5, text=BAD, lambda_unlearning=2, num_samples=10)
    path = written(read_runs([models]), tmp_path, f"Report {BAD}")
    page, problems = opened(browser, path)
    rows = page.locator("#settings-table tbody tr")
    assert rows.count() == 7 and rows.nth(0).inner_text().startswith("vanilla")
    header = page.locator(".dt-scroll-head th", has_text="unlearn quality").first
    header.click()
    header.click()
    texts = [
        float(text)
        for text in page.locator("#settings-table tbody tr td:nth-child(5)").all_inner_texts()
        if "±" not in text
    ]
    column = [text.split(" ")[0] for text in page.locator("#settings-table tbody tr td:nth-child(5)").all_inner_texts()]
    assert [float(value) for value in column] == sorted(map(float, column), reverse=True) and texts == [88.0]
    page.locator("#settings input[type=search]").fill("vanilla")
    assert rows.count() == 1
    for plot in ("scatter", "knob", "curve"):
        assert page.locator(f"#{plot} .main-svg").count() > 0, plot
    assert page.locator("#scatter .scatterlayer .trace").count() == 6, "five settings and the Pareto front"
    page.locator("#scatter-references").check()
    assert page.locator("#scatter .scatterlayer .trace").count() == 8
    page.locator("#knob-key").select_option("method.num_samples")
    assert page.locator("#knob .scatterlayer .trace").count() == 2
    # answers: filter by run and split, search; what is in the data is text
    page.locator("#answers-run").select_option("PMC, lambda_unlearning=2, num_samples=10, seed 0")
    first = page.locator("#answers-table tbody tr").first
    assert BAD in first.inner_text().replace("\n", " ")
    page.locator("#answers input[type=search]").fill("Question 2?")
    assert page.locator("#answers-table tbody tr").count() == 1
    assert page.locator("#picks-table tr").count() == 4
    assert "0 (before)" in page.locator("#picks-table").inner_text()
    page.locator("#theme").press("Enter")
    assert page.locator("html.dark").count() == 1
    assert page.evaluate("() => window.broken") is None
    assert page.locator("img").count() == 0
    assert problems == []
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"color_scheme": "dark"}, {"viewport": {"width": 360, "height": 700}}])
def test_the_page_of_one_run_opens_dark_and_narrow(browser, tmp_path, options):
    make_run(tmp_path, 0, 90.0, 99.0)
    page, problems = opened(browser, written(read_runs([tmp_path]), tmp_path / "out", "one"), **options)
    assert problems == []
    wider = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider <= 0, "nothing is cut off at the right"
    page.close()


@pytest.mark.slow
def test_two_hundred_runs_open_in_three_seconds(browser, tmp_path):
    for number, seed in itertools.product(range(50), range(4)):
        make_run(tmp_path, seed, 80 + number / 5 + seed / 3, 100 - number / 5, num_samples=number)
    path = written(read_runs([tmp_path]), tmp_path / "out", "two hundred")
    assert path.stat().st_size < 4e6
    one = written(read_runs([next((tmp_path / "unlearned/recipe").iterdir())]), tmp_path / "one", "one")
    milliseconds: dict = {path: [], one: []}
    for opened_path in (path, one) * 3:  # the least of three: other programs may be running
        page, problems = opened(browser, opened_path)
        assert problems == []
        spent = page.evaluate("() => Number(document.documentElement.dataset.milliseconds)")
        milliseconds[opened_path].append(spent)
        page.close()
        if milliseconds[path][0] < 3000:
            return
    # On a busy machine even Plotly alone takes that long.
    assert min(milliseconds[path]) < max(3000, 1.5 * min(milliseconds[one]))


def test_a_setting_that_forgot_nothing_is_not_recommended(tmp_path):
    for samples in (2, 5):
        make_run(tmp_path / "models", 0, 0, 100, num_samples=samples)  # recall 1, as before unlearning
    words = " ".join(summary(grouped(read_runs([tmp_path]))))
    assert "No setting is recommended: none that keeps utility has forgotten the answers." in words
    assert "Not forgotten: its answers to forget questions have 100% of the words" in words
    assert "Use " not in words


def unlearned_further(models, seed, quality, utility, of):
    """The folder of a run that unlearns the model of another one further."""
    folder = make_run(models, seed, quality, utility, method="UNDO")
    shutil.rmtree(folder / "finetuned")
    shutil.copytree(of, folder / "finetuned", ignore=shutil.ignore_patterns("vanilla", "finetuned"))
    stored = json.loads((folder / "result.json").read_text())
    stored["config"]["start"] = json.loads((of / "result.json").read_text())["id"]
    write_json(folder / "result.json", stored | {"started_from": os.path.relpath(of, folder)})
    return folder


@pytest.mark.parametrize("both", [True, False])
def test_an_unlearned_model_that_is_unlearned_further_is_not_the_finetuned_one(tmp_path, both):
    first = make_run(tmp_path, 0, 84.0, 96.0, method="NPO")
    second = unlearned_further(tmp_path, 0, 86.0, 97.0, of=first)
    runs = read_runs([first.parent] if both else [second])
    names = {run.name: (run.reference, run.scores["utility"]) for run in runs}
    expected = {"vanilla": (True, 70), "finetuned": (True, 100), "UNDO": (False, 97.0)}
    assert names == expected | ({"NPO": (False, 96.0)} if both else {})
    assert "Cost: utility falls by 3.0 points" in " ".join(summary(grouped(runs)))
    assert set(results_before(second)) == {"vanilla", "start (NPO)"}
    change(first / "result.json", id="trained again")
    assert "finetuned" not in {run.name for run in read_runs([second])}


def test_evaluations_of_other_inputs_are_named(tmp_path):
    """Other rows, an edited file, other columns, and other models to compare with."""
    names = ("holdout", "columns", "files", "retain_model", "base_model")
    for seed, name in enumerate(("", *names)):
        folder = make_run(tmp_path, seed, 92.0, 99.0)
        data = json.loads((folder / "result.json").read_text())["config"]["data"]
        data["splits"] = data["splits"] | {"holdout": "h2" if name == "holdout" else "h1"}
        data["columns"] = {"perturbed_answer": "w2" if name == "columns" else "w1"}
        files = {"holdout": "edited" if name == "files" else "digest"}
        others = {other: {"path": f"m/{other}{'-2' * (name == other)}/seed-{seed}", "id": "x"} for other in names[3:]}
        scores = {"privacy/auc/loss": 0.5, "unlearn_quality": 92.0}
        evaluate_run(tmp_path, folder, scores, f"evaluated/{seed}", data=data, files=files, compared_to=others)
    found = notices(grouped(read_runs([tmp_path])))
    (notice,) = [sentence for sentence in found if sentence.startswith("The evaluations differ in")]
    for text in ("data.splits.holdout (h1, h2)", "data.columns.perturbed_answer (w1, w2)", "data.files.holdout"):
        assert text in notice
    for other in names[3:]:
        assert f"{other}.path (m/{other}-2/seed-N, m/{other}/seed-N)" in notice


def test_a_model_to_compare_with_that_was_trained_again_is_named(tmp_path):
    for number in range(2):
        folder = make_run(tmp_path, 0, 92.0, 99.0, num_samples=number)
        others = {"retain_model": {"path": "m/retain/seed-0", "id": f"id {number}"}}
        evaluate_run(tmp_path, folder, {"privacy/privleak": 0.5}, f"evaluated/{number}", compared_to=others)
    found = notices(grouped(read_runs([tmp_path])))
    assert [sentence for sentence in found if "The evaluations differ in the weights of retain_model" in sentence]


def evaluate_checkpoint(models, name, seed=0, **model):
    identity = config(seed, metrics="tofu")
    identity["model"] = {**identity["model"], **model}
    (models / name).mkdir(parents=True)
    write_json(
        models / name / "result.json", result(name, identity, {"evaluation": 6.0}, unlearn_quality=50.0, utility=50.0)
    )


def test_checkpoints_of_one_path_are_rows_of_their_own(tmp_path):
    for number, more in enumerate(({"revision": "a"}, {"revision": "b"}, {"gguf_file": "q4.gguf"})):
        evaluate_checkpoint(tmp_path, f"evaluated/{number}", path="org/m", **more)
    assert len(grouped(read_runs([tmp_path]))) == 3


def test_one_checkpoint_evaluated_with_several_seeds_is_one_run(tmp_path):
    for seed in range(3):
        evaluate_checkpoint(tmp_path, f"comparisons/recipe/vanilla/seed-{seed}", seed, path="models/base/smollm2")
    runs = [
        Run(folder, "vanilla", json.loads((folder / "result.json").read_text()), reference=True)
        for folder in sorted((tmp_path / "comparisons/recipe/vanilla").iterdir())
    ]
    (group,) = grouped(runs)
    assert (len(group.runs), group.repeated) == (1, [])
