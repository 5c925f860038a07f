"use strict";
// Rows come as JSON; every text goes in as a text node. Only the page that is shown has elements.
const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 60;
const THUMB = 192;
const el = (id) => document.getElementById(id);
const state = { status: "", reason: "", bucket: "", text: "", order: "row", crop: "", page: 0 };
let shown = [];

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function option(select, value, label) {
  const node = make("option", "", label);
  node.value = value;
  select.append(node);
}

function tally(keysOf) {
  const counts = new Map();
  for (const row of data.rows) for (const key of keysOf(row)) counts.set(key, (counts.get(key) || 0) + 1);
  return counts;
}

const bucketsOf = (row) => Object.entries(row.places).map(([name, p]) => `${name}: ${p.bucket[1]}x${p.bucket[0]}`);

function setUp() {
  const statuses = tally((row) => [row.status]);
  for (const [value, label] of [["", "all"], ["kept", "kept"], ["rejected", "rejected"], ["fault", "fault"]]) {
    const count = value ? statuses.get(value) || 0 : data.rows.length;
    const chip = make("button", "", `${label} ${count.toLocaleString("en")}`);
    chip.addEventListener("click", () => change({ status: value }));
    chip.dataset.status = value;
    el("status").append(chip);
  }
  option(el("reason"), "", "any reason");
  const reasons = tally((row) => (row.reason ? [row.reason] : []));
  for (const [name, count] of [...reasons].sort((a, b) => b[1] - a[1])) option(el("reason"), name, `${name} (${count})`);
  option(el("bucket"), "", "any bucket");
  const buckets = tally(bucketsOf);
  const order = (name) => name.split(/[^0-9]+/).map((n) => n.padStart(6, "0")).join(" ");
  for (const [name, count] of [...buckets].sort((a, b) => order(a[0]).localeCompare(order(b[0])))) {
    option(el("bucket"), name, `${name} (${count})`);
  }
  option(el("order"), "row", "row");
  for (const name of data.scores) {
    option(el("order"), `+${name}`, `${name}, low first`);
    option(el("order"), `-${name}`, `${name}, high first`);
  }
  option(el("crop"), "", "off");
  for (const name of data.classes) option(el("crop"), name, name);
  for (const name of ["reason", "bucket", "order", "crop"]) {
    el(name).addEventListener("change", (event) => change({ [name]: event.target.value }));
  }
  el("text").addEventListener("input", (event) => change({ text: event.target.value.toLowerCase() }));
  el("back").addEventListener("click", () => change({ page: state.page - 1 }));
  el("next").addEventListener("click", () => change({ page: state.page + 1 }));
}

function matches(row) {
  return (
    (!state.status || row.status === state.status) &&
    (!state.reason || row.reason === state.reason) &&
    (!state.bucket || bucketsOf(row).includes(state.bucket)) &&
    (!state.text || [row.uri, row.key, row.detail, ...row.captions].join("\n").toLowerCase().includes(state.text))
  );
}

function sorted(rows) {
  if (state.order === "row") return rows;
  const name = state.order.slice(1);
  const sign = state.order[0] === "-" ? -1 : 1;
  const value = (row) => row.scores[name];
  return rows.filter((row) => value(row) !== undefined).sort((a, b) => sign * (value(a) - value(b)));
}

function change(what) {
  const turned = "page" in what || "crop" in what;
  Object.assign(state, turned ? what : { ...what, page: 0 });
  if (!turned) shown = sorted(data.rows.filter(matches));
  draw();
  if ("page" in what) el("bar").scrollIntoView();
}

function draw() {
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  const first = state.page * PER_PAGE;
  const here = shown.slice(first, first + PER_PAGE);
  el("cards").replaceChildren(...here.map(card));
  if (!here.length) el("cards").append(make("p", "nothing", "No row matches."));
  const last = first + here.length;
  el("count").textContent = here.length ? `${first + 1}\u2013${last} of ${shown.length.toLocaleString("en")}` : "0";
  el("back").disabled = state.page === 0;
  el("next").disabled = state.page + 1 >= pages;
  for (const chip of el("status").children) chip.ariaPressed = String(chip.dataset.status === state.status);
}

function card(row) {
  const node = make("article", "card");
  const thumb = make("div", "thumb");
  thumb.append(row.thumb ? frame(row) : make("div", "none", row.no_thumb));
  const text = make("div", "text");
  const head = make("div", "head");
  head.append(make("span", `badge ${row.status}`, row.status));
  if (row.reason) head.append(make("span", "reason", row.reason));
  head.append(make("span", "row", `row ${row.row.toLocaleString("en")}`));
  text.append(head);
  if (row.detail) text.append(make("div", "detail", row.detail));
  for (const caption of row.captions) {
    const line = make("div", "caption", caption);
    line.title = caption;
    line.addEventListener("click", () => line.classList.toggle("open"));
    text.append(line);
  }
  if (!row.captions.length) text.append(make("div", "detail", "no caption"));
  const file = make("div", "file", row.uri);
  file.title = `key ${row.key}`;
  text.append(file);
  const facts = [["size", row.width ? `${row.width}x${row.height}` : "unknown"], ["file", size(row.bytes)]];
  for (const [name, value] of Object.entries(row.scores)) facts.push([name, number(value)]);
  for (const [name, p] of Object.entries(row.places)) {
    const cut = p.resized[0] === p.bucket[0] && p.resized[1] === p.bucket[1];
    const crop = cut ? "uncropped" : `at ${p.crop[1]},${p.crop[0]} of ${p.resized[1]}x${p.resized[0]}`;
    facts.push([name, `${p.bucket[1]}x${p.bucket[0]} ${crop}`]);
  }
  const list = make("div", "facts");
  for (const [name, value] of facts) {
    const fact = make("span", "", `${name} `);
    fact.append(make("b", "", value));
    list.append(fact);
  }
  text.append(list);
  node.append(thumb, text);
  return node;
}

function frame(row) {
  const box = make("div", "frame");
  const scale = Math.min(THUMB / row.width, THUMB / row.height);
  box.style.width = `${Math.max(1, row.width * scale)}px`;
  box.style.height = `${Math.max(1, row.height * scale)}px`;
  const image = make("img");
  image.alt = row.captions[0] || row.uri;
  image.src = row.thumb;
  box.append(image);
  const place = row.places[state.crop];
  if (place) {
    const crop = make("div", "crop");
    const [height, width] = place.resized;
    crop.style.left = `${(100 * place.crop[1]) / width}%`;
    crop.style.top = `${(100 * place.crop[0]) / height}%`;
    crop.style.width = `${(100 * place.bucket[1]) / width}%`;
    crop.style.height = `${(100 * place.bucket[0]) / height}%`;
    box.append(crop);
  }
  return box;
}

function number(value) {
  return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function size(bytes) {
  if (!bytes) return "unknown";
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

setUp();
change({});
