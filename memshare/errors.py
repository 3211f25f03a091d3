"""The error that a person at a terminal can do something about."""


class UserError(Exception):
    """Something the user can put right. The text names the cause and the fix.

    The command line shows the text alone; every other exception is a defect of ours and keeps its
    traceback.
    """
