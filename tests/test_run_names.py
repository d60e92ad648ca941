"""The names of runs' folders: one for each combination of overrides."""

import itertools
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from common.run_names import run_name


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "seed-3"),
        (["seed=3"], "seed-3"),
        (["method.num_samples=2"], "seed-3+method.num_samples-2"),
        (["b=2", "seed=3", "a=1"], "seed-3+a-1+b-2"),
        (
            ["model=phi", "+training.optim=sgd", "~data.max_length"],
            "seed-3+training.optim-sgd+model-phi+data.max_length",
        ),
        (["training.learning_rate=1e-05"], "seed-3+training.learning_rate-1e-05"),
        (["overwrite=true", "output_dir=/x", "models_dir=/y", "keep_checkpoints=true"], "seed-3"),
        (["hydra.verbose=true", "hydra/launcher=joblib", "+hydra.job.name=x"], "seed-3"),
        (["output_directory=1", "seeds=2"], "seed-3+output_directory-1+seeds-2"),
    ],
)
def test_name_is_the_seed_and_then_the_sorted_overrides(overrides, name):
    assert run_name(3, overrides) == name


def test_name_does_not_depend_on_the_order_of_overrides():
    overrides = ["method.top_p=0.9", "model=phi", "data.max_length=64"]
    assert len({run_name(0, list(order)) for order in itertools.permutations(overrides)}) == 1


AWKWARD = [
    "model.path=/abs/olute/path",
    "data.splits.forget='forget01[:20] + retain99[:60]'",
    "model.prompt.system='Be brief, \"please\" {x}'",
    "model.lora={r:16,alpha:32}",
    "model.prompt.answer=",
    "x=../../..",
    "x=ünïcode 日本",
    "training.report_to=[wandb,tensorboard]",
    "x=$HOME`id`;rm&|<>()!#",
    "+method/reward=mine",
    "model@other.model=phi",
]


@pytest.mark.parametrize("override", AWKWARD)
def test_name_is_one_folder_below_and_safe_unquoted(override):
    name = run_name(0, [override])
    assert re.fullmatch(r"[A-Za-z0-9._+-]+", name)
    assert Path("models", name).parent == Path("models")
    parsed = OverridesParser.create().parse_override(f"model.path=models/tiny/{name}")
    assert parsed.value() == f"models/tiny/{name}"


def test_long_names_are_cut_and_stay_apart():
    long = [f"data.columns.question={'q' * 150}", f"data.columns.answer={'a' * 150}"]
    name, other = run_name(0, long), run_name(0, [*long, "z=1"])
    assert name.startswith("seed-0+data.columns.answer-aaa")
    assert max(len(name), len(other)) <= 180
    assert name != other
    assert name == run_name(0, long[::-1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("data.splits.forget='forget01[:20]'", "data.splits.forget='forget01[20:]'"),
        ("model.path=a/b", "model.path=a-b"),
        ("x=1", "x=-1"),
        ("model.prompt.answer='{answer}'", "model.prompt.answer=' {answer}'"),
        ("seed=1", "seed=2"),
    ],
)
def test_every_combination_has_a_name_of_its_own(one, other):
    seeds = [int(override.partition("=")[2]) if override.startswith("seed") else 0 for override in (one, other)]
    assert run_name(seeds[0], [one]) != run_name(seeds[1], [other])


def test_of_several_values_of_a_key_the_last_one_names_the_folder():
    words = ["method.num_samples=2", "++method.num_samples=3"]
    assert run_name(0, words) == run_name(0, words[1:])
    assert run_name(0, words) != run_name(0, words[::-1])


def test_overrides_that_are_merged_name_the_folder_in_their_order():
    first, second = "model.lora={r:64}", "model.lora={alpha:8}"
    assert len({run_name(0, words) for words in ([first, second], [second, first], [first], [second])}) == 4
    part, whole = "model.lora.r=64", "model.lora={r:8,alpha:4}"
    assert run_name(0, [part, "+a=1", whole]) != run_name(0, [whole, "+a=1", part])
    assert run_name(0, ["z=1", part, "+a=1", whole]) == run_name(0, [part, whole, "z=1", "+a=1"])
    assert run_name(0, [part, "model.lora.r=8"]) == run_name(0, ["model.lora.r=8"])
    third = "model.lora.alpha=1"
    assert run_name(0, [third, part, whole]) != run_name(0, [third, whole, part])
    assert run_name(0, [whole, whole]) == run_name(0, [whole])


def test_a_choice_and_its_keys_have_one_name_in_any_order():
    words = ["method=idk", "method.gamma=2", "+sharding=fsdp"]
    names = {run_name(0, list(order)) for order in itertools.permutations(words)}
    assert names == {"seed-0+sharding-fsdp+method.gamma-2+method-idk"}


def test_another_engine_has_another_name_and_its_other_settings_have_not():
    words = ["generation.cuda_graphs=auto", "generation.vllm_server=http://127.0.0.1:1", "generation.engine=own"]
    assert run_name(0, words) == "seed-0"
    assert run_name(0, ["generation.engine=vllm", "generation.engine='own'"]) == "seed-0"
    assert run_name(0, ["generation={cuda_graphs:auto}"]) == "seed-0"
    for word in ("generation.engine=vllm", "++generation.engine='vllm'", "generation={engine:vllm,cuda_graphs:auto}"):
        assert run_name(0, [*words, word]) == "seed-0+generation.engine-vllm"
