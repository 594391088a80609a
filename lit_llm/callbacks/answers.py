"""Answers to fixed held-out questions, shown and measured while a model learns to answer."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_llm.callbacks.table import GrowingTable
from lit_llm.errors import UserError
from lit_llm.evaluation.answers import answer_measures
from lit_llm.rollout.generation import GenerationConfig, generate
from lit_llm.strategies.gathering import whole_model

_COLUMNS = ["question", "answer", "reference", "stopped"]


class SampleAnswers(Callback):
    """Answer held-out questions after every validation and test; the same questions every time.

    After a validation: ``answers.jsonl``, a W&B table that grows over the run, and
    ``val/stop_rate``, ``val/well_formed_rate``, ``val/rouge_l`` over these few answers
    (:func:`lit_llm.evaluation.answers.answer_measures`). At the test the same over other questions,
    as ``test_answers.jsonl`` and ``test/...``. The ranks share the questions.

    Args:
        count: Questions of the validation split to answer after every validation; 0 for none.
        test_count: Questions of the test split to answer at the test; 0 for none.
        max_new_tokens: Longest answer in tokens; a longer one is cut off and counts as not stopped.
        temperature: Sampling temperature; 0 takes the most likely token.
        batch_size: Questions to answer at once.
        seed: Seed of the sampling; the same at every step, so that only the model changes.
    """

    def __init__(
        self,
        count: int = 8,
        test_count: int = 64,
        max_new_tokens: int = 96,
        temperature: float = 0.0,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("count", count, 0),
            ("test_count", test_count, 0),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise UserError(f"answers: {name} must be at least {least}, got {value}")
        self.count = count
        self.test_count = test_count
        self.config = GenerationConfig(max_new_tokens, temperature)
        self.batch_size = batch_size
        self.seed = seed
        self._table = GrowingTable("answers", _COLUMNS)
        self._test_table = GrowingTable("test_answers", _COLUMNS)

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

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, unless this is the check before training."""
        if not trainer.sanity_checking:
            self._answer(trainer, pl_module, "validation", self.count, self._table)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer the test's questions; the measures are part of what ``trainer.test`` returns."""
        self._answer(trainer, pl_module, "test", self.test_count, self._test_table)

    def _answer(
        self, trainer: Trainer, pl_module: Any, split: str, count: int, table: GrowingTable
    ) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if datamodule is None or count == 0:
            return
        questions = datamodule.heldout_questions(split, count)
        tokenizer = datamodule.tokenizer
        own = range(trainer.global_rank, len(questions), trainer.world_size)
        with whole_model(pl_module) as model:
            responses = generate(
                model,
                [questions[index].prompt_ids for index in own],
                self.config,
                pad_token_id=datamodule.pad_token_id,
                stop_token_ids=datamodule.stop_token_ids,
                batch_size=self.batch_size,
                seed=self.seed,
            )
        shares = [
            [
                (index, tokenizer.decode(ids), stopped)
                for index, (ids, stopped) in zip(own, responses, strict=True)
            ]
        ]
        if trainer.world_size > 1:
            shares = _gather(shares[0], trainer.world_size)
        answered = sorted(answer for share in shares for answer in share)
        if not answered:
            return
        answers = [text for _, text, _ in answered]
        stopped = [stop for _, _, stop in answered]
        # Every rank logs the same numbers of all answers.
        measures = answer_measures(
            answers,
            [question.reference for question in questions],
            stopped,
            [question.answer_format for question in questions],
            _special_tokens(tokenizer),
        )
        prefix = "val" if split == "validation" else split
        for name, value in measures.items():
            pl_module.log(f"{prefix}/{name}", value)
        if trainer.is_global_zero:
            rows = zip(questions, answers, stopped, strict=True)
            table.put(trainer, [[q.prompt, text, q.reference, stop] for q, text, stop in rows])


def _special_tokens(tokenizer: Any) -> set[str]:
    """Texts of all special tokens, those without a name (such as "eos") too."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text for text in texts | set(tokenizer.all_special_tokens) if text.strip()}


def _gather(share: list[Any], world_size: int) -> list[list[Any]]:
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, share)
    return shares
