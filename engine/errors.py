"""The one exception for what a user can mend."""


class UserError(Exception):
    """A wrong input, found before work starts: one sentence that says what was given, what is allowed and what to do.

    Scripts print it without a traceback and exit with code 2.
    """


class RankError(UserError):
    """A `UserError` that only this rank has seen, so that this rank must print it."""
