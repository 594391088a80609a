"""Write a plain Hugging Face folder: from a GGUF file, a Hub model, or a model and its adapter.

    python recipes/export.py --model SmolLM2-135M-Instruct.Q4_1.gguf --output_dir models/smollm2
    python recipes/export.py --model models/smollm2 --adapter runs/sft/adapter --output_dir out
    python recipes/export.py --model HuggingFaceTB/SmolLM2-135M --dtype bfloat16 --output_dir out

The folder is read back and compared before it takes its place.
"""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from lit_llm.console import recipe
from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.data.tokenizer import load_tokenizer
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


def run(
    model: str,
    output_dir: str,
    adapter: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a plain Hugging Face folder: from a GGUF file, a Hub model, or a model and its adapter.

    Args:
        model: A folder, a name on the Hugging Face Hub, or a ``.gguf`` file; a reward model stays
            one.
        output_dir: Folder for config, weights, tokenizer and chat template.
        adapter: Folder with a peft adapter of the model, to be merged into its weights. Its
            tokenizer is used where it has one.
        dtype: Data type of the weights.
    """
    check_export_folder(output_dir)
    own_tokenizer = False
    if adapter is not None:
        own_tokenizer = (check_adapter_folder(adapter) / "tokenizer_config.json").is_file()
    base = BaseModelConfig(pretrained=model, dtype=dtype, resize_embeddings=own_tokenizer)
    heads = pretrained_heads(base)
    if heads is None and adapter is not None:
        heads = adapter_heads(adapter)
    # A reward model needs a padding token, as it was trained with.
    load = load_tokenizer if heads is None else load_chat_tokenizer
    tokenizer = load(str(adapter) if own_tokenizer else model)
    network = build_model(base, heads=heads, **vocabulary_of(tokenizer))
    if adapter is not None:
        network = merge_adapter(network, adapter)
    folder = export_model(network, tokenizer, output_dir)
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    print(f"{network.num_parameters():,} parameters, {size / 1e6:,.1f} MB, exported to {folder}")


@recipe
def main(args: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    parser.add_function_arguments(run)
    options = parser.parse_args(args).as_dict()
    options.pop("config", None)
    run(**options)


if __name__ == "__main__":
    main()
