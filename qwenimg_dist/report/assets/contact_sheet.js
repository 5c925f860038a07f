// State, filters and paging. Rows come as JSON; every text goes in as a text node. Only what is shown has elements.
const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 60;
const FEW = 12;
const VIEWS = ["pictures", "scores", "duplicates", "tables"];
const el = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const EMPTY = { status: "", reason: "", bucket: "", text: "", labels: {}, ranges: {} };
const state = { ...EMPTY, labels: {}, ranges: {}, order: "row", crop: "", decoded: true, page: 0, view: "pictures" };
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

const grouped = (value) => value.toLocaleString("en");
const bucketsOf = (row) => Object.entries(row.places).map(([name, p]) => `${name}: ${p.bucket[1]}x${p.bucket[0]}`);
const byNumbers = (name) => name.split(/[^0-9]+/).map((n) => n.padStart(6, "0")).join(" ");
const byCount = (counts) => [...counts].sort((a, b) => b[1] - a[1]);

for (const row of data.rows) {
  row.words = [row.uri, row.key, row.detail, ...Object.values(row.labels), ...row.captions].join("\n").toLowerCase();
}

// Scores with a few values (a text level, a number of frames) and labels are chosen from a list.
const listed = new Map();
for (const name of data.labels) listed.set(name, tally((row) => (name in row.labels ? [row.labels[name]] : [])));
for (const name of data.scores) {
  const counts = tally((row) => (name in row.scores ? [String(row.scores[name])] : []));
  if (counts.size > 1 && counts.size <= FEW && [...counts.keys()].every((v) => Number.isInteger(Number(v)))) {
    listed.set(name, new Map([...counts].sort((a, b) => a[0] - b[0])));
  }
}
const valueOf = (row, name) => (name in row.labels ? row.labels[name] : name in row.scores ? String(row.scores[name]) : null);

function setUp() {
  for (const name of VIEWS) el(`tab-${name}`).addEventListener("click", () => change({ view: name }));
  document.querySelector(".tabs").addEventListener("keydown", turnTabs);
  const statuses = tally((row) => [row.status]);
  for (const [value, label] of [["", "all"], ["kept", "kept"], ["rejected", "rejected"], ["fault", "fault"]]) {
    const count = value ? statuses.get(value) || 0 : data.rows.length;
    const chip = make("button", "", `${label} ${grouped(count)}`);
    chip.addEventListener("click", () => change({ status: value }));
    chip.dataset.status = value;
    el("status").append(chip);
  }
  option(el("reason"), "", "any");
  for (const [name, count] of byCount(tally((row) => (row.reason ? [row.reason] : [])))) {
    option(el("reason"), name, `${name} (${grouped(count)})`);
  }
  option(el("bucket"), "", "any");
  const buckets = [...tally(bucketsOf)].sort((a, b) => byNumbers(a[0]).localeCompare(byNumbers(b[0])));
  for (const [name, count] of buckets) option(el("bucket"), name, `${name} (${grouped(count)})`);
  setUpLists();
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
  el("decoded-field").hidden = !data.rows.some((row) => row.decoded);
  el("decoded").addEventListener("change", (event) => change({ decoded: event.target.checked }));
  el("text").addEventListener("input", (event) => change({ text: event.target.value.toLowerCase() }));
  el("clear").addEventListener("click", () => change({ ...EMPTY, labels: {}, ranges: {} }));
  el("where").addEventListener("focus", (event) => event.target.select());
  for (const button of all(".content .back")) button.addEventListener("click", () => change({ page: state.page - 1 }));
  for (const button of all(".content .next")) button.addEventListener("click", () => change({ page: state.page + 1 }));
  el("filters").open = window.matchMedia("(min-width: 900px)").matches;
}

function setUpLists() {
  for (const [name, counts] of listed) {
    const field = make("label", "field", name);
    const select = make("select");
    option(select, "", "any");
    for (const [value, count] of counts) option(select, value, `${value || "(none)"} (${grouped(count)})`);
    select.dataset.name = name;
    select.addEventListener("change", () => {
      const labels = { ...state.labels, [name]: select.value };
      if (!select.value) delete labels[name];
      change({ labels });
    });
    field.append(select);
    el("labels").append(field);
  }
  option(el("add-range"), "", "choose a score ...");
  for (const name of data.scores) option(el("add-range"), name, name);
  el("add-range").addEventListener("change", (event) => {
    if (event.target.value) setRange(event.target.value, state.ranges[event.target.value] || [null, null]);
    event.target.value = "";
  });
}

function turnTabs(event) {
  const step = { ArrowRight: 1, ArrowLeft: VIEWS.length - 1 }[event.key];
  if (!step) return;
  const view = VIEWS[(VIEWS.indexOf(state.view) + step) % VIEWS.length];
  change({ view });
  el(`tab-${view}`).focus();
}

// A range is [least, most], null where open; undefined takes it away.
function setRange(name, range) {
  const ranges = { ...state.ranges, [name]: range };
  if (!range) delete ranges[name];
  change({ ranges });
}

function within(row, name, [least, most]) {
  const value = row.scores[name];
  return (least === null && most === null) || (value !== undefined && (least === null || value >= least) && (most === null || value <= most));
}

function matches(row) {
  return (
    (!state.status || row.status === state.status) &&
    (!state.reason || row.reason === state.reason) &&
    (!state.bucket || bucketsOf(row).includes(state.bucket)) &&
    (!state.text || row.words.includes(state.text)) &&
    Object.entries(state.labels).every(([name, value]) => valueOf(row, name) === value) &&
    Object.entries(state.ranges).every(([name, range]) => within(row, name, range))
  );
}

function sorted(rows) {
  if (state.order === "row") return rows;
  const name = state.order.slice(1);
  const sign = state.order[0] === "-" ? -1 : 1;
  const value = (row) => row.scores[name];
  return rows.filter((row) => value(row) !== undefined).sort((a, b) => sign * (value(a) - value(b)));
}

function whereText() {
  const parts = [];
  if (state.status) parts.push(`status == '${state.status}'`);
  if (state.reason) parts.push(`reason == '${state.reason}'`);
  for (const [name, value] of Object.entries(state.labels)) {
    parts.push(data.labels.includes(name) ? `${name} == '${value}'` : `${name} == ${value}`);
  }
  for (const [name, [least, most]] of Object.entries(state.ranges)) {
    if (least !== null) parts.push(`${name} >= ${least}`);
    if (most !== null) parts.push(`${name} <= ${most}`);
  }
  return parts.join(" and ");
}

function numFilters() {
  const plain = ["status", "reason", "bucket", "text"].filter((name) => state[name]).length;
  return plain + Object.keys(state.labels).length + Object.keys(state.ranges).length;
}

function change(what) {
  const sameRows = Object.keys(what).every((key) => ["page", "crop", "decoded", "view"].includes(key));
  Object.assign(state, sameRows ? what : { ...what, page: 0 });
  if (!sameRows) shown = sorted(data.rows.filter(matches));
  state.page = Math.max(0, Math.min(state.page, Math.ceil(shown.length / PER_PAGE) - 1));
  draw();
  if ("page" in what) el("bar").scrollIntoView();
  remember();
}

function draw() {
  for (const name of VIEWS) {
    el(`view-${name}`).hidden = name !== state.view;
    el(`tab-${name}`).setAttribute("aria-selected", String(name === state.view));
    el(`tab-${name}`).tabIndex = name === state.view ? 0 : -1;
  }
  drawFilters();
  if (state.view === "pictures") drawCards();
  if (state.view === "scores") drawHistograms();
  if (state.view === "duplicates") drawClusters();
}

function drawFilters() {
  for (const chip of el("status").children) chip.ariaPressed = String(chip.dataset.status === state.status);
  for (const name of ["reason", "bucket", "order", "crop"]) el(name).value = state[name];
  if (el("text").value.toLowerCase() !== state.text) el("text").value = state.text;
  for (const select of all("#labels select")) select.value = state.labels[select.dataset.name] ?? "";
  el("decoded").checked = state.decoded;
  const count = numFilters();
  el("num-filters").textContent = count ? `(${count})` : "";
  el("clear").hidden = !count;
  const where = whereText();
  el("where-field").hidden = !where;
  el("where").value = where;
  const without = [state.bucket && "the bucket", state.text && "the search"].filter(Boolean).join(" and ");
  el("where-hint").textContent = where && without ? `Without ${without}, which no expression can say.` : "";
  drawRanges(el("ranges"));
}

function remember() {
  const kept = Object.fromEntries(Object.entries(state).filter(([, value]) => value && JSON.stringify(value) !== "{}"));
  try {
    history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(kept))}`);
  } catch {
    // A browser that keeps files from this: the page just does not remember.
  }
}

function remembered() {
  try {
    const kept = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    return Object.fromEntries(Object.entries(kept).filter(([key, value]) => key in state && typeof value === typeof state[key]));
  } catch {
    return {};
  }
}

function number(value) {
  return Number.isInteger(value) ? grouped(value) : String(Number(value.toPrecision(4)));
}

function size(bytes) {
  if (!bytes) return "unknown";
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
