"""A local page that shows a scheme: positions, frequencies, promises, and the Python lines that give it.

`describe` answers one view of the page as plain data; `serve` puts it on 127.0.0.1. The page computes nothing
of its own: every number on it comes from `describe`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from inspect import signature
from typing import Any
from urllib.parse import parse_qs, urlsplit

from torch import Tensor

from rope_mm.analysis.geometry import decay, describe_pairs, find_collisions, find_overlaps, scores
from rope_mm.analysis.properties import COLUMNS, LayoutProperties, measure_properties
from rope_mm.positions.layouts import LAYOUTS
from rope_mm.schemes.extensions import EXTENSIONS
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import SCHEMES
from rope_mm.segments import Segment, read_segments, type_name

MAX_TOKENS, MAX_CHARACTERS, MAX_HEAD_DIM = 2_048, 400, 512
EXAMPLES = {
    "text and an image": "text:5 image:4x6 text:5",
    "text inside a long video": "text:4 video:16x2x2 text:12",
    "two images": "text:3 image:3x3 text:2 image:2x5 text:3",
    "a video between texts": "text:4 video:6x3x4 text:4",
    "text alone": "text:32",
}


@dataclass(frozen=True)
class View:
    """What the page is asked to show.

    Attributes:
        scheme: a key of SCHEMES.
        segments: their text form, such as "text:5 image:2x3".
        head_dim: channels of a head.
        theta: the base of the frequencies; None for the scheme's own.
        options: numbers of the layout that differ from the scheme's own.
        extension: a key of EXTENSIONS that takes a factor, or "" for none.
        factor: of the extension.
        original: length that the model was trained at, for extensions that ask for it.
        token: the token whose scores against all others are shown.
    """

    scheme: str = "rope-tv"
    segments: str = EXAMPLES["text and an image"]
    head_dim: int = 64
    theta: float | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    extension: str = ""
    factor: float = 1.0
    original: int = 4_096
    token: int = 0


def read_view(query: str) -> View:
    """A view from the query part of an address; `opt.rate=0.5` is the layout's option `rate`.

    Args:
        query: such as "scheme=rope-tv&segments=text:5&opt.rate=0.5".

    Raises:
        ValueError: an unknown name, a value that is not a number, a text that is too long.
    """
    given = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    if long := [name for name, value in given.items() if len(value) > MAX_CHARACTERS]:
        raise ValueError(f"{long[0]} has more than {MAX_CHARACTERS} characters; give it shorter")
    numbers = {"head_dim": int, "theta": float, "factor": float, "original": int, "token": int}
    known = {entry.name for entry in fields(View)} - {"options"}
    view: dict[str, Any] = {"options": {}}
    for name, value in given.items():
        if name.startswith("opt."):
            view["options"][name.removeprefix("opt.")] = read_number(name, value, float)
        elif name in known:
            view[name] = read_number(name, value, numbers[name]) if name in numbers else value
        else:
            raise ValueError(f"{name!r} is not part of a view; there are: {', '.join(sorted(known))}")
    return View(**view)


def read_number(name: str, value: str, kind: type) -> Any:
    """A finite number from its text.

    Raises:
        ValueError: with the name and the text.
    """
    try:
        number = kind(value)
        if math.isfinite(number):
            return number
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a finite {'whole ' if kind is int else ''}number, not {value!r}")


def factor_extensions() -> list[str]:
    """Names of the extensions that a factor and an original length are enough for."""
    wanted = {}
    for name, kind in EXTENSIONS.items():
        required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        enough = required <= {"factor", "original_max_positions"}
        wanted[name] = enough and "factor" in {f.name for f in fields(kind)}
    return [name for name, fits in wanted.items() if fits]


def changes_of(view: View) -> dict[str, Any]:
    """The fields of the scheme that a view changes, as `Scheme.replace` takes them."""
    changes: dict[str, Any] = {}
    if view.theta is not None:
        changes["theta"] = view.theta
    if view.options:
        own = dict(SCHEMES[view.scheme].options)
        changes["options"] = tuple(sorted((own | dict(view.options)).items()))
    if view.extension:
        if view.extension not in (known := factor_extensions()):
            raise ValueError(f"extension {view.extension!r} is unknown here; there are: {', '.join(known)}")
        takes = {f.name for f in fields(EXTENSIONS[view.extension])}
        numbers = {"factor": view.factor, "original_max_positions": view.original}
        chosen = {name: value for name, value in numbers.items() if name in takes}
        changes["extensions"] = ({"rope_type": view.extension, **chosen},)
    return changes


def check_size(view: View) -> list[Segment]:
    """The segments of a view.

    Raises:
        ValueError: more than the page can show, with the number of tokens.
    """
    segments = read_segments(view.segments)
    tokens = sum(segment.tokens for segment in segments)
    if not 0 < tokens <= MAX_TOKENS:
        raise ValueError(f"the segments hold {tokens} tokens; the page shows 1 to {MAX_TOKENS}")
    if not 0 <= view.token < tokens:
        raise ValueError(f"token must be 0 to {tokens - 1}, not {view.token}")
    if not 2 <= view.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 2 to {MAX_HEAD_DIM}, not {view.head_dim}")
    return segments


def describe(view: View) -> dict[str, Any]:
    """Everything that the page shows of a view, as data for JSON.

    Args:
        view: what is asked.

    Returns:
        axes; tokens with their segment and position; collisions; overlaps in time; pairs with their
        wavelengths; decay curves; the promises; scores of the chosen token; options of the layout; Python
        lines.

    Raises:
        ValueError: what `Scheme`, `place` and the bounds of the page refuse.
    """
    segments = check_size(view)
    scheme = SCHEMES[view.scheme].replace(**changes_of(view))
    positions, _ = scheme.place(segments)
    omega = scheme.omega(view.head_dim, heads=1, length=float(positions.max()) + 1)[0]
    span = (positions.amax(0) - positions.amin(0)).tolist()
    return {
        "axes": list(scheme.axes),
        "theta": scheme.theta,
        "tokens": describe_tokens(segments, positions),
        "collisions": find_collisions(positions),
        "overlaps": find_overlaps(segments, positions[:, 0]),
        "pairs": describe_pairs(omega, span),
        "decay": {axis: decay(omega[row]) for row, axis in enumerate(scheme.axes)},
        "promises": promises_of(scheme),
        "scores": scores(positions, omega, view.token),
        "options": layout_options(scheme),
        "python": python_lines(view),
        "hugging_face": hugging_face_lines(view),
    }


def describe_tokens(segments: list[Segment], positions: Tensor) -> list[dict[str, Any]]:
    """Segment number, kind, label and position of every token.

    Args:
        segments: what the sequence holds.
        positions: (s, a).
    """
    found, place = [], positions.tolist()
    for number, segment in enumerate(segments):
        kind = type_name(type(segment))
        _, rows, columns = segment.grid
        for index in range(segment.tokens):
            frame, rest = divmod(index, rows * columns)
            row, column = divmod(rest, columns)
            inside = f"frame {frame}, row {row}, column {column}" if rows > 1 else f"token {index}"
            label = f"{segment}: {inside}"
            found.append({"segment": number, "kind": kind, "label": label, "position": place[len(found)]})
    return found


@cache
def promises_of(scheme: Scheme) -> dict[str, str]:
    """The row of the promise table of a scheme, or why it has none."""
    try:
        row: LayoutProperties = measure_properties(scheme)
    except ValueError as error:
        return {"not measured": str(error)}
    return {name: cell(row) for name, cell in COLUMNS.items()}


def layout_options(scheme: Scheme) -> dict[str, float]:
    """The numbers that the scheme's layout takes, with their present values."""
    parameters = signature(LAYOUTS[scheme.layout].image_rule).parameters.values()
    own: dict[str, float] = {
        p.name: p.default for p in parameters if isinstance(p.default, float) or type(p.default) is int
    }
    return own | {name: value for name, value in dict(scheme.options).items() if name in own}


def arguments(view: View) -> str:
    """The changes of a view as Python keywords."""
    return "".join(f", {name}={value!r}" for name, value in changes_of(view).items())


def python_lines(view: View) -> str:
    """Python that gives exactly the Rotary and the positions of a view."""
    return (
        "from rope_mm import Rotary\n\n"
        f"rope = Rotary(head_dim={view.head_dim}, scheme={view.scheme!r}{arguments(view)})\n"
        f"positions, cursor = rope.place({view.segments!r})\n"
        "q, k = rope(q, k, positions)  # q (b, s, h, d), k (b, s, g, d)\n"
    )


def hugging_face_lines(view: View) -> str:
    """Python that gives the scheme of a view to a model of transformers."""
    changed = f".replace({arguments(view)[2:]})" if changes_of(view) else ""
    return (
        "from rope_mm import SCHEMES\nfrom rope_mm.hf import set_rope, unset_rope\n\n"
        f"handle = set_rope(model, SCHEMES[{view.scheme!r}]{changed})\n"
        "unset_rope(model)  # takes it back\n"
    )


def choices() -> dict[str, Any]:
    """What the controls of the page offer, and the view that it begins with."""
    extensions = factor_extensions()
    return {
        "schemes": list(SCHEMES),
        "extensions": extensions,
        "examples": EXAMPLES,
        "view": asdict(View()),
        "without_theta": {
            name: reason for name in SCHEMES if (reason := SCHEMES[name].unused.get("theta"))
        },  # but for extensions that read theta
        "read_theta": [name for name in extensions if EXTENSIONS[name].reads_theta],
    }


class Handler(BaseHTTPRequestHandler):
    """Answers the page, its choices and its views, to this machine alone."""

    def do_GET(self) -> None:
        """Answer one request: 200, 400 with a sentence, 403 for a foreign host name, 404."""
        if (self.headers.get("Host") or "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
            return self.answer(403, "text/plain", b"this page is for this machine alone")
        address = urlsplit(self.path)
        if address.path == "/":
            return self.answer(
                200, "text/html", files("rope_mm.analysis").joinpath("explorer.html").read_bytes()
            )
        if address.path == "/choices":
            return self.answer_json(200, choices())
        if address.path != "/view":
            return self.answer(404, "text/plain", b"there is nothing here")
        try:
            self.answer_json(200, describe(read_view(address.query)))
        except ValueError as error:
            self.answer_json(400, {"error": str(error)})

    def answer_json(self, code: int, data: Mapping[str, Any]) -> None:
        """Send data as JSON."""
        self.answer(code, "application/json", json.dumps(data).encode())

    def answer(self, code: int, kind: str, body: bytes) -> None:
        """Send a body; the page may load nothing from elsewhere."""
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline' data:")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""


def serve(port: int = 8137) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1; call its `serve_forever`, and `server_close` when done.

    Args:
        port: 0 takes any that is free; `server.server_port` is the one that was taken.

    Raises:
        ValueError: a port that is in use or not allowed.
    """
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"port {port} cannot be used ({error}); give another by --port") from None
