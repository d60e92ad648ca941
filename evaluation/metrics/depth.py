"""How deeply the forget answers are erased: the unlearning depth score (UDS) from activation patching.

    python evaluation/main.py -cd=configs -cn=evaluate metrics=depth model.path=FOLDER retain_model.path=FOLDER

Source: Lee et al. 2026 (arXiv 2605.24614). For each forget row and each decoder layer, the hidden states of another model
replace those of the model before unlearning, and the drop of the answer's log-probability is measured. Stage 1 takes the
states of the retain-only model: where the answer becomes less likely, the layer encodes it. Stage 2 takes the states of
the unlearned model. The more of stage 1's drop it reproduces, the more is erased.

From the paper: the residual stream after a layer is replaced, at the positions that predict the span and nowhere else; the
drop is the mean over the span's tokens; a layer encodes the answer if stage 1's drop exceeds 0.05; the ratio of the drops
is clipped to [0, 1] and weighted by stage 1's drop; the score is the mean over the rows, without those that no layer
encodes. The paper's span is an entity in the answer, which its data set annotates: `data.columns.entity`. Chosen here:

- A row without an entity has all tokens of its answer, without the EOS token, as its span.
- The prompt is that of `model.prompt`. The paper uses plain "Question: ... Answer: ..." text.
- The last layer's states are those before the final norm, as for every other layer. The paper's code normalizes them.

The states of one model are in memory: layers * answer tokens of all rows * hidden size.

Scores:
    depth/uds (higher): unlearning depth score: 0 if the answers are as recoverable from the hidden states as before
        unlearning, 1 if no more than from those of the retain-only model. Not shown: what greedy answers or samples
        reveal; whether anything else was damaged.
    depth/encoding_layers (neither): number of layers that encode an answer, a property of the two models that are compared to.
        Not shown: which layers; rows.jsonl has the drops of each layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain

import numpy as np
import torch
from transformers import PreTrainedModel

from common.collate import batches_by_length
from common.data import Row
from common.prompts import Example, PromptFormat
from evaluation.context import EvaluatedModel, EvaluationContext
from evaluation.model_outputs import token_log_probs
from evaluation.scores import Missing, Scores

THRESHOLD = 0.05  # of the mean log-probability, in nats; the paper's value


def unlearning_depth(retain_drops: np.ndarray, drops: np.ndarray) -> float | None:
    """UDS of one row, in [0, 1]: sum of w * clip(d / w, 0, 1) over sum of w, for the layers with w > 0.05.

    Source: arXiv 2605.24614, section 3. None if no layer encodes the answer.

    Args:
        retain_drops: w, the drop of the mean log-probability with the retain-only model's states, shape (layers,).
        drops: d, the same with the unlearned model's states.
    """
    encodes = retain_drops > THRESHOLD
    if not encodes.any():
        return None
    weights = retain_drops[encodes]
    return float(np.clip(drops[encodes], 0, weights).sum() / weights.sum())  # w * clip(d / w, 0, 1) = clip(d, 0, w)


def measure(context: EvaluationContext, scores: Scores) -> None:
    """UDS on the forget rows, and how many layers encode them. Both compare to two further models."""
    with scores.null_if_missing({"depth/uds": True, "depth/encoding_layers": None}):
        rows, max_length = context.rows("forget"), context.config.data.max_length
        base, retain = context.find_base_model(), context.find_retain_model()
        spans = [span_example(base.outputs.prompts, row, max_length) for row in rows]
        sources = {"the retain-only model": retain, "the evaluated model": context.model}
        for name, source in sources.items():
            if spans != [span_example(source.outputs.prompts, row, max_length) for row in rows]:
                raise Missing(f"{name} has another tokenizer than the model before unlearning")
        measured = [index for index, span in enumerate(spans) if span.answer]
        examples = [spans[index] for index in measured]
        if not examples:
            raise Missing("no forget answer has a token within data.max_length")
        check_knowledge(base, retain, examples)
        retain_drops, drops = (log_prob_drops(base, source, examples, name) for name, source in sources.items())
        depths = [unlearning_depth(*of_row) for of_row in zip(retain_drops, drops, strict=True)]
        if all(depth is None for depth in depths):
            raise Missing(
                f"no layer of the model before unlearning encodes a forget answer (no drop above {THRESHOLD})"
            )

        def of_rows(values: Sequence[float | None]) -> list[float | None]:
            """One value per row of the split; None for answers without tokens."""
            by_row = dict(zip(measured, values, strict=True))
            return [by_row.get(index) for index in range(len(rows))]

        scores.mean("depth/uds", "forget", of_rows(depths), True)
        scores.mean(
            "depth/encoding_layers", "forget", of_rows([float(n) for n in (retain_drops > THRESHOLD).sum(1)]), None
        )
        for name, of_model in (("drop_retain_model", retain_drops), ("drop", drops)):
            for layer, values in enumerate(of_model.T.tolist()):
                scores.rows[f"depth/{name}/layer_{layer}"] = {"split": "forget", "values": of_rows(values)}


def span_example(prompts: PromptFormat, row: Row, max_length: int) -> Example:
    """A row whose answer is the span to measure: the entity if the row has one, otherwise the answer without the EOS token.

    What stands before the entity belongs to the prompt, as does the answer's tag. The span is empty if the row is cut off at
    `max_length` before it.
    """
    example = prompts.example(row, max_length)
    if not row.entity:
        return prompts.without_eos(prompts.without_tag(example))
    start, end = prompts.entity_tokens(row)
    return Example(example.prompt + example.answer[:start], example.answer[start:end])


def check_knowledge(base: EvaluatedModel, retain: EvaluatedModel, examples: Sequence[Example]) -> None:
    """Check that the model before unlearning knows the answers: otherwise the score would be a ratio of noise.

    Raises:
        Missing: if it does not give them a higher mean log-probability than the retain-only model.
    """
    means = [np.mean([tokens.mean_log_prob for tokens in model.outputs.tokens(examples)]) for model in (base, retain)]
    if not means[0] > means[1] + THRESHOLD:
        raise Missing(
            "the model before unlearning does not know the forget answers better than the retain-only model; name the "
            "finetuned model by base_model.path"
        )


def log_prob_drops(base: EvaluatedModel, source: EvaluatedModel, examples: Sequence[Example], name: str) -> np.ndarray:
    """Drop of the answers' mean token log-probability when the source's states replace those of one layer of `base`.

    Computed once for each source. Only one model's weights are in memory at a time.

    Args:
        name: the source in an error.
    Returns:
        shape (examples, layers).
    Raises:
        Missing: if the two models differ in their number of layers or their hidden size.
    """
    key = f"depth: {source.config!r}"
    if key not in base.cache:
        batches = batches_by_length([len(example) for example in examples], base.outputs.evaluation.batch_size)
        of_batch = [[examples[i] for i in batch] for batch in batches]
        size = layers_and_hidden_size(source)
        # Not returned but kept where they were computed: each process later patches the same batches.
        states: dict[int, list[torch.Tensor]] = {}

        def keep_states(model: PreTrainedModel, batch: int) -> None:
            states[batch] = span_states(model, of_batch[batch])

        def drops(model: PreTrainedModel, batch: int) -> np.ndarray:
            return patched_drops(model, of_batch[batch], states.pop(batch))

        source.outputs.each("hidden states", range(len(batches)), keep_states)
        if size != (size_of_base := layers_and_hidden_size(base)):
            raise Missing(
                f"{name} has {size[0]} layers and hidden size {size[1]}, the model before unlearning {size_of_base[0]} "
                f"and {size_of_base[1]}: hidden states fit only models of the same size"
            )
        found = np.concatenate(base.outputs.each("patched passes", range(len(batches)), drops))
        base.cache[key] = found[np.argsort(list(chain(*batches)))]
    return base.cache[key]


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of the decoder's layers, whatever its name.

    Raises:
        Missing: if the decoder has no list of that length.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise Missing(f"{type(model).__name__}: no list of {count} layers was found in its decoder")


def layers_and_hidden_size(model: EvaluatedModel) -> tuple[int, int]:
    loaded = model.outputs.load()
    return len(decoder_layers(loaded)), loaded.config.get_text_config(decoder=True).hidden_size


def span_positions(examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Rows and columns, in a batch padded on the right, of the positions that predict the answers' tokens."""
    rows = [row for row, example in enumerate(examples) for _ in example.answer]
    columns = [len(example.prompt) - 1 + t for example in examples for t in range(len(example.answer))]
    return rows, columns


@contextmanager
def hooked(layer: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block, `change` replaces the layer's hidden states, shape (rows, length, hidden)."""

    def hook(_module, _inputs, output):
        if isinstance(output, tuple):
            return change(output[0]), *output[1:]
        return change(output)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def span_states(model: PreTrainedModel, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The hidden states after each layer at the positions that predict the answers' tokens, on the CPU.

    Returns:
        one tensor per layer, of shape (answer tokens of the batch, hidden).
    """
    states, positions = [], span_positions(examples)

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        states.append(hidden[positions].cpu())
        return hidden

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.enter_context(hooked(layer, keep))
        mean_log_probs(model, examples)
    return states


def patched_drops(model: PreTrainedModel, examples: Sequence[Example], states: list[torch.Tensor]) -> np.ndarray:
    """Drop of each example's mean log-probability with other states after one layer; shape (examples, layers).

    Args:
        states: from `span_states` of the source, for the same examples.
    """
    positions = span_positions(examples)

    def patched(layer: torch.nn.Module, of_source: torch.Tensor) -> np.ndarray:
        def replace(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.clone()
            hidden[positions] = of_source.to(hidden)
            return hidden

        with hooked(layer, replace):
            return mean_log_probs(model, examples)

    after = [patched(*pair) for pair in zip(decoder_layers(model), states, strict=True)]
    return mean_log_probs(model, examples)[:, None] - np.stack(after, 1)


def mean_log_probs(model: PreTrainedModel, examples: Sequence[Example]) -> np.ndarray:
    """Mean token log-probability of each example's answer, from one forward pass; shape (examples,)."""
    no_eos = -1  # a span has no EOS token
    return np.array([tokens.mean_log_prob for tokens in token_log_probs(model, examples, no_eos)])
