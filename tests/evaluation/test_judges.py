"""Judges of every kind: reward models against transformers, functions, and a server of our own."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.errors import UserError
from lit_llm.evaluation.judge_openai import EndpointJudge, read_verdict, shown
from lit_llm.evaluation.judges import Pair, build_judge
from lit_llm.evaluation.results import Answer
from lit_llm.evaluation.win_rate import compare_answers

QUESTION = "which animal jumps"
PAIRS = [
    Pair(QUESTION, "the quick fox", "the dog", [{"role": "user", "content": QUESTION}]),
    Pair("the quick brown", " fox jumps", " dog", None, stopped=(True, False)),
]


def scores(verdicts):
    return [verdict.score for verdict in verdicts]


# ----- functions ----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def by_length(prompt, first, second, factor=1):\n"
        "    difference = factor * (len(first) - len(second))\n"
        "    return 0.5 if difference == 0 else difference > 0\n"
        "def broken(prompt, first, second):\n"
        "    return {'text': 'best', 'high': 2, 'none': None}[first]\n"
        "def length(samples):\n"
        "    return [len(s.response) + 1e-9 * len(s.prompt) for s in samples]\n"
        "def polite(samples, word, weight):\n"
        "    return [weight * s.response.count(word) + (not s.stopped) for s in samples]\n"
        "def known(samples):\n"
        "    return [s.response == s.reference for s in samples]\n"
        "def tokens(samples):\n"
        "    return [len(s.response_ids) for s in samples]\n"
    )
    return path


def test_a_function_of_pairs(file) -> None:
    judge = build_judge(f"{file}:by_length")
    assert (judge.name, judge.sees_order) == ("by_length", True)
    pairs = [Pair("p", "ab", "a"), Pair("p", "a", "ab"), Pair("p", "a", "b")]
    assert scores(judge.judge(pairs)) == [1.0, 0.0, 0.5]
    turned = build_judge(f"{file}:by_length", options={"factor": -1})
    assert scores(turned.judge(pairs)) == [0.0, 1.0, 0.5]
    with pytest.raises(
        UserError, match="^judge .*by_length: .*unexpected keyword argument 'colour'"
    ):
        build_judge(f"{file}:by_length", options={"colour": 1})


@pytest.mark.parametrize(
    ("first", "told"), [("text", "'best'"), ("high", "2"), ("none", "None"), ("x", "KeyError")]
)
def test_a_function_that_gives_no_verdict_is_told_with_the_prompt(file, first, told) -> None:
    judge = build_judge(f"{file}:broken")
    with pytest.raises(UserError, match=f"judge broken: .*{told}.*the prompt is 'why'"):
        judge.judge([Pair("why", first, "b")])


def test_a_reward_function_is_a_judge_without_an_order(file) -> None:
    judge = build_judge(f"{file}:length")
    assert (judge.name, judge.sees_order) == ("length", False)
    pairs = [Pair("p", "ab", "a"), Pair("p", "a", "ab"), Pair("p", "a", "b")]
    assert scores(judge.judge(pairs)) == [1.0, 0.0, 0.5]
    assert judge.judge(pairs)[0].raw == "2, 1"
    assert judge.judge([]) == []
    polite = build_judge(f"{file}:polite", options={"word": "please", "weight": 2})
    assert polite.sees_order is False
    pair = Pair("p", "please", "", stopped=(True, False))
    assert polite.judge([pair])[0].raw == "2, 1"
    with pytest.raises(UserError, match="^judge .*missing .*'weight'; it takes the samples"):
        build_judge(f"{file}:polite", options={"word": "please"})
    known = build_judge(f"{file}:known")
    assert scores(known.judge([Pair("p", "a", "b", reference="b")])) == [0.0]


def test_rules_judge_text_but_no_tokens(file) -> None:
    judge = build_judge("exact_match")
    assert scores(judge.judge([Pair("2 + 2?", "it is 4", "it is 5", reference="4")])) == [1.0]
    words = build_judge("length_window", options={"shortest": 2, "unit": "words"})
    assert scores(words.judge([Pair("p", "one", "one two")])) == [0.0]
    for judge in (
        build_judge("length_window", options={"shortest": 2}),
        build_judge(f"{file}:tokens"),
    ):
        with pytest.raises(UserError, match="without their token ids"):
            judge.judge([Pair("p", "one", "one two")])


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nowhere", "no such folder of a reward model, and no such rule"),
        ("./no/such/folder", "no such folder of a reward model"),
        ("missing.py:judge", "there is no file 'missing.py'"),
        ("{file}:absent", "has no function 'absent'; it has: .*broken"),
        ("no_such_module:judge", "no module 'no_such_module'"),
        ("", "no such folder"),
    ],
)
def test_what_is_no_judge_is_told_in_one_sentence(file, spec, told) -> None:
    with pytest.raises(UserError, match=f"^judge .*{told}") as error:
        build_judge(spec.format(file=file))
    assert "reward function" not in str(error.value).partition(":")[0]


def test_what_belongs_to_one_kind_of_judge_only(file) -> None:
    with pytest.raises(UserError, match="that of an endpoint"):
        build_judge("exact_match", model="gpt")
    with pytest.raises(UserError, match="neither options nor a label"):
        build_judge("http://localhost:1/v1", options={"a": 1})
    with pytest.raises(UserError, match="^judge exact_match: a label belongs to a classifier"):
        build_judge("exact_match", label=1)


# ----- reward models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    tokenizer = train_tokenizer(["which animal jumps over the lazy dog", "the quick brown"], 280)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=96, vocab_size=len(tokenizer), num_labels=1, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8).add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("judge") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


def test_a_reward_model_reads_chats_and_texts_as_it_was_trained(reward_model) -> None:
    folder, model, tokenizer = reward_model
    judge = build_judge(str(folder))
    assert judge.sees_order is False
    turn = "<|im_start|>user\nwhich animal jumps<|im_end|>\n<|im_start|>assistant\n"
    texts = [
        (f"{turn}the quick fox<|im_end|>", f"{turn}the dog<|im_end|>"),
        ("the quick brown fox jumps<|endoftext|>", "the quick brown dog"),
    ]
    for pair, both, verdict in zip(PAIRS, texts, judge.judge(PAIRS), strict=True):
        expected = []
        for text in both:
            with torch.no_grad():
                hidden = model.model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state
            expected.append((model.score.weight @ hidden[0, -1]).item())
        assert abs(expected[0] - expected[1]) > 0.01, pair
        assert [float(part) for part in verdict.raw.split(",")] == pytest.approx(expected, abs=1e-4)
        assert verdict.score == float(expected[0] > expected[1])


def test_a_language_model_is_no_judge(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="^judge .*holds no model that scores texts"):
        build_judge(str(tmp_path))


# ----- an endpoint --------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Speaks chat completions; ``rule`` gives the reply, or a status, for what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule = lambda answers: "[[C]]"
        self.models = ["small"]
        self.requests = []
        self.at_once = self.most_at_once = 0
        self.wait_for = None
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def send(self, status, content):
        data = json.dumps(content).encode() if not isinstance(content, bytes) else content
        kind = "text/html" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        assert self.path == "/v1/models"
        rows = [{"id": name, "object": "model"} for name in self.server.models]
        self.send(200, {"object": "list", "data": rows})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((self.path, body, self.headers.get("Authorization")))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            if server.at_once == server.wait_for:
                threading.Timer(0.1, server.gate.set).start()  # time for one too many to come
        server.gate.wait(10)
        said = body["messages"][-1]["content"]
        answers = [
            said.split(f"<answer {name}>\n")[1].split(f"\n</answer {name}>")[0] for name in "AB"
        ]
        reply = server.rule(answers)
        with server.lock:
            server.at_once -= 1
        if isinstance(reply, bytes):
            self.send(200, reply)
        elif isinstance(reply, int):
            self.send(reply, {"error": {"message": f"status {reply} it is", "type": "t"}})
        else:
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.send(200, {"id": "1", "object": "chat.completion", "created": 1,
                            "model": body["model"], "choices": [choice]})  # fmt: skip


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai", reason="needs pip install 'lit-llm[eval]'")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as own:
        thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield own
        own.shutdown()
        thread.join()


def by_length(answers):
    first, second = map(len, answers)
    return "They are alike. [[C]]" if first == second else f"So:\n[[{'AB'[first < second]}]]"


def wrote(*texts):
    return [Answer("ask", f"i{n}", f"question {n}", text) for n, text in enumerate(texts)]


def test_an_endpoint_judges_by_its_rule(server) -> None:
    server.rule = by_length
    judge = build_judge(server.url)
    assert (judge.name, judge.sees_order) == ("small", True)
    found = compare_answers(wrote("a", "long", "ab", "="), wrote("long", "a", "ba", "="), judge)
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)
    assert (found.position_bias, found.unreadable) == (0, 0)
    assert found.judgements[0].raw == "So:\n[[B]]"
    assert len(server.requests) == 1 + 6  # one to see whether it works
    path, body, key = server.requests[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer none")
    assert (body["model"], body["temperature"]) == ("small", 0)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_an_endpoint_that_takes_the_first_answer_always(server) -> None:
    server.rule = lambda answers: "[[A]]"
    found = compare_answers(wrote("a", "b", "c"), wrote("d", "e", "f"), build_judge(server.url))
    assert (found.ties, found.position_bias) == (3, 1.0)


def test_replies_without_a_mark(server) -> None:
    server.rule = lambda answers: "I would say A" if "x" in answers[0] else by_length(answers)
    found = compare_answers(wrote("ab", "a"), wrote("x", "ba"), build_judge(server.url))
    assert (found.wins, found.ties, found.losses) == (1, 1, 0)
    assert found.unreadable == 1
    assert [one.raw for one in found.judgements if not one.readable] == ["I would say A"]


def test_the_key_and_the_model_are_those_given(server, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.models = ["large", "small"]
    with pytest.raises(UserError, match="name the model that judges; .*: large, small"):
        build_judge(server.url)
    assert build_judge(server.url, model="large").name == "large"
    assert server.requests[0][1]["model"] == "large"
    assert server.requests[0][2] == "Bearer secret"


def test_a_few_requests_go_out_at_once(server) -> None:
    judge = EndpointJudge(server.url, concurrency=3)
    server.gate.clear()
    server.wait_for = 3
    pairs = [Pair("p", "a" * n, "b") for n in range(1, 8)]
    server.rule = by_length
    assert scores(judge.judge(pairs)) == [0.5] + [1.0] * 6  # in order, whoever was ready first
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (401, "refuses the key; put a valid one into OPENAI_API_KEY"),
        (404, "there is no model 'small', or the address is wrong .*status 404 it is"),
        (400, "fails with status 400: .*status 400 it is"),
        (b"<html>Welcome</html>", "no OpenAI-compatible endpoint"),
    ],
)
def test_an_endpoint_that_does_not_work_is_told_before_anything_is_judged(
    server, reply, told
) -> None:
    server.rule = lambda answers: reply
    with pytest.raises(UserError, match=f"^judge {server.url}: .*{told}") as error:
        build_judge(server.url)
    assert "\n" not in str(error.value)


def test_an_endpoint_that_fails_later_ends_it(server) -> None:
    judge = build_judge(server.url)
    server.rule = lambda answers: 400 if answers[0] == "bad" else "[[A]]"
    with pytest.raises(UserError, match="fails with status 400"):
        judge.judge([Pair("p", "a", "b"), Pair("p", "bad", "b"), *[Pair("p", "c", "d")] * 20])


def test_a_busy_endpoint_is_asked_again(server) -> None:
    judge = build_judge(server.url)
    replies = iter([503, "[[B]]"])
    server.rule = lambda answers: next(replies)
    assert scores(judge.judge([Pair("p", "a", "b")])) == [0.0]


def test_no_endpoint_at_all(server) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=f"^judge {url}: it cannot be reached"):
            build_judge(url, model="small")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("[[A]]", 1.0),
        ("good\n[[b]]\n", 0.0),
        ("[[C]].", 0.5),
        ("I first thought [[A]], but [[B]]", 0.0),
        ("[A]", None),
        ("", None),
    ],
)
def test_reading_a_verdict(reply, score) -> None:
    found = read_verdict(reply)
    assert (found.score, found.readable) == (0.5 if score is None else score, score is not None)
    assert found.raw == reply


def test_what_the_judge_reads() -> None:
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chat += [{"role": "user", "content": "{three}"}]
    told = shown(Pair("{three}", "f{0}irst", "[[B]]", chat, "the reference"))
    for part in ("user: one\n\nassistant: two\n\nuser: {three}", "f{0}irst", "[[B]]"):
        assert part in told
    assert "<a correct answer>\nthe reference\n" in told
    assert "correct" not in shown(Pair("p", "a", "b", chat[:1]))
    assert "Continue this text:\np" in shown(Pair("p", "a", "b"))
    assert "Continue" not in shown(Pair("one", "a", "b", chat[:1]))
