"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const arrayTypes = { Float32Array, Uint16Array, Uint32Array };
  const unpack = ({ type, base64 }) => new arrayTypes[type](Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);
  const [tokenWords, tokenPieces, tokenIds, positions, entropy, surprise, tail, rest, rank, counts, listed] = [
    "token_words", "token_pieces", "token_ids", "positions", "entropy", "surprise", "tail", "rest", "rank", "counts", "listed",
  ].map((name) => unpack(data[name]));
  const [topWords, topProbs, drawCounts, drawListed, drawWords, drawTimes, drawProbs] = [
    "top_words", "top_probs", "draw_counts", "draw_listed", "draw_words", "draw_times", "draw_probs",
  ].map((name) => unpack(data[name]));
  const starts = (sizes) => sizes.reduce((sums, size, n) => ((sums[n + 1] = sums[n] + size), sums), new Uint32Array(sizes.length + 1));
  const topStarts = starts(listed);
  const drawStarts = starts(drawListed);
  const count = tokenPieces.length;

  // The alignment law: target position t is the distribution of token t + 1.
  const targetOf = new Int32Array(count).fill(-1);
  positions.forEach((position, n) => { targetOf[position + 1] = n; });

  const SCALES = {
    surprise: { values: surprise, most: 6, step: 2, meaning: "Surprise: −ln p of each token under the teacher" },
    entropy: { values: entropy, most: 6, step: 2, meaning: "Entropy: the teacher's uncertainty before each token, as a lower bound" },
  };

  // ---- words and numbers -------------------------------------------------------------------------------------------
  const whole = (number) => number.toLocaleString("en");
  const nats = (value) => value.toFixed(2);
  const percent = (share) => {
    const value = 100 * share;
    if (value >= 99.95) return "100 %";
    if (value >= 9.95) return `${value.toFixed(1)} %`;
    return value >= 0.005 ? `${value.toFixed(2)} %` : value > 0 ? "<0.01 %" : "0 %";
  };
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const SIGNS = /(␣+|⏎+|⋯|◌|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|[\u2400-\u2421])/;
  const setWord = (element, text) => {
    element.replaceChildren(...text.split(SIGNS).map((part, i) => (i % 2 ? make("span", "sign", part) : part)));
    element.title = text;
  };
  const setFigures = (list, figures) => {
    list.replaceChildren(...figures.map(([name, value, unit]) => {
      const group = make("div");
      const figure = make("dd", "", value);
      if (unit) figure.append(make("small", "", ` ${unit}`));
      group.append(make("dt", "", name), figure);
      return group;
    }));
  };
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  // ---- the head ----------------------------------------------------------------------------------------------------
  const { row, dataset } = data;
  $("dataset").textContent =
    `${dataset.teacher} · ${dataset.kept}, D = ${whole(dataset.draws)} · license ${dataset.license} · ` +
    `dataset ${dataset.id.slice(0, 12)}`;
  $("dataset").title = dataset.id;
  $("title").append(row.sample_id || "(no id)", " ", make("small", "", `row ${whole(row.index)} of ${whole(row.rows)}`));
  const summary = [["tokens", whole(row.tokens)], ["targets", whole(positions.length)]];
  if (row.media) summary.push(["images", whole(row.media)]);
  if (positions.length) {
    summary.push(
      ["mean surprise", nats(mean(surprise)), "nats"],
      ["mean entropy ≥", nats(mean(entropy)), "nats"],
      ["mean tail mass", percent(mean(tail))],
      ["top-1 correct", percent(mean(Array.from(rank, (place) => Number(place === 1))))],
    );
  }
  setFigures($("summary"), summary);
  if (row.metadata) {
    $("metadata").hidden = false;
    $("metadata").querySelector("pre").textContent = row.metadata;
  }
  if (count < row.tokens) {
    $("cut").hidden = false;
    $("cut").textContent = `This page shows the first ${whole(count)} of ${whole(row.tokens)} tokens.`;
  }

  // ---- the text ----------------------------------------------------------------------------------------------------
  const text = $("text");
  const WORD_SPACE = /^ [^\s⏎]/;
  const tokens = Array.from(tokenPieces, (piece, i) => {
    const shown = data.pieces[piece];
    const token = make("span", "token", WORD_SPACE.test(shown) ? shown.slice(1) : shown);
    token.id = `t${i}`;
    token.role = "option";
    if (targetOf[i] < 0) token.classList.add("context");
    if (/^[\s⏎⋯∅]*$/.test(shown)) token.classList.add("blank");
    return token;
  });
  // Only pictures that the page itself holds: the policy allows no others.
  const PICTURE = /^data:image\/(?:png|jpeg|webp|gif|bmp);base64,[A-Za-z0-9+/=]+$/;
  const mediaAt = new Map(data.media.map((medium) => [medium.at, medium]));
  const boxOf = ({ label, picture }) => {
    const box = make("span", "medium");
    const source = picture === null ? "" : data.pictures[picture];
    if (PICTURE.test(source)) {
      const image = make("img");
      image.src = source;
      image.alt = "";
      box.append(image);
    }
    box.append(make("small", "", label));
    return box;
  };
  // The space before a word belongs to its token, but it is not colored: it reads as a gap. The panel shows it.
  text.append(...tokens.flatMap((token, i) => [
    ...(WORD_SPACE.test(data.pieces[tokenPieces[i]]) ? [" "] : []),
    token,
    ...(mediaAt.has(i) ? [boxOf(mediaAt.get(i))] : []),
  ]));

  const color = (by) => {
    const { values, most, step, meaning } = SCALES[by];
    document.documentElement.dataset.by = by;
    document.querySelector(`input[value="${by}"]`).checked = true;
    tokens.forEach((token, i) => {
      if (targetOf[i] >= 0) token.style.setProperty("--h", (5 + 95 * Math.min(values[targetOf[i]] / most, 1)).toFixed(1));
    });
    const ticks = Array.from({ length: most / step + 1 }, (_, i) => String(i * step));
    ticks[ticks.length - 1] += "+ nats";
    $("ticks").replaceChildren(...ticks.map((tick) => make("span", "", tick)));
    $("meaning").textContent = meaning;
  };

  // ---- the panel ---------------------------------------------------------------------------------------------------
  const newBar = () => {
    const bar = make("li", "bar");
    const track = make("span", "track");
    track.append(make("span", "fill"));
    bar.append(make("span", "word"), track, make("span", "share"));
    return bar;
  };
  const setBar = (bar, word, share, { real = false, other = false, counted = true } = {}) => {
    const [name, track, figure] = bar.children;
    if (other) name.textContent = word;
    else setWord(name, word);
    track.firstChild.style.width = `${100 * Math.min(share, 1)}%`;
    figure.textContent = percent(share);
    bar.className = `bar${real ? " real" : ""}${other ? " rest" : ""}`;
    if (counted) bar.dataset.share = share;
    else delete bar.dataset.share;
    bar.ariaLabel = `${word}, ${percent(share)}${real ? ", the actual token" : ""}`;
    return bar;
  };
  const drawsTitle = (kept) => {
    const all = whole(dataset.draws);
    if (!kept) return `None of ${all} draws fell into the tail.`;
    if (kept < dataset.kept_draws) return `${whole(kept)} of ${all} draws fell into the tail:`;
    return `The first ${whole(kept)} draws that fell into the tail, of ${all} in all:`;
  };
  const pool = [];
  const showDistribution = (n, word) => {
    const first = topStarts[n];
    while (pool.length < listed[n]) pool.push(newBar());
    for (let k = 0; k < listed[n]; k++) {
      setBar(pool[k], data.words[topWords[first + k]], topProbs[first + k], { real: rank[n] === k + 1 });
    }
    const list = $("bars");
    if (list.childElementCount !== listed[n]) list.replaceChildren(...pool.slice(0, listed[n]));
    list.scrollTop = 0;
    const others = [];
    if (counts[n] > listed[n]) {
      others.push(setBar(newBar(), `${whole(counts[n] - listed[n])} more kept`, rest[n], { other: true }));
    }
    others.push(setBar(newBar(), "tail, all other ids", tail[n], { other: true }));
    if (rank[n] === 0 || rank[n] > listed[n]) {
      const real = setBar(newBar(), data.words[word], Math.exp(-surprise[n]), { real: true, counted: false });
      real.firstChild.append(make("small", "", rank[n] ? " one of these" : " in the tail"));
      others.push(real);
    }
    $("others").replaceChildren(...others);
    $("draws").hidden = dataset.kept_draws === 0;
    $("draws-title").textContent = drawsTitle(drawCounts[n]);
    const draws = [];
    for (let i = drawStarts[n]; i < drawStarts[n + 1]; i++) {
      const draw = make("li", drawWords[i] === word ? "word real" : "word");
      setWord(draw, data.words[drawWords[i]]);
      if (drawTimes[i] > 1) draw.append(` ×${drawTimes[i]}`);
      if (drawProbs.length) draw.append(make("small", "", ` ${percent(drawProbs[i])}`));
      draws.push(draw);
    }
    $("draws-list").replaceChildren(...draws);
  };
  const place = (n) => (rank[n] ? `${whole(rank[n])} of ${whole(counts[n])}` : `not in ${whole(counts[n])}`);

  let active = -1;
  let pinned = false;
  const setPinned = (value) => {
    pinned = value;
    $("pinned").hidden = !pinned;
  };
  const activate = (i, { announce = false, reveal = false } = {}) => {
    const word = tokenWords[i];
    const n = targetOf[i];
    $("panel").hidden = false;
    if (i !== active) {
      if (active >= 0) {
        tokens[active].classList.remove("active");
        tokens[active].ariaSelected = "false";
      }
      active = i;
      tokens[i].classList.add("active");
      tokens[i].ariaSelected = "true";
      text.setAttribute("aria-activedescendant", tokens[i].id);
      $("which").textContent = `Token ${whole(i)} of ${whole(row.tokens)} · id ${tokenIds[i]}`;
      setWord($("word"), data.words[word]);
      $("none").hidden = n >= 0;
      $("distribution").hidden = n < 0;
      setFigures($("figures"), n < 0 ? [] : [
        ["probability", percent(Math.exp(-surprise[n]))],
        ["surprise", nats(surprise[n]), "nats"],
        ["entropy ≥", nats(entropy[n]), "nats"],
        ["rank", place(n)],
      ]);
      if (n >= 0) showDistribution(n, word);
    }
    if (reveal) tokens[i].scrollIntoView({ block: "nearest" });
    if (announce) {
      $("status").textContent = n < 0 ? `${data.words[word]}, context` :
        `${data.words[word]}, probability ${percent(Math.exp(-surprise[n]))}, surprise ${nats(surprise[n])} nats, ` +
        `rank ${place(n)}, entropy at least ${nats(entropy[n])} nats, tail ${percent(tail[n])}`;
    }
  };

  // ---- the pointer -------------------------------------------------------------------------------------------------
  const indexAt = (event) => {
    const token = event.target.closest(".token");
    return token ? Number(token.id.slice(1)) : -1;
  };
  let lastPoint = "";
  text.addEventListener("pointermove", (event) => {
    // Text that scrolls under a resting pointer also sends pointermove.
    const point = `${event.screenX},${event.screenY}`;
    const moved = point !== lastPoint;
    lastPoint = point;
    const i = indexAt(event);
    if (moved && !pinned && i >= 0 && event.pointerType !== "touch") activate(i);
  });
  text.addEventListener("click", (event) => {
    const i = indexAt(event);
    if (i < 0) return;
    setPinned(!(pinned && i === active));
    goal = null;
    activate(i, { announce: true, reveal: true });
  });

  // ---- the keyboard ------------------------------------------------------------------------------------------------
  let lines = null;
  let goal = null;
  new ResizeObserver(() => { lines = null; }).observe(text);
  const measure = () => {
    const origin = text.getBoundingClientRect();
    const boxes = tokens.map((token) => token.getClientRects()[0] || token.getBoundingClientRect());
    lines = [];
    boxes.forEach((box, i) => {
      const top = box.top - origin.top;
      const line = lines[lines.length - 1];
      if (!line || top > line.top + box.height / 2) lines.push({ top, tokens: [i], centers: [box.left + box.width / 2] });
      else {
        line.tokens.push(i);
        line.centers.push(box.left + box.width / 2);
      }
    });
  };
  const byLine = (step) => {
    if (!lines) measure();
    const here = lines.findIndex((line) => line.tokens[line.tokens.length - 1] >= active);
    const line = lines[Math.min(Math.max(here + step, 0), lines.length - 1)];
    goal ??= lines[here].centers[active - lines[here].tokens[0]];
    const distances = line.centers.map((center) => Math.abs(center - goal));
    return line.tokens[distances.indexOf(Math.min(...distances))];
  };
  const walks = {
    ArrowLeft: () => active - 1,
    ArrowRight: () => active + 1,
    ArrowUp: () => byLine(-1),
    ArrowDown: () => byLine(1),
    Home: () => 0,
    End: () => count - 1,
  };
  const openKeys = () => $("keys").showModal();
  const closePanel = () => {
    setPinned(false);
    $("panel").hidden = matchMedia("(max-width: 62rem)").matches;
  };
  const commands = {
    e: () => color("entropy"),
    s: () => color("surprise"),
    "?": openKeys,
    Escape: closePanel,
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    if (commands[event.key]) {
      event.preventDefault();
      commands[event.key]();
      return;
    }
    if (event.target !== text && event.target !== document.body) return;
    if (event.key === "Enter") setPinned(!pinned);
    const walk = walks[event.key];
    if (!walk) return;
    event.preventDefault();
    if (!event.key.endsWith("Up") && !event.key.endsWith("Down")) goal = null;
    activate(Math.min(Math.max(walk(), 0), count - 1), { announce: true, reveal: true });
  });

  // ---- the tools ---------------------------------------------------------------------------------------------------
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { $("theme").textContent = isDark() ? "Light" : "Dark"; };
  $("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  dark.addEventListener("change", nameTheme);
  document.querySelectorAll("input[name=by]").forEach((input) => input.addEventListener("change", () => color(input.value)));
  $("help").addEventListener("click", openKeys);
  $("close").addEventListener("click", closePanel);

  nameTheme();
  color("surprise");
  activate(positions.length ? positions[0] + 1 : 0);
})();
