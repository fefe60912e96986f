
"use strict";
// Draws the charts of the page from the numbers in it; where it is served, it keeps up with them.
// All that comes from a run goes into the page as text, never as markup.

const WIDTH = 560, HEIGHT = 300, LEFT = 64, RIGHT = 14, TOP = 10, BOTTOM = 44;
const MIN_POINTS_WITHOUT_DOTS = 26; // few points are measurements, and a single one is no line

let data = readData(document);
const view = { axis: data.axes[0], smoothing: 0, scale: "auto", zoom: null, cursor: null,
  hidden: new Set() };

function readData(page) {
  return JSON.parse(page.getElementById("data").textContent);
}

function add(parent, tag, attributes = {}, text = null) {
  const isDrawing = tag === "svg" || parent.namespaceURI.endsWith("svg");
  const node = isDrawing
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

// Figures, scales and smoothing: what a number looks like and where it lies.

function format(value) {
  const size = Math.abs(value);
  for (const [unit, factor] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (size >= 10 * factor || (size >= factor && value % (factor / 10) === 0)) {
      return Number((value / factor).toPrecision(4)) + unit;
    }
  }
  if (size && size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return Number(mantissa) + "e" + Number(exponent);
  }
  return String(Number(value.toPrecision(4)));
}

function formatX(value) {
  return Number.isInteger(value) ? value.toLocaleString("en") : format(value);
}

function roundStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor >= rough / power - 1e-9);
}

// Whether what lies between is no more than rounding.
function areEqual(low, high) {
  return high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high));
}

function linearScale(low, high) {
  if (areEqual(low, high)) {
    const margin = Math.abs(low) / 2 || 1;
    [low, high] = [low - margin, high + margin];
  }
  const step = roundStep((high - low) / 6);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) {
    ticks.push(i * step);
  }
  return { ticks, at: (value) => (value - low) / (high - low),
    value: (share) => low + share * (high - low) };
}

function logScale(low, high) {
  let [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  if (first === last) last++;
  const stride = Math.max(1, Math.ceil((last - first) / 6));
  const ticks = [];
  for (let i = first; i <= last; i += stride) ticks.push(10 ** i);
  if (last - first === 1) ticks.push(2 * 10 ** first, 5 * 10 ** first);
  return { ticks, at: (value) => (Math.log10(value) - first) / (last - first) };
}

function isLog(chart) {
  return view.scale === "log" || (view.scale === "auto" && chart.is_log);
}

function valueScale(chart, low, high) {
  if (isLog(chart) && low > 0) return logScale(low, high);
  const air = (high - low) * 0.05;
  const floor = low >= 0 && low <= (high - low) * 0.25 ? 0 : low - air;
  return linearScale(floor, high + air);
}

// The mean of what came before, the weights falling with the distance; unbiased at the start.
function smooth(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

// What of a series is seen: its points on the chosen axis.
function pointsOf(series) {
  const xs = series.xs[view.axis];
  if (!xs || view.hidden.has(series.group)) return null;
  const kept = [...xs.keys()].filter((i) => xs[i] !== null);
  if (!kept.length) return null;
  const pick = (values) => kept.map((i) => values[i]);
  const raw = pick(series.ys);
  const isSmooth = view.smoothing > 0 && !series.aside && !series.exact && raw.length > 1;
  return { series, xs: pick(xs), raw, ys: isSmooth ? smooth(raw, view.smoothing) : raw, isSmooth,
    low: series.low && pick(series.low), high: series.high && pick(series.high) };
}

// The last place whose x is not above the one asked for, or the next one if that is nearer.
function nearest(xs, x) {
  let [low, high] = [0, xs.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle - 1;
  }
  return low + 1 < xs.length && xs[low + 1] - x < x - xs[low] ? low + 1 : low;
}

// One chart.

let whole = [0, 1]; // the x axis without zoom
const plots = new Map(); // by title: what the cursor and the legend need to know of a drawing

function drawChart(section, chart) {
  const focused = section.contains(document.activeElement);
  section.replaceChildren(section.querySelector("h2"));
  add(section, "span", { class: "at" });
  plots.delete(chart.title);
  const curves = chart.series.map(pointsOf).filter((curve) => curve);
  const seen = curves.map((curve) => inView(chart, curve)).flat();
  if (!seen.length) {
    add(section, "p", {}, "No values to show.");
    return;
  }
  const xs = view.zoom || whole;
  const low = least(seen.map((p) => p[1])), high = most(seen.map((p) => p[2]));
  const positive = isLog(chart) ? seen.map((p) => p[1]).filter((y) => y > 0) : [];
  const xScale = linearScale(...xs);
  const yScale = valueScale(chart, positive.length ? least(positive) : low, high);
  const plot = { chart, section, curves, xScale,
    x: (value) => LEFT + xScale.at(value) * (WIDTH - LEFT - RIGHT),
    y: (value) => HEIGHT - BOTTOM - yScale.at(value) * (HEIGHT - TOP - BOTTOM) };
  plots.set(chart.title, plot);
  const svg = add(section, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0,
    "aria-label": `${chart.title}; the arrow keys read the values, plus and minus zoom` });
  plot.svg = svg;
  drawAxes(plot, yScale);
  const id = `clip-${[...plots.keys()].length}`;
  add(add(add(svg, "defs"), "clipPath", { id }), "rect", { x: LEFT - 3, y: 0,
    width: WIDTH - LEFT - RIGHT + 6, height: HEIGHT - BOTTOM + 3 });
  const inside = add(svg, "g", { "clip-path": `url(#${id})` });
  drawMarkers(plot, inside);
  for (const curve of curves) drawCurve(plot, inside, curve);
  add(svg, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  drawLegend(plot);
  listen(plot);
  if (focused) svg.focus({ preventScroll: true });
}

// From the first to the last place of any curve that is not hidden: all charts share their x axis.
function wholeX() {
  const series = data.charts.flatMap((chart) => chart.series);
  const xs = series.filter(({ group }) => !view.hidden.has(group))
    .flatMap((each) => each.xs[view.axis] || []).filter((x) => x !== null);
  return xs.length ? [least(xs), most(xs)] : [0, 1];
}

function least(values) { return values.reduce((a, b) => Math.min(a, b)); }
function most(values) { return values.reduce((a, b) => Math.max(a, b)); }

// [x, lowest, highest] of the points that the zoom leaves, and that a log axis can show.
function inView(chart, curve) {
  const points = curve.xs.map((x, i) => [x,
    curve.low && !curve.isSmooth ? curve.low[i] : Math.min(curve.ys[i], curve.raw[i]),
    curve.high && !curve.isSmooth ? curve.high[i] : Math.max(curve.ys[i], curve.raw[i])]);
  return points.filter(([x, , high]) =>
    (!view.zoom || (x >= view.zoom[0] && x <= view.zoom[1])) && (!isLog(chart) || high > 0));
}

function drawAxes(plot, yScale) {
  const { svg, chart, xScale } = plot, bottom = HEIGHT - BOTTOM;
  for (const tick of yScale.ticks) {
    const y = plot.y(tick).toFixed(1);
    add(svg, "line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y });
    add(svg, "text", { x: LEFT - 8, y: Number(y) + 4, "text-anchor": "end", class: "y" },
      format(tick));
  }
  for (const tick of xScale.ticks) {
    const x = plot.x(tick).toFixed(1);
    add(svg, "line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 });
    add(svg, "text", { x, y: bottom + 17, "text-anchor": "middle", class: "x" }, format(tick));
  }
  add(svg, "line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: bottom, y2: bottom });
  add(svg, "text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle",
    class: "axis-name" }, view.axis);
  add(svg, "text", { transform: `translate(13 ${(TOP + bottom) / 2}) rotate(-90)`,
    "text-anchor": "middle" }, chart.y_label);
}

function drawMarkers(plot, parent) {
  for (const marker of data.markers) {
    const at = marker.xs[view.axis];
    if (at === undefined || at === null || view.hidden.has(marker.group)) continue;
    const share = plot.xScale.at(at);
    if (share < 0 || share > 1) continue;
    const x = plot.x(at).toFixed(1);
    const line = add(parent, "line", { class: `marker c${marker.color}`, x1: x, x2: x, y1: TOP,
      y2: HEIGHT - BOTTOM });
    add(line, "title", {}, marker.label);
  }
}

function drawCurve(plot, parent, curve) {
  const { series, xs, raw, ys } = curve;
  const trace = (values) => {
    // A log axis has no place for what is not above 0.
    const kept = xs.map((x, i) => [plot.x(x), plot.y(values[i])]).filter((p) => isFinite(p[1]));
    return kept.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
  };
  const color = `c${series.color}`;
  if (curve.low && !curve.isSmooth) {
    const back = trace(curve.low).split(" ").reverse().join(" ");
    const kind = series.aside ? " aside" : "";
    const points = trace(curve.high) + " " + back;
    add(parent, "polygon", { class: `band ${color}${kind}`, points });
  }
  const kind = (series.dashed ? " dashed" : "") + (series.aside ? " aside" : "");
  if (curve.isSmooth) {
    add(parent, "polyline", { class: `curve raw ${color}`, points: trace(raw) });
  }
  add(parent, "polyline", { class: `curve ${color}${kind}`, points: trace(ys) });
  if (xs.length < MIN_POINTS_WITHOUT_DOTS && !series.aside) {
    for (const point of trace(raw).split(" ").filter((text) => text)) {
      const [cx, cy] = point.split(",");
      add(parent, "circle", { class: `dot ${color}`, cx, cy, r: 2.5 });
    }
  }
}

function drawLegend(plot) {
  const list = add(plot.section, "ul", { class: "legend" });
  plot.readings = [];
  for (const curve of plot.curves) {
    const { series } = curve;
    if (series.aside) continue;
    const item = add(list, "li");
    add(item, "span", { class: `swatch c${series.color}${series.dashed ? " dashed" : ""}` });
    item.append(`${series.name} `);
    plot.readings.push({ curve, node: add(item, "b") });
  }
  readOut(plot);
}

// The legend's figures: under the cursor, or the last ones.
function readOut(plot) {
  const { cursor } = view, isSet = cursor !== null;
  const line = plot.svg.querySelector(".cursor");
  const share = isSet ? plot.xScale.at(cursor) : -1;
  line.setAttribute("visibility", share >= 0 && share <= 1 ? "visible" : "hidden");
  if (isSet) {
    line.setAttribute("x1", plot.x(cursor));
    line.setAttribute("x2", plot.x(cursor));
  }
  for (const { curve, node } of plot.readings) {
    const { xs, raw, ys, low, high } = curve;
    const i = isSet ? nearest(xs, cursor) : xs.length - 1;
    let text = format(ys[i]);
    if (curve.isSmooth) text += ` (${format(raw[i])})`;
    else if (low && low[i] !== high[i]) text += ` (${format(low[i])} to ${format(high[i])})`;
    node.textContent = text;
  }
  plot.section.querySelector(".at").textContent = isSet ? `${view.axis} ${formatX(cursor)}` : "";
}

function setCursor(x) {
  view.cursor = x;
  for (const plot of plots.values()) readOut(plot);
}

function setZoom(zoom) {
  view.zoom = zoom;
  drawAll();
}

// The mouse reads and zooms, and so does the keyboard.

function listen(plot) {
  const { svg } = plot;
  const valueAt = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const share = (x - LEFT) / (WIDTH - LEFT - RIGHT);
    return plot.xScale.value(Math.min(1, Math.max(0, share)));
  };
  let from = null, chosen = null;
  svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    from = valueAt(event);
    svg.setPointerCapture(event.pointerId);
    chosen = add(svg, "rect", { class: "chosen", y: TOP, height: HEIGHT - TOP - BOTTOM, width: 0 });
  });
  svg.addEventListener("pointermove", (event) => {
    const x = valueAt(event);
    const longest = longestOf(plot);
    setCursor(longest.xs[nearest(longest.xs, x)]);
    if (chosen) {
      chosen.setAttribute("x", plot.x(Math.min(x, from)));
      chosen.setAttribute("width", Math.abs(plot.x(x) - plot.x(from)));
    }
  });
  svg.addEventListener("pointerup", (event) => {
    if (!chosen) return;
    const ends = [from, valueAt(event)].sort((a, b) => a - b);
    const isChoice = plot.x(ends[1]) - plot.x(ends[0]) > 6;
    chosen.remove();
    chosen = null;
    if (isChoice) setZoom(ends);
  });
  svg.addEventListener("pointerleave", () => { if (!chosen) setCursor(null); });
  svg.addEventListener("dblclick", () => setZoom(null));
  svg.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { xs } = longestOf(plot);
    const here = view.cursor === null ? xs.length - 1 : nearest(xs, view.cursor);
    const goals = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: xs.length - 1 };
    if (event.key in goals) {
      setCursor(xs[Math.min(xs.length - 1, Math.max(0, goals[event.key]))]);
      say(plot);
    } else if (event.key === "+" || event.key === "-") {
      zoomAround(xs[here], event.key === "+" ? 0.5 : 2, plot);
    } else if (event.key === "Escape") {
      setCursor(null);
      setZoom(null);
    } else return;
    event.preventDefault();
  });
}

function longestOf(plot) {
  const own = plot.readings.map(({ curve }) => curve);
  return (own.length ? own : plot.curves).reduce((a, b) => (b.xs.length > a.xs.length ? b : a));
}

function zoomAround(x, factor, plot) {
  const [low, high] = [plot.xScale.value(0), plot.xScale.value(1)];
  const [first, last] = whole;
  const ends = [Math.max(first, x - (x - low) * factor), Math.min(last, x + (high - x) * factor)];
  if (areEqual(...ends)) return;
  const isWhole = ends[0] === first && ends[1] === last;
  setZoom(isWhole ? null : ends);
}

// What a screen reader says of the values under the cursor.
function say(plot) {
  const values = plot.readings.map(({ curve, node }) => `${curve.series.name} ${node.textContent}`);
  document.getElementById("said").textContent =
    `${view.axis} ${formatX(view.cursor)}: ${values.join(", ")}`;
}

// The page: controls, tables that can be searched, news.

function drawAll() {
  whole = wholeX();
  for (const section of document.querySelectorAll("section.chart")) {
    const chart = data.charts.find((each) => each.title === section.dataset.key);
    if (chart) drawChart(section, chart);
  }
  const reset = document.getElementById("reset");
  if (reset) reset.disabled = view.zoom === null;
}

function choice(parent, id, label, options, onChange) {
  const select = add(add(parent, "label", {}, label), "select", { id });
  for (const option of options) add(select, "option", {}, option);
  select.addEventListener("change", () => onChange(select.value));
}

function buildControls() {
  const bar = document.createElement("nav");
  bar.id = "controls";
  bar.setAttribute("aria-label", "what the charts show");
  document.querySelector("header").after(bar);
  const row = add(bar, "div");
  if (data.axes.length > 1) {
    choice(row, "axis", "x axis", data.axes, (value) => {
      Object.assign(view, { axis: value, zoom: null, cursor: null });
      drawAll();
    });
  }
  const label = add(row, "label", {}, "smoothing");
  const slider = add(label, "input", { id: "smoothing", type: "range", min: 0, max: 0.99,
    step: 0.01, value: 0 });
  const shown = add(label, "output", {}, "0");
  slider.addEventListener("input", () => {
    view.smoothing = Number(slider.value);
    shown.textContent = slider.value;
    drawAll();
  });
  choice(row, "scale", "y axis", ["auto", "linear", "log"], (value) => {
    view.scale = value;
    drawAll();
  });
  const reset = add(row, "button", { id: "reset", type: "button", disabled: "" }, "whole x axis");
  reset.addEventListener("click", () => setZoom(null));
  add(row, "span", { id: "groups", role: "group", "aria-label": "runs" });
  add(row, "span", { id: "news", role: "status" });
  add(bar, "span", { id: "said", class: "unseen", "aria-live": "polite" });
}

// A box for each run; the colour is that of its first curve.
function buildGroups() {
  const colors = new Map();
  for (const { series } of data.charts) {
    for (const { group, color } of series) {
      if (group && !colors.has(group)) colors.set(group, color);
    }
  }
  const parent = document.getElementById("groups"), known = JSON.stringify([...colors]);
  if (parent.dataset.known === known) return; // the keyboard may be in one
  parent.dataset.known = known;
  parent.replaceChildren();
  for (const [group, color] of colors) {
    const label = add(parent, "label");
    const box = add(label, "input", { type: "checkbox" });
    box.checked = !view.hidden.has(group);
    box.addEventListener("change", () => {
      if (box.checked) view.hidden.delete(group);
      else view.hidden.add(group);
      drawAll();
    });
    add(label, "span", { class: `swatch c${color}` });
    label.append(group);
  }
}

const searches = new Map(); // by table: what was looked for

function buildSearch(section) {
  const { key } = section.dataset;
  const asked = searches.get(key) || { text: "", unlike: false };
  searches.set(key, asked);
  const row = document.createElement("div");
  row.className = "find";
  section.querySelector(".scroll").before(row);
  const box = add(add(row, "label", {}, "search"), "input", { type: "search" });
  box.value = asked.text;
  const apply = () => {
    asked.text = box.value;
    const words = box.value.toLowerCase().split(/\s+/).filter((word) => word);
    let count = 0;
    for (const line of section.querySelectorAll("tbody tr")) {
      const text = line.textContent.toLowerCase();
      line.hidden = !words.every((word) => text.includes(word)) ||
        (asked.unlike && !line.classList.contains("unlike"));
      count += !line.hidden;
    }
    found.textContent = `${count} shown`;
  };
  box.addEventListener("input", apply);
  if (section.querySelectorAll("th").length > 2) {
    const label = add(row, "label");
    const only = add(label, "input", { type: "checkbox" });
    only.checked = asked.unlike;
    label.append("differences only");
    only.addEventListener("change", () => { asked.unlike = only.checked; apply(); });
  }
  const found = add(row, "output");
  apply();
}

// Take over what is new in a fresh copy of this page, and leave alone what the reader is at.
function takeOver(fresh) {
  data = readData(fresh);
  const key = (section) => section.dataset.key;
  const [old, now] = [document, fresh].map((page) => [...page.querySelectorAll("main > section")]);
  if (old.map(key).join("\n") === now.map(key).join("\n")) {
    old.forEach((section, i) => {
      const body = section.querySelector("tbody"), news = now[i].querySelector("tbody");
      if (!body || body.textContent === news.textContent) return;
      body.replaceChildren(...news.childNodes);
      section.querySelector("input[type=search]")?.dispatchEvent(new Event("input"));
    });
  } else {
    document.querySelector("main").replaceChildren(...now);
    document.querySelectorAll("section.long").forEach(buildSearch);
  }
  if (data.charts.length) buildGroups();
  drawAll();
}

// Whether a copy is of other runs, or has axes that this page was not built for: one that was opened
// before the first figures has none.
function isAnother(fresh) {
  const [here, there] = [document, fresh].map((page) => page.querySelector("h1").textContent);
  return here !== there || data.axes.join() !== readData(fresh).axes.join();
}

async function askForNews(before) {
  const news = document.getElementById("news") || {}; // a page without charts has no place for them
  let text = before;
  if (!document.hidden) {
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      text = await answer.text();
      if (!answer.ok) throw new Error(text);
      if (text !== before) {
        const fresh = new DOMParser().parseFromString(text, "text/html");
        if (isAnother(fresh)) return location.reload();
        takeOver(fresh);
      }
      news.textContent = `live, ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      text = before;
      news.textContent = `no news: ${error.message}`;
    }
  }
  setTimeout(askForNews, data.refresh_s * 1000, text);
}

if (data.charts.length) {
  buildControls();
  buildGroups();
  drawAll();
}
document.querySelectorAll("section.long").forEach(buildSearch);
if (data.refresh_s !== null) askForNews("");
