"""Continuations of fixed prompts, written while a model trains."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_llm.callbacks.table import GrowingTable
from lit_llm.errors import UserError
from lit_llm.rollout.generation import GenerationConfig, generate
from lit_llm.strategies.gathering import whole_model


class SampleContinuations(Callback):
    """Continue fixed prompts after every validation; to ``samples.jsonl`` and a W&B table.

    The table grows over the run, so that one prompt can be followed from noise to text.

    Args:
        prompts: Texts to continue; by default the beginnings of three held-out documents.
        max_new_tokens: Tokens to add to each.
        temperature: Sampling temperature; 0 takes the most likely token.
        seed: Seed of the sampling; the same at every step, so that only the model changes.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        max_new_tokens: int = 48,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        if prompts is not None and not all(prompts):
            raise UserError("samples: a prompt is empty; give every prompt some text")
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self._table = GrowingTable("samples", ["prompt", "continuation"])
        if max_new_tokens > 0:  # a bad setting is better said now than after hours
            self._config()

    def state_dict(self) -> dict[str, Any]:
        """Keep the rows, so that a resumed run's table has no hole."""
        return {"rows": self._table.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows up again."""
        self._table.rows = state_dict["rows"]

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what the run wrote after its checkpoint."""
        if trainer.global_step:
            self._table.take_over(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, unless this is the check before training."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or datamodule is None or self.max_new_tokens < 1:
            return
        if self.prompts is None:
            self.prompts = _beginnings(datamodule)
        with whole_model(pl_module) as model:  # together, as ranks may have to gather it
            if not trainer.is_global_zero:
                return
            texts = self._continue(model, datamodule.tokenizer, self.prompts)
        self._table.put(trainer, [list(row) for row in zip(self.prompts, texts, strict=True)])

    def _config(self) -> GenerationConfig:
        return GenerationConfig(self.max_new_tokens, self.temperature)

    def _continue(self, model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
        """Continue the prompts, up to the end of the text where the model ends it."""
        end = tokenizer.eos_token_id
        responses = generate(
            model,
            [tokenizer(prompt)["input_ids"] for prompt in prompts],
            self._config(),
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            stop_token_ids=[end],
            seed=self.seed,
        )
        return [tokenizer.decode(ids + [end] * stopped) for ids, stopped in responses]


def _beginnings(datamodule: Any, count: int = 3, characters: int = 60) -> list[str]:
    """Take the first words of some held-out documents as prompts."""
    prompts = []
    for text in datamodule.heldout_texts("validation"):
        whole = len(text) <= characters
        words = (text if whole else text[:characters].rsplit(" ", 1)[0]).strip()
        if words:
            prompts.append(words)
        if len(prompts) == count:
            break
    return prompts
