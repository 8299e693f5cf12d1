// Finds probes by family, run and text, and lists the first of them. Untrusted text reaches the DOM through textContent.
((page) => {
  "use strict";
  const PAGE = 50, EXCERPT = 90;
  const { made } = page;
  const { show, swatch, nats } = page.probeParts;
  const form = document.getElementById("finder");
  const list = document.getElementById("finder-list");
  const count = document.getElementById("finder-count");
  const more = document.getElementById("finder-more");
  const orders = {
    moved: (one, other) => Math.abs(other.change) - Math.abs(one.change),
    fell: (one, other) => one.change - other.change,
    rose: (one, other) => other.change - one.change,
    log: (one, other) => one.place - other.place,
  };
  let probes = [], found = [], listed = PAGE, current = -1, pending = 0;

  const oneLine = (text) => text.replace(/\s+/g, " ").trim();
  const asked = (text) => oneLine(("\n" + text).split("\nuser: ").at(-1)); // of a chat, what the user said last

  // One line of a text: around the match where there is one, else its beginning.
  function excerpt(text, sought) {
    const line = oneLine(text), low = line.toLowerCase();
    const at = sought && low.length === line.length ? low.indexOf(sought) : -1; // rare capitals change their length
    if (at < 0) return [line.slice(0, EXCERPT) + (line.length > EXCERPT ? "…" : "")];
    const start = Math.max(0, at - 24), end = at + sought.length;
    return [(start ? "…" : "") + line.slice(start, at), made("mark", "", line.slice(at, end)), line.slice(end, end + EXCERPT)];
  }

  function row(probe, sought) {
    const change = made("strong", probe.change < 0 ? "change fell" : "change", nats(probe.change));
    const whole = probe.low.prompt.includes(sought) ? probe.prompt : asked(probe.prompt);
    const option = made("div", "found-probe",
      made("span", "found-head", swatch(probe.family), made("span", "found-family", probe.family), ...(severalRuns ? [made("span", "found-run", probe.run)] : []), change),
      made("span", "found-line", ...excerpt(sought ? whole : asked(probe.prompt), sought)),
      made("span", "found-line answer", ...excerpt(probe.response, sought)));
    option.role = "option";
    option.dataset.place = probe.place;
    option.setAttribute("aria-selected", String(probe.place === current));
    return option;
  }

  let severalRuns = false;
  function render() {
    const sought = oneLine(form.elements.text.value.toLowerCase());
    list.replaceChildren(...found.slice(0, listed).map((probe) => row(probe, sought)));
    const told = found.length === probes.length ? `${probes.length.toLocaleString("en")} probes` : `${found.length.toLocaleString("en")} of ${probes.length.toLocaleString("en")} probes`;
    const cut = found.length > listed ? `; the first ${listed} are listed` : "";
    count.textContent = `${told}${cut}.`;
    more.hidden = found.length <= listed;
    page.rove(list, (option) => show(probes[Number(option.dataset.place)]), ["ArrowUp", "ArrowDown"]);
  }

  function find() {
    const { text, family, run, order } = form.elements;
    const sought = oneLine(text.value.toLowerCase());
    found = probes.filter((probe) => (!family.value || probe.family === family.value) && (!run?.value || probe.run === run.value)
      && (!sought || probe.low.prompt.includes(sought) || probe.low.response.includes(sought)));
    const finite = found.filter((probe) => probe.change !== null), not = found.filter((probe) => probe.change === null);
    found = order.value === "log" ? found : [...finite.sort(orders[order.value]), ...not];
    listed = PAGE;
    list.scrollTop = 0;
    render();
  }

  const soon = () => { cancelAnimationFrame(pending); pending = requestAnimationFrame(find); };
  form.addEventListener("input", soon);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.text.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown") return;
    event.preventDefault();
    list.querySelector("[tabindex='0']")?.focus();
  });
  more.addEventListener("click", () => {
    const first = listed;
    listed += PAGE;
    render();
    list.children[first]?.focus();
  });
  document.addEventListener("probe-shown", (event) => {
    current = event.detail.place;
    for (const option of list.children) option.setAttribute("aria-selected", String(Number(option.dataset.place) === current));
  });

  page.pending.push(page.probes.then((index) => {
    // one text per distinct prompt or response, on one line and in lower case, for the search
    const low = new Map(index.texts.map((text) => [text, oneLine(text.toLowerCase())]));
    probes = index.probes;
    for (const probe of probes) probe.low = { prompt: low.get(probe.prompt), response: low.get(probe.response) };
    severalRuns = index.runs.length > 1;
    current = index.first;
    find();
  }));
})(page);
