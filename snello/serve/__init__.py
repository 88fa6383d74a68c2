"""The OpenAI protocol over the engine: requests in, bodies out, and files of many requests.

`fields.py` and `openai.py` read a request, `answers.py` writes what is answered, `errors.py` what is refused; none of
them knows how a request came. `batch.py` answers a file of requests.
"""
