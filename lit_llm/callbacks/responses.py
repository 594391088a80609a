"""Responses to held-out prompts, shown while a policy is trained and compared at the end."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_llm.callbacks.table import GrowingTable
from lit_llm.errors import UserError
from lit_llm.evaluation.responses import EvaluatedResponse, outcome

_COLUMNS = ["prompt", "response", "score", "kl", "length", "stopped"]
_TEST_COLUMNS = [
    "index",
    *_COLUMNS,
    "repetition",
    "scores",
    "baseline",
    "baseline_score",
    "baseline_scores",
    "winner",
]
_WINNERS = {1.0: "policy", 0.5: "tie", 0.0: "reference", None: None}


class Responses(Callback):
    """Write down how the policy answers held-out prompts; the same prompts every time.

    After a validation the first few go to ``responses.jsonl`` and a W&B table that grows over the
    run; at the test all of them to ``test_responses.jsonl``, each beside the reference's answer to
    the same prompt, with the scores of both and whose is higher. The module has ``evaluated``, on
    the first rank complete as soon as its own hooks of a validation or test are through, and logs
    the measures (:func:`lit_llm.evaluation.responses.response_measures`) itself.

    Args:
        count: Responses to show after every validation; 0 for none.
    """

    def __init__(self, count: int = 16) -> None:
        if count < 0:
            raise UserError(f"responses: count must be at least 0, got {count}; 0 shows none")
        self.count = count
        self._table = GrowingTable("responses", _COLUMNS)
        self._test_table = GrowingTable("test_responses", _TEST_COLUMNS)

    def state_dict(self) -> dict[str, Any]:
        """Keep the rows, so that a resumed run's tables have no hole."""
        return {"rows": self._table.rows, "test_rows": self._test_table.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows up again."""
        self._table.rows = state_dict["rows"]
        self._test_table.rows = state_dict["test_rows"]

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what the run wrote after its checkpoint."""
        if trainer.global_step:
            self._table.take_over(trainer)
            self._test_table.take_over(trainer)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the first responses, unless this is the check before training."""
        rows = [] if trainer.sanity_checking else _evaluated(pl_module)[: self.count]
        if rows:
            self._table.put(trainer, [_shown(row) for row in rows])

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all responses down, each beside the reference's."""
        rows = _evaluated(pl_module)
        if rows:
            self._test_table.put(trainer, [_compared(row) for row in rows])


def _evaluated(pl_module: Any) -> list[EvaluatedResponse]:
    """The responses in the order of their prompts, whichever rank answered them."""
    return sorted(pl_module.evaluated, key=lambda row: row.index)


def _shown(row: EvaluatedResponse) -> list[Any]:
    return [row.prompt, row.response, row.score, row.kl, row.length, row.stopped]


def _compared(row: EvaluatedResponse) -> list[Any]:
    other = row.baseline
    baseline = [None] * 3 if other is None else [other.response, other.score, other.scores]
    own = [row.index, *_shown(row), row.repetition, row.scores]
    return [*own, *baseline, _WINNERS[outcome(row)]]
