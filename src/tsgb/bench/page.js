
"use strict";
// A click on a column's head sorts each group of rows: best first, then the other way, then as it was.
for (const table of document.querySelectorAll("table.figures")) {
  const heads = [...table.tHead.rows[0].cells];
  const bodies = [...table.tBodies].map((body) => [body, [...body.rows]]);
  heads.forEach((head, column) => {
    if (column === 0) return;
    const button = document.createElement("button");
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    const first = head.dataset.better === "lower" ? "ascending" : "descending";
    const second = first === "ascending" ? "descending" : "ascending";
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const next = now === null ? first : now === first ? second : null;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next) head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      // Rows without a figure stay below; a group's heading has no value column and stays above.
      const rank = (row) => {
        const value = row.cells[column]?.dataset.value;
        return value === undefined ? Infinity : sign * Number(value);
      };
      for (const [body, rows] of bodies) {
        const heading = rows.filter((row) => row.querySelector(".group"));
        const rest = rows.filter((row) => !row.querySelector(".group"));
        if (next) rest.sort((a, b) => (rank(a) === rank(b) ? 0 : rank(a) < rank(b) ? -1 : 1));
        body.append(...heading, ...rest);
      }
    });
  });
}
