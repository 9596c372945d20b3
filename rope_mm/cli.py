"""The command rope-mm: properties of the schemes, what one does, whether it is a rotary encoding.

rope-mm schemes --format markdown
rope-mm show rope-tv "text:5 image:2x3" --head-dim 64
rope-mm check m-rope
rope-mm choose vit
rope-mm train adversarial --config digits
rope-mm lens rope-tv "text:5 image:4x6 text:5" --compare m-rope --out pictures
"""

import argparse
import json
import math
import os
import runpy
import sys
import webbrowser
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rope_mm import __version__
from rope_mm.analysis.check import check_rotary
from rope_mm.analysis.choosing import CHOICES, explain_choice, list_tasks
from rope_mm.analysis.explorer import serve
from rope_mm.analysis.figures import save_figure
from rope_mm.analysis.pictures import EXAMPLE, PICTURES, NotShown, picture, text_picture
from rope_mm.analysis.properties import FORMATS, HEAD_DIM, legend, properties_table
from rope_mm.registry import Registry
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.frequencies import ownership_map
from rope_mm.schemes.zoo import SCHEMES
from rope_mm.segments import parse_segments

PACKAGE = Path(__file__).parent
# a wheel has the training programs and their configurations inside the package, a checkout beside it
PROGRAMS, CONFIGS = (
    (PACKAGE / "programs", PACKAGE / "configs")
    if (PACKAGE / "programs").is_dir()
    else (PACKAGE.parent / "train", PACKAGE.parent / "configs")
)
# the folder of a program's configurations, where it has another name
CONFIG_FOLDERS = {
    "compare_factors": "factors",
    "compare_heads": "heads",
    "compare_losses": "adversarial",
    "compare_schemes": "compare",
    "gaussians": "adversarial",
}
MOST_SHOWN = 100_000  # tokens, a line each
MOST_SHOWN_CHANNELS, MOST_CHECKED_CHANNELS = 16_384, 1024  # of a head, whose matrices are checked
SHOWN = "text:2 image:2x3 text:2"  # where no segments are given


def print_schemes(args: argparse.Namespace) -> int:
    """The table of properties and, where a person reads it, what its columns mean."""
    if args.only_names:
        print("\n".join(args.names or SCHEMES))
        return 0
    print(properties_table(args.names or SCHEMES, args.format))
    if args.format == "text":
        print(f"\n{legend()}")
    return 0


def check_head_dim(head_dim: int, most: int) -> int:
    """The channels of a head, if there are not too many for a command.

    Raises:
        ValueError: more than `most`.
    """
    if head_dim > most:
        raise ValueError(f"--head-dim {head_dim} is too wide for this command; {most} channels are the most")
    return head_dim


def wavelengths(rope: Rotary) -> list[str]:
    """The shortest and the longest wave of each axis, in positions for a full turn."""
    lines = []
    for axis, freqs in zip(rope.scheme.axes, rope.omega.abs().movedim(-2, 0).flatten(1), strict=True):
        waves = math.tau / freqs[freqs > 0]
        found = f"{waves.min():.4g} to {waves.max():.4g}" if len(waves) else "not rotated"
        lines.append(f"{axis:4}{found}")
    return lines


def print_positions(args: argparse.Namespace) -> int:
    """The axis of each pair, the waves of each axis, and the position of every token."""
    segments = parse_segments(args.segments)
    if (tokens := sum(segment.tokens for segment in segments)) > MOST_SHOWN:
        raise ValueError(f"{tokens} tokens are too many to show, a line each; {MOST_SHOWN} are the most")
    rope = Rotary(check_head_dim(args.head_dim, MOST_SHOWN_CHANNELS), args.name, heads=args.heads)
    axes = rope.scheme.axes
    positions, cursor = rope.place(segments)
    names = [str(segment) for segment in segments for _ in range(segment.tokens)]
    print(json.dumps(rope.scheme.to_dict()))
    print(f"\naxis of each pair, in the order of channels\n{ownership_map(rope.omega, axes)}")
    print("\nwavelengths in positions", *wavelengths(rope), sep="\n")
    print(f"\n{'token':>5}  {'segment':16}{''.join(f'{axis:>10}' for axis in axes)}")
    for number, (name, position) in enumerate(zip(names, positions.tolist(), strict=True)):
        print(f"{number:5}  {name:16}{''.join(f'{value:10.6g}' for value in position)}")
    print(f"{'next':>5}  {'text':16}{cursor.next:10.6g}")
    return 0


def print_check(args: argparse.Namespace) -> int:
    """The report of `check_rotary`; 1 if it found an error."""
    report = check_rotary(
        Rotary(check_head_dim(args.head_dim, MOST_CHECKED_CHANNELS), args.name, heads=args.heads)
    )
    print(report)
    return 0 if report.ok else 1


def print_choice(args: argparse.Namespace) -> int:
    """What to take for a task; the tasks, where none is named."""
    if args.task is None:
        print(f"{list_tasks()}\n\nrope-mm choose TASK says what to take for it, and why")
        return 0
    print(explain_choice(args.task, args.head_dim))
    return 0


def explore(args: argparse.Namespace) -> int:
    """Serve the page of the explorer until Ctrl-C."""
    server = serve(args.port)
    address = f"http://127.0.0.1:{server.server_port}/"
    print(f"the explorer is at {address} (this machine only); Ctrl-C stops it", flush=True)
    if not args.no_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
    return 0


def show_pictures(args: argparse.Namespace) -> int:
    """Where tokens stand, in characters; with --out all pictures as PNG files, two schemes side by side."""
    print(text_picture(args.name, args.segments))
    if args.compare:
        print(f"\n{args.compare}\n{text_picture(args.compare, args.segments)}")
    for name in PICTURES if args.out else ():
        try:
            figure = picture(name, args.name, args.segments, head_dim=args.head_dim, compare=args.compare)
        except NotShown as reason:
            print(f"no picture of {name}: {reason}")
            continue
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            save_figure(args.out / f"{name}.png", figure)
        except OSError as error:
            raise ValueError(f"cannot write pictures to {args.out}: {error}") from None
        print(args.out / f"{name}.png")
    return 0


def programs() -> Registry[Path]:
    """The training programs, by their names."""
    found = {path.stem: path for path in sorted(PROGRAMS.glob("*.py")) if path.stem != "bench"}
    return Registry("program", found)


def find_config(program: str, name: str) -> str:
    """The path of a configuration: a file's own, or a name such as `digits`, which this package has.

    Raises:
        ValueError: neither a file nor a name, with the names there are.
    """
    if Path(name).exists():
        return name
    folder = CONFIGS / CONFIG_FOLDERS.get(program, program)
    named = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return str(Registry(f"configuration of {program}", named)[name])


def train(args: argparse.Namespace) -> int:
    """Run a training program in this process, with its own flags."""
    import_module("rope_mm.training")  # without its extra it says what to install
    path = programs()[args.program]
    flags = list(args.flags)
    for place, flag in enumerate(flags):
        if flag == "--config" and place + 1 < len(flags):
            flags[place + 1] = find_config(args.program, flags[place + 1])
        elif flag.startswith("--config="):
            flags[place] = f"--config={find_config(args.program, flag.partition('=')[2])}"
    sys.argv = [str(path), *flags]
    sys.path.insert(0, str(path.parent))  # programs import their neighbours
    runpy.run_path(str(path), run_name="__main__")
    return 0


def add_train(commands: Any) -> None:
    """The subcommand train."""
    page = commands.add_parser("train", help="run a training program (needs rope-mm[train])", add_help=False)
    page.add_argument("program", metavar="PROGRAM", help=f"one of {', '.join(programs())}")
    page.add_argument("flags", nargs=argparse.REMAINDER, help="its own flags; --help lists them")
    page.set_defaults(run=train)


def add_lens(commands: Any) -> None:
    """The subcommand lens."""
    lens = commands.add_parser("lens", help="pictures of a scheme, or of two side by side")
    lens.add_argument("name", metavar="NAME", help="a scheme, such as rope-tv")
    lens.add_argument(
        "segments", metavar="SEGMENTS", nargs="?", default=EXAMPLE, help='"%(default)s" if omitted'
    )
    lens.add_argument("--compare", metavar="NAME", help="a second scheme")
    lens.add_argument("--head-dim", type=int, default=HEAD_DIM, help="channels of a head (%(default)s)")
    lens.add_argument("--out", type=Path, metavar="DIR", help="write PNG files there (needs rope-mm[plots])")
    lens.set_defaults(run=show_pictures)


def add_schemes(commands: Any) -> None:
    """The subcommand schemes."""
    schemes = commands.add_parser(
        "schemes",
        help="a table of the properties of every scheme, measured",
        epilog=f"columns:\n{legend()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    schemes.add_argument("names", metavar="NAME", nargs="*", help="schemes; all if none is named")
    schemes.add_argument("--names", action="store_true", dest="only_names", help="the names alone, at once")
    schemes.add_argument("--format", choices=FORMATS, default="text", help="of the table (%(default)s)")
    schemes.set_defaults(run=print_schemes)


def add_show_and_check(commands: Any) -> None:
    """The subcommands show and check, of one scheme in one size."""
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument(
        "name", metavar="NAME", help="a scheme, such as rope-tv; `rope-mm schemes --names` lists them all"
    )
    sizes.add_argument("--head-dim", type=int, default=HEAD_DIM, help="channels of a head (%(default)s)")
    sizes.add_argument("--heads", type=int, help="rows of Omega, for schemes that give each head its own")
    about = "a scheme in numbers: pairs, wavelengths, and positions of tokens"
    show = commands.add_parser("show", parents=[sizes], help=about)
    show.add_argument(
        "segments",
        metavar="SEGMENTS",
        nargs="?",
        default=SHOWN,
        help='such as "unrotated:1 text:5 image:2x3 video:4x2x2@2fps": a class token, text, an image of 2 '
        'rows and 3 columns of patches, and 4 frames at 2 a second; "%(default)s" if omitted',
    )
    show.set_defaults(run=print_positions)
    about = "test that a scheme is a rotation and depends on distances only"
    check = commands.add_parser("check", parents=[sizes], help=about)
    check.set_defaults(run=print_check)


def add_choose(commands: Any) -> None:
    """The subcommand choose."""
    page = commands.add_parser("choose", help="which scheme for which task, with the reason and the code")
    page.add_argument("task", metavar="TASK", nargs="?", help=f"one of {', '.join(CHOICES)}")
    page.add_argument("--head-dim", type=int, default=HEAD_DIM, help="channels of a head (%(default)s)")
    page.set_defaults(run=print_choice)


def add_explore(commands: Any) -> None:
    """The subcommand explore."""
    about = "a local page in the browser: positions, frequencies, properties"
    page = commands.add_parser("explore", help=about)
    page.add_argument("--port", type=int, default=8137, help="of the page; 0 takes any (%(default)s)")
    page.add_argument("--no-browser", action="store_true", help="do not open a browser")
    page.set_defaults(run=explore)


def make_parser() -> argparse.ArgumentParser:
    """Subcommands and their arguments; without one the help is printed."""
    parser = argparse.ArgumentParser(prog="rope-mm", description="Look at rotary position encodings.")
    parser.add_argument("--version", action="version", version=f"rope-mm {__version__}")
    parser.set_defaults(run=lambda args: parser.print_help() or 0)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for add in (add_schemes, add_choose, add_show_and_check, add_lens, add_train, add_explore):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a check failed, 2 for bad input, said in one line.

    Args:
        argv: the words of the command; those of this process if None.
    """
    args = make_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
    except ValueError as error:
        print(f"rope-mm: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `rope-mm schemes | head` closed the pipe: no reader is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
