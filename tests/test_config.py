"""Every YAML file composes and is accepted, is commented, holds the published numbers; wrong values are refused."""

import copy
import dataclasses
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeFloat, PositiveInt
from pydantic.fields import FieldInfo

from benchmarks.worker import BenchmarkSettings
from common.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    StageConfig,
    fields_of,
    read_config,
    section,
)
from common.errors import UserError
from common.files import CONFIGS, ROOT
from evaluation.chat import ChatSettings, read_chat
from evaluation.inputs import SECTIONS, fill_from_run, read_evaluation
from evaluation.metrics.registry import METRIC_GROUPS
from scripts.compare_methods import words_of
from unlearning.main import method_class
from unlearning.trainer import MethodSettings, UnlearningTrainer

COMPARISONS = sorted(f"compare/{path.stem}" for path in CONFIGS.glob("compare/*.yaml"))
BENCHMARKS = sorted(f"benchmark/{path.stem}" for path in CONFIGS.glob("benchmark/*.yaml") if path.stem != "default")
STAGES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "run")
RECIPES = STAGES + BENCHMARKS
GROUPS = ("model", "data", "method", "evaluation")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
TEXTS = ("tiny-text", "muse-news", "muse-books", "wmdp")  # data sets whose prompts need the running text
MADE_BY = {
    "model": {"prompt": {"style": "plain"}},
    "evaluation": {"bf16": False},
    "data": {"path": "data/tiny", "splits": {"forget": "forget"}, "columns": {"question": "q", "answer": "a"}},
}


@pytest.fixture(autouse=True)
def configs(monkeypatch):
    """Make `compose` read configs/ as a stage does."""
    monkeypatch.setenv("PMC_ROOT", str(ROOT))
    with initialize_config_dir(str(CONFIGS), version_base=None):
        yield


@functools.cache
def compose_once(recipe: str, overrides: tuple[str, ...]) -> DictConfig:
    return hydra.compose(recipe, list(overrides))


def compose(recipe: str, overrides: list[str] | None = None) -> DictConfig:
    """Hydra's `compose`; a recipe that several tests read is composed once, which takes most of their time."""
    return copy.deepcopy(compose_once(recipe, tuple(overrides or ())))


def composed(recipe: str, *overrides: str) -> DictConfig:
    """The recipe as its stage sees it."""
    if not recipe.startswith(("evaluate", "chat")):
        return compose(recipe, list(overrides))
    named = ["before=some/hub-id", "after=some/hub-id"] if recipe == "chat" else ["model.path=models/some/run"]
    cfg = compose(recipe, [*named, *overrides])
    fill_from_run(cfg, MADE_BY)
    return cfg


def read(recipe: str, *overrides: str) -> RunConfig:
    cfg = composed(recipe, *overrides)
    if "method" in cfg:
        return read_config(cfg, method_class(cfg).Settings, also=("finetuned", "benchmark"))
    if recipe == "chat":
        return read_chat(cfg, "before")
    return read_evaluation(cfg) if recipe.startswith("evaluate") else read_config(cfg)


def error_of(recipe: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read(recipe, *overrides)
    return str(caught.value)


# --- the files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_accepted(recipe):
    config = read(recipe)
    assert (config.seed, config.overwrite, config.output_dir) == (0, False, None)
    assert config.models_dir == str(ROOT / "models")
    assert (config.settings is not None) == (recipe.startswith(("PMC-", "unlearn", "benchmark")))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", COMPARISONS)
def test_every_run_of_a_comparison_is_accepted(recipe):
    comparison = compose(recipe).comparison
    names = set()
    for words in comparison.methods.values():
        (name, *own) = words_of(words.removeprefix("-cn="), seed=0)
        overrides = [*words_of(comparison.get("unlearning", ""), seed=0), *own]
        config = read(
            name, *(f"++{override}" if override.startswith("method.") else override for override in overrides)
        )
        names.add(type(config.settings).__name__ if name.startswith("PMC") else own[0])
        finetuning = f"finetuning -cn={Path(compose(name).finetuned).parent.name}"
        assert any(words_of(stage, seed=0)[:2] == finetuning.split() for stage in comparison.before)
    if recipe in ("compare/tiny", "compare/smollm2-cpu"):
        assert len(names) == len(list((CONFIGS / "method").glob("*.yaml"))), "every method once"
    assert set(comparison.metrics) <= set(METRIC_GROUPS)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_group_file_can_be_chosen(group, choice):
    recipe = "evaluate" if choice == "from_run" else "unlearn"
    bare = ["model.prompt.question='{question}'", "model.prompt.answer=' {answer}'"] if choice in TEXTS else []
    config = read(recipe, f"{group}={choice}", *bare)
    file = OmegaConf.load(CONFIGS / group / f"{choice}.yaml")
    section = {"method": config.settings}.get(group) or getattr(config, group)
    values = {key: value for key, value in OmegaConf.to_container(file).items() if key != "_target_" and value != "???"}
    same = [
        getattr(section, key) == value
        for key, value in values.items()
        if isinstance(value, int | float | str) and "${" not in str(value)
    ]
    assert all(same)
    assert same or choice in ("from_run", "tofu-small", "tofu-forget05", "grad_ascent", "retain_finetuning")


@pytest.mark.parametrize("recipe", ["unlearn-muse-news", "PMC-unlearn-muse-news"])
def test_a_recipe_of_muse_starts_from_muse_s_checkpoint(recipe):
    assert compose(recipe).finetuned == "muse-bench/MUSE-news_target"  # without a tokenizer of its own
    assert compose(recipe).model.tokenizer == compose(recipe).model.path


@pytest.mark.parametrize(
    "recipe", [name for name in RECIPES if name.startswith(("PMC-", "unlearn-")) and not name.endswith("muse-news")]
)
def test_unlearning_recipe_names_a_finetuning_recipe_of_the_same_model_and_data(recipe):
    cfg = compose(recipe)
    path = Path(compose(recipe, ["models_dir=/m", "seed=3"]).finetuned)
    assert path == Path("/m/finetuned") / path.parent.name / "seed-3"
    finetuning = compose(path.parent.name)
    data, trained_on = (OmegaConf.to_container(node, resolve=True) for node in (cfg.data, finetuning.data))
    data["splits"]["train"] = trained_on["splits"]["train"]  # of no use to unlearning
    assert data == trained_on
    assert cfg.model.path == finetuning.model.path
    assert cfg.model.prompt == finetuning.model.prompt
    assert cfg.model.get("lora") == finetuning.model.get("lora")


@pytest.mark.parametrize("choice", [choice for group, choice in CHOICES if group == "method"])
def test_method_and_reward_exist(choice):
    cfg = compose("unlearn", [f"method={choice}"])
    assert issubclass(method_class(cfg), UnlearningTrainer)
    if "reward" in cfg.method:
        assert callable(hydra.utils.get_method(cfg.method.reward._target_))


@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] in ("method", "evaluation")])
def test_group_file_and_dataclass_have_the_same_keys(group, choice):
    file = OmegaConf.load(CONFIGS / group / f"{choice}.yaml")
    schema = (
        EvaluationConfig if group == "evaluation" else method_class(compose("unlearn", [f"method={choice}"])).Settings
    )
    assert set(file) - {"_target_"} == {field.name for field in dataclasses.fields(schema)}


@pytest.mark.parametrize(("section", "schema"), SECTIONS.items())
def test_section_of_evaluation_and_dataclass_have_the_same_keys_and_values(section, schema):
    in_file = OmegaConf.to_container(OmegaConf.load(CONFIGS / "evaluate.yaml")[section])
    in_file = {key: float(value) if value == "1e-5" else value for key, value in in_file.items()}
    assert in_file == dataclasses.asdict(schema())


def test_code_that_comes_with_weights_is_not_run_by_default():
    assert ModelConfig(path="x", prompt=PromptConfig("plain")).trust_remote_code is False
    assert not [path for path in CONFIGS.rglob("*.yaml") if "trust_remote_code: true" in path.read_text().lower()]


def uncommented(path: Path) -> list[str]:
    """Keys with a value that have a comment neither on their line nor on the line of a section that they are in.

    The line of `training` does not speak for its keys.
    """
    missing, sections = [], []  # sections: (indent, commented) of those that are open
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = re.match(r"^( *)([\w.-]+):(.*)$", line)
        if not match or line.startswith("defaults:"):
            continue
        indent, key, rest = len(match[1]), match[2], match[3]
        sections = [section for section in sections if section[0] < indent]
        commented = " # " in rest
        if not rest.partition(" #")[0].strip():
            sections.append((indent, commented and key != "training"))
        elif not commented and not any(spoken_for for _, spoken_for in sections):
            missing.append(f"{path.relative_to(CONFIGS)}:{number}: {key}")
    return missing


# Recipes only override keys that are commented where they come from; pretrain-tiny has keys of its own.
COMMENTED = [
    "finetune.yaml",
    "unlearn.yaml",
    "evaluate.yaml",
    "chat.yaml",
    "run.yaml",
    *(f"{group}/{choice}.yaml" for group, choice in CHOICES),
]
PARTS = (
    "data/tofu-small.yaml",
    "data/tofu-forget05.yaml",
    "data/lume-cpu.yaml",
)  # their keys are commented in what they inherit


@pytest.mark.parametrize("file", [file for file in COMMENTED if file not in PARTS])
def test_every_key_is_commented(file):
    assert uncommented(CONFIGS / file) == []


def comments_of(path: Path) -> dict[str, str]:
    """Dotted key -> its comment, with the lines that continue it."""
    found, stack, last = {}, [], None
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"^( *)([\w.-]+):.*?(?: # (.*))?$", line):
            stack = [*(entry for entry in stack if entry[0] < len(match[1])), (len(match[1]), match[2])]
            last = ".".join(key for _, key in stack) if match[3] else None
            if last:
                found[last] = match[3]
        elif last and (more := re.match(r"^ {20,}# (.*)$", line)):
            found[last] += f" {more[1]}"
    return found


def described(file: str) -> list[tuple[str, str, str]]:
    """Key, comment and the schema's description, for the keys of a file in configs/ that have both."""
    group, _, choice = file.removesuffix(".yaml").rpartition("/")
    schema = {"model": ModelConfig, "data": DataConfig, "evaluation": EvaluationConfig}.get(group)
    if group == "method":
        schema = method_class(compose("unlearn", [f"method={choice}"])).Settings
    sections = {**SECTIONS, "benchmark": BenchmarkSettings}.items()
    top_level = (
        fields_of(StageConfig)
        | fields_of(ChatSettings)
        | {name: FieldInfo.from_annotation(kind) for name, kind in sections}
    )
    found = []
    for key, comment in comments_of(CONFIGS / file).items():
        hint, field = schema, None
        for part in key.split("."):
            field = ((fields_of(hint) or {}) if hint else top_level).get(part)
            hint = field.annotation if field else str
        if field and field.description:
            found.append((key, comment, field.description))
    return found


@pytest.mark.parametrize("file", [file for file in (*COMMENTED, "benchmark/default.yaml") if file not in PARTS])
def test_a_comment_begins_with_the_key_s_description(file):
    pairs = described(file)
    as_comments = [(key, f"{comment};", f"{text.removesuffix('.')};") for key, comment, text in pairs]
    assert [key for key, comment, text in as_comments if not comment.lower().startswith(text.lower())] == []
    assert pairs or file in (
        "finetune.yaml",
        "unlearn.yaml",
        "method/grad_ascent.yaml",
        "method/retain_finetuning.yaml",
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_commands_and_groups_that_comments_name_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"-cn=(\S+)", text):
        assert name in RECIPES + COMPARISONS, name
    for group, choice in re.findall(r"\b([a-z]+(?:/[a-z]+)*)=([\w-]+)\b", "\n".join(re.findall(r"#.*", text))):
        if group.split("/")[0] in GROUPS:
            assert (CONFIGS / group / f"{choice}.yaml").is_file(), f"{group}={choice}"


# --- the published numbers ----------------------------------------------------------------------------------------------

UNLEARNING = {  # lambda, top_p, temperature, num_samples, num_epochs, min_len, batch, accumulation, learning rate
    "PMC-unlearn-phi": (1.5, 0.95, 1.25, 5, 40, 0, 16, 4, 1e-5),
    "PMC-unlearn-llama3": (1.25, 0.95, 0.9, 20, 30, 0, 8, 2, 1e-5),
}
FINETUNING = {  # num_epochs, weight decay, learning rate, batch, accumulation, gradient checkpointing
    "phi": (5, 0.01, 2e-5, 16, 2, False),
    "llama3": (5, 0.01, 1e-5, 8, 2, True),
}


@pytest.mark.parametrize("recipe", UNLEARNING)
def test_published_unlearning_hyperparameters(recipe):
    config = read(recipe)
    s, t = config.settings, config.training
    batch = (t["per_device_train_batch_size"], t["gradient_accumulation_steps"])
    sampling = (s.lambda_unlearning, s.top_p, s.temperature, s.num_samples)
    assert (*sampling, t["num_epochs"], s.min_len, *batch, t["learning_rate"]) == UNLEARNING[recipe]
    assert (s.top_k, s.max_length) == (50, 200)
    schedule = (t["warmup_epochs"], t["weight_decay"], t["lr_scheduler_type"], t["num_train_epochs"])
    assert schedule == (1, 0.01, "linear", t["num_epochs"])
    assert (config.data.path, config.data.splits["forget"], config.data.splits["retain"]) == (
        *("locuslab/TOFU", "forget10", "retain90"),
    )


@pytest.mark.parametrize("recipe", FINETUNING)
def test_published_finetuning_hyperparameters(recipe):
    config = read(recipe)
    t = config.training
    batch = (t["per_device_train_batch_size"], t["gradient_accumulation_steps"])
    found = (t["num_epochs"], t["weight_decay"], t["learning_rate"], *batch, t.get("gradient_checkpointing", False))
    assert found == FINETUNING[recipe]
    assert (config.data.splits["train"], config.data.max_length, t["num_train_epochs"]) == ("full", 256, 5)
    assert (config.model.dtype, config.model.lora) == ("float32", None)


@pytest.mark.parametrize("stage", ["", "PMC-unlearn-"])
def test_published_prompts(stage):
    phi, llama = read(f"{stage}phi").model, read(f"{stage}llama3").model
    assert (phi.path, llama.path) == ("microsoft/phi-1_5", "meta-llama/Llama-3.2-3B-Instruct")
    assert phi.prompt == PromptConfig(style="plain", question="Question: {question}\n", answer="Answer: {answer}")
    assert llama.prompt == PromptConfig("chat", "You are a helpful assistant.", "10 Apr 2025")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.endswith("muse-news")])  # windows of a text
def test_answers_are_evaluated_up_to_the_published_length(recipe):
    evaluation = read(recipe).evaluation
    assert (evaluation.max_length, evaluation.full_eval) == (200, False)


@pytest.mark.parametrize("recipe", ["PMC-unlearn-tiny", "PMC-unlearn-smollm2", "PMC-unlearn-smollm2-cpu"])
def test_small_recipes_make_short_answers_score_worse(recipe):
    assert read(recipe).settings.min_len > 0


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.num_samples=0", "method.num_samples=0: expected int, more than 0"),
        ("method.max_length=0", "method.max_length=0: expected int, more than 0"),
        ("method.sampling_batch_size=0", "method.sampling_batch_size=0: expected int or null, more than 0"),
        ("method.lambda_unlearning=-1", "method.lambda_unlearning=-1: expected float, at least 0"),
        ("method.temperature=-0.5", "method.temperature=-0.5: expected float, at least 0"),
        ("method.top_k=-1", "method.top_k=-1: expected int, at least 0"),
        ("method.min_len=-1", "method.min_len=-1: expected int, at least 0"),
        ("method.top_p=0", "method.top_p=0: expected float, more than 0, at most 1"),
        ("method.top_p=1.01", "method.top_p=1.01: expected float, more than 0, at most 1"),
        ("method.temperature=0", "method.temperature=0: all 5 samples would be the same greedy answer; expected more"),
        ("model.dtype=int8", "model.dtype=int8: expected float32 or bfloat16 or float16"),
        ("model.path=null", "model.path=None: expected a hub id or a folder"),
        ("~model.path", "model.path: missing; give it a value"),
        ("model.prompt.style=chatty", "model.prompt.style=chatty: expected chat or plain"),
        ("model.prompt.question=Q", "model.prompt.question=Q: must contain {question}"),
        ("model.prompt.answer=A", "model.prompt.answer=A: must contain {answer}"),
        ("model.prompt.answer='{answer} END'", "model.prompt.answer={answer} END: must end with {answer}"),
        ("model.lora={r:0}", "model.lora.r=0: expected int, more than 0"),
        ("model.lora={alpha:0}", "model.lora.alpha=0: expected int, more than 0"),
        ("model.lora={dropout:1.0}", "model.lora.dropout=1.0: expected float, at least 0, less than 1"),
        ("+model.new={architecture:llama,vocab_size:10}", "model.new.vocab_size=10: expected int, at least 300"),
        ("data.max_length=1", "data.max_length=1: expected int, at least 2"),
        ("~data.columns.answer", "data.columns.answer: missing"),
        ("evaluation.batch_size=0", "evaluation.batch_size=0: expected int or null, more than 0"),
        ("evaluation.max_length=0", "evaluation.max_length=0: expected int, more than 0"),
        ("evaluation.every_epochs=-1", "evaluation.every_epochs=-1: expected int, at least 0"),
        ("training.num_epochs=0", "training.num_epochs=0: expected float, more than 0"),
        ("training.learning_rate=0", "training.learning_rate=0: expected float, more than 0"),
        ("training.warmup_epochs=-1", "training.warmup_epochs=-1: expected float, at least 0"),
        ("training.gradient_accumulation_steps=0", "training.gradient_accumulation_steps=0: expected int, more than 0"),
        ("training.per_device_train_batch_size=0", "training.per_device_train_batch_size=0: expected int, more than 0"),
        ("seed=-1", "seed=-1: expected"),
    ],
)
def test_a_value_out_of_range_is_refused(override, message):
    assert message in error_of("unlearn", override)


@pytest.mark.parametrize(
    "override", ["method.temperature=0.01", "method.top_p=1", "method.top_k=0", "method.min_len=3"]
)
def test_a_value_at_the_edge_is_accepted(override):
    assert read("unlearn", override)


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("npo", "method.beta=0", "method.beta=0: expected float, more than 0"),
        ("simnpo", "method.gamma=-1", "method.gamma=-1: expected float, at least 0"),
        ("satimp", "method.beta2=-1", "method.beta2=-1: expected float, at least 0"),
        ("idk", "method.refusals=none.txt", "method.refusals=none.txt: cannot be read"),
        ("dpo", "method.refusals=/dev/null", "method.refusals=/dev/null: is a device"),
        ("rmu", "method.trained='('", "method.trained=(: not a regular expression"),
        ("rmu", "method.layer=-1", "method.layer=-1: expected int or null, at least 0"),
        ("rmu", "method.steering_coeff=0", "method.steering_coeff=0: expected float, more than 0"),
        ("altpo", "method.top_p=0", "method.top_p=0: expected float, more than 0, at most 1"),
        ("altpo", "method.num_alternatives=0", "method.num_alternatives=0: expected int, more than 0"),
        ("grad_ascent", "++method.beta=1", "method.beta: no such key"),
        ("altpo", "method.max_recall=0", "method.max_recall=0: expected float, more than 0, at most 1"),
        ("pmc", "method.gamma=0", "method.gamma=0: expected float, more than 0"),
        (
            "npo",
            "method.gamma=0 method.lambda_unlearning=0",
            "method.lambda_unlearning=0: with gamma=0 nothing would be trained",
        ),
        ("pmc", "method.fluency_weight=nan", "method.fluency_weight=nan: expected finite float, at least 0"),
        ("pmc", "method.gamma=inf", "method.gamma=inf: expected finite float, more than 0"),
        (
            "pmc",
            "method.temperature=0 method.num_samples=1 method.stalled_temperature_factor=2",
            "method.stalled_temperature_factor=2: temperature=0 cannot be raised",
        ),
        ("undial", "method.beta=high", "method.beta=high: expected float"),
    ],
)
def test_a_wrong_setting_of_another_method_is_named(method, override, message):
    assert message in error_of("unlearn-tiny", f"method={method}", *override.split())


def test_greedy_sampling_is_accepted_for_one_sample():
    assert read("unlearn", "method.temperature=0", "method.num_samples=1").settings.temperature == 0


@pytest.mark.parametrize(
    ("override", "key", "kind"),
    [
        ("seed=1.5", "seed=1.5", "int"),
        ("seed=true", "seed=True", "int"),
        ("save_model=maybe", "save_model=maybe", "bool"),
        ("output_dir=5", "output_dir=5", "str or null"),
        ("method.num_samples=2.5", "method.num_samples=2.5", "int"),
        ("method.num_samples=null", "method.num_samples=None", "int"),
        ("method.temperature=true", "method.temperature=True", "float"),
        ("method.top_p=high", "method.top_p=high", "float"),
        ("model.lora={r:abc}", "model.lora.r=abc", "int"),
        ("model.lora=5", "model.lora=5", "section or null"),
        ("data.max_length=long", "data.max_length=long", "int"),
        ("data.splits=null", "data.splits=None", "section"),
        ("evaluation.full_eval=5.5", "evaluation.full_eval=5.5", "bool"),
        ("training.num_epochs=many", "training.num_epochs=many", "float"),
        ("training.bf16=maybe", "training.bf16=maybe", "false or true or auto"),
        ("training.per_device_train_batch_size=1.5", "training.per_device_train_batch_size=1.5", "int"),
        ("training.learning_rate=auto", "training.learning_rate=auto", "float"),
        ("training.num_epochs=auto", "training.num_epochs=auto", "float"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override, key, kind):
    assert re.search(re.escape(key) + ": expected " + re.escape(kind), error_of("unlearn", override))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.promt", "model.prompt"),
        ("model.prompt.sytem", "model.prompt.system"),
        ("data.colums", "data.columns"),
        ("data.columns.qestion", "data.columns.question"),
        ("data.splits.forgot", "data.splits.forget"),
        ("method.tempreture", "method.temperature"),
        ("training.lerning_rate", "training.learning_rate"),
        ("training.num_epoch", "training.num_epochs"),
        ("evaluation.bach_size", "evaluation.batch_size"),
        ("overwrit", "overwrite"),
        ("finetund", "finetuned"),
    ],
)
def test_a_mistyped_key_is_refused_with_the_closest(wrong, right):
    message = error_of("unlearn", f"+{wrong}=1")
    assert message.startswith(f"{wrong}: no such ")
    assert f"did you mean '{right}'?" in message


def test_a_renamed_key_is_refused_with_its_new_name():
    message = error_of("unlearn", "+method.prune=false")
    assert message.startswith("method.prune: no such key; did you mean 'method.early_stopping'?")


def test_a_reward_that_cannot_be_imported_is_refused_with_the_reason():
    message = error_of("unlearn", "method.reward._target_=nope.x")
    assert "method.reward={'_target_': 'nope.x'}: no such function (No module named 'nope'); the folder of a" in message


def test_a_mistyped_key_of_an_adapter_is_refused():
    assert error_of("unlearn", "model.lora={alhpa:3}").startswith(
        "model.lora.alhpa: no such key; did you mean 'model.lora.alpha'?"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+training.output_dir=x", "training.output_dir: set the top-level output_dir instead"),
        ("+training.seed=3", "training.seed: set the top-level seed instead"),
    ],
)
def test_a_training_key_that_the_stage_sets_is_refused(override, message):
    assert error_of("finetune", override) == message


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token"])
def test_a_token_in_the_configuration_is_refused_and_not_printed(key):
    message = error_of("finetune", f"+training.{key}=hf_secret")
    assert message.startswith(f"training.{key}: put the token into environment.local.env")
    assert "hf_secret" not in message


def test_other_training_arguments_pass_through_by_their_own_name():
    training = read("finetune", "+training.max_grad_norm=0.5", "+training.optim=sgd").training
    assert (training["max_grad_norm"], training["optim"]) == (0.5, "sgd")


def test_every_problem_is_reported_at_once():
    message = error_of(
        "unlearn",
        *("method.num_samples=0", "+model.promt=1", "data.max_length=x", "evaluation.batch_size=0"),
        *("training.warmup_epochs=-1", "+training.hub_token=x", "save_model=5", "+sead=1"),
    )
    lines = message.splitlines()
    assert lines[0] == "8 problems:"
    starts = ("sead:", "save_model=5", "model.promt:", "data.max_length=x", "evaluation.batch_size=0")
    starts += ("training.hub_token", "training.warmup_epochs=-1", "method.num_samples=0")
    assert all(any(line.startswith(f"  - {start}") for line in lines[1:]) for start in starts)


def test_a_key_that_does_not_fit_does_not_hide_another_of_its_section():
    message = error_of("unlearn", "method.num_samples=x", "method.top_p=2", "+method.foo=1")
    assert {line.split("=")[0].split(":")[0].strip(" -") for line in message.splitlines()[1:]} == {
        *("method.num_samples", "method.top_p", "method.foo"),
    }


# --- settings of a user's own method ------------------------------------------------------------------------------------


@section
class OwnSection(MethodSettings):
    depth: PositiveInt = 2
    """How deep."""


@dataclasses.dataclass
class OwnSubclass(MethodSettings):
    depth: PositiveInt = 2
    parts: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class OwnDataclass:
    gamma: NonNegativeFloat = 1.0
    depth: PositiveInt = 2
    lambda_unlearning: float = 1.0


@pytest.mark.parametrize("settings_class", [OwnSection, OwnSubclass, OwnDataclass])
def test_settings_of_a_user_s_own_method(settings_class):
    def read_own(**method):
        cfg = compose("unlearn-tiny")
        cfg.method = {"_target_": "own.Method", **method}
        return read_config(cfg, settings_class, also=("finetuned",)).settings

    settings = read_own(gamma=2)
    assert isinstance(settings, settings_class)
    assert (settings.gamma, settings.lambda_unlearning, settings.depth) == (2.0, 1.0, 2)
    assert dataclasses.replace(settings, depth=3).depth == 3
    with pytest.raises(UserError) as caught:
        read_own(gamma=-1, depth=0.5, dept=1)
    lines = caught.value.args[0].splitlines()[1:]
    assert any(line.startswith("  - method.gamma=-1: expected float, at least 0") for line in lines)
    assert any(line.startswith("  - method.depth=0.5: expected int, more than 0") for line in lines)
    assert any(line.startswith("  - method.dept: no such key; did you mean 'method.depth'?") for line in lines)


def test_a_subclass_keeps_the_descriptions_of_its_parent():
    fields = fields_of(OwnSection)
    assert fields["gamma"].description == fields_of(MethodSettings)["gamma"].description == "Weight of the forget loss."
    assert fields["depth"].description == "How deep."


# --- evaluation takes what is null from the run -------------------------------------------------------------------------


def test_evaluation_fills_nulls_from_the_run():
    config = read("evaluate")
    assert config.model == ModelConfig(path="models/some/run", prompt=PromptConfig(style="plain"))
    assert config.data == DataConfig(**MADE_BY["data"])


def test_evaluation_has_the_lengths_of_the_run_that_made_the_model(monkeypatch):
    known = {"data": {"max_length": 300, "hub_configurations": False}, "evaluation": {"max_length": 150}}
    monkeypatch.setitem(MADE_BY, "data", MADE_BY["data"] | known["data"])
    monkeypatch.setitem(MADE_BY, "evaluation", MADE_BY["evaluation"] | known["evaluation"])
    config = read("evaluate")
    assert (config.data.max_length, config.data.hub_configurations, config.evaluation.max_length) == (300, False, 150)
    config = read("evaluate", "evaluation.max_length=99", "data.max_length=98")
    assert (config.data.max_length, config.evaluation.max_length) == (98, 99)


def test_a_split_that_the_command_names_stands_beside_the_run_s():
    assert read("evaluate", "++data.splits.holdout=held").data.splits == {"forget": "forget", "holdout": "held"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.num_samples=0", "sampling.num_samples=0: expected int, more than 0"),
        ("sampling.temperature=0", "sampling.temperature=0: expected float, more than 0"),
        ("sampling.top_p=0", "sampling.top_p=0: expected float, more than 0, at most 1"),
        ("sampling.leak_threshold=0", "sampling.leak_threshold=0: expected float, more than 0, at most 1"),
        ("sampling.alpha=0.6", "sampling.alpha=0.6: expected float, more than 0, at most 0.5"),
        ("relearning.fraction=0", "relearning.fraction=0: expected float, more than 0, at most 1"),
        ("relearning.num_epochs=[1,0]", "relearning.num_epochs.1=0: expected int, more than 0"),
        ("relearning.num_epochs=3", "relearning.num_epochs=3: expected list"),
        ("relearning.num_epochs=[1,1]", "relearning.num_epochs=[1, 1]: expected each of them once"),
        ("relearning.rows=[]", "relearning.rows: is empty"),
        ("relearning.rows=[train]", "relearning.rows.0=train: expected forget or retain"),
        ("relearning.learning_rate=0", "relearning.learning_rate=0: expected float, more than 0"),
        ("quantization.bits=[3]", "quantization.bits.0=3: expected 8 or 4"),
        ("quantization.method=gptq", "quantization.method=gptq: expected round or bitsandbytes"),
        ("+sampling.num_sample=1", "sampling.num_sample: no such key; did you mean 'sampling.num_samples'?"),
    ],
)
def test_a_wrong_value_of_evaluation_is_refused(override, message):
    assert message in error_of("evaluate", override)


def test_evaluation_keeps_what_the_command_names():
    config = read("evaluate", "model=phi", "data=tofu", "model.path=models/some/run")
    assert (config.model.path, config.model.prompt.style) == ("models/some/run", "plain")
    assert config.data.path == "locuslab/TOFU"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("++model.prompt.answer=' A {answer}'", ("Q {question}", " A {answer}")),
        ("model.prompt={style:plain,answer:' A {answer}'}", ("Q {question}", " A {answer}")),
        ("model.prompt={style:chat}", (PromptConfig("chat").question, PromptConfig("chat").answer)),
    ],
)
def test_single_keys_of_a_prompt_are_added_to_those_of_the_run(override, expected):
    made_by = MADE_BY | {"model": {"prompt": {"style": "plain", "question": "Q {question}", "answer": "{answer}"}}}
    cfg = compose("evaluate", ["model.path=models/some/run", override])
    fill_from_run(cfg, made_by)
    prompt = read_evaluation(cfg).model.prompt
    assert (prompt.question, prompt.answer) == expected


def test_the_prompt_of_a_model_that_the_command_chose_is_its_own(monkeypatch):
    cfg = compose("evaluate", ["model=gemma3", "data=tofu", "model.path=models/some/run"])
    chosen = SimpleNamespace(runtime=SimpleNamespace(choices={"model": "gemma3"}))
    monkeypatch.setattr("evaluation.inputs.HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: chosen))
    fill_from_run(cfg, MADE_BY | {"model": {"prompt": {"style": "chat", "date_string": "10 Apr 2025"}}})
    assert read_evaluation(cfg).model.prompt == PromptConfig("chat", system="You are a helpful assistant.")


def test_evaluation_scores_the_retain_rows_that_the_run_scored():
    for made_by, expected in ((None, False), ({}, False), ({"full_eval": True}, True)):
        cfg = compose("evaluate", ["model=phi", "data=tofu", "model.path=models/some/run"])
        fill_from_run(cfg, made_by if made_by is None else MADE_BY | {"evaluation": made_by})
        assert read_evaluation(cfg).evaluation.full_eval is expected
    cfg = compose("evaluate", ["model.path=models/some/run", "evaluation.full_eval=false"])
    fill_from_run(cfg, MADE_BY | {"evaluation": {"full_eval": True}})
    assert read_evaluation(cfg).evaluation.full_eval is False


def test_evaluation_of_a_checkpoint_without_result_needs_prompt_and_data():
    cfg = compose("evaluate", ["model.path=elsewhere"])
    with pytest.raises(
        UserError, match=r"model\.prompt: not given, and elsewhere has no result\.json.*model=phi data=tofu"
    ):
        fill_from_run(cfg, None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("label_smoothing_factor=0.1", "training.label_smoothing_factor: no loss here reads it"),
        ("resume_from_checkpoint=true", "training.resume_from_checkpoint: a run resumes by itself"),
        ("eval_strategy=epoch", "training.eval_strategy: it has no effect here; evaluation.every_epochs"),
        ("adam_beta1=2", "training.adam_beta1=2: expected float, at least 0, less than 1"),
        ("weight_decay=-1", "training.weight_decay=-1: expected float, at least 0"),
        ("max_grad_norm=nan", "training.max_grad_norm=nan: expected finite float"),
        ("save_steps=0", "training.save_steps=0: expected float, more than 0"),
        ("save_total_limit=0", "training.save_total_limit=0: expected int or null, at least 1"),
    ],
)
def test_training_arguments_without_effect_or_out_of_range_are_refused(override, expected):
    with pytest.raises(UserError) as caught:
        read_config(compose("finetune", [f"++training.{override}"]))
    assert expected in str(caught.value)
