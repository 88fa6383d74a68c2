"""LiteLLM with an OpenAI-compatible base URL, as it comes: whole, streamed, a function, a refusal. Prints JSON."""

import json
import sys

import litellm

asked = json.loads(sys.argv[1])
ask = {"model": "openai/chat", "messages": asked["messages"], "max_tokens": 12, "seed": 4, "num_retries": 0}
whole = litellm.completion(**ask)
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
called = litellm.completion(
    model="openai/chat",
    messages=asked["messages"],
    tools=[asked["tool"]],
    tool_choice={"type": "function", "function": {"name": "weather"}},
    seed=2,
)
call = called.choices[0].message.tool_calls[0].function
try:
    litellm.completion(**{**ask, "model": "openai/nobody"})
    refused = "nothing"
except litellm.NotFoundError as error:
    refused = type(error).__name__
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "streamed": "".join(pieces),
            "call": {"name": call.name, "arguments": call.arguments},
            "refused": refused,
        }
    )
)
