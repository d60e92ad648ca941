"""Every configuration runs, or ends in one message: a UserError, or an error of Hydra that a stage prints as one."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.cli import allow_new_key, check_words
from common.config import read_config, read_section
from common.errors import UserError
from common.files import CONFIGS
from common.runs import RunFolder
from common.training_arguments import training_arguments
from evaluation.inputs import fill_from_run, named_models, read_evaluation
from evaluation.metrics.registry import chosen_groups
from scripts.compare_methods import ComparisonSettings
from unlearning.main import method_class

MESSAGES = (UserError, HydraException, OmegaConfBaseException)  # `launch` prints these without a traceback
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in ("run", "chat"))
COMPARISONS = sorted(f"compare/{path.stem}" for path in CONFIGS.glob("compare/*.yaml"))
ROWS = 30


def composed(recipe: str, *words: str) -> DictConfig:
    check_words(list(words))
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose(recipe, list(map(allow_new_key, words)))


def check(cfg: DictConfig, arguments: bool) -> None:
    """What a stage does before it reads data or weights."""
    if "comparison" in cfg:
        read_section("comparison", ComparisonSettings, cfg.comparison)
    elif "metrics" in cfg:
        named_models(cfg)
        fill_from_run(cfg, None)
        read_evaluation(cfg)
        chosen_groups(cfg.metrics)
    else:
        config = (
            read_config(cfg, method_class(cfg).Settings, also=("finetuned",)) if "method" in cfg else read_config(cfg)
        )
        if arguments:
            training_arguments(config, Path("unused"), ROWS)


# --- single values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("training.num_epochs=nan", "training.num_epochs=nan: expected finite float"),
        ("training.num_epochs=inf", "training.num_epochs=inf: expected finite float"),
        ("training.warmup_epochs=nan", "training.warmup_epochs=nan: expected finite float"),
        ("training.warmup_epochs=inf", "training.warmup_epochs=inf: expected finite float"),
        ("training.warmup_epochs=26", "training.warmup_epochs=26: the learning rate would not reach its peak"),
        ("training.warmup_steps=nan", "training.warmup_steps=nan: expected finite float"),
        ("training.learning_rate=nan", "training.learning_rate=nan: expected finite float"),
        ("training.learning_rate=inf", "training.learning_rate=inf: expected finite float"),
        ("training.weight_decay=nan", "training.weight_decay=nan: expected finite float"),
        ("training.max_steps=0", "training.max_steps=0: expected the number of optimizer steps"),
        ("training.adam_beta1=2", "training.adam_beta1=2: expected float, at least 0, less than 1"),
        ("training.adam_beta1=-1", "training.adam_beta1=-1: expected float, at least 0, less than 1"),
        ("training.adam_epsilon=-1", "training.adam_epsilon=-1: expected float, more than 0"),
        ("training.torch_empty_cache_steps=0", "training.torch_empty_cache_steps=0: expected int or null, at least 1"),
        ("training.save_strategy=best", "training.save_strategy=best: expected no or steps or epoch"),
        ("training.report_to=foo", "training.report_to=foo: no such tracker"),
        ("training.report_to=null", "training.report_to=None: expected str or list[str]"),
        ("training.optim=foo", "training: "),
        ("training.eval_strategy=epoch", "training.eval_strategy: it has no effect here"),
        ("training.batch_eval_metrics=true", "training.batch_eval_metrics: it has no effect here"),
        ("training.fsdp=full_shard", "training.fsdp: needs several processes"),
        ("training.hub_strategy=every_save", "training.hub_strategy: only the finished run is pushed"),
        ("training.push_to_hub=maybe", "training.push_to_hub=maybe: expected bool"),
        ("training.ignore_data_skip=true", "training.ignore_data_skip: a continued run would repeat rows"),
        ("training.fp16=true", "training.fp16=true: needs an NVIDIA GPU"),
        ("training.dataloader_num_workers=-1", "training.dataloader_num_workers=-1: expected int, at least 0"),
        ("training.dataloader_persistent_workers=true", "training: persistent_workers option needs num_workers > 0"),
        (
            "training.dataloader_drop_last=true",
            "training.dataloader_drop_last: the rows of the last batch would not be",
        ),
        ("training.use_liger_kernel=true", "training.use_liger_kernel=True: is not installed"),
        (
            "training.lr_scheduler_kwargs={foo:1}",
            "training: get_linear_schedule_with_warmup() got an unexpected keyword",
        ),
        ("training.lr_scheduler_type=cosine_with_min_lr", "training: One of min_lr or min_lr_rate should be set"),
        ("training.lr_scheduler_type=warmup_stable_decay", "training: get_wsd_schedule() missing"),
        ("training.neftune_noise_alpha=-5", "training.neftune_noise_alpha=-5: expected float or null, more than 0"),
        ("training.log_level=foo", "training.log_level=foo: expected"),
        ("training.parallelism_config={a:1}", "training.parallelism_config: set training.fsdp"),
        (
            "training.train_sampling_strategy=group_by_length",
            "training.train_sampling_strategy: rows are always shuffled",
        ),
        ("method=null", "method=null: expected one of altpo, ceu, dpo"),
        ("method=[npo,dpo]", "method=[npo,dpo]: expected one of altpo, ceu, dpo"),
        ("model=null", "model=null: expected one of"),
        ("evaluation=null", "evaluation=null: expected one of"),
        ("-cn=tiny.yaml", "name the recipe without its ending, -cn=tiny"),
        ("output_dir=\udcff", "'output_dir=\\udcff': is not UTF-8 text"),
        ("seed=${nope}", "seed=${nope}: Interpolation key 'nope' not found"),
        ("output_dir=${nope}", "output_dir=${nope}: Interpolation key 'nope' not found"),
        ("data.splits.forget=[forget]", "data.splits.forget=['forget']: expected str or null"),
        ("data.splits.forget={a:b}", "data.splits.forget={'a': 'b'}: expected str or null"),
        (
            'model.lora={target_modules:"("}',
            "model.lora.target_modules=(: neither a list of names nor a regular expression",
        ),
        ("method.reward.alpha=3", "unlearning.rewards.rouge_l(reference, samples, **{'alpha': 3}): got an unexpected"),
        ("method.reward._target=foo", "**{'_target': 'foo'}): got an unexpected keyword"),
        ("method.reward._target_=os.getcwd", "os.getcwd(reference, samples, **{}): too many positional arguments"),
        ("method=idk method.refusals=/dev/zero", "method.refusals=/dev/zero: is a device"),
        ("method=simnpo method.delta=nan", "method.delta=nan: expected finite float"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(words, message):
    recipe = "unlearn-tiny" if words.startswith("method=") else "PMC-unlearn-tiny"
    with pytest.raises(MESSAGES) as caught:
        check(composed(recipe, *words.split()), arguments=True)
    assert message in str(caught.value)


@pytest.mark.parametrize("words", ["comparison.seeds=[x]", "comparison.before=5"])
def test_a_value_that_a_comparison_cannot_use_is_named(words):
    with pytest.raises(UserError, match=rf"^{words.partition('=')[0]}.*: expected"):
        check(composed("compare/tiny", words), arguments=False)


@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x", "/tmp/" + "x" * 300])
def test_a_folder_that_cannot_be_made_is_named(folder):
    with pytest.raises(UserError, match=rf"^output_dir={folder}: cannot be written to"):
        RunFolder(Path(folder), {}).open()


# --- every key of every recipe ------------------------------------------------------------------------------------------

WRONG = [None, True, -1, 0, 0.5, 10**30, 1e300, float("nan"), float("inf"), "", "x", "\ud800", [], ["x"], {}, {"a": 1}]
WRONG += ["${nope}", "${seed}", "nan", [None], {"_target_": "os.getcwd"}]
CONFIGURATIONS = {recipe: composed(recipe) for recipe in RECIPES + COMPARISONS}


def dotted(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in node:
        keys.append(f"{prefix}{key}")
        child = OmegaConf.to_container(node, resolve=False)[key]
        keys += dotted(OmegaConf.create(child), f"{prefix}{key}.") if isinstance(child, dict) else []
    return keys


MUTATIONS = [(recipe, key) for recipe, cfg in CONFIGURATIONS.items() for key in dotted(cfg)]


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(MUTATIONS), st.sampled_from(WRONG))
def test_a_wrong_value_of_any_key_is_accepted_or_refused_by_a_message(mutation, value):
    recipe, key = mutation
    cfg = CONFIGURATIONS[recipe].copy()
    try:
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        check(cfg, arguments=recipe == "PMC-unlearn-tiny")
    except MESSAGES as error:
        assert str(error)
