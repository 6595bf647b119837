"""The one exception that a trainer's user is meant to see."""


class UserError(Exception):
    """Something the user can mend. Its text is the single line shown; the program then ends with exit code 2."""
