// Draws "Why did it move?" from the data embedded in the page. Untrusted text reaches the DOM through textContent
// alone, and plotly through escaped().
((page) => {
  "use strict";
  const { report, all, css, draw, escaped, isDark, touch } = page;
  const minus = (text) => text.replace("-", "−");
  const digits = (value) => (Math.abs(value) >= 10 ? 1 : Math.abs(value) >= 0.1 ? 2 : 4);
  const nats = (value) => (value === null ? "–" : (value < 0 ? "" : "+") + minus(value.toFixed(digits(value))));
  const precise = (value) => (value === null ? "–" : (value < 0 ? "" : "+") + minus(Number(value.toPrecision(2)).toString()));

  const made = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children); // strings become text nodes, never markup
    return element;
  };

  // ---- the causes, step by step
  function drawSteps(element, steps) {
    const shade = isDark() ? "dark" : "light";
    const each = steps.size > 1 ? `the ${steps.size} steps up to ` : "step ";
    const bars = steps.causes.map((cause) => ({
      type: "bar", x: steps.steps, y: cause.y, marker: { color: cause[shade], line: { width: 0 } },
      hovertemplate: `<b>${escaped(cause.name)}</b><br>${each}%{x}: %{y:+.3~g} nats<extra></extra>`,
    }));
    const few = steps.steps.length <= 40;
    const measured = {
      type: "scatter", mode: few ? "lines+markers" : "lines", x: steps.steps, y: steps.measured,
      line: { color: css("--ink"), width: 1.6 }, marker: { color: css("--ink"), size: 6, line: { color: css("--ground"), width: 1 } },
      hovertemplate: `<b>measured</b><br>${each}%{x}: %{y:+.3~g} nats<extra></extra>`,
    };
    draw(element, [...bars, measured], {
      barmode: "relative", bargap: few ? 0.25 : 0.05, margin: { l: 48, r: 8, t: 10, b: 42 },
      dragmode: touch.matches ? false : "zoom",
      xaxis: { title: { text: steps.size > 1 ? `optimizer step, ${steps.size} to a bar` : "optimizer step", standoff: 6 },
        ...(steps.steps.length <= 10 ? { tickvals: steps.steps } : { nticks: 12 }) },
      yaxis: { zeroline: true, zerolinewidth: 1.2, title: { text: "nats", standoff: 4 } },
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
        span.title = share === null ? "not finite" : `${precise(share)} nats`;
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
        made("strong", "", `${nats(mark.share)} nats`), made("span", "detail", `c ${precise(mark.c)}${pull}`));
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

  // ---- one article per run
  const runs = all("[data-why]").map((element) => ({
    element, data: report.why[Number(element.dataset.why)],
    family: element.querySelector("[data-pick=family]"), target: element.querySelector("[data-pick=target]"),
    families: [...element.querySelectorAll("[data-why-family]")],
  }));
  function drawFamily(run) {
    for (const box of run.families) {
      const name = box.dataset.whyFamily;
      box.hidden = name !== run.family.value;
      if (!box.hidden) drawSteps(box.querySelector(".why-steps"), run.data.families[name]);
    }
  }
  const drawAll = () => runs.filter((run) => run.family).forEach(drawFamily);
  for (const run of runs) {
    const show = () => showTarget(run.element, run.data.targets[Number(run.target.value)]);
    run.target?.addEventListener("change", show);
    run.family?.addEventListener("change", () => {
      drawFamily(run);
      const same = run.data.targets.findIndex((target) => target.kind !== "probe" && target.name === run.family.value);
      if (same >= 0) { run.target.value = String(same); show(); } // the tokens follow the family
    });
    if (run.target) show();
  }
  document.addEventListener("draw", drawAll);
  drawAll();
})(page);
