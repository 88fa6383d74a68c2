// The model's proof, block by block as the report arranges it. Every word becomes a text node.

function element(name, text, kind = "") {
  const made = document.createElement(name);
  if (text !== null) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function table(block) {
  const made = element("table", null), kind = (place) => (block.right.includes(place) ? "n" : "");
  const row = (cells, name) => {
    const line = element("tr", null);
    line.append(...cells.map((cell, place) => element(name, cell, kind(place))));
    return line;
  };
  made.append(row(block.columns, "th"), ...block.rows.map((cells) => row(cells, "td")));
  const scroll = element("div", null, "scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `table: ${block.columns[0]}`);
  scroll.append(made);
  return [scroll];
}

function side(name, tokens, weights, lost) {
  const made = element("div", null, "side");
  made.append(element("b", name));
  tokens.forEach((token, place) => {
    const word = element(weights[place] ? "i" : "span", token, weights[place] ? `t${weights[place]}` : "");
    if (!lost[place]) return made.append(word);
    const mark = element("mark", null);
    mark.append(word);
    made.append(mark);
  });
  return made;
}

const DRAW = {
  text: (block) => [element("p", block.text)],
  command: (block) => [element("pre", block.text)],
  table,
  chart: (block) => [element("p", block.title), ...table(block.table)],
  items: (block) => {
    const list = element("ul", null);
    list.append(...block.lines.map((line) => element("li", line)));
    return [list];
  },
  excerpt: (block) => {
    const pair = element("div", null, "pair");
    pair.append(side("original", block.tokens, block.original, []), side("lean", block.tokens, block.lean, block.lost));
    return [element("p", block.caption), element("p", block.peaks), pair];
  },
};

export function showProof(place, claim, proof) {
  claim.textContent = proof.sentence;
  place.replaceChildren(...(proof.sections.length ? [] : [element("p", proof.sentence)]), ...proof.sections.flatMap((section) => [
    element("h2", section.title), ...section.blocks.flatMap((block) => DRAW[block.kind](block)),
  ]));
}
