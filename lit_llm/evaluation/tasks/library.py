"""The lm-evaluation-harness itself: found, quiet, and undisturbed by the script that runs it."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch.distributed as dist

from lit_llm.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_PATIENCE = 5.0  # seconds for the Hub to answer


def require_lm_eval() -> None:
    """See that the harness is installed.

    Raises:
        UserError: It is not.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "benchmark tasks need the lm-evaluation-harness: pip install 'lit-llm[eval]'"
        )


@functools.cache
def library_tasks() -> TaskManager:
    """The tasks that come with the harness; to look through them takes some ten seconds.

    Raises:
        UserError: The harness is not installed.
    """
    require_lm_eval()
    with undisturbed():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def read_file(path: Path, data_dir: str | None) -> dict[str, Task]:
    """The task of a YAML file, and told where its data are; no other file is looked at."""
    from lm_eval.tasks import TaskManager

    metadata = {} if data_dir is None else {"data_dir": data_dir}
    manager = TaskManager(include_defaults=False, metadata=metadata)
    return dict(manager.load([str(path)])["tasks"])


@functools.cache
def hub_answers() -> bool:
    """Whether the Hugging Face Hub can be reached, asked once; all ranks have to ask together.

    They take the answer of the first, as all of them run a task or none.
    """
    answer = [_hub_answers()]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(answer)
    return answer[0]


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    # Every transport has errors of its own; none of them means that the Hub can be reached.
    except Exception:
        return False
    return True


@contextlib.contextmanager
def offline_where_it_is() -> Iterator[None]:
    """Without the Hub, look into its cache at once instead of after half a minute of retries."""
    if hub_answers():
        yield
        return
    import datasets
    from huggingface_hub import constants

    with (
        mock.patch.object(constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
    ):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the harness from talking, from drawing, and from importing the running script's folder.

    It draws from Python's generator each time that a task is asked for its name. Some of the
    library's tasks ``import evaluate``, which would be a script of that name.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    folder = None if script is None else Path(script).resolve().parent
    own = sys.modules.get("evaluate")
    if not hasattr(own, "main"):  # Hugging Face's, which a task may use
        own = None
    else:
        del sys.modules["evaluate"]
    logger, paths = logging.getLogger("lm_eval"), list(sys.path)
    level, drawn, numpy_drawn = logger.level, random.getstate(), np.random.get_state()
    # It warns of what our tasks do on purpose, such as to read their files themselves.
    logger.setLevel(logging.ERROR)
    sys.path[:] = [path for path in paths if Path(path or ".").resolve() != folder]
    try:
        with _without_bars():
            yield
    finally:
        if own is not None:
            sys.modules["evaluate"] = own
        logger.setLevel(level)
        sys.path[:] = paths
        random.setstate(drawn)
        np.random.set_state(numpy_drawn)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars; and each template compiled once instead of once an example."""
    if find_spec("lm_eval") is None:
        yield
        return
    import lm_eval.api.task as task
    from lm_eval.utils import env

    with (
        mock.patch.object(task, "tqdm", functools.partial(task.tqdm, disable=True)),
        mock.patch.object(env, "from_string", functools.cache(env.from_string)),
    ):
        yield
