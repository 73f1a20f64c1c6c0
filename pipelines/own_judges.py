"""Judges that a user passes to training in Python: a function, or a judge of ``reward_models``. No setting can name them, so a
run records a digest of what they are made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from torch import Tensor

from diffalign.errors import UserError
from reward_models._judge import Scorer
from reward_models.base import JudgeError

RewardFunction = Callable[[Tensor, Sequence[str]], Any]
"""Pictures [N, 3, H, W] in [0, 1] and their prompts to N numbers, larger is better; or to these and a mapping, as the reward
functions of DDPO's code give them."""
OwnJudge = RewardFunction | Scorer


def check(judge: Any) -> None:
    """Raises UserError for what cannot reward training."""
    if isinstance(judge, Scorer):
        try:
            judge.check_pointwise()
        except JudgeError as error:
            raise UserError(f"{error}.") from error
    elif isinstance(owner := getattr(judge, "__self__", None), Scorer):
        raise UserError(
            f"judge was given {judge.__name__!r} of the judge {owner.info.name!r}, which does not say whether higher is better: "
            "give the judge itself."
        )
    elif not callable(judge):
        raise UserError(f"judge is a judge, or a function of pictures and prompts; got {judge!r}. Names are for reward=.")


def is_judge(judge: OwnJudge) -> bool:
    """Whether it is a ``Scorer``, which can score files and states whether higher is better; a function cannot."""
    return isinstance(judge, Scorer)


def name_of(judge: OwnJudge) -> str:
    """Name of the judge in the run's record."""
    return judge.info.name if isinstance(judge, Scorer) else getattr(judge, "__name__", type(judge).__name__)


def judge_digest(judge: OwnJudge) -> str:
    """16 hexadecimal digits for what decides a judge's numbers, as far as that can be seen: its own fingerprint, or else its
    compiled code and the constants in it, but neither the functions that it calls nor state that it gathered since."""
    if isinstance(judge, Scorer) and all(part.says_what_it_is for part in judge.parts):
        return judge.fingerprint[:16]
    if isinstance(judge, Scorer):
        seen = [judge.info, *((part.info, _seen(type(part).score_prepared)) for part in judge.parts)]
    else:
        seen = [name_of(judge), _seen(judge)]
    return hashlib.sha256(repr(seen).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def provenance_of(judge: Scorer) -> dict[str, Any]:
    """The judge's own provenance; where that does not state what decides its numbers, with a digest of its code, so that
    interrupted work is not resumed with another judge of that name."""
    said = all(part.says_what_it_is for part in judge.parts)
    return judge.provenance() if said else {**judge.provenance(), "code": judge_digest(judge)}


def _seen(function: Any) -> Any:
    """The code of a function, of a partial's function, or of an object's ``__call__``."""
    if hasattr(function, "func"):  # functools.partial
        return [_seen(function.func), _plain([*function.args, *function.keywords.values()])]
    if not hasattr(function, "__code__"):
        call = type(function).__call__
        return _code(call.__code__) if hasattr(call, "__code__") else type(function).__qualname__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [_code(function.__code__), _plain(function.__defaults__ or ()), _plain(cells)]


def _code(code: CodeType) -> Any:
    """The code without its line numbers, which change with every cell of a notebook."""
    constants = [_code(value) if isinstance(value, CodeType) else value for value in code.co_consts]
    return [code.co_code.hex(), code.co_names, [sorted(c) if isinstance(c, frozenset) else c for c in constants]]


def _plain(values: Sequence[Any]) -> list[Any]:
    """Numbers and texts as they are, other values as the names of their types, for a ``repr`` may contain an address."""
    return [value if isinstance(value, (bool, int, float, str)) else type(value).__qualname__ for value in values]
