// Draws influence maps: tokens of a watched response by tokens of a training response; choosing a token of the first lists
// the tokens of the second that moved it. Untrusted text reaches the DOM through textContent alone.
((page) => {
  "use strict";
  const { report, all, css } = page;
  const { made, nats, sentence, strongTokens } = page.sentences;
  const WIDTH = 20, HEIGHT = 22, HEAD = 112; // of a cell, and of the labels above; pixels, as in the style sheet
  const PAPER = 660; // pixels between the margins of A4 and of a letter
  const LISTED = 8;
  const clamped = (value) => Math.max(-1, Math.min(1, value));
  const label = (token, longest = 13) => {
    const chars = [...token.replaceAll(" ", "·")];
    return chars.length > longest ? chars.slice(0, longest - 1).join("") + "…" : chars.join("");
  };
  const added = (values) => values.reduce((sum, value) => sum + (value ?? 0), 0);
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

  function cellsOf(map) { // rows of float32, NaN where not finite
    const bytes = Uint8Array.from(atob(map.cells), (char) => char.charCodeAt(0));
    const flat = new Float32Array(bytes.buffer);
    return map.rows.map((_, r) => flat.subarray(r * map.columns.length, (r + 1) * map.columns.length));
  }

  // ---- the drawing
  const channels = (colour) => [1, 3, 5].map((place) => Number.parseInt(colour.slice(place, place + 2), 16));
  function painter() {
    const [fell, zero, rose] = ["--fell", "--tint", "--rose"].map((name) => channels(css(name)));
    return (share) => {
      const end = share < 0 ? fell : rose, part = Math.abs(clamped(share));
      return `rgb(${zero.map((value, i) => Math.round(value + part * (end[i] - value))).join(" ")})`;
    };
  }

  function paint(canvas, map, cells) {
    const width = map.columns.length * WIDTH, height = map.rows.length * HEIGHT;
    const dense = Math.min(window.devicePixelRatio || 1, Math.sqrt(12e6 / (width * height))); // phones bound a canvas
    canvas.width = Math.round(width * dense);
    canvas.height = Math.round(height * dense);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d"), colour = painter();
    context.scale(canvas.width / width, canvas.height / height);
    context.strokeStyle = css("--zero");
    cells.forEach((row, r) => row.forEach((share, c) => {
      if (Number.isNaN(share)) { // crossed out
        context.beginPath();
        context.moveTo(c * WIDTH + 4, r * HEIGHT + HEIGHT - 5);
        context.lineTo(c * WIDTH + WIDTH - 5, r * HEIGHT + 4);
        context.stroke();
        return;
      }
      context.fillStyle = colour(share / map.limit);
      context.fillRect(c * WIDTH, r * HEIGHT, WIDTH - 1, HEIGHT - 1);
    }));
  }

  function head(map) {
    const box = made("div", "map-head");
    box.style.width = `${map.columns.length * WIDTH + 62}px`; // the last label leans out
    const largest = Math.max(...map.columnSums.map(Math.abs)) || 1;
    map.columns.forEach((column, c) => {
      const name = made("span", "map-label", label(map.tokens[c]));
      const bar = made("span", map.columnSums[c] < 0 ? "map-bar fell" : "map-bar");
      name.style.left = bar.style.left = `${c * WIDTH}px`;
      bar.style.height = `${(14 * Math.abs(map.columnSums[c])) / largest}px`;
      name.title = bar.title = `${label(map.tokens[c], 40)}, token ${column + 1}: ${nats(map.columnSums[c])} nats, summed over the watched response`;
      if (c && column > map.columns[c - 1] + 1) name.classList.add("after-gap");
      box.append(name, bar);
    });
    return box;
  }

  // ---- one run
  function bind(box) {
    const article = box.closest("[data-why]"), number = Number(box.dataset.map);
    const { probes, maps } = report.why[number].maps;
    const pickProbe = article.querySelector("[data-pick=map-probe]"), pickStep = article.querySelector("[data-pick=map-step]");
    const name = article.dataset.run;
    const frame = box.querySelector(".map-frame"), panel = box.querySelector(".map-token");
    const shown = { map: null, probe: null, cells: null, row: 0, column: null, parts: null };
    const tip = made("div", "map-tip");
    tip.hidden = true;
    tip.role = "status";
    document.body.append(tip); // not into the article: a container is what "fixed" would count from

    function point(row, column, x, y) { // the cell under the pointer, or under the keyboard's
      const { map, probe, cells, parts } = shown;
      shown.column = column;
      parts.cell.hidden = tip.hidden = false;
      parts.cell.style.translate = `${column * WIDTH}px ${row * HEIGHT}px`;
      const share = cells[row][column];
      tip.replaceChildren(made("strong", "", Number.isNaN(share) ? "not finite" : `${nats(share)} nats`),
        made("span", "", "training token ", made("code", "", label(map.tokens[column], 30)), ` (${map.columns[column] + 1})`),
        made("span", "", "on watched token ", made("code", "", label(probe.tokens[map.rows[row]], 30)), ` (${map.rows[row] + 1})`));
      const { offsetWidth, offsetHeight } = tip;
      tip.style.left = `${Math.max(4, Math.min(x + 14, document.documentElement.clientWidth - offsetWidth - 4))}px`;
      tip.style.top = `${y + 18 + offsetHeight > window.innerHeight ? y - offsetHeight - 10 : y + 18}px`;
    }
    function unpoint() {
      shown.column = null;
      tip.hidden = shown.parts.cell.hidden = true;
    }
    const cellAt = (event) => {
      const place = shown.parts.canvas.getBoundingClientRect();
      const row = Math.floor((event.clientY - place.top) / HEIGHT), column = Math.floor((event.clientX - place.left) / WIDTH);
      const inside = row >= 0 && row < shown.map.rows.length && column >= 0 && column < shown.map.columns.length;
      return inside ? { row, column } : null;
    };

    function build() {
      const { map, probe, cells } = shown;
      const canvas = made("canvas"), cell = made("div", "map-cell"), line = made("div", "map-line");
      canvas.role = "img";
      canvas.setAttribute("aria-label", `What each of ${plural(map.columns.length, "training token")} did to each of ${plural(map.rows.length, "watched token")}; the list of a chosen token has the numbers`);
      cell.hidden = true;
      const body = made("div", "map-cells", canvas, line, cell);
      const rows = made("div", "map-rows", ...map.rows.map((position, r) => {
        const option = made("div", "map-row", made("code", "", label(probe.tokens[position])), made("span", "sum", nats(map.rowSums[r])));
        option.role = "option";
        option.dataset.row = r;
        option.title = `${label(probe.tokens[position], 40)}, token ${position + 1}: ${nats(map.rowSums[r])} nats by this training response`;
        option.setAttribute("aria-label", `${label(probe.tokens[position], 40)}, token ${position + 1}, ${nats(map.rowSums[r])} nats`);
        if (r && position > map.rows[r - 1] + 1) option.classList.add("after-gap");
        return option;
      }));
      rows.role = "listbox";
      rows.setAttribute("aria-label", "Tokens of the watched response; left and right go through the training tokens");
      const corner = made("div", "map-corner", made("span", "", "watched token"), made("span", "sum", "nats"));
      frame.replaceChildren(corner, head(map), rows, body);
      Object.assign(shown, { parts: { canvas, cell, line, rows }, column: null });
      const width = rows.offsetWidth + map.columns.length * WIDTH + 62; // on paper nothing scrolls: the map shrinks
      frame.style.setProperty("--on-paper", String(Math.min(1, PAPER / width)));
      tip.hidden = true;
      paint(canvas, map, cells);
      rows.querySelectorAll("[role=option]").forEach((option, r) => option.setAttribute("aria-selected", String(r === shown.row)));
      page.rove(rows, (option) => choose(Number(option.dataset.row)), ["ArrowUp", "ArrowDown"]);
      rows.addEventListener("keydown", (event) => {
        const option = event.target.closest("[role=option]");
        const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (event.key === "Escape" || event.key === "ArrowUp" || event.key === "ArrowDown") unpoint();
        if (!option || !move) return;
        event.preventDefault();
        const last = map.columns.length - 1;
        const column = shown.column === null ? (move > 0 ? 0 : last) : Math.max(0, Math.min(last, shown.column + move));
        const left = column * WIDTH - frame.clientWidth + rows.offsetWidth + 2 * WIDTH;
        if (left > frame.scrollLeft || column * WIDTH < frame.scrollLeft) frame.scrollLeft = Math.max(0, left);
        const place = canvas.getBoundingClientRect(), row = Number(option.dataset.row);
        point(row, column, place.left + column * WIDTH, place.top + row * HEIGHT);
      });
      rows.addEventListener("focusout", unpoint);
      body.addEventListener("pointermove", (event) => {
        const at = cellAt(event);
        if (at) point(at.row, at.column, event.clientX, event.clientY); else unpoint();
      });
      body.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") unpoint(); });
      body.addEventListener("click", (event) => {
        const at = cellAt(event);
        if (!at) return;
        choose(at.row);
        point(at.row, at.column, event.clientX, event.clientY); // a finger does not hover
      });
    }

    // ---- what is told of the map and of the chosen token
    function tellMap() {
      const { map, probe } = shown;
      const of = map.role ? `The ${map.role} response to ` : "The training response to ";
      const moved = [of, made("q", "", map.prompt), map.own ? " (the watched response’s own prompt)" : "", " moved the watched ",
        made("strong", "", `${probe.family} response`), " to ", made("q", "", probe.prompt), " most in step ", String(map.step), ": ",
        made("strong", "", `${nats(map.total)} nats`), " through its own gradient"];
      if (map.others !== null && map.nOthers) moved.push(`; the step’s ${plural(map.nOthers, "other training response")}: ${nats(map.others)}`);
      box.querySelector(".map-words").replaceChildren(...moved, ".");
      box.querySelector("[data-end=low]").textContent = `${nats(-map.limit)} nats, pushed down`;
      box.querySelector("[data-end=high]").textContent = `pulled up, ${nats(map.limit)}`;
      const left = [];
      if (map.leftOut) left.push(`${plural(map.leftOut, "cell")} crossed out and left out of the sums: not finite.`);
      if (map.rows.length < map.nRows) left.push(`${map.rows.length} of the ${map.nRows} watched tokens are shown.`);
      if (map.columns.length < map.nColumns) left.push(`${map.columns.length} of the ${map.nColumns} training tokens are shown.`);
      const note = box.querySelector(".map-left-out");
      note.hidden = !left.length;
      note.textContent = left.join(" ");
    }

    function sums(row) { // what moved this token, as far as it was kept
      const { map } = shown;
      const lines = [["this training response", map.rowSums[row]]];
      if (map.training) {
        if (map.nOthers) lines.push([`the step’s ${plural(map.nOthers, "other training response")}`, map.training[row] - map.rowSums[row]]);
        const rest = map.causes.map((cause) => [cause.name, cause.shares[row] ?? 0]);
        const largest = Math.max(...[...lines, ...rest].map(([, share]) => Math.abs(share)));
        const small = rest.filter(([, share]) => Math.abs(share) < 0.005 * largest);
        lines.push(...rest.filter((one) => !small.includes(one)));
        if (small.length) lines.push([small.map(([cause]) => cause).join(", "), added(small.map(([, share]) => share))]);
      }
      const body = made("tbody", "", ...lines.map(([cause, share]) => {
        const first = made("th", "", cause);
        first.scope = "row";
        return made("tr", "", first, made("td", "", nats(share)));
      }));
      if (map.measured) {
        const first = made("th", "", "measured change of this token");
        first.scope = "row";
        const last = made("tr", "last", first, made("td", "", nats(map.measured[row])));
        body.append(last);
      }
      const caption = made("caption", "unseen", "What moved this token in this step, nats");
      return made("table", "map-sums", caption, body);
    }

    function tellToken() {
      const { map, probe, cells, row } = shown;
      const position = map.rows[row], shares = cells[row];
      const ordered = [...shares.keys()].filter((c) => shares[c]).sort((one, other) => shares[one] - shares[other]);
      const down = ordered.filter((c) => shares[c] < 0), up = ordered.filter((c) => shares[c] > 0).reverse();
      const strongest = [...down.slice(0, LISTED), ...up.slice(0, LISTED)].sort((one, other) => Math.abs(shares[other]) - Math.abs(shares[one]));
      const mark = (c) => ({ place: strongest.indexOf(c) + 1, position: map.columns[c], token: map.tokens[c], share: shares[c], c: map.c[c], logp: map.logp[c] });
      const pieces = [];
      map.columns.forEach((column, c) => {
        const last = pieces.at(-1);
        const next = last && last.start + last.tokens.length === column ? last : { start: column, tokens: [], shares: [] };
        if (next !== last) pieces.push(next);
        next.tokens.push(map.tokens[c]);
        next.shares.push(Number.isNaN(shares[c]) ? null : shares[c]);
      });
      const list = (title, of) => {
        const sum = of.length ? `: ${nats(added(of.map((c) => shares[c])))} nats by ${plural(of.length, "token")}` : "";
        const part = made("div", "map-list", made("h6", "", title + sum));
        if (!of.length) part.append(made("p", "note", "None."));
        part.append(strongTokens({ marks: of.slice(0, LISTED).map(mark) }));
        if (of.length > LISTED) part.append(made("p", "note", `and ${of.length - LISTED} more: ${nats(added(of.slice(LISTED).map((c) => shares[c])))} nats.`));
        return part;
      };
      const scale = Math.abs(shares[strongest[0]] ?? 1); // the sentence's own: a weak token's is read as well as a strong one's
      const title = made("h5", "map-chosen", "What moved ", made("code", "", label(probe.tokens[position], 40)), `, token ${position + 1} of ${map.nRows}?`);
      const heading = made("p", "sentence-head", made("strong", "", `step ${map.step}`), map.role ? ` · ${map.role} response` : "");
      if (map.prompt) heading.append(" to ", made("q", "", map.prompt));
      if (map.own) heading.append(made("span", "own", "the probe’s own prompt"));
      const parts = [title, sums(row)];
      if (!map.training) parts.push(made("p", "note", "What the step’s other training responses and momentum did to this token was not kept."));
      parts.push(heading, sentence({ pieces, marks: strongest.map(mark), nTokens: map.nColumns }, scale),
        list("pushed it down", down), list("pulled it up", up));
      if (page.showProbe) {
        const over = made("button", "map-over", "this response over training");
        over.type = "button";
        over.addEventListener("click", () => page.showProbe(name, probe.id, position));
        parts.push(over);
      }
      panel.replaceChildren(...parts);
    }

    function choose(row) {
      const { parts } = shown;
      shown.row = row;
      parts.rows.querySelectorAll("[role=option]").forEach((option, r) => option.setAttribute("aria-selected", String(r === row)));
      parts.line.style.translate = `0 ${row * HEIGHT}px`;
      const top = row * HEIGHT, room = frame.clientHeight - HEAD - HEIGHT; // where it would be out of sight
      if (top < frame.scrollTop || top > frame.scrollTop + room) frame.scrollTop = Math.max(0, top - room / 2);
      tellToken();
    }

    // ---- choosing a probe and a step
    const of = (place) => maps.filter((map) => map.probe === place);
    function show(map, position = null) {
      const keep = position ?? (shown.map?.probe === map.probe ? shown.map.rows[shown.row] : null);
      const strongest = map.rowSums.reduce((best, sum, r) => (Math.abs(sum) > Math.abs(map.rowSums[best]) ? r : best), 0);
      const at = keep === null ? -1 : map.rows.indexOf(keep);
      Object.assign(shown, { map, probe: probes[map.probe], cells: cellsOf(map), row: at < 0 ? strongest : at });
      build();
      tellMap();
      choose(shown.row);
    }
    function showProbe(place, step = null, position = null) {
      const own = of(place);
      const map = own.find((other) => other.step === step) ?? own.at(-1);
      pickProbe.value = String(place);
      pickStep.replaceChildren(...own.map((other) => {
        const option = made("option", "", `${other.step} (${nats(other.total)} nats)`);
        option.value = String(other.step);
        return option;
      }));
      pickStep.value = String(map.step);
      show(map, position);
    }
    pickProbe.addEventListener("change", () => showProbe(Number(pickProbe.value), shown.map.step));
    pickStep.addEventListener("change", () => show(of(Number(pickProbe.value)).find((map) => map.step === Number(pickStep.value))));
    document.addEventListener("draw", () => paint(shown.parts.canvas, shown.map, shown.cells));
    // a token chosen elsewhere in the page: this map follows, and a way to it is offered there
    document.addEventListener("probe", ({ detail }) => {
      const place = probes.findIndex((probe) => probe.id === detail.probeId);
      if (detail.run !== name || place < 0) return;
      showProbe(place, shown.map.step, detail.position);
      const there = document.getElementById("token-detail");
      if (!there) return;
      const go = made("button", "map-over", "which training tokens moved this token?");
      go.type = "button";
      go.addEventListener("click", () => {
        box.scrollIntoView({ block: "start" });
        shown.parts.rows.querySelector("[aria-selected=true]").focus({ preventScroll: true });
      });
      there.append(go);
    });
    showProbe(0);
  }

  all("[data-map]").forEach(bind);
})(page);
