"""OpenAI's own client, unmodified."""

import asyncio
import json

import openai
import pytest

from tests.clients.conftest import KEY, NAME

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def test_a_chat_is_answered_whole_and_in_pieces(client):
    whole = client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0, max_tokens=16)
    assert "Paris" in whole.choices[0].message.content and whole.usage.prompt_tokens > 5
    parts = list(client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0, max_tokens=16,
                                                stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [p.choices[0].finish_reason for p in parts if p.choices and p.choices[0].finish_reason] == [
        whole.choices[0].finish_reason]


def test_the_stream_helper_puts_a_chat_together(client):
    with client.chat.completions.stream(model=NAME, messages=QUESTION, temperature=0, max_tokens=16) as stream:
        assert any(event.type == "content.delta" for event in stream)
        assert "Paris" in stream.get_final_completion().choices[0].message.content


def test_completions_logprobs_and_extra_fields(client):
    found = client.completions.create(model=NAME, prompt="The capital of France is", temperature=0, max_tokens=3,
                                      logprobs=3, echo=True, extra_body={"top_k": 1, "priority": -1})
    choice = found.choices[0]
    assert choice.text.startswith("The capital of France is Paris")
    assert choice.logprobs.token_logprobs[0] is None and len(choice.logprobs.top_logprobs[1]) >= 3
    chosen = client.completions.create(model=NAME, prompt="Paris is in", max_tokens=8,
                                       extra_body={"structured_outputs": {"choice": ["France", "Peru"]}})
    assert chosen.choices[0].text in ("France", "Peru")


def test_parse_gives_a_typed_object(client):
    import pydantic

    class City(pydantic.BaseModel):
        name: str
        people: int

    found = client.chat.completions.parse(model=NAME, messages=[{"role": "user", "content": "Describe Paris."}],
                                          response_format=City, temperature=0, max_tokens=80)
    assert isinstance(found.choices[0].message.parsed, City)
    raw = client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=120, temperature=0,
                                         response_format={"type": "json_object"})
    assert raw.choices[0].finish_reason == "length" or isinstance(json.loads(raw.choices[0].message.content), dict)


def test_responses_whole_and_streamed(client):
    whole = client.responses.create(model=NAME, input=QUESTION[0]["content"], temperature=0, max_output_tokens=16)
    assert "Paris" in whole.output_text
    with client.responses.stream(model=NAME, input=QUESTION, temperature=0, max_output_tokens=16) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == whole.output_text


def test_embeddings_and_models(client):
    found = client.embeddings.create(model=NAME, input=["Paris", "Rome"])
    assert len(found.data) == 2 and len(found.data[0].embedding) == 576
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME


def test_errors_are_the_clients_own_kinds(client, url):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=QUESTION, temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


def test_many_streams_at_once_from_asyncio(url):
    async def ask(client, i):
        stream = await client.completions.create(model=NAME, prompt=f"{i}, {i + 1},", max_tokens=8, stream=True)
        return [part async for part in stream][-1].choices[0].finish_reason

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(24)))

    assert set(asyncio.run(all_of_them())) <= {"stop", "length"}
