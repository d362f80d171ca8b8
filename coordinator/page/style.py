"""How the page of a report looks: colours for light and dark, type of the reader's own system, room on a phone."""

STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  --paper: #ffffff; --ink: #1b1f24; --muted: #6a737d; --grid: #e4e7eb; --soft: #f5f7f9; --good: #1a7f37; --bad: #b3261e;
  --c0: #2a6fbb; --c1: #d4700c; --c2: #2b8a57; --c3: #b03f7d; --c4: #7657c8; --c5: #8a6d1f;
  --c6: #13858f; --c7: #c23b2e; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --ink: #e6eaee; --muted: #98a2ad; --grid: #2c333b; --soft: #1d2329; --good: #56d364; --bad: #ff8a80;
  --c0: #6cb0f5; --c1: #f5a257; --c2: #6fcf97; --c3: #ee8fbf; --c4: #b7a0f7; --c5: #d8bd62;
  --c6: #5ccfdd; --c7: #f08479; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; line-height: 1.3; margin: .5rem 0 0; overflow-wrap: anywhere; }
p { margin: .5rem 0; } .what, .absent, figcaption, caption { color: var(--muted); font-size: .875rem; }
.what { margin: 0 0 .25rem; } .absent { background: var(--soft); padding: .6rem .8rem; border-radius: 6px; }
.state { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
.warning { border-left: 4px solid var(--c1); padding: .3rem .8rem; background: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--soft); border-radius: 8px; padding: .6rem .8rem;
  display: flex; flex-direction: column-reverse; }
.tiles dt { color: var(--muted); font-size: .8rem; } .tiles dd { margin: 0; font-size: 1.35rem; font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem; }
.keys { list-style: none; padding: 0; } .keys b { overflow-wrap: anywhere; }
.key { width: 28px; height: 8px; margin-right: .3rem; vertical-align: middle; }
figure { margin: .5rem 0 1rem; } .frame { overflow-x: auto; } figcaption { margin-top: .3rem; overflow-wrap: anywhere;
  white-space: pre-line; }
figure svg { display: block; width: 100%; height: auto; font-family: var(--font); }
figure.small svg { max-width: 28rem; } figure.wide svg { min-width: 34rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { caption-side: bottom; text-align: left; padding-top: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; } td.left { text-align: left; white-space: normal; } th.left { text-align: left; }
.facts td, .facts th { min-width: 8rem; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { .frame { overflow: visible; } figure, section { break-inside: avoid; } }
"""
