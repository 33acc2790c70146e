"""The one error that users see."""


class TacqError(Exception):
    """One sentence that names the cause and the remedy; the command line prints it and exits with status 1."""
