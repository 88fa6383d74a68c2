// What the server does now, beside what this machine allows. Speeds are differences between two looks.

const $ = (id) => document.getElementById(id);
const count = (value) => Math.round(value).toLocaleString("en");
const share = (part, all) => (all ? `${(100 * part / all).toFixed(0)}%` : "none yet");
let before = null;

export function showMeter(status, model) {
  const now = model.counts, same = before?.name === model.name && status.seconds > before.seconds;
  const speed = same ? (now.generation_tokens - before.tokens) / (status.seconds - before.seconds) : 0;
  before = { name: model.name, tokens: now.generation_tokens, seconds: status.seconds };
  const kept = status.answers_on_disk, similar = status.similar_questions;
  const limit = model.ceiling?.decode_tokens_per_second;
  $("speed").textContent = count(speed);
  $("share").hidden = !limit;
  $("share").value = limit ? Math.min(1, speed / limit) : 0;
  $("ceiling").textContent = limit
    ? `of ${count(limit)} that reading the weights allows here with ${model.ceiling.streams} at once`
    : "This machine's ceiling is not known: run snello doctor once.";
  const refused = Object.values(model.queue.refused).reduce((sum, value) => sum + value, 0);
  const rows = [
    ["running", count(now.num_requests_running)],
    ["waiting", count(now.num_requests_waiting)],
    ["queue", `${count(model.queue.tokens)} of ${count(model.queue.most_tokens)} tokens`],
    ["cache in use", share(now.kv_cache_usage, 1)],
    ["prompt tokens known", share(now.prefix_cache_hits, now.prefix_cache_queries)],
    ["read from disk", `${count(now.prefix_disk_hits)} tokens`],
    ["answers shared in flight", count(now.flights_joined)],
    ...(kept ? [["answers known from disk", `${count(kept.hits)} of ${count(kept.hits + kept.misses)}`]] : []),
    ...(similar ? [["answers of similar questions", similar.serves
      ? `${count(similar.counts.hits)}; audited ${count(similar.counts.audited)}, wrong ${count(similar.counts.audited_wrong)}`
      : "off: an audit found too many wrong"]] : []),
    ["refused", count(refused)],
    ["drawn since the start", `${count(now.generation_tokens)} tokens`],
  ];
  $("facts").replaceChildren(...rows.flatMap(([name, value]) => {
    const term = document.createElement("dt"), said = document.createElement("dd");
    term.textContent = name;
    said.textContent = value;
    return [term, said];
  }));
}
