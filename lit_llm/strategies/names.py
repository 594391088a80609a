"""Names of parameters as a single process has them, whatever wraps the modules."""

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP, activation checkpointing and the compiler put into it.

    Args:
        name: As in ``named_parameters()`` of a wrapped module.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
