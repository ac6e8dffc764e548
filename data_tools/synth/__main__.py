"""Draw synthetic documents: pages in the shape of users' own data, or text lines as shards.

    python -m data_tools.synth DATA --num 300 --seed 0
    python -m data_tools.synth DATA --num 300 --style inverted --kind mixed
    python -m data_tools.synth SHARDS --kind lines --num 150000 --fonts DIR --heldout "OCR-B,Hack"

Pages (`receipts`, `forms`, `mixed`) come out as DATA/images and DATA/labels.jsonl, to be read by
`python -m data_tools.build`. Lines come out as SHARDS/train-000000.tar, SHARDS/val-000000.tar and
so on, and need fonts: on Debian, packages such as fonts-dejavu-core, fonts-liberation,
fonts-freefont-ttf, fonts-inconsolata, fonts-hack, fonts-roboto-unhinted, fonts-ocr-a, which lie
below /usr/share/fonts. Typed again, the command goes on where it stopped or says that it is done.
"""

import argparse

from data_tools.errors import ConfigError, run_command
from data_tools.jobs import num_usable_cores
from data_tools.synth.grammar import MAX_CELL_CHARS
from data_tools.synth.lines import LineSettings, write_lines
from data_tools.synth.pages import PageSettings, write_pages


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and check what the parser cannot.

    Raises:
        ConfigError: if a number is out of range or an option does not fit the kind.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.synth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", help="folder or URL to write to")
    parser.add_argument("--num", type=int, default=300, help="pages or lines, all splits together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=("receipts", "forms", "mixed", "lines"), default="mixed")
    parser.add_argument("--fonts", nargs="+", action="extend", default=[], metavar="DIR")
    parser.add_argument("--style", choices=("plain", "inverted"), default="plain")
    parser.add_argument("--workers", type=int, default=num_usable_cores())
    parser.add_argument("--split-val", type=float, default=0.15, help="share for validation")
    lines = parser.add_argument_group("lines only")
    lines.add_argument(
        "--max-chars", type=int, default=MAX_CELL_CHARS, help="most characters a line"
    )
    lines.add_argument(
        "--heldout", default="", metavar="NAME[,NAME]", help="font families for validation only"
    )
    lines.add_argument(
        "--upper", action="store_true", help="upper-case labels whatever is printed, as SROIE has"
    )
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.num < 1 or options.workers < 1 or options.max_chars < 1:
        raise ConfigError("--num, --workers and --max-chars must be at least 1")
    if not 0 <= options.split_val < 1:
        raise ConfigError(f"--split-val {options.split_val}: expected a share in [0, 1)")
    if options.kind == "lines" and not options.fonts:
        raise ConfigError(
            "--kind lines needs --fonts DIR ...: Pillow's own face is kept out, so that a "
            "model trained on the lines has never seen it; see --help for Debian packages of fonts"
        )
    if options.kind != "lines" and (options.heldout or options.upper):
        raise ConfigError("--heldout and --upper belong to --kind lines only")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse_arguments(arguments)
    is_inverted = options.style == "inverted"
    if options.kind == "lines":
        heldout = [name.strip() for name in options.heldout.split(",") if name.strip()]
        num_new, num_shards = write_lines(
            options.out,
            options.num,
            LineSettings(options.seed, options.max_chars, options.upper, is_inverted),
            options.fonts,
            heldout,
            options.split_val,
            options.workers,
        )
        print(f"{options.out}: {options.num} lines in {num_shards} shards, {num_new} written now")
        return 0
    has_drawn = write_pages(
        options.out,
        options.num,
        PageSettings(options.kind, options.seed, is_inverted),
        options.fonts,
        options.split_val,
        options.workers,
    )
    state = "written" if has_drawn else "already there, nothing to do"
    print(f"{options.out}: {options.num} documents, {state}")
    return 0


if __name__ == "__main__":
    run_command(main)
