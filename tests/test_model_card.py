"""The model card beside saved weights: its head, what it shows, and what it must not hold."""

import json
from types import SimpleNamespace

import pytest
from gguf import GGUFWriter
from huggingface_hub import ModelCard, metadata_load

from common.command import command_line
from common.files import CONFIGS, write_json
from common.redaction import without_local_paths
from evaluation.model_card import base_model_id, card_data, dotted, license_of, origins, write_model_card
from evaluation.tables import as_text
from scripts.convert_gguf import model_card
from tests.helpers import TOKEN, run_stage

SCORES = {
    "unlearn_quality": 90.0,
    "utility": 95.0,
    "rougeL_recall/forget": 0.1,
    "rougeL_recall/retain": 0.9,
    "forget_answers_empty": 0.0,
}


def result(start=None, data="locuslab/TOFU", **config):
    config = {
        "seed": 3,
        "model": {"path": "owner/base", "prompt": {"style": "plain", "answer": " {answer}"}},
        "data": {"path": data, "splits": {"train": "full", "forget": "forget10", "retain": "retain90"}},
        "method": {"_target_": "unlearning.pmc.PMC", "num_samples": 5},
        "training": {"learning_rate": 1e-5},
        **config,
    }
    measured = {"scores": SCORES, "seconds": {"unlearning": 60.0}, "versions": {"torch": "2"}, "git_commit": None}
    return {**measured, "started_from": start, "config": config}


def run(folder, start=None, **more):
    folder.mkdir(parents=True)
    write_json(folder / "result.json", result(start, **more))
    return folder


def card_of(folder, start=None, stage="unlearning"):
    write_model_card(folder, stage, start)
    return ModelCard.load(folder / "README.md")


# --- the head ---


def test_the_head_is_that_of_the_hub(tmp_path):
    run(tmp_path / "finetuned", "owner/base")
    folder = run(tmp_path / "unlearned", "../finetuned")
    data = card_of(folder, str(tmp_path / "finetuned")).data.to_dict()
    assert data == {
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "datasets": ["locuslab/TOFU"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["machine-unlearning", "arxiv:2507.04219"],
    }
    assert metadata_load(folder / "README.md") == data


def test_an_adapter_is_marked_and_says_what_loads_it(tmp_path):
    folder = run(tmp_path / "run")
    assert "peft" not in card_of(folder, "owner/base").text
    (folder / "adapter_config.json").write_text("{}")
    card = card_of(folder, "owner/base")
    assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")
    assert "pip install peft" in card.text


def test_what_is_not_known_is_left_out(tmp_path):
    config = result(data=str(tmp_path))["config"]
    del config["method"]
    head = card_data(config, "finetuning", str(tmp_path), is_adapter=False).to_dict()
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation"}


def test_the_base_model_is_found_through_the_runs_in_between(tmp_path):
    first = run(tmp_path / "first", "owner/base")
    second = run(tmp_path / "second", "../first")
    assert origins(str(second)) == [str(second), str(first), "owner/base"]
    assert base_model_id(str(second)) == "owner/base"
    assert base_model_id(str(run(tmp_path / "new"))) is None
    assert base_model_id(str(run(tmp_path / "moved", "../../models/gone"))) is None
    assert base_model_id(None) is None
    circle = run(tmp_path / "circle", "../circle")
    assert origins(str(circle)) == [str(circle)]


def test_a_result_that_cannot_be_read_ends_the_search_and_not_the_run(tmp_path):
    first = run(tmp_path / "first", "owner/base")
    second = run(tmp_path / "second", "../first")
    (first / "result.json").write_text("{")
    assert origins(str(second)) == [str(second), str(first)]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("README.md", "---\nlicense: mit\n---\n", {"license": "mit"}),
        (
            "README.md",
            "---\nlicense: other\nlicense_name: x\nlicense_link: https://x.y\n---\n",
            {"license": "other", "license_name": "x", "license_link": "https://x.y"},
        ),
        ("config.json", '{"license": "apache-2.0"}', {"license": "apache-2.0"}),
        ("README.md", "# no head\n", {}),
        ("README.md", "---\nlicense: [a, b\n---\n", {}),
        ("README.md", "---\nlicense: 5\n---\n", {}),
        ("README.md", b"---\nlicense: \xff\n---\n", {}),
        ("config.json", "[]", {}),
        ("config.json", "{", {}),
    ],
)
def test_a_license_is_read_and_never_guessed(name, text, found, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert license_of(str(run(tmp_path / "run", "../base"))) == found


def test_a_license_of_a_hub_model_is_read_from_the_cache(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    cached = {("owner/base", "README.md"): str(tmp_path / "README.md")}
    monkeypatch.setattr("evaluation.model_card.try_to_load_from_cache", lambda *key: cached.get(key))
    assert license_of("owner/base") == {"license": "gemma"}
    assert license_of("owner/other") == {}


# --- the text ---


def test_the_text_has_scores_limits_loading_and_settings(tmp_path):
    text = card_of(run(tmp_path / "run"), "owner/base").text
    assert "# owner/base, unlearned with PMC" in text
    assert "forget10 of the data set locuslab/TOFU" in text
    assert "| PMC | 90.0 | 95.0 | 0.10 | 0.90 | 0% | 1.0 |" in text
    assert text.count("not show") >= 3
    assert "AutoModelForCausalLM.from_pretrained(path)" in text
    assert "| method.num_samples | 5 |" in text and "| seed | 3 |" in text
    assert '| model.prompt.answer | " {answer}" |' in text
    assert "## Command" not in text, "not run by a command"
    finetuned = card_of(run(tmp_path / "other"), None, "finetuning").text
    assert "# Finetuned" in finetuned and "the split full" in finetuned and "forget10" not in finetuned.split("##")[0]


def test_results_of_the_models_before_are_in_the_table(tmp_path):
    folder = run(tmp_path / "run")
    run(folder / "finetuned")
    assert "| start (PMC) | 90.0" in card_of(folder).text, "an unlearned model that was unlearned further"
    finetuned = json.loads((folder / "finetuned" / "result.json").read_text())
    del finetuned["config"]["method"]
    write_json(folder / "finetuned" / "result.json", finetuned)
    assert "| finetuned | 90.0" in card_of(folder).text


def test_text_of_others_is_escaped_and_no_path_or_secret_is_shown(tmp_path):
    bad = "a | <script> `x` [y](z)\n# Title\n---\nlicense: mit"
    folder = run(
        tmp_path / "run", data=f"{tmp_path}/My Data", training={"run_name": bad, "deepspeed": "/etc/x/ds.json"}
    )
    card = card_of(folder, str(tmp_path / "base"))
    assert str(tmp_path) not in card.content and "/etc/x" not in card.content and "My Data" not in card.content
    assert as_text(json.dumps(bad)[1:-1]) in card.text
    assert "<script>" not in card.text.replace("\\<script\\>", "") and "\n# Title" not in card.text
    assert "license" not in card.data.to_dict() and "datasets" not in card.data.to_dict()
    assert card.text.count("| data.path | FOLDER |") == 1


def hydra_of(*words, folder=CONFIGS, recipe="PMC-unlearn-tiny"):
    source = SimpleNamespace(schema="file", path=str(folder))
    return SimpleNamespace(
        job=SimpleNamespace(config_name=recipe),
        runtime=SimpleNamespace(config_sources=[source, SimpleNamespace(schema="structured", path="")]),
        overrides=SimpleNamespace(task=list(words)),
    )


def test_the_command_has_no_place_of_this_machine(tmp_path):
    words = ["++method.num_samples=2", "seed=1", f"models_dir={tmp_path}/m", "overwrite=true", "++new=1"]
    words += [f"finetuned={tmp_path}/m/finetuned/tiny/seed-1", f"data.path={tmp_path}/d", "++training.push_to_hub=true"]
    words += ["++model.lora={r:4,alpha:8}", f"++training.run_name={TOKEN}"]
    shown = command_line("unlearning", hydra_of(*words), f"{tmp_path}/m")
    assert shown == (
        "python unlearning/main.py -cd=configs -cn=PMC-unlearn-tiny method.num_samples=2 seed=1 ++new=1 "
        "finetuned=models/finetuned/tiny/seed-1 data.path=FOLDER 'model.lora={r:4,alpha:8}' 'training.run_name=***'"
    )


def test_a_recipe_from_elsewhere_is_not_said_to_be_ours(tmp_path):
    (tmp_path / "mine.yaml").write_text("{}")
    assert "-cd=FOLDER -cn=mine" in command_line("finetuning", hydra_of(folder=tmp_path, recipe="mine"), "/m")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("/home/ann/My Data/x", "FOLDER"),
        ("~/x", "FOLDER"),
        ("file:///a/b", "FOLDER"),
        ("see /a/b/c.json, and /d/e", "see FOLDER, and FOLDER"),
        ("{path:/a/b,x:1}", "{path:FOLDER,x:1}"),
        ("https://a.b/c/d", "https://a.b/c/d"),
        ("models/a/b", "models/a/b"),
        ("./data/tiny", "./data/tiny"),
        ("../../a/b", "../../a/b"),
        ("/no_think", "/no_think"),
        ("owner/name", "owner/name"),
        (0.5, 0.5),
    ],
)
def test_paths_of_this_machine_are_masked(text, masked):
    assert without_local_paths([{"a": text}]) == [{"a": masked}]


def test_settings_are_dotted():
    assert dotted({"a": {"b": 1, "c": None}, "d": " x"}) == {"a.b": "1", "a.c": "null", "d": '" x"'}


def test_the_card_of_a_converted_model_has_the_license_of_the_gguf_file(tmp_path):
    for name, license in (("a_b.gguf", "apache-2.0"), ("none.gguf", None)):
        writer = GGUFWriter(tmp_path / name, "llama")
        if license:
            writer.add_license(license)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert model_card(tmp_path / "a_b.gguf").data.to_dict() == {**head, "license": "apache-2.0"}
    assert model_card(tmp_path / "none.gguf").data.to_dict() == head
    assert str(tmp_path) not in model_card(tmp_path / "a_b.gguf").content


# --- by the stages ---


@pytest.mark.slow
def test_a_repeated_run_replaces_the_card_and_keeps_the_old_one_with_the_old_result(models_dir, tmp_path):
    words = ["-cn=tiny", f"models_dir={models_dir}", f"output_dir={tmp_path}/run", "evaluation.start=false"]
    run_stage("finetuning", *words, "training.num_epochs=1")
    card = tmp_path / "run/README.md"
    first = card.read_text()
    assert "finetuning/main.py -cd=configs -cn=tiny" in first and "training.num_epochs=1" in first
    run_stage("finetuning", *words, "training.num_epochs=2")
    (aside,) = (tmp_path / "run/previous").iterdir()
    assert (aside / "README.md").read_text() == first
    assert "training.num_epochs=2" in card.read_text()
    assert str(tmp_path) not in card.read_text() and str(models_dir) not in card.read_text()
    run_stage("finetuning", *words, "training.num_epochs=1", "save_model=false")
    assert not card.exists(), "no weights, no card"


@pytest.mark.slow
def test_the_card_of_an_adapter_is_ours_and_its_code_loads_it(models_dir, tmp_path):
    words = ["-cn=PMC-unlearn-tiny", f"models_dir={models_dir}", f"output_dir={tmp_path}/run", "model.lora={r:4}"]
    quick = ["training.num_epochs=1", "method.num_samples=2", "evaluation.start=false", "evaluation.every_epochs=0"]
    run_stage("unlearning", *words, *quick)
    card = (tmp_path / "run/README.md").read_text()
    assert "library_name: peft" in card and str(models_dir) not in card
    code = card.split("## Loading\n")[1].split("## Settings")[0]
    lines = [line[4:] for line in code.splitlines() if line.startswith("    ")]
    assert len(lines) == 5 - 1, "without the empty line"
    found = {}
    exec("\n".join(lines).replace('path = "."', f"path = {str(tmp_path / 'run')!r}"), found)
    assert found["model"].num_parameters() > 1e5 and len(found["tokenizer"]) > 100
