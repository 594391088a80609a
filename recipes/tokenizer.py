"""Train a byte-level BPE tokenizer on the sources that a model will be trained on.

    python recipes/tokenizer.py
    python recipes/tokenizer.py --config recipes/configs/tokenizer.yaml --vocab_size 8192
    python recipes/tokenizer.py --sources "texts/*.jsonl.gz" --output_dir runs/my-tokenizer

Held-out documents (validation, test) are left out, and bytes per token are measured on validation.
"""

from jsonargparse import ArgumentParser

from lit_llm.console import recipe
from lit_llm.data.cleaning import Cleaning
from lit_llm.data.deduplication import Deduplication
from lit_llm.data.sources import Source, as_sources
from lit_llm.data.splits import split_corpus
from lit_llm.data.tokenizer import bytes_per_token, save_tokenizer, train_tokenizer

CLEANING, DEDUPLICATION = Cleaning(), Deduplication()


def run(
    sources: str | list[str | Source] = "python-docs",
    vocab_size: int = 4096,
    output_dir: str = "runs/tokenizer",
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    cleaning: Cleaning = CLEANING,
    deduplication: Deduplication = DEDUPLICATION,
) -> None:
    """Train a byte-level BPE tokenizer on the sources that a model will be trained on.

    Args:
        sources: Where the text comes from: ``python-docs``, files, folders, globs or Hub names, or
            a list.
        vocab_size: Number of tokens, special tokens included.
        output_dir: Folder for the tokenizer.
        val_fraction: Share of documents held out for validation; use the data module's.
        test_fraction: Share of documents held out for the test; use the data module's.
        cleaning: How documents are cleaned.
        deduplication: Which documents count as the same.
    """
    corpus = split_corpus(
        as_sources(sources),
        cleaning,
        deduplication,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )
    print(f"{corpus.cleaning}\n{corpus.deduplication}", flush=True)

    tokenizer = train_tokenizer(corpus.texts("train"), vocab_size)
    folder = save_tokenizer(tokenizer, output_dir)
    print(f"{len(tokenizer):,} tokens (asked for {vocab_size:,}) saved to {folder}")
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    print("special tokens: " + ", ".join(f"{token} = {index}" for token, index in special))
    if held_out := corpus.texts("validation"):
        compression = bytes_per_token(tokenizer, held_out)
        print(f"bytes per token on held-out text (validation): {compression:.3f}")
    else:
        print("no document fell into validation: bytes per token are not measured")


@recipe
def main(args: list[str] | None = None) -> None:
    """Parse the command line and run."""
    # Not auto_cli: it would take a file given as --sources for a list of sources.
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    parser.add_function_arguments(run)
    options = parser.instantiate(parser.parse_args(args)).as_dict()
    options.pop("config", None)
    run(**options)


if __name__ == "__main__":
    main()
