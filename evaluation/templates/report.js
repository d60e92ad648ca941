"use strict";
// The page's tables and plots, from the JSON in #data. All text is set as text, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"]; // Okabe-Ito
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "cross"];
let DataTable, Plotly;

// --- libraries and theme ---

async function source(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), c => c.charCodeAt(0));
  const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).blob();
  return URL.createObjectURL(new Blob([text], {type: "text/javascript"}));
}

function loadScript(url) {
  return new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = url;
    script.onload = done;
    script.onerror = failed;
    document.head.append(script);
  });
}

function isDark() { return document.documentElement.classList.contains("dark"); }

function layout(more) {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text"), line = style.getPropertyValue("--line");
  const axis = {gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true};
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: text, family: "system-ui, sans-serif", size: 13},
    showlegend: window.innerWidth > 640, // on a narrow screen it would leave no room; a tap on a point names it
    margin: {t: 20, r: 15, b: 55, l: 60}, hovermode: "closest", hoverlabel: {align: "left"},
    legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom", font: {size: 12}}, ...more,
    xaxis: {...axis, ...more.xaxis}, yaxis: {...axis, ...more.yaxis},
  };
}

const config = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
const drawings = [];
function drawn(id, draw) { drawings.push(draw); draw(); }
// Plotly reads a small part of HTML in texts; data must not be read as such.
function plain(text) { return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;"); }

// --- small helpers ---

// A setting; of a number that is not whole, four significant digits.
function setting(value) { return String(typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(4)) : value); }

function fillSelect(id, options, chosen) {
  const select = byId(id);
  select.replaceChildren(...options.map(([value, label]) => new Option(label, value, false, value === chosen)));
  return select;
}

function shown(value, digits) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits)) return value.toExponential(1);
  return value.toFixed(digits);
}

function cellText(stat, digits, runs) {
  if (!stat) return "–";
  const [mean, deviation, count] = stat;
  const text = shown(mean, digits);
  const spread = deviation === null ? "" : ` ± ${text.includes("e") ? deviation.toExponential(1) : deviation.toFixed(digits)}`;
  return text + spread + (count < runs ? ` (n=${count})` : "");
}

const scoreOf = Object.fromEntries(data.scores.map(score => [score.name, score]));
const groupColors = new Map(data.groups.filter(g => !g.reference).map((g, i) => [g.id, i]));
const colorOf = group => group.reference ? "#7f7f7f" : PALETTE[groupColors.get(group.id) % PALETTE.length];
const symbolOf = group => group.reference ? "diamond-open" : SYMBOLS[Math.floor(groupColors.get(group.id) / PALETTE.length) % SYMBOLS.length];
const textCell = () => DataTable.render.text();

// --- tables ---

function settingsTable() {
  const columns = [{title: "method", data: g => g.name, render: (v, type, g) => type === "display" ? plain(v + (g.front ? " ★" : "")) : v}];
  for (const key of data.keys)
    columns.push({title: key.short, data: g => g.settings[key.name] ?? null, render: (v, type) => type === "display" ? plain(v === null ? "" : setting(v)) : v ?? ""});
  if (data.seeds > 1) columns.push({title: "seeds", data: g => g.runs});
  for (const score of data.scores)
    columns.push({
      title: plain(score.label), visible: score.main, className: "dt-right",
      data: g => g.stats[score.name] ?? null,
      render: (stat, type, g) => {
        if (type !== "display" && type !== "filter") return stat ? stat[0] : null;
        const text = plain(cellText(stat, score.digits, g.runs));
        return type === "display" && g.best.includes(score.name) ? `<b>${text}</b>` : text;
      },
    });
  new DataTable(byId("settings-table"), {
    data: data.groups, columns, order: [], paging: data.groups.length > 30, pageLength: 30, scrollX: true,
    layout: {topStart: {buttons: [{extend: "colvis", text: "Columns"}]}, topEnd: "search"},
    createdRow: (row, group) => row.classList.toggle("reference", group.reference),
  });
}

function runsTable() {
  const columns = data.run_columns.map((title, place) => ({title, data: place, render: textCell()}));
  new DataTable(byId("runs-table"), {
    data: data.run_rows, columns, order: [], paging: data.run_rows.length > 20, pageLength: 20, scrollX: true,
    layout: {topStart: null, topEnd: data.run_rows.length > 5 ? "search" : null},
  });
}

// A cell with the words that the true answer also has in <mark>.
function markedCell(text, marks) {
  const cell = document.createElement("span");
  text.split(/(\s+)/).forEach((piece, place) => {
    if (place % 2 === 0 && marks.includes(place / 2) && piece) {
      const mark = document.createElement("mark");
      mark.textContent = piece;
      cell.append(mark);
    } else cell.append(piece);
  });
  if (!text.trim()) cell.append("(empty)");
  return cell;
}

function answersTable() {
  if (!data.answers.length) return;
  byId("answers").hidden = false;
  const runs = [...new Set(data.answers.map(row => row.run))];
  const run = fillSelect("answers-run", runs.map(name => [name, name]), runs[0]);
  const split = fillSelect("answers-split", [["", "all"], ...[...new Set(data.answers.map(row => row.split))].map(name => [name, name])], "forget");
  const marked = (name, marks) => ({
    title: name, className: "text", data: name,
    render: (text, type, row) => type === "display" ? markedCell(text ?? "", row[marks] ?? []) : text ?? "",
  });
  const rowsShown = () => data.answers.filter(row => row.run === run.value && (!split.value || row.split === split.value));
  const table = new DataTable(byId("answers-table"), {
    data: rowsShown(), order: [], pageLength: 10, scrollX: true, layout: {topStart: "pageLength", topEnd: "search"},
    columns: [
      {title: "split", data: "split", render: textCell()},
      {title: "question", data: "question", className: "text", render: textCell()},
      {title: "true answer", data: "truth", className: "text", render: textCell()},
      marked("before", "before_marks"), marked("after", "after_marks"),
      {title: "recall after", data: "recall", className: "dt-right", render: (v, type) => type === "display" ? shown(v, 2) : v},
    ],
  });
  for (const select of [run, split]) select.onchange = () => table.clear().rows.add(rowsShown()).draw();
}

function picks() {
  const names = Object.keys(data.picks);
  if (!names.length) return;
  byId("picks").hidden = false;
  const run = fillSelect("picks-run", names.map(name => [name, name]), names[0]);
  const question = byId("picks-question");
  const show = () => {
    const found = data.picks[run.value][question.value];
    const head = document.createElement("tr");
    head.append(...["epoch", "reward", "answer"].map(name => Object.assign(document.createElement("th"), {textContent: name, scope: "col"})));
    const rows = found.picks.map(([epoch, reward, answer]) => {
      const row = document.createElement("tr");
      for (const text of [epoch === 0 ? "0 (before)" : epoch, shown(reward, 2), answer || "(empty)"])
        row.append(Object.assign(document.createElement("td"), {textContent: text}));
      return row;
    });
    byId("picks-table").replaceChildren(head, ...rows);
  };
  const questions = () => {
    fillSelect("picks-question", data.picks[run.value].map((row, place) => [String(place), row.question]), "0");
    show();
  };
  run.onchange = questions;
  question.onchange = show;
  questions();
}

// --- plots ---

function front(points, x, y) {
  const sign = name => scoreOf[name].better === "higher" ? 1 : scoreOf[name].better === "lower" ? -1 : 0;
  if (!sign(x) || !sign(y) || data.incomparable) return [];
  const worse = (a, b) => sign(x) * (b.x - a.x) >= 0 && sign(y) * (b.y - a.y) >= 0 && (a.x !== b.x || a.y !== b.y);
  return points.filter(p => !points.some(q => worse(p, q))).sort((a, b) => a.x - b.x);
}

function scatter() {
  const names = data.scores.map(score => [score.name, score.label]);
  const x = fillSelect("scatter-x", names, data.axes[0]), y = fillSelect("scatter-y", names, data.axes[1]);
  const references = byId("scatter-references");
  references.checked = groupColors.size < 3; // they lie far from the settings, which would look alike
  const draw = () => {
    const known = data.groups.filter(g => g.stats[x.value] && g.stats[y.value] && (references.checked || !g.reference));
    const point = g => ({x: g.stats[x.value][0], y: g.stats[y.value][0]});
    const many = known.length > 25;
    const traces = known.map(g => {
      const [mx, dx] = g.stats[x.value], [my, dy] = g.stats[y.value];
      const bar = spread => ({type: "data", array: [spread ?? 0], visible: spread !== null, color: colorOf(g), thickness: 1, width: 3});
      const settings = Object.entries(g.settings).map(([key, value]) => `${plain(key)} = ${plain(value)}`).join("<br>");
      return {
        x: [mx], y: [my], error_x: bar(dx), error_y: bar(dy), mode: "markers", type: "scatter", name: plain(g.label),
        showlegend: !many && !g.reference, marker: {size: g.front ? 13 : 9, color: colorOf(g), symbol: symbolOf(g)},
        hovertemplate: `<b>${plain(g.name)}</b><br>${settings ? settings + "<br>" : ""}${plain(scoreOf[x.value].label)}: ${plain(cellText(g.stats[x.value], scoreOf[x.value].digits, g.runs))}<br>${plain(scoreOf[y.value].label)}: ${plain(cellText(g.stats[y.value], scoreOf[y.value].digits, g.runs))}<br>runs: ${g.runs}<extra></extra>`,
      };
    });
    const annotations = known.filter(g => g.reference).map(g => ({...point(g), text: plain(g.label), showarrow: false, yshift: 14, font: {size: 12}}));
    const line = front(known.filter(g => !g.reference).map(point), x.value, y.value);
    if (line.length > 1)
      traces.unshift({x: line.map(p => p.x), y: line.map(p => p.y), mode: "lines", type: "scatter", name: "Pareto front", line: {color: "#7f7f7f", dash: "dot", width: 1.5}, hoverinfo: "skip"});
    const axis = name => ({title: {text: plain(scoreOf[name].label) + (scoreOf[name].better ? ` (better: ${scoreOf[name].better})` : "")}});
    Plotly.react("scatter", traces, layout({xaxis: axis(x.value), yaxis: axis(y.value), annotations}), config);
  };
  x.onchange = y.onchange = references.onchange = draw;
  drawn("scatter", draw);
}

function knobs() {
  const numeric = data.keys.filter(key => data.groups.filter(g => typeof g.settings[key.name] === "number").length > 1);
  if (!numeric.length) return;
  byId("knobs").hidden = false;
  const key = fillSelect("knob-key", numeric.map(k => [k.name, k.short]), numeric[0].name);
  const score = fillSelect("knob-score", data.scores.map(s => [s.name, s.label]), "unlearn_quality");
  const draw = () => {
    const lines = new Map();
    for (const g of data.groups.filter(g => typeof g.settings[key.value] === "number" && g.stats[score.value])) {
      const rest = Object.entries(g.settings).filter(([name]) => name !== key.value).map(([name, value]) => `${name.split(".").slice(1).join(".") || name}=${value}`);
      const name = [g.name, ...rest].join(", ");
      lines.set(name, [...(lines.get(name) ?? []), g]);
    }
    const traces = [...lines].map(([name, groups], i) => {
      groups.sort((a, b) => a.settings[key.value] - b.settings[key.value]);
      const stats = groups.map(g => g.stats[score.value]);
      return {
        x: groups.map(g => g.settings[key.value]), y: stats.map(s => s[0]), error_y: {type: "data", array: stats.map(s => s[1] ?? 0), thickness: 1, width: 3},
        name: plain(name), mode: "lines+markers", line: {color: PALETTE[i % PALETTE.length]}, marker: {symbol: SYMBOLS[Math.floor(i / PALETTE.length) % SYMBOLS.length], size: 8}, showlegend: lines.size <= 25,
        hovertemplate: `<b>${plain(name)}</b><br>${plain(key.value)} = %{x}<br>${plain(scoreOf[score.value].label)}: %{y:.4g}<extra></extra>`,
      };
    });
    Plotly.react("knob", traces, layout({xaxis: {title: {text: plain(key.value)}}, yaxis: {title: {text: plain(scoreOf[score.value].label)}}}), config);
  };
  key.onchange = score.onchange = draw;
  drawn("knob", draw);
}

function curves() {
  const names = [...new Set(data.curves.flatMap(run => Object.keys(run.values)))];
  if (!names.length) return;
  byId("training").hidden = false;
  const first = names.includes("unlearn_quality") ? "unlearn_quality" : names[0];
  const quantity = fillSelect("curve-quantity", names.map(name => [name, name.replaceAll("_", " ")]), first);
  const x = byId("curve-x");
  const draw = () => {
    const traces = [];
    for (const group of data.groups) { // one trace with gaps between its runs: many traces are slow
      const runs = data.curves.filter(run => run.group === group.id && quantity.value in run.values);
      if (!runs.length) continue;
      const points = runs.flatMap(run => [
        ...run.values[quantity.value].map((value, i) => [run[x.value][i], value, plain(run.label)]).filter(([, value]) => value !== null),
        [null, null, ""],
      ]);
      traces.push({
        x: points.map(p => p[0]), y: points.map(p => p[1]), text: points.map(p => p[2]), name: plain(group.label), showlegend: data.groups.length <= 25,
        mode: points.length > 200 ? "lines" : "lines+markers", line: {color: colorOf(group), width: 1.5}, marker: {size: 5, symbol: symbolOf(group)},
        hovertemplate: `<b>%{text}</b><br>${x.value} %{x:.3g}: %{y:.4g}<extra></extra>`,
      });
    }
    Plotly.react("curve", traces, layout({xaxis: {title: {text: x.selectedOptions[0].text}}, yaxis: {title: {text: plain(quantity.value.replaceAll("_", " "))}}}), config);
  };
  quantity.onchange = x.onchange = draw;
  drawn("curve", draw);
}

function distributions() {
  if (!data.distributions.length) return;
  byId("distributions").hidden = false;
  const name = fillSelect("distribution-name", data.distributions.map((d, i) => [String(i), d.title]), "0");
  const draw = () => {
    const chosen = data.distributions[Number(name.value)];
    byId("distribution-note").textContent = chosen.note;
    const traces = chosen.series.map((series, i) => {
      const style = {name: plain(series.name), line: {color: PALETTE[i % PALETTE.length], width: 2}};
      if (chosen.kind === "line") return {...style, x: series.x, y: series.y, mode: "lines+markers"};
      if (chosen.kind === "bars") return {...style, x: series.x, y: series.y, mode: "lines", line: {...style.line, shape: "hvh"}};
      const values = [...series.values].sort((a, b) => a - b); // the share of questions at or below a value
      return {...style, x: values, y: values.map((_, place) => (place + 1) / values.length), mode: "lines", line: {...style.line, shape: "hv"}};
    });
    Plotly.react("distribution", traces, layout({xaxis: {title: {text: chosen.x}, type: chosen.log ? "log" : "linear"}, yaxis: {title: {text: chosen.y}}}), config);
  };
  name.onchange = draw;
  drawn("distribution", draw);
}

// --- start ---

async function start() {
  const preference = matchMedia("(prefers-color-scheme: dark)");
  const setDark = dark => document.documentElement.classList.toggle("dark", dark);
  setDark(preference.matches);
  const redraw = () => drawings.forEach(draw => draw());
  preference.addEventListener("change", () => { setDark(preference.matches); redraw(); });
  byId("theme").onclick = () => { setDark(!isDark()); redraw(); };
  DataTable = (await import(await source("datatables"))).default;
  settingsTable();
  answersTable();
  picks();
  runsTable();
  await loadScript(await source("plotly"));
  Plotly = window.Plotly;
  scatter();
  knobs();
  curves();
  distributions();
  document.documentElement.dataset.milliseconds = String(Math.round(performance.now()));
  document.documentElement.dataset.ready = "true";
}
start();
