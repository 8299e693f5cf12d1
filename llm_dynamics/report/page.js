// Draws the figures of the report from the data embedded in the page. Untrusted text reaches the DOM through
// textContent alone, and plotly through escaped().
const page = (() => {
  "use strict";
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const darkness = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)");
  const all = (selector) => [...document.querySelectorAll(selector)];
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const isDark = () => darkness.matches && !("print" in root.dataset);
  const colour = (family) => report.families[family][isDark() ? "dark" : "light"];
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const shortened = (text) => (text.length > 19 ? text.slice(0, 18) + "…" : text);
  // numbers as llm_dynamics/frames/numbers.py writes them
  const minus = (text) => text.replaceAll("-", "−"); // of an exponent, too
  const nats = (value) => {
    if (value === null) return "–";
    const size = Math.abs(Number(value.toPrecision(3)));
    const digits = size >= 10 || !size ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4;
    return (value > 0 ? "+" : "") + minus(size && size < 5e-5 ? value.toExponential(1) : (value || 0).toFixed(digits));
  };
  const percent = (share) => {
    if (share === null) return "–";
    const missing = Math.abs(1 - share);
    const size = Math.abs(share);
    const nines = Math.ceil(-Math.log10(missing) - 1e-6) - 1;
    const digits = missing && missing < 0.01 ? nines : size >= 1 ? 0 : size >= 0.01 ? 1 : 2;
    return minus(Number((100 * share).toFixed(digits)).toString()) + "%";
  };

  // ---- looks that all figures share, taken from the style sheet
  const axis = (more) => ({
    gridcolor: css("--grid"), linecolor: css("--zero"), zerolinecolor: css("--zero"), zeroline: false,
    tickcolor: css("--zero"), automargin: false, ...more,
  });
  const layout = ({ xaxis, yaxis, ...more }) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    dragmode: touch.matches ? false : "zoom",
    font: { family: css("--sans"), size: 12, color: css("--muted") },
    hoverlabel: { bgcolor: css("--ground"), bordercolor: css("--zero"), font: { color: css("--ink"), size: 13 }, align: "left" },
    xaxis: axis({ showgrid: false, showline: true, ticks: "outside", ticklen: 4, ...xaxis }), yaxis: axis(yaxis), ...more,
  });
  const config = { displayModeBar: false, responsive: false, doubleClick: "reset" };
  const draw = (element, traces, look) => Plotly.react(element, traces, layout(look), config);

  const painted = (trace, family, more) => ({
    ...trace,
    line: { ...trace.line, color: colour(family) },
    ...(trace.marker && { marker: { ...trace.marker, color: colour(family) } }),
    ...(trace.fillcolor && { fillcolor: colour(family) + "26" }),
    ...more,
  });
  // Ranges are set here: plotly's own would make room for the labels beside the plot.
  const extent = (traces, of = "y") => {
    const values = traces.flatMap((trace) => trace[of]).filter((value) => value !== null);
    if (!values.length) return [-1, 1];
    const low = Math.min(...values), high = Math.max(...values);
    const room = (high - low) * (of === "y" ? 0.05 : 0.025) || Math.abs(high) * 0.05 || 1;
    return [low - room, high + room];
  };

  // ---- What moved?
  const state = { scale: "change", unit: "response", band: false, hidden: new Set(), focus: null };

  function lineEnds(traces, [low, high], height, width) {
    // Names at the line ends, moved apart where they would overlap, with a leader back to the line.
    if (width < 460) return [];
    const gap = 13.5;
    const ends = traces
      .map((trace) => {
        const last = trace.y.findLastIndex((value) => value !== null);
        return last < 0 ? null : { family: trace.meta.family, x: trace.x[last], y: trace.y[last] };
      })
      .filter((end) => end && end.y >= low && end.y <= high)
      .map((end) => ({ ...end, at: ((high - end.y) / (high - low)) * height }))
      .sort((one, other) => one.at - other.at);
    ends.forEach((end, i) => { end.label = i ? Math.max(end.at, ends[i - 1].label + gap) : end.at; });
    let floor = height + 4;
    for (const end of [...ends].reverse()) { end.label = Math.min(end.label, floor); floor = end.label - gap; }
    return ends.map((end) => ({
      x: end.x, y: end.y, ax: 16, ay: end.label - end.at, xanchor: "left", yanchor: "middle", align: "left",
      text: escaped(shortened(end.family.replace(" prefix)", ")"))), font: { size: 11, color: colour(end.family) }, borderpad: 0,
      showarrow: true, arrowhead: 0, arrowwidth: 0.8, arrowcolor: colour(end.family), standoff: 4, captureevents: false,
      opacity: !state.focus || state.focus === end.family ? 1 : 0.15,
    }));
  }

  function drawCurves() {
    const key = `${state.unit}-${state.scale}`;
    const panels = all("[data-curves]").map((element) => {
      const traces = report.curves[element.dataset.curves][key]
        .filter((trace) => !state.hidden.has(trace.meta.family))
        .filter((trace) => state.band || trace.meta.role === "mean")
        .map((trace) => painted(trace, trace.meta.family, {
          visible: true, opacity: !state.focus || state.focus === trace.meta.family ? 1 : 0.12,
        }));
      return { element, traces };
    });
    const shared = state.scale === "change" ? extent(panels.flatMap((panel) => panel.traces)) : null;
    for (const { element, traces } of panels) {
      const range = shared || extent(traces);
      const margin = { l: 54, r: element.clientWidth < 460 ? 10 : 128, t: 26, b: 44 };
      const lines = traces.filter((trace) => trace.meta.role === "mean");
      draw(element, traces, {
        margin,
        xaxis: { title: { text: "optimizer step", standoff: 6 }, range: extent(lines, "x") },
        yaxis: { range, zeroline: state.scale === "change", zerolinewidth: 1.2 },
        annotations: [
          ...lineEnds(lines, range, element.clientHeight - margin.t - margin.b, element.clientWidth),
          { text: report.titles[key], xref: "paper", yref: "paper", x: 0, y: 1, xshift: -54, yshift: 8, xanchor: "left",
            yanchor: "bottom", showarrow: false },
        ],
      });
    }
  }

  function bindCurves() {
    const form = document.getElementById("curve-controls");
    const read = () => {
      const chosen = new FormData(form);
      Object.assign(state, { scale: chosen.get("scale"), unit: chosen.get("unit"), band: chosen.has("band") });
    };
    read(); // a browser may restore what was chosen before a reload
    form.addEventListener("change", () => { read(); drawCurves(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    const buttons = all("#curve-legend [data-family]");
    const show = (wanted) => {
      for (const button of buttons) {
        const shown = wanted(button.dataset.family);
        button.setAttribute("aria-pressed", String(shown));
        state.hidden[shown ? "delete" : "add"](button.dataset.family);
      }
      state.focus = null;
      drawCurves();
    };
    let pending = 0;
    const focusOn = (family) => { // leaving one button for the next costs one drawing, not two
      state.focus = family;
      cancelAnimationFrame(pending);
      pending = requestAnimationFrame(drawCurves);
    };
    for (const button of buttons) {
      const family = button.dataset.family;
      button.addEventListener("click", () => show((other) => (other === family) !== !state.hidden.has(other)));
      button.addEventListener("pointerenter", (event) => {
        if (event.pointerType === "mouse" && !state.hidden.has(family)) focusOn(family);
      });
      button.addEventListener("pointerleave", () => focusOn(null));
      button.addEventListener("focus", () => {
        if (button.matches(":focus-visible") && !state.hidden.has(family)) focusOn(family);
      });
      button.addEventListener("blur", () => focusOn(null));
    }
    for (const button of all("#curve-legend [data-show]")) {
      const main = (family) => ["chosen", "rejected"].includes(family) || family.startsWith("argmax");
      button.addEventListener("click", () => show(button.dataset.show === "all" ? () => true : main));
    }
  }

  // ---- Where did the mass go?
  function drawSqueezing() {
    const panels = all("[data-squeezing]");
    for (const element of panels) {
      const column = element.dataset.panel;
      // the same scale for every run, so that panels can be compared
      const range = extent(Object.values(report.squeezing).flatMap((run) => run[column]));
      const traces = report.squeezing[element.dataset.squeezing][column];
      draw(element, traces.map((trace) => painted(trace, trace.meta.family)), {
        margin: { l: 58, r: 8, t: 6, b: 24 }, font: { family: css("--sans"), size: 11, color: css("--muted") },
        xaxis: { nticks: 5, range: extent(traces, "x") }, yaxis: { range, nticks: 5 },
      });
    }
  }

  // ---- lists that take one tab stop: arrows, Home and End move within, Enter, space or a click chooses
  function rove(list, choose, [back, forth]) {
    const options = [...list.querySelectorAll("[role=option]")];
    const chosen = options.findIndex((option) => option.getAttribute("aria-selected") === "true");
    options.forEach((option, i) => { option.tabIndex = i === Math.max(0, chosen) ? 0 : -1; });
    const move = (to) => {
      for (const option of options) option.tabIndex = -1;
      options[to].tabIndex = 0;
      options[to].focus();
    };
    list.onkeydown = (event) => {
      const at = options.indexOf(event.target.closest("[role=option]"));
      if (at < 0) return;
      const to = { [back]: at - 1, [forth]: at + 1, Home: 0, End: options.length - 1 }[event.key];
      if (to !== undefined) move(Math.max(0, Math.min(options.length - 1, to)));
      else if (event.key === "Enter" || event.key === " ") choose(options[at]);
      else return;
      event.preventDefault();
    };
    list.onclick = (event) => {
      const at = options.indexOf(event.target.closest("[role=option]"));
      if (at < 0) return;
      move(at);
      choose(options[at]);
    };
  }

  // ---- life of the page
  const drawAll = () => { drawCurves(); drawSqueezing(); document.dispatchEvent(new Event("draw")); };
  if (!report.compares) document.querySelector("#curve-controls [value=value]").checked = true;
  bindCurves();
  darkness.addEventListener("change", drawAll);
  let pending = 0;
  window.addEventListener("resize", () => { cancelAnimationFrame(pending); pending = requestAnimationFrame(drawAll); });
  // Paper is light, whatever the screen; the style sheet reads data-print as well.
  window.addEventListener("beforeprint", () => { root.dataset.print = ""; drawAll(); });
  window.addEventListener("afterprint", () => { delete root.dataset.print; drawAll(); });
  drawAll();
  // What a part of the page has still to unpack: the page says that it is drawn when these promises are settled.
  return { report, all, css, draw, escaped, isDark, nats, percent, rove, touch, pending: [] };
})();
