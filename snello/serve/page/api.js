// Calls of the server's public API, with the key that this tab holds, if any. Text in, plain values out.

const KEY = "snello-key";
let askForKey = () => {};

export const onKeyNeeded = (action) => { askForKey = action; };
export const useKey = (key) => sessionStorage.setItem(KEY, key);

export async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers, referrerPolicy: "no-referrer" });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message ?? `the server answered ${response.status}`);
}

export const getJson = async (path) => (await call(path)).json();

/** The events of a stream; an error inside it is thrown, as is an end without [DONE]. */
export async function* events(path, body, signal) {
  const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
  yield { source: response.headers.get("x-snello-source") };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      if (block === "data: [DONE]") return;
      const event = JSON.parse(block.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
