"""Which checkpoint a run goes on from, and whether its settings still are what they were."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from lit_llm.errors import UserError
from lit_llm.strategies.checkpoint_io import read_checkpoint

# What may differ between a run and its continuation without changing what is trained. A second
# test set yields to the training, while val_sources and val_fraction take samples away from it.
_FREE = re.compile(
    r"^(output_dir|export_dir|resume|config|inspect|logging|checkpoint|samples|throughput|health"
    r"|data\.(num_workers|cache_dir|val_micro_batch_size|ood_sources)"
    r"|data\.(val_prompts|test_prompts|val_batch_size)|model\.judges"
    r"|trainer\.(?!accumulate_grad_batches|gradient_clip|precision|max_steps|max_epochs|limit_train)\w+)(\.|$)"
)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Choose the checkpoint to resume from.

    Args:
        folder: The run's checkpoint folder.
        resume: ``auto`` (the newest in ``folder``, if any), ``never``, or a path.

    Returns:
        The checkpoint, or ``None`` to start anew.

    Raises:
        UserError: The checkpoint is missing or damaged; names the one before it if there is one.
    """
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            read_checkpoint(path)
            return path
        if any((path / name).exists() for name in (".metadata", "meta.pt", "checkpoint")):
            return path  # sharded: its strategy checks it
        inside = find_checkpoint(path, "auto") or find_checkpoint(path / "checkpoints", "auto")
        if inside is None:
            raise UserError(f"the folder {path} (--resume) holds no checkpoint; name a .ckpt file")
        return inside
    found = sorted(folder.glob("step=*.ckpt"))
    if not found:
        return None
    newest = found[-1]
    if newest.is_dir():
        return newest  # sharded: its strategy checks it
    try:
        read_checkpoint(newest)
    except UserError as error:
        whole = _newest_whole(found[:-1])
        offer = (
            f"the one before it is whole: add --resume {whole}"
            if whole
            else "there is no whole one before it: add --resume never to start over"
        )
        raise UserError(f"{error}; {offer}") from error
    return newest


def put_aside_newer(folder: Path, chosen: Path | None) -> None:
    """Move the checkpoints that a run will not go on from out of its way.

    A later ``--resume auto`` would otherwise take up the run that was given up. They are kept in
    ``replaced``, for nothing is deleted without being asked.

    Args:
        folder: The run's checkpoint folder.
        chosen: The checkpoint that is resumed; ``None`` starts over.
    """
    if chosen is not None and chosen.parent.resolve() != folder.resolve():
        return
    for path in folder.glob("step=*.ckpt"):
        if chosen is None or path.name > chosen.name:
            (folder / "replaced").mkdir(exist_ok=True)
            path.replace(folder / "replaced" / path.name)


def _newest_whole(paths: list[Path]) -> Path | None:
    for path in reversed(paths):
        try:
            read_checkpoint(path)
        except UserError:
            continue
        return path
    return None


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings than the run was started with.

    An optimizer state brings its learning rate with it and a data cursor its corpus, so changed
    settings would be ignored in part, without a word.

    Args:
        path: ``config.yaml`` of the interrupted run; absent means nothing to compare.
        settings: The settings now.

    Raises:
        UserError: A setting that matters to training differs, or the batch of a step does.
    """
    if not path.exists():
        return
    try:
        before = flatten(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not readable YAML; remove it or the run's folder") from error
    now = flatten(settings)
    # The same batch in other portions, on other devices, is the same training.
    sizes = _step_size(before), _step_size(now)
    free = _PORTIONS if sizes[0] == sizes[1] is not None else ()
    changed = [
        f"{key}: {before.get(key)} there, {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if not _FREE.match(key) and key not in free and before.get(key) != now.get(key)
    ]
    if not changed and None not in sizes and sizes[0] != sizes[1]:
        changed = [
            f"samples of an optimizer step over all devices: {sizes[0]} there, {sizes[1]} now"
        ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{path.parent} holds a run with other settings "
            f"({'; '.join(changed[:3])}{more}); give another --output_dir, or --resume never to "
            "start over there, or --resume CHECKPOINT to go on with the new settings"
        )


_PORTIONS = ("data.micro_batch_size", "trainer.accumulate_grad_batches")


def _step_size(settings: dict[str, Any]) -> int | None:
    """Samples of an optimizer step over all devices; ``None`` where the settings do not tell."""
    strategy = str(settings.get("trainer.strategy"))
    shared = settings.get("trainer.strategy.init_args.tensor_parallel_size")
    if shared == "auto":  # the devices of a node
        shared = settings.get("trainer.devices")
    copies = shared or (2 if strategy == "tensor_parallel" else 1)
    counts = [settings.get(key) for key in (*_PORTIONS, "trainer.devices")]
    counts.append(settings.get("trainer.num_nodes") or 1)
    if not all(isinstance(count, int) and count > 0 for count in counts):
        return None
    return math.prod(int(count) for count in counts if count is not None) // int(copies)


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted keys."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return result
