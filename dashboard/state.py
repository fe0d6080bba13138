"""What is chosen on the page. Each choice is a widget bound to a query parameter, so the URL holds all of them."""

from dataclasses import dataclass

import streamlit as st

from dashboard.charts import AXIS_TITLES, COLOURS
from dashboard.series import AXES

VIEWS = ("Metrics", "Completions", "Profile", "Compare")
WINDOWS = ("all", "100", "1000", "10000", "100000")
REFRESH_S = 2.0


@dataclass(frozen=True)
class Choice:
    """What to show."""

    runs: tuple[str, ...]
    """The runs; the first is the one that is judged. Without a choice it is the newest."""
    gone: tuple[str, ...]
    """Runs that the URL asks for and that are not there, or no longer."""
    view: str
    axis: str
    smoothing: float
    log: bool
    last: int | None
    """Steps from the end; None shows all."""
    everything: bool
    step: int | None
    live: bool


def toolbar(names: list[str]) -> Choice:
    """Draw the controls and return what is chosen."""
    # The widget takes what it does not have out of the URL: what that was is kept until something else is chosen.
    gone = [name for name in st.query_params.get_all("run") if name and name not in names]
    st.session_state["gone"] = tuple(dict.fromkeys((*st.session_state.get("gone", ()), *gone)))
    with st.container(horizontal=True, vertical_alignment="center", key="toolbar", gap="small"):
        chosen = st.multiselect(
            "Runs",
            names,
            key="run",
            bind="query-params",
            max_selections=len(COLOURS),
            on_change=forget_gone,
            placeholder=f"Runs: the newest, {names[0]}",
            label_visibility="collapsed",
        )
        view = st.segmented_control(
            "View",
            VIEWS,
            # A link sets the view; a default beside that would be a second source of the value.
            default=None if "view" in st.session_state else VIEWS[0],
            key="view",
            bind="query-params",
            required=True,
            label_visibility="collapsed",
        )
        step = st.number_input(
            "Step",
            min_value=0,
            value=None,
            step=1,
            key="step",
            bind="query-params",
            placeholder="Step: latest",
            label_visibility="collapsed",
            width=150,
        )
        with st.popover("Display", icon=":material/tune:"):
            axis = st.segmented_control(
                "X-axis",
                AXES,
                default="step",
                key="x",
                bind="query-params",
                format_func=AXIS_TITLES.__getitem__,
                required=True,
            )
            smoothing = st.slider(
                "Smoothing", 0.0, 0.99, 0.0, 0.01, key="smooth", bind="query-params",
                help="Weight of an exponential moving average. The band behind a curve is the raw minimum to maximum.",
            )  # fmt: skip
            last = st.selectbox("Last steps", WINDOWS, key="last", bind="query-params")
            log = st.toggle("Logarithmic", key="log", bind="query-params")
            everything = st.toggle("All metrics", key="all", bind="query-params")
        paused = st.toggle(
            "Pause", key="pause", bind="query-params", help=f"Live, new rows show every {REFRESH_S:g} s."
        )
    return Choice(
        runs=tuple(chosen) or (names[0],),
        gone=tuple(name for name in st.session_state.get("gone", ()) if name not in names),
        view=view or VIEWS[0],
        axis=axis or "step",
        smoothing=smoothing,
        log=log,
        last=None if last == "all" else int(last),
        everything=everything,
        step=step,
        live=not paused,
    )


def forget_gone() -> None:
    """Say no more that a run is not there: another choice has been made."""
    st.session_state["gone"] = ()


def go(view: str, step: int) -> None:
    """Show a step: what a link does before the page is drawn again."""
    st.session_state["view"] = view
    st.session_state["step"] = step


def moved(choice: Choice) -> bool:
    """Whether a link has been followed since the controls were drawn."""
    now = st.session_state.get("view") or VIEWS[0], st.session_state.get("step")
    return now != (choice.view, choice.step)
