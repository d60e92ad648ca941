"""Compare unlearning methods on one model and data set, over several seeds, with one command.

    python scripts/compare_methods.py -cn=compare/tiny
    python scripts/compare_methods.py -cn=compare/tiny "comparison.seeds=[0]"
    python scripts/compare_methods.py -cn=compare/smollm2-cpu data.path=FOLDER

1. For each seed, the stages in `comparison.before` run first. Then every method runs: unlearning, then evaluation. All run
   one after the other, as the usual commands of the stages. Finished runs are not repeated.
2. A table (means over the seeds, with standard deviations), a plot of unlearn quality against utility, and report.html are
   written to models/comparisons/<recipe>/, which also contains the runs.

If a method's run fails, the error is logged, the table has no value for that run, and the other runs continue. If a stage in
`comparison.before` fails, its seed is skipped. Warnings of the commands are logged, and listed below the table.

Overrides on the command line are passed to every method's run, except those that begin with `comparison.`; seeds are
`comparison.seeds=[0]`. Overrides of `models_dir`, `model.` and `data.` are also passed to the stages in `comparison.before`,
those of `generation.` to the evaluations. A top-level key that is not in the recipe takes two plus signs (++finetuned=FOLDER).
With overrides of `model.` or `data.`, the last of these stages writes to before/ in the comparison's folder, and every method
starts from there unless its arguments name another finetuned=FOLDER, or the recipe itself gives each of these stages an
output_dir. In the recipe, {seed} stands for the seed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import logging
import re
import shlex
import subprocess
import time
from dataclasses import dataclass, field, replace
from typing import Annotated

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pydantic import Field, field_validator
from tqdm.auto import tqdm

from common.cli import check_recipe, check_words, job_errors, launch, quoted
from common.config import read_section, section
from common.errors import UserError, did_you_mean
from common.files import CONFIGS, ROOT, write_text
from common.lock import locked
from common.results import result_of
from evaluation.metrics.registry import chosen_groups
from evaluation.notices import notices
from evaluation.plots import RED, new_figure
from evaluation.report import method_table, write_reports
from evaluation.run_records import Group, Run, grouped, not_of_run
from evaluation.tables import as_text

log = logging.getLogger(__name__)

STAGES = ("finetuning", "unlearning", "evaluation")
# Overrides that change the greedy answers or which of them are scored; the models to compare with need them, too.
OF_ANSWERS = ("generation.", *(f"evaluation.{key}" for key in ("max_length", "batch_size", "full_eval", "bf16")))


@section
class ComparisonSettings:
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    """Seeds; every method runs with each of them."""
    before: list[str]
    """Stages that run before unlearning, each with its arguments."""
    methods: Annotated[dict[str, str], Field(min_length=1)]
    """Name in the table -> arguments of unlearning/main.py."""
    metrics: Annotated[list[str], Field(min_length=1)]
    """Metric groups of evaluation/main.py."""
    unlearning: str = ""
    """Further arguments of every method, in front of its own."""
    evaluation: str = ""
    """Further arguments of evaluation/main.py."""
    references: dict[str, str] = field(default_factory=dict)
    """Name in the table -> folder of a model to compare with."""

    def own_models(self) -> bool:
        """Whether the recipe says where each stage before unlearning writes to."""
        return bool(self.before) and all(" output_dir=" in words for words in self.before)

    def commands_per_seed(self) -> int:
        """The number of commands; each method has one of unlearning and one of evaluation, a reference one of evaluation."""
        return len(self.before) + len(self.references) + 2 * len(self.methods)

    def commands(self) -> int:
        return len(self.seeds) * self.commands_per_seed()

    @field_validator("seeds")
    @classmethod
    def differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("expected each seed once")
        return seeds

    @field_validator("before")
    @classmethod
    def name_stages(cls, before: list[str]) -> list[str]:
        commands = [shlex.split(words) or [""] for words in before]
        if wrong := [stage for stage, *_ in commands if stage not in STAGES]:
            raise ValueError(f"'{wrong[0]}' is no stage; expected one of {', '.join(STAGES)}, then its arguments")
        check_commands([(stage, words) for stage, *words in commands])
        return before

    @field_validator("methods")
    @classmethod
    def name_recipes(cls, methods: dict[str, str]) -> dict[str, str]:
        check_commands([(name, shlex.split(words)) for name, words in methods.items()])
        return methods

    @field_validator("metrics")
    @classmethod
    def are_metrics(cls, metrics: list[str]) -> list[str]:
        try:
            chosen_groups(metrics)
        except UserError as error:
            raise ValueError(str(error)) from error
        return metrics


def check_commands(commands: list[tuple[str, list[str]]]) -> None:
    """Check the recipes that commands name.

    Args:
        commands: for each, a name and the arguments of a stage.
    Raises:
        ValueError: for a command without a recipe, or with one that does not exist.
        UserError: for a secret.
    """
    for _, words in commands:
        check_words(words)
    for name, words in commands:
        recipes = [word.removeprefix("-cn=") for word in words if word.startswith("-cn=")]
        if not recipes:
            raise ValueError(f"{name}: expected arguments of a stage, -cn=RECIPE among them")
        own_folder = any(word.startswith("-cd=") for word in words)
        if not own_folder and not (CONFIGS / f"{recipes[-1]}.yaml").is_file():
            known = [path.stem for path in CONFIGS.glob("*.yaml")]
            raise ValueError(f"{name}: no recipe '{recipes[-1]}' in {CONFIGS}{did_you_mean(recipes[-1], known)}")


@dataclass
class Commands:
    """Runs the commands of the stages and records those that failed.

    Attributes:
        shared: overrides for the commands of every method.
        total: number of commands to run; less when some are skipped after a failure.
        finished: number of commands that were run.
        failed: commands that failed -> their messages.
        warnings: commands that succeeded -> their warnings.
    """

    shared: list[str]
    total: int
    finished: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def progress(self) -> str:
        """The number of the next command, and the time left if the others take as long as those before it."""
        text = f"command {self.finished + 1} of {self.total}"
        if not self.finished:
            return text
        mean = (time.perf_counter() - self.started) / self.finished
        return f"{text}, time left {tqdm.format_interval(mean * (self.total - self.finished))}"

    def run(self, stage: str, *words: str) -> bool:
        """Run the command of a stage; returns whether it succeeded."""
        command = [sys.executable, f"{stage}/main.py", "-cd=configs", *words]
        shown = shlex.join(["python", *command[1:]])
        log.info("%s: %s", self.progress(), shown)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.finished += 1
        if done.returncode != 0:
            self.failed[shown] = message_of(done)
            log.error("failed:\n%s", "\n".join(done.stdout.splitlines()[-12:]))
        elif warnings := warnings_of(done.stdout):
            self.warnings[shown] = warnings
            for warning in warnings:
                log.warning("%s", warning)
        return done.returncode == 0

    def method(self, name: str, words: list[str], seed: int, folder: Path, settings: ComparisonSettings) -> Run | None:
        """Unlearn and evaluate; None if a command failed."""
        of_run = [*words, f"seed={seed}", *self.shared, quoted("output_dir", str(folder))]
        if not self.run("unlearning", *of_run):
            self.total -= 1  # its evaluation is skipped
            return None
        measured = folder / "evaluation"
        if not self.evaluate(str(folder), seed, measured, settings):
            return None
        run, evaluation = Run(folder, name, result_of(folder)), result_of(measured)
        if why := not_of_run(evaluation, run):
            self.failed[f"evaluation of {name}, seed {seed}"] = why
            return None
        run.evaluations[measured] = evaluation
        return run

    def reference(self, name: str, model: str, seed: int, folder: Path, settings: ComparisonSettings) -> Run | None:
        """Evaluate a model to compare with; None if the command failed."""
        done = self.evaluate(model, seed, folder, settings)
        return Run(folder, name, result_of(folder), reference=True) if done else None

    def evaluate(self, model: str, seed: int, folder: Path, settings: ComparisonSettings) -> bool:
        """Evaluate a checkpoint, with the result in a folder; returns whether the command succeeded."""
        words = [quoted("model.path", model), quoted("output_dir", str(folder))]
        words += [f"metrics=[{','.join(settings.metrics)}]", f"seed={seed}"]
        words += overrides_of(self.shared, *OF_ANSWERS)  # drawn and scored as in the methods' runs
        words += words_of(settings.evaluation, seed)
        return self.run("evaluation", "-cn=evaluate", *words)


def words_of(text: str, seed: int) -> list[str]:
    """The words of a recipe's arguments, for one seed."""
    return shlex.split(text.replace("{seed}", str(seed)))


def warnings_of(output: str) -> list[str]:
    """The warnings in the output of a command, each once, in the order of their first appearance."""
    return list(dict.fromkeys(re.findall(r"^\[[\d:]+\] Warning: (.+)", output, flags=re.MULTILINE)))


def message_of(done: subprocess.CompletedProcess) -> str:
    """The message of a command that failed: that of a user's error, or the last line of its output."""
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}; out of memory?"
    _, error, message = done.stdout.rpartition("\nError: ")
    return message.strip() if error else (done.stdout.strip().splitlines() or ["no output"])[-1]


def as_code(words: str) -> str:
    """A code span of Markdown; a backtick in it needs two around it."""
    return f"`` {words} ``" if "`" in words else f"`{words}`"


def plot_methods(groups: list[Group], path: Path) -> None:
    """Plot unlearn quality against utility: a point per run, a color and a marker per method."""
    figure, (axes,) = new_figure(8, 5.5)
    markers = "osD^vP*X<>ph8d"
    for index, group in enumerate(group for group in groups if not group.reference):
        x, y = ([run.scores[score] for run in group.runs] for score in ("unlearn_quality", "utility"))
        color = RED if group.name == "PMC" else f"C{index % 10}"
        axes.scatter(x, y, s=36, color=color, marker=markers[index % len(markers)], label=group.name, alpha=0.8)
    axes.set(xlabel="unlearn quality, percent", ylabel="utility, percent")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)


def compare(cfg: DictConfig) -> Path:
    """Run all stages and methods, and write the table and the report; returns the table's file.

    Raises:
        UserError: when the recipe is invalid or, after the table is written, when a command failed.
    """
    settings = read_section("comparison", ComparisonSettings, cfg.get("comparison"))
    hydra_config = HydraConfig.get()
    typed = [word for word in hydra_config.overrides.task if not word.lstrip("+~").startswith(("comparison.", "hydra"))]
    for key, instead in {"seed": "comparison.seeds=[3]", "output_dir": "models_dir=FOLDER"}.items():
        if wrong := overrides_of(typed, f"{key}="):
            raise UserError(f"{wrong[0]}: has no effect on a comparison; use {instead}")
    starts = overrides_of(typed, "finetuned=")
    shared = [word for word in typed if word not in starts]
    reshaping = overrides_of(shared, "model.", "data.")
    shaping = reshaping + overrides_of(shared, "models_dir=")
    if settings.own_models():
        reshaping = []
    if (other := starts + reshaping) and (settings.references or settings.evaluation):
        raise UserError(
            f"{other[0]}: this recipe names models of its own data (comparison.references, comparison.evaluation); "
            "add comparison.references={} comparison.evaluation='' to compare without them"
        )
    # In front of the methods' own arguments: UNDO starts from a method's result.
    settings = replace(settings, unlearning=shlex.join([*shlex.split(settings.unlearning), *starts]))
    commands = Commands(shared, settings.commands())
    folder = Path(cfg.models_dir) / "comparisons" / Path(hydra_config.job.config_name).name
    with locked(folder):
        return report(run_all(settings, commands, reshaping, shaping, folder), settings, commands, folder)


def overrides_of(words: list[str], *keys: str) -> list[str]:
    """The overrides of keys that begin with one of these."""
    return [word for word in words if word.lstrip("+~").startswith(keys)]


def run_all(
    settings: ComparisonSettings, commands: Commands, reshaping: list[str], shaping: list[str], folder: Path
) -> list[Run]:
    """Run the stages before unlearning and every method, for each seed; returns the runs that succeeded.

    Args:
        reshaping: overrides of model and data, with which the comparison's folder gets its own finetuned model.
        shaping: overrides for the stages before unlearning.
    """
    found: list[Run | None] = []
    for seed in settings.seeds:
        before, start = [words_of(words, seed) for words in settings.before], []
        # The overrides change the name of the last stage's folder, so that it differs from the one in the recipes.
        if reshaping and before:
            before[-1].append(quoted("output_dir", f"{folder}/before/seed-{seed}"))
            start = [quoted("++finetuned", f"{folder}/before/seed-{seed}")]
        last = commands.finished + settings.commands_per_seed()
        if not all(commands.run(stage, *words, f"seed={seed}", *shaping) for stage, *words in before):
            commands.total -= last - commands.finished  # the rest of this seed is skipped
            continue
        for name, path in settings.references.items():
            model = path.replace("{seed}", str(seed))
            found.append(commands.reference(name, model, seed, folder / name / f"seed-{seed}", settings))
        for name, words in settings.methods.items():
            own = words_of(words, seed)
            options = [word for word in own if word.startswith("-")]  # Hydra takes none behind an override
            # Of a key that is set twice the last value counts: the method's own.
            overrides = [word for word in own if word not in options]
            words_of_run = [*options, *start, *words_of(settings.unlearning, seed), *overrides]
            found.append(commands.method(name, words_of_run, seed, folder / name / f"seed-{seed}", settings))
    return list(filter(None, found))


def report(found: list[Run], settings: ComparisonSettings, commands: Commands, folder: Path) -> Path:
    """Write the plot and report.html; write and print the table, the arguments of each method, failures and warnings."""
    groups = grouped(found)
    plot_methods(groups, folder / "comparison.png")
    if found:
        write_reports(found, groups, folder, f"Comparison {folder.name}")
    arguments = "\n".join(f"- {as_text(name)}: {as_code(words)}" for name, words in settings.methods.items())
    seeds = ", ".join(map(str, settings.seeds))
    table = method_table(groups) if groups else "No run succeeded."
    text = f"{table}\n\nSeeds {seeds}. Arguments of unlearning/main.py:\n\n{arguments}\n"
    if noticed := notices(groups):
        text += "\nBefore comparing scores:\n\n" + "".join(f"- {as_text(sentence)}\n" for sentence in noticed)
    if commands.failed:
        text += "\nFailed, and not in the table:\n\n" + "".join(
            f"- {as_code(command)}\n" for command in commands.failed
        )
    if commands.warnings:
        items = ((as_code(command), as_text(words)) for command, of in commands.warnings.items() for words in of)
        text += "\nWarnings of the commands that were run now:\n\n" + "".join(f"- {c}: {words}\n" for c, words in items)
    path = folder / "comparison.md"
    write_text(path, f"# Unlearning methods\n\n![Unlearn quality and utility](comparison.png)\n\n{text}")
    print(f"\n{text}\nWritten to {path}" + (", comparison.png and report.html" if found else ""))
    if commands.failed:
        messages = "\n".join(f"{command}\n  {message}" for command, message in commands.failed.items())
        raise UserError(f"these commands failed; the table has the other runs:\n{messages}")
    return path


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="compare/tiny")
def main(cfg: DictConfig) -> None:
    with job_errors(cfg.models_dir):
        check_recipe(cfg, "scripts/compare_methods.py")
        compare(cfg)


if __name__ == "__main__":
    launch(main, one_process=True)
