"""How large the five files are: lines, code tokens, options, and what is too long. Exits with 1
where a bound is broken.

    python tests/bench_size.py

Code tokens are those of `tokenize` without comments, docstrings, line ends and indentation; an
f-string is one token, as it is to Python 3.11.
"""
import argparse
import ast
import contextlib
import importlib
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
FILES = ["sft", "dpo", "grpo", "reward", "data"]
BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
         tokenize.ENDMARKER, tokenize.ENCODING}
BOUNDS = {"lines": 3000, "longest file": 800, "longest line": 100, "code tokens": 27_000,
          "tokens a code line": 12.0, "longest function": 70, "options": 110,
          "comprehensions with two for": 6}
SUMMED = ["lines", "code tokens", "options", "comprehensions with two for"]


def docstring_lines(tree):
    """The numbers of the lines that docstrings take."""
    lines = set()
    for node in ast.walk(tree):
        has_body = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if has_body and ast.get_docstring(node, clean=False) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_tokens(source, tree):
    """The tokens that count."""
    skipped = docstring_lines(tree)
    fstring_start = getattr(tokenize, "FSTRING_START", None)            # since Python 3.12
    fstring_end = getattr(tokenize, "FSTRING_END", None)
    tokens = []
    depth = 0                                                           # of nested f-strings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if depth == 0 and token.type not in BLANK and token.start[0] not in skipped:
            tokens.append(token)
        if token.type == fstring_start:
            depth += 1
        elif token.type == fstring_end:
            depth -= 1
    return tokens


def count_options(name):
    """How many options and arguments the parsers of a file declare, --help not counted: all that
    its parse_args adds, to the parser itself, its groups and its subcommands."""
    added = []
    stock = argparse._ActionsContainer.add_argument                     # of parsers and groups

    def add_argument(self, *names, **options):
        added.append(names)
        return stock(self, *names, **options)

    module = importlib.import_module(name)
    argparse._ActionsContainer.add_argument = add_argument
    try:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            module.parse_args([])
    except SystemExit:                               # all are declared by then
        assert "arguments are required" in printed.getvalue(), printed.getvalue()
    finally:
        argparse._ActionsContainer.add_argument = stock
    return sum("--help" not in names for names in added)


def measure(name):
    """({what: number} of one file, the name of its longest function)."""
    source = (ROOT / f"{name}.py").read_text()
    tree = ast.parse(source)
    tokens = code_tokens(source, tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    longest = max(functions, key=lambda node: node.end_lineno - node.lineno)
    num_double = sum(len(getattr(node, "generators", [])) > 1 for node in ast.walk(tree))
    num_code_lines = len({token.start[0] for token in tokens})
    numbers = {
        "lines": source.count("\n"),
        "longest line": max(map(len, source.split("\n"))),
        "code tokens": len(tokens),
        "tokens a code line": len(tokens) / num_code_lines,
        "longest function": longest.end_lineno - longest.lineno + 1,
        "options": count_options(name),
        "comprehensions with two for": num_double}
    return numbers, longest.name


def main():
    sizes = {}
    for name in FILES:
        sizes[name], longest = measure(name)
        row = [f"{what} {number:.4g}" for what, number in sizes[name].items()]
        print(f"{name + '.py':10s}", *row, f"({longest})", sep="  ")
    total = {"longest file": max(size["lines"] for size in sizes.values())}
    for what in BOUNDS:
        if what != "longest file":
            numbers = [size[what] for size in sizes.values()]
            total[what] = sum(numbers) if what in SUMMED else max(numbers)
    broken = [what for what, bound in BOUNDS.items() if total[what] > bound]
    for what, bound in BOUNDS.items():
        mark = "  BROKEN" if what in broken else ""
        print(f"{what:32s} {total[what]:8.6g}  at most {bound}{mark}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
