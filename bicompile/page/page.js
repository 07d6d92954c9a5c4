"use strict";
// rows: [name, target, arguments, holds, module, verdict, line, kind, after, rule, order, schedule,
// schedules, flop, bytes, moves]; line, rule, order and schedules are places in `texts`.
const { graphs, texts, sources, verdicts } = JSON.parse(document.getElementById("data").textContent);
const tree = document.getElementById("tree"), detail = document.getElementById("detail");
const search = document.getElementById("search"), moves = document.getElementById("moves");
const [NAME, TARGET, ARGUMENTS, HOLDS, MODULE, VERDICT, LINE, KIND, AFTER, RULE, ORDER, SCHEDULE,
  SCHEDULES, FLOP, BYTES, MOVES] = Array(16).keys();
const make = (tag, text, cls) => {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (cls) element.className = cls;
  return element;
};
const text = (n) => texts[n] || "";

// Consecutive rows under the same part of the module path become a branch.
function branch(rows, depth) {
  const parts = [];
  for (const row of rows) {
    const path = row[MODULE] ? row[MODULE].split(".") : [];
    const name = path[depth], last = parts[parts.length - 1];
    if (name === undefined) parts.push(row);
    else if (last && !Array.isArray(last) && last.name === name) last.rows.push(row);
    else parts.push({ name, rows: [row], path: path.slice(0, depth + 1).join(".") });
  }
  return parts;
}

function fill(box, graph, rows, depth, open) {
  for (const part of branch(rows, depth)) {
    if (Array.isArray(part)) { box.append(line(graph, part)); continue; }
    const details = make("details"), summary = make("summary", part.path);
    details.dataset.path = part.path;
    summary.append(make("i", describe(graph, part.rows)));
    for (const v of new Set(part.rows.map((r) => r[VERDICT]))) summary.append(make("u", "", "v" + v));
    const inner = make("div");
    details.append(summary, inner);
    const grow = () => { if (!inner.childNodes.length) fill(inner, graph, part.rows, depth + 1, open); };
    details.addEventListener("toggle", () => details.open && grow());
    if (open(part, depth)) { grow(); details.open = true; }
    box.append(details);
  }
}

function describe(graph, rows) {
  const share = (key) => 100 * rows.reduce((sum, r) => sum + r[key], 0) / (graph.total[key] || 1);
  const flop = share(FLOP), bytes = share(BYTES);
  const cost = (flop || bytes) ? `, ${flop.toFixed(1)}% of FLOP, ${bytes.toFixed(1)}% of bytes` : "";
  return `${rows.length} node${rows.length === 1 ? "" : "s"}${cost}`;
}

function line(graph, row) {
  const box = make("div", "", "row v" + row[VERDICT]);
  box.dataset.name = row[NAME];
  const left = make("span");
  left.append(row[NAME] + " ", make("em", "= "), row[TARGET], make("em", `(${row[ARGUMENTS]})`));
  left.title = row[HOLDS];
  const right = make("span");
  if (row[KIND] === "removed") right.append(make("span", "nothing reads it", "gone"));
  else row[AFTER].forEach((n, i) => {
    const [name, target, args] = graph.after[n];
    if (row[KIND] === "absorbed") right.append(make("span", `${i ? ", " : "computed by "}${name}`, "gone"));
    else {
      const same = target === row[TARGET];
      const node = make("span", `${i ? "; " : ""}${name} = ${target}`, same ? "same" : "");
      node.append(make("em", i ? "" : `(${args})`));
      right.append(node);
    }
  });
  box.append(left, right);
  box.addEventListener("click", () => choose(graph, row, box));
  return box;
}

function choose(graph, row, box) {
  document.querySelectorAll(".row.chosen").forEach((r) => r.classList.remove("chosen"));
  box.classList.add("chosen");
  const list = make("dl");
  const say = (term, value) => value && list.append(make("dt", term), make("dd", value));
  detail.replaceChildren(make("h3", row[NAME]), list);
  say("source", text(row[LINE]));
  if (sources[row[LINE]]) {
    const code = make("dd");
    code.innerHTML = sources[row[LINE]]; // written by Pygments, which escapes the code
    list.append(code);
  }
  say("class", verdicts[row[VERDICT]]);
  say("captured", `${row[TARGET]}(${row[ARGUMENTS]}) -> ${row[HOLDS]}`);
  say(row[KIND], row[AFTER].map((n) => graph.after[n].slice(0, 3)).map(([n, t, a]) => `${n} = ${t}(${a})`).join("; "));
  say("rule", text(row[RULE]));
  say("order", text(row[ORDER]));
  say("schedule here", row[SCHEDULE]);
  say("schedules allowed, all with these bits", text(row[SCHEDULES]));
  say("module", row[MODULE]);
  say("cost", row[FLOP] || row[BYTES] ? `${row[FLOP].toLocaleString("en")} FLOP, ${row[BYTES].toLocaleString("en")} bytes` : "");
}

function show(open) {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = new Set([...document.querySelectorAll("#classes input:checked")].map((i) => +i.value));
  let count = 0;
  tree.replaceChildren();
  for (const graph of graphs) {
    const rows = graph.rows.filter((row) => {
      if (!wanted.has(row[VERDICT]) || (row[MOVES] && !moves.checked)) return false;
      if (!words.length) return true;
      const after = row[AFTER].map((n) => graph.after[n].join(" ")).join(" ");
      const all = `${row[NAME]} ${row[TARGET]} ${row[MODULE]} ${text(row[LINE])} ${after}`.toLowerCase();
      return words.every((word) => all.includes(word));
    });
    count += rows.length;
    if (graphs.length > 1) tree.append(make("h2", `${graph.name} graph`));
    // Matches are shown open; so are small graphs, and in large ones all but the layers.
    const few = rows.length <= 150;
    fill(tree, graph, rows, 0, open || ((part) => few || (words.length && rows.length <= 2000)
      || part.rows.length > rows.length / 2));
  }
  const total = graphs.reduce((sum, g) => sum + g.rows.length, 0);
  document.getElementById("shown").value = `${count} of ${total} nodes`;
}

for (const graph of graphs) {
  graph.total = {};
  for (const key of [FLOP, BYTES]) graph.total[key] = graph.rows.reduce((sum, r) => sum + r[key], 0);
}
search.addEventListener("input", () => show());
moves.addEventListener("change", () => show());
document.getElementById("classes").addEventListener("change", () => show());
document.getElementById("open").addEventListener("click", () => show(() => true));
document.getElementById("close").addEventListener("click", () => show(() => false));
document.getElementById("unified").addEventListener("click", () => {
  const diff = document.getElementById("diff");
  diff.hidden = !diff.hidden;
  document.querySelector("main").hidden = !diff.hidden;
});
const asked = new URLSearchParams(location.hash.slice(1));
search.value = asked.get("search") || "";
show();
const node = asked.get("node") && tree.querySelector(`.row[data-name="${CSS.escape(asked.get("node"))}"]`);
if (node) node.click();
