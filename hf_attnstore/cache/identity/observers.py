"""Hooks that only look: whose code shows that they change nothing of what a model computes.

They read what they are given, count and write down in lists of their own, may raise, and return None. Whatever else a
hook does makes it a part of what computes (`computing.py`), also if it happens to be harmless.
"""

import builtins
import dis
import functools
import types
from collections import Counter, deque
from typing import Any

from .callables import cell_content

_CONTAINERS = (list, set, dict, deque, Counter)
_FILLING = frozenset("append appendleft extend add".split())
_READING = frozenset("size dim numel tolist item get keys values items detach cpu clone count index".split())
_BUILTINS = frozenset("len int float bool str repr tuple list isinstance min max sum abs id type range".split())
_STEPS = frozenset(
    "RESUME NOP CACHE COPY_FREE_VARS LOAD_FAST LOAD_FAST_CHECK LOAD_FAST_BORROW LOAD_FAST_LOAD_FAST "
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW LOAD_CONST LOAD_SMALL_INT LOAD_DEREF LOAD_GLOBAL LOAD_ATTR LOAD_METHOD "
    "BINARY_SUBSCR BINARY_OP COMPARE_OP IS_OP CONTAINS_OP UNARY_NOT TO_BOOL PRECALL CALL KW_NAMES POP_TOP STORE_FAST "
    "RETURN_VALUE RETURN_CONST RAISE_VARARGS BUILD_TUPLE BUILD_LIST UNPACK_SEQUENCE NOT_TAKEN "
    "LIST_EXTEND LIST_APPEND LIST_TO_TUPLE GET_ITER FOR_ITER END_FOR POP_ITER".split()
)
_BOUNDS = ("POP_TOP", "STORE_FAST", "RESUME", "RAISE_VARARGS")


def only_looks(hook: Any) -> bool:
    """Whether a hook is known to change nothing of what the model computes, whatever it is given."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    if not isinstance(function, types.FunctionType):
        return False
    steps = [step for step in dis.get_instructions(function.__code__) if step.opname != "CACHE"]
    return all(_is_harmless(function, steps, place) for place in range(len(steps)))


def _is_harmless(function: types.FunctionType, steps: list[dis.Instruction], place: int) -> bool:
    step = steps[place]
    if "JUMP" in step.opname:
        return True
    if step.opname not in _STEPS or (step.opname == "BINARY_OP" and step.argrepr.endswith("=")):
        return False
    if step.opname == "LOAD_GLOBAL":
        return _is_harmless_global(function, step)
    if _is_method(step):
        return step.argval in _READING or _fills(function, steps, place)
    if step.opname == "RETURN_CONST":
        return step.argval is None
    if step.opname == "RETURN_VALUE":
        before = steps[place - 1]
        if before.opname == "CALL":
            return _fills_first(function, steps, place)
        return before.opname == "LOAD_CONST" and before.argval is None
    return True


def _is_method(step: dis.Instruction) -> bool:
    return step.opname == "LOAD_METHOD" or (step.opname == "LOAD_ATTR" and "NULL" in step.argrepr)


def _is_harmless_global(function: types.FunctionType, step: dis.Instruction) -> bool:
    name = step.argval
    if "NULL" not in step.argrepr:
        return type(function.__globals__.get(name)) in (*_CONTAINERS, int, float, str, bool, tuple) or _is_error(name)
    return name not in function.__globals__ and (name in _BUILTINS or _is_error(name))


def _is_error(name: str) -> bool:
    found = getattr(builtins, name, None)
    return isinstance(found, type) and issubclass(found, BaseException)


def _fills(function: types.FunctionType, steps: list[dis.Instruction], place: int) -> bool:
    """Whether a method puts something into a plain container of the hook's own; such a method gives back None."""
    holder = steps[place - 1]
    if steps[place].argval not in _FILLING:
        return False
    if holder.opname == "LOAD_GLOBAL":
        return type(function.__globals__.get(holder.argval)) in _CONTAINERS
    if holder.opname != "LOAD_DEREF" or holder.argval not in function.__code__.co_freevars:
        return False
    cell = (function.__closure__ or ())[function.__code__.co_freevars.index(holder.argval)]
    return type(cell_content(cell)) in _CONTAINERS


def _fills_first(function: types.FunctionType, steps: list[dis.Instruction], place: int) -> bool:
    """Whether the call whose result is returned is one that fills: the outermost one is loaded first."""
    start = place
    while start and steps[start - 1].opname not in _BOUNDS and "JUMP" not in steps[start - 1].opname:
        start -= 1
    for number in range(start, place):
        step = steps[number]
        if _is_method(step) or (step.opname == "LOAD_GLOBAL" and "NULL" in step.argrepr):
            return _is_method(step) and _fills(function, steps, number)
    return False
