"""The page as Streamlit would show it, without a browser."""

from dashboard_server import ROOT
from streamlit.testing.v1 import AppTest

PAGE = str(ROOT / "dashboard" / "page.py")
CHARTS = 19
"""Charts of a training with PPO: the first four of each question, and the three of closeness."""


def page(**query) -> AppTest:
    """Run the page with a query and fail on what it raises."""
    app = AppTest.from_file(PAGE, default_timeout=30)
    for name, value in query.items():
        app.query_params[name] = value
    return ran(app)


def ran(app: AppTest) -> AppTest:
    app.run()
    assert not app.exception, app.exception[0].stack_trace
    return app


def html(app: AppTest) -> str:
    return "\n".join(element.proto.body for element in app.get("html"))


def chart_count(app: AppTest) -> int:
    return len(app.get("vega_lite_chart"))
