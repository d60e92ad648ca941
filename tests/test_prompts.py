"""Prompts and examples as token ids: plain and chat, EOS tokens, no second BOS, padding."""

import re
from unittest.mock import Mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

import finetuning.main
import unlearning.main
from common.collate import collate
from common.config import PromptConfig, read_config
from common.data import Row
from common.errors import UserError
from common.files import CONFIGS
from common.new_model import train_tokenizer
from common.prompts import Example, PromptFormat, check_prompt_lengths
from tests.helpers import CHAT_TEMPLATE, NEW, ROWS
from unlearning.pmc import PMC

QUESTION, ANSWER = "Who is Bram Toll?", "A poet."
CHAT = PromptConfig(style="chat", system="You are a helpful assistant.")


def add_bos(tokenizer):
    """Make a tokenizer put a BOS before every text, as Llama's does."""
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", bos)]
    )
    assert tokenizer(QUESTION)["input_ids"][0] == bos
    return tokenizer


# --- plain --------------------------------------------------------------------------------------------------------------


def test_plain_prompt_and_answer(prompts, tokenizer):
    assert tokenizer.decode(prompts.prompt(QUESTION)) == "Question: Who is Bram Toll?\nAnswer:"
    assert tokenizer.decode(prompts.answer(ANSWER)) == " A poet.<|end|>"
    assert prompts.eos_token_id == tokenizer.eos_token_id == prompts.answer(ANSWER)[-1]


def test_plain_templates_of_the_configuration(tokenizer):
    form = PromptFormat(tokenizer, PromptConfig(style="plain", question="{x} {question}\nA", answer="{}={answer}"))
    assert tokenizer.decode(form.prompt("x?") + form.answer("y")) == "{x} x?\nA{}=y<|end|>"


@pytest.mark.parametrize("text", ["{x}", "{question} {answer}", "{}", "{0} {{a}} }{", "100% %s \\n"])
def test_braces_pass_through_unchanged(prompts, tokenizer, text):
    assert tokenizer.decode(prompts.prompt(text)) == f"Question: {text}\nAnswer:"
    assert tokenizer.decode(prompts.answer(text)) == f" {text}<|end|>"


def test_braces_pass_through_a_chat_unchanged(chat_tokenizer):
    form = PromptFormat(chat_tokenizer, CHAT)
    text = "{x} {{ y }} {% z %}"
    assert f"user\n{text}<|im_end|>" in chat_tokenizer.decode(form.prompt(text))
    assert chat_tokenizer.decode(form.answer(text)) == f"{text}<|im_end|>"


def test_a_plain_prompt_has_one_bos_and_an_answer_none(tokenizer_with_bos):
    form = PromptFormat(tokenizer_with_bos, PromptConfig(style="plain"))
    bos = tokenizer_with_bos.bos_token_id
    assert form.prompt(QUESTION)[0] == bos
    assert form.prompt(QUESTION).count(bos) == 1
    assert bos not in form.answer(ANSWER)


EOS, CLS, SEP = "</s>", "[CLS]", "[SEP]"


def words(template: str, special: list[str]):
    """A tokenizer of words whose post-processor is `template`."""
    names = [*special, "<unk>", "Question", "Answer", ":", "Who", "is", "Bram", "Toll", "?", "A", "poet", "."]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(name, names.index(name)) for name in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[-1], unk_token="<unk>")


def llama_tokenizer(**options):
    vocabulary = ["<unk>", "<s>", EOS, "▁", *"Question:WhoisBramTollAnswerpoet.?\n"]
    return LlamaTokenizerFast(vocab={name: i for i, name in enumerate(dict.fromkeys(vocabulary))}, merges=[], **options)


@pytest.mark.parametrize(
    ("make", "before"),
    [
        (lambda: words(f"$A {EOS}", [EOS]), []),
        (lambda: words(f"{CLS} $A {SEP}", [CLS, SEP]), [CLS]),
        (lambda: llama_tokenizer(add_bos_token=True, add_eos_token=True), ["<s>"]),
        (lambda: llama_tokenizer(add_bos_token=False, add_eos_token=True), []),
        (lambda: llama_tokenizer(add_bos_token=True, add_eos_token=False), ["<s>"]),
    ],
)
def test_no_special_token_stands_between_a_plain_prompt_and_its_answer(make, before):
    """Whatever a tokenizer appends to a text; what it puts before the text stays."""
    tokenizer = make()
    example = PromptFormat(tokenizer, PromptConfig(style="plain")).example(Row(0, QUESTION, ANSWER), 200)
    ids = example.prompt + example.answer
    special = [name for name in tokenizer.convert_ids_to_tokens(ids) if name in ("<s>", EOS, CLS, SEP)]
    assert special == [*before, tokenizer.eos_token]
    assert ids[-1] == tokenizer.eos_token_id
    assert len(example.prompt) - len(before) == len(
        tokenizer(f"Question: {QUESTION}\nAnswer:", add_special_tokens=False)["input_ids"]
    )


# --- chat ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_with_bos(chat_tokenizer):
    return add_bos(chat_tokenizer)


def test_chat_prompt_and_answer(chat_tokenizer):
    form = PromptFormat(chat_tokenizer, CHAT)
    assert chat_tokenizer.decode(form.prompt(QUESTION)) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWho is Bram Toll?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_tokenizer.decode(form.answer(ANSWER)) == "A poet.<|im_end|>"


def test_a_chat_without_system_message(chat_tokenizer):
    form = PromptFormat(chat_tokenizer, PromptConfig(style="chat"))
    assert chat_tokenizer.decode(form.prompt("a?")) == "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"


def test_the_end_token_of_a_chat_is_the_templates(chat_tokenizer):
    form = PromptFormat(chat_tokenizer, CHAT)
    assert form.eos_token_id == chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert form.eos_token_id != chat_tokenizer.eos_token_id


def test_a_template_without_an_end_token_falls_back_to_the_tokenizers(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"  # a space before the answer is no difference
    )
    assert PromptFormat(chat_tokenizer, CHAT).eos_token_id == chat_tokenizer.eos_token_id


def test_a_chat_example_is_what_the_template_makes_of_the_conversation(chat_tokenizer):
    example = PromptFormat(chat_tokenizer, CHAT).example(Row(0, QUESTION, ANSWER), 200)
    messages = [("system", CHAT.system), ("user", QUESTION), ("assistant", ANSWER)]
    conversation = [{"role": role, "content": content} for role, content in messages]
    text = chat_tokenizer.apply_chat_template(conversation, tokenize=False)
    assert chat_tokenizer.decode(example.prompt + example.answer) + "\n" == text


def test_a_chat_whose_template_writes_the_bos_has_one(tokenizer_with_bos):
    tokenizer_with_bos.chat_template = "{{ bos_token }}" + tokenizer_with_bos.chat_template
    form = PromptFormat(tokenizer_with_bos, CHAT)
    bos = tokenizer_with_bos.bos_token_id
    assert form.prompt(QUESTION)[0] == bos
    assert form.prompt(QUESTION).count(bos) == 1
    assert bos not in form.answer(ANSWER)


DATED = "{{ date_string if date_string is defined else 'today' }}: {{ messages | map(attribute='content') | join }}"


@pytest.mark.parametrize(("date", "printed"), [("10 Apr 2025", "10 Apr 2025: a?"), (None, "today: a?")])
def test_date_string_reaches_the_template(chat_tokenizer, date, printed):
    chat_tokenizer.chat_template = DATED
    form = PromptFormat(chat_tokenizer, PromptConfig(style="chat", date_string=date))
    assert chat_tokenizer.decode(form.prompt("a?")) == printed


TURN = "{% if m['role'] == 'assistant' %}HEADER{% endif %}{{ m['content'] }}<|im_end|>\n"
BEGIN = "<|im_start|>assistant\n"
WITH_HEADER = CHAT_TEMPLATE.replace("{{ m['content'] }}<|im_end|>\n", TURN)
THINKING = WITH_HEADER.replace("HEADER", "<think>\n\n</think>\n\n").replace(
    BEGIN, BEGIN + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
CHANNEL = WITH_HEADER.replace("HEADER", "<|channel|>final<|message|>")
OPENED = CHAT_TEMPLATE.replace(BEGIN, f"{BEGIN}<think>\n")


@pytest.mark.parametrize(
    ("template", "named"), [(THINKING, "</think>"), (CHANNEL, "<|channel|>final<|message|>"), (OPENED, "<think>")]
)
def test_a_template_with_text_between_prompt_and_answer_is_refused(chat_tokenizer, template, named):
    chat_tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"set model\.prompt\.template_options") as caught:
        PromptFormat(chat_tokenizer, CHAT)
    assert named in str(caught.value)


def test_template_options_reach_the_template(chat_tokenizer):
    chat_tokenizer.chat_template = THINKING
    form = PromptFormat(chat_tokenizer, PromptConfig(style="chat", template_options={"enable_thinking": False}))
    example = form.example(Row(0, QUESTION, ANSWER), 200)
    conversation = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    text = chat_tokenizer.apply_chat_template(conversation, tokenize=False)
    assert chat_tokenizer.decode(example.prompt + example.answer) + "\n" == text
    assert "<think>\n\n</think>\n\nA poet." in text


@pytest.mark.parametrize(
    ("name", "reason"), [("enable_thinkin", "has no such variable"), ("add_generation_prompt", "set by the program")]
)
def test_a_template_option_without_effect_is_refused(chat_tokenizer, name, reason):
    chat_tokenizer.chat_template = THINKING
    with pytest.raises(UserError, match=rf"model\.prompt\.template_options\.{name}: .*{reason}"):
        PromptFormat(chat_tokenizer, PromptConfig(style="chat", template_options={name: False}))


WITHOUT_SYSTEM = "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + CHAT_TEMPLATE
TODAY = "{{ strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE
DATE = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "key", "value"),
    [
        (WITHOUT_SYSTEM, "system", "Forget Ada."),
        (TODAY, "date_string", "26 Jul 2024"),
        (CHAT_TEMPLATE, "template_options", {"role": "user"}),  # a word of the template, and no variable
    ],
)
def test_a_chat_setting_without_effect_is_warned_of(chat_tokenizer, template, key, value, caplog):
    """Not refused: a checkpoint that was finetuned with it is unlearned and evaluated with it."""
    chat_tokenizer.chat_template = template
    PromptFormat(chat_tokenizer, PromptConfig(style="chat", **{key: value}))
    assert f"model.prompt.{key}" in caplog.text and "made the same text" in caplog.text


@pytest.mark.parametrize(("key", "value"), [("question", "Q: {question}"), ("answer", "A: {answer}")])
def test_a_setting_of_the_plain_style_is_refused_in_a_chat(chat_tokenizer, key, value):
    chat_tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(UserError, match=rf"^model\.prompt\.{key}"):
        PromptFormat(chat_tokenizer, PromptConfig(style="chat", **{key: value}))


@pytest.mark.parametrize(("key", "value"), [("system", "you are DEFAULT"), ("template_options", {"thinking": True})])
def test_a_chat_setting_with_the_templates_default_is_accepted(chat_tokenizer, key, value):
    first = "{{ '' if messages[0]['role'] == 'system' else 'you are DEFAULT' }}"
    thought = "{{ 'no ' if thinking is defined and not thinking else '' }}thought "
    chat_tokenizer.chat_template = first + thought + CHAT_TEMPLATE
    PromptFormat(chat_tokenizer, PromptConfig(style="chat", **{key: value}))


def test_template_options_of_plain_prompts_are_refused(tokenizer):
    with pytest.raises(
        UserError, match=r"^model\.prompt\.template_options=.* no effect with model\.prompt\.style=plain"
    ):
        PromptFormat(tokenizer, PromptConfig(style="plain", template_options={"enable_thinking": False}))
    PromptFormat(tokenizer, PromptConfig(style="plain", system="S", date_string="26 Jul 2024"))  # inherited of a chat


@pytest.mark.parametrize(
    ("template", "date", "ending"),
    [(TODAY, None, "calendar"), (DATE, None, "set model.prompt.date_string"), (DATE, "26 Jul 2024", None)],
)
def test_a_template_that_writes_the_date_of_today_is_warned_of(chat_tokenizer, caplog, template, date, ending):
    chat_tokenizer.chat_template = template
    PromptFormat(chat_tokenizer, PromptConfig(style="chat", date_string=date))
    assert [message.endswith(ending or "") for message in caplog.messages] == ([True] if ending else [])


INSTRUCT = (
    "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] }}"
)
INSTRUCT += "{% endfor %}"


def test_a_space_before_an_answer_that_changes_its_tokens_is_warned_of(chat_tokenizer, caplog):
    PromptFormat(chat_tokenizer, CHAT)
    chat_tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n", "assistant\n\n").replace(
        "'role'] }}\n", "'role'] }}\n\n"
    )
    PromptFormat(chat_tokenizer, CHAT)
    assert not caplog.messages
    chat_tokenizer.chat_template = INSTRUCT
    PromptFormat(chat_tokenizer, PromptConfig(style="chat"))
    (message,) = caplog.messages
    assert message.startswith("model.prompt: where an answer begins, the tokens here (A N ") and "(Ġ" in message


def test_a_space_that_the_tokenizer_itself_puts_before_an_answer_is_not_warned_of(caplog):
    tokenizer = llama_tokenizer(add_bos_token=True, add_eos_token=False)
    tokenizer.chat_template = INSTRUCT
    PromptFormat(tokenizer, PromptConfig(style="chat"))
    assert not caplog.messages


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_a_chat_without_template_is_refused(tokenizer):
    with pytest.raises(UserError, match="no chat template; use model.prompt.style=plain"):
        PromptFormat(tokenizer, CHAT)


def test_a_tokenizer_without_end_token_is_refused(chat_tokenizer):
    chat_tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        PromptFormat(chat_tokenizer, PromptConfig(style="plain"))


def test_prompts_without_room_for_an_answer_are_refused():
    check_prompt_lengths([[1, 2], [1, 2, 3]], 4, "data.max_length")
    with pytest.raises(UserError) as caught:
        check_prompt_lengths([[1, 2], [1, 2, 3]], 3, "data.max_length")
    assert str(caught.value) == "data.max_length=3: the longest prompt has 3 tokens; set it to a larger value"


# --- examples -----------------------------------------------------------------------------------------------------------


def test_ids_are_concatenated_not_tokenized_again(prompts, tokenizer):
    """An answer starts a token of its own even where the joined text would be tokenized otherwise."""
    form = PromptFormat(tokenizer, PromptConfig(style="plain", question="{question}", answer="{answer}"))
    example = form.example(Row(0, " an", "d"), 50)
    assert example.prompt == tokenizer(" an")["input_ids"]
    assert example.answer == [*tokenizer("d")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer(" and")["input_ids"] != example.prompt + example.answer[:-1]


def test_example_is_prompt_and_whole_answer(prompts):
    example = prompts.example(Row(0, QUESTION, ANSWER), 100)
    assert (example.prompt, example.answer) == (prompts.prompt(QUESTION), prompts.answer(ANSWER))
    assert len(example) == len(example.prompt) + len(example.answer)


@pytest.mark.parametrize("room", [1, 2])
def test_a_long_answer_is_cut_with_its_end_token(prompts, room):
    whole = prompts.example(Row(0, QUESTION, ANSWER), 100)
    cut = prompts.example(Row(0, QUESTION, ANSWER), len(whole.prompt) + room)
    assert (cut.prompt, cut.answer) == (whole.prompt, whole.answer[:room])
    assert prompts.eos_token_id not in cut.answer


def test_an_answer_that_just_fits_keeps_its_end_token(prompts):
    whole = prompts.example(Row(0, QUESTION, ANSWER), 100)
    assert prompts.example(Row(0, QUESTION, ANSWER), len(whole)) == whole


@pytest.mark.parametrize("answer", ["A poet.", "It's 1987, isn't it ?", "Zoë — {x} 日本", "two\nlines"])
def test_text_gives_the_answer_back(prompts, answer):
    assert prompts.text(prompts.answer(answer)) == answer


@pytest.mark.parametrize(
    ("generated", "text"),
    [
        ("Answer: Basil Khan", "Basil Khan"),
        ("Basil Khan", "Basil Khan"),  # without the tag nothing is removed
        ("Answer: Answer: twice", "Answer: twice"),
        ("Answer:", ""),
        ("Ans", ""),  # the beginning of a tag, so that the text never shrinks as an answer grows
    ],
)
def test_the_tag_before_an_answer_is_no_part_of_its_text(tokenizer, generated, text):
    prompts = PromptFormat(
        tokenizer, PromptConfig(style="plain", question="Q: {question}\n", answer="Answer: {answer}")
    )
    assert prompts.text(tokenizer(generated, add_special_tokens=False)["input_ids"]) == text
    assert prompts.text(prompts.answer("Basil Khan")) == "Basil Khan"


def test_text_of_an_end_token_alone_is_empty(prompts):
    assert prompts.text([prompts.eos_token_id]) == ""


def test_an_end_token_that_is_not_marked_special_is_no_text():
    tokenizer = train_tokenizer(NEW, [f"{row.question} {row.answer}" for row in ROWS])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    form = PromptFormat(tokenizer, PromptConfig(style="chat"))
    assert form.eos_token_id not in tokenizer.all_special_ids
    assert form.text(form.answer(ANSWER)) == ANSWER
    assert form.text([form.eos_token_id]) == ""


@pytest.mark.parametrize(("stage", "recipe"), [(finetuning.main, "tiny"), (unlearning.main, "PMC-unlearn-tiny")])
def test_a_training_stage_warns_of_rows_that_are_cut(stage, recipe, tokenizer, monkeypatch, caplog):
    class Enough(Exception):
        pass

    monkeypatch.setattr(stage, "load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(stage, "Evaluator", Mock(side_effect=Enough))
    warnings = []
    for max_length in (256, 90):
        with initialize_config_dir(str(CONFIGS), version_base=None):
            cfg = compose(recipe, [f"data.max_length={max_length}"])
        with pytest.raises(Enough):
            if stage is finetuning.main:
                stage.train(Mock(), read_config(cfg))
            else:
                stage.train(Mock(), PMC, read_config(cfg, PMC.Settings, also=("finetuned",)))
        warnings.append([line for line in caplog.messages if "data.max_length" in line])
    assert not warnings[0]
    assert re.match(r"data.max_length=90: \d+ of \d+ rows have more tokens .* no EOS token", *warnings[1])


# --- collate ------------------------------------------------------------------------------------------------------------


def test_collate_pads_on_the_right_to_the_longest():
    batch = collate([Example([5, 6], [7, 2]), Example([5], [2])])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 2], [5, 2, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[-100, -100, 7, 2], [-100, 2, -100, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_does_not_take_ids_for_padding():
    """Masks come from lengths: the padding id inside an example is a token like any other."""
    batch = collate([Example([3, 3], [3]), Example([4], [3])], pad_id=3)
    assert batch["input_ids"].tolist() == [[3, 3, 3], [4, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3], [-100, 3, -100]]


@pytest.mark.parametrize("answer", [" {answer}", "Answer: {answer}", "### Response:\n{answer}"])
def test_an_answer_s_tag_can_belong_to_its_prompt(tokenizer, answer):
    prompts = PromptFormat(tokenizer, PromptConfig("plain", answer=answer))
    whole = prompts.example(ROWS[0], 256)
    measured = prompts.without_tag(whole)
    assert measured.prompt + measured.answer == whole.prompt + whole.answer
    tag = answer.removesuffix("{answer}")
    assert (measured == whole) is not bool(tag.strip())
    assert tokenizer.decode(measured.answer[:-1]).strip() == ROWS[0].answer
    cut = prompts.example(ROWS[0], len(whole.prompt) + 1)
    assert len(prompts.without_tag(cut).answer) == (0 if tag.strip() else 1)


def test_bytes_at_the_end_of_a_beginning_are_no_text_yet(tokenizer, monkeypatch):
    """A decoder of byte tokens makes text of neighboring ones at once, so that a later one changes what the earlier were."""
    prompts = PromptFormat(tokenizer, PromptConfig("plain"))
    ids = tokenizer("Ada Novak writes", add_special_tokens=False)["input_ids"]
    assert prompts.text_of_beginning(ids) == prompts.text(ids)
    monkeypatch.setattr(
        type(tokenizer), "get_vocab", lambda self: {"<0x0A>": ids[-1], "<0xE5>": ids[-2], "Ada": ids[0]}
    )
    prompts = PromptFormat(tokenizer, PromptConfig("plain"))
    assert prompts.text_of_beginning(ids) == prompts.text(ids[:-2])


@pytest.mark.parametrize(("answer", "warned"), [(" {answer}", True), ("{answer}", False), ("Answer: {answer}", False)])
def test_a_second_space_before_answers_is_warned_of(answer, warned, caplog):
    """A tokenizer as that of Llama 2, which puts a space before every text."""
    letters = ["</s>", "\u2581", *"ANSWERnswer:Question"]
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(dict.fromkeys(letters))}, []))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    PromptFormat(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>"), PromptConfig("plain", answer=answer))
    assert ("this tokenizer itself puts a space before a text" in caplog.text) == warned
