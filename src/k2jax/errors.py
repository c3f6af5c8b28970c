"""Errors for users: a mistake that the user can correct, and a run that failed. Imports nothing of ours."""


class UserError(Exception):
    """A mistake that the user can mend: every problem found, one line each. The CLI prints them and exits with 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunFailed(Exception):
    """A run that began well cannot go on. The CLI prints the message and exits with 1."""
