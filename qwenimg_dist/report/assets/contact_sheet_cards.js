// Cards, the close-up of one row, clusters of duplicates; and the start.
const THUMB = 192;
const byRow = new Map([...data.clusterRows, ...data.rows].map((row) => [row.row, row]));
let closeUp = { rows: [], at: 0 };

function drawCards() {
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  const first = state.page * PER_PAGE;
  const here = shown.slice(first, first + PER_PAGE);
  const cards = here.map((row, i) => card(row, () => openCloseUp(shown, first + i)));
  el("cards").classList.toggle("compared", here.some((row) => row.others.length || (state.decoded && row.decoded)));
  el("cards").replaceChildren(...cards);
  if (!here.length) el("cards").append(make("p", "nothing", "No row matches."));
  const last = first + here.length;
  const text = here.length ? `${grouped(first + 1)}\u2013${grouped(last)} of ${grouped(shown.length)}` : "0";
  for (const count of all(".content .count")) count.textContent = text;
  for (const button of all(".content .back")) button.disabled = state.page === 0;
  for (const button of all(".content .next")) button.disabled = state.page + 1 >= pages;
}

function card(row, open, note) {
  const node = make("article", "card");
  const text = make("div", "text");
  const head = make("div", "head");
  head.append(make("span", `badge ${row.status}`, row.status));
  if (row.reason) head.append(make("span", "reason", row.reason));
  head.append(make("span", "row", `row ${grouped(row.row)}`));
  text.append(head);
  if (note) text.append(make("div", "note", note));
  if (row.detail) text.append(make("div", "detail", row.detail));
  row.captions.forEach((caption, i) => {
    const line = captionLine("div", "caption", caption, row.captionNotes[i]);
    line.title = caption;
    text.append(line);
  });
  if (!row.captions.length) text.append(make("div", "detail", "no caption"));
  const file = make("div", "file", row.uri);
  file.title = `key ${row.key}`;
  text.append(file, factList(row, factsOf(row)));
  node.append(pictures(row, open, THUMB), text);
  return node;
}

function captionLine(tag, className, caption, note) {
  const line = make(tag, className);
  line.dir = "auto";
  if (note) line.append(make("span", "caption-note", note), " ");
  line.append(caption);
  return line;
}

// On a card: sizes, labels, and the scores that are filtered or sorted by; with few scores, all of them.
function factsOf(row) {
  const facts = [["size", row.width ? `${row.width}\u00d7${row.height}` : "unknown"], ["file", size(row.bytes)]];
  for (const [name, value] of Object.entries(row.labels)) facts.push([name, value]);
  const asked = new Set([state.order.slice(1), ...Object.keys(state.ranges), ...Object.keys(state.labels)]);
  const names = data.scores.filter((name) => asked.has(name) || data.scores.length <= 6);
  for (const name of names) if (name in row.scores) facts.push([name, number(row.scores[name])]);
  const place = row.places[state.crop];
  if (place) facts.push(cutFact(state.crop, place));
  return facts;
}

function cutFact(name, p) {
  const whole = p.resized[0] === p.bucket[0] && p.resized[1] === p.bucket[1];
  const crop = whole ? "uncropped" : `at ${p.crop[1]},${p.crop[0]} of ${p.resized[1]}\u00d7${p.resized[0]}`;
  return [name, `${p.bucket[1]}\u00d7${p.bucket[0]} ${crop}`];
}

function factList(row, facts) {
  const list = make("div", "facts");
  for (const [name, value] of facts) {
    const fact = make("span", "", `${name} `);
    fact.append(make("b", "", value));
    list.append(fact);
  }
  return list;
}

function pictures(row, open, side) {
  if (row.others.length) return withOthers(row, open, side);
  const both = state.decoded && row.decoded && (state.view === "pictures" || !open);
  const box = make(open ? "button" : "div", both ? "thumb both" : "thumb");
  if (open) {
    box.setAttribute("aria-label", `look closer at row ${row.row}`);
    box.addEventListener("click", open);
  }
  const one = make("span", "one");
  one.append(row.thumb ? frame(row, side) : make("span", "none", row.no_thumb));
  box.append(one);
  if (both) {
    const two = make("span", "one");
    const image = make("img", "decoded");
    image.alt = `decoded latents, ${row.decoded[0]}`;
    image.src = row.decoded[1];
    const place = row.places[row.decoded[0]];
    const [height, width] = place ? place.bucket : [1, 1];
    const scale = side / Math.max(height, width);
    image.style.width = `${width * scale}px`;
    image.style.height = `${height * scale}px`;
    two.append(image);
    one.append(make("span", "under", "original"));
    two.append(make("span", "under", `model, ${row.decoded[0]}`));
    box.append(two);
  }
  return box;
}

// A preference pair or an edit: its own picture, then the further ones, and what the model sees of its own.
function withOthers(row, open, side) {
  const box = make(open ? "button" : "div", "thumb many");
  if (open) {
    box.setAttribute("aria-label", `look closer at row ${row.row}`);
    box.addEventListener("click", open);
  }
  const small = open ? side / 1.6 : side / 1.3;
  const add = (name, content) => {
    const one = make("span", "one");
    one.append(content, make("span", "under", name));
    box.append(one);
  };
  const plain = (url, name) => {
    const image = make("img", "plain");
    image.alt = name;
    image.src = url;
    image.style.maxWidth = image.style.maxHeight = `${small}px`;
    return image;
  };
  add({ preference: "chosen", edit: "target" }[row.kind] || row.kind, row.thumb ? frame(row, small) : make("span", "none", row.no_thumb));
  for (const other of row.others) {
    add(other.role.replace("_", " "), other.thumb ? plain(other.thumb, other.uri) : make("span", "none", other.no_thumb));
  }
  if (state.decoded && row.decoded) add(`model, ${row.decoded[0]}`, plain(row.decoded[1], "decoded latents"));
  return box;
}

function frame(row, side) {
  const box = make("span", "frame");
  const scale = Math.min(side / row.width, side / row.height);
  box.style.width = `${Math.max(1, row.width * scale)}px`;
  box.style.height = `${Math.max(1, row.height * scale)}px`;
  const image = make("img");
  image.alt = row.captions[0] || row.uri;
  image.src = row.thumb;
  box.append(image);
  const place = row.places[state.crop];
  if (place) {
    const crop = make("span", "crop");
    const [height, width] = place.resized;
    crop.style.left = `${(100 * place.crop[1]) / width}%`;
    crop.style.top = `${(100 * place.crop[0]) / height}%`;
    crop.style.width = `${(100 * place.bucket[1]) / width}%`;
    crop.style.height = `${(100 * place.bucket[0]) / height}%`;
    box.append(crop);
  }
  return box;
}

function openCloseUp(rows, at) {
  closeUp = { rows, at };
  const row = rows[at];
  el("close-up-title").textContent = `row ${grouped(row.row)}, ${at + 1} of ${grouped(rows.length)}`;
  const facts = make("div", "text");
  const head = make("div", "head");
  head.append(make("span", `badge ${row.status}`, row.status));
  if (row.reason) head.append(make("span", "reason", row.reason));
  facts.append(head);
  if (row.detail) facts.append(make("div", "detail", row.detail));
  row.captions.forEach((caption, i) => facts.append(captionLine("p", "whole", caption, row.captionNotes[i])));
  const rest = [["file", row.uri], ["key", row.key], ["size", row.width ? `${row.width}\u00d7${row.height}` : "unknown"]];
  if (!("bytes" in row.scores)) rest.push(["bytes", grouped(row.bytes)]);
  for (const [name, place] of Object.entries(row.places)) rest.push(cutFact(name, place));
  rest.push(...Object.entries(row.labels));
  for (const name of Object.keys(row.scores).sort()) rest.push([name, number(row.scores[name]), verdict(row, name)]);
  const table = make("table");
  for (const [name, value, said] of rest) {
    const line = make("tr");
    line.append(make("th", "", name), make("td", "", value), make("td", "said", said || ""));
    table.append(line);
  }
  facts.append(table);
  el("close-up-body").replaceChildren(pictures(row, null, Math.min(384, window.innerWidth - 80)), facts);
  el("close-up").querySelector(".back").disabled = at === 0;
  el("close-up").querySelector(".next").disabled = at + 1 >= rows.length;
  if (!el("close-up").open) el("close-up").showModal();
}

// What the filters as configured now say of one score.
function verdict(row, name) {
  const value = row.scores[name];
  const met = (histograms.get(name)?.thresholds || []).find((line) =>
    line.rejects === "below" ? value < line.at || (line.inclusive && value === line.at) : value > line.at || (line.inclusive && value === line.at),
  );
  return met ? `${met.reason}: ${lineText(met)[0]}` : "";
}

function drawClusters() {
  const kind = el("kind").value;
  const blocks = data.clusters.filter((one) => !kind || one.kind === kind).map((one) => {
    const rows = one.rows.map((row) => byRow.get(row)).filter(Boolean);
    const block = make("section", "cluster");
    const more = one.size > rows.length ? `, ${rows.length} of them shown` : "";
    block.append(make("h2", "", `${one.kind}: ${grouped(one.size)} rows${more}`));
    const line = make("div", "cards");
    rows.forEach((row, i) => {
      const distance = one.kind.startsWith("exact") ? "same bytes" : `distance ${one.distances[one.rows.indexOf(row.row)]}`;
      line.append(card(row, () => openCloseUp(rows, i), i ? distance : "the first in source order"));
    });
    block.append(line);
    return block;
  });
  el("clusters").replaceChildren(...blocks);
  if (!blocks.length) el("clusters").append(make("p", "nothing", "No duplicates were found among the selected rows."));
}

function setUpRest() {
  option(el("kind"), "", "all");
  const kinds = [...new Set(data.clusters.map((one) => one.kind))];
  for (const kind of kinds) option(el("kind"), kind, kind);
  el("kind").parentElement.parentElement.hidden = kinds.length < 2;
  el("kind").addEventListener("change", drawClusters);
  el("tab-duplicates").append(make("span", "of", data.clusters.length ? ` ${data.clusters.length}` : ""));
  el("tab-scores").append(make("span", "of", data.histograms.length ? ` ${data.histograms.length}` : ""));
  el("log-counts").addEventListener("change", drawHistograms);
  const dialog = el("close-up");
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.querySelector(".back").addEventListener("click", () => step(-1));
  dialog.querySelector(".next").addEventListener("click", () => step(1));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.target.role === "tab") return;
    if (dialog.open) step(by);
    else if (state.view === "pictures") change({ page: state.page + by });
  });
}

function step(by) {
  const at = closeUp.at + by;
  if (at >= 0 && at < closeUp.rows.length) openCloseUp(closeUp.rows, at);
}

setUp();
setUpRest();
change({ ...remembered(), order: remembered().order || "row" });
