"""The page: a row of controls, and under it the view that is chosen, drawn again while the run goes on."""

import streamlit as st

from dashboard import compare_view, metrics_view, profile_view, steps_view, store
from dashboard.markup import show, style, text
from dashboard.state import REFRESH_S, Choice, moved, toolbar

DRAW = {
    "Metrics": metrics_view.draw,
    "Completions": steps_view.draw,
    "Profile": profile_view.draw,
    "Compare": compare_view.draw,
}


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="RLHF runs", page_icon="📈", layout="wide")
    style()
    runs = store.current()
    names = runs.names()
    examples = st.query_params.get("test_alerts") == "1"
    if not names:
        st.fragment(empty, run_every=REFRESH_S)(runs, examples)
        return
    choice = toolbar(names)
    st.fragment(live, run_every=REFRESH_S if choice.live else None)(runs, names, choice, examples)


def live(runs: store.Store, names: list[str], choice: Choice, examples: bool) -> None:
    """Draw what is chosen, with what has been logged since."""
    # What a link chose is the whole page's; the run that the press began may be cut short by the next refresh.
    if runs.names() != names or moved(choice):
        st.rerun()
    for name in choice.gone:
        show(f'<div class="kit-gone">There is no run {text(repr(name))} here (any more).</div>')
    DRAW[choice.view](runs, choice, examples)


def empty(runs: store.Store, examples: bool) -> None:
    """Say how to get a run to look at."""
    if runs.names():
        st.rerun()
    show("<h3>No runs yet</h3>")
    where = "There is no run in" if runs.path.is_dir() else "There is no folder"
    st.text(f"{where} {runs.path}. A run appears here as soon as it has begun:")
    st.code("rlhf train --name first", language="bash")
    st.text("Runs that are kept elsewhere:")
    st.code("rlhf dashboard FOLDER", language="bash")
    if examples:
        metrics_view.draw_examples()


main()
