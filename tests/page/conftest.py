"""The servers of the API's tests, for the tests of the page."""

from ..server.conftest import *  # noqa: F403  (its fixtures, and what says that the extra is missing)
