"""Messages for users, as text."""

from collections.abc import Callable

import pytest

from k2jax.errors import UserError


@pytest.fixture
def refusal() -> Callable[..., str]:
    """refusal(function, *arguments): the problems of the UserError that the call raises, a line each."""

    def problems_of(function, *arguments) -> str:
        with pytest.raises(UserError) as error:
            function(*arguments)
        return "\n".join(error.value.problems)

    return problems_of
