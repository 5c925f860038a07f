// Histograms of all rows with the filters' thresholds, as SVG; and the fields of the score ranges.
const WIDTH = 420;
const HEIGHT = 120;
const SVG = "http://www.w3.org/2000/svg";
const histograms = new Map(data.histograms.map((one) => [one.name, one]));

function svgNode(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Value -> x and back.
function axis(one) {
  const scale = one.logarithmic ? Math.log : (v) => v;
  const back = one.logarithmic ? Math.exp : (v) => v;
  const low = scale(one.edges[0]);
  const high = scale(one.edges[one.edges.length - 1]);
  const wide = high - low || 1;
  return {
    x: (value) => (WIDTH * (scale(value) - low)) / wide,
    value: (x) => back(low + (wide * Math.max(0, Math.min(WIDTH, x))) / WIDTH),
  };
}

// Where a threshold's line stands: between whole numbers, where a bin is one.
function lineAt(one, line) {
  if (!one.discrete) return line.at;
  const outward = line.rejects === "above" ? 0.5 : -0.5;
  return Number.isInteger(line.at) ? line.at + (line.inclusive ? -outward : outward) : Math.floor(line.at) + 0.5;
}

function binName(one, i) {
  if (one.discrete) return number(one.edges[i] + 0.5);
  if (i === 0 && one.cut[0]) return `up to ${number(one.edges[1])}`;
  if (i === one.kept.length - 1 && one.cut[1]) return `${number(one.edges[i])} and more`;
  return `${number(one.edges[i])} to ${number(one.edges[i + 1])}`;
}

// [x, anchor, text] of the axis.
function ticks(one) {
  if (one.discrete) {
    const every = Math.ceil(one.kept.length / 8);
    const whole = one.kept.map((_, i) => Math.round(one.edges[i] + 0.5));
    return whole.filter((_, i) => i % every === 0).map((value) => [axis(one).x(value), "middle", grouped(value)]);
  }
  return [0, 0.25, 0.5, 0.75, 1].map((share) => {
    const text = number(Number(axis(one).value(WIDTH * share).toPrecision(3)));
    const beyond = share === 0 && one.cut[0] ? "\u2264 " : share === 1 && one.cut[1] ? "\u2265 " : "";
    return [WIDTH * share, share === 0 ? "start" : share === 1 ? "end" : "middle", beyond + text];
  });
}

function drawing(one, logCounts) {
  const svg = svgNode("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + 16}`, role: "img", "aria-label": `histogram of ${one.name}` });
  const { x } = axis(one);
  const tall = logCounts ? (count) => Math.log1p(count) : (count) => count;
  const most = Math.max(1e-9, ...one.kept.map((count, i) => tall(count + one.others[i])));
  for (const line of one.thresholds) {
    const at = Math.max(0, Math.min(WIDTH, x(lineAt(one, line)) || 0));
    const [from, to] = line.rejects === "below" ? [0, at] : [at, WIDTH];
    svg.append(svgNode("rect", { x: from, y: 0, width: to - from, height: HEIGHT, class: "rejects" }));
  }
  one.kept.forEach((kept, i) => {
    const left = x(one.edges[i]);
    const width = Math.max(0.6, x(one.edges[i + 1]) - left - 0.8);
    const whole = (HEIGHT - 8) * (tall(kept + one.others[i]) / most);
    const lower = kept + one.others[i] ? whole * (kept / (kept + one.others[i])) : 0;
    const bar = svgNode("g", {});
    bar.append(svgNode("title", {}, `${binName(one, i)}: ${grouped(kept)} kept, ${grouped(one.others[i])} not`));
    bar.append(svgNode("rect", { x: left, y: HEIGHT - lower, width, height: lower, class: "kept" }));
    bar.append(svgNode("rect", { x: left, y: HEIGHT - whole, width, height: whole - lower, class: "others" }));
    svg.append(bar);
  });
  for (const line of one.thresholds) {
    const at = x(lineAt(one, line));
    if (at >= 0 && at <= WIDTH) svg.append(svgNode("line", { x1: at, x2: at, y1: 0, y2: HEIGHT, class: "threshold" }));
  }
  svg.append(svgNode("line", { x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT, class: "base" }));
  for (const [at, anchor, text] of ticks(one)) svg.append(svgNode("text", { x: at, y: HEIGHT + 13, "text-anchor": anchor }, text));
  return svg;
}

function drawBrush(svg, one) {
  const range = state.ranges[one.name];
  svg.querySelector(".brush")?.remove();
  if (!range || (range[0] === null && range[1] === null)) return;
  const { x } = axis(one);
  const from = range[0] === null ? 0 : Math.max(0, x(range[0]));
  const to = range[1] === null ? WIDTH : Math.min(WIDTH, x(range[1]));
  if (to >= from) svg.append(svgNode("rect", { x: from, y: 0, width: Math.max(1, to - from), height: HEIGHT, class: "brush" }));
}

function brushable(svg, one) {
  let began = null;
  const place = (event) => {
    const box = svg.getBoundingClientRect();
    return ((event.clientX - box.left) * WIDTH) / box.width;
  };
  svg.addEventListener("pointerdown", (event) => {
    began = place(event);
    svg.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  svg.addEventListener("pointermove", (event) => {
    if (began === null || Math.abs(place(event) - began) < 3) return;
    const { value } = axis(one);
    const ends = [began, place(event)].sort((a, b) => a - b).map((at) => Number(value(at).toPrecision(4)));
    state.ranges = { ...state.ranges, [one.name]: ends };
    drawBrush(svg, one);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    svg.addEventListener(name, (event) => {
      const moved = began !== null && Math.abs(place(event) - began) >= 3;
      began = null;
      if (name === "pointerup") setRange(one.name, moved ? state.ranges[one.name] : undefined);
    });
  }
}

function lineText(line) {
  const named = line.name ? `${line.name}, ` : "";
  const side = line.rejects === "below" ? (line.inclusive ? "\u2264" : "<") : line.inclusive ? "\u2265" : ">";
  return [`${side} ${number(line.at)}`, `${named}filter ${line.filter}: `, `${grouped(line.rejected)} rejected`, `, ${grouped(line.admitted)} pass`];
}

function rangeFields(name) {
  const fields = make("div", "limits");
  const range = state.ranges[name] || [null, null];
  ["least", "most"].forEach((word, i) => {
    const input = make("input");
    input.type = "number";
    input.step = "any";
    input.placeholder = word;
    input.setAttribute("aria-label", `${word} ${name}`);
    input.value = range[i] ?? "";
    input.addEventListener("change", () => {
      const now = [...(state.ranges[name] || [null, null])];
      now[i] = input.value === "" ? null : Number(input.value);
      setRange(name, now[0] === null && now[1] === null ? undefined : now);
    });
    fields.append(input);
    if (i === 0) fields.append(make("span", "", "to"));
  });
  return fields;
}

function drawRanges(place) {
  if (place.contains(document.activeElement) && document.activeElement.tagName === "INPUT") return;
  place.replaceChildren();
  for (const name of Object.keys(state.ranges)) {
    const block = make("div", "range");
    const head = make("div", "range-head");
    head.append(make("span", "", name));
    const remove = make("button", "quiet", "\u00d7");
    remove.setAttribute("aria-label", `remove the range of ${name}`);
    remove.addEventListener("click", () => setRange(name, undefined));
    head.append(remove);
    block.append(head);
    const one = histograms.get(name);
    if (one) {
      const svg = drawing(one, el("log-counts").checked);
      drawBrush(svg, one);
      brushable(svg, one);
      block.append(svg);
    }
    block.append(rangeFields(name));
    place.append(block);
  }
}

function drawHistograms() {
  const focused = document.activeElement?.getAttribute("aria-label");
  el("histograms").replaceChildren(...data.histograms.map(histogram));
  if (!data.histograms.length) el("histograms").append(make("p", "nothing", "No filter has scored a row yet."));
  if (focused) [...el("histograms").querySelectorAll("input")].find((one) => one.getAttribute("aria-label") === focused)?.focus();
}

function histogram(one) {
  const figure = make("figure", "histogram");
  const head = make("figcaption", "", one.name);
  const missing = one.missing ? `, ${grouped(one.missing)} without` : "";
  head.append(make("span", "of", `${grouped(one.measured)} rows${missing}${one.logarithmic ? ", log axis" : ""}`));
  const svg = drawing(one, el("log-counts").checked);
  drawBrush(svg, one);
  brushable(svg, one);
  figure.append(head, svg);
  for (const line of one.thresholds) {
    const [sign, by, lost, pass] = lineText(line);
    const text = make("p", "line");
    text.append(make("b", "", sign), ` ${by}`, make("b", line.rejected ? "lost" : "", lost), pass);
    figure.append(text);
  }
  if (!one.thresholds.length) figure.append(make("p", "line none", "no threshold"));
  const foot = make("div", "foot");
  foot.append(rangeFields(one.name));
  if (state.ranges[one.name]) {
    const go = make("button", "", `show ${grouped(shown.length)} pictures`);
    go.addEventListener("click", () => change({ view: "pictures" }));
    const undo = make("button", "quiet", "clear");
    undo.addEventListener("click", () => setRange(one.name, undefined));
    foot.append(go, undo);
  }
  figure.append(foot);
  return figure;
}
