"""A trainer (the baseline or the optimized one) in its own process, which runs one step per command."""

import statistics
import time
from dataclasses import asdict
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeInt, PositiveInt
from transformers import TrainerCallback, set_seed

from benchmarks.baseline import BaselinePMC, baseline_answers
from benchmarks.synthetic import ANSWER_TOKENS, draw_lengths, rows, word_tokenizer
from benchmarks.timed_trainer import TimedPMC, generate_lengths
from common.cli import prepare_process
from common.config import RunConfig, read_config, section
from common.data import load_splits
from common.errors import UserError
from common.hardware import peak_memory_bytes
from common.model import load_model, load_tokenizer
from common.new_model import new_model
from common.prompts import PromptFormat
from common.rouge import rouge_l_recall
from common.training_arguments import training_arguments
from evaluation.metrics.headline import load_questions
from generation.sampler import generate, use_engine
from generation.token_sampling import SamplingSettings
from unlearning.pmc import PMCSettings
from unlearning.start_checkpoint import start_checkpoint
from unlearning.trainer import UnlearningData

BASELINE_EVALUATION_BATCH = 256  # as in the published recipes


@section
class BenchmarkSettings:
    steps: PositiveInt = 3
    """Optimizer steps of each trainer that are timed."""
    warmup_steps: NonNegativeInt = 1
    """Steps of each trainer before these."""
    evaluation_questions: NonNegativeInt = 140
    """Questions that are answered greedily; 0: none."""
    interleaved: bool = True
    """Both trainers in memory at once, taking turns; false: one after the other."""
    questions: NonNegativeInt = 0
    """Forget questions of the whole run that the figures are extrapolated to; 0: none."""
    published_minutes: float | None = None
    """What the paper's authors report for that run."""


def read(cfg: DictConfig) -> tuple[RunConfig, BenchmarkSettings]:
    """The recipe's sections, checked.

    Raises:
        UserError: naming every key that does not fit.
    """
    config = read_config(cfg, PMCSettings, also=("finetuned",), sections={"benchmark": BenchmarkSettings})
    return config, config.sections["benchmark"]


def with_checkpoint(cfg: DictConfig) -> DictConfig:
    """The recipe, resolved, with the checkpoint that the unlearning stage would start from; random weights need none.

    Raises:
        UserError: naming every key that does not fit.
    """
    config, _ = read(cfg)
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    if not config.model.new:
        resolved.model = asdict(start_checkpoint(config, str(cfg.finetuned)))
    return resolved


def window_size(config: RunConfig) -> int:
    """Forget questions of an optimizer step."""
    return config.training["per_device_train_batch_size"] * config.training["gradient_accumulation_steps"]


class TakeTurns(TrainerCallback):
    """A Trainer callback that waits for a command before each step and reports the step's cost afterwards."""

    def __init__(self, worker: "Worker"):
        self.worker = worker

    def on_train_begin(self, args, state, control, **kwargs):
        return self.worker.wait_for_turn(control)

    def on_step_end(self, args, state, control, **kwargs):
        self.worker.report_step()
        return self.worker.wait_for_turn(control)


def make_trainer(name: str, config: RunConfig, folder: str, questions: int) -> TimedPMC | BaselinePMC:
    """A trainer with the recipe's model and data; if the model is new, random weights and this many invented questions."""
    use_engine(config.generation)
    new = config.model.new
    tokenizer = word_tokenizer(new.vocab_size) if new else load_tokenizer(config.model)
    set_seed(config.seed)
    if new:
        model = new_model(new, tokenizer, config.model.dtype)
        model.generation_config.eos_token_id = None
        invented = rows(2 * questions, tokenizer, config.seed)
        forget, retain = invented[:questions], invented[questions:]
    else:
        model = load_model(config.model, tokenizer, trainable=True)
        forget, retain = load_splits(config.data, ("forget", "retain")).values()
    data = UnlearningData(forget, retain, PromptFormat(tokenizer, config.model.prompt), config.data.max_length)
    trainer_class = TimedPMC if name == "optimized" else BaselinePMC
    trainer = trainer_class(model, training_arguments(config, Path(folder), len(forget)), data, config.settings)
    trainer.forced_lengths = bool(new)
    if new:
        trainer.initial_responses = {row.index: row.answer for row in forget}
    else:
        trainer.before_training()
    return trainer


class Worker:
    """A trainer that runs one step per command received through a pipe."""

    def __init__(self, name: str, config: RunConfig, settings: BenchmarkSettings, pipe: Connection, folder: str):
        self.name, self.config, self.settings, self.pipe = name, config, settings, pipe
        self.trainer = make_trainer(name, config, folder, window_size(config))
        self.prompts = self.trainer.data.prompts
        self.trainer.add_callback(TakeTurns(self))

    def wait_for_turn(self, control):
        while (command := self.pipe.recv()) == "evaluate":
            self.pipe.send(self.evaluate())
        control.should_training_stop = command == "stop"
        self.trainer.reset()
        self.started = time.perf_counter()
        return control

    def report_step(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        trainer, seconds = self.trainer, time.perf_counter() - self.started
        record = {
            "step": seconds,
            **trainer.spent,
            "training": seconds - sum(trainer.spent.values()),
            "sampled_tokens": trainer.sampled_tokens,
            "trained_tokens": trainer.trained_tokens,
            "label_tokens": getattr(trainer, "label_tokens", 0),
            "prompt_tokens": sum(len(self.prompts.prompt(row.question)) for row in trainer.data.forget),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self.pipe.send(record)

    def evaluate(self) -> dict[str, float]:
        """Greedy answers to the recipe's splits, or for a new model to invented questions, scored by ROUGE-L recall."""
        if self.config.model.new:
            invented = rows(self.settings.evaluation_questions, self.prompts.tokenizer, seed=1)
            splits = [[(row.question, row.answer) for row in invented]]
            lengths = [draw_lengths(ANSWER_TOKENS, len(invented), (2,))]
        else:
            questions = load_questions(self.config.data, self.config.evaluation)
            by_split = groupby(questions, key=lambda question: question.split)
            splits = [[(question.question, question.reference) for question in some] for _, some in by_split]
            lengths = [None] * len(splits)
        started = time.perf_counter()
        if self.name == "optimized":
            texts, recall = self.optimized_texts(splits, lengths), rouge_l_recall
        else:
            texts, recall = self.baseline_texts(splits, lengths), self.trainer.evaluation_recall
        answered = time.perf_counter()
        references = [reference for split in splits for _, reference in split]
        recalls = [recall(reference, text) for reference, text in zip(references, texts, strict=True)]
        ended = time.perf_counter()
        return {"seconds": ended - started, "scoring": ended - answered, "mean_recall": statistics.fmean(recalls)}

    def optimized_texts(self, splits: list[list[tuple[str, str]]], lengths: list[list[int] | None]) -> list[str]:
        """The questions of all splits in one call, as in the evaluation stage."""
        ids = [self.prompts.prompt(question) for split in splits for question, _ in split]
        draw = generate
        if lengths[0]:
            draw = partial(generate_lengths, [[length] for some in lengths for length in some])
        settings = SamplingSettings(self.config.evaluation.max_length)
        with self.trainer.sampled_model() as model:
            answers = draw(model, ids, settings, self.trainer.eos_token_ids)
        return [self.prompts.text(answer[0]) for answer in answers]

    def baseline_texts(self, splits: list[list[tuple[str, str]]], lengths: list[list[int] | None]) -> list[str]:
        """The questions split by split, in batches in the data's order, each generated until its longest answer ends."""
        trainer, texts = self.trainer, []
        trainer.model.eval()
        for pairs, some in zip(splits, lengths, strict=True):
            for start in range(0, len(pairs), BASELINE_EVALUATION_BATCH):
                batch = slice(start, start + BASELINE_EVALUATION_BATCH)
                ids = [self.prompts.prompt(question) for question, _ in pairs[batch]]
                own, longest = some and some[batch], self.config.evaluation.max_length
                answers = baseline_answers(trainer.model, ids, own, trainer.eos_token_ids, longest, do_sample=False)
                texts += self.prompts.tokenizer.batch_decode(answers, skip_special_tokens=True)
        trainer.model.train()
        return texts


def work(name: str, cfg: dict, pipe: Connection, folder: str) -> None:
    """Entry point of a worker's process: sends a UserError to the parent instead of raising it."""
    prepare_process()
    config, settings = read(OmegaConf.create(cfg))
    try:
        Worker(name, config, settings, pipe, folder).trainer.train()
    except UserError as error:
        pipe.send(error)


class RemoteTrainer:
    """A worker, from the parent process: starts its process, sends commands and receives figures."""

    def __init__(self, name: str, cfg: dict, folder: str):
        context = get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, cfg, theirs, folder), daemon=True)
        self.process.start()
        theirs.close()
        self.steps: list[dict[str, float]] = []
        self.evaluation: dict[str, float] = {}

    def send(self, command: str) -> dict[str, float]:
        """Send a command to the worker; returns the figures that it reports.

        Raises:
            UserError: the worker's own, or when its process died.
        """
        self.pipe.send(command)
        try:
            record = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise UserError(
                f"the process of the trainer '{self.name}' died (exit code {self.process.exitcode}); out of memory? "
                "benchmark.interleaved=false holds one trainer in memory at a time"
            ) from error
        if isinstance(record, UserError):
            raise record
        return record

    def stop(self) -> None:
        self.pipe.send("stop")
        self.process.join(30)
