"""The look of the report's page: light and dark, nothing from anywhere else."""

HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2329; --soft: #5b6570; --line: #dfe3e8;
  --s1: #0b62b0; --s2: #c2571a; --s3: #17805c; --s4: #9a3a80; --s5: #8a6d00; --s6: #3f7f93;
  --s7: #b03a3a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e4e8ec; --soft: #98a2ad; --line: #323a42;
    --s1: #6cb2f5; --s2: #f2a065; --s3: #5cc9a0; --s4: #df8fc8; --s5: #d9bd55; --s6: #85c4d6;
    --s7: #ef8d8d; } }
body { margin: 0 auto; max-width: 90rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; font-weight: 600; }
h2 { margin: 2.5rem 0 0.75rem; font-size: 1.1rem; font-weight: 600; }
p, dd { color: var(--soft); max-width: 44rem; margin: 0.25rem 0 0.75rem; }
header p { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 1.5rem 0.35rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 400; font-size: 0.875rem; }
td { border-top: 1px solid var(--line); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem; }
.grid svg { max-width: 31rem; }
svg { width: 100%; height: auto; }
svg text { font-family: inherit !important; }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: 0 1rem; }
dd { margin-left: 0; margin-top: 0; }
summary { cursor: pointer; margin-top: 1rem; }
pre { overflow-x: auto; font-size: 0.8rem; color: var(--soft); }
.warning { color: var(--s7); }
h3 { margin: 1.5rem 0 0.5rem; font-size: 1rem; font-weight: 600; }
.faces { display: grid; grid-template-columns: repeat(auto-fill, 14.5rem); gap: 0.75rem; }
figure { margin: 0; }
figure img { width: 112px; height: 112px; }
.lead { color: var(--ink); font-size: 1.1rem; }
.numbers { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.numbers dt { color: var(--soft); font-size: 0.875rem; }
.numbers dd { color: var(--ink); font-size: 1.6rem; margin: 0; white-space: nowrap; }
.slider input { width: min(100%, 24rem); vertical-align: middle; }
.slider output { display: block; font-variant-numeric: tabular-nums; }
.changed { outline: 2px solid var(--s2); outline-offset: 3px; }
figcaption { overflow-wrap: anywhere; }
figcaption { color: var(--soft); font-size: 0.8rem; }
"""
