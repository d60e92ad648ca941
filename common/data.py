"""Load questions and answers, or texts to continue: splits of a data set from the hub, or JSON files of any data set.

Slices and sums of splits are written as in the `datasets` library: "forget01[:20] + retain99[:60]". A filter keeps the
rows whose columns have these values, in which * stands for any characters: "forget{task=Task2,id=*sc1}[:20]". A split of a
configuration of the hub is "configuration/split"; in a local folder that is the file FOLDER/configuration/split.json.
"""

import json
import logging
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import Columns, DataConfig, WindowsConfig, problem_list
from common.errors import UserError, did_you_mean, first_line
from common.files import ROOT, SURROGATE, looks_local, resolve_path

log = logging.getLogger(__name__)

SCORED_RETAIN_ROWS = 400
FORGET_ROLES = ("forget", "forget_paraphrased")  # of unlearn quality
UTILITY_ROLES = ("retain", "real_authors", "world_facts")
HEADLINE_ROLES = FORGET_ROLES + UTILITY_ROLES
WHOLE_TEXTS = ("forget_texts", "holdout_texts")  # roles whose texts are not cut into windows
_PART = re.compile(
    r"^(?P<name>[\w.\-]+(?:/[\w.\-]+)?)(?:\{(?P<filter>[^{}]*)\})?(?:\[(?P<start>\d*):(?P<stop>\d*)\])?$"
)


class HubError(UserError):
    """The hub cannot be reached or lacks the data. Loading stops: every other split would wait for the same retries."""


@dataclass(frozen=True)
class Row:
    """A question with its answer. `index` is its position in the split and identifies it, as questions may repeat.

    `entity` is the part of the answer that holds the knowledge. `text` is given if the row is a window of that text; the
    question is then the window's beginning and the answer its continuation. A whole text (`WHOLE_TEXTS`) is an answer to an
    empty question.
    """

    index: int
    question: str
    answer: str
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answer: tuple[str, ...] = ()
    entity: str | None = None
    text: str | None = None

    @property
    def is_passage(self) -> bool:
        """Whether the row is a window of a text."""
        return self.text is not None

    @property
    def pair(self) -> tuple[str, str]:
        """Question and answer."""
        return self.question, self.answer


def load_split(data: DataConfig, role: str) -> list[Row]:
    """Load the split of a role (train, forget, retain, ...).

    Raises:
        UserError: for a missing role, split, file or column, a malformed line, an empty question or answer.
    """
    if data.splits.get(role) is None:
        known = ", ".join(data.splits)
        raise UserError(f"data.splits.{role}: missing{did_you_mean(role, data.splits)} (given: {known})")
    return load_rows(data, data.splits[role], f"data.splits.{role}", whole_texts=role in WHOLE_TEXTS)


def load_rows(data: DataConfig, splits: str, key: str, whole_texts: bool = False) -> list[Row]:
    """Load a split, filtered or sliced, or a sum of these. A text becomes one row per window.

    Windows that `windows_of` cannot cut are left out with a warning, unless none is left.

    Args:
        key: the configuration key that names the splits, for error messages.
        whole_texts: every row must have a text, and is that text as a whole.
    Raises:
        UserError: as `load_split`.
    """
    records = [record for part in splits.split("+") for record in _load_part(data, key, part.strip())]
    if not records:
        raise UserError(f"{key}={splits}: has no row")
    if whole_texts:
        return [Row(index, "", _text_of(data, record, where)) for index, (where, record) in enumerate(records)]
    found = [made for where, record in records for made in _in_windows(data, record, where)]
    rows = [(where, record) for where, record in found if record is not None]
    if unusable := [where for where, record in found if record is None]:
        message = (
            f"{key}: {len(unusable)} of {len(found)} windows have no space after data.windows.prompt_words="
            f"{data.windows.prompt_words} words, so nothing is left to continue (the first: {unusable[0]})"
        )
        if not rows:
            raise UserError(f"{message}; lower it, or leave these texts out")
        log.warning("%s; they are left out", message)
    return [_to_row(index, record, where, data.columns) for index, (where, record) in enumerate(rows)]


def load_splits(data: DataConfig, roles: tuple[str, ...]) -> dict[str, list[Row]]:
    """Load several splits by role. A single UserError lists the problems of all of them."""
    splits, problems = {}, []
    for role in roles:
        try:
            splits[role] = load_split(data, role)
        except HubError:
            raise
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(problem_list(problems))
    return splits


def check_apart(rows: list[Row], others: list[Row], other_role: str, role: str = "forget") -> None:
    """Warn of rows of one role that are also in another, of which they must not be.

    Args:
        other_role: of `others`, such as retain or holdout.
        role: of `rows`.
    Raises:
        UserError: if all of `others` are also in `rows`.
    """
    known = {row.pair for row in rows}
    shared = sum(row.pair in known for row in others)
    key = f"data.splits.{other_role}"
    if shared == len(others):
        raise UserError(f"{key}: all {shared} rows are also in data.splits.{role}; name a split of other rows")
    if shared:
        log.warning("%s: %d of %d rows are also in data.splits.%s", key, shared, len(others), role)


def scored_retain_rows(rows: list[Row], full_eval: bool) -> list[Row]:
    """The retain rows for measuring utility: all, or 400 drawn with replacement exactly as in the PMC authors' code."""
    if full_eval or len(rows) <= SCORED_RETAIN_ROWS:
        return rows
    drawn = np.random.default_rng(12345).integers(0, len(rows), SCORED_RETAIN_ROWS)
    return [rows[i] for i in drawn]


def _load_part(data: DataConfig, key: str, part: str) -> list[tuple[str, dict]]:
    """The records of one "name{column=value}[start:stop]", each with its location for error messages."""
    match = _PART.match(part)
    if not match:
        raise UserError(
            f"{key}={part!r}: expected a split's name, a slice name[:20], a filter name{{column=value}}, or a sum of them"
        )
    start, stop = (int(bound) if bound else None for bound in (match["start"], match["stop"]))
    path = resolve_path(data.path)
    if Path(path).is_dir():
        records = _read_json(Path(path), match["name"], key)
    elif looks_local(data.path):
        raise UserError(f"data.path={data.path}: no such folder (looked in the working folder and in {ROOT})")
    else:
        records = _read_from_hub(data, match["name"], key)
    if match["filter"] is not None:
        records = _filtered(records, match["filter"], f"{key}={part}")
    if max(start or 0, stop or 0) > len(records) or not records[start:stop]:
        which = f"{match['name']}{{{match['filter']}}}" if match["filter"] is not None else match["name"]
        raise UserError(f"{key}={part}: {which} has {len(records)} rows")
    return records[start:stop]


def _filtered(records: list[tuple[str, dict]], conditions: str, key: str) -> list[tuple[str, dict]]:
    """The records that meet all conditions "column=value,column=value".

    In a value, * stands for any characters and ? for one. Values that are no text have their JSON spelling (true, null).
    """
    for condition in conditions.split(","):
        column, equals, value = (part.strip() for part in condition.partition("="))
        if not equals or not column:
            raise UserError(
                f"{key}: {condition!r} is no filter; write column=value, with ? in place of , + {{ and }} in a value"
            )
        for where, record in records:
            if column not in record:
                raise UserError(f"{where}: no column '{column}' ({key}{did_you_mean(column, record)})")
        wanted = re.compile(re.escape(value).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)
        records = [found for found in records if wanted.fullmatch(_as_text(found[1][column]))]
        if not records:
            raise UserError(f"{key}: no row has {condition.strip()}")
    return records


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _named(columns: Columns, field: str) -> list[str]:
    """The columns that may have a field."""
    named = columns.get(field, [])
    return [named] if isinstance(named, str) else named


def column_of(columns: Columns, field: str, record: dict, where: str) -> str | None:
    """The record's column for a field; None if the record has none, or the configuration names none.

    Raises:
        UserError: if the record has several of the columns that the configuration names as alternatives.
    """
    # Where rows differ, the library datasets fills the columns that a row does not have with None.
    found = [column for column in _named(columns, field) if record.get(column) is not None]
    if len(found) > 1:
        raise UserError(f"{where}: has {' and '.join(found)}; which is meant? (data.columns.{field})")
    return found[0] if found else None


def _in_windows(data: DataConfig, record: dict, where: str) -> list[tuple[str, dict | None]]:
    """A record with a text as one record per window, with its question and answer; any other record as it is.

    A window that cannot be cut is None.
    """
    column = column_of(data.columns, "text", record, where)
    if column is None:
        return [(where, record)]
    if any(column_of(data.columns, field, record, where) for field in ("question", "answer")):
        raise UserError(f"{where}: has a text ({column}) and a question or an answer; which is to be learned?")
    question, answer = (_named(data.columns, field)[0] for field in ("question", "answer"))
    return [
        (f"{where}, window {number}", pair and {column: record[column], question: pair[0], answer: pair[1]})
        for number, pair in enumerate(windows_of(_text_of(data, record, where), data.windows), start=1)
    ]


def _text_of(data: DataConfig, record: dict, where: str) -> str:
    column = column_of(data.columns, "text", record, where)
    if column is None:
        named = data.columns.get("text")
        raise UserError(f"{where}: no text (data.columns.text={named}); has {', '.join(record)}")
    _check_text(record[column], f"{where}: {column}")
    return record[column]


def is_visible(text: str) -> bool:
    """Whether the text has a character that can be seen, which spaces and control and format characters cannot."""
    return any(unicodedata.category(character) not in ("Zs", "Zl", "Zp", "Cc", "Cf") for character in text)


def _check_text(value: Any, name: str) -> None:
    """Check that the value is a text, or a list of texts.

    Raises:
        UserError: begins with the name.
    """
    texts = value if isinstance(value, list) else [value]
    if any(isinstance(text, str) and SURROGATE.search(text) for text in texts):
        raise UserError(f"{name} has half of a surrogate pair, which is not text: {value!r}")
    if not all(isinstance(text, str) and is_visible(text) for text in texts):
        raise UserError(f"{name} is empty or not text: {value!r}")


def windows_of(text: str, windows: WindowsConfig) -> list[tuple[str, str] | None]:
    """The windows of a text as (prompt, continuation), which a single space separates in the text.

    A window that is too short, or has no single space after the prompt, is None.

    The last window is moved back so that it ends with the text; a shorter text is one window. A prompt whose last word is
    followed by other whitespace than a space is longer by the words up to the next space: the tokens of prompt and
    continuation are then those of the running text.

    >>> windows_of("a b c d e f g", WindowsConfig(words=4, prompt_words=1, stride=4))
    [('a', 'b c d'), ('d', 'e f g')]
    """
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    last = max(0, len(spans) - windows.words)
    found = []
    for start in dict.fromkeys([*range(0, last, windows.stride), last]):
        window = spans[start : start + windows.words]
        pairs = zip(window[windows.prompt_words - 1 :], window[windows.prompt_words :], strict=False)
        cut = next((end for (_, end), (begin, _) in pairs if text[end:begin] == " "), None)
        found.append(None if cut is None else (text[window[0][0] : cut], text[cut + 1 : window[-1][1]]))
    return found


def local_files(path: str, splits: str) -> list[Path]:
    """The files that a sum of splits is read from; those that do not exist, and splits of the hub, have none."""
    files, names = _json_files(Path(resolve_path(path))), [_PART.match(part.strip()) for part in str(splits).split("+")]
    return [files[match["name"]] for match in names if match and match["name"] in files]


def _json_files(folder: Path) -> dict[str, Path]:
    """Split -> its file in a data set's folder."""
    paths = [path for path in sorted(folder.glob("*.json*")) + sorted(folder.glob("*/*.json*")) if _is_json(path)]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _read_json(folder: Path, name: str, key: str) -> list[tuple[str, dict]]:
    """The objects in the file <name>.json or <name>.jsonl: one in each line, or all in one array."""
    files = _json_files(folder)
    if name not in files:
        hint, found = did_you_mean(name, files), ", ".join(sorted(files)) or "none"
        raise UserError(f"{key}={name}: no {folder / name}.json{hint} (there: {found})")
    file = files[name]
    if file.with_suffix(".json").is_file() and file.with_suffix(".jsonl").is_file():
        raise UserError(f"{key}={name}: {folder} has {name}.json and {name}.jsonl; remove one of them")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error})") from error
    if re.match(r"\s*\[\s*[{\]]", text):
        records = _parse(text, str(file), list)
        wrong = next((number for number, record in enumerate(records) if not isinstance(record, dict)), None)
        if wrong is not None:
            raise UserError(f"{file}, row {wrong}: not a JSON object but {type(records[wrong]).__name__}")
        return [(f"{file}, row {number}", record) for number, record in enumerate(records)]
    lines = enumerate(text.split("\n"), start=1)  # splitlines() would also split at other characters
    numbered = ((f"{file}, line {number}", line) for number, line in lines)
    return [(where, _parse(line, where)) for where, line in numbered if line.strip()]


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl") and path.is_file()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return found


def _parse(text: str, where: str, expected: type = dict) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if expected is list else ""
        kind = "array" if expected is list else "object"
        raise UserError(f"{where}: not a JSON {kind} ({error.msg}, {line}column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or very deep nesting
        raise UserError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(value, expected):
        raise UserError(f"{where}: not a JSON object but {type(value).__name__}")
    return value


def _read_from_hub(data: DataConfig, name: str, key: str) -> list[tuple[str, dict]]:
    """The rows of "split" or "configuration/split" of a data set on the hub.

    Raises:
        UserError: if the data set has no such configuration or split; lists those that it has.
        HubError: for any other reason.
    """
    from datasets import load_dataset

    configuration, _, split = name.rpartition("/")
    if not configuration and data.hub_configurations:
        configuration, split = name, "train"
    try:
        dataset = load_dataset(data.path, *([configuration] if configuration else []), split=split)
    except Exception as error:  # errors of datasets, huggingface_hub, HTTP and the file system
        if wrong := _wrong_name(data.path, configuration, split, error):
            raise UserError(f"{key}={name}: {data.path} has no {wrong}") from error
        raise HubError(
            f"data.path={data.path}, split {name}: could not be loaded from the hub ({type(error).__name__}: "
            f"{first_line(error, 200)}). Without the hub: data.path=FOLDER with {name}.json in it"
        ) from error
    return [(f"{data.path}/{name}, row {number}", record) for number, record in enumerate(dataset)]


def _wrong_name(path: str, configuration: str, split: str, error: Exception) -> str | None:
    """Which of the names does not exist, with those that do; None if the error has another cause."""
    from datasets import get_dataset_config_names, get_dataset_split_names

    if not isinstance(error, ValueError):  # what the library raises for a wrong name
        return None
    try:
        known, kind, place, word = get_dataset_config_names(path), "configuration", "", configuration
        if not configuration or configuration in known:
            known = get_dataset_split_names(path, *([configuration] if configuration else []))
            kind, place, word = "split", f" in {configuration}" if configuration else "", split
    except Exception:  # no connection
        return None
    return None if word in known else f"{kind} {word!r}{place}{did_you_mean(word, known)} (there: {', '.join(known)})"


def _to_row(index: int, record: dict, where: str, columns: Columns) -> Row:
    found = {field: column_of(columns, field, record, where) for field in columns}
    for field in ("question", "answer"):
        if found[field] is None:
            named = _named(columns, field)
            if null := [name for name in named if name in record]:
                raise UserError(f"{where}: {null[0]} is empty or not text: None")
            names, hint = "' or '".join(named), next(filter(None, (did_you_mean(name, record) for name in named)), "")
            raise UserError(f"{where}: no column '{names}' (data.columns.{field}{hint}); has {', '.join(record)}")
    values = {field: record[column] for field, column in found.items() if column is not None}

    for field, value in values.items():
        if (field == "perturbed_answer") != isinstance(value, list):  # the one field that is a list of texts
            raise UserError(f"{where}: {found[field]} is empty or not text: {value!r}")
        _check_text(value, f"{where}: {found[field]}")
    if (entity := values.get("entity", "")) not in values["answer"]:
        raise UserError(f"{where}: {found['entity']} is no part of the answer: {entity!r} (data.columns.entity)")
    values["perturbed_answer"] = tuple(values.get("perturbed_answer", ()))
    return Row(index=index, **values)
