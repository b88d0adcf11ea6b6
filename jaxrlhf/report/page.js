"use strict";
// The page of a report: draws what is in #content, and where `jaxrlhf report --serve` serves it, what comes after.
(() => {
  const PAGE_ROWS = 50, POLL = 4000, MISSING = "–";
  let content = JSON.parse(document.getElementById("content").textContent);
  const views = new Map(), hidden = new Set();
  const state = { sort: null, down: false, shown: PAGE_ROWS, pairs: false };
  const find = (selector) => document.querySelector(selector);

  // text goes in as text, never as HTML: a response may hold anything
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : String(child))));
    return node;
  }
  const number = (value) => (typeof value !== "number" ? value : Number.isInteger(value) ? value.toLocaleString("en") : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 ? value.toLocaleString("en", { maximumSignificantDigits: 4 }) : value.toPrecision(3));
  const told = (value) => (value === null || value === undefined ? MISSING : typeof value === "object" ? JSON.stringify(value) : String(value));

  // ---- head ---------------------------------------------------------------------------------------------------------
  function drawHead() {
    document.title = `${content.title} · jaxrlhf report`;
    find("#written").textContent = (content.live ? "live, " : "") + content.written;
    find("#runs").replaceChildren(...content.runs.map((run) => make("div", { class: "run" },
      make("b", {}, run.name), ` ${run.algorithm}, step ${run.step.toLocaleString("en")}${run.iterations ? " of " + run.iterations.toLocaleString("en") : ""} `,
      make("span", { class: `state ${run.state}` }, run.state), " ", make("span", { class: "path" }, run.path))));
    find("#series").replaceChildren(...content.series.map(({ name, colour }) => {
      const button = make("button", { type: "button", "aria-pressed": !hidden.has(name) }, make("i", { style: `background:${colour}` }), name);
      button.onclick = () => { hidden.has(name) ? hidden.delete(name) : hidden.add(name); button.setAttribute("aria-pressed", !hidden.has(name)); refreshCharts(); };
      return button;
    }));
    const alarms = content.alarms || [];
    find("#alarms").hidden = !alarms.length;
    find(".alarm-key").hidden = !alarms.length;
    document.querySelectorAll(".split-key").forEach((key) => { key.hidden = content.runs.length < 2; });
    find("#alarms ul").replaceChildren(...alarms.map((alarm) => make("li", {}, content.runs.length > 1 ? make("b", {}, `${alarm.run}, `) : null, make("b", {}, `step ${alarm.step}: `), alarm.message)));
  }

  function drawGlance() {
    const several = content.runs.length > 1;
    const head = make("tr", {}, make("th", {}, "first → last"), ...content.runs.map((run) => make("th", {}, several ? run.name : "")));
    const rows = content.glance.map((row) => make("tr", {}, make("td", { title: row.meaning }, row.metric), ...row.cells.map((cell) => (cell === null ? make("td", {}, MISSING)
      : make("td", { class: "number" }, number(cell.first), make("span", { class: "arrow" }, "→"), make("b", {}, number(cell.last)), make("small", {}, cell.held_out ? "" : " training"))))));
    find("#glance table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
    find("#glance").hidden = !rows.length;
  }

  // ---- charts -------------------------------------------------------------------------------------------------------
  const rowsOf = (chart) => chart.rows.flatMap(({ same, columns }) => {
    const names = Object.keys(columns);
    return columns[names[0]].map((_, at) => ({ ...same, ...Object.fromEntries(names.map((name) => [name, columns[name][at]])) }));
  });
  const visible = (chart) => rowsOf(chart).filter((row) => !hidden.has(row.series));
  const marks = (chart) => (content.alarms || []).filter((alarm) => !hidden.has(alarm.run) && (alarm.metrics || []).includes(chart.title));
  const identity = (chart) => `${chart.kind}/${chart.title}`;

  function drawParts() {
    const open = new Map([...document.querySelectorAll("details.part")].map((part) => [part.dataset.name, part.open]));
    views.forEach((view) => view.then((shown) => shown.finalize()));
    views.clear();
    waiting.clear();
    find("#parts").replaceChildren(...content.parts.map((part) => {
      const grid = make("div", { class: "charts" });
      const box = make("details", { class: "part", "data-name": part.name }, make("summary", {}, part.name, make("small", {}, `${part.charts.length || ""}`)), grid);
      for (const chart of part.charts) {
        const place = make("div", { class: "chart", "data-chart": identity(chart) });
        grid.append(make("figure", { class: chart.kind === "win_rates" ? "wide" : "" }, make("figcaption", {}, make("b", {}, chart.title), chart.unit ? make("span", {}, ` ${chart.unit}`) : null, make("p", { title: chart.meaning }, chart.meaning || "\u00a0")), place));
      }
      box.append(...(part.tables || []).map(({ title, columns, rows }) => make("div", { class: "scroll evaluations" }, make("table", {}, make("caption", {}, title),
        make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", {}, name)))),
        make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell === null ? MISSING : number(cell))))))))));
      box.open = open.has(part.name) ? open.get(part.name) : part.open;
      part.charts.forEach((chart, index) => { waiting.set(grid.children[index].lastChild, chart); near.observe(grid.children[index].lastChild); });
      return box;
    }));
  }

  // a chart is drawn when it comes near to what is seen, or all of them before the page is printed
  const waiting = new Map();
  const near = new IntersectionObserver((seen) => seen.filter((entry) => entry.isIntersecting).forEach((entry) => drawWaiting(entry.target)), { rootMargin: "800px" });

  function drawWaiting(place) {
    near.unobserve(place);
    if (waiting.has(place) && place.isConnected) drawChart(waiting.get(place), place);
    waiting.delete(place);
  }

  function drawAll() {
    for (const place of [...waiting.keys()]) if (place.closest("details").open) drawWaiting(place);
    return Promise.all(views.values()).then((shown) => shown.length);
  }

  function drawChart(chart, place) {
    if (views.has(identity(chart))) return;
    const kind = content.specifications[chart.kind];
    const specification = { ...kind, height: chart.height || kind.height, datasets: { ...kind.datasets, rows: visible(chart), alarms: marks(chart) } };
    const options = { actions: false, logLevel: 1, // errors alone
      renderer: "svg", tooltip: { theme: "custom" }, config: { background: null, view: { stroke: null }, font: "system-ui" } };
    const drawing = vegaEmbed(place, specification, options);
    views.set(identity(chart), drawing);
    drawing.catch((error) => { place.textContent = String(error); console.error(error); });
  }

  function refreshCharts() {
    for (const part of content.parts) for (const chart of part.charts) {
      const drawing = views.get(identity(chart));
      if (!drawing) continue;
      drawing.then(({ view }) => {
        view.data("rows", visible(chart));
        if (chart.kind === "curve" || chart.kind === "share") view.data("alarms", marks(chart).map((row) => ({ ...row })));
        return view.runAsync();
      });
    }
  }

  // ---- samples ------------------------------------------------------------------------------------------------------
  const matching = (text) => { const words = find("#search").value.toLowerCase().split(/\s+/).filter(Boolean); return words.every((word) => text.toLowerCase().includes(word)); };
  const chosen = (name) => find(name).value;

  function drawChoices() {
    const fill = (selector, all, names) => {
      const select = find(selector), before = select.value;
      select.replaceChildren(make("option", { value: "" }, all), ...names.map((name) => make("option", { value: name }, name)));
      select.value = names.includes(before) ? before : "";
      select.hidden = names.length < 2;
    };
    fill("#of-run", "all runs", [...new Set(content.samples.rows.map((row) => row.run))]);
    fill("#of-split", "training and held out", [...new Set(content.samples.rows.map((row) => row.split).filter(Boolean))]);
    find("#show-pairs").hidden = !content.pairs.length;
    if (!content.pairs.length) state.pairs = false;
    find("#samples").hidden = !content.samples.rows.length;
    find("#samples .note").textContent = content.samples.notes.join("; ");
  }

  function drawSamples() {
    find("#table").hidden = state.pairs;
    find("#pairs").hidden = !state.pairs;
    find("#of-split").style.display = state.pairs ? "none" : "";
    find("#show-table").setAttribute("aria-pressed", !state.pairs);
    find("#show-pairs").setAttribute("aria-pressed", state.pairs);
    const found = state.pairs ? drawPairs() : drawTable();
    find("#more").hidden = found <= state.shown;
  }

  function compare(a, b) {
    const missing = (value) => value === null || value === undefined;
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return state.down ? -order : order;
  }

  function drawTable() {
    const { columns, rows } = content.samples;
    const shown = columns.filter((name) => name !== "run" || content.runs.length > 1);
    const kept = rows.filter((row) => (!chosen("#of-run") || row.run === chosen("#of-run")) && (!chosen("#of-split") || row.split === chosen("#of-split")) && matching(`${row.prompt} ${row.response}`));
    if (state.sort) kept.sort((a, b) => compare(a[state.sort], b[state.sort]));
    const order = (name) => (state.sort === name ? (state.down ? "descending" : "ascending") : "none");
    find("#table thead").replaceChildren(make("tr", {}, ...shown.map((name) => {
      const head = make("th", { tabindex: 0, "data-column": name, "aria-sort": order(name) }, name);
      head.onclick = () => { state.down = state.sort === name ? !state.down : ["score", "step"].includes(name) || name.startsWith("score/"); state.sort = name; drawSamples(); };
      head.onkeydown = (event) => { if (event.key === "Enter") { head.onclick(); find(`#table th[data-column="${CSS.escape(name)}"]`).focus(); } };
      return head;
    })));
    const kind = (name) => (name === "prompt" || name === "response" ? `text ${name}` : typeof name === "string" && name.startsWith("score") ? "number" : "");
    find("#table tbody").replaceChildren(...kept.slice(0, state.shown).map((row) => make("tr", {}, ...shown.map((name) => make("td", { class: kind(name), "data-name": name }, name.startsWith("score") ? (row[name] === null || row[name] === undefined ? MISSING : number(row[name])) : told(row[name]))))));
    find("#count").textContent = `${kept.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    return kept.length;
  }

  function drawPairs() {
    const joined = (pieces) => pieces.map(([, text]) => text).join("");
    const kept = content.pairs.filter((pair) => (!chosen("#of-run") || pair.run === chosen("#of-run")) && matching(`${pair.prompt} ${joined(pair.before)} ${joined(pair.after)}`));
    const side = (pair, name, tag) => {
      const score = pair[`score_${name}`];
      const label = `step ${pair["step_" + name]}${score === null || score === undefined ? "" : `, score ${number(score)}`}`;
      return make("div", { class: name }, make("small", {}, label), make("p", {}, ...pair[name].map(([changed, text]) => (changed ? make(tag, {}, text) : text))));
    };
    find("#pairs").replaceChildren(...kept.slice(0, state.shown).map((pair) => make("div", { class: "pair" },
      make("h3", {}, pair.prompt, content.runs.length > 1 ? make("small", {}, `  ${pair.run}`) : null), make("div", { class: "sides" }, side(pair, "before", "del"), side(pair, "after", "ins")))));
    find("#count").textContent = `${kept.length.toLocaleString("en")} of ${content.pairs.length.toLocaleString("en")}`;
    return kept.length;
  }

  // ---- config -------------------------------------------------------------------------------------------------------
  function drawConfig() {
    const several = content.runs.length > 1, only = several && find("#differences").checked, word = find("#search-config").value.toLowerCase();
    find("#differing").hidden = !several;
    const kept = content.config.filter((row) => (!only || row.differs) && row.key.toLowerCase().includes(word));
    const head = make("tr", {}, make("th", {}, "key"), ...content.runs.map((run) => make("th", {}, run.name)));
    const rows = kept.map((row) => make("tr", { class: several && row.differs && !only ? "differs" : "" }, make("td", {}, row.key), ...row.values.map((value) => make("td", {}, told(value)))));
    find("#config table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
    find("#count-config").textContent = `${kept.length} of ${content.config.length} keys`;
  }

  // ---- the whole ----------------------------------------------------------------------------------------------------
  const shape = (page) => JSON.stringify([page.series, page.parts.map((part) => [part.charts.map(identity), part.tables])]);

  function draw(charts) {
    drawHead();
    drawGlance();
    charts();
    drawChoices();
    drawSamples();
    drawConfig();
  }

  async function follow() {
    try {
      const answer = await fetch("content.json", { cache: "no-store" });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const before = shape(content);
      content = await answer.json();
      draw(shape(content) === before ? refreshCharts : drawParts);
    } catch (error) {
      find("#written").textContent = `no answer from the server (${error.message}); the page shows ${content.written}`;
    }
    setTimeout(follow, POLL);
  }

  const THEMES = ["auto", "light", "dark"], dark = matchMedia("(prefers-color-scheme: dark)");
  function paint() {
    const wanted = find("#theme").textContent, root = document.documentElement;
    root.classList.toggle("dark", wanted === "dark" || (wanted === "auto" && dark.matches));
    root.classList.toggle("light", !root.classList.contains("dark"));
  }
  dark.addEventListener("change", paint);
  find("#theme").onclick = () => { find("#theme").textContent = THEMES[(THEMES.indexOf(find("#theme").textContent) + 1) % THEMES.length]; paint(); };
  const again = () => { state.shown = PAGE_ROWS; drawSamples(); };
  for (const name of ["#search", "#of-run", "#of-split"]) find(name).addEventListener("input", again);
  find("#show-table").onclick = () => { state.pairs = false; again(); };
  find("#show-pairs").onclick = () => { state.pairs = true; again(); };
  find("#more").onclick = () => { state.shown += PAGE_ROWS * 4; drawSamples(); };
  find("#differences").checked = content.runs.length > 1;
  for (const name of ["#search-config", "#differences"]) find(name).addEventListener("input", drawConfig);
  paint();
  draw(drawParts);
  window.reportIsDrawn = drawAll; // for tests
  window.addEventListener("beforeprint", drawAll);
  if (content.live) setTimeout(follow, POLL);
})();
