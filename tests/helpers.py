"""What several test files share: rows and settings of tiny models, trainers, hand-written models, stages as commands."""

import contextlib
import copy
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

from common.config import EvaluationConfig, NewModelConfig, PromptConfig
from common.data import Row
from common.files import CONFIGS, ROOT, write_json_lines
from common.prompts import PromptFormat
from evaluation.main import evaluate
from evaluation.model_outputs import ModelOutputs, TokenLogProbs
from evaluation.scores import Missing
from generation.sampler import generate
from generation.token_sampling import SamplingSettings
from unlearning.pmc import PMC
from unlearning.pmc_options import PMCSettings
from unlearning.trainer import UnlearningData

TOKEN = "hf_" + "s3cret" * 5  # nobody's
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


# --- trainers ---------------------------------------------------------------------------------------------------------


def gradients_of_one_step(trainer):
    """The gradient at the optimizer step, by parameter name."""
    found = {}

    def keep(*_, **__):
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return found


def arguments(folder, batch_size, accumulation, **more):
    values = {"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        disable_tqdm=True,
        **{**values, **more},
    )


def make_trainer(model, prompts, folder, rows=ROWS, batch_size=4, accumulation=2, settings=None, **more):
    data = UnlearningData(rows, ROWS[::-1], prompts, max_length=64)
    settings = settings or PMCSettings(num_samples=3, max_length=48, temperature=1.0)
    trainer = PMC(model, arguments(folder, batch_size, accumulation, **more), data, settings)
    trainer.before_training()
    return trainer


def resumed_and_whole(trainer_in, folder):
    """Trainers made by `trainer_in(folder)`: one stopped at half its steps, one that resumes it, and one that never stopped.

    The last two must end with the same weights and the same history.
    """

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == state.max_steps // 2

    whole = trainer_in(folder / "whole")
    whole.train_or_resume()
    begun = trainer_in(folder / "parts")
    begun.add_callback(Stop())
    begun.train_or_resume()
    resumed = trainer_in(folder / "parts")
    resumed.train_or_resume()
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert len(resumed.history) == len(whole.history)
    return begun, resumed, whole


def shouting(reference, samples):
    return [0.25 for _ in samples]


class Plain:
    """A model's log-probabilities in float64, one row at a time, without padding, masks or batches."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double().eval()

    @torch.no_grad()
    def logits(self, example):
        ids, start = example
        return self.model(torch.tensor([ids])).logits[0, start - 1 : -1].numpy(), np.array(ids[start:])

    def log_p(self, example):
        """log p of every answer token."""
        logits, targets = self.logits(example)
        return log_softmax(logits)[np.arange(len(targets)), targets]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# --- stages -----------------------------------------------------------------------------------------------------------


@cache
def stage_server(rank: int) -> subprocess.Popen:
    """A process that runs stages of this test session; it ends with the session, when its input ends."""
    command = [sys.executable, str(ROOT / "tests" / "stage_server.py")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def run_stage(stage: str, *overrides: str, cwd: Path = ROOT, check: bool = True, **env: str):
    """Run a stage's command line as a user does; returns the finished process.

    Without further environment variables it is run by the `stage_server`, in which the stage's modules are imported.
    """
    script = ROOT / stage / "main.py"
    argv = ["main.py" if cwd == script.parent else str(script), *overrides]
    if env:
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
        command = [sys.executable, *argv]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environ, timeout=300)
    else:
        (done,) = run_imported(script, argv, cwd)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(done.args)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def wait_for(process: subprocess.Popen, text: str) -> list[str]:
    """Read a process's output until a line has the text; returns the lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was never printed:\n{''.join(lines)}")


def run_imported(
    script: Path, argv: list[str], cwd: Path = ROOT, environments: Sequence[dict[str, str]] = ({},)
) -> list[subprocess.CompletedProcess]:
    """Run a script in forks of the stage servers, at once one for each of the environments; returns the finished processes."""
    with contextlib.ExitStack() as files:
        outputs = []
        for rank, environment in enumerate(environments):
            names = {kind: files.enter_context(tempfile.NamedTemporaryFile()).name for kind in ("stdout", "stderr")}
            environ = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
            command = {"script": str(script), "argv": argv, "cwd": str(cwd), "environ": environ, **names}
            stage_server(rank).stdin.write(json.dumps(command) + "\n")
            stage_server(rank).stdin.flush()
            outputs.append(names)
        codes = [int(stage_server(rank).stdout.readline()) for rank in range(len(environments))]
        texts = [{kind: Path(name).read_text(encoding="utf-8") for kind, name in names.items()} for names in outputs]
    return [
        subprocess.CompletedProcess([sys.executable, *argv], code, **text)
        for code, text in zip(codes, texts, strict=True)
    ]


def run_in_processes(script: Path, argv: list[str], processes: int, **env: str) -> subprocess.CompletedProcess:
    """Run a script in processes of one run, as torchrun does; returns the first of the finished processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    of_all = {**size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
    ranks = [{**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return run_imported(script, [str(script), *argv], environments=ranks)[0]


def docs_generator() -> ModuleType:
    """The module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluate_here(models_dir: Path, *overrides: str, recipe: str = "evaluate") -> dict[str, Path]:
    """Run the evaluation stage in this process; returns the folder of each model's result."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return evaluate(compose(recipe, [f"models_dir={models_dir}", *overrides]))


# --- models whose token probabilities are written down, for scores that are computed by hand --------------------------


VOCABULARY = 8
END = 0


class BigramModel(torch.nn.Module):
    """The next token depends on the present one alone: row t of `table` has the probabilities after token t."""

    def __init__(self, table, dtype=torch.float32):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(table, dtype=torch.float64).log().to(dtype))
        self.passes = 0

    @property
    def device(self):
        return self.logits.device

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep):
        self.passes += len(input_ids)
        return SimpleNamespace(logits=self.logits[input_ids][logits_to_keep])


class LetterTokenizer:
    """Letters a-g are the tokens 1-7; 0 is the EOS token."""

    chat_template = None
    eos_token_id = END

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 96 for letter in text.lower() if "a" <= letter <= "g"]}

    def decode(self, ids, **_):
        return "".join(chr(96 + int(i)) for i in ids if int(i))


def bigram_outputs(table, max_length=20, dtype=torch.float32, **evaluation):
    """The outputs of a bigram model without any prompt text, and the model."""
    model = BigramModel(table, dtype)
    prompts = PromptFormat(LetterTokenizer(), PromptConfig(style="plain", question="{question}", answer="{answer}"))
    return ModelOutputs(lambda: model, prompts, EvaluationConfig(**evaluation), max_length), model


def random_table(seed=0):
    table = np.random.default_rng(seed).random((VOCABULARY, VOCABULARY)) + 0.05
    return table / table.sum(1, keepdims=True)


def tokens(log_probs, likeliest=None, logp_mean=None, logp_std=None, has_eos=True):
    """TokenLogProbs with given log-probabilities."""
    n = len(log_probs)
    fill = [np.asarray(values, dtype=np.float32) for values in (log_probs, logp_mean or [0] * n, logp_std or [1] * n)]
    return TokenLogProbs(fill[0], np.asarray(likeliest or [False] * n, dtype=bool), fill[1], fill[2], has_eos)


def outputs_of(model, prompts, **evaluation):
    return ModelOutputs(lambda: model, prompts, EvaluationConfig(**{"max_length": 60, **evaluation}), 256)


def context_of(outputs, rows, **sections):
    config = SimpleNamespace(sections=sections, evaluation=EvaluationConfig(max_length=60), seed=3)
    return SimpleNamespace(outputs=outputs, rows=lambda role: rows, config=config)


def no_model():
    raise Missing("none is given")


# --- models with random weights, and samples of them ---

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
ARCHITECTURES = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "phi": SMALL,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},  # absolute positions: padding on the left must not shift them
    "gemma3_text": {  # most layers see the last eight tokens only
        **SMALL,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
_GROUPED = {**SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2}
EXPERTS = {  # mixtures of experts
    "qwen3_moe": {**_GROUPED, "moe_intermediate_size": 48, "num_experts": 4},
    "gpt_oss": {**_GROUPED, "head_dim": 8, "num_local_experts": 4},
}
SAMPLED = {"temperature": 1.3, "top_k": 6, "top_p": 0.85}


def random_model(architecture="llama", vocab_size=50, seed=0, scale=6.0):
    torch.manual_seed(seed)
    ids = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **ids, **ARCHITECTURES[architecture]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model.eval()


def random_prompts(lengths, vocab_size=50) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, vocab_size, length).tolist() for length in lengths]


def sampled(model, prompts, keys, ends=(7,), max_length=30, num_samples=3, **options):
    settings = SamplingSettings(max_length, num_samples, **{**SAMPLED, **options})
    return generate(model, prompts, settings, list(ends), keys)
