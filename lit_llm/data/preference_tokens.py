"""A preference as tokens: each answer with its prompt, up to the token that ends the answer.

Each answer is tokenised together with the prompt, since prompt and answer tokenised apart give
other tokens where they meet. So the tokens of the prompt need not be the same for all answers.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_llm.data.chat_template import TokenizedChat, tokenize_chat, tokenize_completion
from lit_llm.data.preference_formats import Answer, Preference
from lit_llm.data.truncation import fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[int, int]


def tokenize_answer(
    tokenizer: "PreTrainedTokenizerBase",
    preference: Preference,
    number: int,
    stop_token_ids: Iterable[int],
) -> TokenizedChat | None:
    """Tokenise the prompt with one of its answers.

    Args:
        tokenizer: Fast; with a chat template where the preference holds messages.
        preference: Prompt and answers.
        number: Which answer.
        stop_token_ids: Tokens that end an answer.

    Returns:
        The tokens up to the one that ends the answer's last turn, with the turns that are the
        answer's own. What the template writes after that token (a line feed, as a rule) is cut, as
        it is from an answer that a model samples. None where the answer has no token.

    Raises:
        UserError: When the template refuses the conversation, or the turns cannot be located.
    """
    answer, prompt = preference.answers[number], preference.prompt
    if isinstance(answer, str):
        chat = tokenize_completion(tokenizer, str(prompt), answer)
    else:
        told = [{**message, "weight": 0} for message in prompt if isinstance(message, dict)]
        own = [{key: m[key] for key in m if key != "weight"} for m in answer]
        chat = tokenize_chat(
            tokenizer, [*told, *own], preference.tools, preference.template_options
        )
    turns = [turn for turn, trained in zip(chat.turns, chat.trained, strict=True) if trained]
    if not turns:
        return None
    start, stop = turns[-1]
    stop = _end(tokenizer, chat.input_ids, start, stop, set(stop_token_ids))
    turns[-1] = (start, stop)
    return TokenizedChat(chat.input_ids[:stop], turns, [True] * len(turns))


def fit_answers(
    chats: Mapping[int, TokenizedChat],
    pairs: Sequence[Pair],
    seq_len: int,
    *,
    bos_token_id: int | None = None,
) -> tuple[dict[int, TokenizedChat], int]:
    """Cut the prompt of all answers on the left by the same number of tokens, so that all fit.

    Args:
        chats: By their numbers the answers, as ``tokenize_answer`` gives them.
        pairs: Numbers of answers that are compared.
        seq_len: Most tokens of a sequence.
        bos_token_id: Kept where the prompt is cut, if the sequence begins with it.

    Returns:
        The answers that are in a pair of two that fit, and how many tokens their prompt lost. An
        answer fits with the token that ends it and one token of its prompt (``truncation.fit``).
    """
    # For fitting, an answer is one turn: cutting between its turns would leave a part of it.
    whole = {
        number: TokenizedChat(chat.input_ids, [(chat.turns[0][0], len(chat.input_ids))], [True])
        for number, chat in chats.items()
    }

    def fitted(number: int, size: int) -> TokenizedChat | None:
        return fit(whole[number], size, bos_token_id=bos_token_id)[0]

    fitting = {number for number in whole if fitted(number, seq_len) is not None}
    while True:
        used = sorted({n for pair in pairs if fitting.issuperset(pair) for n in pair})
        lengths = {number: len(whole[number].input_ids) for number in used}
        cut = max(0, *lengths.values(), seq_len) - seq_len
        found = {number: fitted(number, lengths[number] - cut) for number in used}
        # Where prompt and answer share a token, one prompt is shorter than the others.
        fitting = {number for number, chat in found.items() if chat is not None}
        if len(fitting) == len(used):
            return {n: _moved(chats[n], chat) for n, chat in found.items() if chat}, cut


def _moved(chat: TokenizedChat, fitted: TokenizedChat) -> TokenizedChat:
    """The turns of a chat where they are once its prompt is cut."""
    lost = len(chat.input_ids) - len(fitted.input_ids)
    turns = [(start - lost, stop - lost) for start, stop in chat.turns]
    return TokenizedChat(fitted.input_ids, turns, chat.trained)


def _end(
    tokenizer: "PreTrainedTokenizerBase", ids: list[int], start: int, stop: int, stops: set[int]
) -> int:
    """Where a turn ends, without the white space that a template marks after its last token."""
    last = max((index for index in range(start, stop) if ids[index] in stops), default=None)
    if last is None or str(tokenizer.decode(ids[last + 1 : stop])).strip():
        return stop
    return last + 1


def answer_mask(chat: TokenizedChat) -> list[bool]:
    """Which tokens are the answer's: those of its own turns."""
    mask = [False] * len(chat.input_ids)
    for start, stop in chat.turns:
        mask[start:stop] = [True] * (stop - start)
    return mask


def best_answer(answers: Sequence[Answer], pairs: Iterable[Sequence[int]]) -> str:
    """Text of the answer that most others are worse than, for people.

    Args:
        answers: Texts or messages.
        pairs: Numbers of answers, (better, worse).
    """
    wins = [0] * len(answers)
    for better, worse in pairs:
        wins[better] += 1
        wins[worse] -= 1
    best = answers[wins.index(max(wins))]
    return best if isinstance(best, str) else message_text(best)


def message_text(answer: list[dict[str, Any]]) -> str:
    """What an assistant says in its messages, for people."""
    said = [m.get("content") for m in answer if m.get("role") == "assistant"]
    return "\n\n".join(str(text) for text in said if text)
