"""The dashboard's server: the page, and JSON beside it on one port.

    streamlit run dashboard/app.py              # the runs in ./runs, or beside this folder
    streamlit run dashboard/app.py -- FOLDER    # the runs in FOLDER

Streamlit finds ``app`` in the source without running it, so it has to stand here as this literal call.
"""

import os
import sys

import streamlit as st

from dashboard.api import ROUTES
from dashboard.folder import RUNS_VARIABLE
from dashboard.guard import MIDDLEWARE

if len(sys.argv) > 1:
    os.environ[RUNS_VARIABLE] = sys.argv[1]

app = st.App("page.py", routes=ROUTES, middleware=MIDDLEWARE)
