"""What makes a run worthless, found before its first step and said in one sentence."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_llm.data.packing import IGNORED
from lit_llm.errors import UserError


class Guards(Callback):
    """Refuse to train where nothing, or the wrong thing, would be learned.

    Every stage has them: no trainable parameter, no target in the first batch, BOS twice at the
    beginning of a text, a learning rate of 0 after the warm-up. Where answers are trained: a mask
    that marks everything, answers without an end, padding that is also an end.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check optimizer, schedule and the first batch.

        Raises:
            UserError: For the first thing that is wrong.
        """
        check_learning_rate(pl_module, trainer.optimizers)
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "first_batch"):
            return
        batch = datamodule.first_batch()
        tokenizer = datamodule.tokenizer
        ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        check_targets(batch)
        check_beginnings(batch, tokenizer.bos_token_id, ends)
        stops = getattr(datamodule, "stop_token_ids", None)
        if stops is not None:
            whole = getattr(datamodule, "trains_everything", False)
            check_answers(batch, stops, tokenizer, whole=whole)


def check_learning_rate(pl_module: Any, optimizers: list[torch.optim.Optimizer]) -> None:
    """Refuse a run in which no parameter moves.

    Args:
        pl_module: The module, with ``schedule`` and ``total_steps`` where it has a schedule.
        optimizers: Its optimizers.

    Raises:
        UserError: No parameter is trained, or the learning rate is 0 for most of the run.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
        raise UserError("the model has no trainable parameter; unfreeze some, or add an adapter")
    # A scheduler scales the rate that the optimizer was built with.
    rate = max(group.get("initial_lr", group["lr"]) for group in groups)
    schedule, total = getattr(pl_module, "schedule", None), 1
    if schedule is not None:
        total = pl_module.total_steps()
    looked_at = range(0, total, max(1, total // 1000))
    moving = [rate * (schedule.factor(s, total) if schedule else 1.0) > 0 for s in looked_at]
    if not any(moving):
        raise UserError(
            f"the learning rate is 0 in every step (peak {rate}); give model.optimizer an lr above "
            "0 and look at model.schedule"
        )
    if sum(moving) < len(moving) / 2:
        raise UserError(
            f"the learning rate is 0 in {1 - sum(moving) / len(moving):.0%} of {total} steps, "
            "after the warm-up; give model.schedule a longer decay or a min_factor above 0"
        )


def check_targets(batch: dict[str, Tensor]) -> None:
    """Refuse a batch without a target.

    Raises:
        UserError: Every label is -100.
    """
    if not bool((batch["labels"][:, 1:] != IGNORED).any()):
        raise UserError(
            "no token of the first batch is trained on (every label is -100); look at it with "
            "--inspect, and at the chat template, the roles of the messages and data.train_on"
        )


def check_beginnings(
    batch: dict[str, Tensor], bos_token_id: int | None, others: tuple[int | None, ...]
) -> None:
    """Refuse texts that begin with two BOS tokens.

    Args:
        batch: A batch of token ids.
        bos_token_id: The token that begins a text, if there is one.
        others: Tokens that may rightly stand twice, such as EOS and padding.

    Raises:
        UserError: BOS follows BOS.
    """
    if bos_token_id is None or bos_token_id in others:
        return
    is_bos = batch["input_ids"] == bos_token_id
    if bool((is_bos[:, 1:] & is_bos[:, :-1]).any()):
        raise UserError(
            f"a text begins with BOS (id {bos_token_id}) twice, as chat template and data both "
            "write it; take it out of the data, or out of the template (data.chat_template)"
        )


def check_answers(
    batch: dict[str, Tensor], stop_token_ids: list[int], tokenizer: Any, *, whole: bool = False
) -> None:
    """Refuse masks that train the question, answers that never end, and padding that ends them.

    Args:
        batch: A batch with ``labels``.
        stop_token_ids: Tokens that end an answer.
        tokenizer: The tokenizer.
        whole: The settings ask for all tokens to be trained.

    Raises:
        UserError: For the first that is so.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in stop_token_ids:
        raise UserError(
            f"the padding token is {tokenizer.pad_token!r}, which also ends an answer, so padding "
            "and ends cannot be told apart later; name another special token (data.pad_token), or "
            "a new one together with --model.base.resize_embeddings true"
            if tokenizer.pad_token_id is not None
            else "the tokenizer has no padding token; name one (data.pad_token), e.g. '<|pad|>' "
            "together with --model.base.resize_embeddings true"
        )
    labels, real = batch["labels"], _real(batch)
    targets = (labels != IGNORED) & real
    # The first token of a text is never a target.
    if not whole and int(targets.sum()) >= int(real.sum()) - _texts(batch):
        raise UserError(
            "every token of the first batch is trained on, questions too: the chat template marks "
            "everything as the assistant's; give another (data.chat_template), or say "
            "--data.train_on all if that is meant"
        )
    stops = torch.tensor(stop_token_ids)
    if not bool(torch.isin(labels[targets], stops).any()):
        names = ", ".join(repr(name) for name in tokenizer.convert_ids_to_tokens(stop_token_ids))
        raise UserError(
            f"no answer of the first batch ends with one of {names}, so the model would never "
            "learn to stop; give a chat template that ends the assistant's turns with the EOS "
            "token (data.chat_template)"
        )


def _real(batch: dict[str, Tensor]) -> Tensor:
    """(B, T) bool: which tokens are not padding."""
    if "document_ids" in batch:
        return batch["document_ids"] >= 0
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["labels"], dtype=torch.bool) if mask is None else mask.bool()


def _texts(batch: dict[str, Tensor]) -> int:
    """How many texts a batch holds."""
    documents = batch.get("document_ids")
    if documents is None:
        return int(batch["labels"].shape[0])
    return int((documents.max(dim=1).values + 1).sum())
