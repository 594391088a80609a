"""Examples of a prompt that belong to its own part of a task, such as the same subject."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler

from lit_llm.errors import UserError


class OwnShots(ContextSampler):
    """Takes the examples that a document carries, in their order.

    The harness has one pool of examples a task, and a task of its own for each of MMLU's subjects.
    Here a task is one file, whose documents carry the examples of their subject under ``shots``.
    """

    def sample(
        self,
        n: int,
        eval_doc: dict[str, Any] | None = None,
        df: Sequence[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Sequence[dict[str, Any]]:
        """The first n examples of a document.

        Args:
            n: How many.
            eval_doc: The document; the harness passes it where examples come from the split that
                is tested, which is what the task says for that reason.
            df: Not used.
            kwargs: Not used.

        Raises:
            UserError: The document has fewer.
        """
        if n == 0:
            return []
        shots = (eval_doc or {}).get("shots") or []
        if n > len(shots):
            raise UserError(
                f"{n} examples are asked for (--num_fewshot), but this task has {len(shots)} "
                "for each of its parts"
            )
        return shots[:n]
