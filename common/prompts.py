"""Turn questions and answers into token ids. Prompt and answer are tokenized separately, then concatenated."""

import copy
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.config import PromptConfig
from common.data import Row
from common.errors import UserError

log = logging.getLogger(__name__)
CHECKED_PASSAGES = 8  # passages whose tokens are compared with those of the running text
SPACES = ("\u2581", "\u0120")  # a space in the tokens of SentencePiece and of byte-level BPE
ANSWER = "ANSWER"  # an answer by which a chat template is examined
OTHER = "OTHER"  # another value of a setting, by which it is found out whether the template prints the setting


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of the answer that the model is trained on. The answer includes its EOS token.

    Attributes:
        weight: for a loss that weights its examples, such as a policy gradient, whose weights are advantages.
        labels: the token to predict at each position of the answer (-100: no loss), while the answer stays the input;
            None: the answer itself.
    """

    prompt: list[int]
    answer: list[int]
    weight: float = 1.0
    labels: list[int] | None = None

    @property
    def targets(self) -> list[int]:
        """What to predict at each token of the answer."""
        return self.answer if self.labels is None else self.labels

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class PromptFormat:
    """Turns questions into prompts, with the tokenizer's chat template or as plain "Question: ... Answer:" text.

    Args:
        tokenizer: the model's tokenizer.
        config: the `model.prompt` section.
    Raises:
        UserError: for style "chat" if the tokenizer has no chat template, the template puts other text than whitespace
            between prompt and answer, or if there is no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig):
        self.tokenizer = tokenizer
        self.config = config
        if config.style == "chat" and not tokenizer.chat_template:
            raise UserError("model.prompt.style=chat: the tokenizer has no chat template; use model.prompt.style=plain")
        if config.style == "chat":
            self._check_template()
            self._check_settings_matter()
        self._check_style()
        self.eos_token_id = self._find_eos_token()
        if config.style == "chat":
            self._warn_of_other_tokens()
        else:
            self._warn_of_second_space()

    @cached_property
    def special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text; a chat template writes its own."""
        return special_tokens_around(self.tokenizer)

    def prompt(self, question: str) -> list[int]:
        """Token ids of the prompt for a question."""
        if self.config.style == "plain":
            text = self.config.question.replace("{question}", question)
            return [*self.special_tokens[0], *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return self._chat(self._messages(question), add_generation_prompt=True, tokenize=True, return_dict=False)

    def answer(self, answer: str) -> list[int]:
        """Token ids of an answer, including the EOS token."""
        return [*self.tokenizer(self._answer_text(answer), add_special_tokens=False)["input_ids"], self.eos_token_id]

    def entity_tokens(self, row: Row) -> tuple[int, int]:
        """The first token of the row's answer that has a character of its entity, and the first token after these.

        An entity that the answer has several times counts where it first stands as words of its own, or else where it is first.

        Raises:
            UserError: if the tokenizer does not know which characters a token stands for.
        """
        if not self.tokenizer.is_fast:
            raise UserError("data.columns.entity: the tokenizer cannot tell the characters of a token; leave it out")
        as_words = re.search(rf"(?<!\w){re.escape(row.entity)}(?!\w)", row.answer)
        start = as_words.start() if as_words else row.answer.index(row.entity)
        text, first = self._answer_text(row.answer), len(self.tag) + start
        last = first + len(row.entity)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        inside = [token for token, (start, end) in enumerate(offsets) if start < last and end > first]
        return inside[0], inside[-1] + 1

    def _answer_text(self, answer: str) -> str:
        return self.config.answer.replace("{answer}", answer) if self.config.style == "plain" else answer

    def example(self, row: Row, max_length: int) -> Example:
        """The row as an example of at most `max_length` tokens. A longer answer is truncated and has no EOS token.

        The answer is empty when the prompt alone has `max_length` tokens or more.
        """
        prompt = self.prompt(row.question)
        return Example(prompt, self.answer(row.answer)[: max(0, max_length - len(prompt))])

    @cached_property
    def tag(self) -> str:
        """What `model.prompt.answer` puts before an answer; empty in a chat."""
        return self.config.answer.partition("{answer}")[0] if self.config.style == "plain" else ""

    @cached_property
    def _tag_ids(self) -> list[int]:
        return self.tokenizer(self.tag, add_special_tokens=False)["input_ids"] if self.tag.strip() else []

    def without_tag(self, example: Example) -> Example:
        """The example with what `model.prompt.answer` puts before the answer ("Answer: ") as the end of its prompt.

        A token that has characters of both stays in the answer, as does a tag of spaces alone.
        """
        pairs = zip(self._tag_ids, example.answer, strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return Example(example.prompt + example.answer[:length], example.answer[length:])

    def is_cut(self, example: Example) -> bool:
        """Whether the example lacks the end of its answer, with the EOS token."""
        return example.answer[-1:] != [self.eos_token_id]

    def without_eos(self, example: Example) -> Example:
        """The example without the EOS token of its answer, if it has one."""
        return example if self.is_cut(example) else replace(example, answer=example.answer[:-1])

    def text(self, answer_ids: Sequence[int], begun: bool = False) -> str:
        """The text of an answer, without special tokens, surrounding whitespace and what `model.prompt.answer` puts before it.

        Nor is a final EOS token text: a chat template may end answers with a token that the tokenizer does not mark special.

        Without clean-up of spaces, the text of the first tokens of an answer is a prefix of the whole text. So that this
        holds for a tag ("Answer: {answer}") as well, the beginning of a tag counts as no text.

        Args:
            begun: the tokens continue an answer whose beginning is in the prompt, so that no tag is before them.
        """
        ids = answer_ids[:-1] if list(answer_ids[-1:]) == [self.eos_token_id] else answer_ids
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        tag = "" if begun else self.tag.strip()
        return "" if tag.startswith(decoded) else decoded.removeprefix(tag).lstrip()

    def text_of_beginning(self, answer_ids: Sequence[int]) -> str:
        """The text of the first tokens of an answer that further tokens do not change, but for its last word.

        Tokens of single bytes ("<0x0A>") at the end are left out: neighboring ones are decoded together.
        """
        end = len(answer_ids)
        while end and answer_ids[end - 1] in self._byte_ids:
            end -= 1
        return self.text(answer_ids[:end])

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        tokens = self.tokenizer.get_vocab()
        return frozenset(number for token, number in tokens.items() if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token))

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables of the chat template that the configuration sets."""
        date = {} if self.config.date_string is None else {"date_string": self.config.date_string}
        return {**self.config.template_options, **date}

    def _messages(self, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.config.system}] if self.config.system else []
        return [*system, {"role": "user", "content": question}]

    def _chat(self, messages: list[dict[str, str]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **{**self.template_variables, **options})
        except TemplateError as error:
            raise UserError(
                f"model.prompt: the chat template rejects the prompt ({error}); is it because of model.prompt.system?"
            ) from error

    def _check_template(self) -> None:
        """Check that the template has the options that are set, and that a prompt with its answer begins the whole chat.

        Raises:
            UserError: with the text that would be missing between prompt and answer.
        """
        for name in self.config.template_options:
            if name in ("messages", "add_generation_prompt"):
                raise UserError(f"model.prompt.template_options.{name}: is set by the program; remove it")
            if not re.search(rf"\b{re.escape(name)}\b", str(self.tokenizer.chat_template)):
                raise UserError(
                    f"model.prompt.template_options.{name}: the chat template has no such variable; remove it"
                )
        prompt = self._chat(self._messages("?"), add_generation_prompt=True, tokenize=False)
        chat = self._chat_with_answer().rpartition(ANSWER)[0]
        shared = len(os.path.commonprefix([prompt, chat]))
        shown = max(0, shared - 20)
        # Some templates put a space before the answer, which many tokenizers put before a text on their own.
        if prompt[shared:].strip() or chat[shared:].strip():
            raise UserError(
                f"model.prompt: the chat template ends a prompt with {prompt[shown:]!r}, and writes "
                f"{chat[shown:]!r} before an answer in a finished chat. The model would be trained and asked with "
                "other text than the template's: set model.prompt.template_options to what makes both the same (Qwen3: "
                "{enable_thinking: false}), or model.prompt.style=plain"
            )

    def _check_style(self) -> None:
        """Refuse settings of the other style. A system message and a date are allowed: plain recipes inherit those of a chat.

        Raises:
            UserError: names the setting.
        """
        others = {"chat": ("question", "answer"), "plain": ("template_options",)}[self.config.style]
        default = PromptConfig(self.config.style)
        if wrong := [name for name in others if getattr(self.config, name) != getattr(default, name)]:
            raise UserError(
                f"model.prompt.{wrong[0]}={getattr(self.config, wrong[0])!r}: has no effect with model.prompt.style="
                f"{self.config.style}; remove it (~model.prompt.{wrong[0]}), or change the style"
            )

    def _check_settings_matter(self) -> None:
        """Warn of settings on which the text of a chat does not depend, and if it has the date of today."""
        options, shown = self.config.template_options, self._shown(self.config)
        others = {key: [{key: OTHER}] for key in ("system", "date_string") if getattr(self.config, key)}
        for name, value in options.items():
            without = {key: kept for key, kept in options.items() if key != name}
            changed = [without, {**options, name: OTHER}, {**options, name: not value}]
            others[f"template_options.{name}"] = [{"template_options": values} for values in changed]
        for key, values in others.items():
            if all(self._shown(replace(self.config, **value)) == shown for value in values):
                log.warning(
                    "model.prompt.%s: the chat template made the same text with the other values that were tried", key
                )
        if self._shown(self.config, strftime_now=lambda _: OTHER) != shown:
            log.warning(
                "model.prompt: the chat template writes the date of today, so that scores change with the calendar%s",
                "; set model.prompt.date_string" if "date_string" in str(self.tokenizer.chat_template) else "",
            )

    def _shown(self, config: PromptConfig, **options: Any) -> tuple[str, str] | None:
        """The text of a prompt, and of a chat with its answer, with these settings; None if the template rejects them."""
        other = copy.copy(self)
        other.config = replace(config, template_options={**config.template_options, **options})
        try:
            return other._chat(
                other._messages("?"), add_generation_prompt=True, tokenize=False
            ), other._chat_with_answer()
        except Exception:  # a template raises errors of any type for a value that it does not expect
            return None

    def _warn_of_other_tokens(self) -> None:
        """Warn if a prompt with its answer has other tokens than the template's chat, which is tokenized in one piece."""
        own = [*self.prompt("?"), *self.answer(ANSWER)[:-1]]
        whole = self._chat_with_answer(tokenize=True, return_dict=False)[: len(own)]
        if own != whole:
            same = len(os.path.commonprefix([own, whole]))
            log.warning(
                "model.prompt: where an answer begins, the tokens here (%s) are not those of the template's chats (%s), which "
                "the model may know better; with model.prompt.style=plain, question and answer can spell out the template, the "
                "whitespace in the answer",
                *(" ".join(self.tokenizer.convert_ids_to_tokens(ids[same : same + 3])) for ids in (own, whole)),
            )

    def _warn_of_second_space(self) -> None:
        """Warn if answers begin with a token that is only a space, since the tokenizer itself puts one before a text."""
        if not self.config.answer.startswith(" {"):
            return
        texts = (self._answer_text(ANSWER), ANSWER)
        ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts)
        with_space, alone = self.tokenizer.convert_ids_to_tokens(list(ids))
        if with_space in SPACES and alone.startswith(SPACES):
            log.warning(
                "model.prompt.answer='%s': this tokenizer itself puts a space before a text, so that each answer begins with a "
                "token that is only a space and that scores count; '%s' is better",
                self.config.answer,
                self.config.answer.lstrip(),
            )

    def _chat_with_answer(self, **options: Any) -> Any:
        chat = [*self._messages("?"), {"role": "assistant", "content": ANSWER}]
        return self._chat(chat, **{"tokenize": False, **options})

    def _find_eos_token(self) -> int:
        """The token that ends an answer: the chat template's token after an answer, or else the tokenizer's EOS token."""
        if self.config.style == "chat":
            after = self._chat_with_answer().rpartition(ANSWER)[2]
            ids = self.tokenizer(after.strip(), add_special_tokens=False)["input_ids"]
            if ids and ids[0] in (*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder):
                return ids[0]
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token (eos_token), so answers would never end; add one to the tokenizer"
            )
        return self.tokenizer.eos_token_id


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the special tokens that the tokenizer adds before a text (BOS, [CLS], ...) and after it (EOS, [SEP], ...).

    Raises:
        UserError: if it tokenizes the text itself in another way when it adds them.
    """
    text = "Question: a"
    ids, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[:start], ids[start + len(bare) :]
    raise UserError(
        f"the tokenizer makes {ids} of the text '{text}', and {bare} without special tokens: it cannot be told which tokens "
        "stand before a prompt; use another tokenizer, or model.prompt.style=chat"
    )


def check_rows_fit(prompts: PromptFormat, rows: Sequence[Row], max_length: int, key: str) -> None:
    """Check that every question leaves room for an answer, and that no passage is cut off.

    Args:
        key: the configuration key of `max_length`.
    Raises:
        UserError: states the length of the longest one.
    """
    check_prompt_lengths([prompts.prompt(row.question) for row in rows], max_length, key)
    check_passages_fit(prompts, [row.pair for row in rows if row.is_passage], max_length, key)


def check_passages_fit(prompts: PromptFormat, passages: Sequence[tuple[str, str]], max_length: int, key: str) -> None:
    """Check that no passage is cut off, as a score of its continuation would count words that cannot be there.

    Warns if the tokens of a prompt with its continuation are not those of the running text.

    Args:
        passages: prompt and continuation of each passage, such as a window of a text.
        key: the configuration key of `max_length`.
    Raises:
        UserError: states the length of the longest passage.
    """
    lengths = (len(prompts.prompt(prompt)) + len(prompts.answer(continuation)) for prompt, continuation in passages)
    longest = max(lengths, default=0)
    if longest > max_length:
        raise UserError(
            f"{key}={max_length}: the longest passage or window of a text has {longest} tokens; set it to at least "
            f"{longest}, or lower data.windows.words"
        )
    for prompt, continuation in passages[:CHECKED_PASSAGES] if prompts.config.is_bare else ():
        running = prompts.tokenizer(f"{prompt} {continuation}", add_special_tokens=False)["input_ids"]
        if [*prompts.prompt(prompt)[len(prompts.special_tokens[0]) :], *prompts.answer(continuation)[:-1]] != running:
            other = "{answer}" if prompts.config.answer == " {answer}" else " {answer}"
            log.warning(
                "model.prompt.answer='%s': the tokens of the passage %r are not those of the running text; is '%s' better "
                "for this tokenizer?",
                prompts.config.answer,
                f"{prompt} {continuation}"[:60],
                other,
            )
            break


def warn_if_cut(
    prompts: PromptFormat, pairs: Sequence[tuple[str, str]], max_length: int, key: str, given: bool = False
) -> None:
    """Warn of rows whose true answer is too long to be generated: their scores count words that cannot be there.

    Args:
        pairs: question and true answer of each row.
        key: the configuration key of `max_length`.
        given: the answers are not generated but trained on or scored as they are, by `PromptFormat.example`, which cuts them.
    """
    # a generated answer without the EOS token, which no score counts
    lengths = [len(prompts.prompt(question)) + len(prompts.answer(answer)) - (not given) for question, answer in pairs]
    if cut := sum(length > max_length for length in lengths):
        log.warning(
            "%s=%d: %d of %d %s have more tokens with their true answers (up to %d), %s",
            key,
            max_length,
            cut,
            len(lengths),
            "rows" if given else "questions",
            max(lengths),
            "so that these are cut and have no EOS token" if given else "so that recall cannot be 1",
        )


def check_prompt_lengths(prompts: Sequence[list[int]], max_length: int, key: str) -> None:
    """Check that every prompt leaves room for an answer.

    Args:
        key: the configuration key of `max_length`.
    Raises:
        UserError: states the length of the longest prompt.
    """
    longest = max(map(len, prompts), default=0)
    if longest >= max_length:
        raise UserError(f"{key}={max_length}: the longest prompt has {longest} tokens; set it to a larger value")
