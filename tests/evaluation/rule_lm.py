"""A model for the harness that answers by a rule, and task files in the layout of the real ones."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM


class RuleLM(LM):
    """Answers by rule, and remembers what it was asked.

    Args:
        score: Log-likelihood of a continuation, from context and continuation.
        write: Answer, from the prompt.
        template: Its chat template; empty for none.
    """

    tokenizer_name = "rule"

    def __init__(
        self,
        score: Callable[[str, str], float] = lambda context, text: -float(len(text)),
        write: Callable[[str], str] = lambda prompt: "",
        template: str = "",
    ) -> None:
        super().__init__()
        self.score, self.write, self.template = score, write, template
        self.asked: list[tuple[Any, ...]] = []
        self.stopped: list[bool] = []

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in chat_history)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(self.score(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        self.asked += [request.args for request in requests]
        return [self.score("", request.args[0]) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked += [request.args for request in requests]
        answers = [self.write(request.args[0]) for request in requests]
        self.stopped = [bool(answer) for answer in answers]
        return answers


def prefers(*texts: str) -> Callable[[str, str], float]:
    """Finds some texts likelier than all others, which are equal."""
    return lambda context, text: -1.0 if text.strip() in texts else -9.0


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """A .jsonl, .csv or .tsv file of rows, compressed where its name says so."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    if ".jsonl" in name:
        text.writelines(json.dumps(row) + "\n" for row in rows)
    elif ".tsv" in name:
        text.writelines("\t".join(values) + "\n" for values in (rows[0], *map(dict.values, rows)))
    else:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
