"""A server under load, from outside: what is asked when (`plans`), over sockets (`client`), and what came of it
(`outcome`). Knows OpenAI's protocol and nothing of our server, so that any server can be measured alike.
"""
