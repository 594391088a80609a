"""Runs a benchmark task of the lm-evaluation-harness on a model, from local files or the Hub."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from lit_llm.errors import UserError
from lit_llm.evaluation.harness_samples import Run, answers_of, measurements_of, without_numbers
from lit_llm.evaluation.results import TaskResult
from lit_llm.evaluation.suites import EvaluationTask, own_tasks
from lit_llm.evaluation.tasks.library import (
    hub_answers,
    library_tasks,
    offline_where_it_is,
    read_file,
    require_lm_eval,
    undisturbed,
)

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

Chat = Literal["auto", "on", "off"]

# Added to the seed of the examples, so that seed 0 draws those that the harness draws by default.
_HARNESS_SEED = 1234
_PROBED = 16  # prompts whose length is looked at before anything is run


class _CannotRunError(Exception):
    """Why a task cannot be run here, though nothing is wrong with what was asked for."""


class ContextTooShortError(UserError):
    """The model's context is too short for items of one task; others may fit."""


def run_task(
    lm: LM,
    task: EvaluationTask,
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: Chat = "auto",
    seed: int = 0,
) -> TaskResult:
    """Measure a model on one task.

    Our own version of a task is run where its files are there; otherwise the library's, where the
    Hub answers; otherwise the result says why it was skipped. Global random states are left alone.

    Args:
        lm: The model.
        task: The task.
        data_dir: Folder with the tasks' files.
        limit: Items, drawn one from each of as many equal stretches of the task, as files are often
            sorted; the same for every model. ``None`` takes all.
        num_fewshot: Examples in the prompt; a task without examples has none all the same.
        chat: Whether prompts go through the tokenizer's chat template: ``auto`` where the model
            writes its answers and there is a template.
        seed: Draws items and examples.

    Raises:
        UserError: The harness is not installed; a file has not what the task reads; there are not
            so many examples, or no chat template.
        ContextTooShortError: The model's context is too short for half of the items or more, or
            for one of their answers.
    """
    require_lm_eval()
    from lm_eval.evaluator import evaluate

    with undisturbed():
        parts: dict[str, Task] = {}
        source, reason = "", None
        try:
            parts, source = _load(task, data_dir)
        except _CannotRunError as error:
            reason = str(error)
        reason = _of_any_rank(reason, getattr(lm, "ranks", None))
        if reason is not None:
            return TaskResult(task.name, task.category, skipped=reason)
        for part in parts.values():
            _set_examples(part, num_fewshot, seed)
        sizes = {name: len(part.eval_docs) for name, part in parts.items()}
        drawn = _draw(sizes, limit, seed)
        # To the harness no numbers of items mean all of them.
        parts = {name: part for name, part in parts.items() if drawn[name]}
        items = sum(map(len, drawn.values()))
        templated = _uses_template(lm, task, parts, chat)
        _check_context(lm, task, parts, drawn, templated)
        for part in parts.values():
            part.set_fewshot_seed(_HARNESS_SEED + seed)  # the look at the prompts drew some
        found = evaluate(
            lm,
            {"tasks": parts},
            # Of all of them the harness is not told: it searches the numbers for each item.
            samples=None if items == sum(sizes.values()) else {name: drawn[name] for name in parts},
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=templated,
            fewshot_as_multiturn=True,
        )
        run = Run(task, parts, found["samples"], getattr(lm, "stopped", None))
        broken = without_numbers(run)
        if broken:
            reason = (
                f"the model's log-likelihoods are no numbers on {broken} of {items} items; it may "
                "have diverged"
            )
            return TaskResult(task.name, task.category, skipped=reason)
        settings = {
            "source": source,
            "items": items,
            "limit": limit,
            "num_fewshot": max(part.get_config("num_fewshot") or 0 for part in parts.values()),
            "chat_template": templated,
            "seed": seed,
            "version": task.version,
            "cut_prompts": _cut_prompts(lm, parts),
        }
        return TaskResult(
            task.name, task.category, measurements_of(run), answers_of(run), settings=settings
        )


# ----- where a task comes from ------------------------------------------------------------------


def _load(task: EvaluationTask, data_dir: str | None) -> tuple[dict[str, Task], str]:
    """The harness's tasks by name, and where their data came from."""
    missing = task.missing_file(data_dir)
    if task.path is not None and missing is None:
        source = "embedded" if task.name in own_tasks() else str(task.path)
        return _read_file(task.path, data_dir), str(data_dir) if task.files else source
    absent = ""
    if task.path is not None:
        absent = (
            f"no folder with {missing} is named (--data_dir)"
            if data_dir is None
            else f"{missing} is not in {data_dir}"
        )
        if task.library is None:
            raise _CannotRunError(f"{absent}; the library has no such task to run in its place")
        if not hub_answers():
            raise _CannotRunError(f"{absent}, and the Hugging Face Hub cannot be reached")
    return _load_from_library(task, absent), f"Hugging Face Hub (lm_eval/{task.library})"


def _of_any_rank(reason: str | None, ranks: Any) -> str | None:
    """Why one of the ranks cannot run a task: as they share its items, all of them do or none."""
    if ranks is None:
        return reason
    reasons: list[str | None] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(reasons, reason, group=ranks)
    return next((own for own in reasons if own is not None), None)


def _read_file(path: Path, data_dir: str | None) -> dict[str, Task]:
    try:
        return read_file(path, data_dir)
    except UserError:
        raise
    except Exception as error:  # of the harness, for what it misses in somebody's own file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: the harness cannot make a task of it ({type(error).__name__}: {reason}); see "
            "its new task guide"
        ) from error


def _load_from_library(task: EvaluationTask, absent: str) -> dict[str, Task]:
    start = f"{absent}, and " if absent else ""
    try:
        with offline_where_it_is():
            parts = library_tasks().load([task.library])["tasks"]
    except ModuleNotFoundError as error:
        raise _CannotRunError(
            f"{start}the library's task {task.library} needs the package {error.name}, which is "
            "not installed"
        ) from error
    # A task of the library may run any code, and the Hub's client has errors of its own.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise _CannotRunError(
            f"{start}the library's task {task.library} cannot be loaded from the Hugging Face Hub: "
            f"{reason}"
        ) from error
    if any(getattr(part, "UNSAFE_CODE", False) for part in parts.values()):
        raise _CannotRunError(f"{task.library} runs code that the model wrote, which is not done")
    return parts


# ----- items and examples -----------------------------------------------------------------------


def _set_examples(part: Task, num_fewshot: int | None, seed: int) -> None:
    """As the harness's own simple_evaluate does it: a task that says 0 keeps it."""
    own = part.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        part.set_config(key="num_fewshot", value=num_fewshot or 0)
    part.set_fewshot_seed(_HARNESS_SEED + seed)


def _draw(sizes: dict[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the items to take of each part, ascending: one from each of equal stretches."""
    total = sum(sizes.values())
    if limit is None or limit >= total:
        return {name: list(range(size)) for name, size in sizes.items()}
    generator = random.Random(seed)
    edges = [number * total // limit for number in range(limit + 1)]
    chosen = [generator.randrange(low, high) for low, high in pairwise(edges)]
    drawn, start = {}, 0
    for name, size in sizes.items():
        drawn[name] = [number - start for number in chosen if start <= number < start + size]
        start += size
    return drawn


# ----- the prompt -------------------------------------------------------------------------------


def _uses_template(lm: LM, task: EvaluationTask, parts: dict[str, Task], chat: Chat) -> bool:
    if chat == "off" or any(part.get_config("doc_to_text") == "" for part in parts.values()):
        return False  # without a prompt there is no turn to put anything into
    written = all(part.OUTPUT_TYPE == "generate_until" for part in parts.values())
    wanted = written if task.chat is None else task.chat
    if chat == "auto" and not wanted:
        return False
    try:
        template = bool(lm.chat_template(True))
    except (AttributeError, NotImplementedError, ValueError):
        template = False
    if chat == "on" and not template:
        raise UserError("the tokenizer has no chat template; leave out --chat on")
    return template


@dataclass(frozen=True)
class _Room:
    """How much of a prompt a model can read."""

    lm: Any
    context: int

    @classmethod
    def of(cls, lm: LM) -> _Room | None:
        context = getattr(lm, "max_length", None)
        return None if context is None or not hasattr(lm, "tok_encode") else cls(lm, context)

    def lacks(self, instance: Any) -> int:
        """Tokens by which a request is longer than what the model can read; 0 where it fits."""
        if len(instance.args) < 2:
            return 0  # a text as a whole is read window by window
        text, rest = instance.args[:2]
        written = isinstance(rest, dict)
        if written:
            after = rest.get("max_gen_toks") or getattr(self.lm, "max_gen_toks", 0)
        else:
            after = len(self._tokens(rest))
        # The last token is predicted and not read; a token stands for at least a byte.
        room = self.context - after + (0 if written else 1)
        return 0 if len(text.encode()) <= room else max(0, len(self._tokens(text)) - room)

    def _tokens(self, text: str) -> list[int]:
        return list(self.lm.tok_encode(text))


def _check_context(
    lm: LM,
    task: EvaluationTask,
    parts: dict[str, Task],
    drawn: dict[str, list[int]],
    templated: bool,
) -> None:
    """Look at some prompts beforehand.

    Raises:
        ContextTooShortError: Half of them or more do not fit into the model's context.
    """
    room = _Room.of(lm)
    if room is None:
        return
    lacking = []
    per_part = max(1, _PROBED // len(parts))
    for name, part in islice(parts.items(), _PROBED):
        step, docs = max(1, len(drawn[name]) // per_part), part.eval_docs
        for number in drawn[name][::step][:per_part]:
            doc = docs[number]
            lacking.append(max(map(room.lacks, _requests(lm, part, doc, templated)), default=0))
    if sorted(lacking)[len(lacking) // 2] == 0:
        return
    shots = max(part.get_config("num_fewshot") or 0 for part in parts.values())
    cure = "use a smaller --num_fewshot or leave the task out" if shots else "leave the task out"
    raise ContextTooShortError(
        f"{task.name}: the model reads at most {room.context} tokens, and most prompts "
        f"{f'with {shots} examples ' if shots else ''}and their answers need up to "
        f"{max(lacking)} more; {cure}"
    )


def _requests(lm: LM, part: Task, doc: dict[str, Any], templated: bool) -> list[Any]:
    template = lm.apply_chat_template if templated else None
    context = part.fewshot_context(
        doc,
        num_fewshot=part.get_config("num_fewshot") or 0,
        apply_chat_template=templated,
        fewshot_as_multiturn=True,
        chat_template=template,
        gen_prefix=part.doc_to_prefix(doc),
    )
    made = part.construct_requests(
        doc=doc,
        ctx=context,
        apply_chat_template=templated,
        chat_template=template,
        metadata=(part.task_name, 0, 1),
    )
    return made if isinstance(made, list) else [made]


def _cut_prompts(lm: LM, parts: dict[str, Task]) -> int | None:
    """Items whose prompt lost its beginning; ``None`` where the model does not tell its context."""
    room = _Room.of(lm)
    if room is None:
        return None
    cut = {
        (name, instance.doc_id)
        for name, part in parts.items()
        for instance in part.instances
        if room.lacks(instance)
    }
    return len(cut)
