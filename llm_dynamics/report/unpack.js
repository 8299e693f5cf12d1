// Unpacks what token_section.py packed: the index of all probes at once, the tokens of a probe when it is asked for.
((page) => {
  "use strict";
  const lines = document.getElementById("token-data").textContent.split("\n");

  async function inflated(line) {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("This browser cannot unpack the data of this section: it has no DecompressionStream. " +
        "Chrome or Edge 80, Firefox 113, Safari 16.4 and later have it.");
    }
    const bytes = Uint8Array.from(atob(line), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function readIndex() {
    const index = JSON.parse(new TextDecoder().decode(await inflated(lines[0])));
    const { id, run, family, prompt, response, group, change, block } = index.probes;
    index.probes = id.map((_, place) => ({
      place, id: id[place], run: index.runs[run[place]], family: index.families[family[place]], group: group[place],
      prompt: index.texts[prompt[place]], response: index.texts[response[place]], change: change[place], block: block[place],
    }));
    return index;
  }

  const unzigzag = (code) => (code % 2 ? -(code + 1) / 2 : code / 2);

  // The layout is that of token_blocks.py. Numbers stay below 2^31, so that bit operations hold.
  async function readTokens(index, probe) {
    const bytes = await inflated(lines[probe.block]);
    let at = 0;
    const next = () => {
      let number = 0, shift = 0, byte;
      do { byte = bytes[at++]; number |= (byte & 127) << shift; shift += 7; } while (byte > 127);
      return number;
    };
    const many = (count) => Array.from({ length: count }, next);
    const summed = (values) => { let sum = 0; return values.map((value) => (sum += value)); };
    const [M, S, unit, nOwn, nMissed] = many(5);
    const positions = summed(many(M));
    const tokens = many(M).map((place) => index.strings[place]);
    const own = many(nOwn).map((place) => index.strings[place]);
    const resolution = index.resolutions[unit];
    const grid = () => Array.from({ length: S }, () => new Array(M)); // [step][token]
    const inOrder = (visit) => { // the first step of every token, then the later ones token by token
      for (let m = 0; m < M; m++) visit(0, m, next());
      for (let m = 0; m < M; m++) for (let s = 1; s < S; s++) visit(s, m, next());
    };
    const logp = grid(), rank = grid(), greedy = grid();
    const value = new Int32Array(M), level = new Int32Array(M);
    inOrder((s, m, code) => {
      if (code) value[m] += unzigzag(code - 1);
      logp[s][m] = code ? value[m] * resolution : null;
    });
    inOrder((s, m, code) => { level[m] += unzigzag(code); rank[s][m] = index.levels[level[m]]; });
    const missed = summed(many(nMissed));
    const named = new Map(missed.map((cell) => [cell, own[next()]]));
    for (let m = 0; m < M; m++) {
      let other = "";
      for (let s = 0; s < S; s++) {
        const guess = rank[s][m] === 1 ? tokens[m] : other;
        greedy[s][m] = named.get(m * S + s) ?? guess;
        if (greedy[s][m] !== tokens[m]) other = greedy[s][m];
      }
    }
    return { positions, tokens, resolution, steps: index.steps[probe.run], logp, rank, greedy };
  }

  page.unpack = { index: readIndex, tokens: readTokens };
})(page);
