"""Conversations that are too long: what is left out, so that no answer loses its end.

Legend: T tokens of a conversation.
"""

from typing import Literal

from lit_llm.data.chat_template import TokenizedChat

Outcome = Literal["kept", "turns_cut", "prompt_cut", "dropped"]
TrainOn = Literal["all", "assistant", "last"]


def fit(
    chat: TokenizedChat,
    seq_len: int,
    *,
    bos_token_id: int | None = None,
    last_only: bool = False,
) -> tuple[TokenizedChat | None, Outcome]:
    """Cut a conversation to at most ``seq_len`` tokens.

    Later turns go first: it then ends with the last answer that fits. If not even the first one
    does, the prompt is cut on the left as far as needed for that answer. An answer that does not
    fit whole, with the token that ends it and one token of its prompt, drops the conversation.
    Answers that are not trained on do not count, and go with what is cut.

    Args:
        chat: The conversation.
        seq_len: Most tokens that may be left.
        bos_token_id: Kept where the prompt is cut, if the conversation begins with it.
        last_only: Only the last turn counts, whatever it costs its prompt.

    Returns:
        What is left, None if nothing; and "kept" (no answer and nothing before one is missing),
        "turns_cut", "prompt_cut" or "dropped".
    """
    if len(chat.input_ids) <= seq_len:
        return chat, "kept"
    counted = [turn for turn, trained in zip(chat.turns, chat.trained, strict=True) if trained]
    if last_only:
        counted = chat.turns[-1:]
    fitting = [stop for _, stop in counted if stop <= seq_len]
    if fitting:
        outcome: Outcome = "kept" if len(fitting) == len(counted) else "turns_cut"
        return _between(chat, 0, fitting[-1]), outcome
    if not counted:
        return None, "dropped"
    answer, stop = counted[0]
    bos = int(bos_token_id is not None and chat.input_ids[0] == bos_token_id)
    room = seq_len - (stop - answer) - bos
    # The answer ends past seq_len, so all of this room is within the prompt.
    if room < 1:
        return None, "dropped"
    return _between(chat, answer - room, stop, bos), "prompt_cut"


def train_labels(chat: TokenizedChat, train_on: TrainOn) -> list[int]:
    """Labels of a conversation, aligned with its tokens, -100 where nothing is to be learnt.

    Args:
        chat: The conversation.
        train_on: Every token, the assistant's turns, or its last turn; of the turns only those
            that are trained on.

    Returns:
        T labels.
    """
    if train_on == "all":
        return list(chat.input_ids)
    labels = [-100] * len(chat.input_ids)
    turns = list(zip(chat.turns, chat.trained, strict=True))
    for (start, stop), trained in turns[-1:] if train_on == "last" else turns:
        if trained:
            labels[start:stop] = chat.input_ids[start:stop]
    return labels


def split_text(input_ids: list[int], seq_len: int) -> list[list[int]]:
    """Cut plain text into consecutive pieces of ``seq_len`` tokens, the last one maybe shorter."""
    return [input_ids[start : start + seq_len] for start in range(0, len(input_ids), seq_len)]


def _between(chat: TokenizedChat, start: int, stop: int, bos: int = 0) -> TokenizedChat:
    """The first ``bos`` tokens and those of [start, stop), with the turns that lie whole in it."""
    whole = [
        ((left - start + bos, right - start + bos), trained)
        for (left, right), trained in zip(chat.turns, chat.trained, strict=True)
        if start <= left and right <= stop
    ]
    return TokenizedChat(
        chat.input_ids[:bos] + chat.input_ids[start:stop],
        [turn for turn, _ in whole],
        [trained for _, trained in whole],
    )
