// The page: which model, which view, and a look at the server once a second while somebody looks.

import { call, getJson, onKeyNeeded, useKey } from "./api.js";
import { setUpChat } from "./chat.js";
import { showMeter } from "./meter.js";
import { showProof } from "./proof.js";

const $ = (id) => document.getElementById(id);
const tabs = [...document.querySelectorAll("[role=tab]")];
let models = [];
let proved = "";

const chosen = () => models.find((model) => model.name === $("model").value);

function select(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
}

for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(place + step + tabs.length) % tabs.length];
    select(next);
    next.focus();
  });
}

async function look() {
  if (document.hidden || !$("key-form").hidden) return;
  const status = await getJson("status");
  models = status.models;
  if ($("model").options.length !== models.length) {
    const label = ({ name, parent }) => (parent ? `${name} (adapter of ${parent})` : name);
    $("model").replaceChildren(...models.map((model) => new Option(label(model), model.name)));
  }
  showMeter(status, chosen());
  if (proved !== chosen().name) {
    const name = chosen().name;
    const proof = await getJson(`proof/${name.split("/").map(encodeURIComponent).join("/")}`);
    proved = name;
    showProof($("proof"), $("claim"), proof);
  }
}

async function keepLooking() {
  try {
    await look();
  } catch (error) {
    if ($("key-form").hidden) $("said").textContent = `the server does not answer: ${error.message}`;
  }
  setTimeout(keepLooking, 1000);
}

onKeyNeeded(() => {
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
});
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey($("key").value);
  try {
    await call("status");
    $("key").value = "";
    $("key-form").hidden = true;
    $("said").textContent = "";
    $("ask").focus();
  } catch (error) {
    $("said").textContent = error.message;
  }
});

setUpChat(chosen);
keepLooking();
