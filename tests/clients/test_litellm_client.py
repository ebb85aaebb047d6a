"""litellm, which translates between everybody's APIs."""

import asyncio

import litellm
import pytest

from tests.clients.conftest import KEY, NAME, QUESTION

pytestmark = pytest.mark.filterwarnings("ignore")  # a hundred lines on its own models


@pytest.fixture(scope="module")
def how(served):
    return {"model": f"openai/{NAME}", "api_base": f"{served.url}/v1", "api_key": KEY, "num_retries": 0}


def test_chats_whole_streamed_and_in_asyncio(how):
    ask = how | {"messages": QUESTION, "temperature": 0, "max_tokens": 8}
    whole = litellm.completion(**ask).choices[0].message.content
    assert "Paris" in whole
    parts = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole
    assert parts[-1].usage.completion_tokens == 8
    assert asyncio.run(litellm.acompletion(**ask)).choices[0].message.content == whole


def test_completions_embeddings_and_errors(how, encoder):
    found = litellm.text_completion(**how | {"model": f"text-completion-openai/{NAME}"}, prompt="One, two,",
                                    max_tokens=4, temperature=0)
    assert "three" in found.choices[0].text
    assert len(litellm.embedding(**how | {"model": f"openai/{encoder}"}, input=["Paris"]).data[0]["embedding"]) == 384
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**how, messages=QUESTION, top_p=2)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**how | {"model": "openai/gpt-9"}, messages=QUESTION)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**how | {"api_key": "wrong"}, messages=QUESTION)
