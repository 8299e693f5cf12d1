// Shows one probe: its texts, the heat-map of its tokens, the numbers of one token. Untrusted text reaches the DOM
// through textContent alone, and plotly through escaped().
((page) => {
  "use strict";
  const { css, draw, escaped, touch } = page;
  const by = (id) => document.getElementById(id);
  const box = by("heatmap");
  const shown = { probe: null, tokens: null, limit: 1, chosen: null, bound: false, ticket: 0 };

  const made = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children); // strings become text nodes, never markup
    return element;
  };
  const pictures = { " ": "·", "\n": "↵", "\t": "⇥" };
  const label = (token, longest = 14) => {
    const chars = [...token.replace(/[ \n\t]/g, (char) => pictures[char])];
    return chars.length > longest ? chars.slice(0, longest - 1).join("") + "…" : chars.join("");
  };
  const swatch = (family) => page.all("#curve-legend [data-family]")
    .find((button) => button.dataset.family === family)?.querySelector(".swatch").cloneNode(true) ?? "";
  const nats = (value) => (value === null ? "not finite" : `${page.nats(value)} nats`);
  const digits = () => Math.max(2, Math.ceil(-Math.log10(shown.tokens.resolution)));
  const plain = (value) => (value === null ? "–" : value.toFixed(digits()).replace("-", "−"));
  const signed = (value) => (value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits()));
  const grouped = new Intl.NumberFormat("en");
  const ranked = (rank) => (rank === 0 ? "–" : rank > 10 ? `≈${grouped.format(rank)}` : String(rank));

  // ---- the numbers of the probe that is shown
  function changes(logp) {
    return logp.map((row) => row.map((value, m) => (value === null || logp[0][m] === null ? null : value - logp[0][m])));
  }
  function limitOf(change, resolution) { // the 98th percentile, as in TokenHistory.limit
    const sizes = change.flat().filter((value) => value !== null).map(Math.abs).sort((one, other) => one - other);
    return sizes.length ? Math.max(sizes[Math.floor(0.98 * (sizes.length - 1))], resolution) : 1;
  }

  // ---- texts
  function showText() {
    const { probe, tokens } = shown;
    by("probe-title").replaceChildren(swatch(probe.family), probe.family, " in ", probe.run, made("span", "change", nats(probe.change)));
    by("probe-prompt").textContent = probe.prompt;
    const response = by("probe-response");
    response.tabIndex = tokens ? -1 : 0;
    if (!tokens) { response.textContent = probe.response; return; }
    const change = shown.change.at(-1);
    const list = made("div", "tokens", ...tokens.tokens.map((token, m) => {
      const share = change[m] === null ? 0 : Math.max(-1, Math.min(1, change[m] / shown.limit));
      const span = made("span", share < -0.2 ? "token fell" : "token", token);
      span.role = "option";
      span.dataset.m = m;
      span.title = change[m] === null ? "not finite" : `${signed(change[m])} nats`;
      span.setAttribute("aria-label", `${label(token, 40)}, ${change[m] === null ? "not finite" : `${signed(change[m])} nats`}`);
      span.style.backgroundColor = `rgb(var(${share < 0 ? "--fell-rgb" : "--rose-rgb"}) / ${Math.abs(share) * 0.5})`;
      return span;
    }));
    list.role = "listbox";
    list.setAttribute("aria-label", "Tokens of the response");
    list.setAttribute("aria-orientation", "horizontal");
    response.replaceChildren(list);
    page.rove(list, (option) => chooseToken(Number(option.dataset.m)), ["ArrowLeft", "ArrowRight"]);
  }

  function showKin() { // the other responses to this prompt, and this probe in the other runs
    const { probe, index } = shown;
    const kin = index.probes.filter((other) => other.group === probe.group);
    const twins = index.probes.filter((other) => other.id === probe.id && other.run !== probe.run);
    const button = (other, name) => {
      const element = made("button", "", name, made("span", "change", other.change === null ? "–" : nats(other.change).replace(" nats", "")));
      element.type = "button";
      if (other === probe) element.setAttribute("aria-current", "true");
      element.addEventListener("click", () => show(other));
      return element;
    };
    const row = (name, members) => {
      const group = made("div", "kin-row", made("span", "kin-name", name), ...members);
      group.role = "group";
      group.setAttribute("aria-label", name);
      return group;
    };
    const rows = [];
    if (kin.length > 1) rows.push(row("same prompt", kin.slice(0, 40).map((other) => button(other, other.family))));
    if (twins.length) rows.push(row("other runs", twins.map((other) => button(other, other.run))));
    by("probe-kin").replaceChildren(...rows);
  }

  // ---- heat-map
  const frame = () => (shown.chosen === null ? [] : [{
    type: "rect", x0: shown.chosen - 0.5, x1: shown.chosen + 0.5, yref: "paper", y0: 0, y1: 1, line: { color: css("--ink"), width: 2 },
  }]);

  function drawHeatmap() {
    const { probe, tokens, change, limit } = shown;
    by("heatmap-box").hidden = !tokens;
    if (!tokens) return;
    const { steps } = tokens, labels = tokens.tokens.map((token) => escaped(label(token)));
    const names = tokens.tokens.map((token) => escaped(label(token, 40)));
    // Paper does not scroll: there the whole response is as wide as a page, and only some tokens are named.
    const paper = "print" in document.documentElement.dataset;
    const room = paper ? Math.min(660, box.parentElement.clientWidth) : box.parentElement.clientWidth;
    const width = paper ? room : Math.max(room, 54 + 22 * labels.length);
    const every = Math.ceil((14 * labels.length) / (width - 54));
    const named = labels.map((_, m) => m).filter((m) => m % every === 0);
    const height = Math.min(184 + Math.max(15, Math.min(26, 340 / steps.length)) * steps.length, room < 460 ? 504 : 664);
    const hover = tokens.logp.map((row, s) => row.map((value, m) => [
      names[m], value === null ? "not finite" : plain(value), ranked(tokens.rank[s][m]), escaped(label(tokens.greedy[s][m], 40)),
      signed(change[s][m]),
    ]));
    box.style.width = `${width}px`;
    box.style.height = `${height}px`;
    box.setAttribute("aria-label", `Change of each token’s log-prob over training, ${probe.family} in ${probe.run}; choose a token of the response for its numbers`);
    draw(box, [{
      type: "heatmap", z: change, customdata: hover, y: steps.map(String), zmin: -limit, zmax: limit,
      colorscale: [[0, css("--fell")], [0.5, css("--tint")], [1, css("--rose")]], xgap: 1, ygap: steps.length > 40 ? 0 : 1,
      hoverongaps: false,
      // above and at the left, where it stays in sight however long the response is
      colorbar: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", ypad: 12, lenmode: "pixels", len: 230,
        thickness: 8, outlinewidth: 0, title: { text: "change of log-prob, nats", side: "top" }, tickformat: "+.2~g", nticks: 5 },
      hovertemplate: "<b>%{customdata[0]}</b>, step %{y}<br>change %{customdata[4]} nats<br>log-prob %{customdata[1]}, " +
        "rank %{customdata[2]}<br>greedy token: %{customdata[3]}<extra></extra>",
    }], {
      width, height, dragmode: false, margin: { l: 22 + 8 * Math.max(3, String(steps.at(-1)).length), r: 8, t: 66, b: 116 }, shapes: frame(),
      xaxis: { tickvals: named, ticktext: named.map((m) => labels[m]), tickangle: -60, ticklabeloverflow: "allow", showline: false,
        ticks: "", tickfont: { family: css("--mono"), size: 11, color: css("--ink") } },
      yaxis: { type: "category", autorange: "reversed", showgrid: false, nticks: 24, title: { text: "step", standoff: 4 } },
    });
    if (!shown.bound) box.on("plotly_click", (event) => chooseToken(event.points[0].x));
    shown.bound = true;
  }

  // ---- one token
  function showToken() {
    const { tokens, change, chosen } = shown;
    const options = [...by("probe-response").querySelectorAll("[role=option]")];
    options.forEach((option, m) => option.setAttribute("aria-selected", String(m === chosen)));
    if (!tokens || chosen === null) {
      by("token-detail").replaceChildren(tokens ? made("p", "note", "Choose a token, in the heat-map or in the response, for its numbers.") : "");
      return;
    }
    const last = tokens.steps.length - 1, at = (grid, s) => grid[s][chosen];
    const line = made("p", "", made("code", "", label(tokens.tokens[chosen], 40)),
      ` token ${chosen + 1} of ${tokens.tokens.length}: log-prob ${plain(at(tokens.logp, 0))} → ${plain(at(tokens.logp, last))}, `,
      made("strong", "", `${signed(at(change, last))} nats`),
      `; rank ${ranked(at(tokens.rank, 0))} → ${ranked(at(tokens.rank, last))}; greedy token at the end `,
      made("code", "", label(at(tokens.greedy, last), 40) || "–"), ".");
    const head = ["step", "log-prob", "change", "rank", "greedy token"].map((name) => {
      const cell = made("th", "", name);
      cell.scope = "col";
      return cell;
    });
    const rows = tokens.steps.map((step, s) => {
      const first = made("th", "", String(step));
      first.scope = "row";
      return made("tr", "", first, made("td", "", plain(at(tokens.logp, s))), made("td", "", signed(at(change, s))),
        made("td", "", ranked(at(tokens.rank, s))), made("td", "", made("code", "", label(at(tokens.greedy, s), 40) || "–")));
    });
    const table = made("table", "", made("thead", "", made("tr", "", ...head)), made("tbody", "", ...rows));
    by("token-detail").replaceChildren(line, made("details", "", made("summary", "", "this token at every observation"), table));
  }

  function chooseToken(m) {
    const { probe, tokens } = shown;
    if (!tokens || !(m in tokens.tokens)) return;
    shown.chosen = m;
    showToken();
    Plotly.relayout(box, { shapes: frame() });
    document.dispatchEvent(new CustomEvent("probe", { detail: { run: probe.run, probeId: probe.id, position: tokens.positions[m] } }));
  }

  // ---- one probe
  async function show(probe) {
    const ticket = ++shown.ticket;
    const tokens = probe.block > 0 ? await page.unpack.tokens(shown.index, probe) : null;
    if (ticket !== shown.ticket) return; // another one was asked for meanwhile
    const change = tokens && changes(tokens.logp);
    Object.assign(shown, { probe, tokens, change, limit: tokens && limitOf(change, tokens.resolution), chosen: null });
    showText();
    showKin();
    by("probe-note").textContent = tokens
      ? `Log-probs are kept to ${tokens.resolution} nats here, ranks above 10 to a tenth.`
      : "The tokens of this probe are not in this page, so there is no heat-map of it.";
    drawHeatmap();
    showToken();
    document.dispatchEvent(new CustomEvent("probe-shown", { detail: { place: probe.place } }));
  }

  function failed(error) {
    by("tokens-failed").textContent = error.message;
    by("tokens-failed").hidden = false;
    by("token-section").hidden = true;
  }

  // Shows a probe, from anywhere in the page; at a token of it where a position is given. False where there is no such probe.
  page.showProbe = async (run, probeId, position = null) => {
    await page.probes;
    const probe = shown.index?.probes.find((other) => other.run === run && other.id === probeId);
    if (!probe) return false;
    await show(probe);
    if (position !== null && shown.tokens) chooseToken(shown.tokens.positions.indexOf(position));
    by("probe").scrollIntoView({ block: "start" });
    by("probe-title").focus({ preventScroll: true });
    return true;
  };

  page.made = made;
  page.probeParts = { show: (probe) => show(probe).catch(failed), swatch, nats };
  page.probes = page.unpack.index().then(async (index) => {
    shown.index = index;
    by("token-section").hidden = false;
    if (index.probes.length) await show(index.probes[index.first]);
    return index;
  });
  page.probes.catch(failed);
  page.pending.push(page.probes);
  document.addEventListener("draw", () => { if (shown.probe) drawHeatmap(); });
})(page);
