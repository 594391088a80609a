"""What is evaluated, and on how much of it: the settings that the recipe and the callback share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_llm.errors import UserError

Chat = Literal["auto", "on", "off"]

_LEAST = {
    "limit": 1,
    "num_fewshot": 0,
    "max_texts": 1,
    "window": 2,
    "stride": 1,
    "num_prompts": 1,
    "first_words": 0,
    "max_new_tokens": 1,
    "batch_tokens": 1,
}


@dataclass(frozen=True)
class EvaluationSettings:
    """What a model is evaluated on. The same settings give every model the same items.

    Args:
        suite: Sets of benchmark tasks: quick, reasoning, facts, safety, coherence, all; or none.
        tasks: More benchmark tasks, by name: those of docs/evaluation.md, and all of the
            lm-evaluation-harness, whose own version of a task is ``lm_eval/NAME``.
        data_dir: Folder with the tasks' files (data/eval/README.md says which); a task whose file
            is not there is read from the Hugging Face Hub, or skipped where that cannot be reached.
        limit: Items of each task, drawn over the whole of it, the same for every model; by default
            100 with the suite quick alone, and otherwise all.
        num_fewshot: Examples in the prompt; by default what each task says.
        chat: Ask the tasks that let the model write through its chat template: ``auto`` where its
            tokenizer has one.
        texts: Texts to measure perplexity and bits per byte on, each ``PATH`` or ``NAME=PATH``:
            files, folders, globs, data sets of the Hub, or ``python-docs``, of which what training
            holds out by default is taken; or none.
        max_texts: Documents of each of them, the first ones; by default all.
        window: Tokens that a text is read by; by default the model's positions, at most 2,048.
        stride: Tokens from one window to the next; by default half a window.
        prompts: Questions that the model answers, each ``PATH`` or ``NAME=PATH`` of prompts in any
            format that PPO takes, or ``python-docs``, of which what training holds out by default
            is taken; or none.
        num_prompts: Questions of each of them, drawn over the whole.
        first_words: Of plain texts so many first words are the question.
        max_new_tokens: Longest answer in tokens.
        batch_tokens: Tokens that go through the model at once.
        seed: Draws the items, and the examples of prompts.
    """

    suite: list[str] = field(default_factory=lambda: ["quick"])
    tasks: list[str] = field(default_factory=list)
    data_dir: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: Chat = "auto"
    texts: list[str] = field(default_factory=lambda: ["python-docs"])
    max_texts: int | None = None
    window: int | None = None
    stride: int | None = None
    prompts: list[str] = field(default_factory=lambda: ["python-docs"])
    num_prompts: int = 64
    first_words: int = 0
    max_new_tokens: int = 96
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense; take ``none`` for an empty list.

        Raises:
            UserError: A number is too small, there is no such folder, or nothing to evaluate.
        """
        for name in LISTS:
            own = list(getattr(self, name))
            if own in (["none"], [""]):
                object.__setattr__(self, name, [])
            elif "none" in own:
                raise UserError(f"--{name} is none, or names something; got {', '.join(own)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, got {value}")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise UserError(
                f"--stride {self.stride} would leave out tokens between windows of {self.window}; "
                "give --window or less"
            )
        if self.data_dir is not None and not Path(self.data_dir).expanduser().is_dir():
            raise UserError(
                f"--data_dir: there is no folder {self.data_dir!r}; name the one that holds the "
                "tasks' files (data/eval/README.md), or leave --data_dir out"
            )
        if not any(getattr(self, name) for name in LISTS):
            raise UserError(
                "nothing to evaluate: name a --suite, --tasks, --texts or --prompts "
                "(docs/evaluation.md lists the suites)"
            )

    @property
    def items(self) -> int | None:
        """Items of each task; ``None`` for all."""
        quick = self.suite == ["quick"] and not self.tasks
        return 100 if self.limit is None and quick else self.limit

    def of(self, *names: str) -> dict[str, Any]:
        """Some of the settings, as what decides a result is kept beside it."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in names}


LISTS = ("suite", "tasks", "texts", "prompts")
"""The settings that are lists."""
