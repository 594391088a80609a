"""The one place where configuration becomes objects, and a recipe's steps become a run."""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_llm.arguments import in_one_sentence, listed_sources
from lit_llm.callbacks.checkpoint import StepCheckpoint
from lit_llm.callbacks.exact_resume import ExactResume
from lit_llm.callbacks.graceful_stop import GracefulStop, RunStopped
from lit_llm.callbacks.guards import Guards, check_data
from lit_llm.callbacks.loggers import LoggingConfig, build_loggers, finish_loggers
from lit_llm.callbacks.progress import Progress
from lit_llm.callbacks.samples import SampleContinuations
from lit_llm.callbacks.throughput import Throughput
from lit_llm.errors import UserError
from lit_llm.strategies.checkpoint_io import (
    AtomicCheckpointIO,
    check_writable,
    read_checkpoint,
    write_text,
)
from lit_llm.strategies.gathering import needs_gathering
from lit_llm.strategies.launch import check_launch
from lit_llm.strategies.registry import build_strategy, found_devices, simplest_strategy
from lit_llm.strategies.resume import check_settings, find_checkpoint, put_aside_newer

# What Lightning and its helpers say about themselves, or about a choice made here on purpose.
_NOISE = (
    r".*sync_dist=True.*",  # the values are sums over ranks already
    r".*LeafSpec.*",
    r".*does not have many workers.*",
    r".*was deprecated in v4.49.0.*",
    r".*JsonargparseDeprecationWarning.*",
    r".*GPU available but not used.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*is smaller than the logging interval.*",
    r".*is not supported by the model summary.*",  # the run is in that precision all the same
    r".*across ranks is zero.*",  # splits that the settings leave empty
    r".*module\(s\) in eval mode.*",  # frozen references and rewards
)

# What decides which devices a trainer finds, and Lightning's defaults.
_DEVICES = {"accelerator": "auto", "devices": "auto", "num_nodes": 1}

# What the module must know of the data: the command line takes it from there.
_SHARED = {"tokenizer", "seq_len", "prompt_len", "chat_template", "pad_token"}


class RecipeCLI(LightningCLI):
    """Builds module, data and trainer from YAML and command line, and runs a recipe's steps.

    Args:
        module_class: The stage's LightningModule.
        data_class: The stage's LightningDataModule.
        output_dir: Where the run goes by default.
        config: YAML with the recipe's defaults.
        samples: What shows, at every validation, what the model says.
        callbacks: What else watches the run, by the name of its settings.
        args: Command line arguments; ``None`` takes those of the process.
    """

    def __init__(
        self,
        module_class: type[LightningModule],
        data_class: type[LightningDataModule],
        *,
        output_dir: str,
        config: Path,
        samples: type[Callback] = SampleContinuations,
        callbacks: dict[str, type[Callback]] | None = None,
        args: list[str] | None = None,
    ) -> None:
        for message in _NOISE:
            warnings.filterwarnings("ignore", message="\\s*" + message, module=r"lightning.*")
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
        self._default_output_dir = output_dir
        self._own_callbacks = {"samples": samples, **(callbacks or {})}
        self._module_class, self._data_class = module_class, data_class
        self.results: dict[str, Any] = {}
        super().__init__(
            module_class,
            data_class,
            run=False,
            args=args,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"callbacks": [Progress(), ExactResume(), GracefulStop(), Guards()]},
            parser_kwargs={
                "default_config_files": [str(config)],
                "description": module_class.__doc__.splitlines()[0] if module_class.__doc__ else "",
                "exit_on_error": False,
            },
        )

    # ----- configuration ------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every recipe has beside module, data and trainer."""
        parser.add_argument(
            "--output_dir",
            type=str,
            default=self._default_output_dir,
            help="Folder of the run: checkpoints, metrics, samples, report.",
        )
        parser.add_argument(
            "--export_dir",
            type=str | None,
            default=None,
            help="Write the trained model there as a Hugging Face folder, tokenizer included.",
        )
        parser.add_argument(
            "--resume",
            type=str,
            default="auto",
            help="auto: go on from the newest checkpoint in output_dir; never: start over; "
            "or the path of a checkpoint.",
        )
        parser.add_argument(
            "--inspect",
            action="store_true",
            help="Show the first batch (what is trained, masked, padding) and end.",
        )
        parser.add_class_arguments(LoggingConfig, "logging")
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Throughput, "throughput")
        for name, callback in self._own_callbacks.items():
            parser.add_lightning_class_args(callback, name)
        parser.link_arguments(
            "output_dir", "checkpoint.dirpath", compute_fn=lambda path: f"{path}/checkpoints"
        )
        names = signature(self._data_class).parameters.keys()
        for name in _SHARED & names & signature(self._module_class).parameters.keys():
            parser.link_arguments(f"data.{name}", f"model.{name}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with a path alone for a list of sources: ``--data.sources my.txt``.

        jsonargparse would read a list's items from a file of that name.
        """
        try:
            given = sys.argv[1:] if args is None else args
            has_ood = "ood_sources" in signature(self._data_class).parameters
            self.config = parser.parse_args(listed_sources(given, has_ood=has_ood))
        except ArgumentError as error:
            raise UserError(in_one_sentence(str(error))) from error
        if self.config["data"].get("tokenizer") is None:
            pretrained = self.config["model"]["base"].get("pretrained")
            self.config["data"]["tokenizer"] = self.config["model"]["tokenizer"] = pretrained

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config["output_dir"])

    def before_instantiate_classes(self) -> None:
        """Find out what to resume from, and refuse what cannot work, before anything is built."""
        trainer = self.config["trainer"]
        strategy = trainer.get("strategy")
        if isinstance(strategy, str):
            build_strategy(strategy)
        if trainer.get("reload_dataloaders_every_n_epochs"):
            raise UserError(
                "trainer.reload_dataloaders_every_n_epochs misfires on resume and is not needed: "
                "the loaders reshuffle by themselves; leave it at 0"
            )
        base = self.config["model"]["base"]
        if base.get("pretrained"):  # the first thing that a wrong name should be told of
            from lit_llm.models import BaseModelConfig, resolve_config

            heads = None
            if getattr(self._module_class, "scores_texts", False):
                heads = max(1, self.config["model"]["heads"])  # the module refuses less
            seq_len = self.config["data"].get("seq_len")
            resolve_config(BaseModelConfig(**base), seq_len=seq_len, heads=heads)
        check_writable(self.output_dir)
        if self.config["export_dir"] is not None:
            from lit_llm.models.export import check_export_folder

            check_export_folder(Path(self.config["export_dir"]))
        self.settings = yaml.safe_load(self.parser.dump(self.config, format="yaml"))
        checkpoints = self.output_dir / "checkpoints"
        self.ckpt_path = find_checkpoint(checkpoints, self.config["resume"])
        if self.ckpt_path is not None and self.config["resume"] == "auto":
            check_settings(self.output_dir / "config.yaml", self.settings)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the callbacks and loggers that every recipe has."""
        wandb_id = None
        if self.ckpt_path is not None and self.ckpt_path.is_file():
            wandb_id = read_checkpoint(self.ckpt_path).get("wandb_id")
        config = self.config_init["trainer"]
        kwargs["default_root_dir"] = str(self.output_dir)
        kwargs["use_distributed_sampler"] = False  # data order is the data module's
        if config.get("enable_progress_bar") is False:
            own = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in own if not isinstance(c, Progress)]
        if config.get("logger") in (None, True):
            kwargs["logger"] = build_loggers(self.config_init["logging"], self.output_dir, wandb_id)
        strategy = config.get("strategy")
        if isinstance(strategy, str):
            name = self._simplest_strategy() if strategy == "auto" else strategy
            kwargs["strategy"] = strategy = build_strategy(name)
        if not needs_gathering(strategy):  # those write checkpoints in their own way
            plugins = config.get("plugins") or []
            plugins = plugins if isinstance(plugins, list) else [plugins]
            kwargs["plugins"] = [AtomicCheckpointIO(), *plugins]
        trainer = super().instantiate_trainer(**kwargs)
        check_launch(trainer, self.ckpt_path)
        return trainer

    def _simplest_strategy(self) -> str:
        """What ``auto`` stands for on this machine; said where it is not the only choice."""
        config = self.config_init["trainer"]
        devices, memory = found_devices(*(config.get(key, own) for key, own in _DEVICES.items()))
        if devices < 2 or memory is None:
            return "auto"
        from lit_llm.models.build import count_parameters

        name = simplest_strategy(devices, count_parameters(self.model.base), memory)
        rank_zero_info(f"--trainer.strategy auto: {name} on {devices} devices")
        return name

    def after_instantiate_classes(self) -> None:
        """Build the data where a mistake in it can still be said in one sentence.

        Lightning would do it after it has started the other ranks, which then wait for a process
        that is gone. Under another launcher all ranks come here at once, and a lock lets one work.
        """
        self.datamodule.prepare_data()
        if self.config["inspect"]:
            self._inspect()
        check_data(self.datamodule)  # not only when training starts, minutes later
        if not self.trainer.is_global_zero:
            return
        card = getattr(self.datamodule, "corpus_card", None)
        if card is not None:
            from lit_llm.data.card import write_card

            write_card(self.output_dir / "data.md", card(self.output_dir.name))

    def _inspect(self) -> None:
        from rich.console import Console

        from lit_llm.data.batch_report import batch_report

        if self.trainer.is_global_zero:
            batch = self.datamodule.first_batch()
            Console().print(batch_report(batch, self.datamodule.tokenizer))
        raise SystemExit(0)

    # ----- the steps of a recipe ----------------------------------------------------------------

    def fit(self) -> None:
        """Train, from the start or from the checkpoint that ``--resume`` chose.

        Raises:
            SystemExit: With code 0, after SIGTERM has been answered with a checkpoint; with code 1,
                after the health check has ended the run.
        """
        if self.trainer.is_global_zero:
            put_aside_newer(self.output_dir / "checkpoints", self.ckpt_path)
            write_text(self.output_dir / "config.yaml", yaml.safe_dump(self.settings))
        if self.ckpt_path is not None:
            rank_zero_info(f"Resuming from {self.ckpt_path}")
        try:
            self.trainer.fit(
                self.model,
                datamodule=self.datamodule,
                ckpt_path=self.ckpt_path,
                weights_only=True,
            )
        except RunStopped as stop:
            rank_zero_info(str(stop))
            raise SystemExit(stop.code) from None
        except ValueError as error:
            if "val_check_interval" not in str(error):
                raise
            raise UserError(
                f"trainer.val_check_interval does not fit the data: {' '.join(str(error).split())}"
            ) from error

    def validate(self) -> None:
        """Measure the model on the whole validation split, as it is handed on."""
        self.trainer.validate(
            self.model, datamodule=self.datamodule, verbose=False, weights_only=True
        )

    def test(self, name: str) -> None:
        """Measure the model on the test split and keep the result under ``name``.

        Args:
            name: ``before`` (skipped when a run is resumed) or ``after``.
        """
        kept = _read_json(self.output_dir / "evaluation.json")
        if name == "before" and self.ckpt_path is not None:
            return
        if name == "after" and "before" in kept:
            self.results["before"] = kept["before"]
        measured = self.trainer.test(
            self.model, datamodule=self.datamodule, verbose=False, weights_only=True
        )
        if not measured:
            rank_zero_warn(
                "no test split, so no held-out measures; raise data.test_fraction, or "
                "data.test_prompts where that is 0"
            )
            return
        values = {key.removeprefix("test/"): value for key, value in measured[0].items()}
        self.results[name] = values
        if self.trainer.is_global_zero:
            write_text(self.output_dir / "evaluation.json", json.dumps(self.results, indent=2))

    def export(self) -> None:
        """Write the model as a Hugging Face folder if ``--export_dir`` asks for it.

        Adapters are written as a peft folder in any case, with the tokenizer of their training, and
        merged into the exported model.
        """
        mistake = None
        with self.model.whole(exact=True) as model:  # together, as ranks may have to gather it
            if self.trainer.is_global_zero:
                try:
                    self._export(model)
                except UserError as error:
                    mistake = str(error)
        mistake = self.trainer.strategy.broadcast(mistake)  # the others would wait for it
        if mistake is not None:
            raise UserError(mistake)

    def _export(self, model: Any) -> None:
        from lit_llm.models.adapters import is_adapted, save_adapter

        folder = self.config["export_dir"]
        if is_adapted(model):
            statistics = getattr(self.model, "statistics", None)
            if statistics is not None:  # of a reward model's scores
                from lit_llm.models.reward import write_statistics

                write_statistics(model, statistics)
            adapter = save_adapter(model, self.output_dir / "adapter", self.datamodule.tokenizer)
            print(f"adapter: {adapter}")
        if folder is None:
            return
        from lit_llm.models.export import export_model

        export_model(self.model.exported(model), self.datamodule.tokenizer, Path(folder))
        print(f"exported to {folder}")

    def report(
        self, references: Callable[[Any], dict[str, dict[str, float]]] | None = None
    ) -> None:
        """Write ``report.md`` with curves, settings, versions, data and samples; print a table.

        Args:
            references: Measures what the model is compared with on the data module's held-out text.
        """
        if not self.trainer.is_global_zero:
            return
        finish_loggers(self.trainer.loggers)
        from lit_llm.evaluation.report import results_table, write_report

        if references is not None:
            self.results |= references(self.datamodule)
        rows = self.results
        path = write_report(
            self.output_dir, self.settings, rows, self.datamodule.corpus_report(), self.ckpt_path
        )
        table = f"\n{results_table(rows)}\n" if rows else ""
        print(f"{table}\nreport: {path}")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage().lower()


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
