"""report.html: one self-contained page on any runs, with sortable tables and plots (DataTables, Plotly). It needs no network.

Everything that comes from data sets and models is embedded as JSON and shown as text, so none of it can run.
"""

import base64
import gzip
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

from common.results import GENERATIONS, PICKS, ROWS
from common.rouge import rouge_tokens
from evaluation.plots import minutes_of_epochs
from evaluation.run_records import (
    Group,
    Run,
    differences,
    direction,
    models_before,
    place,
    rows_of,
    score_names,
    shortened,
    varied_keys,
)
from evaluation.summary import recommended, summary
from evaluation.tables import COLUMNS

TEMPLATES = Path(__file__).parent / "templates"
TEXT_RUNS = 8  # runs whose answers are in the page
TEXT_BYTES = 3_000_000  # of their texts, after the first run
MEANINGS = {
    "unlearn quality": "100 minus the recall (ROUGE-L, percent) of the true answers in greedy answers to forget questions "
    "and their paraphrases. A model that never saw the answers has less than 100, as guesses share words with them. It does "
    "not show fluency, nor what sampling or probabilities reveal.",
    "utility": "Words of the true answers in greedy answers about retained authors, real authors and world facts, percent.",
    "forget recall": "Fraction of the words of the true answers in greedy answers to forget questions.",
    "retain recall": "The same for the questions to keep.",
    "P(true answer)": "Geometric mean of the token probabilities of true forget answers. Near a retain-only model's: removed.",
    "extraction strength": "Fraction of a true forget answer that its own beginning brings out.",
    "UDS": "Unlearning depth score: how much of the forget answers is erased from the hidden states; 0: nothing, 1: as in a "
    "model that never saw them.",
    "forget quality": "p-value of the test that truth ratios are those of a retain-only model; above 0.05: not told apart.",
    "loss AUC": "How well the loss tells forget rows from rows never seen; 0.5: not at all.",
    "privleak": "The same relative to a retain-only model, percent; 0 is ideal, on both sides of it something leaks.",
    "relearned recall": "Forget recall after finetuning on the forget rows again for a short time.",
    "model utility": "Harmonic mean of TOFU's nine scores on retained authors, real authors and world facts.",
    "perplexity of forget answers": "Perplexity of the answers under the model before unlearning; high: not fluent.",
    "distinct-2": "Fraction of distinct word pairs in the answers; low: repetitive.",
    "empty": "Fraction of empty answers to forget questions.",
    "minutes": "Duration of the training, without evaluation.",
}


def page(runs: Sequence[Run], groups: Sequence[Group], title: str) -> str:
    """The whole page as HTML."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # the order of runs and scores has a meaning
    shown = runs_with_texts(groups)
    data = page_data(runs, groups, shown)
    done = [run for run in runs if run.status == "done" and not run.reference]
    of_all = (
        ""
        if len(shown) >= len(done)
        else f" Only {len(shown)} of {len(done)} runs are here, the recommended one and those on the Pareto front first."
    )
    return environment.get_template("report.html").render(
        title=title,
        about=f"Finished runs: {len(done)}. Settings: {sum(not group.reference for group in groups)}.",
        summary=[sentence.replace(" ± ", "\u00a0±\u00a0") for sentence in summary(groups)],
        missing=[{"folder": place(run.folder), "status": run.status} for run in runs if run.status != "done"],
        several=len(groups) > 1,
        seeds=data["seeds"],
        meanings=[(score["label"], MEANINGS[score["label"]]) for score in data["scores"] if score["label"] in MEANINGS],
        answers_of=f"Greedy answers before and after unlearning.{of_all}",
        data=data,
        nonce=hashlib.sha256(title.encode()).hexdigest()[:32],
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        js=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
        tables_css=_file_of("itables", "html/dt_bundle.css").read_text(encoding="utf-8"),
        tables_js=_packed(_file_of("itables", "html/dt_bundle.js")),
        plotly=_packed(_file_of("plotly", "package_data/plotly.min.js")),
    )


def _file_of(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported: itables would import pandas."""
    return Path(find_spec(package).submodule_search_locations[0]) / name


@cache
def _packed(path: Path) -> str:
    """A script, compressed and as base64: a third of its size."""
    return base64.b64encode(gzip.compress(path.read_bytes(), mtime=0)).decode()


def page_data(runs: Sequence[Run], groups: Sequence[Group], shown: Sequence[tuple[str, Run]]) -> dict[str, Any]:
    """What the page's script reads."""
    keys = varied_keys(groups)
    scores = [_score(name, runs) for name in score_names(groups)]
    main = list(COLUMNS)
    scores.sort(key=lambda score: main.index(score["label"]) if score["main"] else len(main))
    ids = {id(group): place for place, group in enumerate(groups)}
    return {
        "scores": scores,
        "axes": ["utility", "unlearn_quality"],
        "keys": [{"name": key, "short": name} for key, name in shortened(keys).items()],
        "seeds": max((len(group.runs) for group in groups), default=1),
        "incomparable": bool(differences([run for group in groups for run in group.runs])),
        "groups": [
            {
                "id": ids[id(group)],
                "name": group.name,
                "label": group.label,
                "reference": group.reference,
                "settings": group.varied,
                "front": group.on_front,
                "runs": len(group.runs),
                "best": sorted(group.best),
                "stats": {
                    score["name"]: [group.average(score["name"]), group.deviation(score["name"]), len(values)]
                    for score in scores
                    if (values := group.values(score["name"]))
                },
            }
            for group in groups
        ],
        "curves": [
            curve(run, _label(group, run), ids[id(group)])
            for group in groups
            for run in group.runs
            if run.history and not group.reference
        ],
        "answers": [row for label, run in shown for row in answers(run, label)],
        "picks": {label: picked for label, run in shown if (picked := picks(run))},
        "distributions": distributions(groups),
        **run_details(runs, groups),
    }


def _score(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    labels = {score: (label, digits) for label, (score, digits) in COLUMNS.items()}
    label, digits = labels.get(name, (name, 3))
    higher, ideal = direction(runs, name)
    better = f"near {ideal:g}" if ideal is not None else {True: "higher", False: "lower", None: ""}[higher]
    return {"name": name, "label": label, "digits": digits, "main": name in labels, "better": better}


def _label(group: Group, run: Run) -> str:
    return f"{group.label}, seed {run.seed}" if run.seed is not None else group.label


def runs_with_texts(groups: Sequence[Group]) -> list[tuple[str, Run]]:
    """The runs whose answers are shown, with their names: the recommended setting and the Pareto front first."""
    chosen = recommended(groups)
    methods = [group for group in groups if not group.reference]
    ordered = sorted(methods, key=lambda group: (group is not chosen, not group.on_front))
    labelled = [(_label(group, group.runs[0]), group.runs[0]) for group in ordered]
    labelled += [(_label(group, run), run) for group in ordered for run in group.runs[1:]]
    kept, size = [], 0
    for label, run in labelled[:TEXT_RUNS]:
        path = run.folder / GENERATIONS
        size += 2 * path.stat().st_size if path.is_file() else 0
        if kept and size > TEXT_BYTES:
            break
        kept.append((label, run))
    return kept


def curve(run: Run, label: str, group: int) -> dict[str, Any]:
    """All quantities of history.jsonl, by epoch and by the minutes spent on sampling and training."""
    names = dict.fromkeys(name for record in run.history for name in record if name != "epoch")
    return {
        "group": group,
        "label": label,
        "epoch": [record["epoch"] for record in run.history],
        "minutes": list(map(rounded, minutes_of_epochs(run.history))),
        "values": {name: [rounded(record.get(name)) for record in run.history] for name in names},
    }


def rounded(value: float | None) -> float | None:
    """To six digits: enough for a plot."""
    return None if value is None else float(f"{value:.6g}")


def answers(run: Run, label: str) -> list[dict[str, Any]]:
    """The run's greedy answers beside those before unlearning."""
    rows_before = [
        row for of in models_before(run.folder) if of.name == "finetuned" for row in rows_of(of / GENERATIONS)
    ]
    before = {(row["split"], row["index"]): row["answer"] for row in rows_before}
    rows = []
    for row in run.files(GENERATIONS):
        earlier = before.get((row["split"], row["index"]), "")
        rows.append(
            {
                "run": label,
                "split": row["split"],
                "question": row["question"],
                "truth": row["reference"],
                "before": earlier,
                "before_marks": shared_words(row["reference"], earlier),
                "after": row["answer"],
                "after_marks": shared_words(row["reference"], row["answer"]),
                "recall": row["rougeL_recall"],
            }
        )
    return rows


def shared_words(truth: str, answer: str) -> list[int]:
    """The positions of the answer's words (as split at whitespace) that the truth has, too, as ROUGE compares words."""
    known = set(rouge_tokens(truth))
    return [place for place, word in enumerate(answer.split()) if known & set(rouge_tokens(word))]


def picks(run: Run) -> list[dict[str, Any]]:
    """For each forget question the answers that PMC selected: (epoch, reward, answer)."""
    questions = {row["index"]: row["question"] for row in run.files(GENERATIONS) if row["split"] == "forget"}
    found: dict[int, list] = {}
    for row in run.files(PICKS):
        found.setdefault(row["index"], []).append([row["epoch"], row["reward"], row["answer"]])
    return [
        {"question": questions.get(index, f"question {index}"), "picks": rows} for index, rows in sorted(found.items())
    ]


# --- distributions ---

ROW_DISTRIBUTIONS = {
    "tofu/truth_ratio/forget": (
        "Truth ratio of forget questions",
        "truth ratio",
        "Near the curve of a retain-only model: the model treats true and "
        "false answers alike, as if it had never seen them.",
    ),
    "tofu/probability/forget": (
        "Probability of the true forget answers",
        "probability per token",
        "Far left: the true answers have become unlikely.",
    ),
    "memorization/extraction_strength": (
        "Extraction strength of forget answers",
        "extraction strength",
        "Far left: a beginning does not bring out the rest.",
    ),
    "privacy/loss/forget": (
        "Log-probability of forget rows",
        "mean log-probability of a token",
        "Beside a model that never saw them.",
    ),
}
MODELS_SHOWN = 8


def distributions(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Values of single questions, leakage over samples and shifts of probabilities: the first run of each group."""
    first = [
        (group.label, group.runs[0])
        for group in groups
        if group.runs[0].evaluations or "metrics" in group.runs[0].config
    ][:MODELS_SHOWN]
    rows = {label: {row["name"]: row["values"] for row in run.files(ROWS)} for label, run in first}
    found = []
    for name, (title, axis, note) in ROW_DISTRIBUTIONS.items():
        series = [
            {"name": label, "values": [rounded(value) for value in values[name] if value is not None]}
            for label, values in rows.items()
            if name in values
        ]
        if series:
            found.append(
                {
                    "title": title,
                    "kind": "cumulative",
                    "x": axis,
                    "y": "fraction of questions",
                    "note": note,
                    "series": series,
                }
            )
    return found + leakage(first) + shifts(first)


def leakage(labelled: Iterable[tuple[str, Run]]) -> list[dict[str, Any]]:
    """leak@k: the expected best recall among k samples."""
    prefix, series = "sampling/leak@", []
    for label, run in labelled:
        known = {name.removeprefix(prefix): value for name, value in run.scores.items() if name.startswith(prefix)}
        points = sorted((int(k), value) for k, value in known.items() if value is not None)
        if points:
            series.append({"name": label, "x": [k for k, _ in points], "y": [value for _, value in points]})
    plot = {
        "title": "Leakage over samples",
        "kind": "line",
        "log": True,
        "x": "samples",
        "y": "leak@k",
        "note": "The expected highest recall of a true forget answer among k sampled answers.",
    }
    return [{**plot, "series": series}] if series else []


def shifts(labelled: Iterable[tuple[str, Run]]) -> list[dict[str, Any]]:
    """The histogram of the changes of token probabilities on unrelated text."""
    series = []
    for label, run in labelled:
        results = run.evaluations.values() or [run.result]
        found = [result.get("histograms", {}).get("side_effects/probability_shift") for result in results]
        for histogram in list(filter(None, found))[-1:]:
            edges, counts = histogram["edges"], histogram["counts"]
            middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
            series.append({"name": label, "x": middles, "y": [count / max(1, sum(counts)) for count in counts]})
    plot = {
        "title": "Shift of token probabilities",
        "kind": "bars",
        "x": "change of probability against the model before unlearning",
        "y": "fraction of tokens",
        "note": "Of the tokens of answers to unrelated questions. A peak at 0: no side effects.",
    }
    return [{**plot, "series": series}] if series else []


# --- details ---


def run_details(runs: Sequence[Run], groups: Sequence[Group]) -> dict[str, Any]:
    """A row for each run: what made it, how long that took, and on what."""
    labels = {id(run): group.label for group in groups for run in group.runs}
    rows = [_details(run, labels.get(id(run), run.name)) for run in runs]
    return {"run_columns": list(rows[0]), "run_rows": [list(row.values()) for row in rows]}


def _details(run: Run, label: str) -> dict[str, str]:
    result, seconds, versions = run.result, run.result.get("seconds", {}), run.result.get("versions", {})

    def per(value: float | None, unit: float) -> str:
        return "" if value is None else f"{value / unit:.2f}"

    return {
        "run": label,
        "status": run.status,
        "seed": "" if run.seed is None else str(run.seed),
        "command": result.get("command") or "",
        "minutes": per(run.scores.get("minutes"), 1),
        "evaluation, minutes": per(seconds.get("evaluation"), 60),
        "device": result.get("device") or "",
        "peak memory, GB": per(result.get("peak_memory_bytes"), 1e9),
        "torch": versions.get("torch", ""),
        "transformers": versions.get("transformers", ""),
        "commit": (result.get("git_commit") or "")[:12],
        "folder": place(run.folder),
    }
