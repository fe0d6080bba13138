"""The little HTML that the page is set in. Whatever a run's files say goes through :func:`text` first."""

import html
import itertools
from collections.abc import Iterable

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from rlhf_core.terminal import printable

STYLE = """<style>
[data-testid="stMainBlockContainer"] {padding: 0.7rem 1.4rem 2rem; max-width: 1900px}
[data-testid="stHeader"] {background: transparent; height: 2.6rem; min-height: 2.6rem; pointer-events: none}
[data-testid="stHeader"] * {pointer-events: none}
[data-testid="stHeader"] button, [data-testid="stHeader"] button * {pointer-events: auto}
.st-key-toolbar {padding-right: 3rem}
.st-key-toolbar > div:first-child {flex: 1 1 15rem; min-width: 12rem}
.st-key-questions {display: grid !important; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr))}
.st-key-questions > div {width: auto !important; min-width: 0 !important}
.st-key-split > div {flex: 1 1 360px !important; min-width: min(360px, 100%) !important}
.st-key-split > div:first-child {flex: 1.6 1 620px !important}
[class*="st-key-question_"] {gap: 0.35rem !important}
[class*="st-key-alert_"] > div:first-child {flex: 1 1 18rem !important; min-width: 0 !important}
[class*="st-key-alert_"] button {min-height: 1.7rem; padding: 0 0.55rem}
[class*="st-key-alert_"] button p {font-size: 0.8rem}
[data-testid="stVerticalBlock"] {gap: 0.6rem}
.kit-strip {display: flex; flex-wrap: wrap; gap: 0.35rem 1.5rem; align-items: center; padding: 0.4rem 0.8rem;
  border-radius: 0.4rem; border-left: 6px solid var(--kit); background: color-mix(in srgb, var(--kit) 11%, transparent)}
.kit-strip b.kit-verdict {font-size: 1.15rem; color: var(--kit)}
.kit-strip, .kit-strip > *, .kit-alert, .kit-runs > * {min-width: 0; overflow-wrap: anywhere}
.kit-tile {display: flex; flex-direction: column; line-height: 1.25}
.kit-tile small {opacity: 0.7; font-size: 0.72rem}
.kit-tile span {font-size: 1.02rem; font-weight: 600; font-variant-numeric: tabular-nums}
.kit-alert {border-left: 4px solid var(--kit); padding: 0.1rem 0 0.1rem 0.7rem; line-height: 1.4; font-size: 0.9rem}
.kit-alert .kit-head {font-weight: 600; font-size: 0.95rem}
.kit-alert .kit-tag {color: #fff; background: var(--kit); border-radius: 0.25rem; padding: 0 0.4rem; font-size: 0.72rem;
  margin-right: 0.4rem}
.kit-alert .kit-dim, .kit-dim {opacity: 0.72}
.kit-passed {opacity: 0.75}
.kit-passed .kit-dim {opacity: 1}
.kit-label {font-weight: 600}
.st-key-token_map {min-width: 0; max-width: 100%; overflow-x: auto}
details.kit-dim {font-size: 0.85rem}
.kit-question {display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline;
  border-bottom: 1px solid #8884; padding-bottom: 0.15rem; font-weight: 600; column-gap: 0.5rem}
.kit-question span {font-size: 0.92rem; white-space: nowrap}
.kit-question small {font-weight: 400; font-size: 0.75rem; color: var(--kit); flex-basis: 100%; min-height: 1.6em}
.kit-gone {border-left: 6px solid #d97706; padding: 0.3rem 0.8rem; overflow-wrap: anywhere}
.kit-runs {display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; font-size: 0.85rem; align-items: center}
@media (max-width: 640px) {
  .st-key-toolbar {padding-right: 0}
  .st-key-toolbar > div:first-child {margin-right: 3rem}
  .st-key-view, .st-key-view > * {max-width: 100%}
  .st-key-view button {padding: 0 0.5rem; font-size: 0.85rem}
  .st-key-view button p {font-size: 0.85rem}
}
.kit-dot {display: inline-block; width: 0.7rem; height: 0.7rem; border-radius: 50%; margin-right: 0.35rem}
</style>"""


def style() -> None:
    """Set the page's style."""
    st.html(STYLE)


def text(value: object) -> str:
    """Return a text of a run's files as HTML that shows it and does nothing."""
    return html.escape(printable(str(value)))


def labels(names: Iterable[str], *taken: str) -> dict[str, str]:
    """Return what to print for each name: no two alike, and none of what is taken."""
    used, found = set(taken), dict[str, str]()
    for name in names:
        plain = printable(name)
        free = (plain if number == 1 else f"{plain} ({number})" for number in itertools.count(1))
        found[name] = next(label for label in free if label not in used)
        used.add(found[name])
    return found


def show(markup: str) -> None:
    """Show HTML of ours; every text in it that is not has gone through :func:`text`."""
    st.html(markup)


def tile(label: str, value: str) -> str:
    """Return a figure with its name above it."""
    return f'<div class="kit-tile"><small>{text(label)}</small><span>{text(value)}</span></div>'


def split() -> tuple[DeltaGenerator, DeltaGenerator]:
    """Return a wide and a narrow part, side by side where there is room and else below each other."""
    with st.container(horizontal=True, key="split", gap="medium"):
        return st.container(key="split_wide"), st.container(key="split_narrow")
