"""What the teacher is shown beside the question: the named templates, and texts that users write.

A line gives the teacher something that the student does not see: a demonstration, a context, feedback on an earlier attempt,
or several of these. Whatever a line lacks is left out of the named templates and is empty in a text of one's own. Torch-free.
"""

import json
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdft_engine.contract.dataset import Demonstration
from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.contract.quoting import shortened

NAMED_TEMPLATES = ("example", "history", "history_twice")
HINTS = ("demonstration", "context", "feedback")
"""Fields of a template that tell the teacher more than the student knows; a template has at least one."""
TEMPLATE_FIELDS = frozenset({"question", "attempt", *HINTS})
MAX_USES_OF_A_FIELD = 4
"""Each use repeats a text that may be as large as a line of the file."""

CONTEXT = """Use the following information:

{context}

"""
EXAMPLE = """Here is an example of a good response to this question:

{demonstration}

"""
ATTEMPT = """Here is an earlier attempt at a response:

{attempt}

"""
FEEDBACK = """Here is feedback on {attempts}:

{feedback}

"""
RESPOND = "Now give a response of your own to the question, including your thinking if the question needs any."
REASON = "Now think the question through step by step in your own words, and then give a response of your own to it."
ASK_AGAIN = "Please answer the question again: {question}"
CONTINUE_AFTER_TOOL = "Continue from the tool result above."
CONTINUE = "Continue the conversation above."
PARAM = "method.sdft.teacher_template"


@dataclass(frozen=True)
class TeacherView:
    """How the teacher is shown a line. `reasoning`: the example template asks for the thoughts that lead to the answer, for
    demonstrations that come without them."""

    template: str = "example"
    reasoning: bool = False


def check_teacher_template(template: str) -> None:
    """Raise ConfigurationError unless `template` is a known name or a usable text."""
    if template in NAMED_TEMPLATES:
        return
    try:
        parsed = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigurationError(f"teacher_template is not a valid template: {error}", param=PARAM) from error
    fields = Counter(name or "" for name, _, _ in parsed)
    if any(format_spec or conversion for _, format_spec, conversion in parsed):
        raise ConfigurationError("teacher_template may not use format specifications; write {{ and }} for braces that are text", param=PARAM)
    if unknown := sorted(fields.keys() - TEMPLATE_FIELDS):
        known = ", ".join(sorted(TEMPLATE_FIELDS))
        raise ConfigurationError(f"teacher_template has the unknown field {{{shortened(unknown[0])}}}; known are {known}", param=PARAM)
    if not fields.keys() & set(HINTS):
        names, hints = ", ".join(NAMED_TEMPLATES), " or ".join(f"{{{hint}}}" for hint in HINTS)
        raise ConfigurationError(f"teacher_template must be one of {names} or a text with {hints}", param=PARAM)
    name, uses = fields.most_common(1)[0]
    if uses > MAX_USES_OF_A_FIELD:
        raise ConfigurationError(f"teacher_template may use {{{name}}} at most {MAX_USES_OF_A_FIELD} times, not {uses:,} times", param=PARAM)


def require_hint(demonstration: Demonstration, template: str) -> None:
    """Raise ConfigurationError where a template shows the teacher nothing of this line that the student does not see."""
    if template in NAMED_TEMPLATES:
        return
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    has = {"demonstration": demonstration.answer, "context": demonstration.context, "feedback": demonstration.feedback}
    if not any(has[name] for name in fields & set(HINTS)):
        wanted = " or ".join(sorted(fields & set(HINTS)))
        raise ConfigurationError(
            f"line {demonstration.line}: teacher_template shows only the {wanted}, and this line has none: add it to the line, or use another template",
            param=PARAM,
        )


def unshown_hints(demonstrations: Sequence[Demonstration], template: str) -> dict[str, int]:
    """How many lines have a demonstration, context or feedback that the template has no place for, by its name. The named templates
    show all there is."""
    if template in NAMED_TEMPLATES:
        return {}
    shown = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    has = {
        "demonstration": sum(each.answer is not None for each in demonstrations),
        "context": sum(each.context is not None for each in demonstrations),
        "feedback": sum(each.feedback is not None for each in demonstrations),
    }
    return {name: count for name, count in has.items() if count and name not in shown}


def teacher_messages(demonstration: Demonstration, view: TeacherView) -> list[dict[str, Any]]:
    """The conversation that the teacher sees. System messages, earlier turns and tool results are kept."""
    template = view.template
    if template in ("history", "history_twice"):
        return _history(demonstration, twice=template == "history_twice")
    prompt = demonstration.prompt
    ends_with_user = prompt[-1]["role"] == "user"
    question = _question(demonstration)
    shown = _example(demonstration, question, view.reasoning) if template == "example" else template.format(question=question, **_filled(demonstration))
    return [*(prompt[:-1] if ends_with_user else prompt), _user(shown)]


def answer_text(answer: dict[str, Any]) -> str:
    """A demonstration as text: its content, and its tool calls as JSON."""
    calls = json.dumps(answer["tool_calls"], ensure_ascii=False) if answer.get("tool_calls") else ""
    return "\n".join(part for part in (answer.get("content") or "", calls) if part)


def _example(demonstration: Demonstration, question: str, reasoning: bool) -> str:
    """One user message: context, question, then what helps with it. A question with nothing but a context is asked plainly."""
    fields = _filled(demonstration)
    helps = _review(demonstration)
    if demonstration.answer:
        helps += EXAMPLE.format(**fields)
    asked = f"{question}\n\n{helps}{REASON if reasoning else RESPOND}" if helps else question
    return _context(demonstration) + asked


def _history(demonstration: Demonstration, *, twice: bool) -> list[dict[str, Any]]:
    """The attempt and the demonstration as turns of the conversation, each followed by the question once more."""
    prompt, answer, attempt = demonstration.prompt, demonstration.answer, demonstration.attempt
    ends_with_user = prompt[-1]["role"] == "user"
    again = ASK_AGAIN.format(question=_question(demonstration))
    if not answer and not attempt:
        kept, question = (prompt[:-1], prompt[-1]["content"]) if ends_with_user else (prompt, _question(demonstration))
        return [*kept, _user(_context(demonstration) + _review(demonstration) + question)]
    messages = [*prompt]
    if attempt:
        corrected = _feedback(demonstration) + again
        messages += [{"role": "assistant", "content": attempt}, _user(corrected if answer else _context(demonstration) + corrected)]
    elif demonstration.feedback:
        again = _feedback(demonstration) + again
    if answer:
        messages.append(answer)
        if twice:
            messages += [prompt[-1] if ends_with_user else _user(_context(demonstration) + again), answer]
        messages.append(_user(_context(demonstration) + again))
    return messages


def _question(demonstration: Demonstration) -> str:
    last = demonstration.prompt[-1]
    if last["role"] == "user":
        return str(last["content"])
    return CONTINUE_AFTER_TOOL if last["role"] in ("tool", "function") else CONTINUE


def _filled(demonstration: Demonstration) -> dict[str, str]:
    return {
        "demonstration": answer_text(demonstration.answer) if demonstration.answer else "",
        "context": demonstration.context or "",
        "attempt": demonstration.attempt or "",
        "feedback": demonstration.feedback or "",
    }


def _context(demonstration: Demonstration) -> str:
    return CONTEXT.format(context=demonstration.context) if demonstration.context else ""


def _review(demonstration: Demonstration) -> str:
    attempt = ATTEMPT.format(attempt=demonstration.attempt) if demonstration.attempt else ""
    return attempt + (_feedback(demonstration) if demonstration.feedback else "")


def _feedback(demonstration: Demonstration) -> str:
    return FEEDBACK.format(attempts="that attempt" if demonstration.attempt else "earlier attempts", feedback=demonstration.feedback)


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}
