"""The style of the report's page: colours of both themes, type, and what a phone shows instead.

Input: none. Output: CSS text. Errors: none.
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfcfd; --ink: #182028; --soft: #5a6674; --grid: #dde3e9; --card: #ffffff;
  --a: #1766ad; --b: #12806a; --c: #bf5a00; --d: #8a4fb0; --e: #a3284b; --shade: 0 1px 3px rgb(20 30 40 / 9%); }
@media (prefers-color-scheme: dark) { :root { --paper: #10151b; --ink: #e9eef3; --soft: #9fadbb; --grid: #2c3641;
  --card: #192028; --a: #62aef0; --b: #4fc9a9; --c: #ff9e4f; --d: #c394e8; --e: #ff8fa8; --shade: none; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
.brand { color: var(--soft); font-size: 0.9rem; margin: 0; }
h1 { font-size: 2.3rem; line-height: 1.2; margin: 0.2rem 0 1rem; }
h2 { font-size: 1.4rem; line-height: 1.3; margin: 3rem 0 0.4rem; }
p { max-width: 46rem; margin: 0.6rem 0; }
.answer { font-size: 1.4rem; line-height: 1.4; max-width: 50rem; }
.answer strong { color: var(--a); white-space: nowrap; }
.lead, .note { color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: 0.5rem; padding: 0.6rem 0.9rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.88rem; max-width: 46rem; margin: 0.6rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 0.7rem; padding: 0.9rem 1.1rem;
  box-shadow: var(--shade); }
.card.chosen { border: 2px solid var(--a); }
.card h3 { margin: 0; font-size: 0.95rem; color: var(--soft); font-weight: 600; }
.card p { margin: 0.2rem 0; font-size: 0.92rem; }
.card .number { font-size: 1.9rem; line-height: 1.25; font-weight: 700; color: var(--a); }
figure { margin: 1rem 0 0.4rem; background: var(--card); border: 1px solid var(--grid); border-radius: 0.7rem;
  padding: 1rem 1rem 0.6rem; box-shadow: var(--shade); }
svg { width: 100%; height: auto; display: block; font-size: 13px; } svg.narrow { display: none; }
svg path { stroke-width: 1px; fill: none; } svg .base { stroke-width: 1.5px; } svg .bold { font-weight: 700; }
svg .level { stroke-width: 1.5px; stroke-dasharray: 7 5; opacity: 0.8; } svg .leader { opacity: 0.45; }
svg .upright { stroke-dasharray: 2 4; stroke-width: 1.3px; }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 5px; stroke-linejoin: round; }
summary { cursor: pointer; color: var(--soft); font-size: 0.92rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; margin: 0.5rem 0; }
th, td { padding: 0.3rem 0 0.3rem 1.1rem; border-bottom: 1px solid var(--grid);
  text-align: right; white-space: nowrap; }
thead th { color: var(--soft); vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; padding-left: 0; } th.text, td.text { text-align: left; }
td.text { white-space: normal; min-width: 15rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.4rem 1.4rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding: 1.2rem 0.9rem 2rem; } h1 { font-size: 1.7rem; }
  .answer { font-size: 1.2rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } figure { padding: 0.7rem 0.4rem 0.4rem; }
  svg.wide { display: none; } svg.narrow { display: block; max-width: 27rem; } }
@media print { .card, figure { break-inside: avoid; box-shadow: none; } }
footer { margin-top: 3rem; color: var(--soft); font-size: 0.85rem; }
"""
