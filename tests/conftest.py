"""Fixtures: small models, tokenizers and runs that tests share. Nothing is downloaded; helpers are in tests/helpers.py."""

import gc
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from common.collate import collate
from common.config import DataConfig, EvaluationConfig, ModelConfig, PromptConfig, RunConfig
from common.files import ROOT
from common.losses import answer_losses
from common.new_model import new_model, train_tokenizer
from common.prompts import PromptFormat
from common.trainer import ExampleTrainer
from evaluation.context import EvaluationContext, Loader
from evaluation.metrics.quantization import Quantization
from evaluation.metrics.relearning import Relearning
from tests.helpers import CHAT_TEMPLATE, NEW, ROWS, arguments, run_stage, write_rows

# A second thread makes models this small slower, many times where the cores are busy. The stages' processes inherit it.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PMC_ROOT", str(ROOT))


SLOW_FIXTURES = {"models_dir", "memorized"}  # seconds of training


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    """Tests are slow whose fixtures are, and a GPU test is skipped without a GPU. Files with many slow tests come first."""
    has_gpu = torch.cuda.is_available()
    for item in items:
        if not SLOW_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
    # With a file for each worker, a long one at the end would leave the other workers idle. The first file is one that needs
    # no models_dir, so that only one worker begins by making it.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    need_models = {item.path for item in items if "models_dir" in item.fixturenames}
    first = max(set(slow) - need_models, key=lambda path: (slow[path], str(path)), default=None)
    items.sort(key=lambda item: (item.path != first, -slow[item.path], str(item.path)))


def pytest_collection_finish():
    """Keep the imported modules out of garbage collections, which take half a second with them; the Trainer makes many."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Half of a surrogate pair in a report's text, which some tests try, would end the worker that sends it."""

    def encodable(text: str) -> str:
        return text.encode("utf-8", "backslashreplace").decode()

    report = yield
    report.sections = [(name, encodable(text)) for name, text in report.sections]
    if report.failed:
        report.longrepr = encodable(str(report.longrepr))
    return report


@pytest.fixture(scope="session")
def tokenizer():
    texts = [f"{row.question} {row.answer}" for row in ROWS]
    return train_tokenizer(NEW, texts)


@pytest.fixture
def model(tokenizer):
    """A Llama of a few thousand parameters with fixed random weights, not yet trained."""
    torch.manual_seed(0)
    return new_model(NEW, tokenizer, "float32")


@pytest.fixture
def chat_tokenizer():
    texts = [f"{row.question} {row.answer}" for row in ROWS]
    tokenizer = train_tokenizer(NEW, texts)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def prompts(tokenizer):
    return PromptFormat(tokenizer, PromptConfig(style="plain"))


@pytest.fixture
def memorized(model, prompts):
    """The model, trained until no sample at temperature 1 differs from what it answers greedily."""
    examples = collate([prompts.example(row, 64) for row in ROWS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = answer_losses(model, examples)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.003
    return model


@pytest.fixture(scope="session")
def learned(tokenizer, tmp_path_factory):
    """A model that has begun to learn the rows: its probabilities are neither all alike nor all 1. Tests copy it."""
    torch.manual_seed(0)
    model = new_model(NEW, tokenizer, "float32")
    prompts = PromptFormat(tokenizer, PromptConfig(style="plain"))
    examples = [prompts.example(row, 64) for row in ROWS]
    args = arguments(tmp_path_factory.mktemp("learned"), 8, 1, learning_rate=1e-2, max_steps=40)
    ExampleTrainer(model, args, examples, tokenizer).train()
    return model


@pytest.fixture
def tofu():
    """The folder of the real TOFU data, which TOFU_DIR names; tests that use it are skipped without it."""
    folder = os.environ.get("TOFU_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TOFU_DIR names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    """A folder of runs with a pretrained and a finetuned tiny model (few epochs: enough to have answers)."""
    own = tmp_path_factory.getbasetemp()
    made = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made" / "models"
    made.parent.mkdir(exist_ok=True)
    with FileLock(f"{made}.lock"):  # the first worker makes it, the others copy it
        if not made.is_dir():
            make_models(made.with_name("unfinished"))
            made.with_name("unfinished").rename(made)
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("models"), dirs_exist_ok=True))


def make_models(folder: Path) -> None:
    where = f"models_dir={folder}"
    for recipe in ("pretrain-tiny", "tiny"):
        run_stage("finetuning", f"-cn={recipe}", where, "training.num_epochs=12")
        runs = folder / "finetuned" / recipe
        (runs / "seed-0+training.num_epochs-12").rename(runs / "seed-0")


@pytest.fixture
def context(model, tokenizer, tmp_path):
    """A context of a saved model, with a retain-only model of other weights."""
    for name in ("model", "retain"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    splits = {"forget": write_rows(tmp_path, "gone", ROWS[:4]), "retain": write_rows(tmp_path, "kept", ROWS[4:])}
    sections = {
        "relearning": Relearning(num_epochs=[40], learning_rate=1e-2, batch_size=2),
        "quantization": Quantization(),
    }
    config = RunConfig(
        seed=0,
        model=ModelConfig(path=str(tmp_path / "model"), prompt=PromptConfig("plain")),
        data=DataConfig(str(tmp_path), splits, {"question": "question", "answer": "answer"}),
        evaluation=EvaluationConfig(max_length=60),
        training={},
        save_model=True,
        overwrite=False,
        keep_checkpoints=False,
        output_dir=None,
        models_dir=str(tmp_path),
        sections=sections,
    )
    loader = Loader()
    others = {"retain_model": str(tmp_path / "retain")}
    return EvaluationContext(config, loader, loader.open(config, config.model), others)
