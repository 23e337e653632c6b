// The status page: asks its own server for status.json, again and again, and shows what it says and what changed.
// Text from the server goes into the page as text, never as markup.

import { UNKNOWN, between, bytes, count, difference, duration, keys_of, per_second, percent, seconds, share }
  from "./numbers.js";

const POLL_MS = 2000;
const ANSWER_MS_MAX = 5000;
const SAMPLES_MAX = 151; // five minutes
const LINE_SAMPLES_MIN = 31; // a line that begins takes a minute to cross its card
const RATE_SAMPLES = 5; // rates are of the last ten seconds

const element = (id) => document.getElementById(id);
const put = (id, text) => { element(id).textContent = text; };

const samples = []; // of one daemon since it started, oldest first: {at_s, status}
const lines = { hit: [], reads: [], lookups: [], p99: [] };

function make(tag, text, class_name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (class_name) made.className = class_name;
  return made;
}

function figure(id, text, beside) {
  const [, number, unit] = text.match(/^(\S*[^\s/])\s*(.*)$/);
  element(id).replaceChildren(document.createTextNode(number), make("small", unit));
  put(`${id}-beside`, beside);
}

function show_figures(now, rates, total) {
  const per_s = (number) => per_second(number / rates.seconds);
  const hit = Number.isNaN(rates.hit) ? total.hit : rates.hit;
  const planned = now.plan ? `plan ${percent(now.plan.low).replace(" %", "")} to ${percent(now.plan.high)}` : "";
  const beside = planned || `${percent(total.hit)} since start`;
  figure("hit", percent(hit), Number.isNaN(rates.hit) ? "since start; idle now" : beside);
  figure("reads", per_s(rates.counters.reads), `${bytes(rates.counters.read_bytes / rates.seconds)}/s`);
  figure("lookups", per_s(rates.counters.lookups), per_s(keys_of(rates.keys)).replace("/s", " keys/s"));
  const latency = Number.isNaN(rates.p99) ? total : rates;
  figure("p99", seconds(latency.p99), `p50 ${seconds(latency.p50)}${latency === total ? ", since start" : ""}`);
}

function draw_line(name, top) {
  const values = lines[name];
  const step = 150 / (Math.max(values.length, LINE_SAMPLES_MIN) - 1);
  const points = values.map((value, index) => [150 - step * (values.length - 1 - index), value])
    .filter(([, value]) => Number.isFinite(value))
    .map(([x, value]) => `${x.toFixed(1)} ${(38 - (34 * value) / top).toFixed(1)}`);
  const svg = element(`${name}-line`);
  svg.replaceChildren();
  if (points.length < 2) return;
  const [first, last] = [points[0].split(" ")[0], points[points.length - 1].split(" ")[0]];
  for (const [path, class_name] of [[`M ${first} 40 L ${points.join(" L ")} L ${last} 40 Z`, "under"],
    [`M ${points.join(" L ")}`, ""]]) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
    made.setAttribute("d", path);
    if (class_name) made.setAttribute("class", class_name);
    svg.append(made);
  }
}

function show_lines(lately) {
  const next = { hit: lately.hit, reads: lately.counters.reads / lately.seconds,
    lookups: lately.counters.lookups / lately.seconds, p99: lately.p99 };
  for (const [name, value] of Object.entries(next)) {
    lines[name].push(value);
    if (lines[name].length > SAMPLES_MAX) lines[name].shift();
    draw_line(name, name === "hit" ? 1 : Math.max(1e-9, ...lines[name].filter(Number.isFinite)));
  }
}

// A tier: the stream of keys that reaches it and leaves it, what it holds, and the share that it answers.
function tier(class_name, name, num_bytes, answered, came, left, parts, note) {
  const made = make("div", undefined, `tier ${class_name}`);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const edge = (fraction) => [50 - 42 * fraction, 50 + 42 * fraction];
  const [[a, b], [c, d]] = [edge(came || 0), edge(left || 0)];
  path.setAttribute("d", `M ${a} 0 L ${b} 0 C ${b} 50 ${d} 50 ${d} 100 L ${c} 100 C ${c} 50 ${a} 50 ${a} 0 Z`);
  for (const [key, value] of [["viewBox", "0 0 100 100"], ["preserveAspectRatio", "none"], ["class", "stream"],
    ["aria-hidden", "true"]]) svg.setAttribute(key, value);
  svg.append(path);
  const body = make("div");
  const head = make("h3");
  const title = make("span", `${name} `);
  title.append(make("span", num_bytes, "bytes"));
  const answers = make("span", answered, "share");
  answers.append(make("small", " of keys"));
  head.append(title, answers);
  const whole = parts.reduce((sum, part) => sum + part.bytes, 0);
  const stack = make("div", undefined, "stack");
  const legend = make("ul", undefined, "legend");
  for (const part of parts.filter((each) => each.bytes > 0)) {
    const piece = make("i", undefined, part.class_name);
    piece.style.width = `${(100 * part.bytes) / whole}%`;
    const entry = make("li", `${part.name} `, part.class_name);
    entry.append(make("small", bytes(part.bytes) + (part.answers ? `, ${part.answers}` : "")));
    stack.append(piece);
    legend.append(entry);
  }
  body.append(head);
  if (parts.length) body.append(stack, legend);
  if (note) body.append(make("p", note, "beside"));
  made.append(svg, body);
  return made;
}

function show_tiers(now, rates, total) {
  const idle = Number.isNaN(rates.hit);
  const { keys } = idle ? total : rates;
  const all = keys_of(keys);
  const { memory } = now;
  const blocks = [];
  const after_hbm = share(all - keys.hbm, all);
  const on_gpus = now.clients.list.filter((client) => client.has_hbm).length;
  if (keys.hbm || on_gpus) {
    blocks.push(tier("hbm", "HBM", `of ${on_gpus} clients`, percent(share(keys.hbm, all)), 1, after_hbm, [],
      "What the GPUs of clients find in their own tier is not among these keys."));
  }
  const free = Math.max(0, memory.budget_bytes - memory.used_bytes);
  const missed = share(keys.nvme, all);
  const answers = (number) => (all ? `${percent(share(number, all))} of keys` : "");
  blocks.push(tier("dram", "DRAM", `${bytes(memory.used_bytes)} of ${bytes(memory.budget_bytes)}`,
    percent(share(all - keys.hbm - keys.nvme, all)), after_hbm, missed, [
      { class_name: "of-static", name: "static set", bytes: memory.static_bytes, answers: answers(keys.static) },
      { class_name: "of-recency", name: "recency cache", bytes: memory.recency_bytes, answers: answers(keys.recency) },
      { class_name: "of-resident", name: "whole tables", bytes: memory.resident_bytes,
        answers: answers(keys.resident) },
      { class_name: "of-other", name: "bookkeeping", bytes: memory.other_bytes },
      { class_name: "of-free", name: "free", bytes: free }]));
  const amplified = now.counters.missed_bytes ? now.counters.entry_read_bytes / now.counters.missed_bytes : NaN;
  blocks.push(tier("nvme", "NVMe", bytes(now.store.table_bytes), percent(missed), missed, missed * 0.02, [],
    `${per_second(rates.counters.reads / rates.seconds).replace("/s", " reads/s")}, `
    + `${bytes(rates.counters.read_bytes / rates.seconds)}/s`
    + (Number.isNaN(amplified) ? "" : `; ${amplified.toFixed(1)} bytes read for each byte missed, since start`)));
  element("tiers").replaceChildren(...blocks);
  put("tiers-words", `Keys come from above. Each tier answers a part of them; the rest goes on down. `
    + (idle ? "Nobody asks now: these are shares since the start." : "These are shares of the last 10 seconds."));
}

function fill(id, heads, rows) {
  const row = (cells, of) => {
    const made = make("tr");
    made.append(...cells.map(([text, class_name], index) => make(of(index), text, class_name)));
    return made;
  };
  const head = make("thead");
  head.append(row(heads, () => "th"));
  const body = make("tbody");
  for (const [cells, class_name] of rows) {
    const made = row(cells, (index) => (index ? "td" : "th"));
    if (class_name) made.className = class_name;
    body.append(made);
  }
  element(id).replaceChildren(head, body);
}

function show_tables(now, before, elapsed_s) {
  const rows = [];
  const line = (name, keys, earlier, plan, size, class_name) => {
    const lately = earlier ? difference(keys, earlier) : null;
    const rate = (of) => percent(1 - share(of.nvme, keys_of(of)));
    rows.push([[[name], [size, "hide"], [lately ? count(keys_of(lately) / elapsed_s) : UNKNOWN],
      [lately ? rate(lately) : UNKNOWN], [rate(keys)],
      [plan === undefined ? UNKNOWN : percent(plan), "hide"]], class_name]);
  };
  for (const [name, table] of Object.entries(now.tables)) {
    const earlier = before && before.tables[name];
    line(name, table.keys, earlier && earlier.keys, table.plan.all, bytes(table.table_bytes));
    const orders = Object.entries(table.orders);
    for (const [order, keys] of orders.length > 1 ? orders : []) {
      line(`order ${order}`, keys, earlier && earlier.orders[order], table.plan[order], "", "part");
    }
  }
  fill("tables", [["table"], ["size", "hide"], ["keys/s"], ["hit now"], ["since start"], ["plan", "hide"]], rows);
}

function show_clients(now, before, elapsed_s) {
  const { clients } = now;
  const earlier = new Map((before ? before.clients.list : []).map((client) => [client.id, client]));
  put("clients-words", `${clients.attached} of at most ${clients.max} attached, ${clients.refused} refused.`
    + (now.remote ? ` Other hosts: ${count(now.remote.calls)} calls, ${now.remote.in_flight} under way, `
      + `${now.remote.errors} failed.` : ""));
  element("clients").hidden = !clients.list.length;
  const key_rate = (client) => (earlier.has(client.id) ? (client.keys - earlier.get(client.id).keys) / elapsed_s : NaN);
  const rows = clients.list.map((client) => [[[`client ${client.id}`], [duration(client.attached_s)],
    [count(key_rate(client))], [percent(1 - share(client.nvme_hits, client.keys))],
    client.version === now.store.version
      ? [`${client.version}`, "hide"] : [`${client.version} (old)`, "old hide"]], ""]);
  fill("clients", [["client"], ["attached"], ["keys/s"], ["hit rate"], ["generation", "hide"]], rows);
}

function show(status) {
  const latest = samples[samples.length - 1];
  const earlier = samples[Math.max(0, samples.length - 1 - RATE_SAMPLES)];
  const before = earlier === latest ? undefined : earlier;
  const total = between(undefined, latest);
  const rates = before ? between(before, latest) : { ...total, seconds: NaN, hit: NaN, p99: NaN };
  document.title = `${percent(Number.isNaN(rates.hit) ? total.hit : rates.hit)} ${status.store.name}`;
  put("release", status.release);
  put("store", status.store.name);
  put("state", status.state);
  element("state").className = `pill ${status.healthy ? "healthy" : ""}`;
  const { epochs, store } = status;
  put("facts", [`generation ${store.version}`, store.published ? `rows of version ${store.published}` : "",
    `epoch ${epochs.current}` + (epochs.alive > 1 ? " (the one before is still in use)" : ""),
    epochs.changes === 1 ? "1 change" : `${epochs.changes} changes`,
    `up ${duration(status.up_s)}`].filter(Boolean).join(" · "));
  show_figures(status, rates, total);
  if (before) show_lines(between(samples[samples.length - 2], latest));
  show_tiers(status, rates, total);
  show_tables(status, before && before.status, rates.seconds);
  show_clients(status, before && before.status, rates.seconds);
}

function take(status) {
  const last = samples[samples.length - 1];
  if (last && last.status.started_at !== status.started_at) { // another daemon: nothing before it counts
    samples.length = 0;
    for (const line of Object.values(lines)) line.length = 0;
  }
  samples.push({ at_s: performance.now() / 1000, status });
  if (samples.length > SAMPLES_MAX) samples.shift();
  document.body.classList.remove("stale");
  element("problem").hidden = true;
  show(status);
}

function lost(error) {
  put("problem", `No answer from the daemon: ${error.message}. What is shown is old; asking again.`);
  element("problem").hidden = false;
  put("state", "no answer");
  element("state").className = "pill lost";
  document.body.classList.add("stale");
}

async function poll() {
  if (!document.hidden) {
    try {
      const answer = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS_MAX) });
      if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
      take(await answer.json());
    } catch (error) {
      lost(error);
    }
  }
  setTimeout(poll, POLL_MS);
}

poll();
