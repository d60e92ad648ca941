"""MUSE's scores against its own recipe: HF's generate, the rouge_score package, plain forward passes and scikit-learn."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score

from common.data import Row
from evaluation.metrics import muse
from evaluation.scores import Scores
from tests.helpers import ROWS, context_of, no_model, outputs_of

STARTS = [
    "Ada Novak was born",
    "Who is Bram Toll, and",
    "Cass Ember lives in a small town by",
    "In 1961, the first book",
]
EXAMPLES = ROWS[:3]
ASKED = ROWS[3:7]
FORGET = [Row(i, "", f"{row.question} {row.answer} Nobody knows it.") for i, row in enumerate(ROWS[:5])]
HOLDOUT = [Row(i, "", f"{row.answer} {row.question}") for i, row in enumerate(ROWS[3:])]


@pytest.fixture
def model(model):
    """Weights that are large enough to be far from uniform."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt", add_special_tokens=True).input_ids


def generated(model, prompts, text, max_new_tokens):
    """As MUSE generates: HF's generate, decoded without special tokens and with clean-up."""
    ids = ids_of(prompts.tokenizer, text)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": prompts.eos_token_id}
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=max_new_tokens, **options)[:, ids.shape[1] :]
    return decode(prompts, new)


def decode(prompts, ids):
    return prompts.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)[0]


def f1(true, text):
    return 100 * RougeScorer(["rougeL"], use_stemmer=False).score(true, text)["rougeL"].fmeasure


def measured(model, prompts, rows, retain_model=None):
    context = context_of(outputs_of(model, prompts), [])
    context.rows = rows.__getitem__
    context.find_retain_model = no_model
    if retain_model is not None:
        context.find_retain_model = lambda: SimpleNamespace(outputs=outputs_of(retain_model, prompts))
    scores = Scores()
    muse.measure(context, scores)
    return scores


@pytest.fixture
def rows(model, prompts):
    """One answer in two is what the model says, so that the scores lie between 0 and 100."""
    said = [generated(model, prompts, text, 128) for text in STARTS]
    passages = [
        Row(i, text, f"{said[i]} {said[i]}" if i % 2 else "The walks are long.") for i, text in enumerate(STARTS)
    ]
    return {
        "forget_passages": passages,
        "forget_questions": ASKED,
        "forget_questions_icl": EXAMPLES,
        "retain_questions": ASKED[::-1],
        "retain_questions_icl": EXAMPLES[::-1],
        "forget_texts": FORGET,
        "holdout_texts": HOLDOUT,
    }


def test_verbatim_memorization_is_muse_s(model, prompts, rows):
    score = measured(model, prompts, rows)["muse/verbmem_f"]
    expected = []
    for row in rows["forget_passages"]:
        true = decode(prompts, ids_of(prompts.tokenizer, row.answer)[:, :128])
        expected.append(f1(true, generated(model, prompts, row.question, 128)))
    assert score.value == pytest.approx(np.mean(expected))
    assert 0 < score.value < 100 and score.count == 4


def test_words_are_not_stemmed():
    assert muse.rouge("two storms", "two storm") == f1("two storms", "two storm") == 50


def test_a_reference_without_latin_words_has_no_score():
    """Else a model that knows the text by heart would have the score of one that forgot it."""
    assert muse.rouge("два шторма", "два шторма") is None
    assert muse.rouge("two storms", "") == 0


@pytest.mark.parametrize(("name", "role"), [("knowmem_f", "forget_questions"), ("knowmem_r", "retain_questions")])
def test_knowledge_memorization_is_muse_s(model, prompts, rows, name, role):
    before = "".join(f"Question: {row.question}\nAnswer: {row.answer}\n\n" for row in rows[f"{role}_icl"])
    said = [generated(model, prompts, f"{before}Question: {row.question}\nAnswer: ", 32) for row in rows[role]]
    for word in ("\n\n", "\nQuestion", "Question:"):
        said = [text.split(word)[0] for text in said]
    rows[role] = [
        Row(row.index, row.question, f"{text} {row.answer}") for row, text in zip(rows[role], said, strict=True)
    ]
    expected = [f1(row.answer, text) for row, text in zip(rows[role], said, strict=True)]
    score = measured(model, prompts, rows)[f"muse/{name}"]
    assert score.value == pytest.approx(np.mean(expected))
    assert 0 < score.value < 100


@pytest.mark.parametrize(
    "text", ["a b\n\nc", "a b\nQuestion 2", "a b Question: c", "x", "", "a\nQuestion: b\n\nc", "Question:", "a\n\n\nb"]
)
def test_an_answer_ends_where_muse_ends_it(text):
    expected = text
    for word in ("\n\n", "\nQuestion", "Question:"):
        expected = expected.split(word)[0]
    assert muse.END_OF_ANSWER.split(text)[0] == expected


def min_40(model, tokenizer, text):
    """MUSE's "Min-40%": minus the mean of the lowest 40% of the log-probabilities of all tokens but the first."""
    ids = ids_of(tokenizer, text)
    with torch.no_grad():
        log_probs = model(ids).logits[0].double().log_softmax(-1)
    values = [log_probs[i, token].item() for i, token in enumerate(ids[0, 1:])]
    return -np.mean(np.sort(values)[: int(len(values) * 0.4)])


def test_privacy_leakage_is_muse_s(model, prompts, rows):
    torch.manual_seed(5)
    retain_model = type(model)(model.config)
    aucs = []
    for each in (model, retain_model):
        values = [min_40(each, prompts.tokenizer, row.answer) for row in FORGET + HOLDOUT]
        aucs.append(roc_auc_score([1] * len(FORGET) + [0] * len(HOLDOUT), values))
    score = measured(model, prompts, rows, retain_model)["muse/privleak"]
    assert aucs[0] != aucs[1] and aucs[1] > 0
    assert score.value == pytest.approx((aucs[0] - aucs[1]) / aucs[1] * 100)
    assert (score.ideal, score.count) == (0.0, len(FORGET) + len(HOLDOUT))


def test_without_a_retain_only_model_only_privacy_leakage_is_null(model, prompts, rows):
    scores = measured(model, prompts, rows)
    assert [name for name, score in scores.by_name.items() if score.value is None] == ["muse/privleak"]
    assert re.search("none is given", scores["muse/privleak"].note)
