"""General benchmarks through EleutherAI's lm-evaluation-harness, an optional extra (requirements-eval.txt).

Scores:
    lm_eval/* (as the task defines): every numeric metric of each named task. Not shown: what was forgotten.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from pydantic import Field, PositiveInt

from common.config import RunConfig, problem_list, section
from common.data import Row
from common.errors import UserError, did_you_mean
from evaluation.context import EvaluationContext
from evaluation.scores import Missing, Scores


@section
class Harness:
    tasks: list[str] = Field(default_factory=list)
    """Names of tasks or groups of tasks."""
    include_path: str | None = None
    """Folder with your own task files."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; null: each task's default."""
    limit: int | None = Field(None, gt=0)
    """Questions per task; null: all."""
    batch_size: PositiveInt = 16
    """Rows in a batch."""


def check_inputs(config: RunConfig, rows: dict[str, list[Row]]) -> None:
    check_tasks(config.sections["lm_eval"])


def check_tasks(settings: Harness) -> None:
    """Check the tasks before anything is loaded.

    Raises:
        UserError: when the extra is not installed, no task is named, or a task is unknown.
    """
    if find_spec("lm_eval") is None:
        raise UserError("metrics: lm_eval is not installed; pip install -r requirements-eval.txt")
    if not settings.tasks:
        raise UserError("lm_eval.tasks=[]: name tasks, as in lm_eval.tasks=[arc_challenge,mmlu]")
    known = task_manager(settings.include_path).all_tasks
    if unknown := [task for task in settings.tasks if task not in known]:
        problems = [f"lm_eval.tasks: no task {name!r}{did_you_mean(name, known)}" for name in unknown]
        raise UserError(problem_list(problems))


@lru_cache
def task_manager(include_path: str | None) -> Any:
    """The harness's index of its own tasks and of those in `include_path`; building it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Every numeric metric of every task, as lm_eval/<task>/<metric>."""
    settings: Harness = context.config.sections["lm_eval"]
    with scores.null_if_missing(dict.fromkeys(f"lm_eval/{task}" for task in settings.tasks)):
        if appended := context.outputs.prompts.special_tokens[1]:
            names = context.model.tokenizer.convert_ids_to_tokens(appended)
            raise Missing(f"the tokenizer appends {names} to a text, and the harness would put them before the answers")
        _measure(context, settings, scores)


def _measure(context: EvaluationContext, settings: Harness, scores: Scores) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    prompts = context.outputs.prompts
    is_chat = prompts.config.style == "chat"
    model = HFLM(
        pretrained=context.outputs.load(),
        tokenizer=context.model.tokenizer,
        batch_size=settings.batch_size,
        chat_template_args=prompts.template_variables if is_chat else None,
    )
    output = simple_evaluate(
        model=model,
        tasks=settings.tasks,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=task_manager(settings.include_path),
        apply_chat_template=is_chat,
        system_instruction=prompts.config.system if is_chat else None,
        random_seed=context.config.seed,
        bootstrap_iters=0,
    )
    for task, metrics in output["results"].items():
        rows = output["n-samples"].get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, comma, how = key.partition(",")
            if comma and isinstance(value, float | int) and not metric.endswith("_stderr"):
                name = f"lm_eval/{task}/{metric}" + (f"/{how}" if how != "none" else "")
                better = output["higher_is_better"][task].get(metric)
                scores.add(name, float(value), better, count=rows)
