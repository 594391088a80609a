"""Collect `python-preferences` from the running interpreter and write its card (no text is stored).

python data/python-preferences/prepare.py                  # writes the card.md beside this script
python data/python-preferences/prepare.py --path other.md
"""

import json
from collections import Counter
from pathlib import Path

from jsonargparse import auto_cli

from lit_llm.console import recipe
from lit_llm.data.card import CorpusCard, SplitCount, write_card
from lit_llm.data.files import Document
from lit_llm.data.python_preferences import collect_parameter_preferences, collect_preferences
from lit_llm.data.sources import documents_sha256
from lit_llm.data.splits import assign_split

DESCRIPTION = """
Verifiable comparisons about the functions and methods of Python's standard library, made from the
docstrings of the running interpreter by `lit_llm.data.python_preferences`; no network and no file
is needed. Reward models and DPO read them as the source `python-docs`. The prompt is a question of
`python-questions` (what does a function do?), the better answer the right one; the worse ones have
the same form:

| kind | what is wrong |
| --- | --- |
| other | the description of another function, about as long, in the same split |
| truncated | the right description broken off, or followed by the beginning of a sentence |
| shuffled | the words of the right description in another order |

The longer answer is the better one in about half of the pairs, so length says little. The source
`python-parameters` is a second set, out of distribution: the right list of parameters against that
of another function (other), or with one missing or too many (near). Functions described by the same
sentence are one group, and a group never falls into two splits. Licence: the Python Software
Foundation License 2, as for the interpreter itself.

Pairs of `python-docs`: {docs}. Pairs of `python-parameters`: {parameters}.

This card was written by `data/python-preferences/prepare.py` on the interpreter named below; other
versions and builds have other functions. It counts `python-docs`: a document is a prompt with all
its answers, its bytes are those of their texts. The splits are those of the default fractions.
"""


def run(path: str = str(Path(__file__).with_name("card.md"))) -> None:
    """Write the card of python-preferences.

    Args:
        path: File to write.
    """
    found = collect_preferences()
    kinds = {"docs": found, "parameters": collect_parameter_preferences()}
    counts = {
        name: Counter(kind for preference in some for kind in preference.kinds or ())
        for name, some in kinds.items()
    }
    splits = {name: SplitCount() for name in ("train", "validation", "test")}
    texts = []
    for preference in found:
        turns = [preference.prompt, *preference.answers]
        texts.append(json.dumps(turns))
        split = splits[assign_split(preference.group, val_fraction=0.05, test_fraction=0.1)]
        split.add("".join(str(turn[-1]["content"]) for turn in turns))  # type: ignore[index]
    card = CorpusCard(
        name="python-preferences",
        description=DESCRIPTION.format(
            **{
                name: ", ".join(f"{kind} {n:,}" for kind, n in sorted(own.items()))
                for name, own in counts.items()
            }
        ),
        sources=["python-docs"],
        documents=len(found),
        bytes=sum(count.bytes for count in splits.values()),
        tokens=None,
        tokenizer=None,
        sha256=documents_sha256(
            Document(text, preference.origin) for text, preference in zip(texts, found, strict=True)
        ),
        splits=splits,
    )
    print(f"wrote {write_card(path, card)}")


@recipe
def main(args: list[str] | None = None) -> None:
    """Parse the command line and run."""
    auto_cli(run, args=args, as_positional=False)


if __name__ == "__main__":
    main()
