"""Errors for users: a mistake that the user can correct, and a run that failed. Imports nothing of ours."""


class UserError(Exception):
    """A mistake that the user can correct: every problem found, one line each. The CLI prints them and exits with 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunFailed(Exception):
    """A run that began well cannot go on. The CLI prints the message and exits with 1."""


class Stopped(RunFailed):
    """A run that signal `number` ended at once. The CLI prints the message and exits with 128 + number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class Stuck(RunFailed):
    """A process gave no sign of life for longer than it may. The CLI prints the message and exits with 124, as timeout(1)."""


def exit_code(error: BaseException) -> int:
    """The command's exit code for an error that ends it: 2 if its user can correct it, 124 if it is stuck, 128 + n for signal n, else 1."""
    if isinstance(error, Stopped):
        return 128 + error.number
    if isinstance(error, Stuck):
        return 124
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def first_of(problems: list[str], most: int = 10) -> list[str]:
    """The first `most` problems, and one line that counts them all if there are more."""
    rest = [f"{len(problems)} problems of this kind in all; the first {most} are above"] if len(problems) > most else []
    return [*problems[:most], *rest]
