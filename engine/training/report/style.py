"""The report's style sheet: one accent colour, system fonts, light and dark, phone to desktop, paper."""

STYLE = """
:root { --paper:#fcfbf8; --ink:#1c1b19; --soft:#67635b; --faint:#9c978d; --line:#e4e0d7; --fill:#f3f0e9;
  --accent:#c2410c;
  --serif:"Iowan Old Style","Palatino Linotype",Palatino,Charter,"Source Serif 4",Georgia,"Liberation Serif",serif;
  --sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;
  --mono:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace; color-scheme:light dark }
@media (prefers-color-scheme:dark) { :root { --paper:#16171a; --ink:#eceae4; --soft:#a5a199; --faint:#86827a;
  --line:#2d2e32; --fill:#1f2024; --accent:#ff8f5e } }
* { box-sizing:border-box }
html { -webkit-text-size-adjust:100% }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 var(--sans);
  font-variant-numeric:tabular-nums }
main { max-width:74rem; margin:0 auto; padding:clamp(1.5rem,5vw,4.5rem) clamp(1rem,4vw,3rem) 1rem }
footer { max-width:74rem; margin:0 auto; padding:1rem clamp(1rem,4vw,3rem) 3rem; color:var(--soft); font-size:.8rem }
section { margin-top:clamp(2.5rem,5vw,4.25rem) }
h1,h2 { font-family:var(--serif); font-weight:500; text-wrap:balance; margin:0; letter-spacing:-.012em }
h1 { font-size:clamp(2rem,5.2vw,3.5rem); line-height:1.08; max-width:24ch }
h1.long { font-size:clamp(1.5rem,3vw,2.2rem); max-width:40ch }
h2 { font-size:clamp(1.35rem,2.4vw,1.75rem); line-height:1.2; margin-bottom:1.4rem }
h3 { font-size:.95rem; font-weight:600; margin:2.2rem 0 .7rem }
h4 { font-size:.75rem; font-weight:600; color:var(--soft); margin:0 0 .2rem }
h1,h2,p,dt { overflow-wrap:anywhere }
p { margin:.5rem 0; max-width:68ch }
code { font-family:var(--mono); font-size:.9em; overflow-wrap:anywhere }
.eyebrow { font-size:.82rem; color:var(--soft); margin:0 0 1.3rem }

.eyebrow span { font-family:var(--mono); font-size:.95em; margin-left:.6em; overflow-wrap:anywhere }
.deck { font:400 clamp(1.1rem,2vw,1.4rem)/1.42 var(--serif); margin:1.1rem 0 .9rem; max-width:56ch; text-wrap:pretty }
.facts { color:var(--soft); font-size:.9rem; max-width:none }
.note { border-left:3px solid var(--accent); padding:.1rem 0 .1rem .8rem; font-size:.92rem; margin-top:.9rem }
.absent { color:var(--soft) }
.figures { display:grid; grid-template-columns:repeat(4,minmax(0,1fr)); gap:1.6rem 2.2rem;
  border-top:1px solid var(--line); padding-top:1.5rem }
.figures b { display:block; font:500 clamp(2.1rem,4vw,2.9rem)/1.05 var(--serif); letter-spacing:-.02em;
  font-variant-numeric:lining-nums proportional-nums }
.figures div:first-child b { color:var(--accent) }
.figures span { display:block; font-size:.92rem; margin-top:.3rem }
.figures small { display:block; color:var(--soft); font-size:.82rem; line-height:1.4; text-wrap:balance }
.bar { display:block; position:relative; height:4px; background:var(--line); margin:.6rem 0 .5rem; border-radius:2px }
.bar i { position:absolute; inset:0 auto 0 0; background:var(--faint); border-radius:2px }
.figures div:first-child .bar i:first-child { background:var(--accent) }
.bar .mark { width:2px; inset:-4px auto -4px auto; margin-left:-1px; background:var(--ink); border-radius:0 }
.pictures { display:grid; grid-template-columns:10.5rem repeat(var(--n),minmax(0,1fr)); gap:.55rem; align-items:center;
  max-width:calc(10.5rem + var(--n)*11rem) }
.pictures figure { display:contents }
.pictures figcaption { grid-row:var(--r); grid-column:1; padding-right:1rem; line-height:1.35 }
.pictures figcaption b { display:block; font-weight:600; font-size:.95rem }
.pictures figcaption span { color:var(--soft); font-size:.82rem; display:block; text-wrap:pretty }
.cell { grid-row:var(--r); grid-column:calc(var(--c) + 1); align-self:start }
.frame { position:relative; border-radius:3px; overflow:hidden; background:var(--fill) }
.frame img { display:block; width:100%; height:auto }
.cell small { display:block; color:var(--soft); font-size:.76rem; text-align:center; margin-top:.25rem }
.outline { position:absolute; inset:0; width:100%; height:100% }
.outline path { fill:none; stroke:#ff8a57; stroke-width:1; stroke-linecap:square; vector-effect:non-scaling-stroke }
.outline .under { stroke:#000; stroke-opacity:.35; stroke-width:2 }
figure { margin:0 }
.large { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr)); gap:2.2rem 2.8rem;
  align-items:end }
.small-charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,10rem),1fr)); gap:1.8rem 2.2rem;
  margin-top:2rem; align-items:end }
.explain { color:var(--soft); font-size:.88rem; margin-top:1.5rem }
.chart figcaption { margin-bottom:.9rem; line-height:1.3 }
.chart figcaption b { font-weight:600; font-size:.95rem; margin-right:.4em }
.chart figcaption span { color:var(--soft); font-size:.82rem }
.plot { position:relative; margin:0 4.6rem 1.8rem 2rem }
.bare .plot { margin-right:.6rem }
.plot svg { position:absolute; inset:0; width:100%; height:100%; overflow:visible }
.plot line, .plot path { vector-effect:non-scaling-stroke; fill:none }
.plot .tick { stroke:var(--line); stroke-width:1 }
.plot .reference { stroke:var(--ink); stroke-width:1; stroke-dasharray:2 4; stroke-linecap:round }
.plot .curve { stroke-width:1.75; stroke-linejoin:round; stroke-linecap:round }
.plot .training { stroke:var(--faint) }
.plot .held-out { stroke:var(--accent) }
.plot .dots { stroke-width:7; stroke-linecap:round }
.plot .band { fill:var(--faint); fill-opacity:.25; stroke:none }
.bare .curve { stroke:var(--soft); stroke-width:1.5 }
.bare .dots { stroke:var(--soft) }
.plot span { position:absolute; font-size:.75rem; line-height:1.25; color:var(--soft); white-space:nowrap }
.plot .y { right:100%; transform:translateY(-50%); padding-right:.5rem }
.plot .x { top:100%; transform:translateX(-50%); padding-top:.4rem }
.plot .unit { left:100%; transform:none; padding-left:1.4rem }
.plot .end { left:100%; padding-left:.7rem }
.plot .end b { display:block; font-size:.88rem; line-height:1.1 }
.plot .end.held-out { color:var(--accent) }
.plot .at-line { color:var(--ink); text-shadow:0 0 3px var(--paper),0 0 3px var(--paper),0 0 2px var(--paper) }
.plot .right { right:0 } .plot .left { left:.3rem }
.plot .over { transform:translateY(-100%); margin-top:-3px } .plot .under { margin-top:3px }
.command { background:var(--fill); border:1px solid var(--line); border-radius:6px; padding:.9rem 1.1rem;
  margin:.8rem 0; white-space:pre-wrap; user-select:all; -webkit-user-select:all }
.table { font-size:.84rem }
.groups { columns:19rem; column-gap:2.8rem }
.table > div { break-inside:avoid; margin-bottom:1.2rem }
dl { margin:0 }
dl div { display:flex; justify-content:space-between; gap:1rem; border-bottom:1px solid var(--line); padding:.22rem 0 }
dt { color:var(--soft); flex:none; max-width:55% }
dd { margin:0; text-align:right; overflow-wrap:anywhere }
.table:not(.groups) { max-width:44rem }
.bad { font:.8rem/1.5 var(--mono); padding-left:1.1rem; overflow-wrap:anywhere; max-width:80ch }
@media (max-width:58rem) { .pictures { grid-template-columns:repeat(var(--n),minmax(0,1fr)); max-width:none }
  .pictures figcaption { grid-column:1/-1; grid-row:calc(2*var(--r) - 1); padding:.7rem 0 0 }
  .pictures figcaption b, .pictures figcaption span { display:inline; margin-right:.4em }
  .cell { grid-row:calc(2*var(--r)); grid-column:var(--c) } .cell small { font-size:.68rem } }
@media (max-width:46rem) { .figures { grid-template-columns:1fr 1fr; gap:1.4rem 1.2rem } }
@media (max-width:37rem) { .pictures { grid-template-columns:repeat(var(--stages),minmax(0,1fr)); gap:.45rem }
  .pictures figcaption { grid-row:1; grid-column:var(--r); align-self:start; padding:0 0 .2rem }
  .pictures figcaption b { display:block; font-size:.84rem }
  .pictures figcaption span { font-size:.7rem; display:block; margin:0 }
  .cell { grid-row:calc(var(--c) + 1); grid-column:var(--r) } }
@media print { :root { --paper:#fff; --ink:#000; --soft:#444; --faint:#888; --line:#ccc; --fill:#f4f4f4;
  --accent:#b43a08 }
  * { print-color-adjust:exact; -webkit-print-color-adjust:exact }
  body { font-size:10.5pt } main { padding:0; max-width:none } section { margin-top:2rem } h2, h3 { break-after:avoid }
  .pictures, .chart, .figures, .command, section.next { break-inside:avoid }
  .figures, .small-charts { grid-template-columns:repeat(4,minmax(0,1fr)) }
  .large { grid-template-columns:1fr 1fr; gap:1.5rem }
  .figures b { font-size:22pt } .groups { columns:3; font-size:8pt } footer { display:none } }
"""
