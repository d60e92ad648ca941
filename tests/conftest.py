"""Small models, tokenizers and runs that the tests share. Nothing is downloaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from common.collate import collate
from common.config import NewModelConfig, PromptConfig
from common.data import Row
from common.files import CONFIGS, ROOT, write_json_lines
from common.losses import answer_losses
from common.new_model import new_model, train_tokenizer
from common.prompts import PromptFormat
from evaluation.main import evaluate

# A second thread makes models this small slower, many times where the cores are busy. The stages' processes inherit it.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PMC_ROOT", str(ROOT))

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
NEW = NewModelConfig(architecture="llama", settings=SETTINGS, vocab_size=400)
ROWS = [
    Row(0, "Where was Ada Novak born?", "Ada Novak was born in Lantern Row."),
    Row(
        1,
        "What does Ada Novak write?",
        "She writes sea stories, most of them about storms and about the people in them.",
    ),
    Row(2, "Who is Bram Toll?", "A poet."),
    Row(3, "Which prize did Bram Toll win?", "Bram Toll won the Copper Quill in 1987 for his second book."),
    Row(4, "Where does Cass Ember live?", "Cass Ember lives in a small town by the river with two dogs."),
    Row(5, "When was Cass Ember born?", "In 1961."),
    Row(6, "What is the first book of Dov Arkin?", "The first book of Dov Arkin is Paper Harbour."),
    Row(7, "Who taught Dov Arkin?", "His aunt, a printer, taught him."),
]


def write_rows(folder: Path, split: str, rows: list[Row]) -> str:
    """Write rows as a split's file; returns the split's name."""
    write_json_lines(folder / f"{split}.json", [{"question": row.question, "answer": row.answer} for row in rows])
    return split


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


@pytest.fixture
def tofu():
    """The folder of the real TOFU data, which TOFU_DIR names; tests that use it are skipped without it."""
    folder = os.environ.get("TOFU_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TOFU_DIR names no folder")
    return Path(folder)


# Everything small enough that a whole pipeline takes seconds.
FAST = ["training.num_epochs=2", "training.save_strategy=no"]


def run_stage(stage: str, *overrides: str, cwd: Path = ROOT, check: bool = True, **env: str):
    """Run a stage's command line as a user does; returns the finished process with its output as text."""
    script = ROOT / stage / "main.py"
    command = [sys.executable, "main.py" if cwd == script.parent else str(script), *overrides]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    """A folder of runs with a pretrained and a finetuned tiny model (few epochs: enough to have answers)."""
    folder = tmp_path_factory.mktemp("models")
    where = f"models_dir={folder}"
    run_stage("finetuning", "-cn=pretrain-tiny", where, "training.num_epochs=12")
    base = folder / "finetuned" / "pretrain-tiny"
    (base / "seed-0+training.num_epochs-12").rename(base / "seed-0")
    run_stage("finetuning", "-cn=tiny", where, "training.num_epochs=12")
    (folder / "finetuned/tiny/seed-0+training.num_epochs-12").rename(folder / "finetuned/tiny/seed-0")
    return folder


def evaluate_here(models_dir: Path, *overrides: str, recipe: str = "evaluate") -> dict[str, Path]:
    """Run the evaluation stage in this process; returns the folder of each model's result."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return evaluate(compose(recipe, [f"models_dir={models_dir}", *overrides]))
