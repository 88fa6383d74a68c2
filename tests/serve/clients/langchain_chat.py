"""LangChain's chat model, as it comes: whole, streamed, batched, with a function, with a schema. Prints JSON."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

asked = json.loads(sys.argv[1])
words = asked["messages"][0]["content"]
chat = ChatOpenAI(model="chat", max_tokens=12, seed=4, max_retries=0)  # base URL and key from the environment
unbound = ChatOpenAI(model="chat", seed=2, max_retries=0)
called = unbound.bind_tools([asked["tool"]], tool_choice="weather", parallel_tool_calls=False).invoke(words)
schema = {"title": "x", "description": "an x", **asked["schema"]}
held = unbound.with_structured_output(schema, method="json_schema").invoke(words)
text = OpenAI(model="chat", max_tokens=5, seed=1, temperature=0, max_retries=0)
vectors = OpenAIEmbeddings(model="bert", check_embedding_ctx_length=False, max_retries=0).embed_documents(["a", "b"])
print(
    json.dumps(
        {
            "whole": chat.invoke(words).content,
            "streamed": "".join(piece.content for piece in chat.stream(words)),
            "batch": [said.content for said in chat.batch([words] * 3)],
            "call": {"name": called.tool_calls[0]["name"], "arguments": json.dumps(called.tool_calls[0]["args"])},
            "held": json.dumps(held),
            "text": text.invoke("def area(r):"),
            "vectors": [len(vector) for vector in vectors],
        }
    )
)
