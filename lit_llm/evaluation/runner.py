"""Evaluates a model: texts, tasks and questions in turn, each kept as soon as it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.errors import UserError
from lit_llm.evaluation.harness import ContextTooShortError
from lit_llm.evaluation.perplexity import perplexity_measurements, read_texts, score_texts
from lit_llm.evaluation.questions import answer_questions, cut_questions, read_questions
from lit_llm.evaluation.results import Measurement, TaskResult, results_to_dict, task_from_dict
from lit_llm.evaluation.settings import EvaluationSettings
from lit_llm.evaluation.suites import EvaluationTask, tasks_of
from lit_llm.evaluation.tasks.library import require_lm_eval
from lit_llm.strategies.checkpoint_io import write_text

if TYPE_CHECKING:
    from lit_llm.evaluation.harness_model import HarnessModel

_log = logging.getLogger(__name__)

FORMAT = 1
"""Version of what is computed; results of another one are computed anew."""


@dataclass(frozen=True)
class Job:
    """One part of an evaluation.

    Attributes:
        name: Name of the task.
        category: What it looks at.
        identity: What, beside the model, decides the result.
        run: Computes it.
        asked: By item what models are asked whose answers a judge compares: a conversation, or a
            text to be continued.
    """

    name: str
    category: str
    identity: dict[str, Any]
    run: Callable[[HarnessModel], TaskResult]
    asked: Mapping[str, list[dict[str, Any]] | str] = field(default_factory=dict)


def plan(settings: EvaluationSettings, *, strict: bool = True) -> list[Job]:
    """What an evaluation consists of; texts and questions are read here, before any model is.

    Args:
        settings: What to evaluate on.
        strict: Whether a task that is named and has no room in a model's context is a mistake;
            otherwise it is skipped, as one of a suite always is.

    Raises:
        UserError: A suite, task, text or question is not there, or the harness is not installed.
    """
    require_lm_eval()
    jobs = [_text_job(spec, settings) for spec in settings.texts]
    named = set(settings.tasks)
    jobs += [
        _task_job(task, settings, wanted=strict and task.name in named)
        for task in tasks_of(settings.suite, settings.tasks)
    ]
    jobs += [_question_job(spec, settings) for spec in settings.prompts]
    names = [file_name(job.name) for job in jobs]  # each is kept in a file of its own
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"two parts of the evaluation are named {twice[0]!r}; name one of them in another way: "
            "--texts NAME=PATH"
        )
    return jobs


def evaluate_model(
    lm: HarnessModel,
    jobs: list[Job],
    *,
    folder: Path | None = None,
    fingerprint: str = "",
    tell: Callable[[str], None] = _log.info,
) -> list[TaskResult]:
    """Run the jobs, taking over what an evaluation that was interrupted has done.

    Leaves no trace in the random state, so that training goes on as if nothing had happened.

    Args:
        lm: The model.
        jobs: What to do.
        folder: Where each result is kept as soon as it is there: ``results/NAME.json``, and the
            answers in ``answers/NAME.jsonl``. ``None`` keeps none.
        fingerprint: What names the model's weights: results of others are computed anew, and so
            are those of another tokenizer, chat template or version of the harness.
        tell: Is told what is done, in one line a job.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    results = []
    model = [fingerprint, lm.identity] if folder else []
    for number, job in enumerate(jobs, start=1):
        key = _key({"format": FORMAT, "model": model, "name": job.name, **job.identity})
        path = folder and folder / "results" / f"{file_name(job.name)}.json"
        result = _kept(path, key) if path else None
        told = "as before"
        if result is None:
            started = time.perf_counter()
            with isolate_rng():
                result = job.run(lm)
            seconds = time.perf_counter() - started
            result = dataclasses.replace(result, seconds=seconds)
            told = f"{seconds:.0f} s"
            if path:
                _keep(path, key, result)
        tell(f"[{number}/{len(jobs)}] {job.name}: {in_words(result)} ({told})")
        results.append(result)
    return results


def in_words(result: TaskResult) -> str:
    """The first numbers of a result, or why there are none, in one line."""
    if result.skipped is not None:
        return f"skipped, {result.skipped.removeprefix(f'{result.task}: ')}"
    return ", ".join(map(_number, result.measurements[:3]))


def _number(measured: Measurement) -> str:
    interval = f" [{measured.low:.4g}, {measured.high:.4g}]"
    return f"{measured.metric} {measured.value:.4g}{'' if math.isnan(measured.low) else interval}"


# ----- the jobs ---------------------------------------------------------------------------------


def _text_job(spec: str, settings: EvaluationSettings) -> Job:
    texts = read_texts(spec, max_documents=settings.max_texts)
    own = settings.of("window", "stride", "max_texts")

    def run(lm: HarnessModel) -> TaskResult:
        scores = score_texts(lm, texts, window=settings.window, stride=settings.stride)
        about = {**own, "source": spec, "documents": len(texts.documents)}
        measurements = perplexity_measurements(texts.name, scores)
        return TaskResult(texts.name, "perplexity", measurements, settings=about)

    identity = {**own, "texts": _key(texts.documents), "batch": settings.batch_tokens}
    return Job(texts.name, "perplexity", identity, run)


def _task_job(task: EvaluationTask, settings: EvaluationSettings, *, wanted: bool) -> Job:
    """A benchmark task; one that only came with a suite is left out where a model is too small."""
    own = settings.of("data_dir", "num_fewshot", "chat", "seed") | {"limit": settings.items}

    def run(lm: HarnessModel) -> TaskResult:
        from lit_llm.evaluation.harness import run_task

        try:
            return run_task(lm, task, **own)
        except ContextTooShortError as error:
            if wanted:
                raise
            return TaskResult(task.name, task.category, skipped=str(error), settings=own)

    files = [str(path) for path in task.found_files(settings.data_dir)]
    stats = [(name, Path(name).stat().st_size, Path(name).stat().st_mtime_ns) for name in files]
    identity = {**own, "files": stats, "version": task.version}
    if task.path is not None:  # it may be the user's own, who counts no versions
        identity["definition"] = task.path.read_text(encoding="utf-8")
    if not task.files:  # what is embedded is taken from the running Python
        identity["python"] = platform.python_version()
    return Job(task.name, task.category, identity, run)


def _question_job(spec: str, settings: EvaluationSettings) -> Job:
    name, questions = read_questions(
        spec, settings.num_prompts, first_words=settings.first_words, seed=settings.seed
    )
    own = settings.of("max_new_tokens", "first_words")

    def run(lm: HarnessModel) -> TaskResult:
        try:
            cut = cut_questions(lm, name, questions, max_new_tokens=settings.max_new_tokens)
        except ContextTooShortError as error:
            return TaskResult(name, "coherence", skipped=str(error), settings=own)
        answers, measurements = answer_questions(
            lm, name, questions, max_new_tokens=settings.max_new_tokens
        )
        about = {**own, "source": spec, "questions": len(questions), "cut_prompts": cut}
        return TaskResult(name, "coherence", measurements, answers, settings=about)

    # Their answers and forms too, but not the place in a file: a line before it changes nothing.
    records = [dataclasses.replace(question.record, origin="") for question in questions]
    identity = {**own, "questions": _key([dataclasses.asdict(record) for record in records])}
    asked = {
        own.item: own.record.prompt for own in questions if not isinstance(own.record.prompt, tuple)
    }
    return Job(name, "coherence", identity, run, asked)


# ----- what is kept -----------------------------------------------------------------------------


def _keep(path: Path, key: str, result: TaskResult) -> None:
    """Write the answers, and then the result, which says that both are whole."""
    lines = (_json(dataclasses.asdict(answer)) + "\n" for answer in result.answers)
    answers = path.parent.parent / "answers" / f"{path.stem}.jsonl"
    if result.answers:
        write_text(answers, "".join(lines))
    else:
        answers.unlink(missing_ok=True)  # those of an earlier evaluation
    write_text(path, _json({"key": key, **results_to_dict(result)}))


def _kept(path: Path, key: str) -> TaskResult | None:
    """A result that is there already, of the same model, settings and data; never a skipped one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("key") != key or data["skipped"] is not None:
            return None
        return task_from_dict(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _json(content: dict[str, Any]) -> str:
    """As other programs read it too: JSON knows no NaN, which is null."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(plain, ensure_ascii=False)


def _key(content: Any) -> str:
    data = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode()
    return hashlib.sha256(data).hexdigest()


def file_name(name: str) -> str:
    """A name as a file's."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
