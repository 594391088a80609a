"""What can be said of answers without a judge: do they end, are they well formed, which words."""

import re
from collections.abc import Collection, Sequence

from lit_llm.errors import UserError

# Control text of the usual chat formats, where it stands in an answer as text or as tokens.
_CONTROL = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|</?s>|<</?SYS>>|\[/?INST\]|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"
)


def answer_measures(
    answers: Sequence[str],
    references: Sequence[str],
    stopped: Sequence[bool],
    formats: Sequence[str | None],
    special_tokens: Collection[str] = (),
) -> dict[str, float]:
    """Measure answers to held-out questions against the answers in the data.

    - ``stop_rate``: share of answers that stop by themselves, with a stop token. The others were
      cut off at the longest length allowed, which a longer limit would change.
    - ``well_formed_rate``: share of answers that stop by themselves, are more than white space,
      hold no U+FFFD (bytes that are no text) and no control text of a chat (a special token, a
      turn's header), and match their format as a whole where they have one. It says nothing about
      whether an answer is right.
    - ``rouge_l``: mean F-measure of ROUGE-L (Lin 2004, https://aclanthology.org/W04-1013): with L
      the longest common subsequence of words, precision is L / words of the answer, recall L /
      words of the reference, F their harmonic mean; 0 where either has no words. Words are runs of
      letters and digits of any script, in lower case, not stemmed; English scores are those of the
      ``rouge_score`` package. It rewards shared words, not truth: a good answer in other words
      scores low, a copy with a "not" in it high, and a script without spaces counts as few words.

    Args:
        answers: Answers as text, special tokens not removed, the stop token left out.
        references: The answers in the data.
        stopped: Whether each answer ended with a stop token.
        formats: A regular expression that a well-formed answer matches as a whole (``.`` matches
            line feeds too), or ``None``.
        special_tokens: Texts of the tokenizer's special tokens, beside those of the usual formats.

    Returns:
        The three measures, each in [0, 1]; nothing where there are no answers.

    Raises:
        UserError: A format is no regular expression.
    """
    if not answers:
        return {}
    from torchmetrics.functional.text.rouge import rouge_score

    good = [
        ends and _is_well_formed(answer, pattern, special_tokens)
        for answer, ends, pattern in zip(answers, stopped, formats, strict=True)
    ]
    # The function, as the Metric would wait for the other ranks.
    rouge = rouge_score(list(answers), list(references), rouge_keys="rougeL", normalizer=_words)
    return {
        "stop_rate": sum(stopped) / len(answers),
        "well_formed_rate": sum(good) / len(answers),
        "rouge_l": float(rouge["rougeL_fmeasure"]),
    }


def _is_well_formed(answer: str, pattern: str | None, special_tokens: Collection[str]) -> bool:
    if not answer.strip() or "\ufffd" in answer or _CONTROL.search(answer):
        return False
    if any(token in answer for token in special_tokens):
        return False
    try:
        return pattern is None or re.fullmatch(pattern, answer, re.DOTALL) is not None
    except re.error as error:
        raise UserError(
            f"the answer format {pattern!r} is no regular expression ({error}); mend it in the data"
        ) from error


def _words(text: str) -> str:
    """Keep letters and digits; ROUGE's own rule would drop all that is not ASCII."""
    return re.sub(r"[\W_]+", " ", text.lower())
