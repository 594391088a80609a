"""Continuations of fixed prompts, written while a model trains."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_llm.callbacks.exact_resume import rng_state, set_rng_state
from lit_llm.errors import UserError
from lit_llm.strategies.checkpoint_io import write_text


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
        self._rows: list[list[Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Keep the rows, so that a resumed run's table has no hole."""
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows up again."""
        self._rows = state_dict["rows"]

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, unless this is the check before training."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or datamodule is None or self.max_new_tokens < 1:
            return
        if self.prompts is None:
            self.prompts = _beginnings(datamodule)
        new = [
            [trainer.global_step, prompt, text]
            for prompt, text in zip(
                self.prompts, self._continue(pl_module, datamodule), strict=True
            )
        ]
        self._rows = [row for row in self._rows if row[0] != trainer.global_step] + new
        path = Path(trainer.default_root_dir) / "samples.jsonl"
        lines = (
            json.dumps({"step": step, "prompt": prompt, "continuation": text}, ensure_ascii=False)
            for step, prompt, text in self._rows
        )
        write_text(path, "\n".join(lines) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = ["step", "prompt", "continuation"]
                logger.log_table("samples", columns=columns, data=self._rows)

    def _continue(self, pl_module: Any, datamodule: Any) -> list[str]:
        """Continue the prompts one by one, without moving the training's random numbers."""
        state, training = rng_state(), pl_module.model.training
        torch.manual_seed(self.seed)
        pl_module.model.eval()
        tokenizer, texts = datamodule.tokenizer, []
        config = pl_module.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        new = min(self.max_new_tokens, positions - 1)
        try:
            for prompt in self.prompts or []:
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(pl_module.device)
                ids = ids[:, -(positions - new) :]
                with torch.no_grad():
                    output = pl_module.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=new,
                        do_sample=self.temperature > 0,
                        temperature=self.temperature or None,
                        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                        eos_token_id=tokenizer.eos_token_id,
                    )
                texts.append(tokenizer.decode(output[0, ids.shape[1] :]))
        finally:
            pl_module.model.train(training)
            set_rng_state(state)
        return texts


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
