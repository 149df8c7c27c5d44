"""The topology as an HTML page: the drawing with tooltips, a filter and a theme switch, all in one file.

The page loads nothing and asks nobody: its Content-Security-Policy forbids it. What users have named comes in as text
only.
"""

from __future__ import annotations

import html
import xml.etree.ElementTree as ET

from host_bridge.view.canvas import printable
from host_bridge.view.drawing import draw, summary
from host_bridge.view.topology import Topology

_STYLE = """
:root{color-scheme:light dark}
:root[data-theme=light]{color-scheme:light}:root[data-theme=dark]{color-scheme:dark}
body{margin:0;font:14px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
background:#f3f5f8;color:#1b2330}
@media (prefers-color-scheme:dark){:root:not([data-theme=light]) body{background:#0e131a;color:#e6eaf1}}
:root[data-theme=dark] body{background:#0e131a;color:#e6eaf1}
header{position:sticky;top:0;display:flex;gap:12px;align-items:center;justify-content:flex-end;
padding:10px 32px;backdrop-filter:blur(8px);z-index:1}
input,button{font:inherit;padding:6px 12px;border-radius:8px;border:1px solid #8886;background:#8881;color:inherit}
input{width:22em;max-width:50vw}button{cursor:pointer}
main{display:flex;justify-content:center;overflow-x:auto}
svg.topology{max-width:100%;height:auto;min-width:640px}
.place,.head{cursor:default;outline:none}
.place:focus-visible .tile{stroke:#3b82f6;stroke-width:2.5}
#tip{position:fixed;display:none;max-width:36em;padding:10px 14px;border-radius:10px;white-space:pre-line;
overflow-wrap:anywhere;background:#1b2330;color:#fff;font-size:13px;line-height:1.5;pointer-events:none;z-index:2;
box-shadow:0 6px 24px #0006;border:1px solid #fff2}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_SCRIPT = """
"use strict";
const tip = document.getElementById("tip");
const places = [...document.querySelectorAll(".place")];
for (const element of document.querySelectorAll(".place, .head")) {
  const title = element.querySelector("title");
  const text = title.textContent;
  element.setAttribute("aria-label", text);
  title.remove();
  const put = (x, y) => {
    tip.textContent = text;
    tip.style.display = "block";
    tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = (y + 18 + tip.offsetHeight > innerHeight ? Math.max(8, y - tip.offsetHeight - 12) : y + 18) + "px";
  };
  const same = (on) => {
    for (const other of places)
      if (other.dataset.guest && other.dataset.guest === element.dataset.guest) other.classList.toggle("same", on);
  };
  const leave = () => { tip.style.display = "none"; same(false); };
  element.addEventListener("mousemove", (event) => { put(event.clientX, event.clientY); same(true); });
  element.addEventListener("mouseleave", leave);
  element.addEventListener("focus", () => {
    const box = element.getBoundingClientRect();
    put(box.left, box.bottom - 12);
    same(true);
  });
  element.addEventListener("blur", leave);
}
document.getElementById("filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const place of places)
    place.classList.toggle("dim", !words.every((word) => place.dataset.text.includes(word)));
});
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
"""


def to_page(found: Topology) -> str:
    """The page."""
    drawing = ET.tostring(draw(found), encoding="unicode", short_empty_elements=False)
    title = html.escape(printable(f"taploom: {summary(found)}"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<input id="filter" type="search" placeholder="guest, address, alias or group" aria-label="Show only">
<button id="theme" type="button">light / dark</button>
</header>
<main>{drawing}</main>
<div id="tip" role="tooltip"></div>
<script>{_SCRIPT}</script>
</body>
</html>
"""
