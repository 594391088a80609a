"""Collect `python-docs` from the running interpreter and write its card (the text is not stored).

python data/python-docs/prepare.py                       # writes the card.md beside this script
python data/python-docs/prepare.py --path other.md
python data/python-docs/prepare.py --tokenizer runs/tokenizer
"""

from pathlib import Path

from jsonargparse import auto_cli

from lit_llm.console import recipe
from lit_llm.data.card import CorpusCard, SplitCount, write_card
from lit_llm.data.cleaning import Cleaning
from lit_llm.data.deduplication import Deduplication
from lit_llm.data.sources import Source, documents_sha256
from lit_llm.data.splits import split_corpus

DESCRIPTION = """
The documentation that comes with every Python: the docstrings of the standard library's public
modules, classes and functions (one document a module) and the reference topics of `help()` (one
document each), collected from the running interpreter by `lit_llm.data.python_docs`. Technical
prose in English. Licence: the Python Software Foundation License 2, as for the interpreter itself.

This card was written by `data/python-docs/prepare.py` on the interpreter named below. The text
differs between versions and builds of Python, so every run writes a card of its own: compare the
sha256 before comparing losses. The splits are those of the default fractions.
"""


def run(path: str = str(Path(__file__).with_name("card.md")), tokenizer: str | None = None) -> None:
    """Write the card of python-docs.

    Args:
        path: File to write.
        tokenizer: Folder or Hub name of a tokenizer, to count tokens; none leaves them out.
    """
    corpus = split_corpus([Source("python-docs")], Cleaning(), Deduplication())
    splits = {name: SplitCount() for name in ("train", "validation", "test")}
    for name, document in corpus.documents:
        splits[name].add(document.text)
    if tokenizer:
        from lit_llm.data.tokenizer import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        for name, count in splits.items():
            count.tokens = sum(len(loaded(text)["input_ids"]) for text in corpus.texts(name))
    card = CorpusCard(
        name="python-docs",
        description=DESCRIPTION,
        sources=["python-docs"],
        documents=len(corpus.documents),
        bytes=sum(count.bytes for count in splits.values()),
        tokens=sum(count.tokens or 0 for count in splits.values()) if tokenizer else None,
        tokenizer=tokenizer,
        sha256=documents_sha256(document for _, document in corpus.documents),
        splits=splits,
        cleaning=corpus.cleaning,
        deduplication=corpus.deduplication,
    )
    print(f"wrote {write_card(path, card)}")


@recipe
def main(args: list[str] | None = None) -> None:
    """Parse the command line and run."""
    auto_cli(run, args=args, as_positional=False)


if __name__ == "__main__":
    main()
