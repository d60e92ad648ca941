"""MUSE's four scores with its own conventions (arXiv 2407.06460), so that a row can stand in its tables.

The prompts are MUSE's, not those of `model.prompt`: plain text after the tokenizer's BOS token. Answers are greedy. ROUGE-L
compares words of a-z and 0-9 that are not stemmed. All scores are percentages. Source: eval.py, verbmem, knowmem and privleak
in github.com/swj0419/muse_bench.

    verbmem_f = mean of ROUGE-L F1 of 128 new tokens, against the first 128 tokens (BOS included) of the true continuation
    knowmem   = mean of ROUGE-L F1 of 32 new tokens after "Question: ...\\nAnswer: ", which ten answered questions precede;
                the answer ends at an empty line or at the next question
    privleak  = 100 * (A - A_retrain) / A_retrain, where A = 1 - AUC of min-k (0.4) over whole texts

Scores:
    muse/verbmem_f (lower): verbatim memorization of the texts of forget_passages. Not shown: the same facts in other words.
    muse/knowmem_f (lower): knowledge that forget_questions ask for. Not shown: whether the word that matters is right.
    muse/knowmem_r (higher): knowledge that retain_questions ask for, MUSE's utility. Not shown: whether the word that
        matters is right; other abilities.
    muse/privleak (0): membership inference on forget_texts against holdout_texts, relative to the retain-only model; below
        0: still recognized, above: probabilities too low. Not shown: what was learned from the texts.
"""

import re

from common.config import RunConfig
from common.data import Row, check_apart
from common.model_checks import check_lengths
from common.prompts import Example
from common.rouge import rouge_l_f1, rouge_tokens, use_words
from evaluation.context import EvaluationContext
from evaluation.metrics.privacy import Privacy, auc, min_k, privleak
from evaluation.model_outputs import ModelOutputs
from evaluation.scores import Scores

ROLES = (
    "forget_passages",
    "forget_questions",
    "forget_questions_icl",
    "retain_questions",
    "retain_questions_icl",
    "forget_texts",
    "holdout_texts",
)
DISJOINT_ROLES = {  # roles that must not share rows
    "forget_texts": "holdout_texts",
    "forget_questions": "forget_questions_icl",
    "retain_questions": "retain_questions_icl",
}
VERBMEM_TOKENS = 128  # new tokens, and tokens of the true continuation
KNOWMEM_TOKENS = 32  # new tokens
MIN_K = Privacy(min_k_fraction=0.4)
END_OF_ANSWER = re.compile(r"\n\n|\nQuestion|Question:")


def check_inputs(config: RunConfig, rows: dict[str, list[Row]]) -> None:
    """Check that roles which must not share rows (`DISJOINT_ROLES`) do not.

    Raises:
        UserError: if all rows of one are also in the other.
    """
    for role, other in DISJOINT_ROLES.items():
        if role in rows and other in rows:
            check_apart(rows[role], rows[other], other, role)


def ids_of(outputs: ModelOutputs, text: str) -> list[int]:
    """Token ids of a text after the tokenizer's BOS token, if it has one."""
    return [*outputs.prompts.special_tokens[0], *outputs.prompts.tokenizer(text, add_special_tokens=False)["input_ids"]]


def completed(outputs: ModelOutputs, texts: list[str], max_new_tokens: int) -> list[str]:
    """The greedy continuation of each text."""
    prompts = [ids_of(outputs, text) for text in texts]
    check_lengths(outputs.load(), {"metrics=muse, the longest prompt": max(map(len, prompts)) + max_new_tokens})
    return [decoded(outputs, ids) for ids in outputs.completions(prompts, max_new_tokens)]


def decoded(outputs: ModelOutputs, ids: list[int]) -> str:
    return outputs.prompts.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)


def rouge(reference: str, answer: str) -> float | None:
    """100 * ROUGE-L F1 of words of a-z and 0-9 that are not stemmed; None if the reference has no such word."""
    with use_words("latin"):
        if not rouge_tokens(reference):
            return None
        return 100 * rouge_l_f1(reference, answer, stemmed=False)


def with_examples(question: str, examples: list[Row]) -> str:
    """MUSE's prompt for a question after answered ones; it ends with a space."""
    answered = "".join(f"Question: {row.question}\nAnswer: {row.answer}\n\n" for row in examples)
    return f"{answered}Question: {question}\nAnswer: "


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Verbatim memorization, knowledge of both kinds, and privacy leakage."""
    outputs = context.outputs
    with scores.null_if_missing({"muse/verbmem_f": False}):
        rows = context.rows("forget_passages")
        true = [decoded(outputs, ids_of(outputs, row.answer)[:VERBMEM_TOKENS]) for row in rows]
        answers = completed(outputs, [row.question for row in rows], VERBMEM_TOKENS)
        scores.mean("muse/verbmem_f", "forget_passages", list(map(rouge, true, answers)), False)
    for name, role, better in (("knowmem_f", "forget_questions", False), ("knowmem_r", "retain_questions", True)):
        with scores.null_if_missing({f"muse/{name}": better}):
            rows, examples = context.rows(role), context.rows(f"{role}_icl")
            prompts = [with_examples(row.question, examples) for row in rows]
            answers = [END_OF_ANSWER.split(text)[0] for text in completed(outputs, prompts, KNOWMEM_TOKENS)]
            values = [rouge(row.answer, answer) for row, answer in zip(rows, answers, strict=True)]
            scores.mean(f"muse/{name}", role, values, better)
    with scores.null_if_missing({"muse/privleak": None}):
        sides = [context.rows(role) for role in ("forget_texts", "holdout_texts")]
        models = (outputs, context.find_retain_model().outputs)
        value = privleak(*(auc_of(of_model, *sides) for of_model in models))
        scores.add("muse/privleak", value, None, ideal=0.0, count=sum(map(len, sides)))


def auc_of(outputs: ModelOutputs, members: list[Row], others: list[Row]) -> float | None:
    """The AUC of min-k over whole texts: how often a member's least likely tokens are likelier than another text's."""
    return auc(*(text_values(outputs, [row.answer for row in rows]) for rows in (members, others)))


def text_values(outputs: ModelOutputs, texts: list[str]) -> list[float | None]:
    """Mean log-probability of the least likely 40% of each text's tokens, the first token (BOS) not among them."""
    ids = [ids_of(outputs, text) for text in texts]
    check_lengths(outputs.load(), {"metrics=muse, the longest text": max(map(len, ids))})
    tokens = outputs.tokens([Example(own[:1], own[1:]) for own in ids])
    return [min_k(token, text, MIN_K) for token, text in zip(tokens, texts, strict=True)]
