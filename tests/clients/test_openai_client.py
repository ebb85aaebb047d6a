"""OpenAI's own client, unmodified."""

import asyncio
import itertools
import json
import re

import httpx
import numpy as np
import openai
import pydantic
import pytest

from tests import tiny
from tests.clients.conftest import KEY, NAME, QUESTION, ROWS, WAITING, await_that, bearer, loaded

GREEDY = {"model": NAME, "temperature": 0}
CHAT = {**GREEDY, "messages": QUESTION, "max_tokens": 8}
CITIES = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
          "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITIES}}
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
ENDS = ("stop", "length")


def complete(client, prompt, **more):
    return client.completions.create(**GREEDY | {"prompt": prompt, "max_tokens": 4} | more)


def text(client, prompt, **more):
    return complete(client, prompt, **more).choices[0].text


def tokens(served, prompt):
    return served.http.post("/tokenize", json={"model": NAME, "prompt": prompt}).json()["tokens"]


# --- completions ---


def test_a_prompt_is_text_token_ids_or_several_of_either(client, served):
    ids = tokens(served, "One, two,")
    assert text(client, "One, two,") == text(client, ids) == text(client, [ids])
    many = complete(client, ["One, two,", "Red, green,"]).choices
    assert [choice.index for choice in many] == [0, 1] and "three" in many[0].text
    assert many[1].text == text(client, "Red, green,")


def test_echo_and_logprobs_tell_of_the_prompt_and_of_the_answer(client, served):
    choice = complete(client, "The capital of France is", max_tokens=3, logprobs=3, echo=True).choices[0]
    told = choice.logprobs
    assert choice.text.startswith("The capital of France is Paris") and "".join(told.tokens) == choice.text
    assert told.token_logprobs[0] is None and all(value <= 0 for value in told.token_logprobs[1:])
    assert len(told.tokens) == len(tokens(served, "The capital of France is")) + 3
    assert all(len(top) in (3, 4) for top in told.top_logprobs[1:])
    assert [choice.text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True)
            ] == [True] * len(told.tokens)
    likeliest = {max(top, key=top.get) for top in told.top_logprobs[-3:]}
    assert likeliest == set(told.tokens[-3:])  # greedy


def test_n_samples_differ_and_a_seed_repeats_them(client):
    draw = lambda seed: [choice.text for choice in complete(client, "My name is", n=2, seed=seed, temperature=1,
                                                            max_tokens=8).choices]
    first = draw(1)
    assert first[0] != first[1] and draw(1) == first != draw(2)


def test_what_is_not_supported_is_refused_with_the_field_that_asks_for_it(client):
    for field, value in (("suffix", "!"), ("best_of", 3)):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(client, "x", **{field: value})
        assert refused.value.param == field
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, "x", extra_body={"colour": "red"})
    assert (refused.value.param, refused.value.code) == ("colour", "unknown_parameter")


def test_an_answer_stops_where_it_is_told_to(client):
    choice = complete(client, "One, two, three,", stop=[" five"], max_tokens=12).choices[0]
    assert choice.finish_reason == "stop" and "four" in choice.text and "five" not in choice.text
    assert complete(client, "One, two, three,").choices[0].finish_reason == "length"


def test_a_logit_bias_forbids_and_forces_tokens(client, served):
    paris, rome = (tokens(served, f" {city}")[0] for city in ("Paris", "Rome"))
    prompt = "The capital of France is"
    assert text(client, prompt, max_tokens=1) == " Paris"
    assert text(client, prompt, max_tokens=1, logit_bias={str(paris): -100}) != " Paris"
    assert text(client, prompt, max_tokens=3, logit_bias={str(rome): 100}) == " Rome" * 3


def test_vllms_fields_go_in_the_extra_body(client, served):
    ask = lambda **more: complete(client, "The capital of France is", max_tokens=6, temperature=1, seed=3,
                                  extra_body=more).choices[0]
    greedy = text(client, "The capital of France is", max_tokens=6)
    assert ask(top_k=1, priority=-1).text == ask(min_p=1.0).text == greedy
    assert ask(allowed_token_ids=tokens(served, " Rome")).text == " Rome" * 6
    scored = ask(prompt_logprobs=1).prompt_logprobs
    assert scored[0] is None and len(scored) == len(tokens(served, "The capital of France is"))
    assert all(entry.keys() <= {"logprob", "rank", "decoded_token"} for place in scored[1:] for entry in place.values())
    ends = {"logit_bias": {str(tokens(served, "<|im_end|>")[0]): 100}}  # the end is the likeliest from the first on
    ended = lambda **more: complete(client, "x", max_tokens=5, **ends, extra_body=more)
    assert ended().choices[0].finish_reason == "stop" and ended().usage.completion_tokens == 1
    assert ended(ignore_eos=True).usage.completion_tokens == 5
    assert ended(min_tokens=3).usage.completion_tokens == 4


@pytest.mark.parametrize("structure, right", [
    ({"choice": ["France", "Peru"]}, "^(France|Peru)$"), ({"regex": "[0-9]{3}-[a-z]"}, "^[0-9]{3}-[a-z]$"),
    ({"grammar": 'start: "yes" " indeed"?'}, "^yes( indeed)?$"), ({"json": CITIES}, '^{ ?"city": ?"(Paris|Rome)" ?}$')])
def test_structured_outputs_follow_their_structure(client, structure, right):
    choice = complete(client, "Paris is in", max_tokens=24, extra_body={"structured_outputs": structure}).choices[0]
    assert choice.finish_reason == "stop" and re.search(right, choice.text), choice.text


# --- chats ---


def test_a_chat_is_answered_whole_and_in_pieces(client):
    whole = client.chat.completions.create(**CHAT)
    assert "Paris" in whole.choices[0].message.content and whole.usage.prompt_tokens > 5
    parts = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices
                   ) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(part.usage is None for part in parts[:-1])
    assert [part.choices[0].finish_reason for part in parts if part.choices and part.choices[0].finish_reason] == [
        whole.choices[0].finish_reason]


def test_a_stream_closes_with_done(client):
    with client.chat.completions.with_streaming_response.create(**CHAT, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]" and lines.count("data: [DONE]") == 1


def test_the_stream_helper_puts_a_chat_together(client):
    with client.chat.completions.stream(**CHAT, logprobs=True, top_logprobs=2) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion().choices[0]
    assert {"content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert "Paris" in found.message.content
    assert len(found.logprobs.content) == 8 and all(len(one.top_logprobs) == 2 for one in found.logprobs.content)
    whole = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert [one.token for one in whole.content] == [one.token for one in found.logprobs.content]


def test_n_chats_stream_side_by_side(client):
    parts = list(client.chat.completions.create(**CHAT | {"temperature": 1}, n=2, seed=1, stream=True))
    for index in (0, 1):
        reasons = [choice.finish_reason for part in parts for choice in part.choices if choice.index == index]
        assert reasons[-1] in ENDS and set(reasons[:-1]) == {None}


def test_an_answer_is_json_of_any_object_or_of_a_schema(client):
    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=12)
        large: bool

    ask = {**GREEDY, "messages": [{"role": "user", "content": "Describe Paris as JSON."}], "max_tokens": 60}
    found = client.chat.completions.parse(**ask, response_format=City).choices[0]
    assert isinstance(found.message.parsed, City) and found.finish_reason == "stop"
    free = client.chat.completions.create(**ask, response_format={"type": "json_object"}).choices[0]
    assert free.message.content.startswith("{")
    assert free.finish_reason == "length" or isinstance(json.loads(free.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called_is_called_with_arguments_of_its_schema(client, choice):
    ask = {**GREEDY, "messages": ASK_WEATHER, "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False,
           "max_tokens": 60}
    whole = client.chat.completions.create(**ask).choices[0]
    call, = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    with client.chat.completions.stream(**ask) as stream:
        again, = stream.get_final_completion().choices[0].message.tool_calls
    assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)


def test_a_tool_that_may_be_called_leaves_an_answer_and_its_result_goes_back_in(client):
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]}
    messages = [*ASK_WEATHER, called, {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."}]
    found = client.chat.completions.create(**GREEDY, messages=messages, tools=[WEATHER], max_tokens=8).choices[0]
    assert found.finish_reason in ("stop", "length", "tool_calls")
    assert bool(found.message.content) != bool(found.message.tool_calls)
    none = client.chat.completions.create(**GREEDY, messages=messages[:1], tools=[WEATHER], tool_choice="none",
                                          max_tokens=4).choices[0]
    assert none.message.tool_calls is None and none.message.content


# --- responses, embeddings, tokens, models ---


def test_responses_whole_streamed_and_parsed(client):
    ask = {**GREEDY, "input": QUESTION[0]["content"], "max_output_tokens": 16}
    whole = client.responses.create(**ask)
    assert "Paris" in whole.output_text and whole.usage.output_tokens <= 16
    with client.responses.stream(**ask) as stream:
        said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert said == stream.get_final_response().output_text == whole.output_text

    class Answer(pydantic.BaseModel):
        french: bool

    assert isinstance(client.responses.parse(**ask, text_format=Answer).output_parsed, Answer)


def test_an_encoder_embeds_what_is_alike_alike(client, encoder):
    texts = ["A cat sleeps on the sofa.", "The kitten naps on the couch.", "Bond prices fell on Monday."]
    found = client.embeddings.create(model=encoder, input=texts)
    vectors = np.array([one.embedding for one in found.data])
    likeness = vectors @ vectors.T
    assert vectors.shape == (3, 384) and likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]
    listed = client.embeddings.create(model=encoder, input=texts[0], encoding_format="float").data[0].embedding
    np.testing.assert_allclose(listed, vectors[0], atol=1e-4)  # the client asks for base64 by itself
    assert found.usage.prompt_tokens == found.usage.total_tokens > 15
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=encoder, input="x", dimensions=7)
    assert refused.value.param == "dimensions"


def test_tokens_go_out_and_come_back(client, served):
    ids = tokens(served, "Grüße aus Köln!")
    back = served.http.post("/detokenize", json={"model": NAME, "tokens": ids})
    assert back.json() == {"prompt": "Grüße aus Köln!"}
    of_chat = served.http.post("/tokenize", json={"model": NAME, "messages": QUESTION}).json()["tokens"]
    assert client.chat.completions.create(**CHAT | {"max_tokens": 1}).usage.prompt_tokens == len(of_chat)


def test_models_are_listed(client):
    assert NAME in [model.id for model in client.models.list()]
    assert client.models.retrieve(NAME).id == NAME


# --- errors, and many at once ---


def test_errors_are_the_clients_own_kinds(client, served):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**CHAT | {"model": "gpt-9"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**CHAT | {"temperature": 3})
    assert refused.value.param == "temperature" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        complete(client, "x " * 300)  # more than the context
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    wrong = httpx.post(f"{served.url}/v1/completions", content=b"{", headers=bearer(KEY) | {
        "content-type": "application/json"})
    assert wrong.status_code == 400 and wrong.json()["error"]["code"] == "invalid_json"


def test_an_error_after_the_first_token_is_an_event_that_the_client_raises(client, served, tmp_path):
    loaded(served, "doomed", tiny.write(tmp_path / "tiny", tiny.PLAIN), {"max_rows": 1, "max_context": 2048})
    stream = client.completions.create(model="doomed", prompt="x", max_tokens=2000, stream=True,
                                       extra_body={"ignore_eos": True, "allowed_token_ids": [70, 71]})
    assert next(stream).choices[0].text
    gone = served.admin.post("/admin/models/doomed/unload", json={"drain": 0})
    assert gone.status_code == 200, gone.text
    with pytest.raises(openai.APIError) as broken:
        for _ in stream:
            pass
    assert broken.value.code == "model_closed" and broken.value.type == "server_error"
    with pytest.raises(openai.NotFoundError):
        complete(client, "x", model="doomed")


def test_who_finds_the_queue_full_is_told_when_to_come_again(served):
    async def ask(client, i):
        try:
            stream = await client.completions.create(model=NAME, prompt=f"{i}, {i + 1},", max_tokens=4, stream=True)
            return [part async for part in stream][-1].choices[0].finish_reason
        except openai.RateLimitError as error:
            assert error.code == "queue_full" and int(error.response.headers["retry-after"]) >= 1
            return "full"

    async def all_of_them(count, **how):
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, **how) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(count)))

    ends = asyncio.run(all_of_them(2 * WAITING + ROWS, max_retries=0))
    assert "full" in ends and len([end for end in ends if end in ENDS]) >= WAITING
    assert set(asyncio.run(all_of_them(WAITING + ROWS + 2, max_retries=20))) <= set(ENDS)  # they do come again


def test_a_client_that_leaves_takes_its_request_with_it(client, served):
    running = lambda: float(next(line for line in served.http.get("/metrics").text.splitlines() if line.startswith(
        f'jaxinfer_requests_running{{model_name="{NAME}"}}')).split()[-1])
    stream = client.completions.create(model=NAME, prompt="Once", max_tokens=240, stream=True,
                                       extra_body={"ignore_eos": True})
    list(itertools.islice(stream, 2))
    assert running() == 1
    stream.close()
    assert await_that(lambda: running() == 0, 5)
