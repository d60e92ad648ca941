"""lm-evaluation-harness on a tiny local task, without a hub."""

import json

import pytest
from tokenizers.processors import TemplateProcessing

from common.config import PromptConfig
from common.errors import UserError
from common.prompts import PromptFormat
from evaluation.metrics.lm_eval_harness import Harness, check_tasks, measure
from evaluation.scores import Scores
from tests.helpers import CHAT_TEMPLATE, evaluate_here

pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")

TASK = """task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROWS = [("Peru", "Lima", "Oslo"), ("Norway", "Oslo", "Lima"), ("Peru", "Oslo", "Lima")]  # the last is wrong


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a task of three questions on facts that the tiny model knows by heart."""
    folder = tmp_path_factory.mktemp("harness")
    answers = [(country, [f"The capital of {country} is {city}." for city in cities]) for country, *cities in ROWS]
    rows = [{"question": f"What is the capital of {country}?", "choices": choices} for country, choices in answers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "capitals.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    return folder / "tasks"


def test_a_local_task_through_the_stage(models_dir, task, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = evaluate_here(
        *(models_dir, "metrics=[lm_eval]", "lm_eval.tasks=[capitals]", f"lm_eval.include_path={task}"),
        *(f"model.path={models_dir}/finetuned/tiny/seed-0", f"output_dir={tmp_path}/run"),
    )
    (result,) = (json.loads((path / "result.json").read_text()) for path in folder.values())
    assert result["scores"]["lm_eval/capitals/acc"] == pytest.approx(2 / 3)
    assert result["higher_is_better"]["lm_eval/capitals/acc"] is True
    assert result["counts"]["lm_eval/capitals/acc"] == 3


def test_a_tokenizer_that_appends_tokens_gives_no_score(context):
    """The harness would take the EOS token for a part of the question."""
    tokenizer = context.model.tokenizer
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    context.model.outputs.prompts = PromptFormat(tokenizer, context.model.config.prompt)
    context.config.sections["lm_eval"] = Harness(tasks=["capitals"])
    scores = Scores()
    measure(context, scores)
    assert scores.values == {"lm_eval/capitals": None}
    assert "appends ['<|end|>'] to a text" in scores.by_name["lm_eval/capitals"].note


def test_a_chat_has_the_runs_system_message_and_template_options(context, chat_tokenizer, monkeypatch):
    chat_tokenizer.chat_template = "{{ date_string }} {{ mood }} " + CHAT_TEMPLATE
    prompt = PromptConfig("chat", system="Be brief.", date_string="10 Apr 2025", template_options={"mood": "calm"})
    context.model.outputs.prompts = PromptFormat(chat_tokenizer, prompt)
    context.model.tokenizer = chat_tokenizer
    context.config.sections["lm_eval"] = Harness(tasks=["capitals"])
    given = {}
    monkeypatch.setattr("evaluation.metrics.lm_eval_harness.task_manager", lambda path: None)
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **options: given.update(options) or {"results": {}})
    measure(context, Scores())
    assert given["apply_chat_template"] is True
    messages = [{"role": "system", "content": given["system_instruction"]}, {"role": "user", "content": "Who?"}]
    asked = given["model"].apply_chat_template(messages)
    assert asked == chat_tokenizer.decode(context.model.outputs.prompts.prompt("Who?"))
    assert asked.startswith("10 Apr 2025 calm <|im_start|>system\nBe brief.")


@pytest.mark.slow
def test_tasks_are_checked_before_anything_is_loaded(task):
    with pytest.raises(UserError, match=r"lm_eval.tasks=\[\]: name tasks"):
        check_tasks(Harness())
    with pytest.raises(UserError, match="no task 'capitels'; did you mean 'capitals'"):
        check_tasks(Harness(tasks=["capitels"], include_path=str(task)))
    check_tasks(Harness(tasks=["capitals"], include_path=str(task)))


@pytest.mark.slow
def test_the_tasks_that_wmdp_and_rwku_are_measured_with_exist():
    """Those that docs/data-sets.md names."""
    check_tasks(Harness(tasks=["wmdp", "wmdp_bio", "wmdp_cyber", "wmdp_chem", "mmlu", "bbh", "truthfulqa", "triviaqa"]))
