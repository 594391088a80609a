"""Every held-out pair of a preference data set and how it was judged, over batches and ranks.

Shapes: N answers, P pairs.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_llm.data.packing import IGNORED
from lit_llm.evaluation.preference_measures import ScoredPairs

_COLUMNS = (
    "better",
    "worse",
    "better_length",
    "worse_length",
    "source",
    "row",
    "index",
    "group",
    "margin",
)
_SIDES = ("better", "worse")
_WHOLE = ("better_length", "worse_length", "source", "row", "index", "group")


class PairMetrics(Metric):
    """Collects pairs; the same pairs in the same order whatever the batches and ranks.

    What fills up the last batches of some ranks has weight 0 and is left out.
    """

    full_state_update = False
    rows: list[Tensor]
    loss: Tensor
    prompts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("loss", default=torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("prompts", default=torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")
        self._details: list[str] = []
        self._heads_agree = False

    def update(
        self,
        loss: Tensor,
        values: Tensor,
        details: dict[str, Tensor],
        batch: dict[str, Tensor],
        agreement: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            loss: Weighted sum over its pairs, 0-dim.
            values: What the answers are compared by, (N,).
            details: More values of each answer, (N,).
            batch: What ``PreferenceCollator`` made.
            agreement: Share of the heads that prefer the better answer, (P,).
        """
        better, worse = batch["pairs"].unbind(1)
        lengths = (batch["labels"] != IGNORED).sum(1)
        self._details = list(details)
        columns = [
            values[better],
            values[worse],
            lengths[better],
            lengths[worse],
            batch["pair_source"],
            batch["pair_row"],
            batch["pair_index"],
            batch["pair_group"],
            batch["margins"],
        ]
        columns += [part for value in details.values() for part in (value[better], value[worse])]
        self._heads_agree = agreement is not None
        columns.append(batch["pair_weights"] if agreement is None else agreement)
        columns.append(batch["pair_weights"])
        self.rows.append(torch.stack([column.double() for column in columns], dim=1))
        self.loss += loss.detach().double()
        self.prompts += batch["pair_weights"].double().sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the columns of all pairs in order, and the mean ``loss`` of a prompt."""
        rows = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows)
        rows = rows[rows[:, -1] > 0].cpu()  # what fills up batches weighs nothing
        # By source, row and index: a stable sort by each, the most important one last.
        for column in ("index", "row", "source"):
            rows = rows[rows[:, _COLUMNS.index(column)].argsort(stable=True)]
        names = [*_COLUMNS, *(f"{name}/{side}" for name in self._details for side in _SIDES)]
        columns = dict(zip([*names, "agreement"], rows.unbind(1), strict=False))
        return columns | {"loss": self.loss / self.prompts}

    def judged(self) -> tuple[dict[str, float], ScoredPairs | None]:
        """Return means (of the loss over prompts, of all else over pairs) and the pairs.

        There are no means and no pairs when none were added.
        """
        if not self.update_called:
            return {}, None
        # All ranks have to come here, also one that had nothing but what fills up its batches.
        found = self.compute()
        # torchmetrics takes single pairs for scalars.
        columns = {name: column.reshape(-1) for name, column in found.items()}
        if not len(columns["better"]):
            return {}, None
        pairs = ScoredPairs(
            **{
                name: columns[name].long() if name in _WHOLE else columns[name].float()
                for name in _COLUMNS
            },
            agreement=columns["agreement"].float() if self._heads_agree else None,
        )
        means = {
            "loss": columns["loss"],
            "accuracy": pairs.correct,
            "margin": columns["better"] - columns["worse"],
        }
        for name in ("values", *self._details):
            for side in _SIDES:
                means[f"{name}/{side}"] = columns[side if name == "values" else f"{name}/{side}"]
        return {name: float(column.mean()) for name, column in means.items()}, pairs
