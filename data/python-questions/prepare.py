"""Collect `python-questions` from the running interpreter and write its card (no text is stored).

python data/python-questions/prepare.py                  # writes the card.md beside this script
python data/python-questions/prepare.py --path other.md
python data/python-questions/prepare.py --tokenizer runs/tokenizer
"""

import json
from collections import Counter
from pathlib import Path

from jsonargparse import auto_cli

from lit_llm.console import recipe
from lit_llm.data.card import CorpusCard, SplitCount, write_card
from lit_llm.data.files import Document
from lit_llm.data.python_questions import ANSWER_FORMATS, collect_conversations
from lit_llm.data.sources import documents_sha256
from lit_llm.data.splits import assign_split

DESCRIPTION = """
Questions and answers about the functions and methods of Python's standard library, made from the
docstrings of the running interpreter by `lit_llm.data.python_questions`; no network and no file is
needed. Fine-tuning reads them as the source `python-docs`. Every kind of question has several
phrasings and one form of answer:

| kind | a question | its answer |
| --- | --- | --- |
| does | What does `calendar.isleap(year)` do? | `` `isleap`: Return True for leap years, ... `` |
| parameters | List the parameters of `calendar.isleap(year)`. | `` - `year` `` |
| signature | How do I call `calendar.isleap`? Return True for ... | `` `isleap(year)` `` |

One conversation in five has two turns. The answer to the second kind can be read off the question,
so it can be right for functions never seen; the others are learnt by heart, or guessed from the
name. Functions described by the same sentence are one group, and a group never falls into two
splits. Licence: the Python Software Foundation License 2, as for the interpreter itself.

Conversations by the kind that is asked last: {kinds}.

This card was written by `data/python-questions/prepare.py` on the interpreter named below; other
versions and builds have other functions. A document is a conversation, its bytes are those of the
messages, its tokens those of the chat template too. The splits are those of the default fractions.
"""


def run(path: str = str(Path(__file__).with_name("card.md")), tokenizer: str | None = None) -> None:
    """Write the card of python-questions.

    Args:
        path: File to write.
        tokenizer: Folder or Hub name of a tokenizer, to count tokens; none leaves them out.
    """
    conversations = collect_conversations()
    kinds = {form: kind for kind, form in ANSWER_FORMATS.items()}
    counts = Counter(kinds[conversation.answer_format or ""] for conversation in conversations)
    splits = {name: SplitCount() for name in ("train", "validation", "test")}
    for conversation in conversations:
        split = splits[assign_split(conversation.group)]
        split.add("".join(message["content"] for message in conversation.messages))
    if tokenizer:
        from lit_llm.data.tokenizer import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        for conversation in conversations:
            encoded = loaded.apply_chat_template(conversation.messages, return_dict=True)
            split = splits[assign_split(conversation.group)]
            split.tokens = (split.tokens or 0) + len(encoded["input_ids"])
    card = CorpusCard(
        name="python-questions",
        description=DESCRIPTION.format(kinds=", ".join(f"{k} {n:,}" for k, n in counts.items())),
        sources=["python-docs"],
        documents=len(conversations),
        bytes=sum(count.bytes for count in splits.values()),
        tokens=sum(count.tokens or 0 for count in splits.values()) if tokenizer else None,
        tokenizer=tokenizer,
        sha256=documents_sha256(
            Document(json.dumps(conversation.messages), conversation.origin)
            for conversation in conversations
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
