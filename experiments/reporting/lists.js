"use strict";
// Tables that are sorted by a click on a column and filtered by what is typed above them: words that
// a row must hold, and comparisons such as "dice < 0.5", separated by commas.
(() => {
  const number = (text) => {
    const match = /^[-−+]?\d[\d.,]*(e[-+]?\d+)?/i.exec(text.replace("−", "-"));
    return match ? Number(match[0].replace(/,/g, "")) : NaN;
  };
  const textOf = (row, column) => row.cells[column].textContent.trim();

  function sort(table, column, descending) {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [row, textOf(row, column)]);
    const known = rows.filter(([, text]) => !/^[–-]?$/.test(text));
    const numeric = known.length > 0 && known.every(([, text]) => !Number.isNaN(number(text)));
    const compare = ([, a], [, b]) => (numeric ? number(a) - number(b) : a.localeCompare(b, "en", { numeric: true }));
    known.sort(compare);
    if (descending) known.reverse();
    const undefined_ = rows.filter(([, text]) => /^[–-]?$/.test(text)); // last, whatever the order
    body.append(...[...known, ...undefined_].map(([row]) => row));
    [...table.tHead.rows[0].cells].forEach((cell, i) => {
      if (i === column) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
  }

  function filter(table, wanted, output) {
    const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim().toLowerCase());
    const tests = wanted.toLowerCase().split(",").map((part) => part.trim()).filter(Boolean).map((part) => {
      const match = /^(.+?)\s*(<=|>=|<|>|=)\s*(\S+)$/.exec(part);
      const column = match ? heads.findIndex((head) => head.startsWith(match[1])) : -1;
      if (column < 0) return (row) => row.textContent.toLowerCase().includes(part);
      const [, , sign, limit] = match;
      return (row) => {
        const text = textOf(row, column).toLowerCase();
        const [value, bound] = [number(text), Number(limit)];
        if (sign === "=" && Number.isNaN(bound)) return text === limit;
        if (sign === "=") return value === bound;
        return (sign[0] === "<" ? value < bound : value > bound) || (sign.length === 2 && value === bound);
      };
    });
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = !tests.every((test) => test(row));
      shown += !row.hidden;
    }
    output.textContent = `${shown} of ${table.tBodies[0].rows.length}`;
  }

  for (const box of document.querySelectorAll(".list")) {
    const table = box.querySelector("table");
    const tools = document.createElement("div");
    tools.className = "list-tools";
    const [input, output] = [document.createElement("input"), document.createElement("output")];
    Object.assign(input, { type: "search", placeholder: box.dataset.example || "filter" });
    input.setAttribute("aria-label", `Filter: ${table.caption.textContent}`);
    tools.append(input, output);
    box.before(tools);
    input.addEventListener("input", () => filter(table, input.value, output));
    filter(table, "", output);
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", className: "sort", textContent: cell.textContent });
      cell.replaceChildren(button);
      button.addEventListener("click", () =>
        sort(table, column, cell.getAttribute("aria-sort") === "ascending"));
    });
  }
})();
