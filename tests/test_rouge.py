"""ROUGE-L recall against the reference implementation, bit for bit, and against values worked out by hand."""

import json
import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from common.files import ROOT
from common.rouge import rouge_l_recall, rouge_tokens, use_words

SCORER = RougeScorer(["rougeL"], use_stemmer=True)


def expected(reference: str, answer: str) -> float:
    return SCORER.score(reference, answer)["rougeL"].recall


def read_rows(folder, *splits: str) -> list[dict]:
    return [json.loads(line) for name in splits for line in (folder / f"{name}.json").open(encoding="utf-8")]


def assert_equal_to_reference(pairs) -> None:
    differing = [
        (a, b, rouge_l_recall(a, b), expected(a, b)) for a, b in pairs if rouge_l_recall(a, b) != expected(a, b)
    ]
    assert not differing


def mixed_pairs(rows: list[dict], count: int) -> list[tuple[str, str]]:
    """Each row's answer against its paraphrase, a wrong answer, a cut of itself and another row's answer."""
    rng = random.Random(0)
    pairs = []
    for row in rng.sample(rows, count):
        answer = row["answer"]
        wrong = rng.choice(row["perturbed_answer"])
        pairs += [
            (answer, row.get("paraphrased_answer", answer)),
            (wrong, answer),
            (answer, answer[: len(answer) // 2]),
        ]
        pairs.append((answer, rng.choice(rows)["answer"]))
    return pairs


@pytest.mark.parametrize("split", ["forget10_perturbed", "retain_perturbed", "real_authors_perturbed"])
def test_equals_rouge_score_on_tofu(tofu, split):
    pairs = mixed_pairs(read_rows(tofu, split), count=60)
    assert len({rouge_l_recall(*pair) for pair in pairs}) > 5  # not all 0 or 1
    assert_equal_to_reference(pairs)


def test_equals_rouge_score_on_neighboring_tofu_answers(tofu):
    answers = [row["answer"] for row in read_rows(tofu, "full")]
    assert_equal_to_reference([(answers[i], answers[i + 1]) for i in range(0, 3999, 10)])


def test_equals_rouge_score_on_the_embedded_data():
    folder = ROOT / "data" / "tiny"
    rows = read_rows(folder, "retain_perturbed", "forget_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    pairs = mixed_pairs(rows, count=100)
    assert len({rouge_l_recall(*pair) for pair in pairs}) > 20
    assert_equal_to_reference(pairs)


@pytest.mark.parametrize(
    ("reference", "answer", "recall"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "d c b a", 0.25),  # one word in order
        ("a b c d", "a x c y", 0.5),
        ("a b c", "a b c d e f", 1.0),  # recall does not see what is too much
        ("a b c d e f", "a b c", 0.5),
        ("a b a b", "a a", 0.5),
        ("born in Lantern Row", "BORN, in: lantern-row!", 1.0),
        ("writing stories", "writes story", 1.0),  # stems write, stori
        ("was", "wa", 0.0),  # three letters are not stemmed
        ("one two three", "four", 0.0),
    ],
)
def test_values_worked_out_by_hand(reference, answer, recall):
    assert rouge_l_recall(reference, answer) == recall == expected(reference, answer)


@pytest.mark.parametrize(
    ("reference", "answer"), [("", "a"), ("a", ""), ("", ""), ("?!", "a"), ("a", " \n\t"), ("é", "é")]
)
def test_a_text_without_words_scores_zero(reference, answer):
    assert rouge_l_recall(reference, answer) == 0.0 == expected(reference, answer)


@pytest.mark.parametrize(
    "text",
    [
        "Zoë's café — naïve résumé, ﬁn",  # letters outside a-z split words
        "\u0130stanbul, \u015eAHIN and 5 \u212a",  # lower context of dotted I and of the Kelvin sign is ASCII
        "In 1987, 3.5 million; 2nd-hand no.7 10,000",
        "don't can't author's authors' O'Neill's",
        "under_score e-mail a.b.c @home #1 50%",
        "日本語 漢字 русский ελληνικά",
        "line\none\r\ntwo\u2028three\u00a0four\u200bfive",
    ],
)
def test_unicode_digits_punctuation_and_apostrophes(text):
    other = text.replace("'", "’").upper() + " the end"
    assert_equal_to_reference([(text, other), (other, text), (text, text)])


def test_tokens_are_stemmed_words_of_letters_and_digits():
    assert rouge_tokens("The author's 2nd stories, re-written in 1987!") == (
        *("the", "author", "s", "2nd", "stori", "re", "written", "in", "1987"),
    )


@pytest.mark.parametrize(
    ("text", "expected_words"),
    [
        ("Пушкин родился в Москве.", ["пушкин", "родился", "в", "москве"]),
        ("她出生于北京 in 1987年", ["她", "出", "生", "于", "北", "京", "in", "1987", "年"]),
        ("ひらがなカナ", list("ひらがなカナ")),
        ("กรุงเทพ", ["ก", "รุ", "ง", "เ", "ท", "พ"]),  # marks belong to the character before
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("وُلِدَ في القاهرة", ["وُلِدَ", "في", "القاهرة"]),
        ("می\u200cروم", ["می\u200cروم"]),  # a joiner inside a word
        ("Zoë's café, ﬁn", ["zoë", "s", "café", "fin"]),  # a ligature is two letters
        ("writing stories", ["write", "stori"]),
        ("e\u0301t\u00e9", ["\u00e9t\u00e9"]),  # composed
        ("?! …", []),
    ],
)
def test_unicode_words(text, expected_words):
    with use_words("unicode"):
        assert list(rouge_tokens(text)) == expected_words


@pytest.mark.parametrize(
    ("reference", "answer", "recall"),
    [("Она живёт в Риге", "Она жила в Риге", 0.75), ("她住在里加", "他住在罗马", 0.4), ("one two", "two", 0.5)],
)
def test_recall_of_unicode_words(reference, answer, recall):
    with use_words("unicode"):
        assert rouge_l_recall(reference, answer) == recall
        assert rouge_l_recall(reference, reference) == 1.0
    assert rouge_tokens(reference) == rouge_tokens(reference.encode("ascii", "ignore").decode()), "latin words again"
