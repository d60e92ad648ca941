"""Loading and saving: checkpoints, new models, LoRA adapters, and what is refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.collate import collate
from common.config import LoraSettings, ModelConfig, NewModelConfig, PromptConfig
from common.errors import UserError
from common.losses import answer_losses
from common.model import ADAPTER, add_adapter, eos_token_ids, load_model, load_tokenizer
from common.new_model import train_tokenizer
from common.prompts import PromptFormat
from tests.helpers import NEW, ROWS, SETTINGS

LORA = LoraSettings(r=4, alpha=8)
IDS = torch.tensor([[5, 60, 70, 8, 90]])


def config(path, **options) -> ModelConfig:
    return ModelConfig(path=None if path is None else str(path), prompt=PromptConfig(style="plain"), **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def error_of(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def trained_adapter(model):
    """The model with an adapter whose output is not zero, as a fresh one's is."""
    torch.manual_seed(1)
    model = add_adapter(model, LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def adapter(tmp_path, checkpoint, tokenizer):
    """A saved adapter and the logits of the model that it was saved from."""
    model = trained_adapter(load_model(config(checkpoint), tokenizer, trainable=False))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def gradients(model, tokenizer) -> dict[str, torch.Tensor | None]:
    """The gradient of every trained parameter for the loss on two rows."""
    prompts = PromptFormat(tokenizer, PromptConfig(style="plain"))
    losses, _ = answer_losses(model.train(), collate([prompts.example(row, 100) for row in ROWS[:2]]))
    losses.mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- new models and checkpoints -----------------------------------------------------------------------------------------


def test_a_new_model_has_the_architecture_and_the_tokenizers_vocabulary():
    new = config(None, new=NEW)
    tokenizer = load_tokenizer(new, [f"{row.question} {row.answer}" for row in ROWS])
    model = load_model(new, tokenizer, trainable=True)
    assert (type(model).__name__, model.dtype) == ("LlamaForCausalLM", torch.float32)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert (len(tokenizer), len(model.model.layers)) == (400, 2)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_a_new_tokenizer_knows_every_text(tokenizer):
    text = "Zoë's “{x}” 日本\t\n  1987"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("settings", [{"hidden_sise": 64}, {"hidden_size": "x"}, {"num_attention_heads": 5}])
def test_wrong_settings_of_a_new_model_are_refused(tokenizer, settings):
    new = NewModelConfig("llama", {**SETTINGS, **settings}, vocab_size=400)
    assert error_of(load_model, config(None, new=new), tokenizer, True).startswith("model.new (architecture=llama)")


def test_an_unknown_architecture_is_refused(tokenizer):
    message = error_of(load_model, config(None, new=NewModelConfig("lama", SETTINGS)), tokenizer, True)
    assert message.startswith("model.new (architecture=lama): ")


def test_a_saved_model_is_an_ordinary_checkpoint(checkpoint, model, tokenizer):
    loaded, its_tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert torch.equal(logits(loaded), logits(model))
    text = ROWS[0].question + ROWS[0].answer
    assert its_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert its_tokenizer.eos_token_id == tokenizer.eos_token_id


def test_a_checkpoint_loads_as_it_was_saved(checkpoint, model):
    tokenizer = load_tokenizer(config(checkpoint))
    loaded = load_model(config(checkpoint), tokenizer, trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_loads_in_the_dtype_asked_for(checkpoint, tokenizer, dtype):
    loaded = load_model(config(checkpoint, dtype=dtype), tokenizer, trainable=False)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}


def test_end_tokens_are_the_prompts_and_the_generation_configs(model):
    assert eos_token_ids(model, 7) == [0, 7]
    model.generation_config.eos_token_id = [9, 5]
    assert eos_token_ids(model, 7) == [5, 7, 9]
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model, 7) == [7]


# --- adapters -----------------------------------------------------------------------------------------------------------


def test_only_the_adapter_trains(checkpoint, tokenizer):
    model = load_model(config(checkpoint, lora=LORA), tokenizer, trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 7 * 2  # two layers of seven linear maps, A and B


def test_a_fresh_adapter_changes_nothing(checkpoint, model, tokenizer):
    adapted = load_model(config(checkpoint, lora=LORA), tokenizer, trainable=True)
    assert torch.equal(logits(adapted), logits(model))


def test_no_adapter_is_added_where_nothing_trains(checkpoint, tokenizer):
    model = load_model(config(checkpoint, lora=LORA), tokenizer, trainable=False)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_every_adapter_parameter_gets_a_gradient(model, tokenizer, checkpointing):
    model = trained_adapter(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    found = gradients(model, tokenizer)
    assert len(found) == 28
    assert [name for name, gradient in found.items() if gradient is None or not gradient.any()] == []


def test_an_adapter_goes_on_training_under_gradient_checkpointing(adapter, tokenizer):
    path, before = adapter
    model = load_model(config(path, lora=LORA), tokenizer, trainable=True)
    assert torch.allclose(logits(model), before, atol=1e-6)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    found = gradients(model, tokenizer)
    assert len(found) == 28
    assert [name for name, gradient in found.items() if gradient is None or not gradient.any()] == []


def test_a_saved_adapter_merges_to_the_same_logits(adapter, model, tokenizer):
    path, before = adapter
    merged = load_model(config(path), load_tokenizer(config(path)), trainable=False)
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
    assert torch.allclose(logits(merged), before, atol=1e-5)
    assert (before - logits(model)).abs().max() > 0.05  # the adapter matters


def test_training_a_merged_adapter_trains_all_parameters(adapter, tokenizer):
    """Without model.lora a checkpoint that is an adapter is merged and then trained as any other model."""
    model = load_model(config(adapter[0]), tokenizer, trainable=True)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == []


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ".*lm_head", ["q_proj", "lm_head"]])
def test_an_adapter_on_a_tied_weight_is_refused(model, targets):
    message = error_of(add_adapter, model, LoraSettings(target_modules=targets))
    assert message.startswith("model.lora.target_modules: embed_tokens and lm_head share one weight")


def test_a_saved_adapter_on_a_tied_weight_is_refused(model, checkpoint, tokenizer, tmp_path):
    get_peft_model(model, PeftLoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    saved["base_model_name_or_path"] = str(checkpoint)
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    message = error_of(load_model, config(tmp_path), tokenizer, trainable=False)
    assert "embed_tokens and lm_head share one weight" in message


def test_training_16_bit_weights_warns(checkpoint, tokenizer, caplog):
    load_model(config(checkpoint, dtype="bfloat16"), tokenizer, trainable=True)
    assert caplog.messages[0].startswith("model.dtype=bfloat16: at small learning rates most updates")
    caplog.clear()
    load_model(config(checkpoint, dtype="bfloat16"), tokenizer, trainable=False)
    load_model(config(checkpoint, dtype="bfloat16", lora=LORA), tokenizer, trainable=True)
    assert not caplog.messages


def test_target_modules_that_are_not_there_name_the_candidates(model):
    message = error_of(add_adapter, model, LoraSettings(target_modules=["qproj"]))
    assert message.startswith("model.lora.target_modules=['qproj']: ")
    assert message.endswith(
        "linear layers here: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        (LoraSettings(r=2, alpha=8), "r=2 (checkpoint: 4)"),
        (LoraSettings(r=4, alpha=16), "alpha=16 (checkpoint: 8)"),
        (LoraSettings(r=4, alpha=8, dropout=0.1), "dropout=0.1 (checkpoint: 0.0)"),
        (
            LoraSettings(r=4, alpha=8, target_modules=["q_proj", "v_proj"]),
            "target_modules=['q_proj', 'v_proj'] (checkpoint: 14 layers)",
        ),
    ],
)
def test_going_on_with_an_adapter_of_another_shape_is_refused(adapter, tokenizer, lora, named):
    message = error_of(load_model, config(adapter[0], lora=lora), tokenizer, True)
    assert message.startswith(f"model.lora.{named}: {adapter[0]} is an adapter")


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q|v)_proj", "model.layers.1.mlp.up_proj"]
)
def test_an_adapter_is_continued_with_its_own_target_modules_only(targets, checkpoint, tokenizer, tmp_path):
    lora = LoraSettings(target_modules=targets)
    load_model(config(checkpoint, lora=lora), tokenizer, trainable=True).save_pretrained(tmp_path / "adapter")
    load_model(config(tmp_path / "adapter", lora=lora), tokenizer, trainable=True)
    other = LoraSettings(target_modules=["o_proj"])
    assert "model.lora.target_modules=['o_proj'] (checkpoint: " in error_of(
        load_model, config(tmp_path / "adapter", lora=other), tokenizer, True
    )


def record(folder, name, start=None, started_from=None):
    """Write the result of a run that started from the result `start` in another folder."""
    config = {"start": start} if start else {}
    (folder / "result.json").write_text(json.dumps({"id": name, "started_from": started_from, "config": config}))


def test_an_adapter_whose_base_was_replaced_is_refused(adapter, checkpoint, tokenizer, tmp_path):
    record(checkpoint, "first")
    record(adapter[0], "adapter", "first", "../checkpoint")
    continued = shutil.copytree(adapter[0], tmp_path / "continued")
    record(continued, "continued", "adapter", "../adapter")
    for path in (adapter[0], continued):
        load_model(config(path), tokenizer, trainable=False)
    record(checkpoint, "second")
    for path in (adapter[0], continued):
        message = error_of(load_model, config(path), tokenizer, trainable=False)
        assert message.startswith(f"model.path={path}: its adapter was trained on the weights first in ")
        assert "there are the weights second now" in message


def test_an_adapter_whose_base_has_no_record_is_loaded(adapter, checkpoint, tokenizer):
    record(adapter[0], "adapter", None, "../checkpoint")
    record(checkpoint, "second")
    load_model(config(adapter[0]), tokenizer, trainable=False)


def test_an_adapter_keeps_the_revision_of_its_base(checkpoint, tokenizer, tmp_path):
    model = load_model(config(checkpoint, lora=LORA, revision="v1"), tokenizer, trainable=True)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / ADAPTER).read_text())["revision"] == "v1"


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_checkpoint_names_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    message = error_of(load_tokenizer, config(tmp_path))
    assert message.startswith(f"model.path={tmp_path}: not a checkpoint; expected config.json")
    assert message.endswith("found notes.txt")


def test_an_empty_folder_is_refused_with_the_command_that_fills_it(tmp_path):
    message = error_of(load_tokenizer, config(tmp_path, made_by="make it"))
    assert message.endswith("found nothing; make it with: make it")


def test_a_file_is_refused(checkpoint):
    message = error_of(load_tokenizer, config(checkpoint / "model.safetensors"))
    assert "is a file; name the folder it is in" in message


@pytest.mark.parametrize(
    ("path", "made_by", "ending"),
    [
        ("./no/such", None, "model.path=./no/such: no such folder"),
        ("models/no/such", "make it", "model.path=models/no/such: no such folder; make it with: make it"),
    ],
)
def test_a_missing_folder_is_refused_with_the_command_that_makes_it(path, made_by, ending):
    assert error_of(load_tokenizer, config(path, made_by=made_by)) == ending


def test_the_command_of_a_recipes_path_does_not_keep_another_one_from_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **_: asked.append(path))
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda path, **_: (_ for _ in ()).throw(OSError("not reachable"))
    )
    message = error_of(load_tokenizer, config("owner/name", made_by="make it"))
    assert asked == ["owner/name"]
    assert "(not reachable). A gated or remote model needs the hub" in message


def test_a_setting_of_another_architecture_is_refused(tokenizer):
    message = error_of(load_model, config(None, new=NewModelConfig("gpt2", {"intermediate_size": 8})), tokenizer, True)
    assert message.startswith("model.new (architecture=gpt2): no setting 'intermediate_size'")


@pytest.mark.parametrize("name", ["nonsense", "owner/kernel"])
def test_an_attention_implementation_that_cannot_be_used_is_named_with_those_that_can(checkpoint, tokenizer, name):
    message = error_of(load_model, config(checkpoint, attn_implementation=name), tokenizer, False)
    assert message.startswith(f"model.attn_implementation={name}: ")
    assert "eager" in message
    assert "sdpa" in message
    assert "hub" not in message.lower()


def test_a_missing_gguf_file_is_refused(checkpoint):
    message = error_of(load_tokenizer, config(checkpoint, gguf_file="x.gguf"))
    assert message == f"model.gguf_file=x.gguf: no such file in {checkpoint}"


def test_pickled_weights_are_refused(checkpoint, model):
    (checkpoint / "model.safetensors").unlink()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    assert "not a checkpoint; expected config.json" in error_of(load_tokenizer, config(checkpoint))


def test_pickled_weights_beside_others_are_not_read(checkpoint, model, tokenizer):
    other = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save(other, checkpoint / "pytorch_model.bin")
    assert torch.equal(logits(load_model(config(checkpoint), tokenizer, trainable=False)), logits(model))


def test_an_adapter_of_pickled_weights_is_refused(adapter, checkpoint, model, tokenizer):
    (checkpoint / "model.safetensors").unlink()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    assert "not a checkpoint" in error_of(load_model, config(adapter[0]), tokenizer, False)


def test_a_pickled_adapter_is_refused(adapter, checkpoint):
    path, _ = adapter
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    shutil.copyfile(checkpoint / "model.safetensors", path / "model.safetensors")  # not the adapter's
    assert "not a checkpoint" in error_of(load_tokenizer, config(path))


def test_a_tokenizer_with_more_ids_than_embedding_rows_is_refused(checkpoint, chat_tokenizer):
    chat_tokenizer.save_pretrained(checkpoint)
    message = error_of(load_tokenizer, config(checkpoint))
    assert message.startswith(f"model.path={checkpoint}: its tokenizer has 402 ids and its embedding 400 rows")
    message = error_of(load_model, config(checkpoint), chat_tokenizer, False)
    assert message.startswith(f"model.path={checkpoint}: its tokenizer has 402 ids and its embedding 400 rows")


def test_an_adapter_with_a_tokenizer_of_more_ids_is_refused(adapter, chat_tokenizer):
    path, _ = adapter
    chat_tokenizer.save_pretrained(path)
    message = error_of(load_model, config(path), chat_tokenizer, False)
    assert "its tokenizer has 402 ids and its embedding 400 rows" in message


def test_a_model_with_more_embedding_rows_than_ids_is_accepted(tmp_path, tokenizer):
    """Phi and Gemma pad their embedding."""
    padded = load_model(config(None, new=NEW), tokenizer, trainable=False)
    padded.resize_token_embeddings(416)
    padded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(config(tmp_path), load_tokenizer(config(tmp_path)), trainable=False)
    assert loaded.get_input_embeddings().num_embeddings == 416


def test_weights_cut_short_are_refused(checkpoint, tokenizer):
    """As an interrupted copy or download leaves them."""
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = error_of(load_model, config(checkpoint), tokenizer, False)
    assert message.startswith(f"model.path={checkpoint}: its weights could not be loaded")
    assert message.endswith("; copy or make damaged files again")
    assert "hub" not in message
    assert "token" not in message


def test_a_checkpoint_without_some_of_its_weights_is_refused(checkpoint, tokenizer):
    """transformers fills them with random numbers, and its warning is switched off here."""
    settings = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    assert f"model.path={checkpoint}" in error_of(load_model, config(checkpoint), tokenizer, False)


@pytest.mark.parametrize("content", ["{", '{"model_type": "no_such"}'])
def test_a_broken_configuration_is_refused(checkpoint, tokenizer, content):
    (checkpoint / "config.json").write_text(content)
    assert f"model.path={checkpoint}" in error_of(load_tokenizer, config(checkpoint))
    assert f"model.path={checkpoint}" in error_of(load_model, config(checkpoint), tokenizer, False)


def test_an_adapter_whose_base_is_gone_is_refused(adapter, checkpoint, tokenizer):
    shutil.rmtree(checkpoint)
    assert (adapter[0] / ADAPTER).is_file()
    assert "no such folder" in error_of(load_model, config(adapter[0]), tokenizer, False)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_json_file_of_a_checkpoint_that_holds_a_list_ends_in_one_message(checkpoint, name):
    (checkpoint / name).write_text("[]")

    def load():
        load_model(config(checkpoint), load_tokenizer(config(checkpoint)), trainable=False)

    assert error_of(load).startswith(f"model.path={checkpoint}: its ")


def test_another_tokenizer_must_agree_with_that_of_the_checkpoint(checkpoint, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "same")
    assert load_tokenizer(config(checkpoint, tokenizer=str(tmp_path / "same"))).get_vocab() == tokenizer.get_vocab()
    train_tokenizer(NEW, ["other texts have other words"]).save_pretrained(tmp_path / "other")
    message = error_of(load_tokenizer, config(checkpoint, tokenizer=str(tmp_path / "other")))
    assert "gives other token ids than the tokenizer in" in message
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    assert len(load_tokenizer(config(checkpoint, tokenizer=str(tmp_path / "same")))) == len(tokenizer)
    assert f"model.tokenizer={tmp_path}/none: could not be loaded" in error_of(
        load_tokenizer, config(checkpoint, tokenizer=f"{tmp_path}/none")
    )


def test_a_temperature_without_do_sample_does_not_prevent_saving(tmp_path, checkpoint, tokenizer):
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.9, "top_p": 0.6}))
    model = load_model(config(checkpoint), tokenizer, trainable=True)
    model.generation_config.pad_token_id = 0  # as the Trainer sets it: settings that are as loaded are not checked
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert not {"top_p", "temperature", "do_sample"} & saved.keys(), "it is greedy, as before"
