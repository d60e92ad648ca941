"""Which checkpoint a run continues from."""

import shutil

import pytest

from common.checkpoints import MANIFEST, last_complete_checkpoint, write_manifest
from common.files import write_json
from common.trainer import ExampleTrainer
from tests.helpers import ROWS, arguments


def example_trainer(model, prompts, folder, **more):
    examples = [prompts.example(row, 64) for row in ROWS]
    more = {"learning_rate": 1e-3, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, **more}
    return ExampleTrainer(model, arguments(folder, 4, 1, **more), examples, prompts.tokenizer)


@pytest.fixture
def trained(model, prompts, tmp_path):
    """A folder with the checkpoints of the steps 2, 4 and 6."""
    example_trainer(model, prompts, tmp_path).train()
    return tmp_path


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run_state.json")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def change_one_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_damaged_file_is_passed_over(trained, caplog, name):
    newest = trained / "checkpoint-6" / name
    original = newest.read_bytes()
    for damaging in (type(newest).unlink, cut_off, change_one_byte, lambda path: path.write_text("{}")):
        assert last_complete_checkpoint(trained).name == "checkpoint-6"
        damaging(newest)
        caplog.clear()
        assert last_complete_checkpoint(trained).name == "checkpoint-4"
        (line,) = caplog.messages
        assert "checkpoint-6" in line and name in line and "using checkpoint-4" in line
        newest.write_bytes(original)


@pytest.mark.parametrize("manifest", [None, "", "{}", "[]", "null", '{"run_state.json"'])
def test_a_checkpoint_whose_manifest_does_not_tell_is_passed_over(trained, caplog, manifest):
    path = trained / "checkpoint-6" / MANIFEST
    path.unlink() if manifest is None else path.write_text(manifest)
    assert last_complete_checkpoint(trained).name == "checkpoint-4"
    assert MANIFEST in caplog.text


def test_without_a_complete_checkpoint_there_is_none(trained, caplog):
    for folder in trained.glob("checkpoint-*"):
        (folder / MANIFEST).unlink()
    (trained / "checkpoint-x").mkdir()
    (trained / "checkpoint-9").write_text("a file")
    assert last_complete_checkpoint(trained) is None
    (line,) = caplog.messages
    assert "using none" in line and "older version" in line
    assert last_complete_checkpoint(trained / "none") is None


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one_and_writes_it_again(model, prompts, trained):
    expected = {path.name: path.read_bytes() for path in (trained / "checkpoint-6").glob("model.safetensors")}
    (trained / "checkpoint-6" / "optimizer.pt").unlink()
    trainer = example_trainer(model, prompts, trained)
    trainer.train_or_resume()
    assert len(trainer.history) == 3
    assert {name: (trained / "checkpoint-6" / name).read_bytes() for name in expected} == expected
    assert last_complete_checkpoint(trained).name == "checkpoint-6"


def test_older_checkpoints_are_deleted_only_when_the_new_one_is_complete(model, prompts, tmp_path, monkeypatch):
    there = []

    def noting(folder):
        there.append({path.name for path in tmp_path.glob("checkpoint-*")})
        write_manifest(folder)

    monkeypatch.setattr("common.trainer.write_manifest", noting)
    trainer = example_trainer(model, prompts, tmp_path, save_total_limit=1)
    trainer.train()
    assert there == [{"checkpoint-2"}, {"checkpoint-2", "checkpoint-4"}, {"checkpoint-4", "checkpoint-6"}]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert trainer.args.save_total_limit == 1


def test_files_in_folders_of_a_checkpoint_count(tmp_path):
    folder = tmp_path / "checkpoint-1"
    (folder / "shards").mkdir(parents=True)
    write_json(folder / "run_state.json", {})
    write_json(folder / "shards" / "0", {})
    write_manifest(folder)
    assert last_complete_checkpoint(tmp_path) == folder
    shutil.rmtree(folder / "shards")
    assert last_complete_checkpoint(tmp_path) is None
