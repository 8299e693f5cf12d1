// Draws the curves of reinforcement from the data embedded in the page. Names of runs reach plotly through escaped().
((page) => {
  "use strict";
  const { report, all, css, draw, escaped, isDark, touch } = page;
  const looks = {
    reward: { format: ".3~f", unit: "", zero: false },
    delta: { format: "+.3~g", unit: " nats", zero: true },
    selected: { format: ".1%", unit: "", zero: false, axis: { tickformat: ".0%", rangemode: "tozero" } },
  };

  function traces(curve, look) {
    const colour = curve[isDark() ? "dark" : "light"];
    const known = curve.steps.map((_, i) => i).filter((i) => curve.low[i] !== null && curve.high[i] !== null);
    const band = {
      type: "scatter", mode: "lines", fill: "toself", fillcolor: colour + "22", line: { width: 0, color: colour }, hoverinfo: "skip",
      x: [...known, ...[...known].reverse()].map((i) => curve.steps[i]),
      y: [...known.map((i) => curve.low[i]), ...[...known].reverse().map((i) => curve.high[i])],
    };
    const interval = known.length ? `<br>95 %: %{customdata[0]:${look.format}} … %{customdata[1]:${look.format}}` : "";
    const line = {
      type: "scatter", mode: "lines+markers", x: curve.steps, y: curve.mean, meta: { run: curve.run },
      customdata: curve.steps.map((_, i) => [curve.low[i], curve.high[i]]),
      line: { color: colour, dash: curve.dash, width: curve.width },
      marker: { color: colour, symbol: curve.symbol, size: 7, maxdisplayed: 12, line: { color: css("--ground"), width: 1 } },
      hovertemplate: `<b>${escaped(curve.run)}</b><br>step %{x}: %{y:${look.format}}${look.unit}${interval}<extra></extra>`,
    };
    return known.length > 1 ? [band, line] : [line];
  }

  function drawAll() {
    for (const element of all("[data-rollouts]")) {
      const name = element.dataset.rollouts, look = looks[name];
      const curves = report.rollouts.filter((curve) => curve.panel === name);
      const drawn = curves.map((curve) => traces(curve, look)); // bands lie below all lines
      const steps = [...new Set(curves.flatMap((curve) => curve.steps))];
      draw(element, [...drawn.flatMap((own) => own.slice(0, -1)), ...drawn.map((own) => own.at(-1))], {
        margin: { l: 52, r: 10, t: 8, b: 40 }, dragmode: touch.matches ? false : "zoom",
        xaxis: { title: { text: "optimizer step", standoff: 6 }, ...(steps.length <= 6 ? { tickvals: steps } : { nticks: 7 }) },
        yaxis: { nticks: 6, zeroline: look.zero, zerolinewidth: 1.2, ...look.axis },
      });
    }
  }
  document.addEventListener("draw", drawAll);
  drawAll();
})(page);
