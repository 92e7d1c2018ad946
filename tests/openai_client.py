"""OpenAI's Python package and LangChain's client of it, unchanged, against a running `strata serve`.

    openai_client.py http://127.0.0.1:8080

Says what is wrong, or `all is well`.
"""

import sys

import openai
from langchain_openai import ChatOpenAI

DOCUMENT = "Mara Tolvin, a lighthouse keeper, lives in Greyford. The password of Mara Tolvin is 48213."
QUESTION = "Where does Mara Tolvin live?"


def messages():
    return [{"role": "system", "content": DOCUMENT}, {"role": "user", "content": QUESTION}]


def check_models(client):
    models = client.models.list().data
    assert len(models) == 1, models
    assert client.models.retrieve(models[0].id).id == models[0].id
    return models[0].id


def check_completions(client, model):
    whole = client.completions.create(
        model=model, prompt="Hugo works as a", max_tokens=12, temperature=0, logprobs=2
    )
    choice = whole.choices[0]
    assert whole.usage.completion_tokens <= 12 and choice.finish_reason in ("stop", "length"), whole
    assert "".join(choice.logprobs.tokens) == choice.text, choice
    stream = client.completions.create(
        model=model, prompt="Hugo works as a", max_tokens=12, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in stream) == choice.text
    several = client.completions.create(model=model, prompt=["a", "b"], n=2, max_tokens=2, seed=1)
    assert [c.index for c in several.choices] == [0, 1, 2, 3], several


def check_chat(client, model):
    whole = client.chat.completions.create(
        model=model, messages=messages(), temperature=0, max_completion_tokens=16,
        logprobs=True, top_logprobs=3,
    )
    text = whole.choices[0].message.content
    assert "Greyford" in text, whole
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3, whole
    stream = client.chat.completions.create(
        model=model, messages=messages(), temperature=0, max_completion_tokens=16, stream=True,
        stream_options={"include_usage": True},
    )
    told, usage = "", None
    for part in stream:
        usage = part.usage or usage
        told += "".join(choice.delta.content or "" for choice in part.choices)
    assert told == text, (told, text)
    assert usage.prompt_tokens_details.cached_tokens > 0, usage


def check_responses(client, model):
    whole = client.responses.create(model=model, instructions=DOCUMENT, input=QUESTION, temperature=0)
    assert "Greyford" in whole.output_text, whole
    told = ""
    with client.responses.stream(
        model=model, instructions=DOCUMENT, input=QUESTION, temperature=0
    ) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                told += event.delta
        assert stream.get_final_response().output_text == whole.output_text
    assert told == whole.output_text, (told, whole)
    more = client.responses.create(
        model=model, previous_response_id=whole.id, input="And where else?", max_output_tokens=4
    )
    assert more.usage.input_tokens > 0, more


def check_errors(client, model):
    for raised, request in [
        (openai.NotFoundError, {"model": "no-such-model", "messages": messages()}),
        (openai.BadRequestError, {"model": model, "messages": []}),
        (openai.BadRequestError, {"model": model, "messages": messages(), "temperature": 9}),
    ]:
        try:
            client.chat.completions.create(**request)
        except raised as error:
            assert error.body["message"], error
        else:
            raise AssertionError(f"{request} was taken on")


def check_langchain(url, model):
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=16)
    asked = [("system", DOCUMENT), ("human", QUESTION)]
    whole = chat.invoke(asked)
    assert "Greyford" in whole.content, whole
    assert whole.usage_metadata["output_tokens"] > 0, whole
    assert "".join(part.content for part in chat.stream(asked)) == whole.content
    assert [answer.content for answer in chat.batch([asked] * 4)] == [whole.content] * 4


def main():
    url = sys.argv[1]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    model = check_models(client)
    check_completions(client, model)
    check_chat(client, model)
    check_responses(client, model)
    check_errors(client, model)
    check_langchain(url, model)
    print("all is well")


if __name__ == "__main__":
    main()
