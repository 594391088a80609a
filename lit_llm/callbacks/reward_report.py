"""The acceptance report of a reward model, written at the end of a test."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_llm.data.splits import Split
from lit_llm.errors import UserError
from lit_llm.evaluation.preference_measures import PairMeasures, ScoredPairs, measure_pairs
from lit_llm.evaluation.reward_report import write_reward_report

_SPLIT: Split = "test"  # a second set is only tested: all of it is in this split


class RewardReport(Callback):
    """Say at the end of a test whether the scores are fit to drive PPO, and why.

    Prints the verdict and writes ``reward_report.md``, ``reward_report.png`` and
    ``reward_report.json`` into the run's folder
    (:func:`lit_llm.evaluation.reward_report.write_reward_report`), but not of a model that is not
    trained yet: a run that stops early would leave it as the verdict. What the test returns gains
    in any case the interval of the accuracy, the calibration error and what length explains, as
    ``test/...`` and, for a second set, ``ood/...``.

    The module has ``scored_pairs``, which gives the same pairs on all ranks as soon as the last
    batch is scored: Lightning calls the callbacks' ``on_test_epoch_end`` before the module's.

    Args:
        mistakes: How many of the most confident mistakes to show.
        bins: Bins of confidence between 50 % and 100 %.
    """

    def __init__(self, mistakes: int = 10, bins: int = 10) -> None:
        for name, value, least in (("mistakes", mistakes, 0), ("bins", bins, 1)):
            if value < least:
                raise UserError(f"reward report: {name} must be at least {least}, got {value}")
        self.mistakes = mistakes
        self.bins = bins

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the measures, the same on every rank; print and write the verdict on the first."""
        module: Any = pl_module
        datamodule: Any = getattr(trainer, "datamodule", None)
        scored: dict[str, ScoredPairs] = {
            name: pairs for name, pairs in module.scored_pairs.items() if len(pairs)
        }
        if "test" not in scored or datamodule is None:
            rank_zero_warn("no held-out pairs were scored, so there is no report of the reward")
            return
        lengths, labels = datamodule.train_pair_lengths(), datamodule.source_labels
        measures = {
            name: measure_pairs(pairs, lengths, labels, self.bins) for name, pairs in scored.items()
        }
        for prefix, found in measures.items():
            for name, value in _logged(found).items():
                module.log(f"{prefix}/{name}", value)
        if trainer.is_global_zero and trainer.global_step > 0:
            folder = Path(trainer.default_root_dir)
            verdict = write_reward_report(
                folder,
                scored,
                measures,
                lambda source, row: datamodule.pair_about(source, _SPLIT, row),
                labels,
                getattr(module, "statistics", None),
                int(count) if (count := getattr(module, "reference_answers", 0)) else None,
                self.mistakes,
                _held_out(datamodule),
            )
            failed = [] if verdict.fit else [f"- {reason}" for reason in verdict.reasons]
            rank_zero_info("\n".join([verdict.headline, *failed]))
            rank_zero_info(f"reward report: {folder / 'reward_report.md'}")


def _held_out(datamodule: Any) -> int:
    """Pairs of the test split; the second set comes last among the sources, and is none of it."""
    counts = datamodule.cache.counts
    own = counts[: len(counts) - len(datamodule.ood_sources)]
    return sum(one.splits[_SPLIT]["pairs"] for one in own)


def _logged(found: PairMeasures) -> dict[str, float]:
    """What is logged beside the accuracy, which the module logs itself."""
    return {
        "accuracy_low": found.accuracy.low,
        "accuracy_high": found.accuracy.high,
        "ece": found.calibration.ece,
        "length_judge": found.length.judge_accuracy.value,
        "length_correlation": found.length.spearman,
    }
