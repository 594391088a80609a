"""Any sequence classifier of transformers as a reward: it reads responses and gives one number.

Legend: N samples, T tokens, H outputs of the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_llm.data.chat_template import stop_token_ids, tokenize_completion
from lit_llm.data.preference_formats import Answer, Preference
from lit_llm.data.preference_tokens import tokenize_answer
from lit_llm.data.tokenizer import load_tokenizer
from lit_llm.errors import UserError
from lit_llm.models.buffers import keep_buffer_dtypes
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.pretrained import load_config, one_line
from lit_llm.models.reward import (
    like_lengths,
    load_reward_models,
    standardised,
    statistics_of,
    text_scores,
)
from lit_llm.models.score_head import HEAD, auto_class, is_classifier_config
from lit_llm.rollout.generation import max_positions
from lit_llm.rollout.rewards import RewardSample, checked_scores, sample_error

_PROBE = [
    {"role": "user", "content": "Where's the 2nd one?\n"},
    {"role": "assistant", "content": "Here — naïve, isn't it?  3,141.59"},
]


_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)


class ScoringModel:
    """Scores of one model.

    Causal language models with a head on the last token read the tokens of prompt and response,
    where they share the policy's tokenizer and chat template; their scores do not depend on the
    padding. All others read text through their own tokenizer and transformers' own forward.

    Args:
        name: The reward, for messages.
        folder: A folder, or a name on the Hugging Face Hub.
        label: Which class of a classifier is scored, by its log-probability; a model with one
            output, or a reward model with several heads, needs none.
        tokenizer: The policy's.
        max_length: Most tokens that prompt and response have together; none means not known.
        batch_size: Texts to score at once.
        dtype: Data type of the weights.

    Raises:
        UserError: There is no such model, it scores no texts, cannot be read with, or needs
            another label.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        *,
        label: int | str | None = None,
        tokenizer: Any,
        max_length: int | None = None,
        batch_size: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        config = load_config(BaseModelConfig(pretrained=folder))
        if not is_classifier_config(config):
            found = " or ".join(config.architectures or [config.model_type])
            raise UserError(
                f"reward {name}: {folder!r} holds no model that scores texts, but a {found}."
            )
        self._class = _class_number(name, config, label)
        self._kind = config.problem_type
        own = own_tokenizer(folder)
        with torch.device("meta"):
            shape = auto_class(True).from_config(config)
        self.reads_last_token = isinstance(getattr(shape, HEAD, None), nn.Linear)
        """Whether it is a causal language model with a new head."""
        attention = shape.config._attn_implementation  # what transformers has for it
        self.model: Any = (
            load_reward_models([folder], dtype=dtype, attn_implementation=attention).models[0]
            if self.reads_last_token
            else _loaded(name, folder, config, dtype)
        )
        self._statistics = statistics_of(self.model)
        same = self.reads_last_token and reads_alike(own, tokenizer)
        self._rows = int(config.get_text_config().vocab_size)
        ends = (own.pad_token_id, own.eos_token_id, 0)
        self._unknown = next(token for token in ends if token is not None)
        self.tokenizer = None if same else own
        """What it reads text with; None where it reads the policy's tokens."""
        self._longest = max_positions(self.model)
        if same and self._longest and max_length and max_length > self._longest:
            raise UserError(
                f"reward {name}: the model reads {self._longest} tokens, but prompt and response "
                f"may have {max_length} together; shorten the prompts or the responses."
            )
        if not same:
            limits = [own.model_max_length, self._longest or own.model_max_length]
            self._longest = int(min(limits)) if min(limits) < 2**31 else None
        self._told = False

    def __call__(self, samples: Sequence[RewardSample]) -> Tensor:
        """Score samples.

        Args:
            samples: N samples; a response may be empty.

        Returns:
            (N,) float32 on the CPU, whatever the autocast around.

        Raises:
            UserError: A sample cannot be read, or its score is no finite number.
        """
        if not samples:
            return torch.zeros(0)
        texts = [self._read(sample) for sample in samples]
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            outputs = (
                text_scores(
                    self.model, [text["input_ids"] for text in texts], batch_size=self.batch_size
                )
                if self.reads_last_token
                else self._outputs(texts)
            )
        return checked_scores(self.name, self._one(outputs), samples)

    def _one(self, outputs: Tensor) -> Tensor:
        """(N, H) -> (N,)."""
        if self._class is None:
            return standardised(outputs, self._statistics)
        if self._kind == "multi_label_classification":
            outputs = F.logsigmoid(outputs)
        elif self._kind != "regression":
            outputs = F.log_softmax(outputs, 1)
        return outputs[:, self._class]

    def _outputs(self, texts: list[dict[str, list[int]]]) -> Tensor:
        """(N, H) by transformers' own forward, which is told by a mask what is padding."""
        device = self.model.device
        fill = {"input_ids": getattr(self.tokenizer, "pad_token_id", None) or 0}
        side = getattr(self.tokenizer, "padding_side", "right")
        result = torch.zeros(len(texts), self.model.config.num_labels, dtype=torch.float32)
        for rows in like_lengths([len(text["input_ids"]) for text in texts], self.batch_size):
            inputs = {
                key: nn.utils.rnn.pad_sequence(
                    [torch.tensor(texts[row][key]) for row in rows],
                    batch_first=True,
                    padding_value=fill.get(key, 0),
                    padding_side=side,
                ).to(device)
                for key in texts[rows[0]]
            }
            result[rows] = self.model(**inputs).logits.float().cpu()
        return result

    # ----- samples to tokens --------------------------------------------------------------------

    def _read(self, sample: RewardSample) -> dict[str, list[int]]:
        """Inputs of the model, each (T,) with at least one token."""
        if self.tokenizer is None:
            # A policy with a padding token of its own may sample it.
            ids = [*sample.prompt_ids, *sample.response_ids]
            return {"input_ids": [k if k < self._rows else self._unknown for k in ids]}
        try:
            text = self._encoded(sample)
        except UserError as error:
            sample_error(self.name, str(error).rstrip("."), sample, error)
        if not text["input_ids"]:  # nothing was asked, and nothing answered
            text = {"input_ids": [self._unknown]}
        # Most models read the mask, and some of them must not be without.
        return {"attention_mask": [1] * len(text["input_ids"])} | text

    def _encoded(self, sample: RewardSample) -> dict[str, list[int]]:
        own: Any = self.tokenizer
        templated = sample.messages is not None and bool(own.chat_template)
        if templated or (self.reads_last_token and own.eos_token_id is not None):
            return {"input_ids": self._fitted(_as_trained(own, sample, templated))}
        texts = [sample.prompt + sample.response]
        if sample.messages is not None:
            texts = [sample.prompt, sample.response]
            if own.sep_token is None:  # nothing would stand between the two
                texts = ["\n".join(texts)]
        text = own(*texts, verbose=False)
        if self._longest and len(text["input_ids"]) > self._longest:
            self._tell_cut()
            own.truncation_side = "left"
            text = own(*texts, truncation=True, max_length=self._longest)
        return dict(text)

    def _fitted(self, ids: list[int]) -> list[int]:
        if self._longest and len(ids) > self._longest:
            self._tell_cut()
            return ids[-self._longest :]
        return ids

    def _tell_cut(self) -> None:
        if not self._told:
            rank_zero_warn(
                f"reward {self.name}: its model reads {self._longest} tokens, so longer texts lose "
                "their beginning"
            )
        self._told = True


def _as_trained(tokenizer: Any, sample: RewardSample, templated: bool) -> list[int]:
    """Prompt and response as they are tokenised to train a reward model.

    A response that was cut off is not ended.
    """
    prompt: Answer = sample.prompt
    if templated:
        answer = [{"role": "assistant", "content": sample.response}]
        preference = Preference(
            prompt=list(sample.messages or []),
            answers=(answer,),
            pairs=(),
            margins=None,
            origin="",
            group="",
        )
        chat = tokenize_answer(tokenizer, preference, 0, stop_token_ids(tokenizer))
        if chat is None:
            raise UserError("the chat template of the reward model leaves out the response")
    else:
        chat = tokenize_completion(tokenizer, str(prompt), sample.response)
    ends = set(stop_token_ids(tokenizer))
    ids = chat.input_ids
    return ids if sample.stopped or ids[-1] not in ends else ids[:-1]


def reads_alike(own: Any, policy: Any, *, chats: bool = True) -> bool:
    """Whether two tokenizers give the same tokens for the same texts, and conversations.

    Args:
        own: A tokenizer.
        policy: Another one.
        chats: Compare their chat templates too.
    """
    # Padding is masked, so its token may be another one.
    padding = {own.pad_token, policy.pad_token}
    mine, theirs = (
        {token: index for token, index in one.get_vocab().items() if token not in padding}
        for one in (own, policy)
    )
    if mine != theirs:
        return False
    kinds = (False, True) if chats else (False,)
    return all(_probe(own, chat) == _probe(policy, chat) for chat in kinds)


def _probe(tokenizer: Any, chat: bool) -> list[int]:
    if not chat:
        return tokenizer("".join(m["content"] for m in _PROBE), add_special_tokens=False).input_ids
    if not tokenizer.chat_template:
        return []
    try:
        return tokenizer.apply_chat_template(_PROBE, tokenize=True, return_dict=True)["input_ids"]
    except Exception:  # a template may refuse whatever it likes
        return []


# ----- loading ------------------------------------------------------------------------------------


def own_tokenizer(folder: str) -> Any:
    """The tokenizer in the folder of a classifier, or on the Hub.

    Raises:
        UserError: There is none, or it cannot be loaded.
    """
    try:
        return load_tokenizer(folder)
    except UserError as problem:
        from transformers import AutoTokenizer

        # Those of classifiers often have no EOS. Where there is none at all, transformers makes one
        # up from the model's config.
        path = Path(folder).expanduser()
        if path.is_dir() and not any((path / file).is_file() for file in _VOCABULARIES):
            raise
        try:
            return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else folder)
        except Exception:
            raise problem from None


def _loaded(name: str, folder: str, config: Any, dtype: str) -> Any:
    """A classifier of transformers that is no causal language model, with all its weights."""
    try:
        model, found = auto_class(True).from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
    # Bad files show in whatever the bytes happen to mean.
    except Exception as error:
        raise UserError(
            f"reward {name}: the model in {folder!r} cannot be loaded: {one_line(error)}"
        ) from error
    if lacking := sorted(found["missing_keys"]):
        raise UserError(
            f"reward {name}: the weights in {folder!r} lack {len(lacking)} tensors that "
            f"{type(model).__name__} needs, such as {lacking[0]!r}."
        )
    keep_buffer_dtypes(model)
    return model.eval()


def _class_number(name: str, config: Any, label: int | str | None) -> int | None:
    """Which output is the score; None for the one, or all heads of a reward model of ours."""
    labels: Mapping[int, str] = config.id2label
    if label is None:
        if config.num_labels == 1 or config.problem_type == "regression":
            return None
    elif isinstance(label, int) and 0 <= label < config.num_labels:
        return label
    else:
        numbers = [number for number, own in labels.items() if own.lower() == str(label).lower()]
        if len(numbers) == 1:
            return int(numbers[0])
    known = ", ".join(f"{number} ({own})" for number, own in sorted(labels.items()))
    wanted = "needs a label" if label is None else f"has no label {label!r}"
    raise UserError(f"reward {name}: the classifier {wanted}; its labels are: {known}.")
