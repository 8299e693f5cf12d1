// Draws "Why did it move?" from the data embedded in the page. Untrusted text reaches the DOM through textContent
// alone, and plotly through escaped().
((page) => {
  "use strict";
  const { report, all, css, draw, escaped, isDark, nats, percent, touch } = page;

  const made = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children); // strings become text nodes, never markup
    return element;
  };

  // ---- the causes, step by step
  const running = (values) => {
    let sum = 0;
    return values.map((value) => (sum += value ?? 0));
  };
  const inView = (steps, cumulative) => (cumulative
    ? { ...steps, causes: steps.causes.map((cause) => ({ ...cause, y: running(cause.y) })), measured: running(steps.measured) }
    : steps);

  function reach({ causes, measured, steps }) { // how far down and up the stacks and the line go
    const stacked = (sign) => steps.map((_, i) => causes.reduce((sum, { y }) => sum + Math.max(0, sign * (y[i] ?? 0)), 0));
    return [Math.min(0, ...stacked(-1).map((size) => -size), ...measured), Math.max(0, ...stacked(1), ...measured)];
  }

  function drawSteps(element, steps, [low, high], cumulative) {
    const shade = isDark() ? "dark" : "light";
    const when = cumulative ? "up to step " : steps.size > 1 ? `the ${steps.size} steps up to ` : "step ";
    const bars = steps.causes.map((cause) => ({
      type: "bar", x: steps.steps, y: cause.y, marker: { color: cause[shade], line: { width: 0 } },
      hovertemplate: `<b>${escaped(cause.name)}</b><br>${when}%{x}: %{y:+.3~g} nats<extra></extra>`,
    }));
    const few = steps.steps.length <= 40;
    const measured = {
      type: "scatter", mode: few ? "lines+markers" : "lines", x: steps.steps, y: steps.measured,
      line: { color: css("--ink"), width: 1.6 }, marker: { color: css("--ink"), size: 6, line: { color: css("--ground"), width: 1 } },
      hovertemplate: `<b>measured</b><br>${when}%{x}: %{y:+.3~g} nats<extra></extra>`,
    };
    const room = (high - low) * 0.06 || 1;
    draw(element, [...bars, measured], {
      barmode: "relative", bargap: few ? 0.25 : 0.05, margin: { l: 48, r: 8, t: 10, b: 42 },
      dragmode: touch.matches ? false : "zoom",
      xaxis: { title: { text: steps.size > 1 ? `optimizer step, ${steps.size} to a bar` : "optimizer step", standoff: 6 },
        ...(steps.steps.length <= 10 ? { tickvals: steps.steps } : { nticks: 12 }) },
      yaxis: { zeroline: true, zerolinewidth: 1.2, title: { text: "nats", standoff: 4 }, range: [low - room, high + room] },
    });
  }

  // ---- how much of each step is explained: what is missing, on a logarithmic scale upside down, so that nines are seen
  const FLOOR = 1e-8, CEILING = 1;
  function drawExplained(element, curve) {
    const missing = (share) => Math.min(CEILING, Math.max(FLOOR, 1 - share));
    const low = curve.explained.map((share, i) => share < 0.9 && !curve.hardly[i]);
    const lowest = curve.size > 1 ? `, the lowest of ${curve.size} steps` : "";
    const told = curve.steps.map((_, i) => [percent(curve.explained[i]), nats(curve.moved[i]).replace("+", "")]);
    const few = curve.steps.length <= 60;
    const traces = [{
      type: "scatter", mode: few ? "lines+markers" : "lines", x: curve.steps, y: curve.explained.map(missing), customdata: told,
      line: { color: css("--ink"), width: 1.4 },
      marker: { size: low.map((one) => (one ? 9 : 6)), symbol: low.map((one, i) => (one ? "x" : curve.hardly[i] ? "circle-open" : "circle")),
        color: low.map((one) => css(one ? "--fell" : "--ink")) },
      hovertemplate: `<b>%{customdata[0]} explained</b><br>step %{x}${lowest}<br>moved %{customdata[1]} nats<extra></extra>`,
    }];
    if (curve.gradient) traces.push({
      type: "scatter", mode: few ? "lines+markers" : "lines", x: curve.steps, customdata: curve.gradient.map((share) => percent(share)),
      y: curve.gradient.map((share) => (share === null ? null : missing(share))), line: { color: css("--muted"), width: 1.2, dash: "dot" },
      marker: { size: 5, color: css("--muted"), symbol: "diamond" },
      hovertemplate: "<b>%{customdata} by the best multiple of −grad</b><br>step %{x}<extra></extra>",
    });
    const most = Math.max(0.3, ...traces.flatMap((trace) => trace.y).filter((value) => value !== null));
    const least = Math.min(0.02, ...traces.flatMap((trace) => trace.y).filter((value) => value !== null));
    const ticks = [1, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8];
    draw(element, traces, {
      margin: { l: 92, r: 8, t: 8, b: 42 }, dragmode: touch.matches ? false : "zoom",
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0.1, y1: 0.1, line: { color: css("--fell"), width: 1.4, dash: "dash" } }],
      xaxis: { title: { text: "optimizer step", standoff: 6 }, ...(curve.steps.length <= 10 ? { tickvals: curve.steps } : { nticks: 12 }) },
      yaxis: { type: "log", range: [Math.log10(most) + 0.25, Math.log10(least) - 0.4], tickvals: ticks,
        ticktext: ticks.map((value) => (value === 1 ? "0%" : value <= FLOOR ? "all" : percent(1 - value))) },
    });
  }

  // ---- the training tokens, in their sentences
  function sentence(card, limit) {
    const places = new Map(card.marks.map((mark) => [mark.position, mark]));
    const text = made("p", "sentence");
    text.dir = "auto";
    card.pieces.forEach((piece, number) => {
      if (number || piece.start) text.append(made("span", "cut", number ? " … " : "… "));
      piece.tokens.forEach((token, place) => {
        const share = piece.shares[place];
        const mark = places.get(piece.start + place);
        const strength = share === null ? 0 : Math.max(-1, Math.min(1, share / limit));
        const word = token.trimStart() || token; // the space before a word is not tinted, so that words stay apart
        const span = made(mark ? "mark" : "span", strength < -0.3 ? "token fell" : "token", word);
        span.title = share === null ? "not finite" : `${nats(share)} nats`;
        span.style.backgroundColor = `rgb(var(${strength < 0 ? "--fell-rgb" : "--rose-rgb"}) / ${Math.abs(strength) * 0.55})`;
        text.append(token.slice(0, token.length - word.length), span);
        if (mark) text.append(made("sup", "place", String(mark.place)));
      });
    });
    const last = card.pieces.at(-1);
    if (last.start + last.tokens.length < card.nTokens) text.append(made("span", "cut", " …"));
    return text;
  }

  function strongTokens(card) {
    const list = made("ol", "strong");
    for (const mark of card.marks) {
      const pull = mark.c === null ? "" : mark.c < 0 ? ", the loss pulls it up" : mark.c > 0 ? ", the loss pushes it down" : "";
      const item = made("li", "", made("span", "place", String(mark.place)), made("code", "", mark.token.replaceAll(" ", "·")),
        made("strong", "", `${nats(mark.share)} nats`), made("span", "detail", `c ${nats(mark.c)}`, made("span", "pull", pull)));
      list.append(item);
    }
    return list;
  }

  function column(title, cards, limit) {
    const box = made("div", "why-column", made("h5", "", title));
    if (!cards.length) box.append(made("p", "note", "None."));
    for (const card of cards) {
      const head = made("p", "sentence-head", made("strong", "", `step ${card.step}`), card.role ? ` · ${card.role} response` : "");
      if (card.prompt) head.append(" to ", made("q", "", card.prompt));
      if (card.own) head.append(made("span", "own", "the probe’s own prompt"));
      box.append(made("div", "sentence-card", head, sentence(card, limit), strongTokens(card)));
    }
    return box;
  }

  function examples(title, rows) {
    const box = made("div", "why-column", made("h5", "", title));
    if (!rows.length) box.append(made("p", "note", "None."));
    const list = made("ul", "examples");
    for (const row of rows) {
      const times = row.nSteps > 1 ? `, in ${row.nSteps} steps` : "";
      list.append(made("li", "", made("strong", "nats", nats(row.share)), made("div", "",
        made("p", "sentence-head", row.role ? `${row.role} response` : "response", row.prompt ? " to " : "",
          row.prompt ? made("q", "", row.prompt) : "", times), made("p", "response", row.response))));
    }
    box.append(list);
    return box;
  }

  function showTarget(run, target) {
    const name = target.kind === "probe" ? `“${target.label}”` : target.label; // paper does not show the menu
    const parts = [made("div", "why-columns", column(`pushed ${name} down hardest`, target.down, target.limit),
      column(`pulled ${name} up hardest`, target.up, target.limit))];
    if (target.leftOut) parts.push(made("p", "note", `${target.leftOut} training tokens left out: their share is not finite.`));
    parts.push(made("h4", "", "Which training examples?"),
      made("p", "note", "Nats, summed over the tokens of the response and over the steps of which training tokens were kept."),
      made("div", "why-columns", examples(`pushed ${name} down`, target.hurting), examples(`pulled ${name} up`, target.helping)));
    run.querySelector(".why-tokens").replaceChildren(...parts);
  }

  // ---- one article per run; where there are several, they show the same family on one scale
  const runs = all("[data-why]").map((element) => ({
    element, data: report.why[Number(element.dataset.why)],
    family: element.querySelector("[data-pick=family]"), target: element.querySelector("[data-pick=target]"),
    cumulative: element.querySelector("[data-pick=cumulative]"),
    families: [...element.querySelectorAll("[data-why-family]")], explained: element.querySelector(".why-explained"),
  }));
  const steps = (run, name) => inView(run.data.families[name], run.cumulative.checked);
  function drawFamily(run) {
    for (const box of run.families) {
      const name = box.dataset.whyFamily;
      box.hidden = name !== run.family.value;
      if (box.hidden) continue;
      for (const word of box.querySelectorAll("[data-when]")) word.hidden = (word.dataset.when === "cumulative") !== run.cumulative.checked;
      const reaches = runs.filter((other) => other.family && name in other.data.families).map((other) => reach(steps(other, name)));
      const scale = [Math.min(...reaches.map(([low]) => low)), Math.max(...reaches.map(([, high]) => high))];
      drawSteps(box.querySelector(".why-steps"), steps(run, name), scale, run.cumulative.checked);
    }
  }
  const drawAll = () => {
    runs.filter((run) => run.family).forEach(drawFamily);
    runs.filter((run) => run.explained && run.data.explained).forEach((run) => drawExplained(run.explained, run.data.explained));
  };
  const show = (run) => showTarget(run.element, run.data.targets[Number(run.target.value)]);
  function follow(run, name) { // the tokens follow the family
    run.family.value = name;
    const same = run.data.targets.findIndex((target) => target.kind !== "probe" && target.name === name);
    if (run.target && same >= 0) { run.target.value = String(same); show(run); }
  }
  for (const run of runs) {
    run.target?.addEventListener("change", () => show(run));
    run.family?.addEventListener("change", () => {
      const name = run.family.value;
      for (const other of runs) if (other.family && name in other.data.families) follow(other, name);
      drawAll();
    });
    run.cumulative?.addEventListener("change", () => {
      for (const other of runs) if (other.cumulative) other.cumulative.checked = run.cumulative.checked;
      drawAll();
    });
    if (run.target) show(run);
  }
  document.addEventListener("draw", drawAll);
  drawAll();
  page.sentences = { made, nats, sentence, strongTokens };
})(page);
