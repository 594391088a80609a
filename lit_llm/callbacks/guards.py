"""What makes a run worthless, found before its first step and said in one sentence."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_llm.data.packing import IGNORED
from lit_llm.errors import UserError


class Guards(Callback):
    """Refuse to train where nothing, or the wrong thing, would be learned.

    Every stage has them: no trainable parameter, no target in the first batch, BOS twice at the
    beginning of a text, a learning rate of 0 after the warm-up. Where answers are trained: a mask
    that marks everything, answers without an end, padding that is also an end. Prompts have no
    targets yet: there only BOS and padding are looked at.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check optimizer, schedule and the first batch.

        Raises:
            UserError: For the first thing that is wrong.
        """
        mistake = None
        try:
            self._check(trainer)
        except UserError as error:
            mistake = str(error)
        if trainer.world_size > 1:  # a batch may be wrong on one rank only; all have to end
            mistakes: list[str | None] = [None] * trainer.world_size
            dist.all_gather_object(mistakes, mistake)
            mistake = next((found for found in mistakes if found is not None), None)
        if mistake is not None:
            raise UserError(mistake)

    def _check(self, trainer: Trainer) -> None:
        check_learning_rate(trainer)
        datamodule: Any = getattr(trainer, "datamodule", None)
        if hasattr(datamodule, "first_batch"):
            check_data(datamodule)


def check_data(datamodule: Any) -> None:
    """Check the first batch and the tokenizer.

    Args:
        datamodule: A ``SampleDataModule``.

    Raises:
        UserError: For the first thing that is wrong.
    """
    batch = datamodule.first_batch()
    tokenizer = datamodule.tokenizer
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    has_targets = "labels" in batch  # prompts have none before they are answered
    if has_targets:
        check_targets(batch)
    check_beginnings(batch, tokenizer.bos_token_id, ends)
    stops = getattr(datamodule, "stop_token_ids", None)
    if stops is None:
        return
    check_padding(tokenizer, stops)
    if not has_targets:
        return
    if "pairs" in batch:
        check_pairs(batch)
        return
    masked = torch.isin(batch["source"], torch.tensor(datamodule.masked_sources))
    if bool(masked.any()):
        rows = {name: value[masked] for name, value in batch.items() if value.ndim}
        check_answers(rows, stops, tokenizer)


def check_pairs(batch: dict[str, Tensor]) -> None:
    """Refuse a batch in which no answer differs from the one it is better than.

    Raises:
        UserError: The two sequences of every pair are the same.
    """
    better, worse = (batch["input_ids"][rows] for rows in batch["pairs"].unbind(1))
    if bool((better == worse).all()):
        raise UserError(
            "the two answers of every pair of the first batch are the same; look at it with "
            "--inspect: is one column given twice, or does the chat template leave out the answer?"
        )


def check_learning_rate(trainer: Any) -> None:
    """Refuse a run in which no parameter moves for most of the time.

    Args:
        trainer: With its optimizers and schedulers.

    Raises:
        UserError: No parameter is trained, a schedule counts epochs, or the learning rate is 0 in
            more than half of the steps.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    # Of the module: what an optimizer of DeepSpeed holds are flat parts that tell nothing.
    if not any(parameter.requires_grad for parameter in trainer.lightning_module.parameters()):
        raise UserError("the model has no trainable parameter; unfreeze some, or add an adapter")
    # A scheduler scales the rate that the optimizer was built with.
    rate = max(group.get("initial_lr", group["lr"]) for group in groups)
    if rate == 0:
        raise UserError("the learning rate is 0; give one above 0 (model.optimizer.init_args.lr)")
    for config in trainer.lr_scheduler_configs:
        if config.interval != "step":
            raise UserError(
                f"the learning rate moves once an {config.interval}, so a schedule of steps would "
                'stay at its first value; return {"scheduler": ..., "interval": "step"} from '
                "configure_optimizers"
            )
        factors = getattr(config.scheduler, "lr_lambdas", None)
        total = trainer.lightning_module.total_steps()
        if factors and total:
            looked_at = range(0, total, max(1, total // 1000))
            still = sum(factors[0](step) == 0 for step in looked_at) / len(looked_at)
            if still > 0.5:
                raise UserError(
                    f"the learning rate is 0 in {still:.0%} of {total} steps, after the warm-up; "
                    "give model.schedule a longer decay or a min_factor above 0"
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


def check_padding(tokenizer: Any, stop_token_ids: list[int]) -> None:
    """Refuse padding that is also an end.

    Args:
        tokenizer: The tokenizer.
        stop_token_ids: Tokens that end an answer.

    Raises:
        UserError: There is no padding token, or it ends an answer.
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


def check_answers(batch: dict[str, Tensor], stop_token_ids: list[int], tokenizer: Any) -> None:
    """Refuse masks that train the question, and answers that never end.

    Args:
        batch: Rows with ``labels``, of sources where only the answers should be targets.
        stop_token_ids: Tokens that end an answer.
        tokenizer: The tokenizer.

    Raises:
        UserError: For the first that is so.
    """
    labels, real = batch["labels"], _real(batch)
    targets = (labels != IGNORED) & real
    # The first token of a text is never a target.
    if int(targets.sum()) >= int(real.sum()) - _texts(batch):
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
