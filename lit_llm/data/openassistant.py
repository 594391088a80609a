"""OpenAssistant: trees of ranked messages, turned into threads or into preferences.

Köpf et al., 2023, "OpenAssistant Conversations - Democratizing Large Language Model Alignment"
(https://arxiv.org/abs/2304.07327). Two forms are read: one tree a record, and the flat form of the
Hub, one message a record.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lit_llm.data.chat_formats import Conversation
from lit_llm.data.preference_formats import Preference, ranked_pairs
from lit_llm.data.record_formats import Record, json_type, text_of
from lit_llm.errors import UserError

_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass
class _Message:
    text: str
    role: str
    rank: float
    origin: str
    replies: list["_Message"] = field(default_factory=list)


def read_threads(records: Iterable[Record]) -> Iterator[Conversation]:
    """Threads of trees, each from the root to an assistant's message.

    At a prompter's message a thread goes on with the best-ranked answer (rank 0 is the best; one
    without a rank comes last), at an assistant's with every continuation that was answered. An
    answer that stood in an earlier thread gets weight 0, so it is trained on once. Messages that
    were deleted or that failed their review are left out, with all replies to them.

    Args:
        records: Whole trees, or single messages in any order.

    Raises:
        UserError: When a record is neither, or a message has no text or role.
    """
    for root, tree in _roots(records):
        yield from _threads(root, tree)


def read_comparisons(records: Iterable[Record]) -> Iterator[Preference]:
    """Preferences of trees: for each prompter's message the ranked answers to it, best first.

    The conversation so far is the prompt, also where it goes on from an answer that was not the
    best. Answers without a rank are left out, and with them a message that has less than two
    others; of equal ranks none is better. Messages that were deleted or that failed their review
    are left out, with all replies to them.

    Args:
        records: Whole trees, or single messages in any order.

    Raises:
        UserError: When a record is neither, or a message has no text or role.
    """
    for root, tree in _roots(records):
        yield from _comparisons(root, tree)


def _roots(records: Iterable[Record]) -> Iterator[tuple[_Message | None, str]]:
    """The root of each tree and the name of the tree."""
    # A message may come before its parent, so trees of single messages wait for the last record.
    flat: dict[str, dict[str, tuple[str | None, _Message | None]]] = {}
    for data, origin in records:
        tree = text_of(data, "message_tree_id", origin)
        if "prompt" in data:
            yield _tree(data["prompt"], origin), tree
        else:
            parent = text_of(data, "parent_id", origin) if data.get("parent_id") else None
            own = text_of(data, "message_id", origin)
            flat.setdefault(tree, {})[own] = (parent, _message(data, origin))
    for tree, messages in flat.items():
        yield _linked(messages), tree


def _message(data: dict[str, Any], origin: str) -> _Message | None:
    """A message, or None for one that was deleted or failed its review."""
    if data.get("deleted") or data.get("review_result") is False:
        return None
    text, role = text_of(data, "text", origin), text_of(data, "role", origin)
    if role not in _ROLES:
        raise UserError(
            f"{origin}: role {role!r} is unknown; a message is of a prompter or an assistant."
        )
    rank = data.get("rank")
    if rank is None or rank != rank:  # a missing number is NaN where pandas wrote the file
        rank = math.inf
    if not isinstance(rank, int | float):
        raise UserError(f"{origin}: field 'rank' is {json_type(rank)}, not a number.")
    return _Message(text, role, rank, origin)


def _tree(data: Any, origin: str) -> _Message | None:
    if not isinstance(data, dict):
        raise UserError(f"{origin}: a message of the tree is {json_type(data)}, not an object.")
    message = _message(data, origin)
    if message is not None:
        replies = (_tree(reply, origin) for reply in data.get("replies") or [])
        message.replies = [reply for reply in replies if reply is not None]
    return message


def _linked(messages: dict[str, tuple[str | None, _Message | None]]) -> _Message | None:
    root = None
    for parent, message in messages.values():
        if parent is None:
            root = message
        elif message is not None and parent in messages:
            above = messages[parent][1]
            if above is not None:
                above.replies.append(message)
    return root


def _best_answer(message: _Message) -> _Message | None:
    answers = [reply for reply in message.replies if reply.role == "assistant"]
    return min(answers, key=lambda answer: answer.rank, default=None)


def _threads(root: _Message | None, tree: str) -> Iterator[Conversation]:
    if root is None or root.role != "prompter":
        return
    told: set[int] = set()
    waiting = [[root]]
    while waiting:
        thread = waiting.pop()
        answer = _best_answer(thread[-1])
        if answer is None:
            continue
        thread = [*thread, answer]
        answered = [
            [*thread, reply]
            for reply in answer.replies
            if reply.role == "prompter" and _best_answer(reply)
        ]
        waiting += reversed(answered)
        if not answered:
            yield _conversation(thread, told, tree)


def _comparisons(root: _Message | None, tree: str) -> Iterator[Preference]:
    waiting = [[root]] if root is not None and root.role == "prompter" else []
    while waiting:
        thread = waiting.pop()
        answers = [reply for reply in thread[-1].replies if reply.role == "assistant"]
        ranked = sorted(
            (answer for answer in answers if math.isfinite(answer.rank)),
            key=lambda answer: answer.rank,
        )
        if len(ranked) > 1:
            yield Preference(
                prompt=[_turn(message) for message in thread],
                answers=tuple([_turn(answer)] for answer in ranked),
                pairs=ranked_pairs([answer.rank for answer in ranked]),
                margins=None,
                origin=thread[-1].origin,
                group=tree,
            )
        asked = [
            [*thread, answer, reply]
            for answer in answers
            for reply in answer.replies
            if reply.role == "prompter"
        ]
        waiting += reversed(asked)


def _turn(message: _Message) -> dict[str, Any]:
    return {"role": _ROLES[message.role], "content": message.text}


def _conversation(thread: list[_Message], told: set[int], tree: str) -> Conversation:
    messages = []
    for message in thread:
        turn = _turn(message)
        if id(message) in told:
            turn["weight"] = 0
        if message.role == "assistant":
            told.add(id(message))
        messages.append(turn)
    return Conversation(messages, thread[-1].origin, group=tree)
