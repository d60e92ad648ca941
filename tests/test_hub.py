"""The push of a finished run: what is pushed, what is refused before training, and what a failed push leaves."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors
from hydra import compose, initialize_config_dir

from common import hub
from common.config import read_config
from common.errors import UserError
from common.files import CONFIGS, ROOT, write_json
from common.hub import check_push, push_if_wanted
from common.run_names import run_name
from common.runs import comparable_config
from common.training_arguments import training_arguments
from tests.helpers import TOKEN

PUSH = ["+training.push_to_hub=true", "+training.hub_model_id=me/model"]


@pytest.fixture(autouse=True)
def configs(monkeypatch):
    monkeypatch.setenv("PMC_ROOT", str(ROOT))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        yield


class FakeHub:
    """Records what HfApi would be asked to do."""

    def __init__(self):
        self.calls, self.files, self.error, self.token_error = [], {}, None, None

    def __call__(self, token):
        self.calls.append(("token", token))
        return self

    def whoami(self):
        self.calls.pop()  # not of the push
        if self.token_error:
            raise self.token_error

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        if self.error:
            raise self.error
        self.files = {path.name: path.read_text() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, "model*.safetensors" in delete_patterns))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


@pytest.fixture
def folder(tmp_path):
    names = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    names += [
        "README.md",
        "generations.jsonl",
        "samples.jsonl",
        "rows.jsonl",
        "history.jsonl",
        "report.md",
        "report.png",
    ]
    names += ["training_args.bin", "modeling.py", ".lock"]
    for name in names:
        (tmp_path / name).write_text(name)
    for name in ("previous", "vanilla", "checkpoint-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("old")
    write_json(tmp_path / "result.json", {"config": {"data": {"path": f"{tmp_path}/data"}}, "scores": {"utility": 1.5}})
    return tmp_path


def read(*words, recipe="tiny"):
    cfg = compose(recipe, list(words))
    config = read_config(cfg)
    check_push(cfg, config)
    return config


def refusal(*words):
    with pytest.raises(UserError) as caught:
        read(*words)
    return str(caught.value)


def test_nothing_is_pushed_by_default(fake, folder):
    push_if_wanted(folder, read())
    assert fake.calls == []


def test_weights_tokenizer_card_and_result_are_pushed_in_one_commit(fake, folder):
    push_if_wanted(folder, read(*PUSH, "+training.hub_private_repo=true"))
    assert fake.calls == [("token", TOKEN), ("create", "me/model", True, True), ("upload", "me/model", True)]
    pushed = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(fake.files) == pushed | {"README.md", "result.json"}
    assert json.loads(fake.files["result.json"]) == {"config": {"data": {"path": "FOLDER"}}, "scores": {"utility": 1.5}}
    assert str(folder) in (folder / "result.json").read_text(), "the run's own is unchanged"


@pytest.mark.parametrize("missing", ["README.md", "model.safetensors"])
def test_nothing_is_pushed_without_card_or_weights(missing, fake, folder):
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing.replace("model", r"\*")):
        push_if_wanted(folder, read(*PUSH))
    assert fake.calls == []


def test_a_failed_push_loses_nothing_and_shows_no_token(fake, folder):
    fake.error = OSError(f"401 for {TOKEN}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        push_if_wanted(folder, read(*PUSH))
    assert "could not push to me/model (401 for ***)" in str(caught.value)
    assert "the same command pushes it again" in str(caught.value) and TOKEN not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_refused_token_is_named_before_training(fake):
    response = SimpleNamespace(headers={}, request=None)
    fake.token_error = errors.HfHubHTTPError(f"Invalid user token {TOKEN}", response=response)
    message = refusal(*PUSH)
    assert "the hub refuses the token" in message and TOKEN not in message


def test_a_hub_that_does_not_answer_is_a_warning(fake, caplog):
    fake.token_error = OSError("no network")
    read(*PUSH)
    assert "the hub does not answer now (no network)" in caplog.text


def test_only_the_first_process_pushes(fake, folder, monkeypatch):
    config = read(*PUSH)
    monkeypatch.setenv("RANK", "1")
    push_if_wanted(folder, config)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (PUSH[:1], "training.hub_model_id: missing"),
        ([PUSH[0], "+training.hub_model_id=name"], "training.hub_model_id=name: expected OWNER/NAME"),
        ([PUSH[0], "+training.hub_model_id=a/b/c"], "training.hub_model_id=a/b/c: "),
        ([*PUSH, "save_model=false"], "training.push_to_hub=true: there is nothing to push with save_model=false"),
        ([*PUSH, "model.lora={r:4}"], "training.push_to_hub=true: the adapter belongs to the weights in"),
        ([*PUSH, "+training.hub_strategy=every_save"], "training.hub_strategy: only the finished run is pushed"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_training(words, message):
    assert refusal(*words).startswith(message)


def test_an_adapter_is_pushed_if_its_base_is_on_the_hub_or_it_is_merged(tmp_path):
    read(*PUSH, "model.lora={r:4}", "model.path=owner/base")
    read(*PUSH, "model.lora={r:4,merge:true}")
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "owner/base"})
    read(*PUSH, "model.lora={r:4}", f"model.path={tmp_path}")
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": str(tmp_path)})
    assert "not on the hub" in refusal(*PUSH, "model.lora={r:4}", f"model.path={tmp_path}")


def test_a_push_needs_a_token_of_the_environment(monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "HUGGINGFACE_LOGIN_TOKEN" in refusal(*PUSH)


def test_the_runs_of_a_sweep_need_names_of_their_own(monkeypatch):
    monkeypatch.setattr(hub, "is_in_sweep", lambda: True)
    assert "the runs of a sweep would replace each other" in refusal(*PUSH)
    read(PUSH[0], "+training.hub_model_id=me/model-${seed}")


def test_the_trainer_itself_never_pushes(tmp_path):
    config = read(*PUSH, "+training.hub_private_repo=true")
    args = training_arguments(config, tmp_path, num_rows=30)
    assert (args.push_to_hub, args.hub_model_id, args.hub_private_repo) == (False, None, None)


def test_a_push_changes_neither_the_folder_nor_the_result_s_configuration():
    assert run_name(0, ["++training.push_to_hub=true", "++training.hub_model_id=me/x"]) == "seed-0"
    assert run_name(0, ["++training.push_to_hubs=1"]) != "seed-0"
    assert comparable_config(compose("tiny", PUSH)) == comparable_config(compose("tiny"))
