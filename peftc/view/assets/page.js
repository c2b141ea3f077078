"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const places = byId("places");
  if (places) tree(places);
  const heat = byId("heat");
  if (heat) spectra(heat);

  function tree(root) {
    const all = [...root.querySelectorAll("li")];
    const folds = [...root.querySelectorAll("details")];
    const search = byId("search"), only = byId("only"), found = byId("found");
    const before = new Map();
    const text = new Map(all.map((li) => [li, (li.firstElementChild.querySelector("summary") || li.firstElementChild).textContent.toLowerCase()]));

    byId("unfold").onclick = () => folds.forEach((fold) => { fold.open = true; });
    byId("fold").onclick = () => folds.forEach((fold) => { fold.open = false; });
    search.oninput = filter;
    if (only) only.onchange = filter;

    // A fold is put back as it was when the search is over.
    function filter() {
      const wanted = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
      if (wanted.length && !before.size) folds.forEach((fold) => before.set(fold, fold.open));
      if (!wanted.length) { before.forEach((open, fold) => { fold.open = open; }); before.clear(); }
      const hits = wanted.length ? all.filter((li) => wanted.every((word) => hit(li, word))) : [];
      const shown = new Set(wanted.length ? [] : all);
      for (const li of hits) {
        li.querySelectorAll("li").forEach((inner) => shown.add(inner));
        for (let up = li; up && root.contains(up); up = up.parentElement.closest("li")) {
          shown.add(up);
          if (up !== li) up.firstElementChild.open = true;
        }
      }
      const keep = only && only.checked ? (only.value === "differs" ? (li) => li.classList.contains("differs") : (li) => !li.classList.contains("idle")) : () => true;
      all.forEach((li) => { li.hidden = !shown.has(li) || !keep(li); });
      // Of places inside of each other the outer one is a name for all of them.
      const inner = hits.filter((li) => !li.hidden && !hits.some((other) => other !== li && li.contains(other)));
      found.value = wanted.length ? (inner.length === 1 ? "1 place" : inner.length + " places") : "";
    }
    function hit(li, word) {
      return text.get(li).includes(word) || li.dataset.p.toLowerCase().includes(word) || within(li.dataset.p.toLowerCase().split("."), word.split("."));
    }
    // Whether "layers.17.q" is in "layers.{0–79}.q_proj": the first part may begin earlier, the last one end later.
    function within(path, parts) {
      const last = parts.length - 1;
      const fits = (own, part, at) => own.startsWith("{") ? ranges(own, part)
        : at === 0 && at === last ? own.includes(part) : at === 0 ? own.endsWith(part) : at === last ? own.startsWith(part) : own === part;
      return path.some((_, from) => from + last < path.length && parts.every((part, at) => fits(path[from + at], part, at)));
    }
    function ranges(own, part) {
      if (!/^\d+$/.test(part)) return part === "";
      return own.slice(1, -1).split(",").some((run) => {
        const ends = run.split("–").map(Number);
        return ends[0] <= part && part <= ends[ends.length - 1];
      });
    }

    root.onkeydown = (event) => {
      const at = event.target.closest("summary");
      if (!at || event.altKey || event.ctrlKey || event.metaKey) return;
      const seen = [...root.querySelectorAll("summary")].filter((one) => one.checkVisibility());
      const here = seen.indexOf(at), fold = at.parentElement;
      const up = fold.parentElement.parentElement.closest("details");
      const go = { ArrowDown: () => seen[here + 1], ArrowUp: () => seen[here - 1], Home: () => seen[0], End: () => seen[seen.length - 1],
        ArrowRight: () => (fold.open ? fold.querySelector(":scope > ul summary") : void (fold.open = true)),
        ArrowLeft: () => (fold.open ? void (fold.open = false) : up && up.querySelector("summary")) }[event.key];
      if (!go) return;
      event.preventDefault();
      const to = go();
      if (to) to.focus();
    };
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(event.target.tagName)) { event.preventDefault(); search.focus(); }
      if (event.key === "Escape" && event.target === search && search.value) { search.value = ""; filter(); }
    });
  }

  function spectra(root) {
    const data = JSON.parse(byId("spectra").textContent), panel = byId("spectrum");
    const cells = [...root.querySelectorAll("button")];
    const digits = (value) => String(Number(value.toPrecision(3)));
    const make = (name, attributes, space = "http://www.w3.org/1999/xhtml") => {
      const made = document.createElementNS(space, name);
      Object.entries(attributes).forEach(([key, value]) => { if (key === "text") made.textContent = value; else made.setAttribute(key, value); });
      return made;
    };

    function choose(cell) {
      cells.forEach((one) => { one.setAttribute("aria-pressed", one === cell); one.tabIndex = one === cell ? 0 : -1; });
      const [name, norm, rank, values] = data[cell.dataset.n];
      const squares = values.map((value) => value * value), all = squares.reduce((sum, one) => sum + one, 0);
      let most = 0, sum = 0;
      while (most < values.length && sum < 0.9 * all) sum += squares[most++];
      const told = "‖ΔW‖ " + digits(norm) + ", effective rank " + digits(rank) + " of " + values.length
        + (all ? "; 90 % of the squared norm in the first " + most : "");
      const svg = make("svg", { viewBox: "0 0 " + 10 * values.length + " 100", preserveAspectRatio: "none", role: "img",
        "aria-label": values.length + " singular values, from " + digits(values[0]) + " to " + digits(values[values.length - 1]) }, "http://www.w3.org/2000/svg");
      values.forEach((value, at) => {
        const height = values[0] ? 100 * value / values[0] : 0;
        svg.append(make("rect", { x: 10 * at + 1, y: 100 - height, width: 8, height }, svg.namespaceURI));
      });
      const axis = make("p", { class: "axis", "aria-hidden": "true" });
      axis.append(make("span", { text: "σ₁ = " + digits(values[0]) }), make("span", { text: "σ" + [...String(values.length)].map((digit) => "₀₁₂₃₄₅₆₇₈₉"[digit]).join("") + " = " + digits(values[values.length - 1]) }));
      const list = make("details", { class: "more" });
      list.append(make("summary", { text: "The singular values" }), make("p", { text: values.map(digits).join(", ") }));
      panel.replaceChildren(make("h3", { text: name }), make("p", { text: told }), svg, axis, list);
    }

    root.onclick = (event) => { const cell = event.target.closest("button"); if (cell) choose(cell); };
    root.onkeydown = (event) => {
      const cell = event.target.closest("button");
      if (!cell) return;
      const td = cell.parentElement, tr = td.parentElement;
      const beside = (from, step) => { let to = from; do { to = to && to[step]; } while (to && !to.querySelector("button")); return to; };
      const above = (step) => {
        let row = tr;
        do { row = row[step]; } while (row && !(row.cells[td.cellIndex] && row.cells[td.cellIndex].querySelector("button")));
        return row && row.cells[td.cellIndex];
      };
      const inRow = [...tr.querySelectorAll("button")];
      const to = { ArrowRight: () => beside(td, "nextElementSibling"), ArrowLeft: () => beside(td, "previousElementSibling"),
        ArrowDown: () => above("nextElementSibling"), ArrowUp: () => above("previousElementSibling"),
        Home: () => inRow[0].parentElement, End: () => inRow[inRow.length - 1].parentElement }[event.key];
      if (!to) return;
      event.preventDefault();
      const next = to() && to().querySelector("button");
      if (next) { next.focus(); choose(next); }
    };
    // The largest change comes first to one's eye.
    choose(cells.reduce((best, cell) => (data[cell.dataset.n][1] > data[best.dataset.n][1] ? cell : best)));
  }
})();
