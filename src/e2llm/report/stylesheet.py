"""The page's style sheet: one column, quiet tables, figures that follow light and dark.

Flows in: the palettes. Flows out: CSS text. Loads no font, image or other file.
"""

from __future__ import annotations

from e2llm.report.palette import DARK, LIGHT

_RULES = """
*,*::before,*::after{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-padding-top:1.5rem}
body{margin:0;background:var(--paper);color:var(--ink);
  font:400 1rem/1.6 system-ui,-apple-system,"Segoe UI",
    Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;
  font-variant-numeric:tabular-nums lining-nums}
header,main,footer,nav{max-width:50rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:5rem}
.eyebrow{margin:0;color:var(--muted);font-size:.875rem;letter-spacing:.01em}
h1,h2,h3{
  font-family:Charter,"Bitstream Charter","Iowan Old Style","Source Serif 4",Georgia,"Liberation Serif",serif;
  font-weight:600;letter-spacing:-.012em;text-wrap:balance}
h1{margin:.75rem 0 .9rem;font-size:clamp(2rem,1.2rem + 3.6vw,3.25rem);line-height:1.12}
h2{margin:0 0 .5rem;font-size:1.75rem;line-height:1.2}
h3{margin:3rem 0 .25rem;font-size:1.2rem;line-height:1.3}
h2+h3{margin-top:1.5rem}
p{margin:.5rem 0;max-width:42rem}
p,h1,h2,h3,summary,dt,dd,figcaption{overflow-wrap:anywhere}
.lede{color:var(--muted);font-size:1.0625rem}
section{padding-top:4.5rem}
.quiet,figcaption{color:var(--muted);font-size:.9375rem}
a{color:var(--hues-0);text-underline-offset:.18em;text-decoration-thickness:1px}
:focus-visible{outline:2px solid var(--hues-0);outline-offset:3px;border-radius:2px}
.skip{position:absolute;left:-100vw;top:.5rem;padding:.4rem .8rem;background:var(--paper);border:1px solid var(--rule)}
.skip:focus{left:1rem}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.arrow{color:var(--muted);font-family:system-ui,"DejaVu Sans",sans-serif;font-weight:400;
  font-size:.82em;padding:0 .08em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:1.5rem;margin:2.75rem 0 0;
  padding:1.5rem 0 0;border-top:1px solid var(--rule)}
.tiles div{display:flex;flex-direction:column-reverse;justify-content:flex-end}
.tiles dd{margin:0;font-size:1.375rem;line-height:1.3;font-weight:600;letter-spacing:-.015em}
.tiles dt{margin:.3rem 0 0;color:var(--muted);font-size:.875rem;line-height:1.45;max-width:16rem}
nav ul{display:flex;flex-wrap:wrap;gap:.35rem 1.5rem;margin:2.5rem 0 0;padding:0;list-style:none;font-size:.9375rem}
nav a{text-decoration-color:var(--rule)}
nav a:hover{text-decoration-color:currentColor}
.scroll{overflow-x:auto;margin:.75rem 0 0;position:relative}
.scroll+.scroll{margin-top:2.25rem}
table{border-collapse:collapse;width:100%;font-size:.9375rem;line-height:1.4}
th,td{padding:.5rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th:first-child{text-align:left;padding-left:0}
th:last-child,td:last-child{padding-right:.35rem}
thead th{color:var(--muted);font-weight:500;font-size:.875rem;border-bottom-color:var(--muted);
  white-space:normal;vertical-align:bottom}
tbody th{font-weight:400;white-space:normal;overflow-wrap:anywhere;min-width:9rem}
tbody th:first-child,tfoot th,thead th:first-child{position:sticky;left:0;background:var(--paper)}
tr.hero th,tr.hero td{background:var(--panel)}
tr.hero th{font-weight:600;padding-left:.6rem;box-shadow:inset 3px 0 var(--hues-0)}
td strong{color:var(--hues-0);font-weight:700}
td.none{color:var(--muted)}
.interval{display:block;color:var(--muted);font-size:.75rem;line-height:1.25;letter-spacing:-.01em}
td.shaded .interval{color:inherit;opacity:.85}
tfoot th,tfoot td{color:var(--muted);font-weight:400;font-size:.8125rem;border-bottom:0}
tfoot td{white-space:normal}
tfoot td.every,table.heat tfoot td.every{text-align:left}
table.dense{font-size:.8125rem}
table.dense th,table.dense td{padding:.45rem .35rem}
table.dense th:first-child{padding-left:0}
table.dense tbody th{min-width:6.5rem}
table.dense .interval{font-size:.6875rem}
table.heat{border-collapse:separate;border-spacing:3px;width:auto;min-width:min(100%,30rem)}
table.heat th,table.heat td{border:0}
table.heat td{padding:.5rem .8rem;min-width:4.4rem;text-align:center;border-radius:4px}
table.heat thead th{text-align:center}
table.heat thead th:first-child{text-align:left}
table.heat tfoot td{min-width:0}
table.heat td strong{color:inherit}
td.shaded{background:var(--panel);background:color-mix(in srgb,var(--hues-1) calc(var(--share)*46%),var(--panel))}
td.served{box-shadow:inset 0 0 0 2px var(--ink)}
table.text td,table.text th{text-align:left;vertical-align:top;white-space:normal;overflow-wrap:anywhere}
table.text td.whole{overflow-wrap:normal}
table.text .number{text-align:right;white-space:nowrap;overflow-wrap:normal}
.key{display:inline-block;width:.95em;height:.95em;border-radius:3px;vertical-align:-.1em;margin-right:.15em}
.key.served{box-shadow:inset 0 0 0 2px var(--ink)}
.key.cost{background:var(--hues-1);background:color-mix(in srgb,var(--hues-1) 46%,var(--panel))}
figure{margin:2.25rem 0 0}
figure svg{display:block;max-width:100%;height:auto;overflow:visible}
h3+figure{margin-top:1rem}
figcaption{margin-top:.6rem;max-width:42rem}
.narrow{display:none}
details{border-bottom:1px solid var(--rule);padding:.65rem 0}
summary{cursor:pointer;font-weight:500}
details h3{margin-top:1.25rem}
details h4{margin:1.25rem 0 .25rem;font-size:1rem}
dl.facts{display:grid;grid-template-columns:minmax(9rem,auto) 1fr;gap:.3rem 1.5rem;margin:.75rem 0;font-size:.875rem}
dl.facts dt{color:var(--muted);overflow-wrap:anywhere}
dl.facts dd{margin:0;overflow-wrap:anywhere}
code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:.875em}
footer{padding-top:4rem;padding-bottom:4rem;color:var(--muted);font-size:.875rem}
@media (max-width:47rem){
  header{padding-top:2.5rem}
  section{padding-top:3.25rem}
  .wide{display:none}
  .narrow{display:block}
  .narrow svg{width:100%;max-width:26rem}
  th,td{padding:.5rem .4rem}
  table,table.dense{font-size:.8125rem}
  thead th,tfoot th,tfoot td{font-size:.75rem}
  tbody th:first-child{min-width:5.5rem}
  table.heat{border-spacing:2px;min-width:0}
  table.heat tbody th:first-child{min-width:2.5rem;overflow-wrap:break-word}
  table.heat tfoot th{white-space:normal;min-width:0;width:2.75rem}
  table.heat td{padding:.45rem .3rem;min-width:2.75rem}
  dl.facts{grid-template-columns:1fr;gap:0}
  dl.facts dd{margin-bottom:.6rem}
}
@media print{
  @page{margin:18mm}
  :root{--paper:#fff}
  body{font-size:10pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}
  header,main,footer{max-width:none;padding-left:0;padding-right:0}
  header{padding-top:0}
  section{padding-top:2rem}
  nav,.skip{display:none}
  .wide{display:block}
  .narrow{display:none}
  .scroll{overflow:visible;break-inside:avoid}
  th,td{padding:.4rem .3rem;white-space:normal}
  table.dense{font-size:7pt}
  table.dense .interval,table.dense thead th,table.dense tfoot td{font-size:6pt}
  table.dense tbody th:first-child{min-width:4rem}
  tbody th:first-child,tfoot th,thead th:first-child{position:static}
  tr.hero th{box-shadow:none}
  tfoot{display:table-row-group}
  h2,h3,h2+.quiet,h3+.quiet{break-after:avoid}
  .quiet{break-inside:avoid}
  figure,tr,details dl>div{break-inside:avoid}
}
"""


def stylesheet() -> str:
    """The whole style sheet. Dark is for screens only: on paper the page is light."""
    return (
        f":root{{color-scheme:light dark;{LIGHT.css()}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{DARK.css()}}}}}"
        f"{_RULES}"
    )
