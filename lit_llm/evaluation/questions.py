"""Questions that a model answers freely, the answers, and what can be said of them without a judge.

The answers are what models are compared by: side by side in the report, and by a judge.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_llm.data.chat_template import (
    plain_prompt_ids,
    prompt_ids,
    stop_token_ids,
    with_chat_template,
)
from lit_llm.data.prompt_formats import PromptRecord, read_prompts
from lit_llm.data.records import RecordSource
from lit_llm.data.splits import assign_split
from lit_llm.errors import UserError
from lit_llm.evaluation.answers import answer_measures
from lit_llm.evaluation.coherence import coherence_measurements
from lit_llm.evaluation.harness import ContextTooShortError
from lit_llm.evaluation.perplexity import named_path
from lit_llm.evaluation.results import Answer, Items, Measurement, measure
from lit_llm.rollout.generation import GenerationConfig, Response

if TYPE_CHECKING:
    from lit_llm.evaluation.harness_model import HarnessModel

_ROWS = 64  # answers at once: what is sampled does not depend on it


@dataclass(frozen=True)
class Question:
    """A question as every model is asked it.

    Attributes:
        item: What names it, the same for every model.
        record: The messages or text, and the reference where the data has one.
    """

    item: str
    record: PromptRecord

    @property
    def text(self) -> str:
        """What is asked, for people: the last message of the user, or the plain text."""
        prompt = self.record.prompt
        if isinstance(prompt, list):
            said = [message for message in prompt if message["role"] == "user"]
            return str((said or prompt)[-1].get("content") or "")
        return str(prompt)


def read_questions(
    spec: str, count: int, *, first_words: int = 0, seed: int = 0
) -> tuple[str, list[Question]]:
    """Some questions of a source, drawn over the whole of it.

    Args:
        spec: ``PATH`` or ``NAME=PATH``, as of :class:`EvaluationSettings`.
        count: How many at most.
        first_words: Of plain texts so many first words are the question.
        seed: Another seed draws others.

    Returns:
        The name of the source, and the questions.

    Raises:
        UserError: The source cannot be read or asks nothing.
    """
    name, path = named_path(spec)
    source = RecordSource(path=path)
    found: dict[str, Question] = {}
    for record in read_prompts(source, first_words):
        if source.is_embedded and assign_split(record.group) != "test":
            continue
        if isinstance(record.prompt, tuple) or not record.prompt:
            continue  # tokens of some tokenizer, or nothing asked
        item = _digest([record.prompt, record.tools])
        question = Question(item, record)
        if question.text.strip():
            found.setdefault(item, question)
    if not found:
        raise UserError(
            f"--prompts {spec}: holds no question; docs/evaluation.md says what it may hold"
        )
    chosen = sorted(found.values(), key=lambda question: _digest([seed, question.item]))[:count]
    return f"{name}-questions", chosen


def cut_questions(
    lm: HarnessModel, name: str, questions: Sequence[Question], *, max_new_tokens: int
) -> int:
    """How many questions lose their beginning, as the answer needs room in the model's context.

    Args:
        lm: The model.
        name: Name of the task.
        questions: The questions, at least one.
        max_new_tokens: Longest answer in tokens.

    Raises:
        ContextTooShortError: That is half of them or more.
        UserError: The chat template refuses a question.
    """
    tokenizer = with_chat_template(copy.deepcopy(lm.tokenizer))
    room = lm.max_length - max_new_tokens
    lacking = sorted(max(0, len(_ids(tokenizer, own.record)) - room) for own in questions)
    if lacking[len(lacking) // 2]:
        raise ContextTooShortError(
            f"{name}: the model reads at most {lm.max_length} tokens, and most questions with "
            f"answers of up to {max_new_tokens} tokens need up to {lacking[-1]} more; use a "
            "smaller --max_new_tokens, or leave them out"
        )
    return sum(tokens > 0 for tokens in lacking)


def answer_questions(
    lm: HarnessModel, name: str, questions: Sequence[Question], *, max_new_tokens: int
) -> tuple[list[Answer], list[Measurement]]:
    """Let a model answer, and measure the answers: do they end, are they well formed, coherent.

    Questions go through the chat template of the tokenizer, or ours where it has none; texts are
    continued as they are. Each token is the most likely one, so no answer depends on the others.

    Args:
        lm: The model.
        name: Name of the task.
        questions: What to answer, at least one.
        max_new_tokens: Longest answer in tokens.

    Returns:
        One answer a question, in order, and the measurements.

    Raises:
        UserError: The chat template refuses a question.
    """
    # A copy: tasks that ask whether the model has a template of its own shall not find ours.
    tokenizer = with_chat_template(copy.deepcopy(lm.tokenizer))
    stops = stop_token_ids(tokenizer)
    prompts = [_ids(tokenizer, question.record) for question in questions]
    config = GenerationConfig(max_new_tokens, temperature=0.0)
    responses = lm.dealt(lambda share: _respond(lm, share, config, stops), prompts)
    texts = [
        str(tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False))
        for ids, stopped in responses
    ]
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    answers = []
    for question, text, response in zip(questions, texts, responses, strict=True):
        record = question.record
        found = answer_measures(
            [text], [record.reference or ""], [response.stopped], [record.answer_format], special
        )
        if record.reference is None:
            del found["rouge_l"]
        answers.append(
            Answer(
                name,
                question.item,
                question.text,
                text,
                record.reference,
                found,
                stopped=response.stopped,
            )
        )
    own = lm.token_scores([(p, r.ids) for p, r in zip(prompts, responses, strict=True)])
    scores = [(-score, len(r.ids)) for score, r in zip(own, responses, strict=True)]
    formats = any(question.record.answer_format for question in questions)
    measurements = [
        *(_mean(name, metric, answers) for metric in _told(answers, formats)),
        *coherence_measurements(name, answers, scores),
    ]
    return answers, measurements


def _told(answers: Sequence[Answer], formats: bool) -> list[str]:
    """Measures beside those of coherence, which say that answers end."""
    names = ["well_formed_rate"] if formats else []
    return names + (["rouge_l"] if any("rouge_l" in answer.scores for answer in answers) else [])


def _mean(name: str, metric: str, answers: Sequence[Answer]) -> Measurement:
    kept = [answer for answer in answers if metric in answer.scores]
    values = [answer.scores[metric] for answer in kept]
    return measure(name, metric, Items([a.item for a in kept], values, [1.0] * len(kept)))


def _respond(
    lm: HarnessModel, prompts: Sequence[list[int]], config: GenerationConfig, stops: Sequence[int]
) -> list[Response]:
    from lit_llm.rollout.sampling import SamplingEngine

    engine = SamplingEngine(
        pad_token_id=lm.pad_token_id, stop_token_ids=stops, batch_size=_ROWS, dtype=lm.dtype
    )
    engine.load(lm.model)
    try:
        return engine.generate(prompts, config, seeds=[0] * len(prompts))
    finally:
        engine.release()


def _ids(tokenizer: Any, record: PromptRecord) -> list[int]:
    try:
        if isinstance(record.prompt, str):
            return plain_prompt_ids(tokenizer, record.prompt)
        assert isinstance(record.prompt, list)
        return prompt_ids(tokenizer, record.prompt, record.tools, record.template_options)
    except UserError as error:
        raise UserError(f"{record.origin}: {error}") from error


def _digest(content: Any) -> str:
    data = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()
