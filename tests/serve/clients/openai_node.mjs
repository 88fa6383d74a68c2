// OpenAI's own client for Node, as it comes: whole and streamed chats, a function, a refusal, embeddings. Prints JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(process.env.SNELLO_CLIENT_HOME + "/"));
const { default: OpenAI } = require("openai");
const client = new OpenAI({ maxRetries: 0 }); // base URL and key from the environment
const { messages, tool, schema } = JSON.parse(process.argv[2]);
const ask = { model: "chat", messages, max_completion_tokens: 12, seed: 4 };

const whole = await client.chat.completions.create(ask);
let streamed = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  ...ask, stream: true, stream_options: { include_usage: true },
})) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
const called = await client.chat.completions
  .stream({ model: "chat", messages, tools: [tool], tool_choice: "required", parallel_tool_calls: false, seed: 2 })
  .finalChatCompletion();
const form = { type: "json_schema", json_schema: { name: "x", schema, strict: true } };
const held = await client.chat.completions.create({ model: "chat", messages, response_format: form, seed: 1 });
const said = await client.responses.create({ model: "chat", input: "def area(r):", max_output_tokens: 9, temperature: 0 });
const vectors = await client.embeddings.create({ model: "bert", input: ["a", "b"] });
const refused = await client.chat.completions.create({ ...ask, model: "nobody" }).catch((error) => error);

// Hanging up in the middle of a stream must free its slot.
const long = await client.completions.create({
  model: "chat", prompt: "def f(x):", max_tokens: 900, stream: true, ignore_eos: true,
});
for await (const _ of long) break;

console.log(JSON.stringify({
  whole: whole.choices[0].message.content,
  streamed,
  usage: [whole.usage.total_tokens, usage.total_tokens],
  call: called.choices[0].message.tool_calls[0].function,
  held: held.choices[0].message.content,
  response: said.output_text,
  vectors: vectors.data.map((row) => row.embedding.length),
  refused: [refused.constructor.name, refused.code],
}));
