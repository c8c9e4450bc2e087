"""Reads a text with many faults: reports each once, goes on at the next statement."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from lark import Token, Tree, UnexpectedCharacters, UnexpectedInput, UnexpectedToken
from lark.lexer import TextSlice

from gkd_dsl.diagnostics import Diagnostics, Label
from gkd_dsl.syntax import scan, words
from gkd_dsl.syntax.faults import Plan, diagnose
from gkd_dsl.syntax.grammar import parser
from gkd_dsl.text import Source, Span

BRACKETS = 100
"""How deep brackets may nest."""

ERRORS = 100
"""After so many syntax errors the rest of a text is left unread."""

OPENERS = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
CLOSERS = {closer: opener for opener, closer in OPENERS.items()}
SYMBOL = {"LPAR": "(", "RPAR": ")", "LSQB": "[", "RSQB": "]", "LBRACE": "{", "RBRACE": "}"}
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ALIAS = re.compile(r"\bas[ \t]+([A-Za-z_][A-Za-z0-9_]*)")


def read(source: Source, start: str, diagnostics: Diagnostics) -> Tree | None:
    """Lark's tree of a text; faults go to `diagnostics`. None where nothing of an expression can be used."""
    return Reader(source, start, diagnostics).run()


class Reader:
    """Feeds the parser token by token, so that it can step in at a fault."""

    def __init__(self, source: Source, start: str, diagnostics: Diagnostics) -> None:
        self.source = source
        self.whole_file = start == "file"
        # Outside a file a line end means nothing, and every offset must stay what it is.
        self.text = source.text if self.whole_file else source.text.replace("\r", " ").replace("\n", " ")
        self.diagnostics = diagnostics
        self.interactive = parser().parse_interactive(self.text, start=start)
        self.state = self.interactive.parser_state
        self.thread = self.interactive.lexer_thread
        assert self.thread.state is not None
        self.lexer_state = self.thread.state
        self.brackets: list[tuple[Token, str]] = []
        """What is open: the token, and for a `{` the keyword of its statement."""
        self.line: list[Token] = []
        """The tokens of the statement being read."""
        self.base = len(self.state.state_stack)
        """How deep the parser's stack is where this statement starts."""
        self.mark: int | None = None
        """How deep it is where the value of this statement starts."""
        self.prefix: list[Token] = []
        """The `}` of a block that ends on this line."""
        self.tries: Counter[int] = Counter()
        self.extra_braces: int | None = None

    # --- the loop ---

    def run(self) -> Tree | None:
        """Read to the end."""
        while True:
            try:
                for token in self.thread.lex(self.state):
                    self.take(token)
                return self.finish()
            except UnexpectedInput as fault:
                if not self.recover(fault):
                    return None

    def take(self, token: Token) -> None:
        """Feed a token of the text."""
        kind = token.type
        if kind == "_NL":
            if self.inside_brackets or not self.line:
                return
        elif self.refused(token):
            raise UnexpectedToken(token, set())
        self.feed(token)

    def refused(self, token: Token) -> bool:
        """Whether a token is at fault that the grammar alone would take, or would find fault with too late."""
        if token.type in OPENERS and len(self.brackets) >= BRACKETS:
            return True
        if token.type in CLOSERS:
            return not self.brackets or self.brackets[-1][0].type != CLOSERS[token.type]
        return not self.line and self.block_is_unclosed(token)

    def feed(self, token: Token) -> None:
        """Feed a token, and keep what it opens, closes, starts or ends."""
        kind = token.type
        self.state.feed_token(token)
        if kind in OPENERS:
            self.brackets.append((token, str(self.line[0]) if self.line else ""))
        elif kind in CLOSERS:
            self.brackets.pop()
        if kind in ("_NL", "LBRACE", "RBRACE"):
            self.begin([token] if kind == "RBRACE" else [])
            return
        self.line.append(token)
        if self.mark is None and not self.inside_brackets and self.opens_value(kind):
            self.mark = len(self.state.state_stack)

    def opens_value(self, kind: str) -> bool:
        """Whether the value of this statement starts behind a token of this kind."""
        return kind == "ASSIGN" or (len(self.line) == 1 and kind in ("MINIMIZE", "TRAIN", "FREEZE", "EVALUATE"))

    def begin(self, prefix: list[Token]) -> None:
        """Start a statement; `prefix` holds the `}` behind which it would stand."""
        self.prefix = prefix
        self.line = list(prefix)
        self.base = len(self.state.state_stack)
        self.mark = None

    @property
    def inside_brackets(self) -> bool:
        """Whether a `(` or `[` is open."""
        return bool(self.brackets) and self.brackets[-1][0].type != "LBRACE"

    @property
    def open_here(self) -> list[Token]:
        """The `(` and `[` that are open in this statement, outermost first."""
        found: list[Token] = []
        for token, _ in reversed(self.brackets):
            if token.type == "LBRACE":
                break
            found.append(token)
        return found[::-1]

    @property
    def block(self) -> str:
        """The keyword of the block around this statement, or an empty text at the top level."""
        for token, keyword in reversed(self.brackets):
            if token.type == "LBRACE":
                return keyword or "block"
        return ""

    def finish(self) -> Tree | None:
        """The tree, once the text is at its end; raises where something is still missing."""
        end = Token("$END", "", len(self.text), end_pos=len(self.text))
        if self.brackets:
            raise UnexpectedToken(end, set())
        result: Tree = self.state.feed_token(end, is_end=True)
        return result

    # --- faults ---

    def block_is_unclosed(self, token: Token) -> bool:
        """Whether a block's `}` is missing before a declaration that stands no deeper than the block's own line."""
        if not self.brackets or str(token) not in words.TOP or self.left_open() <= 0:
            return False
        opener = self.brackets[-1][0]
        place = token.start_pos or 0
        return scan.starts_statement(self.text, place) and scan.indentation(self.text, place) <= scan.indentation(
            self.text, opener.start_pos or 0
        )

    def left_open(self) -> int:
        """How many `}` the text lacks, less those already reported."""
        if self.extra_braces is None:
            self.extra_braces = scan.unclosed_braces(self.text)
        return self.extra_braces

    def recover(self, fault: UnexpectedInput) -> bool:
        """Report a fault and bring the parser to where reading can go on; False at the end of an expression."""
        token = self.offender(fault)
        place = token.start_pos or 0
        self.tries[place] += 1
        if len(self.diagnostics.errors) >= ERRORS:
            return self.give_up(place)
        plan = diagnose(self, token)
        if not self.whole_file:
            return False
        if self.tries[place] > 4 or (token.type == "$END" and plan.skip and not self.line):
            # Nothing put in here helps: leave the line.
            self.drop_statement()
            newline = self.text.find("\n", place + 1)
            if newline < 0:
                self.close_all()
            self.jump(newline if newline >= 0 else len(self.text))
        else:
            self.apply(plan, token)
        return True

    def offender(self, fault: UnexpectedInput) -> Token:
        """The token at fault; a character that starts none gives a token of type `BAD`."""
        if isinstance(fault, UnexpectedToken):
            token = fault.token
            if token.type == "$END":
                return Token("$END", "", len(self.text), end_pos=len(self.text))
            return token
        assert isinstance(fault, UnexpectedCharacters)
        place = fault.pos_in_stream or 0
        return Token("BAD", self.text[place : place + 1], place, end_pos=place + 1)

    def give_up(self, place: int) -> bool:
        """Leave the rest unread, with a note that says so."""
        self.diagnostics.error(
            "E0130",
            f"more than {ERRORS} syntax errors; the rest is not read",
            self.span(place, place + 1),
            "stopped here",
        )
        if not self.whole_file:
            return False
        self.drop_statement()
        self.close_all()
        self.jump(len(self.text))
        return True

    # --- what a plan does ---

    def apply(self, plan: Plan, token: Token) -> None:
        """Change text and stack as a plan says."""
        place = token.start_pos or 0
        if plan.rewrite is not None:
            start, end, text = plan.rewrite
            assert len(text) == end - start
            self.text = self.text[:start] + text + self.text[end:]
            self.lexer_state.text = TextSlice.cast_from(self.text)
        for _ in range(plan.pop):
            self.state.state_stack.pop()
            self.state.value_stack.pop()
            self.line.pop()
        if plan.skip or not self.put(plan.put, place):
            self.skip_statement(place if plan.at is None else min(place, plan.at), plan.at)
            return
        self.jump(place if plan.at is None else plan.at)

    def put(self, tokens: Sequence[tuple[str, str]], place: int) -> bool:
        """Feed tokens that the text lacks; False where the parser refuses them."""
        if tokens and not self.can(*(kind for kind, _ in tokens)):
            return False
        for kind, text in tokens:
            if kind == "RBRACE":
                self.extra_braces = self.left_open() - 1
            self.feed(Token(kind, text, place, end_pos=place))
        return True

    def can(self, *kinds: str) -> bool:
        """Whether the parser takes these tokens, one after the other."""
        trial = self.state.copy(deepcopy_values=False)
        conf = type(trial.parse_conf)(trial.parse_conf.parse_table, {}, trial.parse_conf.start)
        trial.parse_conf = conf
        try:
            for kind in kinds:
                trial.feed_token(Token(kind, ""), kind == "$END")
        except UnexpectedToken:
            return False
        return True

    def accepts(self) -> set[str]:
        """The terminals that may come next."""
        return {kind for kind in self.interactive.choices() if kind.isupper() and self.can(kind)}

    def jump(self, place: int) -> None:
        """Go on reading at a place."""
        self.lexer_state.line_ctr.char_pos = place

    def drop_statement(self) -> None:
        """Forget what was read of this statement."""
        del self.state.state_stack[self.base :]
        del self.state.value_stack[self.base - 1 :]
        self.leave_brackets()
        self.line = list(self.prefix)
        self.mark = None

    def leave_brackets(self) -> None:
        """Forget the `(` and `[` of this statement."""
        while self.inside_brackets:
            self.brackets.pop()

    def skip_statement(self, place: int, at: int | None) -> None:
        """Keep of a broken statement its name, with a missing value, and go on behind it."""
        first = self.line[0].start_pos or 0 if self.line else place
        end = scan.statement_end(self.text, place, len(self.open_here))
        if at is not None and self.text[at : at + 1] in ("\n", "\r", ""):
            end = scan.End(at, "newline" if at < len(self.text) else "end")
        head = [str(token) for token in self.line] or _WORD.findall(self.text, first, end.at)[:2]
        opens = end.by == "open"
        if self.mark is not None and self.mark <= len(self.state.state_stack):
            del self.state.state_stack[self.mark :]
            del self.state.value_stack[self.mark - 1 :]
            self.leave_brackets()
            if self.put([("MISSING", "")], place) and (self.can("LBRACE") if opens else self.can("_NL")):
                self.after(end, opens)
                return
        self.drop_statement()
        self.put(self.stand_in(head, first, end, opens), first)
        self.after(end, opens)

    def stand_in(self, head: list[str], first: int, end: scan.End, opens: bool) -> list[tuple[str, str]]:
        """A statement that declares what the broken one would have, as far as it can be told."""
        keyword = head[0] if head else ""
        keyword = keyword if keyword in words.STATEMENTS else self.near_keyword(keyword)
        name = head[1] if len(head) > 1 and _WORD.fullmatch(head[1]) else ""
        if opens and keyword in ("stage", "method", "runtime"):
            shapes = {
                "stage": [("STAGE", "stage"), ("NAME", name)],
                "method": [("METHOD", "method"), ("NAME", name), ("LPAR", "("), ("RPAR", ")")],
                "runtime": [("RUNTIME", "runtime")],
            }
            return shapes[keyword]
        if keyword in words.WITH_VALUE and (name or opens):
            return [(keyword.upper(), keyword), ("NAME", name), ("ASSIGN", "="), ("MISSING", "")]
        alias = _ALIAS.findall(self.text, first, end.at)
        if keyword in ("use", "import") and alias:
            name = alias[-1]
        if name and keyword in ("param", "counter", "method", "use", "import"):
            return [("LET", "let"), ("NAME", name), ("ASSIGN", "="), ("MISSING", "")]
        return []

    def near_keyword(self, word: str) -> str:
        """The keyword that a misspelt one was meant for, or an empty text."""
        from gkd_dsl.diagnostics.suggest import did_you_mean

        near = did_you_mean(word, words.BLOCK if self.block else words.TOP, 1)
        return near[0] if near else ""

    def after(self, end: scan.End, opens: bool) -> None:
        """Go on behind a broken statement: into its block where it has one."""
        if not opens:
            self.jump(end.at)
            return
        if self.line and self.can("LBRACE"):
            self.feed(Token("LBRACE", "{", end.at, end_pos=end.at + 1))
            self.jump(end.at + 1)
            return
        close = scan.matching_brace(self.text, end.at)
        newline = self.text.find("\n", end.at)
        self.jump(close + 1 if close is not None else newline if newline >= 0 else len(self.text))
        if self.line and not self.can("_NL"):
            self.drop_statement()

    def close_all(self) -> None:
        """Close every block that is open."""
        while self.brackets:
            if not self.can("RBRACE"):
                self.drop_statement()
            place = len(self.text)
            self.feed(Token("RBRACE", "}", place, end_pos=place))

    # --- places ---

    def span(self, start: int, end: int) -> Span:
        """The span between two offsets, kept inside the text."""
        size = len(self.source.text)
        start = max(0, min(start, size))
        return Span(self.source, start, max(start, min(end, size)))

    def span_of(self, token: Token) -> Span:
        """Where a token stands."""
        start = token.start_pos or 0
        return self.span(start, token.end_pos if token.end_pos is not None else start + len(token))

    def opened(self, token: Token) -> Label:
        """The label of an opening bracket."""
        return Label(self.span_of(token), "opened here", primary=False)
