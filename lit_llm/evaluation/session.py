"""An evaluation of one or more models, from their names to the report."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_llm.errors import UserError
from lit_llm.evaluation.evaluation_report import write_report
from lit_llm.evaluation.judges import build_judge
from lit_llm.evaluation.results import Answer, ModelResults
from lit_llm.evaluation.runner import Job, evaluate_model, file_name, plan
from lit_llm.evaluation.settings import EvaluationSettings
from lit_llm.evaluation.subject import Subject, subjects
from lit_llm.evaluation.win_rate import WinRate, compare_answers
from lit_llm.strategies.checkpoint_io import check_writable, write_text

if TYPE_CHECKING:
    from lit_llm.evaluation.judges import Judge


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Which models are evaluated, and how they are set against each other.

    Args:
        model: Folder with a model and its tokenizer, name on the Hugging Face Hub, ``.gguf`` file,
            checkpoint, or the folder of a run, of which the newest checkpoint is taken.
        compare: More models of these kinds.
        names: Names of all models in the report; by default what their folders are called.
        stages: Each model is trained from the one before it: it is compared with that one, and not
            with the first.
        judge: Says which of two answers is better: folder of a reward model, ``file.py:function``,
            or the URL of an OpenAI-compatible endpoint (``http://localhost:8000/v1``), which is
            sent the key in OPENAI_API_KEY.
        judge_model: Model that the endpoint is asked for.
        dtype: Data type of the weights.
        output_dir: Folder of the results, answers and report. What is there already, of the same
            models, data and settings, is not computed anew.
    """

    model: str
    compare: list[str] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)
    stages: bool = False
    judge: str | None = None
    judge_model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    output_dir: str = "runs/evaluate"


def evaluate_models(
    comparison: Comparison,
    settings: EvaluationSettings,
    *,
    command: str,
    tell: Callable[[str], None] = print,
    track: Callable[[list[ModelResults], list[WinRate]], None] = lambda results, win_rates: None,
) -> tuple[list[ModelResults], list[WinRate], Path]:
    """Evaluate each model, let the judge compare their answers, and write the report.

    Args:
        comparison: Which models.
        settings: What they are evaluated on.
        command: How to do this again, for the report.
        tell: Is told what is done, in one line each.
        track: Hands results and verdicts to loggers, which may say much; what is certain is told
            after it.

    Returns:
        The results of each model, the judge's verdicts, and the path of the report.

    Raises:
        UserError: A model, task, text, question or judge is not there or does not fit; all that can
            be known is known before the first model is evaluated.
    """
    models = subjects([comparison.model, *comparison.compare], comparison.names)
    folder = Path(comparison.output_dir)
    check_writable(folder)
    if comparison.stages and len(models) < 2:
        raise UserError("--stages compares a model with the one before it; name more: --compare")
    if comparison.judge is None and comparison.judge_model is not None:
        raise UserError("--judge_model is asked of an endpoint; name it: --judge http://HOST/v1")
    for model in models:
        model.check()
    judge = None
    if comparison.judge is not None:
        check_judged(len(models), settings)
        judge = build_judge(comparison.judge, model=comparison.judge_model)
    jobs = plan(settings)
    try:
        results = [_evaluated(model, jobs, comparison, settings, tell) for model in models]
    except KeyboardInterrupt:
        tell(f"\ninterrupted: what is finished is kept in {folder}; the same command goes on there")
        raise SystemExit(130) from None
    win_rates: list[WinRate] = []
    mistake = None
    if judge is not None:
        asked = {item: prompt for job in jobs for item, prompt in job.asked.items()}
        try:
            win_rates = _judged(results, judge, comparison.stages, asked)
        except UserError as error:  # the numbers are to be had all the same
            mistake = error
        _keep(win_rates, folder)
        for rate in win_rates:
            won = rate.measurement
            tell(
                f"{rate.second} wins against {rate.first}: {won.value:.3f} "
                f"[{won.low:.3f}, {won.high:.3f}] by {rate.judge}"
            )
    report = write_report(
        folder, results, win_rates=win_rates, command=command, stages=comparison.stages
    )
    track(results, win_rates)
    told = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    for sentence in [*told["counts"], *told["regressions"]]:
        tell(sentence)
    if mistake is not None:
        raise UserError(
            f"{str(mistake).rstrip('.')} (the report without the judge's verdict: {report})"
        ) from mistake
    tell(f"\nreport: {report.with_suffix('.html')} (the same as text: {report.name})")
    return results, win_rates, report


def _evaluated(
    model: Subject,
    jobs: list[Job],
    comparison: Comparison,
    settings: EvaluationSettings,
    tell: Callable[[str], None],
) -> ModelResults:
    """Load a model and run the jobs; it is forgotten then, as two may not fit into memory."""
    tell(f"=== {model.name}: {model.source}")
    gc.collect()
    lm = model.load(comparison.dtype, batch_tokens=settings.batch_tokens)
    folder = Path(comparison.output_dir) / file_name(model.name)
    done = evaluate_model(lm, jobs, folder=folder, fingerprint=model.fingerprint, tell=tell)
    return ModelResults(model.name, model.source, done, model.about)


def check_judged(models: int, settings: EvaluationSettings) -> None:
    """Refuse a judge that would have nothing to compare.

    Raises:
        UserError: There is one model only, or no questions are answered.
    """
    if models < 2:
        raise UserError("--judge compares the answers of two models; name another one: --compare")
    if not settings.prompts:
        raise UserError("--judge compares answers to questions; name some: --prompts FILE")


def _judged(
    results: Sequence[ModelResults],
    judge: Judge,
    stages: bool,
    asked: Mapping[str, list[dict[str, Any]] | str],
) -> list[WinRate]:
    """What the judge says of each model beside the one it is compared with."""

    def written(model: ModelResults) -> list[Answer]:
        answers = [answer for task in model.tasks for answer in task.answers]
        return [answer for answer in answers if answer.item in asked]

    found = []
    for number, model in enumerate(results[1:], start=1):
        other = results[number - 1 if stages else 0]
        names = (other.name, model.name)
        rate = compare_answers(written(other), written(model), judge, names=names, asked=asked)
        found.append(rate)
    return found


def _keep(win_rates: Sequence[WinRate], folder: Path) -> None:
    """Write down everything that the judge said."""
    for rate in win_rates:
        lines = (
            json.dumps(dataclasses.asdict(judgement), ensure_ascii=False) + "\n"
            for judgement in rate.judgements
        )
        name = file_name(f"{rate.second} against {rate.first}")
        write_text(folder / "judgements" / f"{name}.jsonl", "".join(lines))
