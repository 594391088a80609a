"""Write a plain Hugging Face folder: of a checkpoint, a GGUF file, or a model and its adapter.

    python recipes/export.py runs/pretrain/checkpoints/step=00000600.ckpt --output_dir out
    python recipes/export.py --model SmolLM2-135M-Instruct.Q4_1.gguf --output_dir models/smollm2
    python recipes/export.py --model models/smollm2 --adapter runs/sft/adapter --output_dir out
    python recipes/export.py --model HuggingFaceTB/SmolLM2-135M --dtype bfloat16 --output_dir out

The folder is read back and compared before it takes its place.
"""

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from lit_llm.console import recipe
from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.data.tokenizer import load_tokenizer
from lit_llm.errors import UserError
from lit_llm.models import (
    BaseModelConfig,
    adapter_heads,
    build_model,
    check_adapter_folder,
    check_export_folder,
    export_model,
    merge_adapter,
    pretrained_heads,
    vocabulary_of,
)
from lit_llm.modules.stages import is_checkpoint, load_stage


def run(
    model: str,
    output_dir: str,
    adapter: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tokenizer: str | None = None,
) -> None:
    """Write a plain Hugging Face folder: of a checkpoint, a GGUF file, or a model and its adapter.

    Args:
        model: A checkpoint of any stage and strategy, or a run's folder, whose newest is taken; a
            folder, a name on the Hugging Face Hub, or a ``.gguf`` file. A reward model stays one.
        output_dir: Folder for config, weights, tokenizer and chat template.
        adapter: Folder with a peft adapter of the model, to be merged into its weights. Its
            tokenizer is used where it has one.
        dtype: Data type of the weights.
        tokenizer: Tokenizer to put beside them; by default the one that the model comes with, or
            that the checkpoint was trained with.
    """
    check_export_folder(output_dir)
    if is_checkpoint(model):
        if adapter is not None:
            raise UserError("a checkpoint has its adapters in it; leave out --adapter")
        module, own = load_stage(model, tokenizer)
        network = module.exported(module.model).to(getattr(torch, dtype))
        _write(network, own, output_dir)
        return
    own_tokenizer = False
    if adapter is not None:
        own_tokenizer = (check_adapter_folder(adapter) / "tokenizer_config.json").is_file()
    base = BaseModelConfig(pretrained=model, dtype=dtype, resize_embeddings=own_tokenizer)
    heads = pretrained_heads(base)
    if heads is None and adapter is not None:
        heads = adapter_heads(adapter)
    # A reward model needs a padding token, as it was trained with.
    load = load_tokenizer if heads is None else load_chat_tokenizer
    words = load(tokenizer or (str(adapter) if own_tokenizer else model))
    network = build_model(base, heads=heads, **vocabulary_of(words))
    if adapter is not None:
        network = merge_adapter(network, adapter)
    _write(network, words, output_dir)


def _write(network: Any, tokenizer: Any, output_dir: str) -> None:
    folder = export_model(network, tokenizer, output_dir)
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    print(f"{network.num_parameters():,} parameters, {size / 1e6:,.1f} MB, exported to {folder}")


@recipe
def main(args: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    parser.add_function_arguments(run)
    given = sys.argv[1:] if args is None else args
    named = ["--model"] if given and not given[0].startswith("-") else []
    options = parser.parse_args([*named, *given]).as_dict()
    options.pop("config", None)
    run(**options)


if __name__ == "__main__":
    main()
