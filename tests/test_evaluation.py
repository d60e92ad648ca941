"""The evaluation stage: what is chosen, what is compared to what, what is done once, and the same on two processes."""

import inspect
import json
import shutil
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.files import ROOT, write_json_lines
from evaluation.context import model_before, revision_before
from evaluation.inputs import check_base_model, check_retain_model
from evaluation.main import check_same_inputs, different_bases
from evaluation.metrics.registry import METRIC_GROUPS, check_inputs, chosen_groups
from evaluation.run_report import examples
from evaluation.scores import Missing
from evaluation.tables import headline_table, score_table
from tests.helpers import docs_generator, evaluate_here, run_in_processes

FOLDERS = {"vanilla": "pretrain-tiny", "finetuned": "tiny"}
QUICK = ["sampling.num_samples=4", "relearning.learning_rate=1e-3"]


def read(path):
    return json.loads(path.read_text())


# --- metrics ------------------------------------------------------------------------------------------------------------


def test_headline_is_always_measured_and_first():
    assert chosen_groups("headline") == ["headline"]
    assert chosen_groups(["privacy", "memorization"]) == ["headline", "memorization", "privacy"]
    assert chosen_groups("tofu") == ["headline", "tofu"]


ONLY_BY_NAME = ("lm_eval", "text", "muse", "openunlearning")  # the groups that metrics=full leaves out


def test_presets():
    assert chosen_groups("full") == [name for name in METRIC_GROUPS if name not in ONLY_BY_NAME]
    assert chosen_groups(["full", *ONLY_BY_NAME]) == list(METRIC_GROUPS)
    assert set(chosen_groups("attacks")) == {
        *("headline", "sampling", "prefill", "target_suppression", "quantization", "relearning")
    }


def test_a_mistyped_metric_is_refused_with_the_closest():
    with pytest.raises(UserError, match="metrics=privcy: no such metrics; did you mean 'privacy'"):
        chosen_groups(["tofu", "privcy"])
    with pytest.raises(UserError, match="metrics=None: no such metrics"):
        chosen_groups(None)


# --- the stage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(models_dir):
    """A model that never saw the forget set, and one that knows it by heart."""
    return {name: models_dir / "finetuned" / folder / "seed-0" for name, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def command(models_dir, checkpoints):
    """Every metric of both, the vanilla model taken for the retain-only one and the finetuned for the one before unlearning."""
    models = ",".join(f"{name}:{path}" for name, path in checkpoints.items())
    others = f"retain_model.path={checkpoints['vanilla']}", f"base_model.path={checkpoints['finetuned']}"
    where = f"output_dir={models_dir}/side-by-side"
    return [models_dir, "metrics=[full,openunlearning]", f"models={{{models}}}", *others, where, *QUICK]


@pytest.fixture(scope="module")
def evaluated(command):
    """The folder of each model's result, and the results."""
    folders = evaluate_here(*command)
    return folders, {name: read(folder / "result.json") for name, folder in folders.items()}


def test_a_model_against_itself(evaluated):
    vanilla, finetuned = (evaluated[1][name]["scores"] for name in FOLDERS)
    assert vanilla["tofu/forget_quality"] == 1.0
    assert vanilla["privacy/privleak"] == 0.0
    assert vanilla["relearning/rougeL_recall_beyond_retain_model"] == 0.0
    assert finetuned["privacy/auc/reference"] == 0.5
    assert finetuned["side_effects/probability_shift"] == finetuned["side_effects/probability_shift_deviation"] == 0.0


def test_a_model_that_knows_and_one_that_does_not(evaluated):
    vanilla, finetuned = (evaluated[1][name]["scores"] for name in FOLDERS)
    for name in ("memorization/extraction_strength", "sampling/leak@4", "tofu/probability/forget", "privacy/auc/loss"):
        assert vanilla[name] < finetuned[name]
    assert finetuned["tofu/forget_quality"] < 0.05
    assert finetuned["memorization/exact_memorization"] > 0.9
    assert finetuned["privacy/auc/min_k"] > 0.9 and finetuned["privacy/privleak"] < -50


def test_every_score_is_complete(evaluated):
    for result in evaluated[1].values():
        assert None not in result["scores"].values() and not result["notes"]
        assert result["higher_is_better"].keys() == result["scores"].keys()
        assert result["counts"]["tofu/probability/retain"] == 130
        assert result["seconds"]["evaluation"] >= sum(result["seconds"][name] for name in ("sampling", "privacy"))
        assert result["seconds"]["outputs/samples"] > 0
        assert result["config"]["compared_to"]["retain_model"]["path"] == "models/finetuned/pretrain-tiny/seed-0"
    names = evaluated[1]["vanilla"]["scores"]
    assert {name.split("/")[0] for name in names if "/" in name} >= set(METRIC_GROUPS) - {
        "headline",
        "lm_eval",
        "text",
        "muse",
    }


def test_every_score_is_described_by_its_metric_group(evaluated):
    generate = docs_generator()
    described = {
        name: [pattern for pattern, *_ in generate.described_scores(inspect.getmodule(group.measure))]
        for name, group in METRIC_GROUPS.items()
    }
    for name in evaluated[1]["vanilla"]["scores"]:
        patterns = [pattern for patterns in described.values() for pattern in patterns]
        assert sum(fnmatch(name, pattern) for pattern in patterns) == 1, name
    for name, patterns in described.items():
        assert patterns and (name == "headline" or all(pattern.startswith(f"{name}/") for pattern in patterns))


def test_values_of_single_rows_are_kept(evaluated):
    folder = evaluated[0]["vanilla"]
    rows = {row["name"]: row for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())}
    scores = evaluated[1]["vanilla"]["scores"]
    for name in ("memorization/exact_memorization", "tofu/truth_ratio/world_facts", "sampling/leak@2"):
        assert sum(rows[name]["values"]) / len(rows[name]["values"]) == pytest.approx(scores[name])
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [len(row["samples"]) for row in samples] == [4] * 30
    splits = {json.loads(line)["split"] for line in (folder / "generations.jsonl").read_text().splitlines()}
    assert splits == {"forget", "forget_paraphrased", "retain", "real_authors", "world_facts", "forget_prefill"}


def test_the_report_has_a_column_for_each_model(evaluated, models_dir):
    report = (models_dir / "side-by-side" / "report.md").read_text()
    for line in (
        "| score | better | vanilla | finetuned |",
        "| tofu/forget_quality | higher | ",
        "| privacy/privleak | 0 | ",
    ):
        assert line in report


def test_notes_name_the_models_that_they_are_about():
    def result(notes):
        scores = dict.fromkeys(("a", "b"))
        return {"scores": scores, "higher_is_better": scores, "ideal": {}, "notes": notes, "left_out": {"b": 2}}

    both = score_table({"one": result({"a": "not given", "b": "too short"}), "two": result({"a": "not given"})})
    assert both.split("\n\n")[1:] == [
        "a: not given.",
        "b (one): too short.",
        "b: 2 rows without a value are left out.",
    ]


def test_what_was_measured_is_not_measured_again(evaluated, command, monkeypatch):
    before = {name: (folder / "result.json").read_bytes() for name, folder in evaluated[0].items()}
    monkeypatch.setattr("evaluation.main.measure_groups", None)
    assert evaluate_here(*command) == evaluated[0]
    assert {name: (folder / "result.json").read_bytes() for name, folder in evaluated[0].items()} == before


def test_nothing_is_written_into_the_checkpoints(evaluated, checkpoints):
    for folder in checkpoints.values():
        assert set(read(folder / "result.json")["scores"]) < set(evaluated[1]["vanilla"]["scores"])
        assert not (folder / "rows.jsonl").exists()


def test_without_a_retain_only_model_what_needs_it_is_null_and_the_base_model_is_found(models_dir, checkpoints):
    overrides = [f"model.path={checkpoints['finetuned']}", f"output_dir={models_dir}/alone"]
    overrides += ["metrics=[tofu,privacy,fluency]", "++data.splits.retain_perturbed=null"]
    evaluate_here(models_dir, *overrides)
    result = read(models_dir / "alone" / "result.json")
    scores, notes = result["scores"], result["notes"]
    assert scores["tofu/forget_quality"] is None and "retain_model.path" in notes["tofu/forget_quality"]
    assert scores["privacy/privleak"] is not None and "AUC of 0.5" in notes["privacy/privleak"]
    assert scores["tofu/truth_ratio/retain"] is None and "retain_perturbed" in notes["tofu/truth_ratio/retain"]
    assert scores["tofu/model_utility"] is None and "tofu/truth_ratio/retain" in notes["tofu/model_utility"]
    # The result of the run that made the checkpoint names what it started from.
    assert scores["fluency/perplexity"] > 1 and scores["privacy/auc/reference"] > 0.9
    assert result["config"]["compared_to"]["base_model"]["path"] == "models/finetuned/pretrain-tiny/seed-0"
    assert "sampling/leak@1" not in scores


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metrics=privcy"], "metrics=privcy: no such metrics; did you mean 'privacy'"),
        (["retain_model.path=./nowhere"], "retain_model: model.path=./nowhere: no such folder"),
        (["base_model.path=./nowhere"], "base_model: model.path=./nowhere: no such folder"),
        (["model.path=./nowhere"], "model.path=./nowhere: no such folder"),
        (["metrics=privacy", "++data.splits.holdout=holdoutt"], "no {data}/holdoutt.json; did you mean 'holdout'"),
        (["models=[./a]"], "models is set as well; give only one of the two"),
        (["model.path=???", "models=[]"], "models=[]: expected a list"),
        (["model.path=???", "models=./a"], "models=./a: expected a list"),
        (["metrics=lm_eval"], "lm_eval"),
    ],
)
def test_wrong_input_is_named_before_anything_is_measured(models_dir, checkpoints, monkeypatch, overrides, message):
    monkeypatch.setattr("evaluation.main.measure_groups", None)
    with pytest.raises(UserError) as caught:
        evaluate_here(models_dir, f"model.path={checkpoints['finetuned']}", *overrides)
    assert message.format(data=ROOT / "data" / "tiny") in str(caught.value)


def test_a_broken_model_is_named_before_the_others_are_measured(models_dir, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.main.measure_groups", None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text((checkpoints["vanilla"] / "result.json").read_text())
    with pytest.raises(UserError, match="broken: not a checkpoint"):
        evaluate_here(models_dir, f"models=[{checkpoints['vanilla']},{tmp_path}/broken]")


def test_models_that_were_made_with_other_inputs_are_not_one_table(caplog):
    def identity(forget="forget", length=200, holdout="holdout", question="{question}"):
        return {
            "model": {"prompt": {"style": "plain", "question": question}},
            "data": {"path": "./data/tiny", "splits": {"forget": forget, "holdout": holdout}},
            "evaluation": {"max_length": length, "full_eval": False, "bf16": "auto"},
        }

    check_same_inputs({"a": identity(), "b": identity(holdout="other")}, ["headline"])
    assert not caplog.messages
    check_same_inputs({"a": identity(), "b": identity(question="Q {question}")}, ["headline"])
    assert (
        "model.prompt.question: the models are asked in different ways ({question} of a, Q {question} of b)"
        in caplog.text
    )
    longer, half = identity(), identity()
    longer["data"]["max_length"], half["model"]["dtype"] = 512, "bfloat16"
    check_same_inputs({"a": identity(), "b": longer, "c": half}, ["headline"])
    with pytest.raises(UserError, match=r"data\.max_length: .*\(null of a, 512 of b, null of c\)"):
        check_same_inputs({"a": identity(), "b": longer, "c": half}, ["headline", "memorization"])
    assert (
        "model.dtype: the models are measured in different types (null of a, null of b, bfloat16 of c)"
        in caplog.messages
    )
    with pytest.raises(UserError) as caught:
        check_same_inputs({"a": identity(), "b": identity("forget[:5]", 40, "other")}, ["headline", "privacy"])
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        "3 problems:",
        *(
            f"- {key}: the models were made with different values ({values}); give one in the command"
            for key, values in (
                ("data.splits.forget", "forget of a, forget[:5] of b"),
                ("data.splits.holdout", "holdout of a, other of b"),
                ("evaluation.max_length", "200 of a, 40 of b"),
            )
        ),
    ]


def test_the_stage_checks_that_models_fit_each_other(context, tmp_path, caplog):
    for name, forget in (("model", "gone"), ("retain", "gone[:2]")):
        config = context.config
        data = asdict(config.data) | {"splits": {"train": "kept + gone", "retain": "kept", "forget": forget}}
        config = {
            "model": {"prompt": asdict(config.model.prompt)},
            "data": data,
            "evaluation": asdict(config.evaluation),
            **({"method": {}} if name == "model" else {}),
        }
        (tmp_path / name / "result.json").write_text(
            json.dumps({"id": name, "started_from": "../start", "config": config})
        )
    model, retain = f"{tmp_path}/model", f"{tmp_path}/retain"
    with pytest.raises(UserError, match=r"data\.splits\.forget: .* \(gone of a, gone\[:2\] of b\)"):
        evaluate_here(tmp_path, f"models={{a:{model},b:{retain}}}")
    with pytest.raises(UserError, match=r"retain_model\.path=.*: was finetuned on 4 of the 4 rows"):
        evaluate_here(tmp_path, f"model.path={model}", f"retain_model.path={retain}", f"base_model.path={retain}")
    assert f"base_model.path={retain}: {model} was unlearned from another model, ../start" in caplog.messages


# --- the model before unlearning -------------------------------------------------------------------------------------


def made_from(folder, start=None, recorded=None, **config):
    """A run's folder with a result that records what it started from; returns the folder."""
    folder.mkdir()
    config = config | ({"start": recorded} if recorded else {})
    result = {"id": folder.name, "started_from": start and f"../{start}", "config": config, "scores": {}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_the_model_before_unlearning_is_the_first_one_that_was_not_unlearned(tmp_path):
    vanilla = made_from(tmp_path / "vanilla")
    finetuned = made_from(tmp_path / "finetuned", "vanilla", "vanilla")
    pmc = made_from(tmp_path / "pmc", "finetuned", "finetuned", method={})
    undo = made_from(tmp_path / "undo", "pmc", "pmc", method={})
    assert model_before(vanilla) is None
    assert model_before(finetuned) == str(vanilla)
    assert model_before(pmc) == model_before(undo) == str(finetuned)
    assert model_before(made_from(tmp_path / "gone", "deleted", "an id", method={})) == "../deleted"


def test_the_model_before_unlearning_has_the_revision_that_was_unlearned(tmp_path):
    pmc = made_from(tmp_path / "pmc", method={}, model={"revision": "step1000"})
    result = json.loads((pmc / "result.json").read_text()) | {"started_from": "owner/name"}
    (pmc / "result.json").write_text(json.dumps(result))
    undo = made_from(tmp_path / "undo", "pmc", "pmc", method={}, model={"revision": None})
    assert revision_before(str(pmc)) == revision_before(str(undo)) == "step1000"
    other = made_from(tmp_path / "other", "undo", "undo", model={"revision": "of another one"})
    assert revision_before(str(other)) == "step1000"


def test_a_model_that_was_replaced_is_not_taken_for_the_one_before_unlearning(tmp_path, context):
    made_from(tmp_path / "other", method={})
    pmc = made_from(tmp_path / "pmc", "other", "finetuned", method={})
    undo = made_from(tmp_path / "undo", "pmc", "pmc", method={})
    for folder in (pmc, undo):
        with pytest.raises(Missing, match=r"/other was trained again or replaced since .*/pmc was .*base_model\.path"):
            model_before(folder)
    context.unknown["base_model"] = "it was replaced"
    with pytest.raises(Missing, match="it was replaced"):
        context.find_base_model()


def test_a_model_before_unlearning_that_the_model_was_not_trained_from_is_warned_of(tmp_path, caplog):
    vanilla, finetuned, other = (str(made_from(tmp_path / name)) for name in ("vanilla", "finetuned", "other"))
    pmc = made_from(tmp_path / "pmc", "finetuned", "finetuned", method={})
    undo = made_from(tmp_path / "undo", "pmc", "pmc", method={})
    moved = made_from(tmp_path / "moved", "deleted", "other", method={})
    for path, base in [
        (pmc, finetuned),
        (undo, finetuned),
        (moved, other),
        (finetuned, vanilla),
        (vanilla, "owner/base"),
    ]:
        check_base_model(str(path), base)
    assert not caplog.messages
    check_base_model(str(undo), vanilla)
    check_base_model(str(pmc), "owner/base")
    check_base_model(str(moved), finetuned)
    starts = [(vanilla, undo, finetuned), ("owner/base", pmc, finetuned), (finetuned, moved, "../deleted")]
    warning = "base_model.path={}: {} was unlearned from another model, {}"
    assert caplog.messages == [warning.format(*words) for words in starts]


def test_a_report_names_the_models_before_unlearning_where_they_differ():
    def result(base, score="fluency/refusals"):
        compared = {"base_model": {"path": base, "id": "x"}} if base else {}
        return {"scores": {score: 0.5}, "config": {"compared_to": compared}}

    assert different_bases({"one": result("a"), "two": result("a")}) == ""
    assert different_bases({"one": result("a", "utility"), "two": result("b", "utility")}) == ""
    shown = different_bases({"one": result("a"), "two": result("b"), "three": result(None)})
    assert shown.endswith("(base_model.path): one: a; two: b; three: not known.")


# --- the retain-only model --------------------------------------------------------------------------------------------


def finetuned_on(context, train, **config):
    """The retain-only model's folder, with a result that records the rows it was finetuned on."""
    data = asdict(context.config.data)
    recorded = {"model": {"prompt": {"style": "plain"}}, "data": data | {"splits": {"train": train}}, **config}
    folder = Path(context.others["retain_model"])
    (folder / "result.json").write_text(json.dumps({"id": "retain", "scores": {}, "config": recorded}))
    return str(folder)


def test_a_retain_only_model_that_saw_the_forget_rows_is_refused(context, caplog):
    check_retain_model(context.config, context.others["retain_model"])  # nothing is known of it
    check_retain_model(context.config, finetuned_on(context, "kept"))
    assert not caplog.messages
    with pytest.raises(
        UserError, match=r"^retain_model\.path=.*/retain: was finetuned on 4 of the 4 rows of data.splits.f"
    ):
        check_retain_model(context.config, finetuned_on(context, "kept + gone"))
    check_retain_model(context.config, finetuned_on(context, "gone[1:2] + kept"))
    assert "was finetuned on 1 of the 4 rows" in caplog.text


@pytest.mark.parametrize(
    ("train", "config", "message"),
    [
        ("kept", {"method": {}}, "is an unlearned model"),
        (
            "kept",
            {"model": {"prompt": {"style": "plain", "question": "Q {question}"}}},
            "(question='Q {question}'), but",
        ),
        ("deleted", {}, "cannot be read: data.splits.train=deleted"),
    ],
)
def test_a_retain_only_model_that_was_made_in_another_way_is_warned_of(context, caplog, train, config, message):
    check_retain_model(context.config, finetuned_on(context, train, **config))
    (warning,) = caplog.messages
    assert warning.startswith(f"retain_model.path={context.others['retain_model']}: ") and message in warning


def test_holdout_rows_that_the_model_was_trained_on_are_refused(context):
    for role, split in (("forget", "gone"), ("retain", "kept")):
        data = replace(context.config.data, splits=context.config.data.splits | {"holdout": split})
        with pytest.raises(UserError, match=rf"data\.splits\.holdout: all 4 rows are also in data\.splits\.{role}"):
            check_inputs(replace(context.config, data=data), ["headline", "privacy"])


def average(one, other, folder):
    """A checkpoint with the mean of the weights of two, for scores that compare three models."""
    shutil.copytree(one, folder, symlinks=True)
    weights, others = (load_file(of_model / "model.safetensors") for of_model in (one, other))
    mean = {name: (weight + others[name]) / 2 for name, weight in weights.items()}
    save_file(mean, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_two_processes_find_what_one_finds(models_dir, checkpoints, tmp_path):
    settings = ["metrics=full", "sampling.num_samples=2", "quantization.bits=[4]", "relearning.batch_size=10"]
    between = average(checkpoints["finetuned"], checkpoints["vanilla"], tmp_path / "between")
    settings += [f"model.path={between}", f"retain_model.path={checkpoints['vanilla']}"]
    settings += [f"base_model.path={checkpoints['finetuned']}"]
    # Uneven numbers of rows, so that the processes' shares differ.
    rows = {"retain": 21, "retain_perturbed": 9, "real_authors": 11, "world_facts": 15, "holdout": 13}
    names = {"real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}
    settings += [f"++data.splits.{role}='{names.get(role, role)}[:{count}]'" for role, count in rows.items()]
    evaluate_here(models_dir, *settings, f"output_dir={tmp_path}/1")
    words = ["-cn=evaluate", *settings, f"models_dir={models_dir}", f"output_dir={tmp_path}/2"]
    done = run_in_processes(ROOT / "evaluation" / "main.py", words, 2)
    assert done.returncode == 0, done.stdout + done.stderr

    one, two = (read(tmp_path / processes / "result.json") for processes in "12")
    assert 0.01 < one["scores"]["depth/uds"] < 0.99
    assert one["counts"]["rougeL_recall/retain"] == 21 and one["scores"]["tofu/forget_quality"] is not None
    assert one["scores"] == pytest.approx(two["scores"], rel=1e-4, abs=1e-5)
    for key in ("counts", "left_out", "higher_is_better", "notes"):
        assert one[key] == two[key]
    for name in ("samples.jsonl", "generations.jsonl"):
        assert (tmp_path / "1" / name).read_text() == (tmp_path / "2" / name).read_text()


def test_text_from_the_data_stays_text_in_a_report(tmp_path):
    texts = ("Who?\n# Heading", "a | <img src=x> `code`", "![x](http://host/y.png)\n\n- item **bold** _it_ a_b")
    row = dict(zip(("question", "reference", "answer"), texts, strict=True), split="forget", index=0)
    write_json_lines(tmp_path / "generations.jsonl", [row])
    assert examples(tmp_path, "forget", "forgotten").splitlines()[1:] == [
        "**Who? # Heading**",
        "",
        r"- truth: a \| \<img src=x\> \`code\`",
        r"- after: !\[x\](http://host/y.png) - item \*\*bold\*\* \_it\_ a_b",
    ]
    scores = dict.fromkeys(("unlearn_quality", "utility", "rougeL_recall/forget", "rougeL_recall/retain"), 1.0)
    table = headline_table({"a|b": {"scores": scores | {"forget_answers_empty": 0.0}, "seconds": {}}})
    assert r"| a\|b | 1.0 |" in table
