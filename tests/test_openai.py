"""OpenAI's protocol over a real socket, beside what the library itself says of the same requests."""

import base64
import json
import math
import threading

import httpx2
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.serving.openai.feed import Feed
from tests import tiny
from tests.running import at_rest, blocked, eventually, hooked
from tests.serving import CITY, CLOCK, TOOLS_TEMPLATE, WEATHER, chunks, client, events

pytestmark = pytest.mark.usefixtures("in_haste")

LOAD = tiny.ONE_BUCKET | dict(max_context=512, max_waiting=8)
DRAW = dict(max_tokens=10, seed=5, temperature=0.8, ignore_eos=True)
ASK = {"model": "tiny", "prompt": "Hello", **DRAW}
DEEP = json.loads("[" * 200 + "]" * 200)
SAY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **DRAW}


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **LOAD) as lm:
        lm.tokenizer.chat_templates["default"] = TOOLS_TEMPLATE
        yield lm


@pytest.fixture(scope="module")
def http(lm):
    with ji.serve({"tiny": lm}, port=0) as server, client(server) as http:
        yield http


@pytest.fixture(autouse=True)
def pages_return(lm):
    yield
    assert eventually(lambda: at_rest(lm)), "something runs on"


def post(http, path, body, status=200):
    response = http.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


# --- completions ---


def test_a_completion_is_what_the_library_says(http, lm):
    whole, output = post(http, "/v1/completions", ASK), lm("Hello", **DRAW)
    assert whole["object"] == "text_completion" and whole["model"] == "tiny" and whole["system_fingerprint"] == "v1"
    assert whole["choices"] == [{"index": 0, "text": output.text, "logprobs": None, "finish_reason": "length"}]
    counts = whole["usage"]
    assert (counts["prompt_tokens"], counts["completion_tokens"], counts["total_tokens"]) == (5, 10, 15)


@pytest.mark.parametrize("prompt", [["Hello", "World"], [10, 11, 12], [[10, 11], [12, 13]]])
def test_prompts_are_texts_or_token_ids_one_or_several(prompt, http, lm):
    many = prompt if isinstance(prompt[0], str | list) else [prompt]
    choices = post(http, "/v1/completions", ASK | {"prompt": prompt, "n": 2})["choices"]
    expected = [sample.text for one in many for sample in lm(one, **DRAW, n=2).samples]
    assert [choice["text"] for choice in choices] == expected
    assert [choice["index"] for choice in choices] == list(range(2 * len(many)))


def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_asks(http, lm):
    choice, = post(http, "/v1/completions", ASK | {"echo": True, "logprobs": 2, "max_tokens": 1})["choices"]
    told, score = choice["logprobs"], lm.score("Hello")[0]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    np.testing.assert_allclose(told["token_logprobs"][1:-1], score.logprobs, rtol=1e-5)
    assert told["tokens"][:5] == list("Hello") and told["text_offset"][:6] == [0, 1, 2, 3, 4, 5]
    assert choice["text"].startswith("Hello")
    assert all(2 <= len(top) <= 3 and token in top for token, top in
               zip(told["tokens"][1:], told["top_logprobs"][1:], strict=True))


def test_echo_of_no_tokens_is_the_prompt(http):
    choice, = post(http, "/v1/completions", ASK | {"echo": True, "max_tokens": 0})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")


@pytest.mark.parametrize("more", [
    {"stop": "q"}, {"stop": ["q", "w1 "]}, {"top_k": 3}, {"min_p": 0.2}, {"top_p": 0.5}, {"logit_bias": {"70": 50}},
    {"presence_penalty": 1.5}, {"frequency_penalty": 1.5}, {"repetition_penalty": 1.3}, {"min_tokens": 9},
    {"stop_token_ids": [70]}, {"allowed_token_ids": [70, 71]}])
def test_each_field_does_what_it_does_in_the_library(more, http, lm):
    names = {"stop_token_ids": "stop_tokens", "allowed_token_ids": "allowed_tokens"}
    own = {names.get(name, name): value for name, value in more.items()}
    own |= {"logit_bias": {70: 50}} if "logit_bias" in own else {}
    choice, = post(http, "/v1/completions", ASK | more)["choices"]
    output = lm("Hello", **DRAW | own)
    assert (choice["text"], choice["finish_reason"]) == (output.text, output.finish_reason)


def test_top_p_of_nothing_is_the_likeliest_and_a_seed_may_be_any_integer(http, lm):
    choice, = post(http, "/v1/completions", ASK | {"top_p": 0, "seed": -3})["choices"]
    assert choice["text"] == lm("Hello", max_tokens=10, ignore_eos=True).text


def test_prompt_logprobs_come_as_vllm_writes_them(http, lm):
    choice, = post(http, "/v1/completions", ASK | {"prompt_logprobs": 1})["choices"]
    told, ids = choice["prompt_logprobs"], lm.tokenizer.encode("Hello")
    assert told[0] is None and len(told) == len(ids)
    for token, entry, logprob in zip(ids[1:], told[1:], lm.score("Hello")[0].logprobs, strict=True):
        assert math.isclose(entry[str(token)]["logprob"], logprob, rel_tol=1e-5)
        assert min(one["rank"] for one in entry.values()) == 1


@pytest.mark.parametrize("structure, right", [
    ({"json": CITY}, lambda text: json.loads(text)["city"] in ("Rome", "Oslo")), ({"regex": "[ab]{3}"}, None),
    ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")), ({"grammar": 'start: "xyz"'}, "xyz".__eq__)])
def test_structured_outputs_follow_their_structure(structure, right, http):
    choice, = post(http, "/v1/completions", ASK | {"structured_outputs": structure, "max_tokens": 60,
                                                   "ignore_eos": False})["choices"]
    assert choice["finish_reason"] == "stop"
    assert right(choice["text"]) if right else set(choice["text"]) <= set("ab") and len(choice["text"]) == 3


# --- streams ---


@pytest.mark.parametrize("prompt, n", [("Hello", 1), (["Hello", [10, 11]], 2)])
def test_the_chunks_of_a_completion_join_to_the_whole(prompt, n, http):
    body = ASK | {"prompt": prompt, "n": n, "logprobs": 1}
    whole = post(http, "/v1/completions", body)
    parts = chunks(http, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": parts[-1]["usage"]["prompt_tokens_details"]}
    assert all(part["usage"] is None and part["id"] == parts[0]["id"] for part in parts[:-1])
    for choice in whole["choices"]:
        own = [one for part in parts for one in part["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        reasons = [one["finish_reason"] for one in own]
        assert reasons[-1] == choice["finish_reason"] and reasons[:-1] == [None] * (len(own) - 1)
        assert [t for one in own for t in one["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert [t for one in own for t in one["logprobs"]["text_offset"]] == choice["logprobs"]["text_offset"]


def test_without_stream_options_no_chunk_speaks_of_usage(http):
    assert all("usage" not in part for part in chunks(http, "/v1/completions", ASK))


def test_a_chat_streams_its_role_first_and_one_finish_reason_a_choice(http):
    body = SAY | {"n": 2, "logprobs": True, "top_logprobs": 1}
    whole, parts = post(http, "/v1/chat/completions", body), chunks(http, "/v1/chat/completions", body)
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        own = [one for part in parts for one in part["choices"] if one["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in one["delta"] for one in own[1:])
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        assert own[-1]["delta"] == {} and own[-1]["finish_reason"] == choice["finish_reason"] == "length"
        assert [one["finish_reason"] for one in own[:-1]] == [None] * (len(own) - 1)
        told = [token for one in own if one["logprobs"] for token in one["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"] and len(told) == 10


def test_an_error_before_the_first_token_has_its_status_and_one_after_it_is_an_event(http, lm):
    steps = []

    def fail(key, after):
        if key.kind == "forward":
            steps.append(key)
            if len(steps) > after:
                raise RuntimeError("the device fell over")

    with hooked(lm, lambda key: fail(key, 0)):
        broken = post(http, "/v1/chat/completions", SAY | {"stream": True}, 500)
    assert broken["error"]["type"] == "server_error"
    steps.clear()
    with (hooked(lm, lambda key: fail(key, 2)),
          http.stream("POST", "/v1/chat/completions", json=SAY | {"stream": True, "max_tokens": 100,
                                                                  "logit_bias": {"70": 100}}) as response):
        assert response.status_code == 200
        *told, last, done = [data for _, data in events(response)]
    assert done == "[DONE]" and told and json.loads(last)["error"]["type"] == "server_error"


# --- chats ---


def test_a_chat_is_rendered_by_the_models_template(http, lm):
    whole = post(http, "/v1/chat/completions", SAY)
    output = lm.chat(SAY["messages"], **DRAW)
    assert whole["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "message": {
        "role": "assistant", "content": output.text, "refusal": None}}]
    assert whole["usage"]["prompt_tokens"] == len(output.prompt_tokens)


def test_parts_are_text_and_a_developer_is_the_system(http):
    def ids(messages, **more):
        return post(http, "/tokenize", {"model": "tiny", "messages": messages, **more})["tokens"]

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ids([{"role": "user", "content": parts}]) == ids([{"role": "user", "content": "a\nb"}])
    assert ids([{"role": "developer", "content": "x"}]) == ids([{"role": "system", "content": "x"}])
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}
    assert ids([called]) != ids([called | {"tool_calls": None, "content": ""}])  # arguments reach it as an object


@pytest.mark.parametrize("shape, right", [
    ({"type": "json_object"}, lambda value: isinstance(value, dict)),
    ({"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
     lambda value: value["city"] in ("Rome", "Oslo"))])
def test_response_format_makes_json(shape, right, http):
    body = SAY | {"response_format": shape, "ignore_eos": False, "max_tokens": 200, "seed": 1,
                  "logit_bias": {"96": 30}}  # a random model would not come to an end of its object by itself
    lm_end = post(http, "/v1/chat/completions", body)["choices"][0]
    assert lm_end["finish_reason"] == "stop" and right(json.loads(lm_end["message"]["content"]))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_asked_for_follows_the_tools_schema(choice, http):
    body = SAY | {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 120,
                  "ignore_eos": False}
    whole = post(http, "/v1/chat/completions", body)["choices"][0]
    call, = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
    assert call["type"] == "function" and call["id"] and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    deltas = [one["delta"] for part in chunks(http, "/v1/chat/completions", body) for one in part["choices"]]
    first, *rest = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert first["function"] == {"name": "weather", "arguments": ""} and first["id"] and first["index"] == 0
    assert "".join(one["function"]["arguments"] for one in rest) == call["function"]["arguments"]
    assert all("id" not in one and "name" not in one["function"] for one in rest)


def test_tools_that_need_not_be_called_leave_the_text_alone(http):
    body = SAY | {"tools": [WEATHER, CLOCK]}
    message = post(http, "/v1/chat/completions", body)["choices"][0]["message"]
    assert message["content"] and "tool_calls" not in message
    parts = chunks(http, "/v1/chat/completions", body)
    assert "".join(one["delta"].get("content", "") for part in parts for one in part["choices"]) == message["content"]


# --- responses, embeddings, tokens, models ---


def test_a_response_is_a_message_and_its_events_build_it(http, lm):
    body = {"model": "tiny", "input": "Hello", "instructions": "Be brief.", "max_output_tokens": 10, "seed": 5}
    whole = post(http, "/v1/responses", body)
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    output = lm.chat(told, temperature=1.0, seed=5, max_tokens=10)
    item, = whole["output"]
    assert item["content"] == [{"type": "output_text", "text": output.text, "annotations": [], "logprobs": []}]
    assert whole["usage"]["output_tokens"] == len(output.tokens)
    cut = output.finish_reason == "length"
    assert whole["status"] == item["status"] == ("incomplete" if cut else "completed")
    with http.stream("POST", "/v1/responses", json=body | {"stream": True}) as response:
        parts = [(name, json.loads(data)) for name, data in events(response)]
    assert [part["sequence_number"] for _, part in parts] == list(range(len(parts)))
    assert all(name == part["type"] for name, part in parts)
    names = [name.removeprefix("response.") for name, _ in parts]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", whole["status"]]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert "".join(part["delta"] for name, part in parts if name.endswith("delta")) == output.text
    assert parts[-1][1]["response"]["output"][0]["content"] == item["content"]


def test_embeddings_are_the_librarys_as_numbers_and_in_base64(http, lm):
    texts, vectors = ["Hello", "a longer text"], lm.embed(["Hello", "a longer text"])
    listed = post(http, "/v1/embeddings", {"model": "tiny", "input": texts})
    np.testing.assert_allclose([one["embedding"] for one in listed["data"]], vectors, rtol=1e-5)
    assert listed["usage"] == {"prompt_tokens": 18, "total_tokens": 18}
    packed = post(http, "/v1/embeddings", {"model": "tiny", "input": texts, "encoding_format": "base64"})
    found = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in packed["data"]]
    np.testing.assert_allclose(found, vectors, rtol=1e-5)
    ids = post(http, "/v1/embeddings", {"model": "tiny", "input": lm.tokenizer.encode("Hello")})
    np.testing.assert_allclose(ids["data"][0]["embedding"], vectors[0], rtol=1e-5)


def test_tokens_go_out_and_come_back(http, lm):
    said = post(http, "/tokenize", {"model": "tiny", "prompt": "Grüße, w1 !", "return_token_strs": True})
    assert said["tokens"] == lm.tokenizer.encode("Grüße, w1 !") and said["count"] == len(said["tokens"])
    assert said["max_model_len"] == 512 and said["token_strs"][0] == "G"
    assert post(http, "/detokenize", {"model": "tiny", "tokens": said["tokens"]}) == {"prompt": "Grüße, w1 !"}


def test_models_are_listed(http):
    listed = http.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["tiny"] and listed["object"] == "list"
    assert http.get("/v1/models/tiny").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 512


# --- what is refused ---

REFUSED = [
    ("completions", {"prompt": 7}, "invalid_value", "prompt"),
    ("completions", {"prompt": []}, "invalid_value", "prompt"),
    ("completions", {"prompt": [1, "a"]}, None, "prompt"),
    ("completions", {"prompt": [9999]}, None, "prompt"),
    ("completions", {"prompt": ""}, None, "prompt"),
    ("completions", {"temperature": 3}, "invalid_value", "temperature"),
    ("completions", {"temperature": "hot"}, "invalid_value", "temperature"),
    ("completions", {"n": 0}, "invalid_value", "n"),
    ("completions", {"suffix": "!"}, "unsupported", "suffix"),
    ("completions", {"best_of": 3}, "unsupported", "best_of"),
    ("completions", {"colour": "red"}, "unknown_parameter", "colour"),
    ("completions", {"logit_bias": {"a": 1}}, None, "logit_bias"),
    ("completions", {"logit_bias": {"9999": 1}}, None, "logit_bias"),
    ("completions", {"stream_options": {}}, None, "stream_options"),
    ("completions", {"stream": True, "prompt_logprobs": 1}, None, "prompt_logprobs"),
    ("completions", {"stream": True, "echo": True, "logprobs": 1}, None, "echo"),
    ("completions", {"structured_outputs": {}}, None, "structured_outputs"),
    ("completions", {"structured_outputs": {"regex": "("}}, None, None),
    ("completions", {"prompt": "x" * 512}, None, "prompt"),
    ("chat/completions", {"messages": []}, "invalid_value", "messages"),
    ("chat/completions", {"messages": [{"content": "x"}]}, None, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "messages"),
    ("chat/completions", {"max_tokens": 1, "max_completion_tokens": 2}, None, "max_tokens"),
    ("chat/completions", {"top_logprobs": 2}, None, "top_logprobs"),
    ("chat/completions", {"tool_choice": "required"}, None, "tool_choice"),
    ("chat/completions", {"tools": [WEATHER, WEATHER]}, None, "tools"),
    ("chat/completions", {"tools": [WEATHER], "response_format": {"type": "json_object"}}, None, "tools"),
    ("chat/completions", {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "no"}}}, None,
     "tool_choice"),
    ("chat/completions", {"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    ("chat/completions", {"functions": []}, "unknown_parameter", "functions"),
    ("embeddings", {"input": "x", "dimensions": 7}, None, "dimensions"),
    ("responses", {"input": [{"type": "reasoning"}]}, None, "input"),
    ("responses", {"input": "x", "previous_response_id": "r"}, "invalid_value", "previous_response_id"),
]


@pytest.mark.parametrize("path, body, code, param", REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_in_openais_words(path, body, code, param, http):
    base = {"completions": ASK, "chat/completions": SAY}.get(path, {"model": "tiny"})
    error = post(http, f"/v1/{path}", base | body, 400)["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert (error["code"], error["param"]) == (code, param)


def test_tools_need_a_template_that_knows_them(http, lm, monkeypatch):
    monkeypatch.setitem(lm.tokenizer.chat_templates, "default", "{% for m in messages %}{{ m.content }}{% endfor %}")
    error = post(http, "/v1/chat/completions", SAY | {"tools": [WEATHER]}, 400)["error"]
    assert error["param"] == "tools"


def test_a_template_for_tools_is_asked_alone_where_there_is_one(http, lm, monkeypatch):
    monkeypatch.setitem(lm.tokenizer.chat_templates, "default", "{{ messages[-1]['content'] + '' }}")  # knows no calls
    monkeypatch.setitem(lm.tokenizer.chat_templates, "tool_use", TOOLS_TEMPLATE)
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}
    body = SAY | {"messages": [*SAY["messages"], called], "tools": [WEATHER]}
    assert post(http, "/v1/chat/completions", body)["choices"]


def test_a_model_that_is_not_there_is_404(http):
    error = post(http, "/v1/completions", ASK | {"model": "gpt-9"}, 404)["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert post(http, "/v1/completions", ASK | {"model": "tiny@canary"}, 404)["error"]["code"] == "model_not_found"
    assert http.get("/v1/models/gpt-9").status_code == 404


def test_a_full_queue_is_429_at_once_and_says_when_to_come_again(http, lm):
    with blocked(lm):
        waiting = [lm.submit([i, i], max_tokens=1) for i in range(2, 2 + LOAD["max_waiting"])]
        response = http.post("/v1/chat/completions", json=SAY | {"stream": True})
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        assert http.post("/v1/embeddings", json={"model": "tiny", "input": "x"}).status_code == 429
        for answer in waiting:
            answer.cancel()


def test_clients_that_hang_up_by_the_hundred_leave_nothing_behind(http, lm):
    long = SAY | {"max_tokens": 240, "stream": True}
    for i in range(100):
        if i % 2:
            with http.stream("POST", "/v1/chat/completions", json=long) as response:
                next(response.iter_raw())
        else:
            with pytest.raises(Exception, match="timed out"):
                http.post("/v1/completions", json=ASK | {"max_tokens": 240, "n": 2}, timeout=0.02)
    assert eventually(lambda: at_rest(lm))
    assert post(http, "/v1/completions", ASK)["choices"]


def test_who_hangs_up_while_a_prompt_is_tokenized_asks_for_nothing_more(http, lm, monkeypatch):
    tokenizing, gone, go, encode = *(threading.Event() for _ in range(3)), lm.tokenizer.encode
    submitted, submit, cancel = [], lm.submit, Feed._cancel

    def slowly(text, **how):
        tokenizing.set()
        assert go.wait(30)
        return encode(text, **how)

    monkeypatch.setattr(lm.tokenizer, "encode", slowly)
    monkeypatch.setattr(lm, "submit", lambda *args, **how: submitted.append(submit(*args, **how)) or submitted[-1])
    monkeypatch.setattr(Feed, "_cancel", lambda feed: (cancel(feed), gone.set()))
    with pytest.raises(httpx2.TimeoutException):
        http.post("/v1/completions", json=ASK | {"prompt": ["Hello", "World"], "max_tokens": 400}, timeout=0.5)
    assert tokenizing.wait(20) and gone.wait(20)
    go.set()
    assert eventually(lambda: submitted and submitted[0].cancelled())
    assert len(submitted) == 1, "the first was on its way, the second is not asked for"


def test_more_prompts_than_may_wait_are_refused_for_good(http):
    post(http, "/v1/completions", ASK | {"prompt": ["Hello"] * 9}, 400)
    post(http, "/v1/embeddings", {"model": "tiny", "input": ["Hello"] * 9}, 400)


@pytest.mark.parametrize("path, body", [
    ("/v1/completions", ASK | {"logit_bias": {"1" * 5000: 1}}),
    ("/v1/completions", ASK | {"structured_outputs": {"choice": [f"{i:05}" for i in range(3000)]}}),
    ("/v1/chat/completions", SAY | {"chat_template_kwargs": {"deep": DEEP}}),
    ("/v1/chat/completions", SAY | {"messages": [{"role": "user", "content": "Hi", "deep": DEEP}]}),
    ("/v1/chat/completions", SAY | {"messages": [{"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "[" * 100_000}}]}]}),
    ("/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": "Hi", "deep": DEEP}]})],
    ids=["a long token", "many choices", "deep variables", "a deep message", "deep arguments", "tokenize"])
def test_what_a_stranger_thinks_of_is_400(path, body, http):
    assert post(http, path, body, 400)["error"]["type"] == "invalid_request_error"


def test_a_template_may_have_a_variable_of_any_name(http):
    assert post(http, "/v1/chat/completions", SAY | {"chat_template_kwargs": {"template": "x"}})["choices"]


def test_fields_that_ask_for_nothing_are_taken(http):
    ask = {"model": "tiny", "input": "Hello", "max_output_tokens": 4, "previous_response_id": None, "tools": [],
           "tool_choice": "auto", "parallel_tool_calls": True}
    assert post(http, "/v1/responses", ask)["status"] == "incomplete"
    post(http, "/v1/responses", ask | {"tools": [WEATHER]}, 400)


def test_the_document_describes_every_operation_and_its_references_resolve(http):
    said = http.get("/openapi.json").json()
    assert said["openapi"].startswith("3.1") and len(said["paths"]) == 8

    def references(value):
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            for one in value.values():
                yield from references(one)
        elif isinstance(value, list):
            for one in value:
                yield from references(one)

    found = set(references(said["paths"])) | set(references(said["components"]))
    assert found and all(ref.rpartition("/")[2] in said["components"]["schemas"] for ref in found)
    from jsonschema import Draft202012Validator

    schemas = {"$defs": said["components"]["schemas"]}
    told = json.loads(json.dumps(schemas).replace("#/components/schemas/", "#/$defs/"))
    for name, body in (("CompletionRequest", ASK), ("ChatRequest", SAY | {"tools": [WEATHER]})):
        Draft202012Validator({"$ref": f"#/$defs/{name}", **told}).validate(body)
    answers = post(http, "/v1/chat/completions", SAY)
    Draft202012Validator({"$ref": "#/$defs/Chat", **told}).validate(answers)
