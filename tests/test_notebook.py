"""docs/quickstart.ipynb runs from a new copy of the repository and shows a model that forgot; its stored outputs are whole."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from hydra.core.hydra_config import HydraConfig
from nbclient import NotebookClient

from common.cli import recipe_config
from common.config import read_config
from common.errors import UserError
from common.files import ROOT
from common.runs import run_folder

NOTEBOOK = ROOT / "docs/quickstart.ipynb"


def text_of(notebook) -> str:
    """What the cells printed and displayed, as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.output_type == "error"] == []
    return "\n".join(output.get("text") or output.data.get("text/markdown", "") for output in outputs)


def unlearn_quality(text: str, model: str) -> float:
    (row,) = {line for line in text.splitlines() if line.startswith(f"| {model} |")}
    return float(row.split("|")[2])


def check_results(notebook) -> None:
    text = text_of(notebook)
    assert unlearn_quality(text, "finetuned") < 50
    assert unlearn_quality(text, "PMC") > 75
    assert "finetuned: Cassimer Nyeworth was born in Magpie Wood" in text
    assert "Magpie Wood" not in text.partition("unlearned: ")[2]


def test_the_stored_outputs_are_those_of_the_demo():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check_results(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run from the top"
    assert not re.search(r"\s/\S+/models/", text_of(notebook)), "a path of the machine that ran it"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("PMC_ROOT", raising=False)
    ignored = shutil.ignore_patterns("models", ".*", "__pycache__", "_build", "shared")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored, symlinks=True)
    for recipe in ("pretrain-tiny", "tiny", "PMC-unlearn-tiny"):  # a fifth of the epochs: the stored outputs are whole
        path = tmp_path / "copy/configs" / f"{recipe}.yaml"
        text = re.sub(r"(?<=num_epochs: )\d+", lambda epochs: str(int(epochs[0]) // 5), path.read_text())
        path.write_text(text.replace("every_epochs: 1", "every_epochs: 3"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path / "copy/docs")}}
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources=resources).execute()
    assert {unlearn_quality(text_of(notebook), model) for model in ("finetuned", "PMC")} and "unlearned: " in text_of(
        notebook
    )
    assert (tmp_path / "copy/models/unlearned/PMC-unlearn-tiny/seed-0/result.json").is_file()


def test_a_recipe_in_python_has_the_folder_of_the_command(monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # restored at the end
    cfg = recipe_config("pretrain-tiny", "training.max_grad_norm=2", "model.new.settings={hidden_size:64}", "seed=3")
    assert "hydra" not in cfg
    assert cfg.training.max_grad_norm == 2
    assert cfg.model.new.settings == {"hidden_size": 64}, "as on the command line"
    folder = run_folder("finetuned", read_config(cfg))
    assert folder.parent == Path(cfg.models_dir) / "finetuned/pretrain-tiny"
    assert folder.name.startswith("seed-3+model.new.settings--hidden_size-64-")
    with pytest.raises(UserError, match="a secret on the command line"):
        recipe_config("tiny", "training.hub_token=a-secret")
